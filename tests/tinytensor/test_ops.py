"""Every op of the registry under the same checks, and checks of those checks."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinytensor as tt
from tinytensor import backend, ops
from tinytensor.autograd import Node, Op
from tinytensor.backend import Into
from tinytensor.inspect import ledger
from tinytensor.ops.elementwise import ToDevice
from tinytensor.testing import GradientMismatch, gradcheck, gradgradcheck

from .registry import OPS, A, Call, Fails, OpInfo

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:var.*degrees of freedom"),  # PyTorch's, of an empty reduction
]

INFO = {info.name: info for info in OPS}
DIFFERENTIABLE = [info for info in OPS if info.differentiable]
BINARY = [INFO[name] for name in ("add", "sub", "mul", "div", "pow", "maximum", "minimum")]
FLOATS = ["float16", "float32", "float64"]
TOLERANCE = {"float16": (1e-2, 1e-2), "float32": (2e-5, 2e-6), "float64": (1e-11, 1e-12)}


def each_call(infos: list[OpInfo] = OPS) -> Any:
    return pytest.mark.parametrize(
        ("info", "call"), [pytest.param(info, call, id=f"{info}-{call}") for info in infos for call in info.calls]
    )


def each_op(infos: list[OpInfo]) -> Any:
    return pytest.mark.parametrize("info", infos, ids=str)


def as_list(out: Any) -> list[Any]:
    return list(out) if isinstance(out, (list, tuple)) else [out]


def weights(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A gradient for an output: no two elements alike, none of them 0."""
    return (1 + 0.5 * np.cos(1.7 * np.arange(math.prod(shape)) + 0.3)).reshape(shape).astype(dtype)


def leaves_of(arrays: list[np.ndarray]) -> list[tt.Tensor]:
    """Leaves on these very arrays, whatever their layout."""
    leaves = [tt.Tensor(a) for a in arrays]
    for leaf in leaves:
        leaf.requires_grad = True
    return leaves


def run(info: OpInfo, call: Call, values: list[Any]) -> list[tt.Tensor]:
    args, kwargs = call.bind(values)
    return as_list(info.function(*args, **kwargs))


def gradients(outs: list[tt.Tensor], leaves: list[tt.Tensor], seed: Callable[..., Any] = weights) -> list[np.ndarray]:
    outs = [y for y in outs if y.requires_grad]
    seeds = [tt.Tensor(seed(y.shape, y.dtype)) for y in outs]
    grads = tt.grad(outs, leaves, grad_outputs=seeds, allow_unused=True) if outs else [None] * len(leaves)
    return [np.zeros_like(x.data) if g is None else g.data for x, g in zip(leaves, grads, strict=True)]


