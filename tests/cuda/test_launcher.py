"""A launch is held to what the kernel's source declares."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinytensor import backend
from tinytensor.backend.launcher import Source, Strided, kernels_of

SOURCE = """
#include <cuda_bf16.h>
using bf16 = __nv_bfloat16;
using u64 = unsigned long long;
// __global__ void commented(float* x)
template <typename T>
__global__ void scale(const T* __restrict__ x, T *y, const float* by, long long n) { y[threadIdx.x] = x[threadIdx.x]; }
template <int D> __global__ void __launch_bounds__(128) tiled(float* y) { y[threadIdx.x] = D; }
__global__ void plain(
    u64* place, int small, float factor) { if (place) place[0] = small + u64(factor); }
"""


@pytest.fixture
def source(cuda: Any, tmp_path: Path) -> Source:
    path = tmp_path / "kernels.cu"
    path.write_text(SOURCE)
    return Source(path)


def on_device(values: Any, dtype: Any = np.float32) -> Any:
    return backend.to_device(np.asarray(values, dtype), "cuda")


def test_kernels_and_their_parameters_are_read_from_the_source() -> None:
    assert kernels_of(SOURCE) == {
        "scale<float>": ["float*", "float*", "float*", "long long"],
        "scale<bf16>": ["bf16*", "bf16*", "float*", "long long"],
        **{f"tiled<{d}>": ["float*"] for d in (16, 32, 64)},
        "plain": ["u64*", "int", "float"],
    }


def test_every_kernel_of_the_library_is_found() -> None:
    folder = Path(backend.__file__).parent
    for name in ("kernels.cu", "flash.cu"):
        text = (folder / name).read_text()
        assert len({k.partition("<")[0] for k in kernels_of(text)}) == text.count("__global__ void")


def test_a_launch_runs(source: Source) -> None:
    place, y = on_device([0], np.uint64), on_device([0.0] * 4)
    source.launch("plain", (1,), 1, place, 40, 2.0)
    source.launch("plain", (1,), 1, None, 40, 2.0)
    source.launch("tiled<32>", (1,), 4, y)
    source.launch("tiled<16>", (1,), 2, Strided(y[::2]))
    assert place.tolist() == [42] and y.tolist() == [16, 16, 32, 32]


def test_numbers_may_be_numpys(source: Source) -> None:
    place = on_device([0], np.uint64)
    source.launch("plain", (1,), 1, place, np.int64(40), np.float32(2))
    assert place.tolist() == [42]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1,), TypeError, "kernel plain takes 3 arguments, got 1"),
        ((on_device, 1, 1.0), TypeError, r"argument 0 \(u64\*\): an array of uint64 was expected, got float32"),
        ((None, 2**31, 1.0), OverflowError, r"argument 1 \(int\): 2147483648 does not fit"),
        ((None, np.int64(2**31), 1.0), OverflowError, r"argument 1 \(int\): 2147483648 does not fit"),
        ((None, 1.5, 1.0), TypeError, r"argument 1 \(int\): a whole number was expected, got 1.5"),
        ((None, None, 1.0), TypeError, r"argument 1 \(int\): a whole number was expected, got None"),
        ((None, 1, "x"), TypeError, r"argument 2 \(float\): a number was expected, got 'x'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(source: Source, arguments: Any, error: type[Exception], message: str) -> None:
    arguments = [on_device([1.0]) if a is on_device else a for a in arguments]
    with pytest.raises(error, match=message):
        source.launch("plain", (1,), 1, *arguments)


def test_an_array_for_a_number_and_a_view_for_an_array_are_refused(source: Source) -> None:
    x = on_device(np.zeros((4, 4)))
    with pytest.raises(TypeError, match=r"argument 3 \(long long\): a whole number was expected, got"):
        source.launch("scale<float>", (1,), 1, x, x, x, x)
    with pytest.raises(ValueError, match=r"argument 1 \(float\*\): a contiguous array was expected, got strides \(4, 16\)"):
        source.launch("scale<float>", (1,), 1, x, x.T, x, 16)
    with pytest.raises(TypeError, match=r"argument 0 \(bf16\*\): an array of bfloat16 was expected, got float32"):
        source.launch("scale<bf16>", (1,), 1, x, x, x, 16)


@pytest.mark.parametrize(("grid", "block"), [((0,), 1), ((1, 65536), 1), ((1,), 1025), ((1,), 0), ((2**31,), 1)])
def test_impossible_grids_are_refused(source: Source, grid: Any, block: int) -> None:
    with pytest.raises(ValueError, match="kernel plain cannot run on a grid of"):
        source.launch("plain", grid, block, None, 1, 1.0)
