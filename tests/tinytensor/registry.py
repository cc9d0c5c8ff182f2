"""Every public op, once: calls to try, calls that it must refuse, and the same function in PyTorch.

A reference has its op's own signature. Ops that only move elements are told by NumPy where each element goes, and PyTorch
differentiates the copy.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import tinytensor as tt
from tinytensor.backend import random


class A:
    """An array argument: its shape, and where its values lie when not in the op's domain."""

    def __init__(self, *shape: int, low: float | None = None, high: float | None = None) -> None:
        self.shape, self.low, self.high = shape, low, high

    def __repr__(self) -> str:
        return "x".join(map(str, self.shape)) or "0d"


class Call:
    """The arguments of one call, arrays still to be filled in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def __repr__(self) -> str:
        words = [_short(a) for a in self.args] + [f"{k}={_short(v)}" for k, v in self.kwargs.items()]
        return ",".join(words) or "()"

    def places(self) -> list[A]:
        return list(_places((self.args, self.kwargs)))

    def arrays(self, domain: tuple[float, float]) -> list[np.ndarray]:
        """float64 values for the array arguments, in order; always the same."""
        rng = np.random.default_rng(zlib.crc32(repr(self).encode()))
        low, high = domain
        return [
            rng.uniform(low if a.low is None else a.low, high if a.high is None else a.high, a.shape) for a in self.places()
        ]

    def bind(self, values: list[Any], other: Callable[[Any], Any] = lambda x: x) -> tuple[Any, Any]:
        """args and kwargs with `values` for the arrays and other(x) for each integer or boolean array."""
        remaining = iter(values)
        return _fill((self.args, self.kwargs), remaining, other)


@dataclass(frozen=True)
class Fails:
    call: Call
    error: type[Exception]
    message: str


@dataclass(frozen=True)
class OpInfo:
    name: str
    reference: Callable[..., Any]
    calls: list[Call]
    errors: list[Fails]
    domain: tuple[float, float] = (-2.0, 2.0)
    integers: str | None = "float32"  # the result's dtype for int64 arrays; None where they make no sense
    differentiable: bool = True
    constant_ok: bool = True  # the gradient is finite where all values are equal
    large: tuple[Call, ...] = ()  # more rows than a kernel's block, of odd sizes; needed where a kernel exists

    def __repr__(self) -> str:
        return self.name

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(tt, self.name)


def _places(x: Any) -> Iterator[A]:
    if isinstance(x, A):
        yield x
    elif isinstance(x, (list, tuple)):
        for part in x:
            yield from _places(part)
    elif isinstance(x, dict):
        yield from _places(list(x.values()))


def _fill(x: Any, values: Iterator[Any], other: Callable[[Any], Any]) -> Any:
    if isinstance(x, A):
        return next(values)
    if isinstance(x, (list, tuple)) and not isinstance(x, random.Key):
        return type(x)(_fill(part, values, other) for part in x)
    if isinstance(x, dict):
        return {k: _fill(v, values, other) for k, v in x.items()}
    return other(x) if isinstance(x, np.ndarray) else x


def _short(x: Any) -> str:
    if isinstance(x, np.ndarray):
        return f"{x.dtype}{list(x.shape)}".replace(" ", "")
    if isinstance(x, random.Key):
        return "key"
    if isinstance(x, (list, tuple)):
        return ("[%s]" if isinstance(x, list) else "(%s)") % ",".join(map(_short, x))
    if isinstance(x, slice):
        return ":".join("" if part is None else str(part) for part in (x.start, x.stop, x.step))
    return "..." if x is Ellipsis else str(x)


# -- references in PyTorch, with NumPy's signatures


def moved(places: Callable[..., Any]) -> Callable[..., Any]:
    """The reference of an op that only moves elements: places(numbered elements, …) says where."""

    def reference(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        numbered = places(np.arange(x.numel()).reshape(x.shape), *args, **kwargs)
        parts = [x.reshape(-1)[torch.from_numpy(np.array(p))] for p in (numbered if isinstance(numbered, list) else [numbered])]
        return parts if isinstance(numbered, list) else parts[0]

    return reference


def along(f: Callable[..., Any]) -> Callable[..., Any]:
    def reference(x: torch.Tensor, axis: Any = None, keepdims: bool = False, **kwargs: Any) -> torch.Tensor:
        if isinstance(axis, tuple) and not axis:  # NumPy reduces nothing then, PyTorch everything
            return f(x.unsqueeze(-1), dim=-1, keepdim=False, **kwargs)
        axis = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else int(axis)
        return f(x, dim=axis, keepdim=keepdims, **kwargs)

    return reference


def prod(x: torch.Tensor, dim: Any, keepdim: bool) -> torch.Tensor:
    dims = sorted(d % x.ndim for d in (dim if isinstance(dim, tuple) else (dim,))) if x.ndim else []
    for d in dims:
        x = x.prod(d, keepdim=True)
    return x if keepdim else x.reshape([n for i, n in enumerate(x.shape) if i not in dims])


def tensors(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, with Python numbers as tensors of the other arguments' dtype."""

    def reference(*args: Any) -> torch.Tensor:
        dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor) and a.dtype.is_floating_point)
        return f(*(a if isinstance(a, torch.Tensor) else torch.tensor(a, dtype=dtype) for a in args))

    return reference


