"""From a configuration to a finished run: find the text and the folder, make the trainer, train, draw the curve."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import tinytensor as tt
from minigpt import checkpoint
from minigpt.checkpoint import Checkpoint, CheckpointError
from minigpt.config import TrainConfig
from minigpt.corpus import Corpus, load_corpus, read_text
from minigpt.tracking import CURVE, METRICS, PLAIN, Tracker, duration, plot
from minigpt.trainer import Trainer

RUNS, DATA = Path("runs"), Path("data")


def run(config: TrainConfig) -> Path:
    """Train as `config` says; return the folder of the run. Everything is checked before the first file is written."""
    tt.backend.xp_for(config.device)
    corpus = read_text(config.data) if config.data else load_corpus(config.source, DATA)
    saved = None
    if config.resume:
        out_dir = _resumed_folder(config)
        saved = checkpoint.load(out_dir / checkpoint.LAST)
        _check_resumable(out_dir, saved, config, corpus)
    else:
        out_dir = _fresh_folder(config)
    config = replace(config, out_dir=out_dir, resume=False, shards=config.resolved_shards())
    trainer = Trainer(config, corpus, out_dir, saved)
    out_dir.mkdir(parents=True, exist_ok=True)
    with Tracker(out_dir, config.max_steps, trainer.step) as tracker:
        tracker.header(header(trainer))
        trainer.train(tracker)
    title = f"{config.preset}: {trainer.model.config.parameter_count() / 1e6:.1f}M parameters on {corpus.source}"
    plot(out_dir / METRICS, out_dir / CURVE, title)
    opening = "ROMEO:" if not set("ROMEO:") - set(corpus.text) else corpus.text.split(maxsplit=1)[0]
    where = "" if out_dir.parent == RUNS else f' --run "{out_dir}"'
    tracker.console.print(
        f"validation loss {trainer.val_loss:.4f} in {duration(trainer.seconds)}; "
        f"model, metrics, curve and samples are in {out_dir}\n"
        f'more verse: python scripts/generate.py{where} --prompt "{opening}"',
        **PLAIN,
    )
    return out_dir


def resumed_config(config: TrainConfig) -> TrainConfig:
    """The settings of the run that `config` asks to resume: the defaults for the flags given with --resume."""
    out_dir = _resumed_folder(config)
    return replace(checkpoint.load(out_dir / checkpoint.LAST).config, out_dir=out_dir, resume=True)


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


def _check_resumable(out_dir: Path, saved: Checkpoint, config: TrainConfig, corpus: Corpus) -> None:
    """A resumed run keeps its model, its tokenizer and its text."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "tokenizer")
    changed = [
        f"{n} {getattr(saved.config, n)} → {getattr(config, n)}"
        for n in names
        if getattr(saved.config, n) != getattr(config, n)
    ]
    if changed:
        raise CheckpointError(
            f"{out_dir} cannot go on with another model ({', '.join(changed)}); drop those flags or start a new run"
        )
    if corpus.sha256 != saved.text_sha256:
        raise CheckpointError(
            f"{out_dir} was trained on another text than {corpus.path} (the hashes differ); name its text with --data"
        )


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


def _resumed_folder(config: TrainConfig) -> Path:
    """The run to go on with: the folder given, or the newest run of the preset."""
    if config.out_dir is not None:
        if not (config.out_dir / checkpoint.LAST).exists():
            raise CheckpointError(f"{config.out_dir} holds no checkpoint to resume; leave out --resume to start a run there")
        return config.out_dir
    own = re.compile(re.escape(config.preset) + r"(-\d+)?")
    runs = [p.parent for p in RUNS.glob(f"*/{checkpoint.LAST}") if own.fullmatch(p.parent.name)]
    if not runs:
        raise CheckpointError(f"no run of preset {config.preset} to resume below {RUNS}/; name its folder with --out-dir")
    return max(runs, key=lambda p: (p / checkpoint.LAST).stat().st_mtime)
