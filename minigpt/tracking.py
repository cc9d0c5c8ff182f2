"""What a run tells: a header, a progress bar, metrics.jsonl (the record), and samples of verse."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.disk import write
from minigpt.folder import METRICS, SAMPLES
from minigpt.program import command

if TYPE_CHECKING:
    from rich.console import Console

    from minigpt.mirror import Mirror

PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}  # for text that may hold what Rich interprets


class Quiet:
    """The tracker of a rank that does not report."""

    def step(self, row: dict[str, Any], anomaly: str = "") -> None:
        """After each optimiser step, and after the evaluation where one was due: the numbers of metrics.jsonl, and for a step
        that was skipped what was not finite first, where that was looked for."""

    def sample(self, step: int, text: str) -> None:
        """Verse written after an evaluation."""


class Tracker(Quiet):
    """Reports one run to the terminal and to its folder."""

    def __init__(self, out_dir: Path, max_steps: int, first_step: int = 0, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.out_dir, self.max_steps = out_dir, max_steps
        self.console = console or Console()
        self.console.on_broken_pipe = self._go_on_silently  # type: ignore[method-assign]  # Rich's own ends the process
        self.mirror: Mirror | None = None
        self._drop_after(first_step)
        # line-buffered: a killed run keeps every line it will not make again; closed by __exit__
        self._metrics = open(out_dir / METRICS, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
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
        self._last: tuple[float, int] | None = None  # seconds and tokens after the step before, unless it was evaluated
        self._estimated = False

    def __enter__(self) -> Tracker:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        with suppress(OSError):  # of a line that could not be written, which `step` has told of
            self._metrics.close()

    def _go_on_silently(self) -> None:
        """Nobody reads the terminal's output any more, as in `… | head`; the run's files are written all the same."""
        self.console.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def say(self, text: str) -> None:
        self.console.print(text, **PLAIN, soft_wrap=True)

    def header(self, rows: dict[str, str]) -> None:
        """A table of facts about the run."""
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in rows.items():
            table.add_row(Text(name, style="bold"), Text(value))  # a path may hold what Rich takes for markup
        self.console.print(table)

    def step(self, row: dict[str, Any], anomaly: str = "") -> None:
        evaluated = row["val_loss"] is not None
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            self._metrics.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(f"{self.out_dir / METRICS} could not be written ({error}); go on with --resume") from None
        if self.mirror:
            self.mirror.log(row["step"], row)
        speed = 0.0
        if self._last is not None and row["seconds"] > self._last[0]:
            self._durations.append(row["seconds"] - self._last[0])
            speed = (row["tokens"] - self._last[1]) / statistics.median(self._durations[-20:])
        self._last = (row["seconds"], row["tokens"]) if not evaluated else None
        loss = "not finite" if row["train_loss"] is None else f"{row['train_loss']:.3f}"
        numbers = f"loss {loss}  lr {row['lr']:.1e}  {speed:,.0f} tokens/s"
        self._progress.update(self._task, completed=row["step"], numbers=numbers)
        if row["train_loss"] is None or row["grad_norm"] is None:
            self.console.print(f"[yellow]step {row['step']}: loss or gradient is not finite, update skipped[/yellow]")
            if anomaly:
                self.console.print(f"  what was not finite first: {anomaly}", markup=False, highlight=False)
        if evaluated:
            loss = "not finite" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
            shown = f"[bold]step {row['step']}[/bold]  validation loss [bold]{loss}[/bold]"
            self.console.print(f"{shown}  {duration(row['seconds'])}")
        if not self._estimated:
            measured = sum(self._durations)
            if measured > 20 or (measured > 2 and len(self._durations) >= 3):
                self._estimate(row["step"])

    def _estimate(self, step: int) -> None:
        """Say once, from the first steps, how long the run will take, and offer a shorter one when that is hours."""
        self._estimated = True
        left = (self.max_steps - step) * statistics.median(self._durations)
        measured = f"measured on {len(self._durations)} steps"
        self.console.print(f"[dim]about {duration(left)} to go and the evaluations, {measured}[/dim]")
        if left > 2 * 3600:
            self.console.print(f"[yellow]for verse within minutes: {command('train')} quick[/yellow]")

    def sample(self, step: int, text: str) -> None:
        if not text:
            return
        folder = self.out_dir / SAMPLES
        folder.mkdir(exist_ok=True)
        write(folder / f"step-{step:06d}.txt", text)
        if self.mirror:
            self.mirror.sample(step, text)
        shown = text if step == self.max_steps else "\n".join(text.splitlines()[:6])
        self.console.print(shown.rstrip() + "\n", **PLAIN, style="italic", soft_wrap=True)

    def _drop_after(self, step: int) -> None:
        """On resume: forget lines of steps that will be made again, and a last line that was cut short."""
        path = self.out_dir / METRICS
        if not path.exists():
            return
        kept = "".join(json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step)
        if kept != path.read_text(encoding="utf-8"):
            write(path, kept)


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
    """ "42.0 s", "12 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