def setitem(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    index = index.numpy() if isinstance(index, torch.Tensor) else index
    places = np.arange(x.numel()).reshape(x.shape)[index]
    last = {place: i for i, place in enumerate(places.reshape(-1).tolist())}
    value = torch.as_tensor(value, dtype=x.dtype)
    while value.ndim > places.ndim:
        value = value[0]
    y = x.reshape(-1).clone()
    y[list(last)] = value.broadcast_to(places.shape).reshape(-1)[list(last.values())]
    return y.reshape(x.shape)


def pad(x: torch.Tensor, width: Any, value: float = 0.0) -> torch.Tensor:
    pairs = np.broadcast_to(width, (x.ndim, 2)).tolist()
    return F.pad(x, [w for pair in pairs[::-1] for w in pair], value=value)


def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, key: Any = None) -> torch.Tensor:
    if not training or p == 0:
        return x
    q = random.keep_probability(p)
    return x * torch.from_numpy(random.keep_mask(key, tuple(x.shape), p)) * (1 / q if q else 0)


def dropout_add(x: Any, residual: Any, p: float = 0.5, training: bool = True, key: Any = None) -> torch.Tensor:
    return residual + dropout(x, p, training, key)


def causal_attention(q: Any, k: Any, v: Any, dropout_p: float = 0.0, training: bool = True, key: Any = None) -> torch.Tensor:
    T, S = q.shape[-2], k.shape[-2]
    past = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~past, -torch.inf).softmax(-1)
    return dropout(weights, dropout_p, training, key) @ v


def cross_entropy(logits: Any, targets: Any, **kwargs: Any) -> torch.Tensor:
    targets = torch.as_tensor(targets, dtype=torch.int64)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), **kwargs)


# -- the table

KEY = random.Key(1, "test")
ELEMENTWISE = [Call(A(2, 3)), Call(A()), Call(A(1)), Call(A(0)), Call(A(2, 0, 3))]
PAIRS = [
    Call(A(2, 3), A(2, 3)),
    Call(A(2, 3), A(3)),
    Call(A(2, 1), A(1, 3)),
    Call(A(), A(2, 2)),
    Call(A(2), A()),
    Call(A(), A()),
    Call(A(1), A(1, 1)),
    Call(A(2, 3), 1.7),
    Call(1.7, A(2, 3)),
    Call(A(3), 2),
    Call(A(0), A(1)),
    Call(A(2, 0), A(2, 1)),
]
REDUCTIONS = [
    Call(A(2, 3, 2)),
    Call(A(2, 3, 2), axis=0),
    Call(A(2, 3, 2), axis=-1, keepdims=True),
    Call(A(2, 3, 2), axis=(0, -1)),
    Call(A(2, 3, 2), axis=(2, 1), keepdims=True),
    Call(A(2, 3), axis=(0, 1)),
    Call(A(2, 3), keepdims=True),
    Call(A(2, 3), axis=np.int64(1)),
    Call(A(2, 1), axis=1),
    Call(A(1, 1)),
    Call(A()),
    Call(A(), axis=0),
    Call(A(0, 3), axis=1),
]
NOTHING_TO_REDUCE = [Call(A(0)), Call(A(2, 0), axis=1), Call(A(2, 0), axis=1, keepdims=True), Call(A(2, 3), axis=())]
ALONG_ONE = [Call(A(2, 3)), Call(A(2, 3), axis=0), Call(A(2, 3, 2), axis=1), Call(A(2, 3), -2), Call(A(1)), Call(A(0, 3))]


def unary(name: str, reference: Callable[..., Any], domain: Any = (-2.0, 2.0), inner: str = "", **more: Any) -> OpInfo:
    refused = [
        Fails(Call("two"), TypeError, rf"{inner or name} at .*test_ops.py:\d+: .*dtype <U3.*use numbers"),
        Fails(Call(1j), TypeError, rf"{inner or name} at .*test_ops.py:\d+: .*complex128"),
        Fails(Call([[1.0], [1.0, 2.0]]), ValueError, rf"{inner or name} at .*test_ops.py:\d+: .*inhomogeneous"),
    ]
    return OpInfo(name, reference, ELEMENTWISE, refused, domain, **more)


def binary(name: str, reference: Callable[..., Any], domain: tuple[float, float] = (-2.0, 2.0), **more: Any) -> OpInfo:
    refused = [
        Fails(Call(A(2, 3), A(2)), ValueError, rf"{name}\(float32\[2, 3\], float32\[2\]\) at .*test_ops.py:\d+: .*broadcast"),
        Fails(Call(A(2), "two"), TypeError, rf"{name} at .*dtype <U3"),
    ]
    more.setdefault("integers", "int64")
    return OpInfo(name, reference, PAIRS, refused, domain, **more)


