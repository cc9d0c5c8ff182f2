"""The ops that a transformer is made of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tinytensor.autograd import Op, apply, as_value, beside
from tinytensor.backend import random
from tinytensor.ops import elementwise as el
from tinytensor.ops import reduce
from tinytensor.ops.index import _check_ids, _ids

if TYPE_CHECKING:
    from tinytensor.tensor import Tensor


class LayerNorm(Op):
    """y = γ·x̂ + β,  x̂ = (x − μ)/σ,  μ and σ² = var + ε over the last axis  (Ba, Kiros & Hinton 2016)

    With h = g·γ:  ∂L/∂x = (h − mean h − x̂·mean(h·x̂))/σ,  ∂L/∂γ = Σ g·x̂,  ∂L/∂β = Σ g
    """

    saves = "x weight"

    def forward(xp, x, weight, bias=None, *, eps):
        centred = x - x.mean(axis=-1, keepdims=True)
        y = weight * (centred / xp.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps))
        return y if bias is None else y + bias

    def vjp(g, y, x, weight, bias=None, *, eps):
        centred = x - x.mean(axis=-1, keepdims=True)
        sigma = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)
        normed = centred / sigma

        def dx():
            h = g * weight
            return (h - h.mean(axis=-1, keepdims=True) - normed * (h * normed).mean(axis=-1, keepdims=True)) / sigma

        grads = dx, lambda: g * normed
        return grads if bias is None else (*grads, g)


class Dropout(Op):
    """y = x·m/q, m a random mask that is 1 with probability q = 1 − p;  dy/dx = m/q  (Srivastava et al. 2014)"""

    def forward(xp, x, p, key):
        return x * _keep(x, key, x.shape, p)

    def vjp(g, y, x, p, key):
        return g * _keep(g, key, x.shape, p)


class DropoutAdd(Op):
    """y = r + x·m/q, a branch's dropout added to the stream that it left;  ∂y/∂x = m/q,  ∂y/∂r = 1"""

    def forward(xp, x, r, p, key):
        return r + (x * _keep(x, key, x.shape, p) if p else x)

    def vjp(g, y, x, r, p, key):
        return (lambda: g * _keep(g, key, x.shape, p) if p else g), g


class CausalAttention(Op):
    """y = a v,  a = softmax(q kᵀ/√d) where the key is not after the query, 0 elsewhere  (Vaswani et al. 2017)

    q (…, T, d), k and v (…, S, d) with S ≥ T: the queries are the last T of the S positions. With dropout, a·m/q in place
    of a. With da = (g vᵀ)·m/q:  ∂L/∂v = (a·m/q)ᵀ g,  s = a(da − Σ da·a)/√d,  ∂L/∂q = s k,  ∂L/∂k = sᵀ q
    """

    saves = "q k v"

    def forward(xp, q, k, v, p, key):
        a = _attention(q, k)
        return (a * _keep(a, key, a.shape, p) if p else a) @ v

    def vjp(g, y, q, k, v, p, key):
        a = _attention(q, k)
        mask = _keep(a, key, a.shape, p) if p else 1
        da = (g @ v.swapaxes(-1, -2)) * mask
        s = a * (da - (da * a).sum(axis=-1, keepdims=True)) * (1 / math.sqrt(q.shape[-1]))
        return s @ k, s.swapaxes(-1, -2) @ q, (a * mask).swapaxes(-1, -2) @ g


def _attention(q, k):
    """softmax(q kᵀ/√d) with the future masked, in array language."""
    T, S = q.shape[-2], k.shape[-2]
    scores = (q @ k.swapaxes(-1, -2)) * (1 / math.sqrt(q.shape[-1]))
    past = beside(q, np.tri(T, S, S - T, dtype=bool))
    scores = np.where(past, scores, -np.inf)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class CrossEntropy(Op):
    """y = mean over the counted rows of −(1−ε)·ln p[target] − ε/V·Σⱼ ln pⱼ,  p = softmax(logits);  ∂y/∂logits = (p − t)/n

    t is one-hot(target) smoothed to (1−ε)·onehot + ε/V; rows whose target is ignore_index count nowhere.
    """

    saves = "logits"

    def forward(xp, logits, targets, ignore_index, label_smoothing):
        logp = logits - logits.max(axis=-1, keepdims=True)
        logp = logp - xp.log(xp.exp(logp).sum(axis=-1, keepdims=True))
        t, n = _smoothed_targets(logits, targets, ignore_index, label_smoothing)
        return -(xp.where(t == 0, 0, logp) * t).sum() / n  # a logit of −inf costs nothing where it is no target

    def vjp(g, y, logits, targets, ignore_index, label_smoothing):
        e = np.exp(logits - logits.max(axis=-1, keepdims=True))
        t, n = _smoothed_targets(logits, targets, ignore_index, label_smoothing)
        counted = t.sum(axis=-1, keepdims=True)  # 1, or 0 for an ignored row
        return (e / e.sum(axis=-1, keepdims=True) * counted - t) * (g / n)


def _smoothed_targets(logits, targets, ignore_index, label_smoothing):
    """Rows of target probabilities, zero where ignored, and how many rows count."""
    V = logits.shape[-1]
    counted = targets != ignore_index
    t = (np.arange(V, like=targets) == targets[:, None]).astype(logits.dtype)
    t = (t * (1 - label_smoothing) + label_smoothing / V) * counted[:, None]
    return t.astype(logits.dtype), (int(counted.sum()) or math.nan)


