"""What needs a GPU, in one command: the proofs, then the measurements beside PyTorch, until a budget of time is used up.

Contenders share one process and take turns; CUDA events time them. Between two parts both libraries give their memory back.
"""

from __future__ import annotations

import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt.benchmarks import gpu_checks, gpu_training
from minigpt.benchmarks.gpu_checks import Check, NoRegistry, Sizes, observed, one_line
from minigpt.benchmarks.gpu_launches import launches
from minigpt.benchmarks.gpu_speed import COMPILED, EAGER, Plan, Session, free, gpt2, memory, micro_step, peaks, race
from minigpt.benchmarks.suite import Report
from tinytensor import backend

GRACE = 50.0  # seconds that a part may go on when the budget is used up


class OutOfTime(BaseException):
    """No `Exception`, which a library may catch and go on."""


def run(
    report: Report,
    plan: Plan,
    budget: float = 420.0,
    data: Path | None = None,
    json: Path | None = None,
    markdown: Path | None = None,
) -> int:
    """All parts in order of importance; the exit status, 1 when a check or a part failed.

    Files are written after each part. RuntimeError, at once, where there is no GPU.
    """
    started = time.monotonic()
    backend.xp_for("cuda")
    session, states = Session(report, plan, data, started + budget), []
    with tempfile.TemporaryDirectory() as folder:
        markdown = markdown or Path(folder, "tables.md")
        for title, part in parts():
            begun = time.monotonic()
            report.progress(title)
            if begun > session.deadline:
                state = f"skipped: the budget of {budget:.0f} s is used up"
            else:
                state = _outcome(session, title, part)
            states.append([title, f"{time.monotonic() - begun:.1f}", state])
            report.write(json, markdown)
        report.add(
            "gpu: bars", ["", "found", "bar", "aim"], bars(session.found), [[str(k), v] for k, v in session.found.items()]
        )
        report.add(f"gpu: {time.monotonic() - started:.0f} s in all", ["part", "s", ""], states, states)
        report.write(json, markdown)
        print("\n" + markdown.read_text(encoding="utf-8"))
    return int(any(state.startswith("FAILED") for *_, state in states))


def _outcome(session: Session, title: str, part: Callable[[Session], str | None]) -> str:
    """Run a part, whatever becomes of it; how it ended, in a few words."""
    try:
        with _at_most(session.deadline + GRACE - time.monotonic()):
            free()
            return part(session) or "done"
    except (Exception, OutOfTime) as error:
        lines = traceback.format_exc().strip().splitlines()
        session.report.add(f"gpu: {title} FAILED", ["the exception's last lines"], [[line] for line in lines[-5:]], lines)
        return f"FAILED: {one_line(error)}"


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """OutOfTime within this block when it takes longer, and again each few seconds where that was swallowed."""

    def late(*_: Any) -> None:
        raise OutOfTime(f"no end after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0), 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def parts() -> list[tuple[str, Callable[[Session], str | None]]]:
    """Title and function of each. A function says how it ended, where that is not "done"."""
    seen: set[str] = set()

    def see(name: str, _: Any, launch: Callable[[], Any]) -> Any:
        seen.add(name)
        return launch()

    def checked(title: str, check: Callable[[Sizes], list[Check]]) -> Callable[[Session], str | None]:
        def part(session: Session) -> str | None:
            try:
                with observed(see):
                    checks = check(session.plan.checks)
            except NoRegistry as error:
                return f"skipped: {error}"
            rows = [[c.what, c.found, c.wanted, "" if c.passed else "FAILED"] for c in checks]
            session.report.add(f"gpu: {title}", ["", "found", "wanted", ""], rows, [c._asdict() for c in checks])
            wrong = sum(not c.passed for c in checks)
            return f"FAILED: {wrong} of {len(checks)} checks" if wrong else None

        return part

    checks = {
        "compiling": gpu_checks.compilation,
        "dropout's masks against NumPy's": gpu_checks.masks,
        "kernels against float64, poisoned": gpu_checks.kernels,
        "ops against float64, poisoned": gpu_checks.ops,
        "optimiser against float64": gpu_checks.optimiser,
        "whole model against NumPy in float64": gpu_training.whole_model,
        "a micro-step waits for nothing": gpu_training.waiting,
        "the same bits, as a graph or not": gpu_training.bits,
        "the same bits, resumed": gpu_training.resuming,
        "every kernel was checked": lambda _: gpu_checks.coverage(seen),
    }
    return [
        ("machine", machine),
        *((title, checked(title, check)) for title, check in checks.items()),
        ("peaks", peaks),
        ("micro-step in bf16", lambda s: micro_step(s, "bf16")),
        ("micro-step in TF32", lambda s: micro_step(s, "tf32")),
        ("launches and their time", launches),
        ("peak memory", memory),
        ("GPT-2 124M", gpt2),
        ("nanogpt-char", race),
        ("micro-step in fp32", lambda s: micro_step(s, "fp32")),
    ]


def machine(session: Session) -> None:
    """What the numbers depend on."""
    import cupy

    runtime = cupy.cuda.runtime

    def torch_version() -> str:
        import torch

        return f"{torch.__version__}, CUDA {torch.version.cuda}"

    asked: dict[str, Callable[[], Any]] = {
        "GPU": lambda: runtime.getDeviceProperties(0)["name"].decode(),
        "memory": lambda: f"{runtime.memGetInfo()[1] / 2**30:.0f} GiB, {runtime.memGetInfo()[0] / 2**30:.0f} GiB of it free",
        "CUDA": lambda: f"runtime {runtime.runtimeGetVersion()}, driver {runtime.driverGetVersion()}",
        "CuPy": lambda: cupy.__version__,
        "PyTorch": torch_version,
    }
    rows = []
    for name, ask in asked.items():
        try:
            rows.append([name, str(ask())])
        except Exception as error:
            rows.append([name, one_line(error)])
    session.report.add("gpu: machine", ["", ""], rows, dict(rows))


def bars(found: dict[Any, float]) -> list[list[str]]:
    """What the library is to reach, and whether it did."""
    table = []
    for what, key, bar, aim in (
        ("micro-step in bf16: torch.compile's time / ours", ("micro-step in bf16", COMPILED), 0.8, 1.2),
        ("micro-step in TF32: torch eager's time / ours", ("micro-step in tf32", EAGER), 1.0, None),
        ("micro-step in TF32: torch.compile's time / ours", ("micro-step in tf32", COMPILED), None, 1.2),
        ("GPT-2 step in bf16: torch.compile's time / ours", ("GPT-2 step in bf16", COMPILED), 0.5, 0.9),
        ("peak memory in bf16: ours / the smaller of PyTorch's", "memory", -1.0, -0.7),
        ("launches of a micro-step in bf16 outside of a graph", ("launches", "bf16"), -250, None),
    ):
        value = found.get(key)
        cells = [_met(value, limit) for limit in (bar, aim)]
        table.append([what, "not measured" if value is None else f"{value:.2f}".rstrip("0").rstrip("."), *cells])
    return table


def _met(value: float | None, limit: float | None) -> str:
    """At least the limit, or at most −limit where that is negative."""
    if limit is None:
        return ""
    text = f"≥ {limit:g}" if limit > 0 else f"≤ {-limit:g}"
    if value is None:
        return text
    return f"{text}: {'met' if (value >= limit if limit > 0 else value <= -limit) else 'NOT met'}"