def in_torch(info: OpInfo, call: Call, arrays: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outputs and gradients by PyTorch."""
    leaves = [torch.from_numpy(a.copy()).requires_grad_(info.differentiable) for a in arrays]
    args, kwargs = call.bind(leaves, torch.from_numpy)
    outs = as_list(info.reference(*args, **kwargs))
    graded = [y for y in outs if y.requires_grad]
    if not graded:
        return [y.numpy() for y in outs], [np.zeros_like(a) for a in arrays]
    seeds = [torch.from_numpy(weights(tuple(y.shape), y.detach().numpy().dtype)) for y in graded]
    grads = torch.autograd.grad(graded, leaves, seeds, allow_unused=True)
    return [y.detach().numpy() for y in outs], [
        np.zeros_like(a) if g is None else g.numpy() for a, g in zip(arrays, grads, strict=True)
    ]


def assert_close(ours: list[np.ndarray], theirs: list[np.ndarray], dtype: str, what: str) -> None:
    rtol, atol = TOLERANCE[dtype]
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape, f"{what} {i}: shape {a.shape}, expected {b.shape}"
        np.testing.assert_allclose(a, b, rtol, atol, err_msg=f"{what} {i}")


# -- values and gradients


def check_against_torch(info: OpInfo, call: Call, dtype: str) -> None:
    arrays = [a.astype(dtype) for a in call.arrays(info.domain)]
    leaves = leaves_of(arrays)
    outs = run(info, call, leaves)
    theirs, their_grads = in_torch(info, call, arrays)
    assert [str(y.dtype) for y in outs] == [str(y.dtype) for y in theirs]
    assert_close([y.data for y in outs], theirs, dtype, "output")
    grads = gradients(outs, leaves)
    assert all(g.dtype == dtype for g in grads)
    assert_close(grads, their_grads, dtype, "gradient of input")


@each_call()
def test_forward_and_gradient_match_torch(info: OpInfo, call: Call) -> None:
    check_against_torch(info, call, "float32")
    check_against_torch(info, call, "float64")


@each_call(DIFFERENTIABLE)
def test_gradcheck(info: OpInfo, call: Call) -> None:
    if info.name == "cast" and "float32" in call.args:
        pytest.skip("finite differences need float64")
    assert gradcheck(lambda *xs: run(info, call, list(xs)), call.arrays(info.domain))


@each_call(DIFFERENTIABLE)
def test_gradgradcheck(info: OpInfo, call: Call) -> None:
    assert gradgradcheck(lambda *xs: run(info, call, list(xs)), call.arrays(info.domain))


@each_call([info for info in DIFFERENTIABLE if any(len(call.places()) > 1 for call in info.calls)])
def test_gradient_of_each_input_alone(info: OpInfo, call: Call) -> None:
    """What an op saves depends on which inputs want a gradient; the gradient does not."""
    arrays = call.arrays(info.domain)
    leaves = leaves_of(arrays)
    together = gradients(run(info, call, leaves), leaves)
    for i, expected in enumerate(together):
        for create_graph in (False, True):
            values = [tt.Tensor(a) for a in arrays]
            values[i].requires_grad = True
            outs = [y for y in run(info, call, values) if y.requires_grad]
            seeds = [tt.Tensor(weights(y.shape, y.dtype)) for y in outs]
            (g,) = tt.grad(outs, values[i], grad_outputs=seeds, create_graph=create_graph)
            np.testing.assert_allclose(g.data, expected, 1e-12, 1e-12)


def strided(a: np.ndarray) -> np.ndarray:
    wide = np.full([2 * n + 1 for n in a.shape], np.nan, a.dtype)
    view = wide[..., *(slice(1, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def backwards(a: np.ndarray) -> np.ndarray:
    return np.asarray(np.flip(np.flip(a).copy()))


def repeated(a: np.ndarray) -> np.ndarray:
    """Stride 0 along the first axis. Read-only, as np.broadcast_to makes it."""
    return np.broadcast_to(a[:1], a.shape) if a.ndim and a.size else a


def readonly(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


LAYOUTS = {
    "transposed": lambda a: a.T.copy().T,
    "strided": strided,
    "backwards": backwards,
    "repeated": repeated,
    "readonly": readonly,
}


@each_call()
def test_layouts(info: OpInfo, call: Call) -> None:
    """Any memory layout of inputs and gradients gives the same numbers, and nobody writes into it."""
    for name, layout in LAYOUTS.items():
        if name == "repeated" and not info.constant_ok:
            continue
        arrays = [layout(a) for a in call.arrays(info.domain)]
        before = [a.copy() for a in arrays]
        theirs, their_grads = in_torch(info, call, arrays)
        leaves, seeds = leaves_of(arrays), []

        def seed(shape: tuple[int, ...], dtype: Any, name: str = name, layout: Any = layout, seeds: Any = seeds) -> np.ndarray:
            plain = weights(shape, dtype)
            seeds.append((plain if name == "repeated" else layout(plain), plain.copy()))
            return seeds[-1][0]

        outs = run(info, call, leaves)
        assert_close([y.data for y in outs], theirs, "float64", f"{name}: output")
        assert_close(gradients(outs, leaves, seed), their_grads, "float64", f"{name}: gradient of input")
        for used, copy in [*zip(arrays, before, strict=True), *seeds]:
            np.testing.assert_array_equal(used, copy, f"{name}: an array was written into")


def takes_one_tensor_twice(call: Call) -> bool:
    return len({a.shape for a in call.places()}) == 1 < len(call.places())


@each_op([info for info in DIFFERENTIABLE if any(map(takes_one_tensor_twice, info.calls))])
def test_the_same_tensor_for_every_input(info: OpInfo) -> None:
    for call in info.calls:
        if takes_one_tensor_twice(call):
            array, *rest = call.arrays(info.domain)
            (leaf,) = leaves_of([array])
            outs = run(info, call, [leaf] * (1 + len(rest)))
            theirs, their_grads = in_torch(info, call, [array] * (1 + len(rest)))
            assert_close([y.data for y in outs], theirs, "float64", f"{call}: output")
            assert_close(gradients(outs, [leaf]), [sum(their_grads)], "float64", f"{call}: gradient")


@pytest.mark.parametrize("info", [*BINARY, INFO["where"]], ids=str)
@given(data=st.data())
def test_broadcasting(info: OpInfo, data: st.DataObject) -> None:
    count = 3 if info.name == "where" else 2
    shapes = data.draw(hnp.mutually_broadcastable_shapes(num_shapes=count, min_side=0, max_side=3, max_dims=3)).input_shapes
    call = Call(*(A(*s) for s in shapes[-2:]))
    if info.name == "where":
        call = Call(np.asarray(np.arange(math.prod(shapes[0])).reshape(shapes[0]) % 2 == 0), *call.args)
    arrays = call.arrays(info.domain)
    leaves = leaves_of(arrays)
    outs = run(info, call, leaves)
    theirs, their_grads = in_torch(info, call, arrays)
    assert_close([y.data for y in outs], theirs, "float64", "output")
    assert_close(gradients(outs, leaves), their_grads, "float64", "gradient of input")


# -- places where a formula could go wrong


def both(f: Callable[..., Any], g: Callable[..., Any], *arrays: Any, overflow: str = "ignore") -> None:
    """f on tensors and g on torch's tensors: equal values and gradients, infinities and NaN included."""
    leaves = leaves_of([np.array(a, np.float64) for a in arrays])
    theirs = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays]
    with np.errstate(divide="ignore", invalid="ignore", over=overflow):
        y, z = f(*leaves), g(*theirs)
        np.testing.assert_allclose(y.data, z.detach().numpy(), 1e-11, 1e-12)
        ours = gradients([y], leaves)
    expected = torch.autograd.grad(z, theirs, torch.from_numpy(weights(tuple(z.shape), np.float64)), allow_unused=True)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, np.zeros_like(a) if b is None else b.numpy(), 1e-11, 1e-12)