def _keep(x, key, shape, p):
    """The scaled mask m/q of this key, of x's dtype and device: the same in forward, backward and any replay."""
    q = random.keep_probability(p)
    mask = random.keep_mask(key, shape, p).astype(x.dtype) * np.asarray(1 / q if q else 0, x.dtype)
    return beside(x, mask)


def layer_norm(x: Any, weight: Any, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """Rows of the last axis brought to mean 0 and variance 1, then scaled by weight (C,) and shifted by bias (C,)."""
    x = el.floating(as_value(x))
    scales = [as_value(s) for s in (weight, bias) if s is not None]
    _check_scales("layer_norm", x, *scales)
    return apply(LayerNorm, x, *scales, eps=eps)


def rms_norm(x: Any, weight: Any, eps: float = 1e-6) -> Tensor:
    """x/√(mean x² + ε)·weight over the last axis (Zhang & Sennrich 2019)."""
    x, weight = el.floating(as_value(x)), as_value(weight)
    _check_scales("rms_norm", x, weight)
    return el.mul(el.mul(x, el.rsqrt(el.add(reduce.mean(el.mul(x, x), -1, keepdims=True), eps))), weight)


def dropout(x: Any, p: float = 0.5, training: bool = True, key: random.Key | None = None) -> Tensor:
    """Zero each element with probability p and scale the rest by 1/(1−p); x itself when not training or p = 0.

    The mask is a function of `key` (the scope's next one by default). p is rounded to a multiple of 2⁻¹⁶.
    """
    _check_probability("dropout", p)
    x = el.floating(as_value(x))
    if not training or p == 0:
        return x
    return apply(Dropout, x, p=p, key=key or random.next_key("dropout"))


def dropout_add(x: Any, residual: Any, p: float = 0.5, training: bool = True, key: random.Key | None = None) -> Tensor:
    """residual + dropout(x, p), in one pass: how a transformer's branch joins its residual stream. Both have one shape."""
    _check_probability("dropout_add", p)
    x, residual = el.floating(as_value(x)), as_value(residual)
    if x.data.shape != residual.data.shape:
        raise ValueError(f"dropout_add: shapes {x.data.shape} and {residual.data.shape} of branch and residual differ")
    if not training or p == 0:
        p, key = 0.0, None
        if x.data.dtype == residual.data.dtype:
            return el.add(residual, x)
    elif key is None:
        key = random.next_key("dropout")
    return apply(DropoutAdd, x, residual, p=p, key=key)


def causal_attention(
    q: Any, k: Any, v: Any, dropout_p: float = 0.0, training: bool = True, key: random.Key | None = None
) -> Tensor:
    """Scaled dot-product attention in which position t sees positions ≤ t; every head on its own.

    q (…, T, d), k (…, S, d), v (…, S, e) → (…, T, e), S ≥ T, the queries being the last T positions (so that new tokens
    attend to cached keys). Dropout falls on the attention weights.
    """
    _check_probability("causal_attention", dropout_p)
    q, k, v = as_value(q), as_value(k), as_value(v)
    qs, ks, vs = q.data.shape, k.data.shape, v.data.shape
    if min(len(qs), len(ks), len(vs)) < 2 or qs[-1] != ks[-1] or ks[-2] != vs[-2] or qs[:-2] != ks[:-2] or ks[:-2] != vs[:-2]:
        raise ValueError(f"causal_attention: shapes q {qs}, k {ks}, v {vs} do not fit (…, T, d), (…, S, d), (…, S, e)")
    if qs[-2] > ks[-2]:
        raise ValueError(f"causal_attention: {qs[-2]} queries need at least as many keys, got {ks[-2]}")
    p = dropout_p if training else 0.0
    return apply(CausalAttention, q, k, v, p=p, key=(key or random.next_key("attention")) if p else None)


def cross_entropy(logits: Any, targets: Any, ignore_index: int = -100, label_smoothing: float = 0.0) -> Tensor:
    """Mean negative log-likelihood in nats of integer targets (…) under logits (…, V).

    Rows whose target is ignore_index are left out (NaN when none is left). label_smoothing ε mixes the target with the
    uniform distribution: (1−ε)·target + ε/V.
    """
    logits, ids = el.floating(as_value(logits)), _ids("cross_entropy", targets)
    if logits.data.ndim == 0 or logits.data.shape[:-1] != ids.shape:
        raise ValueError(
            f"cross_entropy: logits of shape {logits.data.shape} need targets of shape {logits.data.shape[:-1]}, "
            f"got {ids.shape}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing must be in [0, 1], got {label_smoothing}")
    V = logits.data.shape[-1]
    if isinstance(ids, np.ndarray):
        _check_ids("cross_entropy", ids[ids != ignore_index], V)
    flat = logits.reshape(-1, V) if logits.data.ndim != 2 else logits
    return apply(
        CrossEntropy, flat, targets=beside(logits, ids.reshape(-1)), ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def mse_loss(prediction: Any, target: Any) -> Tensor:
    """Mean of (prediction − target)², over all elements."""
    prediction, target = el.floating(as_value(prediction)), el.floating(as_value(target))
    if prediction.data.shape != target.data.shape:
        raise ValueError(f"mse_loss: shapes {prediction.data.shape} and {target.data.shape} differ")
    difference = el.sub(prediction, target)
    return reduce.mean(el.mul(difference, difference))


def _check_scales(op: str, x: Any, *scales: Any) -> None:
    for name, scale in zip(("weight", "bias"), scales, strict=False):
        if x.data.ndim == 0 or scale.data.shape != x.data.shape[-1:]:
            raise ValueError(f"{op}: {name} of shape {scale.data.shape} does not fit the last axis of {x.data.shape}")


def _check_probability(op: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: probability p must be in [0, 1], got {p}")
