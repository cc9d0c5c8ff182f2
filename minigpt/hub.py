"""The files of a model: in a folder, or in a repository of the Hugging Face hub.

What was fetched once stays in the hub's cache and is not asked for again: the same name goes on meaning the same weights.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from minigpt.program import missing

_REPOSITORY = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)  # gpt2, or owner/name


def find(source: str, name: str) -> Path | None:
    """The file `name` of the model in the folder `source`, or else in that repository of the hub; None where it has no such
    file. ValueError: the source is neither, or closed to us; OSError: the hub cannot be reached; RuntimeError: there is no
    huggingface_hub.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if folder.exists():
        raise ValueError(f"{source} is a file; name the folder that it is in, {folder.parent}")
    if not _REPOSITORY.fullmatch(source):
        raise ValueError(f"there is no folder {source}; name one, or a repository of the Hugging Face hub such as gpt2")
    return _fetch(source, name)


def _fetch(source: str, name: str) -> Path | None:
    try:
        from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache
    except ImportError as error:
        needs = f"to look for it on the hub needs {missing('huggingface_hub', 'hf', error)}"
        raise RuntimeError(f"there is no folder {source}, and {needs}") from None
    try:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt
        known = try_to_load_from_cache(source, name)
        if known is None:
            return Path(hf_hub_download(source, name))
        return Path(known) if isinstance(known, str) else None  # otherwise the cache knows that there is none
    except errors.LocalEntryNotFoundError as error:
        raise OSError(
            f"{source} is no folder, the hub's cache does not have its {name}, and {constants.ENDPOINT} does not "
            f"answer ({_first_line(error.__cause__ or error)}); connect to the network, or name a folder"
        ) from None
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError:
        raise ValueError(
            f"the hub's repository {source} is gated; accept its conditions on its page, then log in with: hf auth login"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ValueError(
            f"there is no folder {source}, and no repository of that name on the hub that is open to you; "
            "correct the name, or log in with: hf auth login"
        ) from None
    except Exception as error:  # each version of the package has its own for a line that breaks
        raise OSError(f"{name} of {source} could not be fetched ({_first_line(error)}); try again") from None


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]