def reduction(name: str, f: Callable[..., Any], inner: str = "", calls: Any = (), **more: Any) -> OpInfo:
    op = inner or name
    refused = [
        Fails(Call(A(2, 3), axis=2), ValueError, rf"{op}\(float32\[2, 3\]\) at .*test_ops.py:\d+: axis 2 is out of bounds"),
        Fails(Call(A(2, 3), axis=(0, -2)), ValueError, rf"{op}\(float32\[2, 3\]\) at .*duplicate value"),
        Fails(Call(A(2, 3), axis=[0]), TypeError, rf"{op}\(float32\[2, 3\]\) at .*list"),
    ]
    return OpInfo(name, along(f), REDUCTIONS + list(calls), more.pop("errors", refused), **more)


def mover(name: str, places: Callable[..., Any], calls: list[Call], errors: list[Fails], **more: Any) -> OpInfo:
    return OpInfo(name, moved(places), calls, errors, integers="int64", **more)


def _size_zero(name: str) -> Fails:
    return Fails(Call(A(2, 0), axis=1), ValueError, rf"{name}\(float32\[2, 0\]\) at .*zero-size array")


def _axis(name: str, f: str = "") -> Fails:
    return Fails(Call(A(2, 3), axis=2), ValueError, rf"{f or name}\(float32\[2, 3\]\) at .*axis 2 is out of bounds")