FAR = [-np.inf, -1000.0, -100.0, -0.0, 0.0, 100.0, 1000.0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("abs", [-1.0, 0.0, 1.0]),
        ("relu", [-1.0, 0.0, 1.0]),
        ("leaky_relu", [-1.0, 0.0, 1.0]),
        ("sqrt", [0.0, 1.0, np.inf]),
        ("log", [0.0, 1.0, np.inf]),
        ("sigmoid", [*FAR, np.inf]),
        ("softplus", FAR),
        ("tanh", [*FAR, np.inf]),
        ("erf", [*FAR, np.inf, 1e-300, 27.0]),
        ("silu", FAR[1:]),
        ("gelu", FAR[1:]),
        ("exp", FAR),
        ("expm1", [-1e-20, 1e-20, *FAR]),
        ("log1p", [-1e-20, 1e-20, 1e300]),
        ("logsumexp", [1000.0, 1000.0, -np.inf]),
        ("logsumexp", [-np.inf, -np.inf]),
        ("logsumexp", [np.inf, 1.0]),
        ("softmax", [1000.0, 999.0, -np.inf]),
        ("log_softmax", [1000.0, 999.0, -1000.0]),
        ("max", [1.0, 3.0, 3.0]),
        ("min", [1.0, 3.0, 1.0]),
        ("prod", [0.0, 2.0, 3.0]),
        ("prod", [2.0, 0.0, 3.0, 0.0]),
    ],
)
def test_kinks_ties_and_extremes(name: str, values: list[float]) -> None:
    both(INFO[name].function, INFO[name].reference, values, overflow="ignore" if "exp" in name[:3] else "raise")


@pytest.mark.parametrize("name", ["maximum", "minimum", "pow"])
def test_binary_ties_and_zeros(name: str) -> None:
    a, b = [0.0, 0.0, 0.0, 1.0, 2.0, 3.0, -2.0], [0.0, 1.0, 2.0, 0.0, 2.0, 1.5, 3.0]
    both(lambda a: INFO[name].function(a, np.array(b)), lambda a: INFO[name].reference(a, torch.tensor(b)), a)
    both(INFO[name].function, INFO[name].reference, a[:-1], b[:-1])


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, -1, 0.5, 2.0])
def test_power_by_a_number(exponent: float) -> None:
    both(lambda x: x**exponent, lambda x: x**exponent, [0.0, 1.0, 2.0])


