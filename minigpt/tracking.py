"""What a run tells: a header, a progress bar, metrics.jsonl (the record), samples of verse, and a curve."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

METRICS, CURVE, SAMPLES = "metrics.jsonl", "curve.png", "samples"
PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}  # for text that may hold what Rich interprets


class Tracker:
    """Reports one run to the terminal and to its folder."""

    def __init__(self, out_dir: Path, max_steps: int, first_step: int = 0, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.out_dir, self.max_steps = out_dir, max_steps
        self.console = console or Console()
        self._drop_after(first_step)
        self._metrics = open(out_dir / METRICS, "a", encoding="utf-8")  # noqa: SIM115  (closed by __exit__)
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
        )
        self._task = self._progress.add_task("train", total=max_steps, completed=first_step, numbers="")
        self._durations: list[float] = []
        self._last_seconds: float | None = None
        self._last_tokens = 0
        self._pending: dict[str, Any] | None = None
        self._estimated = False

    def __enter__(self) -> Tracker:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._progress.stop()
        self._metrics.close()

    def header(self, rows: dict[str, str]) -> None:
        """A table of facts about the run."""
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in rows.items():
            table.add_row(Text(name, style="bold"), Text(value))  # a path may hold what Rich takes for markup
        self.console.print(table)

    def step(self, step: int, loss: float, lr: float, grad_norm: float, tokens: int, seconds: float) -> None:
        """After each optimiser step: `step` steps are done, `loss` was the mean of the last one's micro-batches."""
        self._flush()
        self._pending = {
            "step": step,
            "train_loss": loss,
            "val_loss": None,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "seconds": round(seconds, 3),
        }
        speed = 0.0
        if self._last_seconds is not None and seconds > self._last_seconds:
            self._durations.append(seconds - self._last_seconds)
            speed = (tokens - self._last_tokens) / statistics.median(self._durations[-20:])
        self._last_seconds, self._last_tokens = seconds, tokens
        numbers = f"loss {loss:.3f}  lr {lr:.1e}  {speed:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, numbers=numbers)
        if not self._estimated:
            measured = sum(self._durations)
            if measured > 20 or (measured > 2 and len(self._durations) >= 3):
                self._estimate(step)

    def _estimate(self, step: int) -> None:
        """Say once, from the first steps, how long the run will take, and offer a shorter one when that is hours."""
        self._estimated = True
        left = (self.max_steps - step) * statistics.median(self._durations)
        measured = f"measured on {len(self._durations)} steps"
        self.console.print(f"[dim]about {duration(left)} to go and the evaluations, {measured}[/dim]")
        if left > 2 * 3600:
            self.console.print("[yellow]for verse within minutes: python scripts/train.py quick[/yellow]")

    def evaluation(self, step: int, val_loss: float, tokens: int, seconds: float, sample: str) -> None:
        """After an evaluation with `step` steps done: the loss joins that step's line, the sample goes to samples/."""
        if self._pending is None or self._pending["step"] != step:
            self._pending = {"step": step, "train_loss": None, "val_loss": None, "lr": None, "grad_norm": None}
            self._pending |= {"tokens": tokens, "seconds": round(seconds, 3)}
        self._pending["val_loss"] = val_loss
        self._flush()
        self._last_seconds = None  # the evaluation's time belongs to no step
        self.console.print(f"[bold]step {step}[/bold]  validation loss [bold]{val_loss:.4f}[/bold]  {duration(seconds)}")
        if sample:
            folder = self.out_dir / SAMPLES
            folder.mkdir(exist_ok=True)
            (folder / f"step-{step:06d}.txt").write_text(sample, encoding="utf-8")
            shown = sample if step == self.max_steps else "\n".join(sample.splitlines()[:6])
            self.console.print(shown.rstrip() + "\n", **PLAIN, style="italic", soft_wrap=True)

    def _flush(self) -> None:
        """One whole line a write, flushed, so that a killed run keeps every line it had finished."""
        if self._pending is not None:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in self._pending.items()}
            self._metrics.write(json.dumps(finite) + "\n")
            self._metrics.flush()
            self._pending = None

    def _drop_after(self, step: int) -> None:
        """On resume: forget lines of steps that will be made again, and a last line that was cut short."""
        path = self.out_dir / METRICS
        if not path.exists():
            return
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def duration(seconds: float) -> str:
    """ "42 s", "12 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plot(metrics: Path, path: Path, title: str) -> None:
    """Draw training and validation loss, and the learning rate below them, from a metrics.jsonl to a PNG."""
    import numpy as np
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    train = [(r["step"], r["train_loss"]) for r in rows if r["train_loss"] is not None]
    val = [(r["step"], r["val_loss"]) for r in rows if r["val_loss"] is not None]
    rate = [(r["step"], r["lr"]) for r in rows if r["lr"] is not None]
    figure = Figure(figsize=(8, 5.5), dpi=130, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    if train:
        steps, losses = zip(*train, strict=True)
        top.plot(steps, losses, color="#9db4d0", linewidth=0.6, label="training, each step")
        window = np.ones(max(1, len(losses) // 25))
        smooth = np.convolve(losses, window, "same") / np.convolve(np.ones(len(losses)), window, "same")
        top.plot(steps, smooth, color="#2b5c9e", linewidth=1.4, label="training, moving mean")
    if val:
        steps, losses = zip(*val, strict=True)
        top.plot(steps, losses, "o-", color="#c8502b", linewidth=1.6, markersize=4, label="validation, whole split")
        top.annotate(f"{losses[-1]:.3f}", (steps[-1], losses[-1]), textcoords="offset points", xytext=(0, 8), ha="right")
    top.set_ylabel("loss (nats per token)")
    top.set_title(title, parse_math=False)
    top.grid(alpha=0.25)
    if train or val:
        top.legend(frameon=False)
    if rate:
        bottom.plot(*zip(*rate, strict=True), color="#555555", linewidth=1.2)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.set_ylim(bottom=0)
    bottom.grid(alpha=0.25)
    figure.savefig(path)
