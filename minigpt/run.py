"""From a configuration to a finished run: find the text and the folder, make the trainer, train, draw the curve."""

from __future__ import annotations

import math
import os
from dataclasses import fields, replace
from pathlib import Path

import tinytensor as tt
from minigpt import checkpoint
from minigpt.checkpoint import CheckpointError
from minigpt.config import PRESETS, TrainConfig
from minigpt.corpus import load_corpus, read_text
from minigpt.tracking import CURVE, METRICS, Tracker, duration, plot
from minigpt.trainer import Trainer

RUNS, DATA = Path("runs"), Path("data")


def run(config: TrainConfig) -> Path:
    """Train as `config` says; return the folder of the run. Everything is checked before the first file is written."""
    resumed = None
    if config.resume:
        out_dir = config.out_dir or _newest(config.preset)
        resumed = checkpoint.load(out_dir / checkpoint.LAST)
        config = _with_changes(resumed.config, config)
    tt.backend.xp_for(config.device)
    corpus = read_text(config.data) if config.data else load_corpus(config.source, DATA)
    if resumed is None:
        out_dir = _fresh_folder(config)
    elif corpus.sha256 != resumed.text_sha256:
        raise CheckpointError(f"{out_dir} was trained on another text than {corpus.path} (their hashes differ); give it --data")
    if config.shards is None:  # decided once, so that a run resumed on another machine gives the same numbers
        config = replace(config, shards=_shards(config))
    trainer = Trainer(config, corpus, out_dir, resumed)
    out_dir.mkdir(parents=True, exist_ok=True)
    with Tracker(out_dir, config.max_steps, trainer.step) as tracker:
        tracker.header(header(trainer))
        val_loss = trainer.train(tracker)
    title = f"{config.preset}: {trainer.model.config.parameter_count() / 1e6:.1f}M parameters on {corpus.source}"
    plot(out_dir / METRICS, out_dir / CURVE, title)
    tracker.console.print(
        f"validation loss [bold]{val_loss:.4f}[/bold] in {duration(trainer.seconds)}; "
        f"model, metrics, curve and samples are in [bold]{out_dir}[/bold]"
    )
    tracker.console.print('more verse: python scripts/generate.py --prompt "ROMEO:"', markup=False, highlight=False)
    return out_dir


def header(trainer: Trainer) -> dict[str, str]:
    """What this run is, for the terminal."""
    config, model, corpus = trainer.config, trainer.model.config, trainer.corpus
    return {
        "run": f"{config.preset} → {trainer.out_dir}" + (f", resumed at step {trainer.step}" if trainer.step else ""),
        "text": f"{corpus.source}, {len(corpus.text):,} characters, SHA-256 {corpus.sha256[:12]}…",
        "model": f"{model.n_layer} layers, {model.n_head} heads, width {model.n_embd}, context {model.block_size}, "
        f"vocabulary {model.vocab_size}: {model.parameter_count():,} parameters",
        "step": f"{config.micro_batch} × {config.accumulation} sequences = {config.tokens_per_step:,} tokens, "
        f"{model.flops_per_token() * config.tokens_per_step / 1e9:,.0f} GFLOP; {config.max_steps:,} steps",
        "device": f"{config.device}, {blas()}",
    }


def blas() -> str:
    """Which matrix kernels run, with a warning when the environment forces them."""
    from threadpoolctl import threadpool_info

    libraries = [p for p in threadpool_info() if p["user_api"] == "blas"]
    text = ", ".join(
        f"{p['internal_api']} {p['version']} {p.get('architecture', '')} kernels, {p['num_threads']} threads" for p in libraries
    )
    forced = os.environ.get("OPENBLAS_CORETYPE")
    return text + (f"; OPENBLAS_CORETYPE={forced} forces these, unset it to let OpenBLAS choose" if forced else "")


def _shards(config: TrainConfig) -> int:
    """A power of two: enough for every thread, small enough to stay in cache, and no more than there are rows."""
    wanted = max(config.threads or tt.parallel.cpu_threads(), config.micro_batch * config.block_size // 2048)
    return 2 ** min(math.ceil(math.log2(wanted)), math.floor(math.log2(config.micro_batch)))


def _with_changes(old: TrainConfig, given: TrainConfig) -> TrainConfig:
    """The resumed run's settings, with the flags that were given now; the model's shape cannot change."""
    default = PRESETS.get(given.preset, given)
    changed = {f.name: getattr(given, f.name) for f in fields(given) if getattr(given, f.name) != getattr(default, f.name)}
    changed.pop("resume", None)
    new = replace(old, **changed)
    if new.model(1) != replace(old.model(1), dropout=new.dropout) or new.tokenizer != old.tokenizer:
        names = [
            n for n in ("n_layer", "n_head", "n_embd", "block_size", "bias", "tokenizer") if getattr(new, n) != getattr(old, n)
        ]
        pairs = ", ".join(f"{n} {getattr(old, n)} → {getattr(new, n)}" for n in names)
        raise CheckpointError(f"a resumed run keeps its model, but the flags change {pairs}; leave them out or start a new run")
    return new


def _fresh_folder(config: TrainConfig) -> Path:
    """A folder that holds no run yet: the one asked for, or the next free runs/PRESET, runs/PRESET-2, …"""
    if config.out_dir is not None:
        if any((config.out_dir / name).exists() for name in (checkpoint.LAST, METRICS)):
            raise ValueError(f"{config.out_dir} already holds a run; continue it with --resume, or choose another --out-dir")
        return config.out_dir
    folder, number = RUNS / config.preset, 2
    while folder.exists():
        folder, number = RUNS / f"{config.preset}-{number}", number + 1
    return folder


def _newest(preset: str) -> Path:
    runs = [p.parent for p in RUNS.glob(f"{preset}*/{checkpoint.LAST}") if p.parent.name.removeprefix(preset)[:1] in ("", "-")]
    if not runs:
        raise CheckpointError(f"no run of preset {preset} to resume below {RUNS}/; name its folder with --out-dir")
    return max(runs, key=lambda p: (p / checkpoint.LAST).stat().st_mtime)
