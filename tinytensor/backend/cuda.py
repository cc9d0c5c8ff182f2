"""CuPy kernels: the ops that a transformer spends its time in, as overrides of their formulas, for float32 and bfloat16 arrays.

Matrix products are cuBLAS's, the rest is kernels.cu and flash.cu. No op waits for the device or copies from the host, so that a
training step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from pathlib import Path

import cupy as cp
import numpy as np

from tinytensor.backend import Into, bfloat16, cpu, precision, random, register_kernel
from tinytensor.backend.cublas import gemm
from tinytensor.backend.launcher import Source, Strided

_HERE = Path(__file__).parent
_kernels, _flash = Source(_HERE / "kernels.cu"), Source(_HERE / "flash.cu")
_FLOAT32, _BFLOAT16 = np.dtype(np.float32), bfloat16()
_C_TYPES = {_FLOAT32: "float", _BFLOAT16: "bf16"}
_FLASH_HEADS = (16, 32, 64)  # head sizes that flash.cu is compiled for


def _plain(*arrays):
    """Whether all are non-empty arrays of float32 or bfloat16."""
    return all(getattr(a, "dtype", None) in _C_TYPES and a.size for a in arrays)


def _activations():
    """The dtype that layer_norm and linear give."""
    return _BFLOAT16 if precision.current() == "bf16" else _FLOAT32


def _over(name, n, each, *arguments):
    """Launch a kernel on n elements, `each` to a thread."""
    _kernels.launch(name, (-(-n // (256 * each)),), 256, *arguments)


def _by_row(name, rows, *arguments):
    """Launch a kernel that gives each row a warp."""
    _kernels.launch(name, (-(-rows // 4),), 128, *arguments)


def _name(kernel, array):
    return f"{kernel}<{_C_TYPES[array.dtype]}>"


def _rows(x):
    """x as a matrix of its last axis, with that of stride 1; a copy only where the layout needs one."""
    x = x.reshape(-1, x.shape[-1])
    in_order = x.strides[1] == x.itemsize and x.strides[0] >= x.shape[1] * x.itemsize
    return x if in_order else cp.ascontiguousarray(x)


def _stride(matrix):
    """Elements from one row to the next."""
    return matrix.strides[0] // matrix.itemsize if len(matrix) > 1 else matrix.shape[1]


def _padded(rows, width, dtype):
    """An empty matrix whose rows begin at multiples of 16 bytes, as tensor cores like them."""
    step = 16 // dtype.itemsize
    return cp.empty((rows, -(-width // step) * step), dtype)[:, :width]


def _into(out, base, like):
    """Memory for a gradient of float32 that is added to `base`, which it then holds, and whether there is any."""
    if out is None:
        out = cp.empty(like.shape, np.float32)
    if base is not None and base is not out:
        out[...] = base
    return out, base is not None


def _column_sums(launch, rows, out, accumulate):
    """out (+)= Σ over rows: `launch(partial, grid)` sums stretches of rows, of which there are few if the columns are many."""
    blocks = -(-out.size // 32)
    parts = cp.empty((max(1, min(rows // 32, 512 // blocks)), out.size), np.float32)
    launch(parts, (blocks, len(parts)))
    _add_parts(parts, out, accumulate)


def _add_parts(parts, out, accumulate):
    """out (+)= Σ parts, in their order."""
    sizes = len(parts), out.size, out.size, int(accumulate)
    _kernels.launch("sum_rows<float>", (-(-out.size // 32), 1), 256, parts, out, *sizes)


def _draw(key, p):
    """What a kernel needs to drop with probability p: seed, stream, call, place, threshold and 1/q."""
    if key is None:
        return 0, 0, 0, None, 0, 1.0
    seed, stream, call, micro_step, step = key.words()
    place = key.place
    if place is None:
        set_place(place := cp.empty(2, np.uint64), step, micro_step)
    q = random.keep_probability(p)
    return seed, stream, call, place, random.drop_threshold(p), 1 / q if q else 0.0


@register_kernel("cuda", "gelu")
class Gelu:
    """The gate σ(2u) is computed again for the derivative, which is quicker than reading it."""

    def forward(x):
        if not _plain(x):
            return NotImplemented
        y = cp.empty(x.shape, x.dtype)
        _over(_name("gelu", x), x.size, 8, cp.ascontiguousarray(x), y, x.size)
        return y, None

    def vjp(g, y, x):
        dx = cp.empty(x.shape, x.dtype)
        _over(_name("gelu_backward", x), x.size, 8, cp.ascontiguousarray(g), cp.ascontiguousarray(x), dx, x.size)
        return dx


@register_kernel("cuda", "layer_norm")
class LayerNorm:
    """A warp a row; keeps μ and 1/σ. Adds its derivative to the residual stream's in one pass."""

    def forward(x, weight, bias=None, *, eps):
        scales = [s for s in (weight, bias) if s is not None]
        if not _plain(x, *scales) or any(a.dtype != np.float32 for a in (x, *scales)) or x.shape[-1] % 4:
            return NotImplemented
        y = cp.empty(x.shape, _activations())
        rows, width = x.size // x.shape[-1], x.shape[-1]
        mean, rstd = cp.empty(rows, np.float32), cp.empty(rows, np.float32)
        scales = [None if s is None else cp.ascontiguousarray(s) for s in (weight, bias)]
        _by_row(_name("layer_norm", y), rows, cp.ascontiguousarray(x), *scales, y, mean, rstd, rows, width, eps)
        return y, (mean, rstd)

    def vjp(g, y, x, weight, bias=None, *, eps, residual):
        g, x, weight = cp.ascontiguousarray(g), cp.ascontiguousarray(x), cp.ascontiguousarray(weight)
        rows, width = x.size // x.shape[-1], x.shape[-1]

        def dx(out, base):
            out = cp.empty(x.shape, x.dtype) if out is None else out
            base = None if base is None else cp.ascontiguousarray(base)
            _by_row(_name("layer_norm_backward", g), rows, g, x, weight, *residual, base, out, rows, width)
            return out

        def dweight(out, base):
            out, accumulate = _into(out, base, weight)

            def launch(partial, grid):
                _kernels.launch(_name("layer_norm_weight", g), grid, 256, g, x, *residual, partial, rows, width)

            _column_sums(launch, rows, out, accumulate)
            return out

        return (Into(dx), Into(dweight)) if bias is None else (Into(dx), Into(dweight), Into(_sum_of_rows(g, weight)))


