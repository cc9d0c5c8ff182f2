"""A run on disk: one self-contained safetensors file per save. Loading executes nothing."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt import tokenizer
from minigpt.config import TrainConfig
from minigpt.model import GPT

SCHEMA = 1
LAST, BEST = "last.safetensors", "best.safetensors"
_PLAIN = ("step", "tokens", "seconds", "val_loss", "best_val_loss", "text_sha256")  # fields that are JSON as they are


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
    text_sha256: str

    def build_model(self) -> GPT:
        """The model of this checkpoint, with its weights, ready to speak."""
        model = GPT(self.config.model(self.tokenizer.vocab_size))
        model.load_state_dict(self.model)
        return model.for_sampling()


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write to a temporary file, flush it to disk, then rename: a crash leaves the old file or the new one, whole."""
    from safetensors.numpy import save_file

    moments = {k: v for k, v in checkpoint.optimizer.items() if k not in ("steps", "param_groups")}
    tensors = {f"model.{name}": array for name, array in checkpoint.model.items()}
    for moment, arrays in moments.items():
        tensors.update({f"optimizer.{moment}.{i}": array for i, array in enumerate(arrays)})
    state = {
        "schema": SCHEMA,
        "config": checkpoint.config.to_dict(),
        "tokenizer": checkpoint.tokenizer.to_dict(),
        "optimizer": {k: checkpoint.optimizer[k] for k in ("steps", "param_groups")} | {"moments": sorted(moments)},
        **{k: getattr(checkpoint, k) for k in _PLAIN},
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata={"minigpt": json.dumps(state)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there is one only after a failure
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; CheckpointError says what is wrong with the file."""
    state, tensors = _read(path)
    try:
        return _restored(state, tensors)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {error!r}") from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description and the arrays of a file, which `save` may have written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            state = json.loads((file.metadata() or {}).get("minigpt", "null"))
            if not isinstance(state, dict) or not isinstance(state.get("schema"), int):
                raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of minigpt")
            if state["schema"] > SCHEMA:
                raise CheckpointError(f"{path} has schema {state['schema']}, this program reads up to {SCHEMA}; update it")
            return state, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from None


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


def newest_run(root: Path = Path("runs")) -> Path:
    """The run folder below `root` whose checkpoint was written last."""
    saves = [p for p in root.glob(f"*/{LAST}") if p.is_file()]
    if not saves:
        raise CheckpointError(f"no run with a checkpoint below {root}/; train one with: python scripts/train.py quick")
    return max(saves, key=lambda p: p.stat().st_mtime).parent


def load_run(folder: Path) -> Checkpoint:
    """The best checkpoint of a run folder (or the file itself, when given one)."""
    if folder.is_file():
        return load(folder)
    for name in (BEST, LAST):
        if (folder / name).is_file():
            return load(folder / name)
    raise CheckpointError(f"{folder} holds no checkpoint ({BEST} or {LAST})")
