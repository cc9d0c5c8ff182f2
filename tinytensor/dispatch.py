"""Which op answers to which of NumPy's functions, so that np.exp(t) and np.sum(t) are differentiable (NEP 13, NEP 18)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinytensor import backend, ops
from tinytensor.autograd import Value


def untracked(f: Callable[..., Any]) -> Callable[..., Any]:
    """f on bare arrays, its result a tensor outside the graph: for functions whose derivative is 0 or that have none."""

    def result(*inputs: Any, **params: Any) -> Any:
        return Value.result_type(backend.as_array(f(*(x.data if isinstance(x, Value) else x for x in inputs), **params)))

    return result


def _reduction(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` with the signature of NumPy's reductions, refusing what it cannot honour."""

    def reduced(x: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: Any = False, **kw: Any) -> Any:
        if out is not None or dtype is not None or any(k != "ddof" for k in kw):
            raise TypeError(f"{f.__name__} of a tensor takes axis, keepdims and ddof only")
        return f(x, axis, keepdims=bool(keepdims), **kw)

    return reduced


REDUCTIONS = {np.add: _reduction(ops.sum), np.maximum: _reduction(ops.max), np.minimum: _reduction(ops.min)}

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.add: ops.add,
    np.subtract: ops.sub,
    np.multiply: ops.mul,
    np.divide: ops.div,
    np.power: ops.pow,
    np.negative: ops.neg,
    np.matmul: ops.matmul,
    np.maximum: ops.maximum,
    np.minimum: ops.minimum,
    np.absolute: ops.abs,
    np.exp: ops.exp,
    np.expm1: ops.expm1,
    np.log: ops.log,
    np.log1p: ops.log1p,
    np.sqrt: ops.sqrt,
    np.square: lambda x: ops.mul(x, x),
    np.sin: ops.sin,
    np.cos: ops.cos,
    np.tanh: ops.tanh,
    np.sum: _reduction(ops.sum),
    np.mean: _reduction(ops.mean),
    np.var: _reduction(ops.var),
    np.std: _reduction(ops.std),
    np.max: _reduction(ops.max),
    np.min: _reduction(ops.min),
    np.prod: _reduction(ops.prod),
    np.argmax: ops.argmax,
    np.argmin: ops.argmin,
    np.cumsum: lambda x, axis=None: ops.cumsum(x.reshape(-1), 0) if axis is None else ops.cumsum(x, axis),
    np.clip: ops.clip,
    np.where: ops.where,
    np.reshape: ops.reshape,
    np.transpose: ops.transpose,
    np.swapaxes: ops.swapaxes,
    np.squeeze: ops.squeeze,
    np.expand_dims: ops.unsqueeze,
    np.broadcast_to: ops.broadcast_to,
    np.concatenate: ops.concat,
    np.stack: ops.stack,
    np.flip: ops.flip,
    np.tril: ops.tril,
    np.triu: ops.triu,
    np.einsum: ops.einsum,
    np.shape: lambda x: x.shape,
    np.ndim: lambda x: x.ndim,
    np.size: lambda x: x.size,
    np.zeros_like: untracked(np.zeros_like),
    np.ones_like: untracked(np.ones_like),
}
_PLAIN = (np.sign, np.isfinite, np.isnan, np.bitwise_and, np.bitwise_or, np.invert)
_COMPARISONS = (np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal)
FUNCTIONS.update({f: untracked(f) for f in (*_PLAIN, *_COMPARISONS)})