OPS = [
    # elementwise
    unary("abs", torch.abs, integers="int64"),
    unary("neg", torch.neg, integers="int64"),
    unary("exp", torch.exp),
    unary("expm1", torch.expm1),
    unary("log", torch.log, (0.2, 3)),
    unary("log1p", torch.log1p, (-0.7, 3)),
    unary("sqrt", torch.sqrt, (0.2, 3)),
    unary("rsqrt", torch.rsqrt, (0.2, 3)),
    unary("sin", torch.sin, (-6, 6)),
    unary("cos", torch.cos, (-6, 6)),
    unary("tanh", torch.tanh),
    unary("sigmoid", torch.sigmoid, (-6, 6)),
    unary("erf", torch.erf, (-4, 4)),
    unary("relu", torch.relu, integers="int64"),
    unary("silu", F.silu, (-6, 6), inner="sigmoid"),
    unary("softplus", F.softplus, (-6, 6)),
    OpInfo(
        "gelu",
        lambda x, approximate="tanh": F.gelu(x, approximate=approximate),
        [*ELEMENTWISE, Call(A(2, 3), approximate="none"), Call(A(), "none")],
        [Fails(Call(A(2), approximate="cubic"), ValueError, r"gelu: approximate='cubic' is not known")],
        domain=(-4, 4),
        large=(Call(A(301, 223)), Call(A(3, 5, 7001))),
    ),
    OpInfo(
        "leaky_relu",
        lambda x, slope=0.01: F.leaky_relu(x, slope),
        [*ELEMENTWISE, Call(A(2, 3), 0.3)],
        [Fails(Call("two"), TypeError, "dtype <U3")],
    ),
    OpInfo(
        "clip",
        lambda x, low=None, high=None: torch.clip(x, low, high),
        [Call(A(2, 3), -0.5, 0.7), Call(A(2, 3), low=0.1), Call(A(2, 3), high=0.1), Call(A(), -1, 1), Call(A(0), 0, 1)],
        [
            Fails(Call(A(2)), ValueError, "clip: give low, high, or both"),
            Fails(Call(A(2), tt.zeros(2)), TypeError, "clip: low and high are numbers; use maximum and minimum"),
        ],
        integers="int64",
    ),
    OpInfo(
        "cast",
        lambda x, dtype: x.to(getattr(torch, dtype)),
        [Call(A(2, 3), "float64"), Call(A(2, 3), "float32"), Call(A(), "float32"), Call(A(0), "float32")],
        [Fails(Call(A(2), "complex64"), TypeError, r"dtype 'complex64' is not supported; use one of float16")],
        integers="float64",
    ),
    binary("add", lambda a, b: a + b),
    binary("sub", lambda a, b: a - b),
    binary("mul", lambda a, b: a * b),
    binary("div", lambda a, b: a / b, (0.3, 2), integers="float32"),
    binary("pow", lambda a, b: a**b, (0.3, 2)),
    binary("maximum", tensors(torch.maximum)),
    binary("minimum", tensors(torch.minimum)),
    OpInfo(
        "where",
        torch.where,
        [
            Call(np.array([[True, False, True], [False, False, True]]), A(2, 3), A(2, 3)),
            Call(np.array([True, False, True]), A(2, 1), A(1, 3)),
            Call(np.array([[True], [False]]), A(3), 0.5),
            Call(np.array([[True], [False]]), 0.5, A(3)),
            Call(np.array([True]), A(0), A()),
        ],
        [Fails(Call(np.array([True, False]), A(3), A(3)), ValueError, r"where\(bool\[2\], float32\[3\], float32\[3\]\)")],
        integers="int64",
    ),
    # reductions
    reduction("sum", torch.sum, calls=NOTHING_TO_REDUCE, integers="int64"),
    reduction("mean", torch.mean, "sum"),
    reduction("max", torch.amax, integers="int64", errors=[_axis("max"), _size_zero("max")]),
    reduction("min", torch.amin, integers="int64", errors=[_axis("min"), _size_zero("min")]),
    reduction(
        "var",
        lambda x, ddof=0, **k: torch.var(x, correction=ddof, **k),
        "sum",
        calls=[Call(A(2, 3), ddof=1), Call(A(3, 2), axis=0, ddof=1)],
    ),
    OpInfo(
        "std",
        along(lambda x, ddof=0, **k: torch.std(x, correction=ddof, **k)),
        [Call(A(2, 3)), Call(A(2, 3, 2), axis=(0, -1)), Call(A(3, 2), axis=0, keepdims=True, ddof=1)],
        [_axis("std", "sum")],
        constant_ok=False,
    ),
    reduction(
        "prod",
        prod,
        calls=NOTHING_TO_REDUCE[:3],
        integers="int64",
        errors=[
            Fails(Call(A(2, 3), axis=2), ValueError, "prod: axis 2 is out of bounds for array of dimension 2"),
            Fails(Call(A(2, 3), axis=(0, -2)), ValueError, "repeated axis in `prod`"),
        ],
    ),
    reduction("logsumexp", torch.logsumexp, errors=[_axis("logsumexp"), _size_zero("logsumexp")]),
    OpInfo(
        "softmax",
        lambda x, axis=-1: torch.softmax(x, axis),
        [*ALONG_ONE, Call(A())],
        [_axis("softmax"), _size_zero("softmax")],
    ),
    OpInfo(
        "log_softmax",
        lambda x, axis=-1: torch.log_softmax(x, axis),
        [*ALONG_ONE, Call(A())],
        [_axis("log_softmax"), _size_zero("log_softmax")],
    ),
    OpInfo(
        "cumsum",
        lambda x, axis=-1: torch.cumsum(x, axis),
        [*ALONG_ONE, Call(A(2, 0), axis=1)],
        [_axis("cumsum")],
        integers="int64",
    ),
    OpInfo(
        "argmax",
        lambda x, axis=None, keepdims=False: torch.argmax(x, axis, keepdim=keepdims),
        [Call(A(2, 3)), Call(A(2, 3), axis=0), Call(A(2, 3), axis=-1, keepdims=True), Call(A())],
        [_axis("argmax"), Fails(Call(A(0)), ValueError, r"argmax\(float32\[0\]\) at .*empty sequence")],
        integers="int64",
        differentiable=False,
    ),
    OpInfo(
        "argmin",
        lambda x, axis=None, keepdims=False: torch.argmin(x, axis, keepdim=keepdims),
        [Call(A(2, 3)), Call(A(2, 3), axis=0), Call(A(2, 3), axis=-1, keepdims=True), Call(A())],
        [_axis("argmin"), Fails(Call(A(0)), ValueError, r"argmin\(float32\[0\]\) at .*empty sequence")],
        integers="int64",
        differentiable=False,
    ),
    # shape
    mover(
        "reshape",
        lambda x, *s: x.reshape(*s),
        [
            Call(A(2, 3), 3, 2),
            Call(A(2, 3), (-1,)),
            Call(A(6), [1, 3, -1]),
            Call(A(1), ()),
            Call(A(), 1),
            Call(A(0, 3), 3, 0),
        ],
        [Fails(Call(A(2, 3), 4, 2), ValueError, r"reshape\(float32\[2, 3\]\) at .*size 6 into shape \(4,2\)")],
    ),
    mover(
        "transpose",
        lambda x, *a: x.transpose(*a),
        [Call(A(2, 3, 2)), Call(A(2, 3, 2), 1, 2, 0), Call(A(2, 3), (-1, 0)), Call(A()), Call(A(0, 2))],
        [Fails(Call(A(2, 3), 0, 0), ValueError, r"transpose\(float32\[2, 3\]\) at .*repeated axis")],
    ),
    mover(
        "swapaxes",
        np.swapaxes,
        [Call(A(2, 3, 2), 0, -1), Call(A(2, 3), 1, 1), Call(A(0, 3), 0, 1)],
        [Fails(Call(A(2, 3), 0, 2), IndexError, r"swapaxes: axes 0 and 2 do not exist in shape \(2, 3\)")],
    ),
    mover(
        "squeeze",
        np.squeeze,
        [Call(A(1, 3, 1)), Call(A(1, 3, 1), 0), Call(A(1, 3, 1), (0, -1)), Call(A(1)), Call(A(0, 1))],
        [Fails(Call(A(2, 1), 0), ValueError, r"squeeze: axis 0 of shape \(2, 1\)")],
    ),
    mover(
        "unsqueeze",
        np.expand_dims,
        [Call(A(2, 3), 0), Call(A(2, 3), -1), Call(A(2, 3), (0, 2)), Call(A(), 0), Call(A(0), 1)],
        [Fails(Call(A(2, 3), 3), ValueError, r"unsqueeze: axis 3 is out of bounds for array of dimension 3")],
    ),
    mover(
        "broadcast_to",
        lambda x, *s: np.broadcast_to(x, s[0] if isinstance(s[0], tuple) else s),
        [Call(A(3), (2, 3)), Call(A(2, 1), 4, 2, 3), Call(A(), (2,)), Call(A(2), (2,)), Call(A(1), (0,))],
        [Fails(Call(A(2, 3), (2, 4)), ValueError, r"broadcast_to\(float32\[2, 3\]\) at .*\(2,4\)")],
    ),
    mover(
        "expand",
        lambda x, *s: np.broadcast_to(x, [n if n >= 0 else x.shape[i - len(s)] for i, n in enumerate(s)]),
        [Call(A(2, 1), -1, 3), Call(A(3), 2, -1), Call(A(1, 0), 2, -1)],
        [Fails(Call(A(2, 3), 2, 2), ValueError, r"broadcast_to\(float32\[2, 3\]\) at .*\(2,2\)")],
    ),
    mover(
        "flip",
        np.flip,
        [Call(A(2, 3)), Call(A(2, 3), 0), Call(A(2, 3, 2), (0, -1)), Call(A(0))],
        [Fails(Call(A(2, 3), 2), ValueError, r"flip\(float32\[2, 3\]\) at .*axis 2 is out of bounds")],
    ),
    mover(
        "split",
        lambda x, n, axis=0: np.split(x, range(n, x.shape[axis], n) if isinstance(n, int) else np.cumsum(n)[:-1], axis),
        [Call(A(5, 2), 2), Call(A(2, 4), 4, axis=-1), Call(A(2, 4), [1, 0, 3], axis=1), Call(A(0, 2), 3)],
        [
            Fails(Call(A(4, 2), [1, 2]), ValueError, r"split: sizes \[1, 2\] do not add up to 4, the length of axis 0"),
            Fails(Call(A(4, 2), 0), ValueError, "split: the size of a part must be at least 1, got 0"),
            Fails(Call(A(4, 2), 1, axis=2), ValueError, "split: axis 2 is out of bounds for array of dimension 2"),
        ],
    ),
    OpInfo(
        "chunk",
        lambda x, n, axis=0: list(torch.chunk(x, n, axis)),
        [Call(A(5, 2), 3), Call(A(2, 4), 2, axis=-1), Call(A(2), 5)],
        [
            Fails(Call(A(4), 0), ValueError, "chunk: the number of chunks must be at least 1, got 0"),
            Fails(Call(A(4), 2, axis=1), ValueError, "chunk: axis 1 is out of bounds for array of dimension 1"),
        ],
        integers="int64",
    ),
    OpInfo(
        "concat",
        lambda xs, axis=0: torch.cat([x.reshape(-1) for x in xs]) if axis is None else torch.cat(xs, axis),
        [
            Call([A(2, 3), A(1, 3), A(0, 3)]),
            Call([A(2, 1), A(2, 2)], axis=-1),
            Call([A(2)]),
            Call([A(2, 3), A(), A(2)], axis=None),
        ],
        [
            Fails(Call([]), ValueError, "concat: needs at least one tensor"),
            Fails(Call([A(2, 3), A(2, 2)]), ValueError, r"concat\(float32\[2, 3\], float32\[2, 2\]\) at .*dimension"),
        ],
        integers="int64",
    ),
    OpInfo(
        "stack",
        lambda xs, axis=0: torch.stack(xs, axis),
        [Call([A(2, 3), A(2, 3)]), Call([A(2), A(2), A(2)], axis=-1), Call([A(), A()]), Call([A(0)], axis=1)],
        [
            Fails(Call([A(2), A(3)]), ValueError, r"stack: all tensors must have one shape, got \[\(2,\), \(3,\)\]"),
            Fails(Call([A(2)], axis=2), ValueError, "unsqueeze: axis 2 is out of bounds for array of dimension 2"),
        ],
        integers="int64",
    ),
    OpInfo(
        "pad",
        pad,
        [Call(A(2, 3), 1), Call(A(2, 3), ((0, 1), (2, 0)), value=3), Call(A(3), (1, 2)), Call(A(0, 2), 1)],
        [
            Fails(Call(A(2, 3), -1), ValueError, "pad: widths must not be negative, got -1"),
            Fails(Call(A(2, 3), (1, 2, 3)), ValueError, r"pad: width \(1, 2, 3\) is not one pair .* shape \(2, 3\)"),
        ],
        integers="int64",
    ),
    OpInfo(
        "tril",
        torch.tril,
        [Call(A(3, 3)), Call(A(2, 3, 4), 1), Call(A(3, 2), -1), Call(A(0, 2))],
        [Fails(Call(A()), TypeError, r"tril\(float32\[\]\) at ")],
        integers="int64",
    ),
    OpInfo(
        "triu",
        torch.triu,
        [Call(A(3, 3)), Call(A(2, 3, 4), 1), Call(A(3, 2), -1), Call(A(0, 2))],
        [Fails(Call(A()), TypeError, r"triu\(float32\[\]\) at ")],
        integers="int64",
    ),
    # indexing
    mover(
        "getitem",
        lambda x, index: x[index.numpy() if isinstance(index, torch.Tensor) else index],
        [
            Call(A(3, 4), 1),
            Call(A(3, 4), -1),
            Call(A(3), 2),
            Call(A(5, 4), slice(None, None, -2)),
            Call(A(3, 4), (slice(1, 9), slice(None, 0, -1))),
            Call(A(3, 4), (..., None, 2)),
            Call(A(3, 4), None),
            Call(A(), ()),
            Call(A(), ...),
            Call(A(3, 4), slice(2, 1)),
            Call(A(3, 4), [0, 2, 0, 0]),
            Call(A(3, 4), np.array([[2, -1], [2, 0]])),
            Call(A(3, 4), np.array(1)),
            Call(A(3, 4), ([0, 1, 0], [3, 3, 3])),
            Call(A(3, 4), (slice(None), [1, 1])),
            Call(A(2, 3, 4), ([0, 1], slice(None), [1, 1])),
            Call(A(2, 3), np.array([[True, False, True], [False, True, False]])),
            Call(A(3, 4), np.array([True, False, True])),
            Call(A(3, 4), True),
            Call(A(3, 4), []),
            Call(A(0, 4), slice(None)),
        ],
        [
            Fails(Call(A(2, 3), 2), IndexError, r"getitem\(float32\[2, 3\]\) at .*test_ops.py:\d+: index 2 is out of bounds"),
            Fails(Call(A(2, 3), (0, 0, 0)), IndexError, r"getitem\(float32\[2, 3\]\) at .*too many indices"),
            Fails(Call(A(2), 1.0), IndexError, "an index must be integer.* got the float 1.0"),
            Fails(Call(A(2), np.array([0.5])), IndexError, r"getitem\(float32\[2\]\) at "),
        ],
        large=(Call(A(301, 223), (slice(7, None), slice(None, None, 2))), Call(A(301, 223), [3, 300, 3])),
    ),
    OpInfo(
        "setitem",
        setitem,
        [
            Call(A(3, 4), 1, A(4)),
            Call(A(3, 4), (slice(None), slice(0, 2)), A(3, 1)),
            Call(A(3, 4), 0, A(1, 1, 4)),
            Call(A(3, 4), slice(None), A()),
            Call(A(3), 1, 5.0),
            Call(A(3, 4), [0, 2], A(2, 4)),
            Call(A(5), [0, 1, 0, 0], A(4)),
            Call(A(2, 2), np.array([[True, False], [True, True]]), A(3)),
            Call(A(), (), A()),
        ],
        [Fails(Call(A(3, 4), 0, A(3)), ValueError, r"setitem\(float32\[3, 4\], float32\[3\]\) at .*broadcast")],
        integers="int64",
    ),
    OpInfo(
        "gather",
        torch.gather,
        [
            Call(A(2, 3), 1, np.array([[0, 0], [2, 1]])),
            Call(A(3, 2), -2, np.array([[2, 0]])),
            Call(A(3), 0, np.array([1, 1, 1])),
            Call(A(2, 3), 1, np.zeros((2, 0), np.int64)),
        ],
        [
            Fails(Call(A(2, 3), 1, np.array([[0], [3]])), IndexError, r"gather: index 3 is outside 0 … 2"),
            Fails(Call(A(2, 3), 1, np.array([[0]])), ValueError, r"gather: indices of shape \(1, 1\) .* shape \(2, 3\)"),
            Fails(Call(A(2, 3), 2, np.array([[0]])), ValueError, "gather: axis 2 is out of bounds"),
            Fails(Call(A(2), 0, np.array([0.0])), TypeError, "gather: indices must be integers, got float64"),
        ],
        integers="int64",
    ),
    OpInfo(
        "scatter_add",
        torch.scatter_add,
        [
            Call(A(2, 3), 1, np.array([[0, 0], [2, 1]]), A(2, 2)),
            Call(A(3, 2), -2, np.array([[2, 0]]), A(1, 2)),
            Call(A(3), 0, np.array([1, 1, 1]), A(3)),
        ],
        [
            Fails(Call(A(2), 0, np.array([2]), A(1)), IndexError, "scatter_add: index 2 is outside 0 … 1"),
            Fails(Call(A(2), 0, np.array([1]), A(2)), ValueError, r"scatter_add: .* \(1,\) but values have shape \(2,\)"),
            Fails(Call(A(2, 3), 1, np.array([[0]]), A(1, 1)), ValueError, r"scatter_add: indices of shape \(1, 1\)"),
        ],
        integers="int64",
    ),
    OpInfo(
        "embedding",
        lambda w, ids: F.embedding(torch.as_tensor(ids).long(), w),
        [
            Call(A(4, 2), np.array([[0, 3], [3, 3]])),
            Call(A(4, 2), [1]),
            Call(A(4, 2), np.array(2)),
            Call(A(4, 2), np.zeros((0, 3), np.int64)),
            Call(A(4, 1), np.array([1, 0], np.uint8)),
        ],
        [
            Fails(Call(A(4, 2), [4]), IndexError, "embedding: index 4 is outside 0 … 3"),
            Fails(Call(A(4, 2), [-1]), IndexError, "embedding: index -1 is outside 0 … 3"),
            Fails(Call(A(), [0]), ValueError, "embedding: the table needs an axis of rows"),
            Fails(Call(A(4, 2), [0.5]), TypeError, "embedding: indices must be integers, got float"),
        ],
        integers="int64",
        large=(
            Call(A(65, 33), np.arange(3001).reshape(-1, 1) ** 2 % 64),
            Call(A(1031, 5), np.arange(4001) ** 2 % 1030),
        ),
    ),
    # linear algebra
    OpInfo(
        "matmul",
        torch.matmul,
        [
            Call(A(2, 3), A(3, 4)),
            Call(A(3), A(3)),
            Call(A(2, 3), A(3)),
            Call(A(3), A(3, 2)),
            Call(A(2, 2, 3), A(3)),
            Call(A(3), A(2, 3, 2)),
            Call(A(2, 1, 2, 3), A(3, 3, 1)),
            Call(A(1, 1), A(1, 1)),
            Call(A(0, 2), A(2, 3)),
            Call(A(2, 0), A(0, 3)),
            Call(A(0), A(0)),
        ],
        [
            Fails(Call(A(2, 3), A(2, 3)), ValueError, r"matmul\(float32\[2, 3\], float32\[2, 3\]\) at .*columns do not meet"),
            Fails(Call(A(), A(2)), ValueError, r"matmul: .* shapes \(\) and \(2,\)"),
        ],
        integers="int64",
    ),
    OpInfo(
        "linear",
        F.linear,
        [
            Call(A(2, 3), A(4, 3), A(4)),
            Call(A(2, 3), A(4, 3)),
            Call(A(3), A(2, 3), A(2)),
            Call(A(2, 2, 3), A(1, 3), A(1)),
            Call(A(0, 3), A(2, 3), A(2)),
            Call(A(2, 3), A(0, 3)),
            Call(A(2, 0), A(3, 0)),
        ],
        [
            Fails(Call(A(2, 3), A(4, 2)), ValueError, r"linear: input shape \(2, 3\) .* weight shape \(4, 2\)"),
            Fails(Call(A(2, 3), A(4, 3), A(3)), ValueError, r"linear: bias shape \(3,\) .* weight shape \(4, 3\)"),
            Fails(Call(A(), A(4, 3)), ValueError, r"linear: input shape \(\)"),
        ],
        integers="int64",
        large=(Call(A(7, 43, 31), A(65, 31), A(65)), Call(A(129, 31), A(7, 31))),
    ),
    OpInfo(
        "einsum",
        torch.einsum,
        [
            Call("ij,jk->ik", A(2, 3), A(3, 2)),
            Call("ij,jk", A(2, 3), A(3, 2)),
            Call("ij->ji", A(2, 3)),
            Call("ij->", A(2, 3)),
            Call("i,j->ij", A(2), A(3)),
            Call("ii", A(3, 3)),
            Call("ii->i", A(3, 3)),
            Call("iji->j", A(2, 3, 2)),
            Call("iijj->ji", A(2, 2, 2, 2)),
            Call("ij,ij,j->i", A(2, 3), A(2, 3), A(3)),
            Call("...ij,...jk->...ik", A(2, 2, 3), A(3, 2)),
            Call("...i,...i", A(2, 3), A(1, 3)),
            Call("b...,b->...", A(2, 3, 2), A(2)),
            Call("ij,ij->ij", A(3, 2), A(1, 2)),
            Call("ij,ij->i", A(2, 3), A(2, 1)),
            Call("ij,k->k", A(2, 2), A(3)),
            Call("i,i->", A(0), A(0)),
            Call(",->", A(), A()),
        ],
        [
            Fails(Call("ij,jk", A(2, 3)), ValueError, "einsum: 'ij,jk' names 2 operands, got 1"),
            Fails(Call("ijk->i", A(2, 3)), ValueError, "einsum: term 'ijk' of 'ijk->i' does not fit an operand of 2"),
            Fails(Call("ij,jk->ik", A(2, 3), A(2, 3)), ValueError, r"einsum\(float32\[2, 3\], float32\[2, 3\]\) at "),
            Fails(
                Call("ii", A(2, 3)), ValueError, r"einsum: index 'i' of an operand of shape \(2, 3\) has the lengths \[2, 3\]"
            ),
        ],
        integers="int64",
    ),
    # neural
    OpInfo(
        "layer_norm",
        lambda x, w, b=None, eps=1e-5: F.layer_norm(x, x.shape[-1:], w, b, eps),
        [Call(A(2, 4), A(4), A(4)), Call(A(2, 2, 3), A(3)), Call(A(3), A(3), A(3), eps=0.1), Call(A(0, 3), A(3), A(3))],
        [
            Fails(Call(A(2, 4), A(3)), ValueError, r"layer_norm: weight of shape \(3,\) .* last axis of \(2, 4\)"),
            Fails(Call(A(2, 4), A(4), A(1)), ValueError, r"layer_norm: bias of shape \(1,\) .* last axis of \(2, 4\)"),
        ],
        large=(Call(A(5, 67, 129), A(129), A(129)), Call(A(1025, 65), A(65))),
    ),
    OpInfo(
        "rms_norm",
        lambda x, w, eps=1e-6: F.rms_norm(x, x.shape[-1:], w, eps),
        [Call(A(2, 4), A(4)), Call(A(2, 2, 3), A(3), eps=0.1), Call(A(0, 3), A(3))],
        [Fails(Call(A(2, 4), A(3)), ValueError, r"rms_norm: weight of shape \(3,\) .* last axis of \(2, 4\)")],
    ),
    OpInfo(
        "dropout",
        dropout,
        [
            Call(A(2, 5), 0.4, key=KEY),
            Call(A(3), 0.4, training=False),
            Call(A(3), 0.0),
            Call(A(2, 2), 1.0, key=KEY),
            Call(A(), 0.5, key=KEY),
            Call(A(0), 0.5, key=KEY),
        ],
        [Fails(Call(A(2), 1.5), ValueError, r"dropout: probability p must be in \[0, 1\], got 1.5")],
        large=(Call(A(301, 223), 0.2, key=KEY),),
    ),
    OpInfo(
        "dropout_add",
        dropout_add,
        [
            Call(A(2, 5), A(2, 5), 0.4, key=KEY),
            Call(A(3), A(3), 0.4, training=False),
            Call(A(2, 3), A(2, 3), 0.0),
            Call(A(2, 2), A(2, 2), 1.0, key=KEY),
            Call(A(), A(), 0.5, key=KEY),
            Call(A(0), A(0), 0.5, key=KEY),
        ],
        [
            Fails(Call(A(2), A(2), 1.5), ValueError, r"dropout_add: probability p must be in \[0, 1\], got 1.5"),
            Fails(Call(A(2), A(3)), ValueError, r"dropout_add: shapes \(2,\) and \(3,\) of branch and residual differ"),
        ],
        large=(Call(A(301, 223), A(301, 223), 0.2, key=KEY),),
    ),
    OpInfo(
        "causal_attention",
        causal_attention,
        [
            Call(A(3, 2), A(3, 2), A(3, 2)),
            Call(A(2, 2, 3, 2), A(2, 2, 3, 2), A(2, 2, 3, 1)),
            Call(A(1, 1, 2), A(1, 3, 2), A(1, 3, 2)),
            Call(A(2, 3, 2), A(2, 3, 2), A(2, 3, 2), dropout_p=0.4, key=KEY),
            Call(A(2, 2), A(2, 2), A(2, 2), dropout_p=0.4, training=False),
            Call(A(3, 2), A(3, 2), A(3, 2), dropout_p=1.0, key=KEY),
            Call(A(1, 1), A(1, 1), A(1, 1)),
        ],
        [
            Fails(Call(A(3, 2), A(3, 4), A(3, 2)), ValueError, r"causal_attention: shapes q \(3, 2\), k \(3, 4\), v \(3, 2\)"),
            Fails(Call(A(3, 2), A(2, 2), A(2, 2)), ValueError, "causal_attention: 3 queries need at least as many keys, got 2"),
            Fails(Call(A(3, 2), A(3, 2), A(3, 2), 2.0), ValueError, "causal_attention: probability .* got 2.0"),
        ],
        integers=None,
        large=(
            Call(A(2, 3, 131, 17), A(2, 3, 131, 17), A(2, 3, 131, 5)),
            Call(A(1, 2, 65, 8), A(1, 2, 130, 8), A(1, 2, 130, 8)),
            Call(A(2, 67, 9), A(2, 67, 9), A(2, 67, 9), dropout_p=0.3, key=KEY),
            Call(A(2, 67, 9, low=-30, high=30), A(2, 67, 9, low=-30, high=30), A(2, 67, 9)),
        ),
    ),
    OpInfo(
        "cross_entropy",
        cross_entropy,
        [
            Call(A(3, 4), np.array([0, 3, 3])),
            Call(A(2, 2, 3), np.array([[0, 2], [1, 1]])),
            Call(A(3, 4), [0, -100, 3]),
            Call(A(3, 4), np.array([0, 2, 3]), ignore_index=2),
            Call(A(3, 4), [0, 1, 3], label_smoothing=0.2),
            Call(A(3, 4), np.array([-100, 1, 3]), label_smoothing=0.2),
            Call(A(4), np.array(2)),
            Call(A(1, 1), np.array([0], np.uint8)),
        ],
        [
            Fails(Call(A(2, 3), [0, 3]), IndexError, "cross_entropy: index 3 is outside 0 … 2"),
            Fails(
                Call(A(2, 3), [0]),
                ValueError,
                r"cross_entropy: logits of shape \(2, 3\) need targets of shape \(2,\), got \(1,\)",
            ),
            Fails(Call(A(2, 3), [0, 1], label_smoothing=2), ValueError, r"label_smoothing must be in \[0, 1\], got 2"),
            Fails(Call(A(2, 3), [0.0, 1.0]), TypeError, "cross_entropy: indices must be integers, got float"),
        ],
        large=(
            Call(A(1001, 65, low=-9, high=9), np.arange(1001) ** 2 % 65),
            Call(A(301, 65), np.where(np.arange(301) % 3, np.arange(301) % 65, -100)),
        ),
    ),
    OpInfo(
        "mse_loss",
        F.mse_loss,
        [Call(A(2, 3), A(2, 3)), Call(A(), A()), Call(A(1), A(1))],
        [Fails(Call(A(2), A(2, 1)), ValueError, r"mse_loss: shapes \(2,\) and \(2, 1\) differ")],
    ),
]
