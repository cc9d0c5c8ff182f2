"""The measurements that need a GPU: how fast beside PyTorch, how much memory, how long to a validation loss."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from minigpt import GPTConfig
from minigpt.benchmarks.gpu_checks import PRECISIONS, Sizes, one_line
from minigpt.benchmarks.harness import Result, ratios
from minigpt.benchmarks.ours import DeviceStep
from minigpt.benchmarks.suite import MODELS, Report, _ratio_cell
from minigpt.benchmarks.theirs import TorchStep
from minigpt.config import PRESETS, TrainConfig
from minigpt.corpus import read_text
from minigpt.start import DATA
from minigpt.tracking import Quiet
from minigpt.trainer import Trainer
from tinytensor import backend
from tinytensor.backend.cublas import gemm

OURS, EAGER, COMPILED = "tinytensor", "torch eager", "torch.compile"
GPT2 = {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": True}


@dataclass(frozen=True)
class Plan:
    """What is measured, and how large; tests measure less."""

    model: dict[str, Any] = field(default_factory=lambda: MODELS["shakespeare"])
    rows: int = 64
    gpt2: dict[str, Any] = field(default_factory=lambda: GPT2)
    gpt2_rows: int = 8
    training: TrainConfig = field(default_factory=lambda: replace(PRESETS["nanogpt-char"], device="cuda", precision="bf16"))
    goal: float = 1.47  # validation loss
    checks: Sizes = field(default_factory=lambda: Sizes(PRESETS["nanogpt-char"]))
    gemm: int = 8192
    copy: int = 2 << 30  # bytes
    rounds: int = 12
    repeat: int = 10  # pieces of work in a sample
    torch_device: str = "cuda"


@dataclass
class Session:
    """One run: what to do, where to tell, by when, and the numbers that later parts and the bars are about."""

    report: Report
    plan: Plan
    data: Path | None
    deadline: float
    found: dict[Any, float] = field(default_factory=dict)


def free() -> None:
    """Give the memory of both libraries back to the device."""
    import cupy

    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(work: Callable[[], Any], repeat: int) -> float:
    """Seconds of one piece of work, by CUDA events around `repeat` of them."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(repeat):
        work()
    end.record()
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / repeat / 1e3


def operands(n: int) -> list[tuple[str, Any, Any]]:
    """Random square matrices in each precision, and where their product goes."""
    import cupy

    a = cupy.asarray(np.random.default_rng(0).standard_normal((n, n), np.float32))
    dtypes = {"fp32": a.dtype, "tf32": a.dtype, "bf16": backend.bfloat16()}
    return [(p, a.astype(dtypes[p], copy=False), cupy.empty((n, n), dtypes[p])) for p in PRECISIONS]


