"""Products of matrices."""

from __future__ import annotations

import math
import string
from typing import TYPE_CHECKING, Any

import numpy as np

from tinytensor import backend
from tinytensor.autograd import Op, apply, as_value

if TYPE_CHECKING:
    from tinytensor.tensor import Tensor


class Matmul(Op):
    """y = a b, (…, n, k) × (…, k, m) → (…, n, m);  ∂L/∂a = g bᵀ,  ∂L/∂b = aᵀ g"""

    saves = {"a": "b", "b": "a"}

    def forward(xp, a, b):
        if a.shape[-1] != b.shape[-2]:
            raise ValueError(f"{a.shape[-1]} columns do not meet {b.shape[-2]} rows; transpose one of them")
        return a @ b

    def vjp(g, y, a, b):
        return lambda: g @ b.swapaxes(-1, -2), lambda: a.swapaxes(-1, -2) @ g


class Linear(Op):
    """y = x Wᵀ + b, (…, k) × (m, k) + (m) → (…, m);  ∂L/∂x = g W,  ∂L/∂W = Σ gᵀ x,  ∂L/∂b = Σ g"""

    saves = {"x": "w", "w": "x"}

    def forward(xp, x, w, b=None):
        y = x @ w.T
        return y if b is None else y + b

    def vjp(g, y, x, w, b=None):
        def dw():
            n = math.prod(x.shape[:-1])
            return g.reshape(n, w.shape[0]).T @ x.reshape(n, w.shape[1])

        grads = (lambda: g @ w), dw
        return grads if b is None else (*grads, g)


class Einsum(Op):
    """y = Σ over indices absent from the output of the product of the operands

    ∂L/∂xᵢ contracts g with the other operands into xᵢ's indices; an index that only xᵢ has is summed over alone, so its
    gradient repeats along it.
    """

    saves = "*"

    def forward(xp, *operands, subscripts):
        return xp.einsum(subscripts, *operands)

    def vjp(g, y, *operands, subscripts):
        terms, out = _terms(subscripts)

        def gradient(i):
            others = [t for j, t in enumerate(terms) if j != i]
            given = set(out).union(*others)
            kept = "".join(c for c in terms[i] if c in given)
            rule = ",".join([out, *others]) + "->" + kept
            share = np.einsum(rule, g, *(x for j, x in enumerate(operands) if j != i))
            lengths = iter(share.shape)
            share = share.reshape(tuple(next(lengths) if c in given else 1 for c in terms[i]))
            return np.broadcast_to(share, np.broadcast_shapes(share.shape, operands[i].shape))

        return tuple((lambda i=i: gradient(i)) for i in range(len(operands)))


def _terms(subscripts: str) -> tuple[list[str], str]:
    left, out = subscripts.split("->")
    return left.split(","), out


def matmul(a: Any, b: Any) -> Tensor:
    """Matrix product as in NumPy: leading axes broadcast, a 1-D operand is a row on the left, a column on the right."""
    a, b = as_value(a), as_value(b)
    if a.data.ndim == 0 or b.data.ndim == 0:
        raise ValueError(f"matmul: operands need at least 1 dimension, got shapes {a.data.shape} and {b.data.shape}")
    if a.data.ndim > 1 and b.data.ndim > 1:
        return apply(Matmul, a, b)
    rows = a if a.data.ndim > 1 else a.reshape(1, -1)
    columns = b if b.data.ndim > 1 else b.reshape(-1, 1)
    y = apply(Matmul, rows, columns)
    if b.data.ndim == 1:
        y = y.squeeze(-1)
    if a.data.ndim == 1:
        y = y.squeeze(-1 if b.data.ndim == 1 else -2)
    return y


def linear(x: Any, weight: Any, bias: Any = None) -> Tensor:
    """x Wᵀ + b, with W of shape (out, in) as in PyTorch and b of shape (out,) or None."""
    x, weight = as_value(x), as_value(weight)
    if x.data.ndim == 0 or weight.data.ndim != 2 or x.data.shape[-1] != weight.data.shape[1]:
        raise ValueError(
            f"linear: input shape {x.data.shape} does not fit weight shape {weight.data.shape} (out, in); "
            "the input's last axis must have length in"
        )
    if bias is None:
        return apply(Linear, x, weight)
    bias = as_value(bias)
    if bias.data.shape != weight.data.shape[:1]:
        raise ValueError(f"linear: bias shape {bias.data.shape} does not fit weight shape {weight.data.shape} (out, in)")
    return apply(Linear, x, weight, bias)


def einsum(subscripts: str, *operands: Any) -> Tensor:
    """Einstein summation in NumPy's notation: "ij,jk->ik", repeated indices ("ii"), ellipses, implicit output."""
    tensors = [as_value(x) for x in operands]
    terms, out = _explicit(subscripts, [x.data.ndim for x in tensors])
    for i, term in enumerate(terms):
        for c in dict.fromkeys(c for c in term if term.count(c) > 1):
            tensors[i], terms[i] = _diagonal(tensors[i], terms[i], c)
    return apply(Einsum, *tensors, subscripts=",".join(terms) + "->" + out)


def _diagonal(x: Any, term: str, c: str) -> tuple[Any, str]:
    """x with the axes that share index c taken along their diagonal, which comes first: no operand repeats an index then."""
    same = [i for i, letter in enumerate(term) if letter == c]
    rest = [i for i in range(len(term)) if i not in same]
    lengths = {x.shape[i] for i in same}
    if len(lengths) > 1:
        raise ValueError(f"einsum: index {c!r} of an operand of shape {x.shape} has the lengths {sorted(lengths)}")
    steps = backend.xp_of(x.data).arange(lengths.pop())
    return x.transpose(*same, *rest)[(steps,) * len(same)], c + "".join(term[i] for i in rest)


def _explicit(subscripts: str, ndims: list[int]) -> tuple[list[str], str]:
    """Input terms and output without ellipses or an implied output."""
    text = subscripts.replace(" ", "")
    left, arrow, out = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(ndims):
        raise ValueError(f"einsum: {subscripts!r} names {len(terms)} operands, got {len(ndims)}")
    spare = [c for c in string.ascii_uppercase[::-1] if c not in text]
    widths = [ndim - len(t.replace("...", "")) for t, ndim in zip(terms, ndims, strict=True)]
    for t, width, ndim in zip(terms, widths, ndims, strict=True):
        if width < 0 or (width > 0 and "..." not in t):
            raise ValueError(f"einsum: term {t!r} of {subscripts!r} does not fit an operand of {ndim} dimensions")
    widest = max((w for t, w in zip(terms, widths, strict=True) if "..." in t), default=0)
    ellipsis = "".join(spare[:widest])
    if not arrow:
        named = left.replace("...", "").replace(",", "")
        out = ("..." if "..." in left else "") + "".join(sorted(c for c in set(named) if named.count(c) == 1))
    full = [t.replace("...", ellipsis[widest - w :] if "..." in t else "") for t, w in zip(terms, widths, strict=True)]
    return full, out.replace("...", ellipsis)
