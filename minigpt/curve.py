"""The picture of a run: its losses, learning rate and gradient norm."""

from __future__ import annotations

from pathlib import Path

from minigpt.tracking import read_metrics


def plot(metrics: Path, path: Path, title: str) -> None:
    """Draw training and validation loss, and the learning rate and gradient norm below them, from a metrics.jsonl to a PNG."""
    import numpy as np
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    train = [(r["step"], r["train_loss"]) for r in rows if r["train_loss"] is not None]
    val = [(r["step"], r["val_loss"]) for r in rows if r["val_loss"] is not None]
    figure = Figure(figsize=(8, 6.5), dpi=130, layout="constrained")
    top, *below = figure.subplots(3, 1, sharex=True, height_ratios=[4, 1, 1])
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
    for axes, name, label in zip(below, ("lr", "grad_norm"), ("learning rate", "gradient norm"), strict=True):
        points = [(r["step"], r[name]) for r in rows if r[name] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color="#555555", linewidth=0.8)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    below[-1].set_xlabel("step")
    figure.savefig(path)
