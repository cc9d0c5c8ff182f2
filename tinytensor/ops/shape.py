"""Ops that move elements and change none of them; each gradient moves them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_index, normalize_axis_tuple

from tinytensor.autograd import Op, apply, as_value

if TYPE_CHECKING:
    from tinytensor.tensor import Tensor


class Reshape(Op):
    """y holds x's elements, in C order, in another shape"""

    def forward(xp, x, shape):
        return x.reshape(shape)

    def vjp(g, y, x, shape):
        return g.reshape(x.shape)


class Transpose(Op):
    """y's axis i is x's axis axes[i];  the gradient takes the inverse permutation"""

    def forward(xp, x, axes):
        return x.transpose(axes)

    def vjp(g, y, x, axes):
        return g.transpose(tuple(sorted(range(len(axes)), key=lambda i: axes[i] % len(axes))))


class BroadcastTo(Op):
    """y repeats x along new or size-1 axes;  the engine sums the gradient over them"""

    def forward(xp, x, shape):
        return xp.broadcast_to(x, shape)

    def vjp(g, y, x, shape):
        return g


class Concat(Op):
    """y = [x₀; x₁; …] along an axis;  each input gets its part of g"""

    def forward(xp, *inputs, axis):
        return xp.concatenate(inputs, axis=axis)

    def vjp(g, y, *inputs, axis):
        parts, start = [], 0
        for x in inputs:
            stop = start + x.shape[axis]
            parts.append(g[(slice(None),) * (axis % g.ndim) + (slice(start, stop),)])
            start = stop
        return tuple(parts)


class Pad(Op):
    """y is x with a constant around it;  the gradient is g without its margin"""

    def forward(xp, x, width, value):
        return xp.pad(x, width, constant_values=value)

    def vjp(g, y, x, width, value):
        return g[tuple(slice(before, before + n) for (before, _), n in zip(width, x.shape, strict=True))]


class Flip(Op):
    """y is x reversed along axes, and g is turned back the same way"""

    def forward(xp, x, axis):
        return xp.flip(x, axis)

    def vjp(g, y, x, axis):
        return np.flip(g, axis)


class Tril(Op):
    """y keeps x on and below diagonal k of the last two axes, 0 elsewhere;  so does the gradient"""

    def forward(xp, x, k):
        return xp.tril(x, k)

    def vjp(g, y, x, k):
        return np.tril(g, k)


class Triu(Op):
    """y keeps x on and above diagonal k of the last two axes, 0 elsewhere;  so does the gradient"""

    def forward(xp, x, k):
        return xp.triu(x, k)

    def vjp(g, y, x, k):
        return np.triu(g, k)


def reshape(x: Any, *shape: Any) -> Tensor:
    """The same elements in another shape; one size may be −1. A view where the layout allows."""
    return apply(Reshape, as_value(x), shape=_flat(shape))


def transpose(x: Any, *axes: Any) -> Tensor:
    """Axes permuted as in NumPy: all reversed when none are given."""
    x = as_value(x)
    return apply(Transpose, x, axes=_flat(axes) if axes and axes[0] is not None else tuple(range(x.data.ndim))[::-1])


def swapaxes(x: Any, a: int, b: int) -> Tensor:
    """Two axes exchanged."""
    x = as_value(x)
    axes = list(range(x.data.ndim))
    try:
        axes[a], axes[b] = axes[b], axes[a]
    except IndexError:
        raise IndexError(f"swapaxes: axes {a} and {b} do not exist in shape {x.data.shape}") from None
    return apply(Transpose, x, axes=tuple(axes))


