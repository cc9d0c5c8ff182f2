"""NumPy kernels: the ops that a transformer spends its time in, arrays in and arrays out, one thread each.

What they have over the formulas in `ops`: rows go through all passes of an op in blocks that stay in a core's cache, memory
is written where it is wanted (`out=`), and work that the causal mask would throw away is not done. Sums along a row are
matrix products with ones: BLAS does them several times faster than a reduction.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from tinytensor.backend import Into, is_basic_index, random, register_kernel

_BLOCK = 1 << 17  # elements of one array in a block: less stays in cache better, more wakes waiting threads less often
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def _rows(x):
    """x as a matrix of its last axis; a copy only where the layout needs one."""
    return x.reshape(-1, x.shape[-1])


def _blocks(n_rows, width):
    """Slices of rows, about _BLOCK elements each."""
    step = max(16, _BLOCK // max(1, width))
    return [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]


def _plain(*arrays):
    """Whether all are non-empty float arrays of one dtype, which is what these kernels handle."""
    dtype = getattr(arrays[0], "dtype", None)
    return dtype in _FLOATS and all(isinstance(a, np.ndarray) and a.dtype == dtype and a.size for a in arrays)


@register_kernel("cpu", "gelu")
class Gelu:
    """The formula's passes, in place on a block; t = tanh u is kept for the derivative."""

    def forward(x):
        if not _plain(x) or x.ndim == 0:
            return NotImplemented
        rows, y, tanh = _rows(x), np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)
        for b in _blocks(*rows.shape):
            xb, t, out = rows[b], _rows(tanh)[b], _rows(y)[b]
            np.multiply(xb, xb, out=t)
            t *= _C * _A
            t += _C
            t *= xb
            np.tanh(t, out=t)
            np.add(t, 1, out=out)
            out *= xb
            out *= 0.5
        return y, tanh

    def vjp(g, y, x, residual):
        dx = np.empty(x.shape, x.dtype)
        g, rows, tanh, out = np.broadcast_to(g, x.shape), _rows(x), _rows(residual), _rows(dx)
        g = _rows(g)
        for b in _blocks(*rows.shape):
            xb, t, d = rows[b], tanh[b], out[b]
            np.multiply(xb, xb, out=d)  # d = ½(1 + t) + ½(1 − t²)·x·c(1 + 3a·x²)
            d *= 3 * _A * _C
            d += _C
            d *= xb
            s = t * t
            np.subtract(1, s, out=s)
            d *= s
            d += t
            d += 1
            d *= 0.5
            d *= g[b]
        return dx


_A, _C = 0.044715, math.sqrt(2 / math.pi)


@register_kernel("cpu", "layer_norm")
class LayerNorm:
    """Keeps the normed values x̂ and 1/σ of each row."""

    def forward(x, weight, bias=None, *, eps):
        if not _plain(x, weight) or x.ndim < 2 or (bias is not None and not _plain(x, bias)):
            return NotImplemented
        rows, y, normed = _rows(x), np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype)
        n, width = rows.shape
        averaging = np.full(width, 1 / width, x.dtype)
        rstd = np.empty((n, 1), x.dtype)
        for b in _blocks(n, width):
            hat, out = _rows(normed)[b], _rows(y)[b]
            np.subtract(rows[b], (rows[b] @ averaging)[:, None], out=hat)
            variance = np.vecdot(hat, hat)
            variance *= 1 / width
            variance += eps
            np.sqrt(variance, out=variance)
            np.divide(1, variance, out=rstd[b, 0])
            hat *= rstd[b]
            np.multiply(hat, weight, out=out)
            if bias is not None:
                out += bias
        return y, (normed, rstd)

    def vjp(g, y, x, weight, bias=None, *, eps, residual):
        normed, rstd = residual
        dx = np.empty(x.shape, x.dtype)
        g, normed = _rows(np.broadcast_to(g, x.shape)), _rows(normed)
        n, width = normed.shape
        dweight, dbias = np.zeros(width, x.dtype), np.zeros(width, x.dtype)
        averaging = np.full(width, 1 / width, x.dtype)
        for b in _blocks(n, width):
            out, hat, gb = _rows(dx)[b], normed[b], g[b]
            ones = np.ones(len(gb), x.dtype)
            np.multiply(gb, hat, out=out)
            dweight += ones @ out
            if bias is not None:
                dbias += ones @ gb
            np.multiply(gb, weight, out=out)  # h = g·γ
            along = np.vecdot(out, hat)[:, None]
            along *= 1 / width
            out -= (out @ averaging)[:, None]
            out -= hat * along
            out *= rstd[b]
        return (dx, dweight) if bias is None else (dx, dweight, dbias)