def test_a_number_to_a_power() -> None:
    both(lambda x: 2.7**x, lambda x: 2.7**x, [-1.0, 0.0, 3.0])
    both(lambda x: 0.0**x, lambda x: 0.0**x, [0.0, 3.0])
    x = tt.tensor([0.3], "float64", requires_grad=True)
    (first,) = tt.grad(2.7**x, x, create_graph=True)
    (second,) = tt.grad(first, x)
    assert second.item() == pytest.approx(2.7**0.3 * math.log(2.7) ** 2, rel=1e-14)


def test_products_of_zeros_in_second_order() -> None:
    for values in ([0.0, 2.0, 3.0], [2.0, 0.0, 3.0, 0.0], [0.0, 0.0]):
        assert gradgradcheck(tt.prod, [np.array(values)])


def test_erf_is_exact_to_rounding() -> None:
    x = np.linspace(-7, 7, 20_001)
    np.testing.assert_allclose(tt.erf(tt.Tensor(x)).data, [math.erf(v) for v in x], 0, 5e-16)


def test_clip_at_its_bounds() -> None:
    both(lambda x: tt.clip(x, 0, 1), lambda x: torch.clip(x, 0, 1), [-1.0, 0.0, 0.5, 1.0, 2.0])


def test_reductions_of_nothing() -> None:
    nothing = tt.zeros(0)
    with np.errstate(invalid="ignore"):
        assert math.isnan(tt.mean(nothing).item())
        assert math.isnan(tt.var(tt.ones(1), ddof=1).item())
    assert tt.sum(nothing).item() == 0
    assert tt.prod(nothing).item() == 1
    assert math.isnan(tt.cross_entropy(tt.zeros(2, 3), [-100, -100]).item())


def test_unsigned_integers_do_not_wrap() -> None:
    x = tt.tensor([0, 5, 3], "uint8")
    assert (tt.min(x).item(), tt.argmin(x).item()) == (0, 0)
    assert tt.mse_loss(tt.tensor([3], "uint8"), tt.tensor([5], "uint8")).item() == 4
    assert tt.prod(tt.tensor([100, 100], "int8")).item() == 10_000
    assert tt.exp(tt.tensor([12], "int8")).item() == pytest.approx(math.exp(12), rel=1e-6)


@pytest.mark.parametrize(("rows", "classes"), [(5000, 65), (37, 20_000), (1, 1)])
def test_cross_entropy_keeps_its_logits_and_two_numbers_a_row(rows: int, classes: int) -> None:
    rng = np.random.default_rng(0)
    values, targets = rng.normal(0, 3, (rows, classes)), rng.integers(0, classes, rows)
    x = tt.tensor(values, "float32", requires_grad=True)
    loss = tt.cross_entropy(x * 1, targets)
    held = ledger(loss)
    assert {p.role: p.bytes for p in held.pieces if p.op == "cross_entropy"} == {
        "logits": 4 * x.size,
        "targets": 8 * rows,
        "kernel": 4 * rows,
    }
    assert sum(p.role == "kernel" for p in held.pieces) == 2
    loss.backward()
    theirs = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    F.cross_entropy(theirs, torch.tensor(targets)).backward()
    np.testing.assert_allclose(x.grad.numpy(), theirs.grad.numpy(), 1e-4, 1e-9)


