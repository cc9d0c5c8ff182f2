"""Where a model first departs from its PyTorch copy: forwards in its activations, then backwards in their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from minigpt.model import GPT
from tests.minigpt.small import distance
from tests.minigpt.torch_gpt import TorchGPT, ids
from tinytensor import Tensor
from tinytensor.inspect import collect
from tinytensor.state import Observer

OURS = {  # by PyTorch's name
    F.embedding: "embedding",
    F.layer_norm: "layer_norm",
    F.linear: "linear",
    F.scaled_dot_product_attention: "causal_attention",
    F.gelu: "gelu",
    F.cross_entropy: "cross_entropy",
    torch.Tensor.add: "add",
    torch.Tensor.__add__: "add",
}


class _Theirs(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, torch.Tensor]] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        if func in OURS:
            y.retain_grad()
            self.made.append((OURS[func], y))
        return y


class _Ours(Observer):
    def __init__(self) -> None:
        self.made: list[tuple[str, Tensor]] = []

    def forward(self, op: Any, inputs: Any, params: Any, run: Callable[[], Any]) -> Any:
        y = run()
        if op.name in OURS.values():
            y.retain_grad()
            self.made.append((op.name, y))
        return y


def first_divergence(model: GPT, judge: TorchGPT, x: np.ndarray, y: np.ndarray, tolerance: float) -> str:
    """One sentence; "" where every activation and every gradient of one agrees."""
    ours, theirs = _Ours(), _Theirs()
    with ours:
        _, loss = model(x, y)
    with theirs:
        _, their_loss = judge(ids(x), ids(y))
    lines = {entry.node: str(entry.node) for entry in collect(loss) if entry.op != "leaf"}
    loss.backward()
    their_loss.backward()
    pairs, rest = [], iter(theirs.made)
    for name, mine in ours.made:
        pairs.append((lines[mine.node], mine, next(t for n, t in rest if n == name)))  # passes over the positions' embedding
    for line, mine, their in pairs:
        if (error := distance(mine.detach(), their.detach())) > tolerance:
            return f"the first activation that departs is that of {line}: relative error {error:.2g}"
    for line, mine, their in reversed(pairs):
        if (error := distance(mine.grad, their.grad)) > tolerance:
            return f"the first gradient that departs is that of the result of {line}: relative error {error:.2g}"
    for (name, p), (_, q) in zip(model.named_parameters(), judge.named_parameters(), strict=True):
        if (error := distance(p.grad, q.grad)) > tolerance:
            return f"the first gradient that departs is that of the weights {name}: relative error {error:.2g}"
    return ""