@register_kernel("cpu", "linear")
class Linear:
    """One 2-D product each; the weight's gradient is written straight into its buffer."""

    def forward(x, w, b=None):
        if not _plain(x, w) or (b is not None and not _plain(x, b)):
            return NotImplemented
        y = np.empty((*x.shape[:-1], len(w)), x.dtype)
        np.matmul(_rows(x), w.T, out=_rows(y))
        if b is not None:
            y += b
        return y, None

    def vjp(g, y, x, w, b=None):
        def dw(out, base):
            if base is None:
                return np.matmul(g2.T, _rows(x), out=out)
            return np.add(base, g2.T @ _rows(x), out=out)

        g2 = _rows(g)
        grads = (lambda: (g2 @ w).reshape(x.shape)), Into(dw)
        return grads if b is None else (*grads, lambda: np.ones(len(g2), g2.dtype) @ g2)


@register_kernel("cpu", "getitem")
class Getitem:
    """The gradient of a slice is added to that slice alone, not to an array of zeros."""

    def forward(x, index):
        return (x[index], None) if is_basic_index(index) else NotImplemented

    def vjp(g, y, x, index):
        def add(out, base):
            if base is None:
                if out is None:
                    out = np.zeros_like(g, order="C", shape=x.shape)
                else:
                    out[...] = 0
                out[index] = g
                return out
            if out is None:
                out = base.copy()
            elif base is not out:
                out[...] = base
            part = out[index]
            if part.ndim:
                part += g
            else:  # NumPy gives one element as a number
                out[index] = part + g
            return out

        return Into(add)


@register_kernel("cpu", "embedding")
class Embedding:
    """The gradient's scatter as a product with one-hot rows for a small table, as sums of sorted runs for a large one."""

    def forward(weight, ids):
        return weight[ids], None

    def vjp(g, y, weight, ids):
        ids, rows = ids.reshape(-1), g.reshape(-1, *weight.shape[1:])
        if not ids.size:
            return np.zeros(weight.shape, weight.dtype)
        if weight.ndim == 2 and weight.shape[0] <= 512:
            return (np.arange(weight.shape[0])[:, None] == ids).astype(g.dtype) @ rows
        order = np.argsort(ids, kind="stable")
        found, starts = np.unique(ids[order], return_index=True)
        dweight = np.zeros(weight.shape, weight.dtype)
        dweight[found] = np.add.reduceat(rows[order], starts, axis=0)
        return dweight


@register_kernel("cpu", "dropout")
class Dropout:
    """Keeps the mask as one byte an element."""

    def forward(x, p, key):
        if not _plain(x):
            return NotImplemented
        mask = random.keep_mask(key, x.shape, p)
        q = random.keep_probability(p)
        y = np.multiply(x, mask)
        y *= 1 / q if q else 0
        return y, mask

    def vjp(g, y, x, p, key, residual):
        q = random.keep_probability(p)
        dx = np.multiply(g, residual)
        dx *= 1 / q if q else 0
        return dx