def test_a_masked_logit_costs_nothing() -> None:
    logits, targets = [[0.3, -np.inf, 1.0], [-np.inf, 2.0, 0.5]], [2, 1]
    for smoothing_free in ({}, {"ignore_index": 0}):
        both(
            lambda x, kw=smoothing_free: tt.cross_entropy(x, targets, **kw),
            lambda x, kw=smoothing_free: F.cross_entropy(x, torch.tensor(targets), **kw),
            logits,
        )
    ignoring = [2, -100]
    both(lambda x: tt.cross_entropy(x, ignoring), lambda x: F.cross_entropy(x, torch.tensor(ignoring)), logits)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attention_never_sees_the_future(scale: float, dtype: str) -> None:
    """Neither its values nor how large its scores are: not forward, not backward."""
    T, rng = 70, np.random.default_rng(0)
    q, k, v = (rng.uniform(-1, 1, (T, 4)).astype(dtype) for _ in range(3))
    q, k = np.abs(q) * scale, np.abs(k)
    k[T // 2 :] *= 40  # the scores of the second half dwarf those of the first
    leaves = leaves_of([q, k, v])
    y = tt.causal_attention(*leaves)
    half = leaves_of([a[: T // 2] for a in (q, k, v)])
    z = tt.causal_attention(*half)
    seed = weights(y.shape, dtype)
    seed[T // 2 :] = 0
    np.testing.assert_allclose(y.data[: T // 2], z.data, 1e-5, 1e-6)
    assert np.isfinite(y.data).all()
    past = tt.grad(z, half, grad_outputs=tt.Tensor(seed[: T // 2]))
    for g, h in zip(tt.grad(y, leaves, grad_outputs=tt.Tensor(seed)), past, strict=True):
        np.testing.assert_allclose(g.data[: T // 2], h.data, 1e-4, 1e-5 * max(1, float(np.abs(h.data).max())))
        assert not g.data[T // 2 :].any()


def test_einsum_ignores_what_is_off_the_diagonal() -> None:
    x = tt.tensor([[1.0, math.inf], [math.nan, 3.0]])
    assert tt.einsum("ii", x).item() == 4
    assert tt.einsum("ii->i", x).tolist() == [1, 3]


@pytest.mark.parametrize(
    "index",
    [[0, 2, 0], 1, -1, [[0, 1], [2, 2]], [True, False, True]],
    ids=str,
)
def test_tensors_are_indexes(index: Any) -> None:
    x, ids = np.arange(12.0).reshape(3, 4), tt.tensor(index)
    leaf = tt.tensor(x, requires_grad=True)
    np.testing.assert_array_equal(leaf[ids].data, x[np.array(index)])
    np.testing.assert_array_equal(leaf[ids, 1].data, x[np.array(index), 1])
    leaf[ids].sum().backward()
    counts = np.zeros_like(x)
    np.add.at(counts, np.array(index), 1)
    np.testing.assert_array_equal(leaf.grad.data, counts)
    y = tt.tensor(x)
    y[ids] = -1
    x[np.array(index)] = -1
    np.testing.assert_array_equal(y.data, x)


def test_a_written_index_that_repeats_keeps_its_last_value() -> None:
    x, v = tt.tensor([1.0, 2.0], requires_grad=True), tt.tensor([5.0, 6.0, 7.0], requires_grad=True)
    y = tt.setitem(x, [0, 0, 1], v)
    assert y.tolist() == [6, 7]
    y.sum().backward()
    assert (x.grad.tolist(), v.grad.tolist()) == ([0, 0], [0, 1, 1])


# -- dtypes


@each_op([info for info in OPS if info.name != "cast"])
def test_float16_is_kept(info: OpInfo) -> None:
    for call in info.calls:
        arrays = [a.astype(np.float16) for a in call.arrays(info.domain)]
        leaves = leaves_of(arrays)
        outs = run(info, call, leaves)
        theirs, their_grads = in_torch(info, call, [a.astype(np.float64) for a in arrays])
        assert all(y.dtype == ("float16" if info.differentiable else "int64") for y in outs), str(call)
        assert_close([y.data for y in outs], theirs, "float16", f"{call}: output")
        grads = gradients(outs, leaves)
        assert all(g.dtype == np.float16 for g in grads), str(call)
        assert_close(grads, their_grads, "float16", f"{call}: gradient")


@each_op([info for info in OPS if info.integers])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_integers(info: OpInfo, dtype: str) -> None:
    """Small integers give what their float values give: no wrap-around, and float32 where a float results."""
    if dtype == "uint8" and info.name in ("sub", "neg"):
        pytest.skip("there is no −1 to give")
    for call in info.calls:
        arrays = [np.rint(np.abs(a) + 1).astype(dtype) for a in call.arrays(info.domain)]
        exact = [y.data for y in run(info, call, [tt.Tensor(a.astype(np.float64)) for a in arrays])]
        outs = run(info, call, [tt.Tensor(a) for a in arrays])
        if any(isinstance(a, float) for a in (*call.args, *call.kwargs.values())):
            assert all(y.dtype in (np.float32, dtype) for y in outs)
        elif info.integers == "int64":
            assert all(y.dtype.kind in "iu" for y in outs), f"{call}: {[str(y.dtype) for y in outs]}"
        elif not (info.name.startswith("dropout") and call.kwargs.get("training") is False):
            expected = call.args[1] if info.name == "cast" else info.integers
            assert all(y.dtype == expected for y in outs), f"{call}: {[str(y.dtype) for y in outs]}"
        if info.name != "setitem":
            assert_close([y.data for y in outs], exact, "float32", f"{call}: output")


@pytest.mark.parametrize("info", BINARY, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "other",
    [
        2,
        2.5,
        np.float64(2.5),
        np.float16(2.5),
        np.int64(2),
        np.array(2.5),
        tt.tensor(2.5, "float64"),
        tt.tensor(2.5, "float16"),
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}",
)
def test_a_number_takes_the_dtype_of_the_array(info: OpInfo, dtype: str, other: Any) -> None:
    x = tt.tensor([1.0, 2.0], dtype)
    assert info.function(x, other).dtype == dtype
    assert info.function(other, x).dtype == dtype


def test_integer_arrays_meet_floats() -> None:
    ints, floats = tt.tensor([1, 2]), tt.tensor([0.5, 0.5])
    assert (ints + floats).dtype == (ints + 0.5).dtype == (ints / 2).dtype == (ints / ints).dtype == np.float32
    assert (ints + floats.astype("float64")).dtype == np.float64
    assert tt.exp(2).dtype == tt.exp(np.array([2])).dtype == np.float32
    assert (ints * 2).dtype == (ints + True).dtype == np.int64


def test_an_unpickled_array_keeps_its_dtype() -> None:
    """Its dtype equals NumPy's own but need not be the same object."""
    for dtype in FLOATS:
        x = tt.Tensor(pickle.loads(pickle.dumps(np.ones(3, dtype))))
        x.requires_grad = True
        y = (x * 2).exp().mean() + x[0]
        y.backward()
        assert y.dtype == x.grad.dtype == dtype
        assert (tt.tensor(3.0, dtype) * x).dtype == (x + tt.ones(3, dtype=dtype)).dtype == dtype


def test_mixed_precision_gradients_have_their_inputs_dtypes() -> None:
    a, b = tt.tensor([1.0, 2.0], requires_grad=True), tt.tensor([3.0, 4.0], "float64", requires_grad=True)
    y = a * b
    assert y.dtype == np.float64
    y.sum().backward()
    assert (a.grad.dtype, b.grad.dtype) == (np.float32, np.float64)


# -- errors


@pytest.mark.parametrize(
    ("info", "failure"), [pytest.param(info, f, id=f"{info}-{f.call}") for info in OPS for f in info.errors]
)
def test_errors_name_the_op_and_the_values(info: OpInfo, failure: Fails) -> None:
    values = [tt.Tensor(a.astype(np.float32)) for a in failure.call.arrays((0.5, 1))]
    with pytest.raises(failure.error, match=failure.message):
        run(info, failure.call, values)


def test_an_error_names_the_users_line() -> None:
    with pytest.raises(ValueError, match=r"matmul\(float32\[2, 3\], float32\[2, 3\]\) at .*test_ops\.py:(\d+)") as caught:
        tt.ones(2, 3) @ tt.ones(2, 3)
    assert int(str(caught.value).split("test_ops.py:")[1].split(":")[0]) == caught.traceback[0].lineno + 1


# -- kernels against formulas

KERNELS = sorted(backend.kernels["cpu"])


@pytest.fixture
def formulas_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.kernels, "cpu", {})


def orders(info: OpInfo, call: Call, arrays: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Outputs, gradients, and gradients of the gradients."""
    leaves = leaves_of(arrays)
    outs = run(info, call, leaves)
    first = gradients(outs, leaves)
    graded = [y for y in run(info, call, leaves) if y.requires_grad]
    seeds = leaves_of([weights(y.shape, y.dtype) for y in graded])
    grads = tt.grad(graded, leaves, grad_outputs=seeds, create_graph=True, allow_unused=True)
    return [[y.data for y in outs], first, gradients([g for g in grads if g is not None], [*leaves, *seeds])]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("float64", "plain"), *(("float32", layout) for layout in ["plain", "transposed", "strided", "backwards", "readonly"])],
)
def test_kernel_equals_formula(name: str, dtype: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = INFO[name]
    assert info.large, f"{name} has a kernel: give it calls larger than a block in the registry"
    ran, kernel = [], backend.kernels["cpu"][name]

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = kernel.forward(*args, **kwargs)
        ran.append(result is not NotImplemented)
        return result

    monkeypatch.setitem(backend.kernels["cpu"], name, dataclasses.replace(kernel, forward=counted))
    for call in [*info.large, *info.calls]:
        arrays = [a.astype(dtype) for a in call.arrays(info.domain)]
        arrays = arrays if layout == "plain" else [LAYOUTS[layout](a) for a in arrays]
        fast = orders(info, call, arrays)
        with monkeypatch.context() as patch:
            patch.setitem(backend.kernels, "cpu", {})
            calls = len(ran)
            slow = orders(info, call, arrays)
            assert len(ran) == calls, "the kernel ran where the formula should"
        for order, (a, b) in enumerate(zip(fast, slow, strict=True)):
            for x, y in zip(a, b, strict=True):
                scale = max(1.0, float(np.abs(y).max(initial=0)))
                tolerance = (2e-5 if dtype == "float32" else 1e-12) * scale
                np.testing.assert_allclose(x, y, tolerance, tolerance, err_msg=f"{call}, order {order}")
    assert any(ran), f"the kernel of {name} refused every call"


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_may_leave_a_call_to_the_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = dataclasses.replace(backend.kernels["cpu"][name], forward=lambda *args, **kwargs: NotImplemented)
    monkeypatch.setitem(backend.kernels["cpu"], name, refused)
    check_against_torch(INFO[name], INFO[name].calls[0], "float64")


@pytest.mark.usefixtures("formulas_only")
@each_op([INFO[name] for name in KERNELS])
def test_formula_of_an_op_with_a_kernel(info: OpInfo) -> None:
    for call in info.calls:
        check_against_torch(info, call, "float64")
        test_gradgradcheck(info, call)


# -- the registry is complete, and the sweep notices a wrong derivative


def test_every_public_op_is_registered_once() -> None:
    assert sorted(info.name for info in OPS) == sorted(ops.__all__)


@each_op(OPS)
def test_every_op_has_calls_errors_and_a_docstring(info: OpInfo) -> None:
    assert info.calls and info.errors and info.function.__doc__
    assert len({str(c) for c in info.calls}) == len(info.calls)


def op_classes() -> list[type[Op]]:
    """Every op of the library that has a derivative and can be recorded with one device at hand."""
    elsewhere = (tt.recompute.Checkpoint, ToDevice)
    found, stack = [], [Op]
    while stack:
        for cls in stack.pop().__subclasses__():
            stack.append(cls)
            if cls.__module__.startswith("tinytensor") and hasattr(cls, "vjp") and cls not in elsewhere:
                found.append(cls)
    return sorted(found, key=lambda cls: cls.name)


def recorded(outs: list[tt.Tensor]) -> dict[type[Op], set[int]]:
    """The ops below these tensors, and which inputs of each want a gradient."""
    found: dict[type[Op], set[int]] = {}
    stack, seen = [y.node for y in outs], set()
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and node not in seen:
            seen.add(node)
            found.setdefault(node.op, set()).update(i for i, edge in enumerate(node.edges) if edge is not None)
            stack.extend(node.edges)
    return found


def inplace(x: tt.Tensor) -> tt.Tensor:
    y = x * 2
    y += x
    return y


@dataclasses.dataclass
class Witness:
    """A check that uses an op's derivative, and the places of the inputs that it differentiates."""

    check: Callable[..., Any]
    f: Callable[..., Any]
    arrays: list[np.ndarray]
    places: set[int]

    def notices(self) -> bool:
        try:
            self.check(self.f, self.arrays)
        except GradientMismatch:
            return True
        return False


@pytest.fixture(scope="module")
def witnesses() -> dict[type[Op], list[Witness]]:
    """For each op: gradcheck where a call of the registry records it, gradgradcheck where its gradient does."""
    found: dict[type[Op], list[Witness]] = {}
    calls = [(info, call) for info in DIFFERENTIABLE for call in info.calls]
    functions = [(lambda *xs, i=info, c=call: run(i, c, list(xs)), call.arrays(info.domain)) for info, call in calls]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backend.kernels, "cpu", {})
        for f, arrays in [*functions, (inplace, [np.array([0.3, 0.7])])]:
            leaves = leaves_of(arrays)
            outs = [y for y in as_list(f(*leaves)) if y.requires_grad]
            seeds = [tt.Tensor(weights(y.shape, y.dtype)) for y in outs]
            grads = tt.grad(outs, leaves, grad_outputs=seeds, create_graph=True, allow_unused=True)
            for check, results in ((gradcheck, outs), (gradgradcheck, [g for g in grads if g is not None])):
                for op, places in recorded(results).items():
                    found.setdefault(op, []).append(Witness(check, f, arrays, places))
    return found


def scaled(share: Any) -> Any:
    """One per cent too much of a gradient, in each form that a vjp may give it."""
    if isinstance(share, Into):
        return share.add(None, None) * 1.01
    if callable(share):
        return lambda: share() * 1.01
    return None if share is None else share * 1.01


def scaling(vjp: Callable[..., Any], place: int) -> Callable[..., Any]:
    def perturbed(*args: Any, **params: Any) -> Any:
        shares = vjp(*args, **params)
        shares = shares if isinstance(shares, tuple) else (shares,)
        return tuple(scaled(s) if i == place else s for i, s in enumerate(shares))

    return perturbed


@pytest.mark.usefixtures("formulas_only")
@pytest.mark.parametrize("op", op_classes(), ids=lambda op: op.name)
def test_the_sweep_notices_one_percent(op: type[Op], witnesses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert op in witnesses, f"no call in the registry uses {op.__name__}"
    exact = op.vjp
    for place in set.union(*(w.places for w in witnesses[op])):
        monkeypatch.setattr(op, "vjp", scaling(exact, place))
        assert any(w.notices() for w in witnesses[op] if place in w.places), f"input {place} of {op.__name__}"


@pytest.mark.parametrize("name", KERNELS)
def test_the_sweep_notices_one_percent_in_a_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info, kernel = INFO[name], backend.kernels["cpu"][name]
    places = {
        place
        for call in info.calls
        for place in recorded(run(info, call, leaves_of(call.arrays(info.domain)))).get(op_named(name), ())
    }
    for place in places:
        monkeypatch.setitem(backend.kernels["cpu"], name, dataclasses.replace(kernel, vjp=scaling(kernel.vjp, place)))
        checks = [Witness(gradcheck, lambda *xs, c=c: run(info, c, list(xs)), c.arrays(info.domain), set()) for c in info.calls]
        assert any(check.notices() for check in checks), f"input {place} of {name}"


def op_named(name: str) -> type[Op]:
    return next(op for op in op_classes() if op.name == name)


# -- the other device


def gpu() -> str:
    """Why there is no GPU to compare with; empty where there is one."""
    try:
        backend.xp_for("cuda")
    except RuntimeError as error:
        return str(error)
    return ""


NO_GPU = gpu()


@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
@each_op(OPS)
def test_cuda_equals_cpu(info: OpInfo) -> None:
    for call in [*info.calls, *info.large]:
        arrays = [a.astype(np.float32) for a in call.arrays(info.domain)]
        results = []
        for device in ("cpu", "cuda"):
            leaves = leaves_of([backend.to_device(a, device) for a in arrays])
            args, kwargs = call.bind(leaves, lambda ids, device=device: tt.tensor(ids, device=device))
            outs = as_list(info.function(*args, **kwargs))
            graded = [y for y in outs if y.requires_grad]
            seeds = [tt.tensor(weights(y.shape, y.dtype), device=device) for y in graded]
            grads = tt.grad(graded, leaves, grad_outputs=seeds, allow_unused=True) if graded else []
            results.append([None if t is None else t.numpy() for t in [*outs, *grads]])
        for ours, theirs in zip(*results, strict=True):
            if theirs is not None:
                np.testing.assert_allclose(ours, theirs, 2e-4, 2e-5, err_msg=str(call))
