"""Reductions along axes, and the softmax family."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from tinytensor.autograd import Op, apply, as_value
from tinytensor.ops import elementwise as el

if TYPE_CHECKING:
    from tinytensor.tensor import Tensor

Axis = int | tuple[int, ...] | None


def kept_shape(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """`shape` with the reduced axes kept as 1, so that a reduced array broadcasts against the original."""
    axes = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    reduced = {a % len(shape) for a in axes} if shape else ()  # a 0-d array has an axis 0, as in NumPy
    return tuple(1 if i in reduced else n for i, n in enumerate(shape))


def count(shape: tuple[int, ...], axis: Axis) -> int:
    """How many elements go into one of the reduction."""
    return math.prod(n for n, k in zip(shape, kept_shape(shape, axis), strict=True) if k != n)


class Sum(Op):
    """y = Σ x;  ∂y/∂xᵢ = 1"""

    def forward(xp, x, axis, keepdims):
        if x.dtype == np.float16:  # which would stop counting at 2048
            return x.sum(axis=axis, keepdims=keepdims, dtype=np.float32).astype(x.dtype)
        return x.sum(axis=axis, keepdims=keepdims)

    def vjp(g, y, x, axis, keepdims):
        return np.broadcast_to(g.reshape(kept_shape(x.shape, axis)), x.shape)


class Max(Op):
    """y = max x;  equal maxima share the gradient evenly"""

    saves = "y x"

    def forward(xp, x, axis, keepdims):
        return x.max(axis=axis, keepdims=keepdims)

    def vjp(g, y, x, axis, keepdims):
        kept = kept_shape(x.shape, axis)
        hit = (x == y.reshape(kept)).astype(g.dtype)
        return g.reshape(kept) * (hit / hit.sum(axis=axis, keepdims=True))


class Min(Max):
    """y = min x;  equal minima share the gradient evenly"""

    def forward(xp, x, axis, keepdims):
        return x.min(axis=axis, keepdims=keepdims)


class Argmax(Op):
    """y = the index of the first maximum;  no derivative"""

    def forward(xp, x, axis, keepdims):
        return x.argmax(axis=axis, keepdims=keepdims)


class Argmin(Op):
    """y = the index of the first minimum;  no derivative"""

    def forward(xp, x, axis, keepdims):
        return x.argmin(axis=axis, keepdims=keepdims)


class Logsumexp(Op):
    """y = ln Σ eˣ;  ∂y/∂xᵢ = e^(xᵢ − y), the softmax"""

    saves = "y x"

    def forward(xp, x, axis, keepdims):
        m = x.max(axis=axis, keepdims=True)
        m = xp.where(xp.isfinite(m), m, 0)  # so that a row of −inf, or a +inf, does not become inf − inf
        y = xp.log(xp.exp(x - m).sum(axis=axis, keepdims=True)) + m
        return y if keepdims else y.squeeze(axis)

    def vjp(g, y, x, axis, keepdims):
        kept = kept_shape(x.shape, axis)
        return g.reshape(kept) * np.exp(x - y.reshape(kept))


class Softmax(Op):
    """yᵢ = e^(xᵢ) / Σⱼ e^(xⱼ);  ∂L/∂xᵢ = yᵢ(gᵢ − Σⱼ gⱼyⱼ)"""

    saves = "y"

    def forward(xp, x, axis):
        e = xp.exp(x - x.max(axis=axis, keepdims=True))
        return e / e.sum(axis=axis, keepdims=True)

    def vjp(g, y, x, axis):
        return y * (g - (g * y).sum(axis=axis, keepdims=True))


class LogSoftmax(Op):
    """yᵢ = xᵢ − ln Σⱼ e^(xⱼ);  ∂L/∂xᵢ = gᵢ − e^(yᵢ) Σⱼ gⱼ"""

    saves = "y"

    def forward(xp, x, axis):
        z = x - x.max(axis=axis, keepdims=True)
        return z - xp.log(xp.exp(z).sum(axis=axis, keepdims=True))

    def vjp(g, y, x, axis):
        return g - np.exp(y) * g.sum(axis=axis, keepdims=True)


class Cumsum(Op):
    """yᵢ = Σ_{j ≤ i} xⱼ;  ∂L/∂xⱼ = Σ_{i ≥ j} gᵢ"""

    def forward(xp, x, axis):
        return x.cumsum(axis=axis)

    def vjp(g, y, x, axis):
        return np.flip(np.flip(g, axis=axis).cumsum(axis=axis), axis=axis)


def _all_of_one(x: Any, axis: Any) -> Any:
    """The axis, or None where it is the one that NumPy, but not CuPy, grants an array without axes."""
    return None if x.data.ndim == 0 and axis in (0, -1) else axis


def sum(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Σ over the given axes (all when None)."""
    x = as_value(x)
    return apply(Sum, x, axis=_all_of_one(x, axis), keepdims=keepdims)


