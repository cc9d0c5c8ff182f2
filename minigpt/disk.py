"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np


def write(path: Path, text: str, suffix: str = "tmp") -> None:
    """Make or replace a small file, in a folder made for it; the old one or the new one is there at any time, whole. OSError
    names it. `suffix` is of the unfinished file: one of its own where another process may be writing the same."""
    part = path.with_name(f"{path.name}.{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error})") from None
    finally:
        with suppress(OSError):
            part.unlink()


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file, which others may read if they may read the user's other files. OSError says why it cannot."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)  # in a file of its own, that nobody else may read
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None
    path.chmod(mode)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill within this block, which gets its name when the block ends well and vanishes otherwise.

    ValueError when something is in `path` already; OSError names it when it cannot be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already; choose another folder with --out-dir")
    path = path.resolve()
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # nobody else's
    try:
        part.mkdir(parents=True)
        yield part
        if path.exists():
            path.rmdir()  # not every system renames over a folder, even an empty one
        os.rename(part, path)
    except OSError as error:
        if error.errno is None:  # a sentence already, such as that the hub does not answer
            raise
        why = error.strerror or error  # that names the unfinished folder
        raise OSError(f"{path} could not be written ({why}); choose another folder with --out-dir") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
