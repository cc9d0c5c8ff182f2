"""`gemm` in cuBLAS's place: every layout it takes, against NumPy."""

from typing import Any

import numpy as np
import pytest

from tinytensor import backend
from tinytensor.backend import cublas
from tinytensor.backend.cublas import gemm

RNG = np.random.default_rng(1)
BFLOAT16 = backend.bfloat16()

pytestmark = pytest.mark.usefixtures("cuda")


def matrix(rows: int, columns: int, layout: str, dtype: Any = np.float32, stack: tuple[int, ...] = ()) -> Any:
    """Random numbers on the device whose memory lies so; what lies between them is NaN."""
    if layout == "by columns":
        return matrix(columns, rows, "by rows", dtype, stack).swapaxes(-1, -2)
    width = columns + (3 if layout == "padded" else 0)
    memory = np.full((*stack, rows, width), np.nan, dtype)
    memory[..., :columns] = RNG.standard_normal((*stack, rows, columns))
    return backend.to_device(memory, "cuda")[..., :columns]


LAYOUTS = ["by rows", "by columns", "padded"]


@pytest.mark.parametrize("a_layout", LAYOUTS)
@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 7), (1, 4, 3), (4, 1, 3), (3, 4, 1), (33, 65, 16)], ids=str)
@pytest.mark.parametrize("stack", [(), (1,), (3,)], ids=str)
def test_products(a_layout: str, b_layout: str, sizes: tuple[int, int, int], stack: tuple[int, ...]) -> None:
    m, n, k = sizes
    a, b = matrix(m, k, a_layout, stack=stack), matrix(k, n, b_layout, stack=stack)
    out = matrix(m, n, "padded", stack=stack)
    exact = a.get().astype(float) @ b.get().astype(float)
    before = out.get().astype(float)
    assert gemm(a, b, out) is out
    np.testing.assert_allclose(out.get(), exact, rtol=1e-5, atol=1e-5)
    gemm(a, b, out, alpha=0.5, accumulate=True)
    np.testing.assert_allclose(out.get(), 1.5 * exact, rtol=1e-5, atol=1e-5)
    if stack == ():
        out[...] = backend.to_device(before.astype("f"), "cuda")
        gemm(a, b, out, alpha=-1, accumulate=True)
        np.testing.assert_allclose(out.get(), before - exact, rtol=1e-5, atol=1e-5)
        assert np.isnan(out.base.get()[:, n:]).all(), "it wrote beside the result"


def test_bfloat16_adds_up_in_float32() -> None:
    a, b = matrix(3, 600, "by rows", BFLOAT16), matrix(600, 5, "by columns", BFLOAT16)
    exact = a.get().astype(float) @ b.get().astype(float)
    wide = gemm(a, b, matrix(3, 5, "by rows"))
    np.testing.assert_allclose(wide.get(), exact, rtol=1e-4, atol=1e-4)
    narrow = gemm(a, b, matrix(3, 5, "by rows", BFLOAT16))
    assert np.array_equal(narrow.get(), wide.get().astype(BFLOAT16))


def test_tf32_rounds_the_factors_and_fp32_does_not() -> None:
    a, b = matrix(8, 64, "by rows"), matrix(64, 8, "by rows")
    exact = a.get().astype(float) @ b.get().astype(float)
    errors = [np.linalg.norm(gemm(a, b, matrix(8, 8, "by rows"), tf32=tf32).get() - exact) for tf32 in (False, True)]
    errors /= np.linalg.norm(exact)
    assert errors[0] < 1e-6 < 1e-5 < errors[1] < 2e-3


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (4, 5), (2, 5)), r"shapes \(2, 3\) and \(4, 5\) do not multiply into \(2, 5\)"),
        (((2, 3), (3, 5), (2, 4)), "do not multiply into"),
        (((2, 2, 3), (3, 5), (2, 2, 5)), "do not multiply into"),
        (((2, 2, 2, 3), (2, 2, 3, 5), (2, 2, 2, 5)), "do not multiply into"),
    ],
)
def test_shapes_that_do_not_fit(shapes: Any, message: str) -> None:
    xp = backend.xp_for("cuda")
    with pytest.raises(ValueError, match=message):
        gemm(*(xp.zeros(s, np.float32) for s in shapes))


def test_layouts_and_dtypes_that_cublas_cannot_take() -> None:
    xp = backend.xp_for("cuda")
    a = xp.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match=r"no axis of a matrix of shape \(2, 2\) has stride 1"):
        gemm(a[::2, ::2], a[:2, :2], a[:2, :2])
    with pytest.raises(ValueError, match="the result needs rows of stride 1"):
        gemm(a, a, xp.zeros((4, 4), np.float32).T)
    with pytest.raises(TypeError, match="cannot multiply float32 by bfloat16 into float32"):
        gemm(a, a.astype(BFLOAT16), a)
    with pytest.raises(TypeError, match="cannot multiply float64 by float64 into float64"):
        gemm(*[xp.zeros((2, 2))] * 3)


def test_a_failure_names_the_function_and_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    library = cublas.load()
    monkeypatch.setattr(type(library), "cublasGemmEx", lambda *_: 13, raising=False)
    a = backend.to_device(np.zeros((2, 2), np.float32), "cuda")
    with pytest.raises(RuntimeError, match="cublasGemmEx failed with cuBLAS status 13"):
        gemm(a, a, a.copy())