def mean(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Σ/n over the given axes; NaN when n = 0."""
    x = as_value(x)
    total, n = sum(x, axis, keepdims), count(x.data.shape, axis)
    return el.div(total, n or math.nan)


def var(x: Any, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> Tensor:
    """Σ(x − mean)²/(n − ddof), from centred values. ddof=0 as in NumPy; PyTorch's default is 1."""
    x = as_value(x)
    centred = el.sub(x, mean(x, axis, keepdims=True))
    n = count(x.data.shape, axis) - ddof
    return el.div(sum(el.mul(centred, centred), axis, keepdims), n if n > 0 else math.nan)


def std(x: Any, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> Tensor:
    """√var; its gradient is not finite where all values are equal."""
    return el.sqrt(var(x, axis, keepdims, ddof))


def max(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Largest value along the axes; equal maxima share the gradient evenly (as torch.amax)."""
    x = as_value(x)
    return apply(Max, x, axis=_all_of_one(x, axis), keepdims=keepdims)


def min(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Smallest value along the axes; equal minima share the gradient evenly (as torch.amin)."""
    x = as_value(x)
    return apply(Min, x, axis=_all_of_one(x, axis), keepdims=keepdims)


def prod(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Π over the given axes (all when None), as a balanced tree of products: its derivatives hold where factors are 0."""
    x = as_value(x)
    if x.data.dtype.kind in "biu":
        x = el.cast(x, np.int64)
    axes = range(x.ndim) if axis is None or x.ndim == 0 else normalize_axis_tuple(axis, x.ndim, "prod")
    rest = [i for i in range(x.ndim) if i not in axes]
    n = count(x.data.shape, axis)
    if n == 0:
        return sum(x, axis, keepdims) + 1
    y = x.transpose(*rest, *axes).reshape(-1, n)
    while (n := y.shape[1]) > 1:
        pairs = y[:, : n - n % 2 : 2] * y[:, 1::2]
        y = pairs if n % 2 == 0 else np.concatenate([pairs, y[:, -1:]], axis=1)
    return y.reshape(kept_shape(x.data.shape, axis) if keepdims else tuple(x.data.shape[i] for i in rest))


def logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """ln Σ eˣ, without overflow."""
    x = el.floating(as_value(x))
    return apply(Logsumexp, x, axis=_all_of_one(x, axis), keepdims=keepdims)


def softmax(x: Any, axis: int = -1) -> Tensor:
    """eˣ/Σeˣ along one axis; each slice sums to 1."""
    x = el.floating(as_value(x))
    return apply(Softmax, x, axis=_all_of_one(x, axis))


def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """ln softmax, accurate where the softmax is tiny."""
    x = el.floating(as_value(x))
    return apply(LogSoftmax, x, axis=_all_of_one(x, axis))


def cumsum(x: Any, axis: int = -1) -> Tensor:
    """Running sum along one axis."""
    return apply(Cumsum, as_value(x), axis=axis)


def argmax(x: Any, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """Index of the first largest value (int64, no gradient)."""
    x = as_value(x)
    return apply(Argmax, x, axis=_all_of_one(x, axis), keepdims=keepdims)


def argmin(x: Any, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """Index of the first smallest value (int64, no gradient)."""
    x = as_value(x)
    return apply(Argmin, x, axis=_all_of_one(x, axis), keepdims=keepdims)
