"""The emulator that stands in for a GPU runs right kernels rightly, and notices what a GPU would get wrong."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.cuda.emulate import Library, sanitizer
from tinytensor.backend import bfloat16
from tinytensor.backend.launcher import Strided

SOURCE = """
#include <cuda_bf16.h>
typedef __nv_bfloat16 bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }

template <typename T>
__global__ void __launch_bounds__(96) row_sum(const T* __restrict__ x, float* y, int n) {
    __shared__ float parts[3];
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += widen(x[blockIdx.x * n + i]);
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) y[blockIdx.x] = parts[0] + parts[1] + parts[2];
}

template <int D>
__global__ void fill(int* y) { y[threadIdx.x] = D; }

__global__ void place(int* y) {
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    y[block * blockDim.x + threadIdx.x] = 100 * blockIdx.z + 10 * blockIdx.y + blockIdx.x;
}

__global__ void shuffles(const int* x, int* y) {
    int t = threadIdx.x, v = x[t];
    y[t] = __shfl_xor_sync(~0u, v, 5);
    y[64 + t] = __shfl_down_sync(~0u, v, 3);
    y[128 + t] = __shfl_sync(~0u, v, 7);
    y[192 + t] = __ballot_sync(~0u, v % 3 == 0);
    y[256 + t] = __any_sync(~0u, v == 40);
    for (int i = 0; i < 9; ++i) v = __shfl_sync(~0u, v, (t + 1) % 32);
    y[320 + t] = v;
}

__global__ void numbers(int* y, int i, long long l, u32 u, u64 w, float f) {
    y[0] = i;
    y[1] = l >> 32;
    y[2] = u >> 16;
    y[3] = w >> 40;
    y[4] = f * 4;
    y[5] = __umul64hi(w, w);
    y[6] = __popc(u);
    y[7] = __ffs(i);
    y[8] = min(i, 3) + max(7, i);
}

__global__ void rounded(const float* x, bf16* y) { y[threadIdx.x] = __float2bfloat16(x[threadIdx.x]); }

__device__ u32 pair(const bf16* x) { return *reinterpret_cast<const u32*>(x); }

