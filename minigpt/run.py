"""From a configuration to a finished run: find the text and the folder, make the trainer, train, draw the curve."""

from __future__ import annotations

import math
import secrets
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import tinytensor as tt
from minigpt import checkpoint, disk, facts, folder, start
from minigpt.checkpoint import Checkpoint, CheckpointError
from minigpt.config import TrainConfig
from minigpt.curve import plot
from minigpt.distributed import ranks
from minigpt.program import command
from minigpt.sampling import opening
from minigpt.tokens import Text
from minigpt.tracking import Quiet, Tracker, duration
from minigpt.trainer import Trainer
from tinytensor import parallel
from tinytensor.inspect import profile
from tinytensor.inspect.cost import gemm_peak


class Stopped(Exception):
    """The run was asked to stop; it has saved, and can be resumed."""


def run(config: TrainConfig, saved: Checkpoint | None = None) -> Path:
    """Train as `config` says; return the folder of the run. Everything is checked before the first file is written.

    `saved` is the checkpoint to resume, for a caller who has read it already.
    """
    tt.backend.xp_for(config.device)
    with parallel.limited(config.threads or parallel.cpu_threads()), ranks(config.device, config.rank_timeout) as job:
        corpus = job.first(lambda: start.text(config))
        out_dir = job.first(lambda: folder.to_resume(config) if config.resume else folder.fresh(config))
        if config.resume:
            saved = saved or checkpoint.load_newest(out_dir)
            _check_resumable(out_dir, saved, config, corpus)
            pretrained = None
        else:
            config, pretrained = job.first(lambda: start.weights(config, corpus))
        profiled = config.profile
        config = replace(config, out_dir=out_dir, resume=False, shards=config.resolved_shards(), profile=None)
        trainer = Trainer(config, corpus, out_dir, saved, job, pretrained)
        with trainer.stop:
            if job.rank:
                finished = trainer.step >= config.max_steps or trainer.train(Quiet())
            else:
                with folder.locked(out_dir):
                    if checkpoint.stamps(out_dir) != (saved.stamps if saved else []):
                        raise ValueError(f"{out_dir} was written to by another run while this one was starting; start it again")
                    if saved:
                        checkpoint.set_aside(out_dir, saved)
                    finished = _report(trainer, profiled or 0)
    if not finished:
        raise Stopped(out_dir)
    return out_dir


def _report(trainer: Trainer, profiled: int) -> bool:
    """Train, and tell about it: what rank 0 does."""
    config, out_dir = trainer.config, trainer.out_dir
    finished = trainer.step >= config.max_steps
    with Tracker(out_dir, config.max_steps, trainer.step) as tracker:
        tracker.header(header(trainer))
        if not finished:
            _warn_of_long_evaluations(trainer, tracker)
            with _recorded(trainer, tracker), _profiled(trainer, tracker, profiled):
                finished = trainer.train(tracker)
    title = f"{config.preset}: {trainer.model.config.parameter_count() / 1e6:.1f}M parameters on {trainer.corpus.source}"
    plot(out_dir / folder.METRICS, out_dir / folder.CURVE, title)
    if finished:
        where = "" if out_dir.parent == folder.RUNS else f" --run {shlex.quote(str(out_dir))}"
        tracker.say(
            f"validation loss {trainer.val_loss:.4f} in {duration(trainer.seconds)}; "
            f"model, metrics, curve and samples are in {out_dir}\n"
            f"more verse: {command('generate')}{where} --prompt {shlex.quote(opening(trainer.tokenizer))}"
        )
    else:
        tracker.say(
            f"stopped by {_stopper(trainer)} after step {trainer.step}, which is saved in {out_dir}\n"
            f"to go on: {command('train')} {config.preset} --resume --out-dir {shlex.quote(str(out_dir))}"
        )
    return finished


def _warn_of_long_evaluations(trainer: Trainer, tracker: Tracker) -> None:
    config, tokens = trainer.config, len(trainer.data.val)
    if tokens > 3 * config.eval_interval * config.tokens_per_step:  # a step's backward pass costs two of forward
        tracker.say(
            f"warning: each evaluation reads {tokens:,} tokens, which takes longer than {config.eval_interval:,} steps; "
            f"use a smaller --val-share than {config.val_share:g}, or a larger --eval-interval"
        )


def _stopper(trainer: Trainer) -> str:
    return trainer.stop.received or "another rank"


