"""Every kernel of the table for CUDA, with its launcher, against its formula in float64 on NumPy: at odd sizes, into memory
that held NaN, and in each precision."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from tests.cuda import standin
from tests.cuda.emulate import Library, sanitizer
from tests.tinytensor.registry import KEY, OPS, A, Call
from tinytensor import backend
from tinytensor.backend import random

BFLOAT16 = backend.bfloat16()
BOUNDS = {"fp32": 1e-5, "tf32": 2e-3, "bf16": 2e-2}
INFO = {info.name: info for info in OPS}
IDS = np.random.default_rng(0).integers(0, 7, 700)
CALLS = {  # what a kernel must take on; of the registry's calls it may leave some to the formula
    "gelu": [Call(A(3)), Call(A(301, 7)), Call(A(5, 8, low=-30, high=30))],
    "layer_norm": [Call(A(7, 12), A(12)), Call(A(2, 33, 132), A(132), A(132)), Call(A(1, 4), A(4)), Call(A(300, 260), A(260))],
    "linear": [Call(A(2, 5, 7), A(3, 7)), Call(A(2, 130, 9), A(65, 9), A(65)), Call(A(8), A(16, 8)), Call(A(1, 1), A(1, 1))],
    "embedding": [Call(A(5, 3), IDS[:1] % 5), Call(A(7, 300), IDS), Call(A(9, 4), IDS[:6].reshape(2, 3))],
    "getitem": [Call(A(5, 12), (slice(None), slice(4, 8))), Call(A(5, 2, 3), 1)],
    "dropout": [Call(A(1), 0.4, key=KEY), Call(A(15), 0.2, key=KEY), Call(A(4099), 0.3, key=KEY)],
    "dropout_add": [
        Call(A(17), A(17), 0.4, key=KEY),
        Call(A(3, 1367), A(3, 1367), 0.3, key=KEY),
        Call(A(2), A(2), 1.0, key=KEY),
    ],
    "cross_entropy": [
        Call(A(9, 7), IDS[:9]),
        Call(A(2, 150, 131), IDS[:300].reshape(2, 150)),
        Call(A(9, 8, low=-80, high=80), IDS[:9], ignore_index=3),
    ],
    "causal_attention": [
        Call(A(2, 3, 67, 16), A(2, 3, 67, 16), A(2, 3, 67, 16)),
        Call(A(1, 2, 3, 32), A(1, 2, 70, 32), A(1, 2, 70, 32), dropout_p=0.3, key=KEY),
        Call(A(2, 33, 17), A(2, 33, 17), A(2, 33, 5), dropout_p=0.3, key=KEY),
        Call(A(2, 1, 1, 8), A(2, 1, 9, 8), A(2, 1, 9, 8)),
    ],
}
CASES = [pytest.param(name, call, id=f"{name}-{call}"[:70]) for name, calls in CALLS.items() for call in calls]
ROUNDED = {"gelu": [0], "dropout_add": [0], "cross_entropy": [0], "causal_attention": [0, 1, 2]}  # inputs that bf16 rounds

pytestmark = pytest.mark.usefixtures("cuda")


def relative_error(ours: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(ours.astype(np.float64) - exact) / (np.linalg.norm(exact) or 1))


def differentiated(name: str, call: Call, values: list[np.ndarray], device: str) -> tuple[Any, list[np.ndarray]]:
    """The node of the result; the result and its gradients."""
    leaves = [tt.Tensor(backend.to_device(v, device)) for v in values]
    for leaf in leaves:
        leaf.requires_grad = True
    args, kwargs = call.bind(leaves)
    y = INFO[name].function(*args, **kwargs)
    seed = np.random.default_rng(3).standard_normal(y.shape).astype(BFLOAT16)  # the same numbers in every dtype
    g = tt.Tensor(backend.to_device(seed.astype(y.dtype), device))
    return y.node, [y.numpy(), *(d.numpy() for d in tt.grad(y, leaves, grad_outputs=g, retain_graph=True))]


def check(name: str, call: Call, precision: Any) -> Any:
    rounded = ROUNDED.get(name, []) if precision == "bf16" else []
    values = [a.astype(BFLOAT16 if i in rounded else np.float32) for i, a in enumerate(call.arrays(INFO[name].domain))]
    with tt.precision(precision):
        node, ours = differentiated(name, call, values, "cuda")
    _, exact = differentiated(name, call, [v.astype(np.float64) for v in values], "cpu")
    assert [g.dtype for g in ours[1:]] == [v.dtype for v in values]
    for what, (a, e) in enumerate(zip(ours, exact, strict=True)):
        assert a.shape == e.shape
        assert relative_error(a, e) < BOUNDS[precision], f"{'gradient ' * bool(what)}{what}: {relative_error(a, e)}"
    return node


def test_every_kernel_has_calls() -> None:
    assert set(CALLS) == set(backend.kernels["cuda"])


@pytest.mark.parametrize(("name", "call"), CASES)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_kernel_is_its_formula(name: str, call: Call, precision: str) -> None:
    node = check(name, call, precision)
    kernel = backend.kernels["cuda"][name].vjp
    assert kernel in (node.vjp, getattr(node.vjp, "vjp", None)), "the formula ran instead"


@pytest.mark.skipif(sanitizer() is None, reason="g++ has no AddressSanitizer")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_stays_within_its_memory(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch under AddressSanitizer; sizes are such that the last block, row or tile is not whole."""

    sources = Path(backend.__file__).parent.glob("*.cu")
    libraries = {source.read_text(encoding="utf-8"): Library(source, sanitize=True) for source in sources}
    monkeypatch.setattr(standin.array, "_library", libraries.__getitem__)
    check(name, CALLS[name][0 if name == "causal_attention" else 1], precision)


