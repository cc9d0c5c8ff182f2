"""A run on disk: one self-contained safetensors file per save, sealed with a SHA-256. Loading executes nothing.

A save writes a temporary file, flushes it to disk, and only then renames it; the last checkpoint becomes the previous one a
moment before. So at any instant there is a whole checkpoint, and `load_newest` finds it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minigpt import disk, facts, tokenizer
from minigpt.config import TrainConfig
from minigpt.gpt2 import Pretrained
from minigpt.model import GPT

SCHEMA = 2
LAST, PREVIOUS, BEST = KEPT = "last.safetensors", "previous.safetensors", "best.safetensors"
# fields that are JSON as they are
_PLAIN = ("step", "tokens", "seconds", "val_loss", "best_val_loss", "skipped", "skipped_in_a_row", "text_sha256")


log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file and why."""


@dataclass
class Checkpoint:
    """Everything a run needs to go on, or a model to speak."""

    config: TrainConfig
    tokenizer: tokenizer.Tokenizer
    model: dict[str, np.ndarray]
    optimizer: dict[str, Any]
    step: int
    tokens: int
    seconds: float
    val_loss: float
    best_val_loss: float
    skipped: int  # updates left out for a loss or gradient that was not finite,
    skipped_in_a_row: int  # and those of them that were the last steps
    text_sha256: str
    path: Path | None = None  # the file that it was read from,
    stamps: list[tuple[str, int, int]] = field(default_factory=list)  # and the `stamps` of its folder then

    def build_model(self, device: str = "cpu") -> GPT:
        """The model of this checkpoint, with its weights, ready to speak."""
        found = self.pretrained()
        return GPT.from_weights(found.config, {k: a.copy() for k, a in found.weights.items()}).to(device).for_sampling()

    def pretrained(self) -> Pretrained:
        """The model alone."""
        title = f"{self.config.preset} after {self.step:,} step{'s' * (self.step != 1)}, validation loss {self.val_loss:.3f}"
        return Pretrained(self.config.model(self.tokenizer.vocab_size), self.model, self.tokenizer, title)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write the file so that a crash or a full disk leaves the old one or the new one, whole."""
    moments = {k: v for k, v in checkpoint.optimizer.items() if k not in ("steps", "param_groups")}
    tensors = {f"model.{name}": array for name, array in checkpoint.model.items()}
    for moment, arrays in moments.items():
        tensors.update({f"optimizer.{moment}.{i}": array for i, array in enumerate(arrays)})
    state = json.dumps(
        {
            "schema": SCHEMA,
            "config": checkpoint.config.to_dict(),
            "tokenizer": checkpoint.tokenizer.to_dict(),
            "optimizer": {k: checkpoint.optimizer[k] for k in ("steps", "param_groups")} | {"moments": sorted(moments)},
            "versions": facts.versions("numpy", "safetensors"),
            **{k: getattr(checkpoint, k) for k in _PLAIN},
        }
    )
    temporary = path.with_name(path.name + ".tmp")
    try:
        disk.write_tensors(temporary, tensors, {"minigpt": state, "sha256": _seal(state, tensors)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if path.name == LAST and path.exists():
            os.replace(path, path.with_name(PREVIOUS))
        os.replace(temporary, path)
    except OSError as error:
        before = "; the save before it is whole: go on with --resume" if saved_in(path.parent) else ""
        raise OSError(f"{path} could not be written ({error.strerror or error}){before}") from None
    finally:
        temporary.unlink(missing_ok=True)  # there is one only after a failure
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _seal(state: str, tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 of all that a checkpoint says: its description, and each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; CheckpointError says what is wrong with the file."""
    seen = stamps(path.parent)
    state, tensors = _read(path)
    try:
        found = _restored(state, tensors)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error!r}") from None
    found.path, found.stamps = path, seen
    return found


def stamps(folder: Path) -> list[tuple[str, int, int]]:
    """What changes whenever a run saves in this folder."""
    return [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in saved_in(folder)]


def set_aside(folder: Path, whole: Checkpoint) -> None:
    """Where `whole` is not the last checkpoint, because that one is damaged, keep that out of the way of later saves."""
    last = folder / LAST
    if whole.path != last and last.exists():
        os.replace(last, last.with_name(LAST + ".damaged"))


def load_newest(folder: Path) -> Checkpoint:
    """The newest whole checkpoint of a run, with a warning about every newer one that is damaged."""
    seen = stamps(folder)
    paths = sorted(saved_in(folder), key=lambda path: (path.name == LAST, _step(path)), reverse=True)
    found = _first_whole(paths, folder)
    found.stamps = seen
    return found


def _first_whole(paths: list[Path], folder: Path) -> Checkpoint:
    for i, path in enumerate(paths, 1):
        try:
            return load(path)
        except CheckpointError as error:
            if i == len(paths):
                raise
            log.warning("warning: %s; trying %s", error, paths[i].name)
    raise CheckpointError(f"{folder} holds no checkpoint ({', '.join(KEPT)}); name the folder of a run")


def _step(path: Path) -> int:
    """The step that a checkpoint says it is of, unverified; −1 where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return int(json.loads((file.metadata() or {})["minigpt"])["step"])
    except (SafetensorError, LookupError, TypeError, ValueError, RecursionError, OSError):
        return -1


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description and the arrays of a file that `save` has written, and nobody changed since."""
    from safetensors import SafetensorError, safe_open

    try:
        version = path.stat().st_ino
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            metadata = file.metadata() or {}
            text = metadata.get("minigpt", "null")
            state = json.loads(text)
            if not isinstance(state, dict) or not isinstance(state.get("schema"), int):
                raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of minigpt")
            if state["schema"] != SCHEMA:
                newer = state["schema"] > SCHEMA
                raise CheckpointError(
                    f"{path} has schema {state['schema']}, this program reads {SCHEMA}; "
                    + ("update the program" if newer else "load it with the version that wrote it")
                )
        tensors = {}
        for name in names:  # opened for each, or all of the file would stay mapped beside the arrays read from it
            with safe_open(path, framework="numpy") as file:
                tensors[name] = file.get_tensor(name)
        if path.stat().st_ino != version:  # a run has saved in the meantime
            return _read(path)
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, RecursionError, OSError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from None
    if _seal(text, tensors) != metadata.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its content does not match the SHA-256 stored in it")
    return state, tensors


def _restored(state: dict[str, Any], tensors: dict[str, np.ndarray]) -> Checkpoint:
    optimizer = {k: state["optimizer"][k] for k in ("steps", "param_groups")}
    for moment in state["optimizer"]["moments"]:
        optimizer[moment] = [tensors[f"optimizer.{moment}.{i}"] for i in range(len(optimizer["steps"]))]
    return Checkpoint(
        config=TrainConfig.from_dict(state["config"]),
        tokenizer=tokenizer.from_dict(state["tokenizer"]),
        model={name[len("model.") :]: array for name, array in tensors.items() if name.startswith("model.")},
        optimizer=optimizer,
        **{k: state[k] for k in _PLAIN},
    )


def saved_in(folder: Path) -> list[Path]:
    """The checkpoints that a folder holds, those written last in a run first."""
    return [folder / name for name in KEPT if (folder / name).is_file()]


def load_run(folder: Path) -> Checkpoint:
    """The best checkpoint of a run folder, or another where that is damaged or missing; or the file itself, when given one."""
    if folder.is_file():
        return load(folder)
    paths = sorted(saved_in(folder), key=lambda path: path.name == BEST, reverse=True)
    return _first_whole(paths, folder)
