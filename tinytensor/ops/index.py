"""Reading and writing by index. Reading's gradient is adding at the same places, and the other way round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_index

from tinytensor import backend
from tinytensor.autograd import Op, Value, apply, as_value, beside, call
from tinytensor.backend import is_basic_index

if TYPE_CHECKING:
    from tinytensor.tensor import Tensor


class Getitem(Op):
    """y = x[index];  ∂L/∂x is 0 but for g added at index"""

    def forward(xp, x, index):
        return x[index]

    def vjp(g, y, x, index):
        return call(IndexAdd, g, index=index, shape=x.shape)


class IndexAdd(Op):
    """y = 0, then y[index] += x, adding again where an index repeats;  ∂L/∂x = g[index]"""

    def forward(xp, x, index, shape):
        y = xp.zeros(shape, x.dtype)
        if is_basic_index(index):
            y[index] = x
        else:
            xp.add.at(y, index, x)
        return y

    def vjp(g, y, x, index, shape):
        return g[index]


class Setitem(Op):
    """y = x with y[index] = v;  ∂L/∂x = g with 0 at index,  ∂L/∂v = g[index]"""

    def forward(xp, x, v, index):
        y = xp.array(x)  # an array also where x is a NumPy scalar
        y[index] = v
        return y

    def vjp(g, y, x, v, index):
        def dv():
            share = g[index]
            if not is_basic_index(index):  # where an index repeats, the last value is the one that stays
                xp = backend.xp_of(as_value(g).data)
                order, last = xp.arange(share.size).reshape(share.shape), xp.zeros(y.shape, np.int64)
                last[index] = order
                share = share * (last[index] == order)
            return share.reshape((1,) * (v.ndim - share.ndim) + share.shape)  # NumPy lets v have more axes, of length 1

        return (lambda: call(Setitem, g, 0.0, index=index)), dv


class Written(Op):
    """y = x, whose values have just been written into another tensor's memory;  dy/dx = 1"""

    def forward(xp, x):
        return x

    def vjp(g, y, x):
        return g


class Gather(Op):
    """y[…, j, …] = x[…, i[…, j, …], …] along an axis;  ∂L/∂x adds g at those places"""

    def forward(xp, x, axis, indices):
        return xp.take_along_axis(x, indices, axis)

    def vjp(g, y, x, axis, indices):
        return call(ScatterAdd, np.zeros(x.shape, x.dtype, like=indices), g, axis=axis, indices=indices)


class ScatterAdd(Op):
    """y = x, then y[…, i[…, j, …], …] += v[…, j, …] along an axis;  ∂L/∂x = g,  ∂L/∂v gathers g"""

    def forward(xp, x, v, axis, indices):
        y = x.copy()
        index = list(xp.ogrid[tuple(slice(n) for n in indices.shape)])
        index[axis] = indices
        xp.add.at(y, tuple(index), v)
        return y

    def vjp(g, y, x, v, axis, indices):
        return g, lambda: call(Gather, g, axis=axis, indices=indices)


class Embedding(Op):
    """y = W[ids], (V, C) and (…) → (…, C);  ∂L/∂W adds each row of g to the row it came from"""

    def forward(xp, weight, ids):
        return weight[ids]

    def vjp(g, y, weight, ids):
        return call(IndexAdd, g, index=ids, shape=weight.shape)


def getitem(x: Any, index: Any) -> Tensor:
    """x[index] with NumPy's basic and fancy indexing. Basic indexing gives a view."""
    x = as_value(x)
    return apply(Getitem, x, index=plain_index(index, x))


def setitem(x: Any, index: Any, value: Any) -> Tensor:
    """A copy of x with x[index] replaced by value (which broadcasts)."""
    x = as_value(x)
    return apply(Setitem, x, value, index=plain_index(index, x))


def written(x: Any) -> Tensor:
    """x as it stands after an in-place write: the same array, a newer node."""
    return apply(Written, x)


def gather(x: Any, axis: int, indices: Any) -> Tensor:
    """Elements of x picked along an axis by an integer array of x's other dimensions (torch.gather)."""
    x, ids = as_value(x), _ids("gather", indices)
    return apply(Gather, x, axis=_check_places("gather", ids, x.data.shape, axis), indices=beside(x, ids))


def scatter_add(x: Any, axis: int, indices: Any, values: Any) -> Tensor:
    """x with `values` added along an axis where `indices` says, repeated indices adding up (torch.scatter_add)."""
    x, ids, values = as_value(x), _ids("scatter_add", indices), as_value(values)
    axis = _check_places("scatter_add", ids, x.data.shape, axis)
    if ids.shape != values.data.shape:
        raise ValueError(f"scatter_add: indices have shape {ids.shape} but values have shape {values.data.shape}")
    return apply(ScatterAdd, x, values, axis=axis, indices=beside(x, ids))


def embedding(weight: Any, ids: Any) -> Tensor:
    """Rows of a (V, C) table by integer ids of any shape; ids outside 0 … V−1 are refused (on a GPU nobody looks)."""
    weight, ids = as_value(weight), _ids("embedding", ids)
    if weight.data.ndim == 0:
        raise ValueError("embedding: the table needs an axis of rows, got a 0-d array")
    _check_ids("embedding", ids, weight.data.shape[0])
    return apply(Embedding, weight, ids=beside(weight, ids))


def plain_index(index: Any, x: Any) -> Any:
    """An index into x with its tensors and lists turned into arrays beside it."""
    if type(index) is slice or type(index) is int:
        return index
    if isinstance(index, tuple):
        return tuple([plain_index(i, x) for i in index])
    if isinstance(index, Value):
        index = index.data
    elif isinstance(index, list):
        index = np.asarray(index, dtype=np.intp if not index else None)
    if isinstance(index, float):
        raise IndexError(f"an index must be integer, slice, None, ... or boolean, got the float {index}")
    return beside(x, index) if isinstance(index, np.ndarray) else index


def _ids(op: str, ids: Any) -> Any:
    array = ids.data if isinstance(ids, Value) else backend.as_array(ids)
    if array.size == 0 and array.dtype.kind == "f":
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{op}: indices must be integers, got {array.dtype}")
    return array


def _check_places(op: str, ids: Any, shape: tuple[int, ...], axis: int) -> int:
    """The axis, counted from the front, along which `ids` picks from an array of `shape`; both agree in all others."""
    axis = normalize_axis_index(axis, len(shape), op)
    if ids.ndim != len(shape) or any(n != m for i, (n, m) in enumerate(zip(ids.shape, shape, strict=True)) if i != axis):
        raise ValueError(f"{op}: indices of shape {ids.shape} do not fit shape {shape} in all axes but {axis}")
    _check_ids(op, ids, shape[axis])
    return axis


def _check_ids(op: str, ids: Any, size: int) -> None:
    """Refuse ids outside 0 … size − 1, on the CPU: to look at them on a GPU would be to wait for it."""
    if isinstance(ids, np.ndarray) and ids.size and (ids.min() < 0 or ids.max() >= size):
        bad = ids[(ids < 0) | (ids >= size)].flat[0]
        raise IndexError(f"{op}: index {bad} is outside 0 … {size - 1}")
