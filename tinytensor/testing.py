"""Check a derivative against finite differences, in float64. For this library's ops and for users' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinytensor import autograd, state
from tinytensor.tensor import Tensor
from tinytensor.transforms import grad


class GradientMismatch(AssertionError):
    """An analytic gradient that departs from the numerical one; the message names the worst element."""


def gradcheck(f: Callable[..., Any], inputs: Sequence[Any], eps: float = 1e-6, atol: float = 1e-6, rtol: float = 1e-4) -> bool:
    """Compare vᵀJ from autograd with (f(x + εe) − f(x − εe))·v/2ε for every element of every floating input.

    f maps tensors to a tensor or a tuple of tensors and must be deterministic; inputs are float64 (others are passed through
    unchecked); v is a fixed vector with no zeros, so every output counts. Raises GradientMismatch, or ValueError for float32.
    """
    tensors = [x if isinstance(x, Tensor) else autograd.as_value(x) for x in inputs]
    leaves = []
    for i, x in enumerate(tensors):
        if x.dtype.kind == "f" and x.dtype != np.float64:
            raise ValueError(f"gradcheck: input {i} is {x.dtype}; finite differences need float64")
        leaf = Tensor(x.data.copy())
        leaf.requires_grad = x.dtype.kind == "f"
        leaves.append(leaf)
    checked = [i for i, x in enumerate(leaves) if x.requires_grad]

    def scalar(*args: Any) -> Tensor:
        out = f(*args)
        parts = out if isinstance(out, (tuple, list)) else (out,)
        total: Any = 0.0
        for part in parts:
            if part.dtype.kind == "f":
                v = 1 + 0.5 * np.cos(np.arange(part.size) * 1.7 + 0.3)
                total = total + (part * Tensor(v.reshape(part.shape))).sum()
        return total

    with state.enable_grad():
        y = scalar(*leaves)
    if not isinstance(y, Tensor) or not y.requires_grad:
        analytic: tuple[Any, ...] = (None,) * len(checked)
    else:
        analytic = grad(y, [leaves[i] for i in checked], allow_unused=True)
    for i, g in zip(checked, analytic, strict=True):
        x = leaves[i].data
        numeric = np.empty_like(x)
        for place in np.ndindex(x.shape):
            ends = []
            for step in (eps, -eps):
                moved = x.copy()
                moved[place] += step
                args = [Tensor(moved) if j == i else t.detach() for j, t in enumerate(leaves)]
                with state.enable_grad():
                    ends.append(float(scalar(*args)))
            numeric[place] = (ends[0] - ends[1]) / (2 * eps)
        ours = np.zeros_like(x) if g is None else g.data
        if ours.shape != x.shape:
            raise GradientMismatch(f"input {i}: gradient of shape {ours.shape} for an input of shape {x.shape}")
        _compare(f"input {i}", ours, numeric, atol, rtol)
    return True


def gradgradcheck(
    f: Callable[..., Any], inputs: Sequence[Any], eps: float = 1e-6, atol: float = 1e-5, rtol: float = 1e-3
) -> bool:
    """gradcheck of the gradients of f: the second derivatives, through create_graph."""

    def first(*args: Any) -> tuple[Tensor, ...]:
        leaves = []
        for x in args:
            leaf = x
            if x.dtype.kind == "f" and not x.requires_grad:
                leaf = Tensor(x.data)
                leaf.requires_grad = True
            leaves.append(leaf)
        out = f(*leaves)
        parts = [p for p in (out if isinstance(out, (tuple, list)) else (out,)) if p.requires_grad]
        wanted = [x for x in leaves if x.requires_grad]
        seeds = [Tensor((1 + 0.4 * np.sin(np.arange(p.size) * 1.3)).reshape(p.shape)) for p in parts]
        grads = grad(parts, wanted, grad_outputs=seeds, create_graph=True, allow_unused=True)
        return tuple(g for g in grads if g is not None)

    return gradcheck(first, inputs, eps, atol, rtol)


def _compare(what: str, ours: np.ndarray, numeric: np.ndarray, atol: float, rtol: float) -> None:
    excess = np.abs(ours - numeric) - (atol + rtol * np.abs(numeric))
    excess = np.where(np.isnan(ours) | np.isnan(numeric), np.inf, excess)
    if excess.size and excess.max() > 0:
        place = tuple(int(i) for i in np.unravel_index(excess.argmax(), excess.shape))
        raise GradientMismatch(
            f"{what}: at {place} autograd gives {ours[place]:.9g}, finite differences {numeric[place]:.9g} "
            f"({int((excess > 0).sum())} of {excess.size} elements differ)"
        )