def _sum_of_rows(g, like):
    """The gradient of what was added to each row, as `Into` makes it."""
    g = _rows(g)

    def add(out, base):
        out, accumulate = _into(out, base, like)

        def launch(partial, grid):
            _kernels.launch(_name("sum_rows", g), grid, 256, Strided(g), partial, len(g), g.shape[1], _stride(g), 0)

        _column_sums(launch, len(g), out, accumulate)
        return out

    return add


@register_kernel("cuda", "linear")
class Linear:
    """Products of 2-D matrices; the weight's gradient is added to what its buffer holds within the product."""

    def forward(x, w, b=None):
        if not _plain(x, w) or w.dtype != np.float32 or (b is not None and b.dtype != np.float32):
            return NotImplemented
        name, dtype = precision.current(), _activations()
        x2, w = _cast(_rows(x), dtype), _cast(w if w.flags.f_contiguous else cp.ascontiguousarray(w), dtype)
        y = gemm(x2, w.T, _padded(len(x2), len(w), dtype), tf32=name == "tf32")
        if b is not None:
            _over(_name("add_bias", y), y.size, 1, Strided(y), cp.ascontiguousarray(b), len(y), y.shape[1], _stride(y))
        return y.reshape(*x.shape[:-1], len(w)), (x2, w, name == "tf32")

    def vjp(g, y, x, w, b=None, *, residual):
        x2, w2, tf32 = residual
        g2 = _cast(_rows(g), w2.dtype)

        def dw(out, base):
            out, accumulate = _into(out, base, w)
            return gemm(g2.T, x2, out, accumulate=accumulate, tf32=tf32)

        def dx():
            dtype = _FLOAT32 if x.dtype == np.float32 else w2.dtype  # not bfloat16 of factors in float32
            return gemm(g2, w2, cp.empty(x2.shape, dtype), tf32=tf32).reshape(x.shape)

        return (dx, Into(dw)) if b is None else (dx, Into(dw), Into(_sum_of_rows(g2, b)))