@contextmanager
def _recorded(trainer: Trainer, tracker: Tracker) -> Iterator[None]:
    """Keep run.json, and its mirror, true: what the run is when it begins, how it ended and where its time went."""
    config, out_dir, first = trainer.config, trainer.out_dir, trainer.step
    record = {"id": secrets.token_hex(4), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | folder.read_record(out_dir)
    record.pop("summary", None)
    record |= {
        "status": "running",
        "config": config.to_dict(),
        "parameters": trainer.model.config.parameter_count(),
        "text": {"source": trainer.corpus.source, "sha256": trainer.corpus.sha256},
        "ranks": trainer.ranks.size,
        "threads": trainer.threads,
        **facts.environment(),
    }
    folder.write_record(out_dir, record)
    if config.wandb:
        from minigpt.mirror import Mirror

        tracker.mirror = Mirror(record["id"], out_dir.name, record["config"], out_dir, tracker.say)
    try:
        yield
        tracker.say(f"time: {trainer.clock.summary()}; {_speed(trainer, trainer.step - first)}")
        record["status"] = "complete" if trainer.step == config.max_steps else f"stopped by {_stopper(trainer)}"
    except BaseException as error:
        record["status"] = f"failed: {str(error) or repr(error)}"
        raise
    finally:
        record["summary"] = _summary(trainer, trainer.step - first)
        with suppress(OSError) if record["status"].startswith("failed") else nullcontext():  # a full disk has been told of
            folder.write_record(out_dir, record)
        if tracker.mirror:
            tracker.mirror.close(0 if record["status"] == "complete" else 1, record["summary"])


@contextmanager
def _profiled(trainer: Trainer, tracker: Tracker, steps: int) -> Iterator[None]:
    """Profile `steps` of the steps within this block, after two in which caches and memory settle, and tell what was seen."""
    p, made = profile(), 0

    @contextmanager
    def around_step() -> Iterator[None]:
        nonlocal made
        made += 1
        with p if 2 < made <= steps + 2 else nullcontext():
            yield
        if made == steps + 2:
            _tell(p, steps, trainer.out_dir, tracker)

    if steps:
        trainer.around_step = around_step
    yield
    if steps and made < steps + 2:
        _tell(p, made - 2, trainer.out_dir, tracker)


def _tell(p: profile, steps: int, out_dir: Path, tracker: Tracker) -> None:
    if steps < 1:
        tracker.say("nothing was profiled: the run ended within the two steps that are left out")
        return
    try:
        disk.write(out_dir / folder.PROFILE, str(p))
        p.trace(out_dir / folder.TIMELINE)
        p.roofline(out_dir / folder.ROOFLINE)
    except OSError as error:
        tracker.say(f"the profile could not be written ({error})")
        return
    files = f"{folder.PROFILE}, {folder.TIMELINE} (for ui.perfetto.dev) and {folder.ROOFLINE}"
    tracker.say(f"profiled {steps} step{'s' * (steps != 1)}: {p.summary()}\n{files} are in {out_dir}")


def _summary(trainer: Trainer, steps: int) -> dict[str, Any]:
    """How a run ended, and where the time of its last `steps` steps went."""
    losses = {"val_loss": trainer.val_loss, "best_val_loss": trainer.best_val_loss}
    return {
        "step": trainer.step,
        **{name: loss if math.isfinite(loss) else None for name, loss in losses.items()},
        "seconds": round(trainer.seconds, 3),
        "skipped": trainer.skipped,
        "steps_timed": steps,
        "seconds_by_phase": {name: round(s, 3) for name, s in trainer.clock.seconds.items()},
        "peak_memory": facts.peak_memory(),
    }


def _speed(trainer: Trainer, steps: int) -> str:
    """The rate of the training steps, without evaluations and checkpoints, and what it is of the machine's."""
    spent = sum(s for name, s in trainer.clock.seconds.items() if name not in ("evaluation", "checkpoint"))
    tokens = steps * trainer.config.tokens_per_step / spent if spent else 0.0
    rate = tokens * trainer.model.config.flops_per_token()
    peak = gemm_peak() * trainer.ranks.size if trainer.config.device == "cpu" else 0.0
    share = f", {rate / peak:.0%} of the matrix product's" if peak else ""
    return f"{tokens:,.0f} tokens/s, {rate / 1e9:,.0f} GFLOP/s{share}; at most {facts.peak_memory() / 1e6:,.0f} MB"


def header(trainer: Trainer) -> dict[str, str]:
    """What this run is, for the terminal."""
    config, model, corpus = trainer.config, trainer.model.config, trainer.corpus
    works = f"{trainer.threads} threads" if config.device == "cpu" else f"{facts.gpu()}, {config.precision}"
    works += f" on each of {trainer.ranks.size} ranks" if trainer.ranks.size > 1 else ""
    tokens = len(trainer.data.train) + len(trainer.data.val)
    return {
        "run": f"{config.preset} → {trainer.out_dir}" + (f", resumed at step {trainer.step}" if trainer.step else ""),
        "text": f"{corpus.source}, {corpus.characters:,} characters, {tokens:,} tokens, SHA-256 {corpus.sha256[:12]}…",
        "model": f"{model.n_layer} layers, {model.n_head} heads, width {model.n_embd}, context {model.block_size}, "
        f"vocabulary {model.vocab_size}: {model.parameter_count():,} parameters",
        "step": f"{config.micro_batch} × {config.accumulation} sequences = {config.tokens_per_step:,} tokens, "
        f"{model.flops_per_token() * config.tokens_per_step / 1e9:,.0f} GFLOP; {config.max_steps:,} steps",
        "device": f"{config.device}, {works}" + (f", {facts.blas()}" if config.device == "cpu" else ""),
    }


def _check_resumable(out_dir: Path, saved: Checkpoint, config: TrainConfig, corpus: Text) -> None:
    """A resumed run keeps its model, its tokenizer and its text."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "tokenizer", "vocab_size", "val_share", "init_from")
    pairs = [(name, getattr(saved.config, name), getattr(config, name)) for name in names]
    changed = [f"{name} {before} → {now}" for name, before, now in pairs if now not in (None, before)]
    if changed:
        raise CheckpointError(
            f"{out_dir} cannot go on with another model ({', '.join(changed)}); drop those flags or start a new run"
        )
    if saved.step > config.max_steps:
        raise CheckpointError(f"{out_dir} is at step {saved.step:,} already; max_steps={config.max_steps:,} must not be less")
    if corpus.sha256 != saved.text_sha256:
        raise CheckpointError(
            f"{out_dir} was trained on another text than {corpus.path} (the hashes differ); name its text with --data"
        )