@pytest.mark.parametrize("name", CALLS)
def test_the_check_notices_one_per_cent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, call = backend.kernels["cuda"][name], CALLS[name][1]
    for place in range(len(call.places())):
        with monkeypatch.context() as patch:
            patch.setitem(backend.kernels["cuda"], name, dataclasses.replace(kernel, vjp=_scaled(kernel.vjp, place)))
            with pytest.raises(AssertionError, match="gradient"):
                check(name, call, "fp32")


def _scaled(vjp: Any, place: int) -> Any:
    def scaled(share: Any) -> Any:
        if isinstance(share, backend.Into):
            return share.add(None, None) * 1.01
        return (share() if callable(share) else share) * 1.01

    def perturbed(*args: Any, **params: Any) -> Any:
        shares = vjp(*args, **params)
        shares = shares if isinstance(shares, tuple) else (shares,)
        return tuple(scaled(s) if i == place else s for i, s in enumerate(shares))

    return perturbed


def test_masks_are_numpys_bit_for_bit() -> None:
    """Also where a key's numbers need all of their 64 bits, and where it reads its place from the device."""
    x, p = tt.ones(4099, device="cuda"), 0.3
    keys = [random.Key(1, "dropout"), random.Key(2**64 - 1, "attention", 2**63 + 5, 2**64 - 2, 2**40)]
    for key in keys:
        ours = tt.dropout(x, p, key=key).numpy()
        assert np.array_equal(ours != 0, random.keep_mask(key, (4099,), p))
        place = backend.to_device(np.array([key.step, key.micro_step], np.uint64), "cuda")
        there = tt.dropout(x, p, key=key._replace(step=0, micro_step=0, place=place)).numpy()
        assert np.array_equal(ours, there)


LAYOUTS = {
    "transposed": lambda base: base.T,
    "every other": lambda base: base[::2, ::2],
    "backwards": lambda base: base[::-1, ::-1],
    "repeated": lambda base: np.broadcast_to(base[0], (5, 24)),
    "a slice": lambda base: base[3:9, 1:13],
}


def on_device(*shape: int) -> Any:
    return backend.to_device(np.random.default_rng(0).standard_normal(shape).astype(np.float32), "cuda")