@register_kernel("cpu", "dropout_add")
class DropoutAdd:
    """As Dropout, and the sum while a block is hot."""

    def forward(x, r, p, key):
        if not p or not _plain(x, r) or x.ndim == 0:
            return NotImplemented
        mask, y = random.keep_mask(key, x.shape, p), np.empty(x.shape, x.dtype)
        q = random.keep_probability(p)
        rows, kept, stream, out = _rows(x), _rows(mask), _rows(r), _rows(y)
        for b in _blocks(*rows.shape):
            np.multiply(rows[b], kept[b], out=out[b])
            out[b] *= 1 / q if q else 0
            out[b] += stream[b]
        return y, mask

    def vjp(g, y, x, r, p, key, residual):
        return (lambda: Dropout.vjp(g, y, x, p, key, residual)), g


@register_kernel("cpu", "cross_entropy", saves="logits")
class CrossEntropy:
    """A block of rows at a time; keeps the largest logit m and Σeˢ⁻ᵐ of each row. The one-hot targets are never made."""

    def forward(logits, targets, ignore_index, label_smoothing):
        n = len(targets)
        if not _plain(logits) or label_smoothing or (targets == ignore_index).any():
            return NotImplemented
        top, ones = logits.max(axis=-1, keepdims=True), np.ones(logits.shape[1], logits.dtype)
        total = np.empty_like(top)
        for b in _blocks(*logits.shape):
            z = logits[b] - top[b]
            total[b, 0] = np.exp(z, out=z) @ ones
        loss = (np.log(total[:, 0]) - (logits[np.arange(n), targets] - top[:, 0])).sum() / n
        return loss.astype(logits.dtype), (top, total)

    def vjp(g, y, logits, targets, ignore_index, label_smoothing, residual):
        n, (top, total) = len(targets), residual
        dlogits = np.empty_like(logits)
        for b in _blocks(*logits.shape):
            p = np.subtract(logits[b], top[b], out=dlogits[b])
            np.exp(p, out=p)
            p /= total[b]
            p *= g / n
        dlogits[np.arange(n), targets] -= g / n
        return dlogits


@register_kernel("cpu", "causal_attention", saves="y")
class CausalAttention:
    """A few sequences and one block of queries at a time, all heads at once; keeps ln Σeˢ of each row, not the T×T weights.

    Keys after a block's last query are never touched. Where the bound |q|·|k| on the scores is small, exp cannot overflow and
    no maximum is subtracted. (Milakov & Gimelshein 2018; Dao et al., "FlashAttention", 2022, for backward from ln Σeˢ.)
    """

    def forward(q, k, v, p, key):
        if not _plain(q, k, v) or q.ndim > 4:
            return NotImplemented
        shape = (*q.shape[:-1], v.shape[-1])
        q, k, v = _heads(q), _heads(k), _heads(v)
        (B, H, T, d), S = q.shape, k.shape[2]
        y = _positions_first(B, H, T, v.shape[3], q.dtype)
        lse = np.empty((B, H, T, 1), q.dtype)
        mask, keep = _mask(key, (B, H, T, S), p)
        for b in _sequences(q, S):
            qs, kt, shift = q[b] * (1 / math.sqrt(d)), _transposed(k[b], T), _needs_shift(q[b], k[b])
            vs = v[b] if mask is None else v[b] * (1 / keep)
            for i, j, n in _query_blocks(T, S):
                s = np.matmul(qs[:, :, i:j], kt[..., :n])
                _mask_future(s, i + S - T)
                if shift:
                    top = s.max(axis=-1, keepdims=True)
                    s -= top
                np.exp(s, out=s)
                total = (s @ np.ones(n, s.dtype))[..., None]
                lse[b, :, i:j] = np.log(total) + top if shift else np.log(total)
                if mask is not None:
                    s *= mask[b, :, i:j, :n]
                out = np.matmul(s, vs[:, :, :n])
                np.divide(out, total, out=y[b, :, i:j])
        return y.reshape(shape), (lse, mask, keep)

    def vjp(g, y, q, k, v, p, key, residual):
        lse, mask, keep = residual
        shapes = q.shape, k.shape, v.shape
        g, y, q, k, v = (_heads(a) for a in (g, y, q, k, v))
        (B, H, T, d), S = q.shape, k.shape[2]
        dq, dk, dv = (_positions_first(B, H, *a.shape[2:], q.dtype) for a in (q, k, v))
        scale = 1 / math.sqrt(d)
        for b in _sequences(q, S):
            qs, kb, kt, vt = q[b] * scale, k[b], _transposed(k[b], T), _transposed(v[b], T)
            gs = g[b] if mask is None else g[b] * (1 / keep)
            delta = np.vecdot(g[b], y[b])[..., None]
            dkb, dvb = np.zeros(kb.shape, q.dtype), np.zeros(v[b].shape, q.dtype)
            for i, j, n in _query_blocks(T, S):
                a = np.matmul(qs[:, :, i:j], kt[..., :n])
                _mask_future(a, i + S - T)
                a -= lse[b, :, i:j]
                np.exp(a, out=a)
                da = np.matmul(gs[:, :, i:j], vt[..., :n])
                if mask is None:
                    kept = a
                else:
                    m = mask[b, :, i:j, :n]
                    da *= m
                    kept = a * m
                dvb[:, :, :n] += np.matmul(kept.swapaxes(2, 3), gs[:, :, i:j])
                da -= delta[:, :, i:j]
                da *= a
                out = np.matmul(da, kb[:, :, :n])
                np.multiply(out, scale, out=dq[b, :, i:j])
                dkb[:, :, :n] += np.matmul(da.swapaxes(2, 3), qs[:, :, i:j])
            dk[b], dv[b] = dkb, dvb
        return tuple(a.reshape(s) for a, s in zip((dq, dk, dv), shapes, strict=True))


