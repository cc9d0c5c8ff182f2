"""The ops that a training step is made of, forward and backward at its shapes, here and in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SHAPES = {  # for 2 sequences of the `shakespeare` preset
    "attention": (2, 6, 256, 64),
    "layer_norm": (512, 384),
    "gelu": (512, 1536),
    "cross_entropy": (512, 65),
    "dropout": (512, 384),
    "adamw": (10_000_000,),
}


def ours(op: str) -> Callable[[], None]:
    """tinytensor's op, one thread of shards' work: the whole of it in one call."""
    import tinytensor as tt
    from tinytensor.backend.memory import keep_memory

    keep_memory()
    shape = SHAPES[op]
    if op == "adamw":
        p = tt.nn.Parameter(np.ones(shape, "f"))
        optimizer = tt.optim.AdamW([p], lr=1e-4)
        p.grad = tt.ones(shape)
        return optimizer.step
    x, k, v = (tt.randn(shape, requires_grad=True) for _ in range(3))
    weight, bias = tt.ones(shape[-1], requires_grad=True), tt.zeros(shape[-1], requires_grad=True)
    targets = np.arange(shape[0]) % shape[-1]
    g = tt.randn(shape)
    call: dict[str, Callable[[], Any]] = {
        "attention": lambda: tt.causal_attention(x, k, v, 0.2),
        "layer_norm": lambda: tt.layer_norm(x, weight, bias),
        "gelu": lambda: tt.gelu(x),
        "cross_entropy": lambda: tt.cross_entropy(x, targets),
        "dropout": lambda: tt.dropout(x, 0.2),
    }

    def run() -> None:
        for t in (x, k, v, weight, bias):
            t.grad = None
        y = call[op]()
        y.backward(None if y.size == 1 else g)

    return run


def torch(op: str) -> Callable[[], None]:
    """PyTorch's."""
    import torch as th
    from torch.nn import functional as F

    shape = SHAPES[op]
    if op == "adamw":
        p = th.nn.Parameter(th.ones(shape))
        optimizer = th.optim.AdamW([p], lr=1e-4, fused=True)
        p.grad = th.ones(shape)
        return lambda: optimizer.step()
    x, k, v = (th.randn(shape, requires_grad=True) for _ in range(3))
    weight, bias = th.ones(shape[-1], requires_grad=True), th.zeros(shape[-1], requires_grad=True)
    targets = th.arange(shape[0]) % shape[-1]
    g = th.randn(shape)
    call: dict[str, Callable[[], Any]] = {
        "attention": lambda: F.scaled_dot_product_attention(x, k, v, is_causal=True, dropout_p=0.2),
        "layer_norm": lambda: F.layer_norm(x, shape[-1:], weight, bias),
        "gelu": lambda: F.gelu(x, approximate="tanh"),
        "cross_entropy": lambda: F.cross_entropy(x, targets),
        "dropout": lambda: F.dropout(x, 0.2),
    }

    def run() -> None:
        for t in (x, k, v, weight, bias):
            t.grad = None
        y = call[op]()
        y.backward(None if y.numel() == 1 else g)

    return run
