"""The pictures of training.md: short runs of the preset `quick`, one setting changed at a time, and what came of the curve."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minigpt.config import PRESETS, TrainConfig
from minigpt.corpus import read_text
from minigpt.tracking import Quiet
from minigpt.trainer import Trainer
from tinytensor import parallel

BASE = replace(PRESETS["quick"], max_steps=400, eval_interval=25, sample_tokens=0, wandb=False)
HOT = {"lr": 1e-2}
SHORT = {"short": True}  # a hundredth of the text, for two and a half times the steps
RUNS: dict[str, dict[str, Any]] = {
    "quick": {},
    "seed 1": {"seed": 1},
    "seed 2": {"seed": 2},
    "lr 4e-4": {"lr": 4e-4},
    "lr 4e-2": {"lr": 4e-2},
    "lr 1e-2": HOT,
    "lr 1e-2, no clipping": HOT | {"grad_clip": math.inf},
    "lr 1e-2, no warmup": HOT | {"warmup_steps": 0},
    "lr 1e-2, neither": HOT | {"grad_clip": math.inf, "warmup_steps": 0},
    "batch 4": {"micro_batch": 4},
    "batch 36": {"micro_batch": 36},
    "width 32": {"n_embd": 32},
    "width 64": {"n_embd": 64},
    "dropout 0.2": {"dropout": 0.2},
    "short text": SHORT,
    "short text, dropout 0.2": SHORT | {"dropout": 0.2},
    "short text, weight decay 3": SHORT | {"weight_decay": 3.0},
}
LOW, USUAL, HIGH, OTHER, PALE, GREY = "#7fa6d6", "#2b5c9e", "#c8502b", "#8a6fb0", "#b8c4d4", "#7d8ca0"

Rows = list[dict[str, Any]]


class _Kept(Quiet):
    """Keeps the lines of metrics.jsonl."""

    def __init__(self) -> None:
        self.rows: Rows = []

    def step(self, row: dict[str, Any], anomaly: str = "") -> None:
        self.rows.append(row)


def train(name: str, data: Path, kept: Path | None, base: TrainConfig) -> Rows:
    """The metrics of the run of that name, with its arithmetic as "flop"; from the folder `kept` where that has it already."""
    changes, corpus = dict(RUNS[name]), read_text(data)
    if changes.pop("short", False):
        corpus = replace(corpus, text=corpus.text[: len(corpus.text) // 100])
        base = replace(base, max_steps=base.max_steps * 5 // 2)
    config = replace(base, **changes)
    facts = {"config": config.to_dict(), "sha256": corpus.sha256, "characters": len(corpus.text)}
    file = kept / f"{name}.json" if kept else None
    if file and file.exists() and (found := json.loads(file.read_text("utf-8")))["facts"] == facts:
        return found["rows"]
    tracker = _Kept()
    with parallel.limited(parallel.cpu_threads()), tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, corpus, Path(folder))
        trainer.train(tracker)
    for row in tracker.rows:
        row["flop"] = row["tokens"] * trainer.model.config.flops_per_token()
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"facts": facts, "rows": tracker.rows}), "utf-8")
    return tracker.rows


def draw(data: Path, folder: Path, kept: Path | None = None, base: TrainConfig = BASE) -> None:
    """Make every run, one at a time, telling the validation loss that it ends with, and every picture."""
    runs = {}
    for name in RUNS:
        runs[name] = rows = train(name, data, kept, base)
        print(f"{name:28}validation loss {rows[-1]['val_loss']:.3f}  {rows[-1]['seconds']:.0f} s", flush=True)
    print("tables: letters {:.3f}, pairs of letters {:.3f}".format(*tables(read_text(data).text)))
    for name, picture in PICTURES.items():
        picture(runs).savefig(folder / f"training-{name}.png", pil_kwargs={"optimize": True})


def tables(text: str) -> tuple[float, float]:
    """The loss on the last tenth of a table of how often each letter came before that, and of one for each letter before it."""
    ids = np.unique(list(text), return_inverse=True)[1]
    cut, size = int(len(ids) * 0.9), ids.max() + 1
    pairs = np.full((size, size), 0.1)  # so that a pair that was never seen is not impossible
    np.add.at(pairs, (ids[: cut - 1], ids[1:cut]), 1)
    alone = pairs.sum(0) / pairs.sum()
    pairs /= pairs.sum(1, keepdims=True)
    before, then = ids[cut:-1], ids[cut + 1 :]
    return -np.log(alone[then]).mean(), -np.log(pairs[before, then]).mean()


def one_run(runs: dict[str, Rows]) -> Figure:
    figure, (rate, loss, norm) = _panels("learning rate", "loss", "gradient norm")
    rows = runs["quick"]
    highest, last = max(rows, key=lambda row: row["lr"]), rows[-1]
    rate.plot(*_points(rows, "step", "lr"), color=USUAL)
    rate.set_ylim(0, 1.12 * highest["lr"])
    _say(rate, highest["step"], highest["lr"], f"{highest['lr']:g} after the warmup", HIGH, (8, 3))
    _say(rate, 0.8 * last["step"], last["lr"], f"{last['lr']:.1g} at the end", HIGH, (0, -2), "right")
    loss.plot(*_points(rows, "step", "train_loss"), color=PALE, linewidth=0.7)
    loss.plot(*_points(rows, "step", "val_loss"), "o-", color=USUAL, markersize=2.5, linewidth=1.2)
    _say(loss, rows[len(rows) // 3]["step"], 3.2, "validation", USUAL, (0, 14))
    _say(loss, rows[len(rows) // 3]["step"], 3.2, "training, each step", GREY, (0, 0))
    norm.plot(*_points(rows, "step", "grad_norm"), color=USUAL, linewidth=0.7)
    norm.axhline(BASE.grad_clip, color=HIGH, linewidth=0.9)
    _say(norm, last["step"], 2.5 * BASE.grad_clip, f"longer than {BASE.grad_clip:g} is clipped", HIGH, (0, 0), "right")
    norm.set_ylim(bottom=0)
    return figure


def rates(runs: dict[str, Rows]) -> Figure:
    figure, (loss, norm) = _panels("validation loss", "gradient norm, mean of 20 steps")
    for axes, y, window in ((loss, "val_loss", 1), (norm, "grad_norm", 20)):
        _curves(
            axes, [("4e-4", runs["lr 4e-4"], LOW), ("4e-3", runs["quick"], USUAL), ("4e-2", runs["lr 4e-2"], HIGH)], y, window
        )
    return figure


def safety(runs: dict[str, Rows]) -> Figure:
    figure, (loss, norm) = _panels("validation loss, learning rate 1e-2", "gradient norm before clipping, the first steps")
    named = [
        ("neither", runs["lr 1e-2, neither"], HIGH),
        ("clipping alone", runs["lr 1e-2, no warmup"], OTHER),
        ("both", runs["lr 1e-2"], USUAL),
        ("warmup alone", runs["lr 1e-2, no clipping"], LOW),
    ]
    norm.set_yscale("log")
    norm.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    norm.minorticks_off()
    _curves(loss, named, "val_loss")
    _curves(norm, [(name, rows[:30], colour) for name, rows, colour in named], "grad_norm")
    return figure


def batches(runs: dict[str, Rows]) -> Figure:
    figure, (by_step, by_token) = _panels("validation loss, batches of …", "by what was read")
    named = [("4", runs["batch 4"], LOW), ("12", runs["quick"], USUAL), ("36", runs["batch 36"], HIGH)]
    _curves(by_step, named, "val_loss")
    _curves(by_token, named, "val_loss", x="tokens", unit=1e3, below=True)
    by_token.set_xlabel("thousand characters")
    return figure


def widths(runs: dict[str, Rows]) -> Figure:
    figure, (by_step, by_work) = _panels("validation loss, width …", "by arithmetic")
    named = [("32", runs["width 32"], GREY), ("64", runs["width 64"], LOW), ("128", runs["quick"], USUAL)]
    _curves(by_step, named, "val_loss")
    _curves(by_work, named, "val_loss", x="flop", unit=1e12, below=True)
    by_work.set_xlabel("TFLOP")
    return figure


def short_text(runs: dict[str, Rows]) -> Figure:
    figure, panels = _panels("no dropout, weight decay 0.1", "dropout 0.2", "weight decay 3", sharey=True)
    for axes, name in zip(panels, ("", ", dropout 0.2", ", weight decay 3"), strict=True):
        rows = runs["short text" + name]
        steps, losses = _points(rows, "step", "val_loss")
        _, fitted = _curves(axes, [("", rows, GREY)], "train_loss", 20)
        axes.plot(steps, losses, color=USUAL, linewidth=1.5)
        _say(axes, steps[-1], losses[-1], f"validation {losses[-1]:.2f}", USUAL, (0, 9), "right")
        _say(axes, steps[-1], fitted[-1], f"training {fitted[-1]:.2f}", GREY, (0, -12), "right")
        if min(losses) < losses[-1] - 0.1:
            best = losses.index(min(losses))
            axes.plot(steps[best], losses[best], "o", color=USUAL, markersize=4)
            _say(axes, steps[best], losses[best], f"best {losses[best]:.2f}", USUAL, (0, 7), "center")
    panels[0].set_ylim(bottom=0)
    return figure


PICTURES: dict[str, Callable[[dict[str, Rows]], Figure]] = {
    "run": one_run,
    "rate": rates,
    "safety": safety,
    "batch": batches,
    "width": widths,
    "short": short_text,
}


def _panels(*titles: str, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8.8, 2.8), dpi=110, layout="constrained")
    panels = list(figure.subplots(1, len(titles), sharey=sharey))
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=9.5, loc="left", color="#333333")
        axes.set_xlabel("step", fontsize=8.5, color="#555555")
        axes.tick_params(labelsize=8, colors="#555555")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#aaaaaa")
        axes.grid(axis="y", color="#eeeeee")
    return figure, panels


def _points(rows: Rows, x: str, y: str) -> tuple[list[float], list[float]]:
    pairs = [(row[x], row[y]) for row in rows if row[y] is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _curves(
    axes: Axes,
    named: list[tuple[str, Rows, str]],
    y: str,
    window: int = 1,
    x: str = "step",
    unit: float = 1.0,
    below: bool = False,
) -> tuple[list[float], list[float]]:
    """A line for each run, means over `window` points, its name beside or below its end; the points of the last."""
    ends = []
    for name, rows, colour in named:
        xs, ys = _points(rows, x, y)
        means = np.convolve(ys, np.ones(window) / window, "valid").tolist() if len(ys) >= window else ys
        xs = [value / unit for value in xs[-len(means) :]]
        axes.plot(xs, means, color=colour, linewidth=1.5)
        if below:
            axes.margins(y=0.12)
            _say(axes, xs[-1], means[-1], name, colour, (0, -12), "center")
        else:
            ends.append((means[-1], xs[-1], f"{name}: {means[-1]:.2f}" if y == "val_loss" else name, colour))
    _label(axes, ends)
    return xs, means


def _label(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names beside the ends of lines, moved apart where they would touch."""
    logarithmic = axes.get_yscale() == "log"
    low, high = (math.log(limit) if logarithmic else limit for limit in axes.get_ylim())
    height = -math.inf
    for y, x, text, colour in sorted(ends):
        height = max(math.log(y) if logarithmic else y, height + (high - low) / 14)
        _say(axes, x, math.exp(height) if logarithmic else height, text, colour, (5, -3))


def _say(axes: Axes, x: float, y: float, text: str, colour: str, offset: tuple[int, int], align: str = "left") -> None:
    axes.annotate(text, (x, y), offset, textcoords="offset points", color=colour, fontsize=8.5, ha=align)