def peaks(session: Session) -> None:
    """The fastest copy within the device, bytes read and written, and the fastest product of large random matrices."""
    import cupy

    plan, rows = session.plan, []
    for precision, a, out in operands(plan.gemm):
        best = min(timed(lambda a=a, p=precision, out=out: gemm(a, a, out, tf32=p == "tf32"), 3) for _ in range(6))  # type: ignore
        session.found["peak", precision] = rate = 2 * plan.gemm**3 / best
        rows.append([f"GEMM of {plan.gemm}³ in {precision}", f"{rate / 1e12:,.1f} TFLOP/s"])
    source, filling = cupy.empty(plan.copy // 4, np.float32), a.astype(np.float32).reshape(-1)
    for start in range(0, source.size, filling.size):
        source[start : start + filling.size] = filling[: source.size - start]
    target = cupy.empty_like(source)
    best = min(timed(lambda: cupy.copyto(target, source), 3) for _ in range(6))
    session.found["bandwidth"] = rate = 2 * source.nbytes / best
    rows.append([f"copy of {source.nbytes / 1e9:.1f} GB", f"{rate / 1e9:,.0f} GB/s"])
    session.report.add("gpu: peaks", ["", "measured"], rows, {str(k): v for k, v in session.found.items()})


def contenders(plan: Plan, model: dict[str, Any], rows: int, precision: str) -> dict[str, Callable[[], Any]]:
    """How to build each."""
    return {
        OURS: lambda: DeviceStep(model, rows, precision),
        EAGER: lambda: TorchStep(model, rows, precision, False, plan.torch_device),
        COMPILED: lambda: TorchStep(model, rows, precision, True, plan.torch_device),
    }


def whole(step: Any) -> None:
    step.micro_step()
    step.update()


def contest(
    session: Session, what: str, model: dict[str, Any], rows: int, precision: str, works: dict[str, Callable[[Any], Any]]
) -> None:
    """Time each kind of work of all contenders in turns, and add the table of it. Building and compiling is not counted."""
    plan, built, notes = session.plan, {}, {}
    if "torch" in sys.modules:
        sys.modules["torch"].compiler.reset()
    for name, build in contenders(plan, model, rows, precision).items():
        session.report.progress(f"{what}: starting {name}")
        start = time.perf_counter()
        try:
            step = build()
            for _ in range(3):
                whole(step)
            loss = float(step.micro_step())
            if not math.isfinite(loss):
                raise FloatingPointError(f"its loss is {loss}")
            built[name], notes[name] = step, f"{time.perf_counter() - start:.1f}"
        except Exception as error:
            notes[name] = one_line(error)
    results = {kind: {name: Result(name) for name in built} for kind in works}
    for turn in range(1 + plan.rounds):
        session.report.progress(f"{what}: round {turn} of {plan.rounds}")
        for kind, work in works.items():
            for name, step in built.items():
                seconds = timed(lambda step=step, work=work: work(step), plan.repeat)  # type: ignore[misc]
                if turn:
                    results[kind][name].seconds.append(seconds)
    main, *others = works
    tokens, table = rows * model["block_size"], []
    for name, note in notes.items():
        if name not in built:
            table.append([name, f"failed: {note}", *[""] * (5 + len(others))])
            continue
        r = results[main][name]
        rate = GPTConfig(**model).flops_per_token() * tokens / r.median
        peak, ours = session.found.get(("peak", precision)), results[main].get(OURS)
        for kind in works:
            session.found[what, kind, name] = results[kind][name].median
        if ours and r is not ours:
            session.found[what, name] = statistics.median(ratios(ours, r))
        table.append(
            [
                name,
                f"{r.median * 1e3:.2f} ({min(r.seconds) * 1e3:.2f} to {max(r.seconds) * 1e3:.2f})",
                f"{tokens / r.median:,.0f}",
                f"{rate / 1e12:,.1f}",
                f"{rate / peak:.0%}" if peak else "",
                *(f"{results[kind][name].median * 1e3:.2f}" for kind in others),
                note,
                _ratio_cell(r, ours) if ours and r is not ours else "",
            ]
        )
    size = f"{rows} × {model['block_size']} tokens, {GPTConfig(**model).parameter_count() / 1e6:.1f}M parameters"
    columns = ["", f"{main}, ms (min to max)", "tokens/s", "TFLOP/s", "of GEMM peak"]
    columns += [*(f"{kind}, ms" for kind in others), "to start, s", "its time / tinytensor's"]
    data = {kind: {name: r.seconds for name, r in found.items()} for kind, found in results.items()}
    session.report.add(f"gpu: {what}, {size}, dropout {model['dropout']}", columns, table, data)
    if OURS not in built:
        raise RuntimeError(f"tinytensor: {notes[OURS]}")


def micro_step(session: Session, precision: str) -> None:
    """Forward and backward, and the optimiser's step by itself."""
    works = {"micro-step": lambda step: step.micro_step(), "clip and AdamW": lambda step: step.update()}
    contest(session, f"micro-step in {precision}", session.plan.model, session.plan.rows, precision, works)


def gpt2(session: Session) -> None:
    """A whole step of GPT-2's size."""
    fewer = replace(session, plan=replace(session.plan, rounds=max(1, session.plan.rounds // 3)))
    contest(fewer, "GPT-2 step in bf16", session.plan.gpt2, session.plan.gpt2_rows, "bf16", {"step": whole})


def memory(session: Session) -> None:
    """What one contender alone takes from the device for steps in bf16; what stays loaded for good was loaded before."""
    import cupy

    plan, found, table = session.plan, {}, []
    for name, build in contenders(plan, plan.model, plan.rows, "bf16").items():
        free()
        before = cupy.cuda.runtime.memGetInfo()[0]
        try:
            step = build()
            for _ in range(3):
                whole(step)
            cupy.cuda.Device().synchronize()
            found[name] = before - cupy.cuda.runtime.memGetInfo()[0], step.pool()
            table.append([name, *(f"{n / 1e6:,.0f}" for n in found[name])])
        except Exception as error:
            table.append([name, f"failed: {one_line(error)}", ""])
        step = None
    theirs = [n for name, (n, _) in found.items() if name != OURS]
    if OURS in found and theirs and min(theirs) > 0:
        session.found["memory"] = found[OURS][0] / min(theirs)
    columns = ["", "MB that the device has less (cudaMemGetInfo)", "MB in its pools (CuPy's total, PyTorch's reserved)"]
    session.report.add("gpu: peak memory of training steps in bf16", columns, table, found)


class _Race(Trainer):
    """The trainer's loop without its files."""

    def save(self) -> None:
        """Nothing: what is measured is the training."""


class _Until(Quiet):
    """Asks a run to stop at a validation loss, or at a time."""

    def __init__(self, race: Trainer, goal: float, deadline: float) -> None:
        self.race, self.goal, self.deadline = race, goal, deadline
        self.losses: list[tuple[int, float]] = []

    def step(self, row: dict[str, Any], anomaly: str = "") -> None:
        if row["val_loss"] is not None:
            self.losses.append((row["step"], row["val_loss"]))
            if row["val_loss"] <= self.goal:
                self.race.stop.received = "its goal"
        if time.monotonic() > self.deadline:
            self.race.stop.received = "the end of its time"


def race(session: Session) -> str | None:
    """Train to a validation loss; PyTorch's time is that many of its steps."""
    plan, found = session.plan, session.found
    path = session.data or DATA / "tiny_shakespeare.txt"
    if not path.exists():
        return f"skipped: there is no text at {path}; give one with --data FILE"
    config = replace(plan.training, sample_tokens=0, wandb=False)
    trainer = _Race(config, read_text(path), Path("nowhere"))
    until = _Until(trainer, plan.goal, session.deadline)
    trainer.train(until)
    spent = sum(s for phase, s in trainer.clock.seconds.items() if phase not in ("evaluation", "checkpoint"))
    best = min((loss for _, loss in until.losses), default=math.nan)
    state = f"validation loss {plan.goal}" if best <= plan.goal else f"NOT to {plan.goal}: best {best:.4f}"
    table = [[OURS, f"{trainer.step:,}", f"{spent / trainer.step * 1e3:.2f}", f"{spent:.1f}", f"{trainer.seconds:.1f}", ""]]
    for name in (EAGER, COMPILED):
        kinds = [found.get(("micro-step in bf16", kind, name)) for kind in ("micro-step", "clip and AdamW")]
        if None not in kinds:
            each = sum(kinds)  # type: ignore[arg-type]
            seconds = each * trainer.step
            table.append(
                [f"{name}, steps × step time", "as many", f"{each * 1e3:.2f}", f"{seconds:.1f}", "", f"{seconds / spent:.2f}×"]
            )
    title = f"gpu: {config.preset} in {config.precision} to {state}, on {trainer.corpus.source}"
    columns = ["", "steps", "ms per step", "training, s", "with evaluations, s", "its time / tinytensor's"]
    session.report.add(title, columns, table, until.losses)
    return None