def _cast(x, dtype):
    """x, a matrix, in float32 or bfloat16."""
    if x.dtype == dtype:
        return x
    if dtype == np.float32:
        return x.astype(dtype)
    y = cp.empty(x.shape, dtype)
    _over("cast", x.size, 8, cp.ascontiguousarray(x), y, x.size)
    return y


@register_kernel("cuda", "embedding")
class Embedding:
    """The gradient's rows are added up id by id, each in the order of its positions."""

    def forward(weight, ids):
        if not _plain(weight) or weight.dtype != np.float32 or weight.ndim != 2 or weight.shape[1] > 2048 or not ids.size:
            return NotImplemented
        return weight[ids], None

    def vjp(g, y, weight, ids):
        g, ids = cp.ascontiguousarray(g), cp.ascontiguousarray(ids).astype(np.int32, copy=False)
        vocab, width = weight.shape

        def add(out, base):
            out, accumulate = _into(out, base, weight)
            chunks = max(1, min(ids.size // 256, 4096 // vocab))
            if chunks == 1:
                _kernels.launch("embedding_backward", (vocab, 1), 256, g, ids, out, ids.size, width, int(accumulate))
                return out
            parts = cp.empty((chunks, *out.shape), np.float32)
            _kernels.launch("embedding_backward", (vocab, chunks), 256, g, ids, parts, ids.size, width, 0)
            _add_parts(parts, out, accumulate)
            return out

        return Into(add)


register_kernel("cuda", "getitem")(cpu.Getitem)


@register_kernel("cuda", "dropout")
class Dropout:
    """The mask is drawn again for the derivative, which is quicker than reading it."""

    def forward(x, p, key):
        if not _plain(x) or x.dtype != np.float32:
            return NotImplemented
        return _dropped(x, _FLOAT32, p, key), None

    def vjp(g, y, x, p, key):
        return _dropped(g, _FLOAT32, p, key)


def _dropped(x, dtype, p, key):
    y = cp.empty(x.shape, dtype)
    _over(_name("dropout", y), x.size, 16, cp.ascontiguousarray(x), y, x.size, *_draw(key, p))
    return y


@register_kernel("cuda", "dropout_add")
class DropoutAdd:
    """A branch of float32 or bfloat16 into a stream of float32."""

    def forward(x, r, p, key):
        if not _plain(x, r) or r.dtype != np.float32 or x.shape != r.shape:
            return NotImplemented
        y = cp.empty(r.shape, np.float32)
        arrays = cp.ascontiguousarray(x), cp.ascontiguousarray(r), y
        _over(_name("dropout_add", x), x.size, 16, *arrays, x.size, *_draw(key, p))
        return y, None

    def vjp(g, y, x, r, p, key):
        return (lambda: _dropped(g, x.dtype, p, key)), g


@register_kernel("cuda", "cross_entropy")
class CrossEntropy:
    """Keeps ln Σ e^logit of each row; the probabilities are never stored."""

    def forward(logits, targets, ignore_index, label_smoothing):
        if not _plain(logits) or label_smoothing or not -(2**31) <= ignore_index < 2**31:
            return NotImplemented
        logits, targets = _rows(logits), cp.ascontiguousarray(targets).astype(np.int32, copy=False)
        rows, vocab = logits.shape
        losses, lse, mean = (cp.empty(n, np.float32) for n in (rows, rows, 2))
        arguments = Strided(logits), targets, losses, lse, vocab, _stride(logits), ignore_index
        _kernels.launch(_name("cross_entropy", logits), (rows,), 128, *arguments)
        _kernels.launch("mean_loss", (1,), 1024, losses, targets, mean, rows, ignore_index)
        return mean[0], (targets, lse, mean)

    def vjp(g, y, logits, targets, ignore_index, label_smoothing, residual):
        targets, lse, mean = residual
        logits = _rows(logits)
        rows, vocab = logits.shape
        dlogits = _padded(rows, vocab, logits.dtype)
        layout = vocab, _stride(logits), _stride(dlogits)
        arrays = cp.ascontiguousarray(g), mean, Strided(logits), targets, lse, Strided(dlogits)
        _kernels.launch(_name("cross_entropy_backward", logits), (rows,), 128, *arrays, *layout, ignore_index)
        return dlogits


@register_kernel("cuda", "causal_attention", saves="y")
class CausalAttention:
    """bfloat16 goes through flash.cu, which keeps ln Σ eˢ of each row; float32 through products that keep the T×S weights.

    The dropout mask is kept as a bit a weight: drawing it costs more than reading it.
    """

    def forward(q, k, v, p, key):
        if not _plain(q, k, v) or len({q.dtype, k.dtype, v.dtype}) > 1 or q.ndim > 4:
            return NotImplemented
        shape = (*q.shape[:-1], v.shape[-1])
        q, k, v = cpu._heads(q), cpu._heads(k), cpu._heads(v)
        (B, H, T, d), S = q.shape, k.shape[2]
        keep, inverse = None, 1.0
        if p:
            *address, threshold, inverse = _draw(key, p)
            n = B * H * T * S
            keep = cp.empty(-(-n // 16), np.uint16)
            _over("keep_bits", len(keep), 1, keep, n, T, S, *address, threshold)
        flash = q.dtype == _BFLOAT16 and d == v.shape[3] and d in _FLASH_HEADS and max(B, H) < 2**16  # a grid's limit
        y, kept = (_flash_forward if flash else _dense_forward)(q, k, v, keep, inverse)
        return y.reshape(shape), (flash, kept, keep, inverse)

    def vjp(g, y, q, k, v, p, key, residual):
        flash, *kept = residual
        backward = _flash_backward if flash else _dense_backward
        gradients = backward(*(cpu._heads(a) for a in (g, y, q, k, v)), *kept)
        return tuple(a.reshape(x.shape) for a, x in zip(gradients, (q, k, v), strict=True))


def _positions_first(like):
    """An empty (B, H, T, d) whose memory is (B, T, H, d), so that joining the heads again is a view."""
    B, H, T, d = like.shape
    return cp.empty((B, T, H, d), like.dtype).transpose(0, 2, 1, 3)


def _view(x):
    """A (B, H, T, d) as flash.cu takes it: its memory, and the steps from one sequence, head and position to the next."""
    return Strided(x), *(step // x.itemsize for step in x.strides[:3])


def _flash_ready(x):
    """x where its rows are contiguous and begin at multiples of 16 bytes, else a copy."""
    ready = x.strides[3] == x.itemsize and not any(step % 16 for step in (x.data.ptr, *x.strides[:3]))
    return x if ready else cp.ascontiguousarray(x)


def _flash_forward(q, k, v, keep, inverse):
    q, k, v = _flash_ready(q), _flash_ready(k), _flash_ready(v)
    (B, H, T, d), S = q.shape, k.shape[2]
    y, lse = _positions_first(q), cp.empty((B, H, T), np.float32)
    views = *_view(y), lse, *_view(q), *_view(k), *_view(v)
    _flash.launch(f"flash_forward<{d}>", (-(-T // 64), H, B), 128, *views, keep, inverse, T, S)
    return y, lse


def _flash_backward(g, y, q, k, v, lse, keep, inverse):
    g, y, q, k, v = (_flash_ready(a) for a in (g, y, q, k, v))
    (B, H, T, d), S = q.shape, k.shape[2]
    dq, dk, dv = (_positions_first(a) for a in (q, k, v))
    delta = cp.empty(lse.shape, np.float32)
    inputs = *_view(q), *_view(k), *_view(v), keep, inverse, T, S
    queries = *_view(dq), delta, *_view(g), *_view(y), lse, *inputs
    _flash.launch(f"flash_backward_queries<{d}>", (-(-T // 64), H, B), 128, *queries)
    keys = *_view(dk), *_view(dv), *_view(g), lse, delta, *inputs
    _flash.launch(f"flash_backward_keys<{d}>", (-(-S // 64), H, B), 128, *keys)
    return dq, dk, dv


def _stacks(*arrays):
    """(B, H, T, d) as stacks (B·H, T, d) of contiguous matrices."""
    return [cp.ascontiguousarray(a).reshape(-1, *a.shape[2:]) for a in arrays]


def _dense_forward(q, k, v, keep, inverse):
    shape = (*q.shape[:3], v.shape[3])
    tf32, scale = precision.current() == "tf32", 1 / math.sqrt(q.shape[3])
    q, k, v = _stacks(q, k, v)
    (N, T, _), S = q.shape, k.shape[1]
    a = gemm(q, k.swapaxes(1, 2), cp.empty((N, T, S), q.dtype), alpha=scale, tf32=tf32)
    _by_row(_name("causal_softmax", a), N * T, a, N * T, T, S)
    y = gemm(_masked(a, keep, inverse), v, cp.empty((N, T, v.shape[2]), q.dtype), tf32=tf32)
    return y.reshape(shape), (a, tf32)


def _dense_backward(g, y, q, k, v, kept, keep, inverse):
    (a, tf32), shapes, scale = kept, (q.shape, k.shape, v.shape), 1 / math.sqrt(q.shape[3])
    g, q, k, v = _stacks(g, q, k, v)
    (N, T, _), S = q.shape, k.shape[1]
    da = gemm(g, v.swapaxes(1, 2), cp.empty(a.shape, a.dtype), tf32=tf32)
    dv = gemm(_masked(a, keep, inverse).swapaxes(1, 2), g, cp.empty(v.shape, v.dtype), tf32=tf32)
    _by_row(_name("causal_softmax_backward", a), N * T, a, da, keep, inverse, scale, N * T, T, S)
    dq = gemm(da, k, cp.empty(q.shape, q.dtype), tf32=tf32)
    dk = gemm(da.swapaxes(1, 2), q, cp.empty(k.shape, k.dtype), tf32=tf32)
    return tuple(x.reshape(shape) for x, shape in zip((dq, dk, dv), shapes, strict=True))


def _masked(a, keep, inverse):
    """a·m/q"""
    if keep is None:
        return a
    y = cp.empty(a.shape, a.dtype)
    _over(_name("mask_weights", a), a.size, 1, a, y, keep, inverse, a.size, *a.shape[1:])
    return y


def adamw(p, g, m, v, *, beta1, beta2, decay, rate, correction, eps):
    """`AdamW`'s update of one stretch of memory, in one pass: p ← p·decay − rate·m/(√v·correction + ε)."""
    betas = beta1, 1 - beta1, beta2, 1 - beta2
    _over("adamw", p.size, 4, p, g, m, v, p.size, *betas, decay, rate, correction, eps)


def sum_of_squares(x):
    """Σ x² of a flat array, in float32 within a block of threads, in float64 over the blocks. Waits for the device."""
    sums = cp.empty(min(1024, -(-x.size // 1024)), np.float32)
    _kernels.launch("sum_of_squares", (len(sums),), 256, x, sums, x.size)
    return float(sums.get().sum(dtype=np.float64))


def set_place(place, step, micro_step):
    """Tell the keys that read `place` where they are."""
    _kernels.launch("set_place", (1,), 1, place, step, micro_step)