__global__ void product(const bf16* a, const bf16* b, float* c, int shift) {  // c (16, 8) += a (16, 16) b (16, 8)
    __shared__ __align__(16) bf16 rows[16 * 8 + 8];
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 128; i += 32) rows[i + shift] = b[i];
    __syncwarp();
    u32 left[4], right[2];
    for (int i = 0; i < 4; ++i) left[i] = pair(&a[(g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8]);
    load_transposed(right, rows + shift + lane % 16 * 8);
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma_16x8x16(sum, left, right);
    for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

__global__ void reverse(int* x, int wait) {
    __shared__ int all[64];
    all[threadIdx.x] = x[threadIdx.x];
    if (wait) __syncthreads();
    x[threadIdx.x] = all[63 - threadIdx.x];
}

__global__ void rotate(int* x, int wait) {
    __shared__ int all[64];
    for (int i = 0; i < 4; ++i) {
        all[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        x[threadIdx.x] = all[(threadIdx.x + 1) % 64];
        if (wait) __syncthreads();
    }
}

__global__ void chain(int* x) { x[blockIdx.x + 1] = x[blockIdx.x] + 1; }

__global__ void unwritten(float* y) {
    __shared__ float all[64];
    y[threadIdx.x] = all[threadIdx.x];
    all[threadIdx.x] = 0;
}

__global__ void two_barriers(int* x) {
    if (threadIdx.x < 40) {
        __syncthreads();
    } else {
        x[0] = 1;
        __syncthreads();
    }
}

__global__ void lost_lanes(int* x) {
    if (threadIdx.x < 20) x[0] = __shfl_xor_sync(~0u, x[0], 1);
}

__global__ void part_of_a_warp(int* x) { x[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 1); }

__global__ void early_exit(int* x) {
    if (threadIdx.x < 40) return;
    __syncthreads();
    x[threadIdx.x] = 1;
}

__global__ void write_at(float* x, int i) { x[i] = 1; }

__global__ void write_shared_at(float* x, int i) {
    __shared__ float all[4];
    for (int j = 0; j < i; ++j) all[j] = x[j];
    x[0] = all[i - 1];
}

__global__ void vector_at(float* x, int i) { *reinterpret_cast<float4*>(x + i) = make_float4(1, 2, 3, 4); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(_written(tmp_path_factory))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Library:
    if sanitizer() is None:
        pytest.skip("g++ has no AddressSanitizer here")
    return Library(_written(tmp_path_factory), sanitize=True)


def _written(folder: pytest.TempPathFactory) -> Path:
    source = folder.mktemp("kernels") / "kernels.cu"
    source.write_text(SOURCE, encoding="utf-8")
    return source


@pytest.mark.parametrize("dtype", ["float", "bf16"])
def test_block_reduction(library: Library, dtype: str) -> None:
    x = np.random.default_rng(0).integers(-9, 9, (5, 200)).astype(np.float32 if dtype == "float" else bfloat16())
    y = np.zeros(5, np.float32)
    library.launch(f"row_sum<{dtype}>", (5,), 96, x, y, 200)
    assert np.array_equal(y, x.astype(np.float32).sum(axis=1))


def test_every_instance_of_a_template_is_there(library: Library) -> None:
    y = np.zeros(2, np.int32)
    for d in (16, 32, 64):
        library.launch(f"fill<{d}>", (1,), 2, y)
        assert y.tolist() == [d, d]


def test_grid_of_three_dimensions(library: Library) -> None:
    y = np.zeros((2, 4, 3, 2), np.int32)
    library.launch("place", (3, 4, 2), 2, y)
    z, row, column, _ = np.indices(y.shape)
    assert np.array_equal(y, 100 * z + 10 * row + column)


def test_warp_operations(library: Library) -> None:
    x = np.random.default_rng(1).permutation(64).astype(np.int32)
    y = np.zeros((6, 2, 32), np.int32)
    library.launch("shuffles", (1,), 64, x, y)
    warps, lane = x.reshape(2, 32), np.arange(32)
    assert np.array_equal(y[0], warps[:, lane ^ 5])
    assert np.array_equal(y[1], np.where(lane + 3 < 32, np.roll(warps, -3, axis=1), warps))
    assert np.array_equal(y[2], np.repeat(warps[:, 7:8], 32, axis=1))
    bits = ((warps % 3 == 0).astype(np.uint32) << lane.astype(np.uint32)).sum(axis=1, dtype=np.uint32)
    assert np.array_equal(y[3].view(np.uint32), np.repeat(bits[:, None], 32, axis=1))
    assert np.array_equal(y[4], np.repeat((warps == 40).any(axis=1, keepdims=True), 32, axis=1))
    assert np.array_equal(y[5], np.roll(warps, -9, axis=1))


def test_scalars_arrive_as_their_declared_types(library: Library) -> None:
    y = np.zeros(9, np.int32)
    library.launch("numbers", (1,), 1, y, -24, 5 << 32, 0xFFF00000, 3 << 40, 2.25)
    assert y.tolist() == [-24, 5, 0xFFF0, 3, 9, (3 << 40) ** 2 >> 64, 12, 4, -17]


def test_bfloat16_rounds_to_nearest_even(library: Library) -> None:
    bits = np.random.default_rng(2).integers(0, 2**32, 1024, dtype=np.uint32)
    bits[:7] = 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF800000, 0x00000001, 0x7F800001
    x, y = bits.view(np.float32), np.zeros(1024, bfloat16())
    library.launch("rounded", (1,), 1024, x, y)
    numbers = ~np.isnan(x)
    assert np.array_equal(y[numbers], x[numbers].astype(bfloat16()))
    assert np.isnan(y[~numbers]).all()


def test_tensor_core_fragments(library: Library) -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.integers(-8, 8, shape).astype(np.float32) for shape in [(16, 16), (16, 8)])
    c = rng.integers(-8, 8, (16, 8)).astype(np.float32)
    expected = c + a @ b
    library.launch("product", (1,), 32, a.astype(bfloat16()), b.astype(bfloat16()), c, 0)
    assert np.array_equal(c, expected)


def test_misaligned_matrix_row_is_refused(library: Library) -> None:
    a, b, c = (np.zeros(n, t) for n, t in [(256, bfloat16()), (128, bfloat16()), (128, np.float32)])
    with pytest.raises(RuntimeError, match=r"kernel product: line \d+: lane 0 gives a row that is not 16-byte aligned"):
        library.launch("product", (1,), 32, a, b, c, 4)


@pytest.mark.parametrize("name", ["reverse", "rotate"])
def test_missing_barrier_is_noticed(library: Library, name: str) -> None:
    expected = np.arange(64)[::-1] if name == "reverse" else np.roll(np.arange(64), -4)
    right = np.arange(64, dtype=np.int32)
    library.launch(name, (1,), 64, right, 1)
    assert np.array_equal(right, expected)
    wrong = np.arange(64, dtype=np.int32)
    library.launch(name, (1,), 64, wrong, 0)
    assert not np.array_equal(wrong, expected)


def test_order_of_blocks_cannot_be_relied_on(library: Library) -> None:
    x = np.zeros(65, np.int32)
    library.launch("chain", (64,), 1, x)
    assert x[64] < 64


def test_shared_memory_starts_as_nan_in_every_block(library: Library) -> None:
    y = np.zeros(64, np.float32)
    library.launch("unwritten", (3,), 64, y)
    assert np.isnan(y).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two_barriers", r"threads 39 and 40 of block \(0, 0, 0\) wait for each other on lines \d+ and \d+"),
        ("lost_lanes", r"line \d+: 20 of the 32 lanes of a warp reached an operation of the whole warp"),
        ("part_of_a_warp", r"line \d+: an operation of part of a warp \(mask 0000ffff\) is not emulated"),
    ],
)
def test_hang_is_reported_and_the_next_launch_runs(library: Library, name: str, message: str) -> None:
    x = np.arange(64, dtype=np.int32)
    with pytest.raises(RuntimeError, match=f"kernel {name}: {message}"):
        library.launch(name, (1,), 64, x)
    library.launch("rotate", (1,), 64, x := np.arange(64, dtype=np.int32), 1)
    assert np.array_equal(x, np.roll(np.arange(64), -4))
    library.launch("row_sum<float>", (1,), 96, np.ones(200, np.float32), y := np.zeros(1, np.float32), 200)
    assert y[0] == 200


