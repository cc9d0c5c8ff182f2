"""The surface: making tensors, dtypes and devices, leaving for Python and NumPy, random numbers."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from tinytensor import backend
from tinytensor.backend import random
from tinytensor.testing import gradcheck

# -- making tensors


@pytest.mark.parametrize(
    ("data", "dtype", "shape"),
    [
        (1.5, "float32", ()),
        (3, "int64", ()),
        (True, "bool", ()),
        ([1, 2.5], "float32", (2,)),
        ([[1, 2], [3, 4]], "int64", (2, 2)),
        ((1.0, 2.0), "float32", (2,)),
        ([], "float32", (0,)),
        (np.float64(1), "float64", ()),
        (np.float16(1), "float16", ()),
        (np.ones(2), "float64", (2,)),
        (np.ones(2, np.int8), "int8", (2,)),
        ([np.float64(1.0)], "float32", (1,)),
        (tt.ones(2), "float32", (2,)),
        ([tt.tensor(1.0), tt.tensor(2.0)], "float32", (2,)),
        ([tt.ones(2), [3.0, 4.0]], "float32", (2, 2)),
        (range(3), "int64", (3,)),
    ],
    ids=repr,
)
def test_tensor_takes_numbers_lists_arrays_and_tensors(data: Any, dtype: str, shape: tuple[int, ...]) -> None:
    t = tt.tensor(data)
    assert (t.dtype, t.shape, t.device, t.requires_grad) == (np.dtype(dtype), shape, "cpu", False)
    np.testing.assert_array_equal(
        t.data, np.asarray([d.data if isinstance(d, tt.Tensor) else d for d in data] if shape else data)
    )


def test_tensor_copies_and_as_tensor_shares() -> None:
    a = np.ones(3)
    t, same = tt.tensor(a), tt.as_tensor(a)
    a[0] = 5
    assert t.tolist() == [1, 1, 1] and same.tolist() == [5, 1, 1]
    u = tt.tensor(t)
    u[0] = 9.0
    assert t.tolist() == [1, 1, 1]
    assert tt.as_tensor(t) is t
    assert tt.as_tensor(t, "float32").dtype == np.float32
    assert not tt.tensor(tt.ones(1, requires_grad=True)).requires_grad


@pytest.mark.parametrize("dtype", list(backend.DTYPES))
def test_every_dtype(dtype: str) -> None:
    for wanted in (dtype, np.dtype(dtype), np.dtype(dtype).type):
        assert tt.tensor([0, 1], wanted).dtype == tt.zeros(2, dtype=wanted).dtype == np.dtype(dtype)
        for source in backend.DTYPES:
            x = tt.ones(2, dtype=source)
            assert x.astype(wanted).dtype == x.to(wanted).dtype == tt.cast(x, wanted).dtype == np.dtype(dtype)
    x = tt.ones(2, dtype=dtype)
    assert x.astype(dtype) is x and x.clone() is not x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tt.tensor([[1.0], [1.0, 2.0]]), ValueError, "cannot make an array of this list"),
        (lambda: tt.tensor("two"), TypeError, "dtype <U3 from str; use numbers"),
        (lambda: tt.tensor(None), TypeError, "dtype object from NoneType"),
        (lambda: tt.tensor(1j), TypeError, "complex128"),
        (lambda: tt.tensor([1.0], "float128"), TypeError, "dtype 'float128' is not supported; use one of float16, float32"),
        (lambda: tt.zeros(2, dtype="complex64"), TypeError, "dtype 'complex64' is not supported"),
        (lambda: tt.zeros(2, -1), ValueError, r"no negative sizes, got \(2, -1\)"),
        (lambda: tt.tensor([1], requires_grad=True), TypeError, "only floating-point tensors have gradients"),
        (lambda: tt.zeros(2, device="tpu"), ValueError, "device 'tpu' is not known; use 'cpu' or 'cuda'"),
    ],
)
def test_what_is_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_creation() -> None:
    assert tt.zeros(2, 3).shape == tt.zeros((2, 3)).shape == tt.zeros([2, 3]).shape == tt.rand(2, 3).shape == (2, 3)
    assert tt.zeros().shape == tt.ones(()).shape == tt.randn().shape == ()
    assert tt.ones(2, dtype="int64").tolist() == [1, 1]
    assert tt.full((2,), 7).tolist() == tt.full(2, 7.0).tolist() == [7, 7]
    assert tt.full(2, 7).dtype == np.float32
    x = tt.full((2, 2), 3, dtype="float64")
    assert tt.zeros_like(x).tolist() == [[0, 0], [0, 0]] and tt.ones_like(x).dtype == np.float64
    assert tt.arange(3).tolist() == [0, 1, 2] and tt.arange(3).dtype == np.int64
    assert tt.arange(1, 2, 0.5).tolist() == [1, 1.5] and tt.arange(0.5).dtype == np.float32
    assert tt.arange(3, dtype="float64").dtype == np.float64
    assert tt.eye(2, 3).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert tt.zeros(2, requires_grad=True).requires_grad
    drawn = tt.randint(-2, 3, (1000,))
    assert drawn.dtype == np.int64 and set(drawn.tolist()) == {-2, -1, 0, 1, 2}
    assert tt.randint(0, 9, 3).shape == tt.randint(0, 9, np.int64(3)).shape == (3,)


# -- devices


def has_gpu() -> bool:
    try:
        backend.xp_for("cuda")
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize(
    "make",
    [
        lambda: tt.tensor([1.0], device="cuda"),
        lambda: tt.as_tensor([1.0], device="cuda"),
        lambda: tt.zeros(2, device="cuda"),
        lambda: tt.ones(2, device="cuda"),
        lambda: tt.full(2, 1.0, device="cuda"),
        lambda: tt.arange(2, device="cuda"),
        lambda: tt.eye(2, device="cuda"),
        lambda: tt.rand(2, device="cuda"),
        lambda: tt.randn(2, device="cuda"),
        lambda: tt.randint(0, 2, 2, device="cuda"),
        lambda: tt.ones(2).to("cuda"),
        lambda: tt.nn.Linear(2, 2).to("cuda"),
    ],
)
def test_without_a_gpu_cuda_is_refused_and_never_replaced(make: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match='device "cuda"'):
        make()


def test_to_the_same_device_is_the_same_tensor() -> None:
    x = tt.ones(2)
    assert x.to("cpu") is x


# -- leaving


def test_repr() -> None:
    assert repr(tt.tensor([1.0, 2.0])) == "tensor([1., 2.], shape=(2,), dtype=float32)"
    assert repr(tt.tensor(3)) == "tensor(3, shape=(), dtype=int64)"
    assert repr(tt.ones(1, requires_grad=True)).endswith("dtype=float32, requires_grad=True)")
    assert repr(tt.ones(1, requires_grad=True).exp()).endswith("op=exp)")
    assert len(repr(tt.zeros(1000, 1000))) < 500
    assert "[]" in repr(tt.zeros(0))


def test_item_tolist_and_numpy() -> None:
    x = tt.tensor([[1.5]])
    assert x.item() == 1.5 and type(x.item()) is float and type(tt.tensor(2).item()) is int
    assert x.tolist() == [[1.5]]
    assert x.numpy() is x.data and x.detach().numpy() is x.data
    with pytest.raises(ValueError, match=r"exactly one element, this tensor has shape \(2,\)"):
        tt.ones(2).item()


def test_conversions() -> None:
    assert float(tt.tensor([2.5])) == 2.5 and int(tt.tensor(2.9)) == 2
    assert bool(tt.tensor([1])) and not tt.tensor(0.0)
    assert [10, 20, 30][tt.tensor(1)] == 20 and list(range(tt.tensor(3))) == [0, 1, 2]
    with pytest.raises(TypeError, match="only integer tensors can be an index, not float32"):
        [1, 2][tt.tensor(1.0)]
    with pytest.raises(ValueError, match="exactly one element"):
        bool(tt.ones(2))
    assert np.asarray(tt.ones(2)).dtype == np.float32
    assert np.asarray(tt.ones(2), dtype=np.float64).dtype == np.float64
    assert np.array(tt.ones(2)).tolist() == [1, 1]


def test_iteration_and_length() -> None:
    x = tt.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    assert len(x) == 2 and [row.tolist() for row in x] == [[1, 2], [3, 4]]
    a, b = x
    (a * b).sum().backward()
    assert x.grad.tolist() == [[3, 4], [1, 2]]
    for broken in (len, list):
        with pytest.raises(TypeError, match="a 0-d tensor has no length"):
            broken(tt.tensor(1.0))


def test_comparison() -> None:
    x, y = tt.tensor([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])
    assert (x == y).tolist() == [True, False, False] and (x != y).tolist() == [False, True, True]
    assert (x < y).tolist() == (y > x).tolist() == [False, True, False]
    assert (x <= y).tolist() == (y >= x).tolist() == [True, True, False]
    assert (x > 1).tolist() == (x > 1).tolist() == [False, True, True]
    assert ((x > 1) & (x < 3)).tolist() == [False, True, False]
    assert ((x > 2) | (x < 2)).tolist() == (~(x == 2)).tolist() == [True, False, True]
    assert ((y > 1) & (x > 1)).tolist() == [False, True, True] and ((y > 2) | (x > 2)).tolist() == [False, True, True]
    assert (True & (x > 1)).tolist() == (False | (x > 1)).tolist() == [False, True, True]
    assert (x == x).dtype == bool and isinstance(x == x, tt.Tensor)
    assert len({x, x, tt.tensor([1.0])}) == 2  # tensors are hashed by identity


def test_operators_equal_the_functions() -> None:
    x, y = tt.tensor([1.0, 2.0]), tt.tensor([3.0, 5.0])
    pairs = [
        (x + 1, tt.add(x, 1)),
        (1 + x, tt.add(1, x)),
        (x - y, tt.sub(x, y)),
        (1 - x, tt.sub(1, x)),
        (x * 2, tt.mul(2, x)),
        (1 / x, tt.div(1, x)),
        (x / y, tt.div(x, y)),
        (x**2, tt.pow(x, 2)),
        (2**x, tt.pow(2, x)),
        (x @ y, tt.matmul(x, y)),
        ([1.0, 2.0] @ y, tt.matmul(x, y)),
        (-x, tt.neg(x)),
        (abs(-x), tt.abs(x)),
        (x.T, tt.transpose(x)),
    ]
    assert all(a.tolist() == b.tolist() for a, b in pairs)


# Each method with arguments that are not its defaults.
METHODS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "relu"], ()),
    **dict.fromkeys(["silu", "softplus", "erf", "abs"], ()),
    "gelu": ("none",),
    "clip": (0.5, 1.0),
    **dict.fromkeys(["sum", "mean", "max", "min", "logsumexp", "prod", "argmax", "argmin"], (1, True)),
    "var": (1, True, 1),
    "std": (1, True, 1),
    **dict.fromkeys(["softmax", "log_softmax", "cumsum", "squeeze", "unsqueeze", "flip"], (0,)),
    "reshape": (3, 2),
    "broadcast_to": (4, 2, 3),
    "expand": (4, -1, -1),
    "transpose": (1, 0),
    "swapaxes": (0, 1),
    "tril": (1,),
    "triu": (1,),
    "split": ([1, 2], 1),
    "chunk": (3, 1),
    "gather": (1, [[0], [2]]),
    "scatter_add": (1, [[0], [2]], np.ones((2, 1), np.float32)),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_equal_the_functions(name: str) -> None:
    x = tt.tensor([[0.3, 0.7, 1.2], [0.1, 2.0, 0.9]])
    x = x[:1] if name == "squeeze" else x
    ours, theirs = getattr(x, name)(*METHODS[name]), getattr(tt, name)(x, *METHODS[name])
    for a, b in zip(ours, theirs, strict=True) if isinstance(ours, list) else [(ours, theirs)]:
        assert a.tolist() == b.tolist() and a.shape == b.shape


# -- NumPy's functions


X, Y = np.array([[0.3, 0.7, 1.2], [0.1, 2.0, 0.9]]), np.array([[0.5, 0.2, 1.0], [0.4, 1.1, 3.0]])
NUMPY: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "add": (lambda x, y: np.add(x, y), lambda x, y: x + y),
    "subtract": (lambda x, y: np.subtract(x, y), lambda x, y: x - y),
    "multiply": (lambda x, y: np.multiply(x, y), lambda x, y: x * y),
    "divide": (lambda x, y: np.divide(x, y), lambda x, y: x / y),
    "power": (lambda x, y: np.power(x, y), lambda x, y: x**y),
    "negative": (lambda x, y: np.negative(x), lambda x, y: -x),
    "matmul": (lambda x, y: np.matmul(x, y.T), lambda x, y: x @ y.T),
    "maximum": (lambda x, y: np.maximum(x, y), lambda x, y: tt.maximum(x, y)),
    "minimum": (lambda x, y: np.minimum(x, y), lambda x, y: tt.minimum(x, y)),
    "absolute": (lambda x, y: np.abs(x - y), lambda x, y: (x - y).abs()),
    **{
        name: (lambda x, y, name=name: getattr(np, name)(x), lambda x, y, name=name: getattr(x, name)())
        for name in ["exp", "expm1", "log", "log1p", "sqrt", "sin", "cos", "tanh"]
    },
    "square": (lambda x, y: np.square(x), lambda x, y: x * x),
    **{
        name: (lambda x, y, n=name: getattr(np, n)(x, axis=1, keepdims=True), lambda x, y, n=name: getattr(x, n)(1, True))
        for name in ["sum", "mean", "var", "std", "max", "min", "prod"]
    },
    "var of a sample": (lambda x, y: np.var(x, axis=0, ddof=1), lambda x, y: x.var(0, ddof=1)),
    "add.reduce": (lambda x, y: np.add.reduce(x), lambda x, y: x.sum(0)),
    "maximum.reduce": (lambda x, y: np.maximum.reduce(x, axis=1), lambda x, y: x.max(1)),
    "cumsum": (lambda x, y: np.cumsum(x), lambda x, y: x.reshape(-1).cumsum()),
    "cumsum along": (lambda x, y: np.cumsum(x, axis=0), lambda x, y: x.cumsum(0)),
    "clip": (lambda x, y: np.clip(x, 0.25, 1), lambda x, y: x.clip(0.25, 1)),
    "where": (lambda x, y: np.where(X > 0.5, x, y), lambda x, y: tt.where(X > 0.5, x, y)),
    "reshape": (lambda x, y: np.reshape(x, (3, 2)), lambda x, y: x.reshape(3, 2)),
    "transpose": (lambda x, y: np.transpose(x, (1, 0)), lambda x, y: x.T),
    "swapaxes": (lambda x, y: np.swapaxes(x, 0, 1), lambda x, y: x.T),
    "squeeze": (lambda x, y: np.squeeze(x[:1]), lambda x, y: x[0]),
    "expand_dims": (lambda x, y: np.expand_dims(x, 1), lambda x, y: x[:, None]),
    "broadcast_to": (lambda x, y: np.broadcast_to(x, (2, 2, 3)), lambda x, y: x.expand(2, 2, 3)),
    "concatenate": (lambda x, y: np.concatenate([x, y], axis=1), lambda x, y: tt.concat([x, y], 1)),
    "stack": (lambda x, y: np.stack([x, y], axis=-1), lambda x, y: tt.stack([x, y], -1)),
    "flip": (lambda x, y: np.flip(x, 1), lambda x, y: x.flip(1)),
    "tril": (lambda x, y: np.tril(x), lambda x, y: x.tril()),
    "triu": (lambda x, y: np.triu(x, 1), lambda x, y: x.triu(1)),
    "einsum": (lambda x, y: np.einsum("ij,kj->ik", x, y), lambda x, y: x @ y.T),
    "an array first": (lambda x, y: Y * x + np.float64(2) * y, lambda x, y: x * Y + y * 2),
}


@pytest.mark.parametrize("name", NUMPY)
def test_numpys_functions_are_the_ops(name: str) -> None:
    numpys, own = NUMPY[name]
    x, y = tt.tensor(X), tt.tensor(Y)
    np.testing.assert_allclose(numpys(x, y).data, own(x, y).data, 1e-15)
    np.testing.assert_allclose(numpys(x, y).data, numpys(X, Y), 1e-14)
    assert gradcheck(numpys, [X, Y])


def test_numpys_questions_are_answered_without_gradients() -> None:
    x = tt.tensor([[1.0, -2.0, np.nan]], requires_grad=True)
    assert np.sign(x).tolist()[0][:2] == [1, -1] and np.isnan(x).tolist() == [[False, False, True]]
    assert np.isfinite(x).tolist() == [[True, True, False]]
    assert (np.shape(x), np.ndim(x), np.size(x)) == ((1, 3), 2, 3)
    assert np.zeros_like(x).tolist() == [[0, 0, 0]] and np.ones_like(x, dtype="int64").dtype == np.int64
    assert np.argmax(x[:, :2]).item() == 0 and np.argmin(x[:, :2], axis=1).tolist() == [1]
    assert np.greater(x, 0).tolist() == [[True, False, False]] and np.less_equal(1, x).tolist() == [[True, False, False]]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: np.add(x, 1, out=np.zeros(2)),
        lambda x: np.sum(x, out=np.zeros(())),
        lambda x: np.sum(x, dtype="float64"),
        lambda x: np.add(x, 1, where=np.array([True, False])),
        lambda x: np.add.accumulate(x),
        lambda x: np.linalg.svd(x),
        lambda x: np.sort(x),
        lambda x: np.zeros(2).__iadd__(x),
        lambda x: np.reshape(x, (2,), order="F"),
    ],
)
def test_what_numpy_cannot_ask_is_refused(call: Callable[..., Any]) -> None:
    with pytest.raises(TypeError):
        call(tt.ones(2))


# -- random numbers


def test_the_same_seed_gives_the_same_numbers() -> None:
    def draw() -> list[Any]:
        return [tt.rand(3).tolist(), tt.randn(2, 2).tolist(), tt.randint(0, 100, 5).tolist(), tt.dropout(tt.ones(9)).tolist()]

    first, second = (tt.manual_seed(7), draw())[1], draw()
    assert first != second
    tt.manual_seed(7)
    assert draw() == first
    tt.manual_seed(8)
    assert draw() != first


def test_a_key_gives_the_same_numbers_in_any_thread_and_order() -> None:
    keys = [random.Key(3, stream, step, 0, call) for stream in "ab" for step in range(4) for call in range(4)]

    def draw(key: random.Key) -> bytes:
        return random.normal(key, (50,), np.dtype(np.float32)).tobytes() + random.keep_mask(key, (50,), 0.5).tobytes()

    alone = {key: draw(key) for key in keys}
    assert len(set(alone.values())) == len(keys)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(draw, keys[::-1])) == [alone[key] for key in keys[::-1]]


def test_scope() -> None:
    def draw(step: int, micro_step: int = 0) -> list[float]:
        with random.scope(5, step, micro_step):
            return [*tt.rand(2).tolist(), *tt.rand(2).tolist()]

    once = draw(3)
    assert draw(3) == once and draw(4) != once and draw(3, 1) != once
    with random.scope(5, 3):
        inner = draw(4)
        outside = tt.rand(2).tolist()
    assert inner == draw(4) and outside == once[:2]  # the inner scope counted on its own
    tt.manual_seed(1)
    before = tt.rand(2).tolist()
    tt.manual_seed(1)
    draw(3)
    assert tt.rand(2).tolist() == before
    with pytest.raises(KeyError), random.scope(5):
        raise KeyError
    assert random.next_key("x") == random.Key(1, "x", call=1)


def test_scope_is_local_to_a_thread() -> None:
    with random.scope(5, 3), ThreadPoolExecutor(1) as pool:
        assert pool.submit(random.next_key, "x").result().step == 0
        assert random.next_key("x") == random.Key(5, "x", 3, 0, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_uniform_and_normal_have_their_moments(dtype: str) -> None:
    n = 200_000
    u, z = tt.rand(n, dtype=dtype).data, tt.randn(n, dtype=dtype).data
    assert u.dtype == z.dtype == dtype
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5 and abs(u.var() - 1 / 12) < 1e-3
    assert abs(z.mean()) < 5 / n**0.5 and abs(z.var() - 1) < 0.02 and abs((z**3).mean()) < 0.05


@pytest.mark.parametrize("p", [0.0, 1e-7, 0.1, 0.5, 0.9, 0.99999, 1.0])
def test_keep_mask_keeps_with_its_exact_probability(p: float) -> None:
    n = 400_000
    kept = random.keep_mask(random.Key(1, "mask"), (n,), p).sum()
    q = random.keep_probability(p)
    assert abs(q - (1 - p)) <= 2**-16
    assert abs(kept - n * q) <= 5 * (n * q * (1 - q)) ** 0.5
    assert (q * 2**16).is_integer() and (q == 0) == (p == 1)


def test_neighbours_in_a_mask_are_independent() -> None:
    mask = random.keep_mask(random.Key(2, "mask"), (400, 1000), 0.5)
    for a, b in ((mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1]), (mask[:, 4:], mask[:, :-4])):
        assert abs((a == b).mean() - 0.5) < 5 * 0.5 / a.size**0.5


@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_dropout_is_unbiased(p: float) -> None:
    y = tt.dropout(tt.ones(400_000, dtype="float64"), p).data
    q = random.keep_probability(p)
    assert set(np.unique(y)) == {0, 1 / q}
    assert abs(y.mean() - 1) < 5 * ((1 - q) / q / y.size) ** 0.5


def test_dropout_in_evaluation_is_the_tensor_itself() -> None:
    x = tt.ones(3)
    assert tt.dropout(x, 0.5, training=False) is x and tt.dropout(x, 0.0) is x


# -- what importing costs


def test_importing_needs_numpy_alone() -> None:
    code = (
        "import sys, tinytensor\n"
        "others = 'torch matplotlib rich cupy threadpoolctl tyro safetensors hypothesis pytest scipy wandb mpi4py minigpt'\n"
        "print([m for m in others.split() if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_float64_stays_float64_after_pickling() -> None:
    x = tt.tensor(pickle.loads(pickle.dumps(np.arange(3.0))))
    assert {x.sum().dtype, x.mean().dtype, x.sigmoid().dtype, (x * 2).dtype} == {np.dtype(np.float64)}


def test_the_mean_of_ones_is_one() -> None:
    assert all(tt.ones(n).mean().item() == 1 for n in range(1, 200))


def test_float16_sums_count_on() -> None:
    x = tt.ones(5000, 2, dtype="float16")
    assert x.sum(axis=0).tolist() == [5000, 5000] and x.sum().dtype == np.float16


def test_rand_stays_below_one_in_every_dtype() -> None:
    assert all(tt.rand(100_000, dtype=dtype).max().item() < 1 for dtype in ("float16", "float32", "float64"))