def squeeze(x: Any, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Without the size-1 axes named (all of them when None); naming an axis of another size is an error."""
    x = as_value(x)
    try:
        shape = np.empty(x.data.shape, np.bool_).squeeze(axis).shape
    except ValueError as error:
        raise ValueError(f"squeeze: axis {axis} of shape {x.data.shape}: {error}") from None
    return apply(Reshape, x, shape=shape)


def unsqueeze(x: Any, axis: int | tuple[int, ...]) -> Tensor:
    """With new size-1 axes at these places of the result (NumPy's expand_dims)."""
    x = as_value(x)
    places = (axis,) if isinstance(axis, int | np.integer) else tuple(axis)
    places = normalize_axis_tuple(places, x.data.ndim + len(places), "unsqueeze")
    sizes = iter(x.data.shape)
    shape = tuple(1 if i in places else next(sizes) for i in range(x.data.ndim + len(places)))
    return apply(Reshape, x, shape=shape)


def broadcast_to(x: Any, *shape: Any) -> Tensor:
    """x repeated to `shape` without copying; writing into the result is an error."""
    return apply(BroadcastTo, as_value(x), shape=_flat(shape))


def expand(x: Any, *shape: Any) -> Tensor:
    """As broadcast_to, with −1 for a size that stays (PyTorch's expand)."""
    x = as_value(x)
    sizes = _flat(shape)
    own = (1,) * (len(sizes) - x.data.ndim) + x.data.shape
    return broadcast_to(x, tuple(o if s == -1 else s for s, o in zip(sizes, own, strict=False)))


def concat(inputs: Any, axis: int | None = 0) -> Tensor:
    """Tensors joined along an existing axis; flattened first when it is None (as NumPy)."""
    inputs = [as_value(x) for x in inputs]
    if axis is None:
        inputs, axis = [x.reshape(-1) for x in inputs], 0
    if not inputs:
        raise ValueError("concat: needs at least one tensor")
    return apply(Concat, *inputs, axis=axis)


def stack(inputs: Any, axis: int = 0) -> Tensor:
    """Tensors of one shape joined along a new axis."""
    inputs = list(inputs)
    shapes = {as_value(x).data.shape for x in inputs}
    if len(shapes) > 1:
        raise ValueError(f"stack: all tensors must have one shape, got {sorted(shapes)}")
    return concat([unsqueeze(x, axis) for x in inputs], axis)


def split(x: Any, sections: int | list[int] | tuple[int, ...], axis: int = 0) -> list[Tensor]:
    """Views along an axis: of `sections` elements each (the last may be shorter), or of the listed sizes (as PyTorch)."""
    x = as_value(x)
    axis = normalize_axis_index(axis, x.data.ndim, "split")
    n = x.data.shape[axis]
    if isinstance(sections, int | np.integer):
        if sections < 1:
            raise ValueError(f"split: the size of a part must be at least 1, got {sections}")
        sizes = [min(sections, n - start) for start in range(0, n, sections)] or [0]
    else:
        sizes = list(sections)
        if sum(sizes) != n or min(sizes, default=0) < 0:
            raise ValueError(f"split: sizes {sizes} do not add up to {n}, the length of axis {axis}")
    parts, start = [], 0
    for size in sizes:
        parts.append(x[(slice(None),) * axis + (slice(start, start + size),)])
        start += size
    return parts


def chunk(x: Any, chunks: int, axis: int = 0) -> list[Tensor]:
    """At most `chunks` views of equal length along an axis; the last may be shorter."""
    if chunks < 1:
        raise ValueError(f"chunk: the number of chunks must be at least 1, got {chunks}")
    x = as_value(x)
    n = x.data.shape[normalize_axis_index(axis, x.data.ndim, "chunk")]
    return split(x, max(1, -(-n // chunks)), axis)


def pad(x: Any, width: Any, value: float = 0.0) -> Tensor:
    """x with `value` around it; width as in numpy.pad: one number, (before, after), or one pair for each axis."""
    x = as_value(x)
    try:
        pairs = np.broadcast_to(np.asarray(width), (x.data.ndim, 2)).tolist()
    except ValueError:
        raise ValueError(f"pad: width {width} is not one pair (before, after) for each axis of shape {x.data.shape}") from None
    if any(w < 0 for pair in pairs for w in pair):
        raise ValueError(f"pad: widths must not be negative, got {width}")
    return apply(Pad, x, width=tuple(map(tuple, pairs)), value=value)


def flip(x: Any, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Reversed along the given axes (all when None)."""
    return apply(Flip, as_value(x), axis=axis)


def tril(x: Any, k: int = 0) -> Tensor:
    """Lower triangle of the last two axes: 0 above diagonal k."""
    return apply(Tril, as_value(x), k=k)


def triu(x: Any, k: int = 0) -> Tensor:
    """Upper triangle of the last two axes: 0 below diagonal k."""
    return apply(Triu, as_value(x), k=k)


def _flat(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """(2, 3) from f(x, 2, 3), f(x, (2, 3)) or f(x, [2, 3])."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int | np.integer) else sizes
