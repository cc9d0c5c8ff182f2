"""The folder of a run: which one, that it is ours alone, and run.json, which says what the run is."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt import checkpoint, disk
from minigpt.checkpoint import CheckpointError
from minigpt.config import TrainConfig
from minigpt.program import command

RUNS = Path("runs")
RECORD, LOCK, METRICS, CURVE, SAMPLES = "run.json", "run.lock", "metrics.jsonl", "curve.png", "samples"
PROFILE, TIMELINE, ROOFLINE = "profile.txt", "profile.json", "roofline.png"


def fresh(config: TrainConfig) -> Path:
    """A folder that holds no run yet: the one asked for, or the next free runs/PRESET, runs/PRESET-2, …"""
    if config.out_dir is not None:
        metrics = config.out_dir / METRICS  # empty where a run was killed before its first checkpoint
        if checkpoint.saved_in(config.out_dir) or (metrics.exists() and metrics.stat().st_size):
            raise ValueError(f"{config.out_dir} already holds a run; continue it with --resume, or choose another --out-dir")
        return config.out_dir
    folder, number = RUNS / config.preset, 2
    while folder.exists():
        folder, number = RUNS / f"{config.preset}-{number}", number + 1
    return folder


def to_resume(config: TrainConfig) -> Path:
    """The folder of the run to go on with: the one given, or the newest run of the preset."""
    if config.out_dir is not None:
        if not checkpoint.saved_in(config.out_dir):
            raise CheckpointError(f"{config.out_dir} holds no checkpoint to resume; leave out --resume to start a run there")
        return config.out_dir
    return newest(config.preset)


def newest(preset: str | None = None, root: Path = RUNS) -> Path:
    """The run folder below `root`, of this preset's or of all, whose checkpoint was written last."""
    own = re.compile(".*" if preset is None else re.escape(preset) + r"(-\d+)?")
    runs = [folder for folder in root.glob("*") if own.fullmatch(folder.name) and checkpoint.saved_in(folder)]
    if not runs:
        what = "run" if preset is None else f"run of preset {preset}"
        train = f"{command('train')} {preset or 'quick'}"
        raise CheckpointError(f"no {what} with a checkpoint below {root}/; train one with: {train}")
    return max(runs, key=lambda folder: checkpoint.saved_in(folder)[0].stat().st_mtime)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, prove that it can be written to, and keep other runs out of it while this one lasts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  (held for the whole run)
        _take(lock, folder)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out-dir") from None
    with lock:
        yield


def _take(lock: Any, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows, which refuses to open what another process has open for writing
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        raise ValueError(f"{folder} is in use by the run of process {holder}; stop it, or choose another --out-dir") from None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Replace run.json. Numbers that are not finite, which JSON does not know, become strings."""
    disk.write(folder / RECORD, json.dumps(_strict(record), indent=1) + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_record(folder: Path) -> dict[str, Any]:
    """run.json, or nothing where there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