def leaf(array: Any) -> tt.Tensor:
    tensor = tt.Tensor(array)
    tensor.requires_grad = True
    return tensor


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gelu", "layer_norm", "linear", "dropout", "dropout_add", "cross_entropy"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_layout(name: str, layout: str, precision: str) -> None:
    """A kernel reads contiguous memory; a view of another layout gives what its copy gives."""
    xp = backend.xp_for("cuda")
    base = on_device(24, 24)
    if precision == "bf16" and name in ROUNDED:
        base = base.astype(BFLOAT16)
    view = LAYOUTS[layout](base)
    n, width = view.shape
    others = {
        "layer_norm": [np.ones(width, "f")],
        "linear": [np.ones((3, width), "f")],
        "dropout": [0.5],
        "dropout_add": [np.ones((n, width), "f"), 0.5],
        "cross_entropy": [IDS[:n]],
    }.get(name, [])
    others = [tt.Tensor(xp.asarray(a)) if isinstance(a, np.ndarray) and a.dtype == np.float32 else a for a in others]
    key = {"key": KEY} if name.startswith("dropout") else {}

    def gradient(x: Any) -> list[np.ndarray]:
        x = leaf(x)
        with tt.precision(precision):
            y = INFO[name].function(x, *others, **key)
        y.backward(tt.Tensor(xp.broadcast_to(xp.asarray(np.float32(0.5)).astype(y.dtype), y.shape)))
        return [y.numpy(), x.grad.numpy()]

    for a, b in zip(gradient(view), gradient(view.copy()), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_weight_of_any_layout(layout: str, precision: str) -> None:
    def gradients(w: Any) -> list[np.ndarray]:
        x, w = leaf(on_device(7, w.shape[1])), leaf(w)
        with tt.precision(precision):
            tt.cast(tt.linear(x, w), "float32").sum().backward()
        return [x.grad.numpy(), w.grad.numpy()]

    view = LAYOUTS[layout](on_device(24, 24))
    for a, b in zip(gradients(view), gradients(view.copy()), strict=True):
        assert np.array_equal(a, b)


def test_linear_of_bfloat16_where_products_are_of_float32() -> None:
    """As after a layer_norm in another precision."""
    x, w = leaf(on_device(5, 8).astype(BFLOAT16)), leaf(on_device(3, 8))
    tt.linear(x, w).sum().backward()
    assert x.grad.dtype == BFLOAT16 and relative_error(x.grad.numpy(), np.tile(w.numpy().sum(axis=0), (5, 1))) < 1e-2
    assert relative_error(w.grad.numpy(), np.tile(x.numpy().astype(np.float64).sum(axis=0), (3, 1))) < 1e-6


@pytest.mark.parametrize("name", ["layer_norm", "linear"])
def test_a_gradient_that_began_in_a_slice_of_another_layout_is_added_to(name: str) -> None:
    def gradient(device: str) -> np.ndarray:
        x = leaf(backend.to_device(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8), device))
        scale = tt.Tensor(backend.to_device(np.arange(32, dtype=np.float32).reshape(4, 8), device))
        h = x * 2
        if name == "layer_norm":
            y = tt.layer_norm(h, tt.ones(8, device=device))
        else:
            y = tt.linear(tt.ones(3, 8, device=device), h)
        ((y * y * y).sum() + (h[:, :4].T * scale).sum()).backward()
        return x.grad.numpy()

    np.testing.assert_allclose(gradient("cuda"), gradient("cpu"), rtol=1e-4, atol=1e-4)


def test_more_sequences_than_a_grid_is_high() -> None:
    q = leaf(on_device(2**16, 1, 1, 16).astype(BFLOAT16))
    y = tt.causal_attention(q, q, q)
    assert np.array_equal(y.numpy(), q.numpy())


@pytest.mark.parametrize("target", [7, -1])
def test_a_target_that_is_no_column_is_a_loss_of_nan(target: int) -> None:
    """On a GPU ids are not looked at beforehand: that would be to wait for it."""
    targets = backend.to_device(np.array([3, target]), "cuda")
    assert np.isnan(tt.cross_entropy(tt.Tensor(on_device(2, 7)), targets).item())
    assert np.isfinite(tt.cross_entropy(tt.Tensor(on_device(2, 7)), targets, ignore_index=target).item())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_adamw_and_the_norm(steps: int, dtype: str) -> None:
    """One pass over the flat buffer, or the formula: what NumPy's blocks do, but for the last bits."""
    arrays = [np.random.default_rng(0).standard_normal(shape).astype(dtype) for shape in [(5, 7), (3,), (1200,)]]
    results, norms = [], []
    for device in ("cpu", "cuda"):
        parameters = [tt.nn.Parameter(backend.to_device(a.copy(), device)) for a in arrays]
        groups = [{"params": parameters[:2], "weight_decay": 0.3}, {"params": parameters[2:], "weight_decay": 0.0}]
        adamw = tt.optim.AdamW(groups, lr=0.1)
        for _ in range(steps):
            sum((p * p * p).sum() for p in parameters).backward()
            norms.append(tt.optim.clip_grad_norm_(parameters, 1.0))
            adamw.step()
            adamw.zero_grad()
        results.append([p.numpy() for p in parameters])
    assert norms[:steps] == pytest.approx(norms[steps:], rel=1e-6)
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
