"""What an op computes and moves, counted from shapes; and what this machine could do in that time.

FLOPs are those of the formula in `ops`: one for each +, −, ×, ÷, comparison and function (exp, tanh, erf) of one number. With
n the elements of the largest array among inputs and result, and k the length that a product sums over:

| op                | forward                                    | backward                                                 |
|-------------------|--------------------------------------------|----------------------------------------------------------|
| matmul, linear    | 2·(elements of y)·k; a bias adds one each  | the same again for each matrix that wants its gradient   |
| einsum of m terms | m·(product of all index lengths), or m − 1 | the same again for each term that wants its gradient     |
|                   | times it where no index is summed          |                                                          |
| causal_attention  | for each query and key not after it:       | 2(3d + 2e) + 11, for the weights are made anew,          |
|                   | 2(d + e) + 6, with dropout 2 more          | with dropout 3 more                                      |
| those of RATES    | RATES[op][0]·n; a layer_norm's bias adds n | RATES[op][i]·n for its i-th input                        |
| a repeated input  |                                            | n more to sum its gradient over the axes it was repeated |
| any other         | not counted: 0                             | not counted: 0                                           |

Bytes are those of every distinct array once: forward its inputs, its result and what a kernel keeps for backward; backward the
gradient that arrived, what was saved and the gradients made. Of an array that repeats without lying in memory, and of a table
that rows are picked from, what is touched counts. Results that are views, and gradients passed on as they are, move nothing.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinytensor import parallel
from tinytensor.autograd import Node
from tinytensor.backend import Array, memory_root
from tinytensor.inspect.graph import arrays_in


class Cost(NamedTuple):
    flops: int
    bytes: int


_PASSED = None  # the gradient is g itself or a view of it
RATES: dict[str, tuple[int | None, ...]] = {  # forward, then backward for each input, the last one also for those after it
    "add": (1, _PASSED),
    "sub": (1, _PASSED, 1),
    "mul": (1, 1),
    "div": (1, 1, 3),
    "pow": (1, 3, 5),
    "neg": (1, 1),
    "abs": (1, 2),
    "exp": (1, 1),
    "expm1": (1, 2),
    "log": (1, 1),
    "log1p": (1, 2),
    "sqrt": (1, 2),
    "rsqrt": (2, 4),
    "sin": (1, 2),
    "cos": (1, 3),
    "tanh": (1, 3),
    "clip": (2, 3),
    "maximum": (1, 5, 3),
    "minimum": (1, 5, 3),
    "where": (0, 0),
    "cast": (0, 0),
    "sigmoid": (6, 3),
    "erf": (1, 5),
    "relu": (1, 2),
    "gelu": (9, 19),
    "softplus": (6, 7),
    "sum": (1, _PASSED),
    "max": (1, 4),
    "min": (1, 4),
    "argmax": (1,),
    "argmin": (1,),
    "logsumexp": (4, 3),
    "softmax": (5, 4),
    "log_softmax": (5, 4),
    "cumsum": (1, 1),
    "linear": (0, 0, 0, _PASSED),
    "layer_norm": (6, 13, 1, _PASSED),
    "cross_entropy": (5, 7),
    "dropout": (2, 2),
    "dropout_add": (3, 2, _PASSED),
    "embedding": (0, 1),
    "getitem": (0, 0),
    "setitem": (0, 0),
    "gather": (0, 1),
    "reshape": (0, _PASSED),
    "transpose": (0, _PASSED),
    "broadcast_to": (0, _PASSED),
    "concat": (0, _PASSED),
    "pad": (0, _PASSED),
    "flip": (0, _PASSED),
    "tril": (0, 0),
    "triu": (0, 0),
    "written": (0, _PASSED),
}
_REPEATING = {"add", "sub", "mul", "div", "pow", "maximum", "minimum", "where", "layer_norm", "linear", "broadcast_to"}
_PICKING = {"embedding", "gather", "getitem"}


def forward(name: str, inputs: Sequence[Any], y: Array, kept: Any, params: dict[str, Any]) -> Cost:
    """Of y = op(*inputs), whose kernel keeps `kept`."""
    n = y.size if name in _PICKING else max(_size(x) for x in (*inputs, y))
    flops = (RATES.get(name, (0,))[0] or 0) * n + _product(name, inputs, y, params)
    if name in ("linear", "layer_norm") and len(inputs) == 3:
        flops += y.size
    arrays = _arrays(inputs)
    if any(memory_root(a) is memory_root(y) for a in arrays):
        return Cost(flops, 0)
    read = y.nbytes if name in _PICKING else _distinct(arrays)
    return Cost(flops, read + y.nbytes + _distinct(_arrays([kept, *params.values()])))


def backward(node: Node, g: Array, wanted: set[Any] | None) -> Cost:
    """Of sending g on to the inputs that want a gradient, of `wanted` alone where that is given."""
    name, values = node.op.name, node.values
    if not values or node.opaque:  # whose work is that of the ops it replays
        return Cost(0, 0)
    y, *inputs = values
    wants = [edge is not None and (wanted is None or edge in wanted) for edge in node.edges]
    n = _size(y) if name in _PICKING else max(_size(x) for x in values)
    rates = RATES.get(name, (0, 0))[1:] or (0,)
    products = 1 if name == "causal_attention" else sum(wants[:2] if name == "linear" else wants)
    flops, made = products * _product(name, inputs, y, node.params, True), 0
    for i, x in enumerate(inputs):
        if wants[i]:
            rate = rates[min(i, len(rates) - 1)]
            repeated = _size(x) < _size(y) and name in _REPEATING and (name != "linear" or i == 2)
            flops += n * (rate or 0) + _size(y) * repeated
            if rate is not _PASSED or repeated:
                made += _size(x) * x.dtype.itemsize
    kept = getattr(node.vjp, "residual", None)
    return Cost(flops, made and made + _distinct(_arrays([g, *values, kept, *node.params.values()])))


def _product(name: str, inputs: Sequence[Any], y: Any, params: dict[str, Any], backward: bool = False) -> int:
    """FLOPs of a product of matrices, or of making one of its gradients (all three of attention's); 0 for other ops."""
    if name in ("matmul", "linear"):
        return 2 * _size(y) * inputs[0].shape[-1]
    if name == "einsum":
        terms, out = params["subscripts"].split("->")
        lengths = {c: n for term, x in zip(terms.split(","), inputs, strict=True) for c, n in zip(term, x.shape, strict=True)}
        return (len(inputs) - (set(lengths) <= set(out))) * math.prod(lengths.values())
    if name == "causal_attention":
        (*batch, T, d), S, e = inputs[0].shape, inputs[1].shape[-2], inputs[2].shape[-1]
        pairs, dropped = math.prod(batch) * (T * S - T * (T - 1) // 2), bool(params.get("p"))
        return pairs * (2 * (3 * d + 2 * e) + 11 + 3 * dropped if backward else 2 * (d + e) + 6 + 2 * dropped)
    return 0


def _size(x: Any) -> int:
    return math.prod(getattr(x, "shape", ()))


def _arrays(values: Any) -> list[Array]:
    return [array for _, array in arrays_in("", list(values))]


def _distinct(arrays: Any) -> int:
    """Bytes of the memory of these arrays, each counted once."""
    once = {id(a): a for a in arrays}.values()
    return sum(a.itemsize * math.prod(n for n, step in zip(a.shape, a.strides, strict=True) if step or not n) for a in once)


def gemm_peak() -> float:
    """FLOP/s of the fastest of a few float32 matrix products, with the threads that BLAS has now: a fifth of a second, once."""
    return _gemm_peak(blas_threads())


def blas_threads() -> int:
    """How many threads BLAS has now."""
    return max((library["num_threads"] for library in parallel._blas().info()), default=1)


@functools.cache
def _gemm_peak(threads: int) -> float:
    a, b = np.ones((2048, 1024), np.float32), np.ones((1024, 1024), np.float32)
    out = np.empty((2048, 1024), np.float32)
    return 2 * a.size * b.shape[1] / _fastest(lambda: np.matmul(a, b, out=out), 8)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes/s read and written by one thread that copies 64 MB, more than a core's caches hold: a tenth of a second, once."""
    a = np.ones(1 << 24, np.float32)
    out = np.zeros_like(a)
    return 2 * a.nbytes / _fastest(lambda: np.copyto(out, a), 5)


def _fastest(work: Any, times: int) -> float:
    best = math.inf
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
