"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, lr: float, min_lr: float, warmup_steps: int, max_steps: int) -> float:
    """Learning rate of step 0, 1, …: up a straight line to lr, then down half a cosine to min_lr at max_steps.

    lr·(step + 1)/(warmup + 1) while step < warmup; min_lr + (lr − min_lr)·(1 + cos πt)/2 with
    t = (step − warmup)/(max − warmup) up to max_steps; min_lr from there on. (Loshchilov & Hutter, "SGDR", 2017.)
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if step >= max_steps:
        return min_lr
    t = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * t))