def test_barrier_waits_for_the_threads_that_are_left(library: Library) -> None:
    x = np.zeros(64, np.int32)
    library.launch("early_exit", (1,), 64, x)
    assert x.tolist() == [0] * 40 + [1] * 24


def test_arguments_are_held_to_their_declaration(library: Library) -> None:
    x = np.zeros((4, 4), np.float32)
    with pytest.raises(TypeError, match="an array of float32 was expected, got float64"):
        library.launch("write_at", (1,), 1, x.astype(np.float64), 0)
    with pytest.raises(ValueError, match="a contiguous array was expected"):
        library.launch("write_at", (1,), 1, x[:, 1], 0)
    with pytest.raises(TypeError, match="takes 2 arguments"):
        library.launch("write_at", (1,), 1, x)
    library.launch("write_at", (1,), 1, Strided(x[:, 1]), 4)
    library.launch("write_at", (1,), 1, x.ctypes.data, 8)
    assert np.argwhere(x).tolist() == [[1, 1], [2, 0]]


def test_source_that_is_not_cplusplus_is_reported(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken(float* x) { x[0] = undefined; }", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"broken\.cu does not compile as C\+\+:\n(?s:.*)undefined"):
        Library(source)


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("write_at", 40, "heap-buffer-overflow"),
        ("write_at", -1, "heap-buffer-overflow"),
        ("write_shared_at", 5, "out of bounds|global-buffer-overflow"),
        ("vector_at", 2, "misaligned address"),
    ],
)
def test_leaving_memory_is_found(sanitized: Library, name: str, place: int, message: str) -> None:
    x = np.zeros(40, np.float32)
    with pytest.raises(RuntimeError, match=message) as caught:
        sanitized.launch(name, (1,), 1, x, place)
    line = SOURCE[: SOURCE.index(f"void {name}(")].count("\n") + 1
    lines = [int(n) for n in re.findall(r"kernels\.cu:(\d+)", str(caught.value))]
    assert lines and line <= lines[0] <= line + 3
    assert not x.any()


def test_sanitized_kernel_writes_its_arrays(sanitized: Library) -> None:
    x = np.zeros((3, 8), np.float32)
    sanitized.launch("vector_at", (1,), 1, x[1], 4)
    assert x.tolist() == [[0] * 8, [0, 0, 0, 0, 1, 2, 3, 4], [0] * 8]
    y = np.arange(64, dtype=np.int32)
    sanitized.launch("reverse", (1,), 64, y, 1)
    assert np.array_equal(y, np.arange(64)[::-1])