_QUERIES = 64  # rows of a block of queries: few enough for the cache, and little masked work at the diagonal


def _heads(x):
    """(…, T, d) as (B, H, T, d)."""
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _positions_first(B, H, T, d, dtype):
    """An empty (B, H, T, d) whose memory is (B, T, H, d), so that joining the heads again is a view."""
    return np.empty((B, T, H, d), dtype).transpose(0, 2, 1, 3)


def _transposed(x, rows):
    """(…, T, d) as (…, d, T), copied where more than a few rows are multiplied by it: BLAS is then a third faster."""
    view = x.swapaxes(-1, -2)
    return np.ascontiguousarray(view) if rows > 4 else view


def _mask(key, shape, p):
    """The dropout mask of a key, or None, and the probability to keep; a mask that drops all scales nothing."""
    return (random.keep_mask(key, shape, p), random.keep_probability(p) or 1.0) if p else (None, 1.0)


def _sequences(q, S):
    """Slices of as many sequences as have about 2·_BLOCK scores in a block of queries."""
    B, H, T, _ = q.shape
    step = max(1, 2 * _BLOCK // (H * min(T, _QUERIES) * S))
    return [slice(b, min(b + step, B)) for b in range(0, B, step)]


def _query_blocks(T, S):
    """(first, last, keys): queries first … last − 1 see at most the first `keys` keys."""
    return [(i, min(i + _QUERIES, T), min(i + _QUERIES, T) + S - T) for i in range(0, T, _QUERIES)]


def _needs_shift(q, k):
    """Whether some |q|·|k|/√d is so large that exp of a score could overflow, or all of a row underflow.

    With fewer queries than a head has dimensions it costs more to ask than to shift.
    """
    if q.shape[-2] < q.shape[-1]:
        return True
    bound = np.sqrt(np.vecdot(q, q).max() * np.vecdot(k, k).max() / q.shape[-1])
    return not bound < 60


def _mask_future(scores, first):
    """−∞ for keys after their query, in place; row 0 is the query at position `first`."""
    end = scores[..., first:]
    np.minimum(end, _limits(*end.shape[-2:], end.dtype), out=end)


@functools.lru_cache(maxsize=64)
def _limits(rows, columns, dtype):
    return np.where(np.tri(rows, columns, dtype=bool), np.inf, -np.inf).astype(dtype)
