"""The stand-in for CuPy keeps a device's rules: what would fail or wait on a GPU fails or is counted here."""

import ctypes
import importlib.util
import operator
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from tests.cuda import standin
from tests.cuda.standin import device
from tinytensor import backend
from tinytensor.backend import bfloat16, cublas
from tinytensor.backend.cublas import gemm

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
KERNEL = """
template <typename T>
__global__ void add_to(const T* x, T* y, int n, T by) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] + by;
}
__global__ void mark(float* y, long long at) { if (y) y[at] = 1; }
"""


@pytest.fixture
def cp(cuda: ModuleType) -> Any:
    import cupy

    return cupy


@pytest.fixture
def kernels(cp: Any) -> Any:
    source = KERNEL.replace("typename T", "int D").replace("const T*", "const float*").replace("T* y", "float* y")
    names = ["add_to<16>", "add_to<32>", "mark"]
    return cp.RawModule(code=source.replace("T by", "float by"), options=("-std=c++17",), name_expressions=names)


def capture(work: Callable[[], Any]) -> tuple[Any, device.Graph]:
    stream = device.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            result = work()
        finally:
            graph = stream.end_capture()
    return result, graph


def traces() -> list[Any]:
    modules = [n for n in sys.modules if n.startswith(("cupy", "tinytensor.backend.cuda"))]
    return [modules, hasattr(backend, "cuda"), id(backend.kernels["cuda"]), cublas.load, cublas._handle.cache_info().currsize]


@pytest.fixture
def no_traces() -> Iterator[list[Any]]:
    before = traces()
    yield before
    assert traces() == before


def test_fixture_undoes_what_it_did(no_traces: list[Any], cuda: ModuleType) -> None:
    ones = tt.ones(2, 2, device="cuda")
    assert (ones @ ones).sum().item() == 8 and gemm(ones.data, ones.data, ones.data) is ones.data
    assert all(a != b for a, b in zip(no_traces, traces(), strict=True))


def test_install_and_uninstall(cp: Any) -> None:
    import cupyx.scipy.special

    assert cp is sys.modules["cupy"] and cp.cuda.is_available() and cupyx.scipy.special.erf
    standin.uninstall()
    assert not [n for n in sys.modules if n.startswith("cupy")]
    other = ModuleType("cupy")
    sys.modules["cupy"] = other
    try:
        standin.install()
        assert sys.modules["cupy"] is cp
        standin.uninstall()
        assert sys.modules["cupy"] is other
    finally:
        del sys.modules["cupy"]


def test_no_implicit_conversion(cp: Any) -> None:
    x = cp.arange(3)
    for convert in (np.asarray, np.array, operator.index, lambda x: np.add(np.ones(3), [x, x]), lambda x: np.linalg.norm(x)):
        with pytest.raises(TypeError):
            convert(x)
    assert not isinstance(x, np.ndarray)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, h: x + h,
        lambda x, h: h + x,
        lambda x, h: np.add(x, h),
        lambda x, h: np.add(h, 1, out=x),
        lambda x, h: operator.iadd(x, h),
        lambda x, h: operator.iadd(h, x),
        lambda x, h: x == h,
        lambda x, h: np.concatenate([x, h]),
        lambda x, h: np.where(x > 0, x, h),
        lambda x, h: x[h.astype(int)],
        lambda x, h: x[[0, 1]],
        lambda x, h: operator.setitem(x, slice(None), h),
        lambda x, h: operator.setitem(x, h.astype(int), 1),
        lambda x, h: operator.setitem(x, 0, [1.0]),
        lambda x, h: x.dot(h),
        lambda x, h: operator.add(x, [1.0, 1.0, 1.0]),
        lambda x, h: x * h[0, ...],
        lambda x, h: np.multiply(h[0, ...], x),
        lambda x, h: operator.iadd(x, h[0, ...]),
        lambda x, h: np.where(x > 0, x, h[0, ...]),
    ],
)
def test_arrays_of_the_host_are_refused(cp: Any, mix: Callable[[Any, np.ndarray], Any]) -> None:
    x = cp.ones(3)
    with pytest.raises(TypeError):
        mix(x, np.ones(3))
    assert x.tolist() == [1, 1, 1]


@pytest.mark.parametrize("scalar", [2, 2.0, np.float32(2)])
def test_scalars_of_the_host_are_taken(cp: Any, scalar: Any) -> None:
    x = cp.ones(3, np.float32)
    for y in (x + scalar, scalar + x, np.add(x, scalar), np.add(scalar, x)):
        assert type(y) is cp.ndarray and y.tolist() == [3, 3, 3]
    x[1] = scalar
    assert x.tolist() == [1, 2, 1]


def test_an_array_of_the_host_without_dimensions_is_compared_and_assigned_only(cp: Any) -> None:
    x, scalar = cp.ones(3), np.array(2.0)
    for y in (x < scalar, x == scalar - 1, np.less(x, scalar), np.greater(scalar, x)):
        assert y.tolist() == [True] * 3
    x[1] = scalar
    x[2:].fill(scalar)
    assert x.tolist() == [1, 2, 2]


def test_results_are_arrays_of_the_device(cp: Any) -> None:
    x = cp.asarray(RNG.normal(size=(4, 3)).astype(np.float32))
    host = x.get()
    for made, expected in [
        (np.exp(x), np.exp(host)),
        (x.sum(), host.sum()),
        (np.sum(x), host.sum()),
        (np.add.reduce(x, axis=1), host.sum(axis=1)),
        (x.max(axis=0), host.max(axis=0)),
        (x.T @ x, host.T @ host),
        (1 / x - x**2, 1 / host - host**2),
        (-abs(x) < 0, -abs(host) < 0),
        (np.einsum("ij,ij->i", x, x), np.einsum("ij,ij->i", host, host)),
        (np.split(x, 2)[1], host[2:]),
        (np.arange(3, like=x), np.arange(3)),
        (np.zeros_like(x, shape=2), np.zeros(2, np.float32)),
        (cp.ogrid[:4, :3][0] + 0, np.ogrid[:4, :3][0]),
        (np.allclose(x, x), np.bool(True)),
        (next(iter(x)), host[0]),
    ]:
        assert type(made) is cp.ndarray and made.shape == expected.shape and made.dtype == expected.dtype
        assert np.array_equal(made.get(), expected)
    y = cp.zeros(4, np.float32)
    np.add.at(y, cp.asarray([1, 1, 2]), 2)
    assert y.tolist() == [0, 4, 2, 0] and np.add(y, y, out=y) is y and y.tolist() == [0, 8, 4, 0]


def test_views_share_memory(cp: Any) -> None:
    x = cp.asarray(np.arange(12.0).reshape(3, 4))
    assert x.base is None and x.data.ptr % 16 == 0
    row, element, turned = x[1], x[1, 2], x[1:].T
    for view, offset in [(row, 32), (element, 48), (turned, 32), (turned[1:], 40), (x.reshape(-1)[3:], 24), (x.T, 0)]:
        assert view.base is x and view.data.ptr == x.data.ptr + offset
    assert element.shape == () and turned.strides == (8, 32) and not turned.flags.c_contiguous and row.nbytes == 32
    row += 100
    element[...] = -1
    assert x.tolist() == [[0, 1, 2, 3], [104, 105, -1, 107], [8, 9, 10, 11]]
    for copy in (x.copy(), x[cp.asarray([1])], x.T.reshape(-1), x + 0, x.astype(np.float32), cp.ascontiguousarray(x.T)):
        assert copy.base is None and not np.shares_memory(copy, x)
    assert cp.ascontiguousarray(x) is x and x.astype(np.float64, copy=False) is x
    assert cp.ascontiguousarray(element).shape == (1,)


def test_what_cupy_lacks_is_lacking(cp: Any) -> None:
    for name in ("vecdot", "insert", "linalg", "no_such_function"):
        with pytest.raises(AttributeError):
            getattr(cp, name)
    x = cp.ones(3)
    for call in (
        lambda: np.vecdot(x, x),
        lambda: np.sum(x, where=x > 0),
        lambda: x.max(initial=3),
        lambda: cp.RawModule(code="", options=["-std=c++17"]),
        *(lambda t=t: np.add.at(x.astype(t), cp.asarray([0]), 1) for t in (bfloat16(), np.int8, np.int16)),
        lambda: np.subtract.at(x, cp.asarray([0]), 1),
    ):
        with pytest.raises(TypeError):
            call()
    for call in (lambda: np.maximum.reduce(x), lambda: np.maximum.accumulate(x), lambda: np.multiply.at(x, cp.asarray([0]), 1)):
        with pytest.raises(NotImplementedError):
            call()


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "argmax"])
def test_an_array_without_dimensions_has_no_axis(cp: Any, name: str) -> None:
    x = cp.ones(())
    assert getattr(x, name)().shape == getattr(x, name)(keepdims=True).shape == ()
    for axis in (0, -1):
        with pytest.raises(ValueError, match="out of bounds for array of dimension 0"):
            getattr(x, name)(axis=axis)


def test_what_cupy_does_with_bfloat16(cp: Any) -> None:
    from cupyx.scipy.special import erf

    half = cp.ones((2, 2), bfloat16())
    assert (half @ half).dtype == bfloat16()
    for y in (np.where(half > 0, half, 0), np.clip(half, 0, 1), half.clip(0, 1), np.tril(half), np.triu(half), erf(half)):
        assert y.dtype == np.float32
    for call in (lambda: half[None] @ half, lambda: half.cumsum(), lambda: np.cumsum(half)):
        with pytest.raises(TypeError):
            call()


def test_copies_from_the_host_are_counted(cp: Any) -> None:
    x = cp.asarray(np.ones(2))
    assert device.counts.host_copies == 1 and cp.asarray(x) is x and cp.array(x) is not x
    x.set(np.zeros(2))
    assert device.counts.host_copies == 2 and x.tolist() == [0, 0]
    with pytest.raises(TypeError):
        x.set(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="shape"):
        x.set(np.zeros(3))
    with pytest.raises(RuntimeError, match="not contiguous"):
        cp.zeros((2, 2))[:, 0].set(np.zeros(2))
    assert device.counts.host_copies == 2


def test_launches_are_counted(cp: Any) -> None:
    x = cp.zeros(4)
    before = device.counts.launches
    assert x[1:].reshape(3, 1).T.shape == (1, 3) and device.counts.launches == before
    x += 1
    x[0] = 2
    np.exp(x)
    np.empty_like(cp.empty(3))
    assert device.counts.launches == before + 3


WAITS = {
    "get": lambda x: x.get(),
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool(x[0]),
    "if": lambda x: 1 if x[0] > 0 else 0,
    "repr": repr,
    "str": str,
    "format": lambda x: f"{x}",
    "mask": lambda x: x[x > 0],
    "writing through a mask": lambda x: operator.setitem(x, x > 0, 1),
    "where": lambda x: np.where(x > 0),
    "unique": np.unique,
    "stream": lambda x: device.get_current_stream().synchronize(),
    "event": lambda x: device.Event().synchronize(),
    "device": lambda x: device.Device(0).synchronize(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_waiting_is_counted_and_refused(cp: Any, wait: Callable[[Any], Any]) -> None:
    import cupyx

    x = cp.ones(3)
    wait(x)
    assert device.counts.synchronisations == 1
    with cupyx.allow_synchronize(False), pytest.raises(RuntimeError, match="disallowed"):
        wait(x)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        capture(lambda: wait(x))
    wait(x)
    assert device.counts.synchronisations == 2


@pytest.mark.parametrize(
    "copy", [lambda cp, x: cp.asarray(np.ones(3)), lambda cp, x: cp.array(1.0), lambda cp, x: x.set(np.ones(3))]
)
def test_copying_from_the_host_cannot_be_captured(cp: Any, copy: Callable[[Any, Any], Any]) -> None:
    import cupyx

    x = cp.ones(3)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        capture(lambda: copy(cp, x))
    with cupyx.allow_synchronize(False):
        copy(cp, x)


def test_capture_runs_nothing_until_the_graph_is_launched(cp: Any, kernels: Any) -> None:
    pool = cp.cuda.MemoryPool()
    x = cp.asarray(np.arange(4, dtype=np.float32))
    total, seen, filled = (cp.zeros(shape, np.float32) for shape in ((), 4, 2))

    def work() -> Any:
        y = x * 2
        y[1:] += 1
        np.add(total, y.sum(), out=total)
        picked = x[np.argsort(-x)]  # by indices that are garbage as yet
        z = cp.zeros(4, np.float32)
        kernels.get_function("add_to<16>")((1,), (32,), (picked, z, np.int32(4), np.float32(0.5)))
        np.copyto(seen, 7)
        filled.fill(3)
        matrix = gemm(y.reshape(2, 2), y.reshape(2, 2), cp.empty((2, 2), np.float32))
        view, turned = y[2:].reshape(1, 2), np.concatenate([y, y]).reshape(2, 4)[:, :2].T.reshape(-1)
        return y, picked, z, matrix, view, turned, x.shape[0], np.cumsum(np.ones_like(x))

    with cp.cuda.using_allocator(pool.malloc):
        launches = device.counts.launches
        (y, picked, z, matrix, view, turned, length, ones), graph = capture(work)
    assert device.counts.launches == launches and length == 4 and view.base is y and turned.base is None
    for garbage in (y, picked, z, matrix, view, turned, ones):
        assert np.isnan(garbage.get()).all()
    assert total.item() == 0 and seen.tolist() == [0, 0, 0, 0] and filled.tolist() == [0, 0]
    for step in (1, 2):
        x[...] = cp.arange(4) + step
        graph.launch()
        doubled = 2 * (np.arange(4) + step) + np.array([0, 1, 1, 1])
        assert y.tolist() == doubled.tolist() and view.tolist() == [doubled[2:].tolist()]
        assert turned.tolist() == doubled[[0, 0, 1, 1]].tolist()
        assert picked.tolist() == [3 + step, 2 + step, 1 + step, step]
        assert z.tolist() == [v + 0.5 for v in picked.tolist()] and ones.tolist() == [1, 2, 3, 4]
        assert np.array_equal(matrix.get(), doubled.reshape(2, 2) @ doubled.reshape(2, 2))
    assert total.item() == sum(2 * n + 1 for n in range(1, 5)) - 1 + sum(2 * n + 1 for n in range(2, 6)) - 1
    assert seen.tolist() == [7, 7, 7, 7] and filled.tolist() == [3, 3]
    launches = device.counts.launches
    graph.launch(cp.cuda.Stream(non_blocking=True))
    assert device.counts.launches == launches + 1


def test_memory_of_a_graph_is_nobody_elses(cp: Any) -> None:
    """Products know their memory by its address alone, which stays theirs; what it holds does not, where its array is gone."""
    x, out = [cp.asarray(RNG.normal(size=(4, 4)).astype(np.float32))], cp.empty((4, 4), np.float32)
    expected = np.linalg.matrix_power(x[0].get(), 3)

    def work() -> None:
        for _ in range(3):
            gemm(gemm(x[0], x[0], cp.empty((4, 4), np.float32)), x[0], out)

    _, graph = capture(work)
    others = [cp.zeros((4, 4), np.float32) for _ in range(50)]
    graph.launch()
    assert np.allclose(out.get(), expected, rtol=1e-4)
    x.clear()
    others += [cp.zeros((4, 4), np.float32) for _ in range(50)]
    graph.launch()
    assert np.isnan(out.get()).all() and not any(other.get().any() for other in others)


def test_captures_that_cuda_refuses(cp: Any) -> None:
    with pytest.raises(RuntimeError, match="non-blocking"):
        cp.cuda.Stream().begin_capture()
    with pytest.raises(RuntimeError, match="non-blocking"):
        cp.cuda.get_current_stream().begin_capture()
    with pytest.raises(RuntimeError, match="not being captured"):
        cp.cuda.Stream(non_blocking=True).end_capture()
    with pytest.raises(RuntimeError, match="not being captured yet"):
        capture(lambda: device.get_current_stream().begin_capture())
    x = cp.ones((2, 2))
    for product in (lambda: x @ x, lambda: np.matmul(x, x), lambda: np.einsum("ij,jk", x, x)):
        with pytest.raises(NotImplementedError, match="cuBLAS"):
            capture(product)
    event = device.Event()
    event.record()
    with pytest.raises(RuntimeError, match="outside of the capture"):
        capture(lambda: device.get_current_stream().wait_event(event))
    capture(lambda: device.get_current_stream().wait_event(device.get_current_stream().record()))


def test_streams(cp: Any) -> None:
    outer, inner = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream()
    assert cp.cuda.get_current_stream() is cp.cuda.Stream.null and cp.cuda.Stream.null.ptr == 0 != outer.ptr != inner.ptr
    with outer:
        with inner:
            assert cp.cuda.get_current_stream() is inner
        assert cp.cuda.get_current_stream() is outer
        inner.use()
        assert cp.cuda.get_current_stream() is inner
    assert cp.cuda.get_current_stream() is cp.cuda.Stream.null
    start, end = inner.record(), cp.cuda.Event()
    end.record(inner)
    assert cp.cuda.get_elapsed_time(start, end) > 0
    with cp.cuda.Device(0) as gpu:
        assert gpu.id == cp.cuda.get_device_id() == 0 and cp.cuda.runtime.getDeviceCount() == 1
        assert int(gpu.compute_capability) >= 80 and gpu.attributes["MultiProcessorCount"] > 0
    free, total = cp.cuda.runtime.memGetInfo()
    assert total == cp.cuda.runtime.getDeviceProperties(0)["totalGlobalMem"] and free > 0
    with pytest.raises(RuntimeError):
        cp.cuda.Device(1)


def test_new_memory_is_garbage_and_freed_memory_too(cp: Any) -> None:
    for dtype in (np.float32, np.float64, bfloat16()):
        assert np.isnan(cp.empty(3, dtype).get()).all() and np.isnan(np.empty_like(cp.ones(3, dtype)).get()).all()
    assert cp.empty(2, np.int32).tolist() == [-1, -1]
    read, kept = [cp.ones(2)], cp.zeros(2)
    _, graph = capture(lambda: operator.setitem(kept, slice(None), read[0][:1]))
    graph.launch()
    assert kept.tolist() == [1, 1]
    read.clear()
    graph.launch()
    assert np.isnan(kept.get()).all()


def test_pools_count_their_memory(cp: Any) -> None:
    pool, default = cp.cuda.MemoryPool(), cp.get_default_memory_pool()
    before = default.used_bytes()
    with cp.cuda.using_allocator(pool.malloc):
        x = cp.zeros(100)
        view, block = x[10:], cp.cuda.alloc(1000)
    assert pool.used_bytes() == 1800 and block.ptr % 256 == 0 and default.used_bytes() == before
    del x, block
    with cp.cuda.using_allocator(pool.malloc):
        cp.zeros(1)
    assert pool.used_bytes() == 800 and pool.total_bytes() == 1800
    del view
    pool.free_all_blocks()
    assert pool.used_bytes() == pool.total_bytes() == 0
    cp.ones(1000)
    assert default.used_bytes() == before


def test_raw_kernels_check_what_a_device_would_misread(cp: Any, kernels: Any) -> None:
    x, y = cp.arange(40, dtype=np.float32), cp.zeros(40, np.float32)
    add = kernels.get_function("add_to<32>")
    add((2,), (32,), (x, y, np.int32(40), np.float32(2)))
    assert y.tolist() == list(range(2, 42))
    kernels.get_function("mark")((1,), (1,), (np.uintp(0), np.int64(0)))
    for wrong in (
        (x, y, 40, np.float32(2)),
        (x, y, np.int64(40), np.float32(2)),
        (x, y, np.int32(40), 2.0),
        (x, y, np.int32(40)),
        (x.get(), y, np.int32(40), np.float32(2)),
        (x, np.int64(0), np.int32(40), np.float32(2)),
    ):
        with pytest.raises(TypeError):
            add((2,), (32,), wrong)
    with pytest.raises(TypeError):
        add((2,), (32, 2), (x, y, np.int32(40), np.float32(2)))
    with pytest.raises(RuntimeError, match="not among"):
        kernels.get_function("add_to<64>")


def test_cublas_stores_by_columns(cp: Any) -> None:
    """C = Aᵀ B with leading dimensions of 4, 3 and 5, by the numbers."""
    library, handle = standin.cublas.Library(), ctypes.c_void_p()
    assert library.cublasCreate_v2(ctypes.byref(handle)) == 0
    a, b, c = RNG.normal(size=8), RNG.normal(size=6), np.zeros(10)
    arrays = [cp.asarray(x.astype(np.float32)) for x in (a, b, c)]
    assert library.cublasGemmEx(handle, *arguments(arrays)) == 0
    expected = [sum(a[i * 4 + k] * b[j * 3 + k] for k in range(3)) for j in range(2) for i in range(2)]
    made = arrays[2].get()
    assert np.allclose(made[[0, 1, 5, 6]], expected, atol=1e-6) and not made[[2, 3, 4, 7, 8, 9]].any()


def arguments(
    arrays: list[Any], lds: tuple[int, ...] = (4, 3, 5), compute: int = 68, sizes: Any = (1, 0, 2, 2, 3)
) -> list[Any]:
    factors = [ctypes.byref(ctypes.c_float(f)) for f in (1, 0)]
    operands = [
        (ctypes.c_void_p(getattr(getattr(x, "data", None), "ptr", x)), ctypes.c_int(0), ctypes.c_int(ld))
        for x, ld in zip(arrays, lds, strict=True)
    ]
    shape = [ctypes.c_int(v) for v in sizes]
    return [*shape, factors[0], *operands[0], *operands[1], factors[1], *operands[2], ctypes.c_int(compute), ctypes.c_int(-1)]


def test_cublas_refuses_bad_arguments(cp: Any) -> None:
    library, handle = standin.cublas.Library(), ctypes.c_void_p()
    library.cublasCreate_v2(ctypes.byref(handle))
    x = cp.ones(16, np.float32)
    call = library.cublasGemmEx
    assert call(handle, *arguments([x, x, x])) == 0
    assert call(ctypes.c_void_p(99), *arguments([x, x, x])) == 1
    for wrong in (
        arguments([None, x, x]),
        arguments([x, x.data.ptr + 2, x]),
        arguments([x, x, x], lds=(2, 3, 5)),
        arguments([x, x, x], lds=(4, 2, 5)),
        arguments([x, x, x], lds=(4, 3, 1)),
        arguments([x, x, x], sizes=(3, 0, 2, 2, 3)),
        arguments([x, x, x], sizes=(1, 0, -2, 2, 3)),
    ):
        assert call(handle, *wrong) == 7
    assert call(handle, *arguments([x, x, x], compute=64)) == 15
    for untyped in ([handle, 1, *arguments([x, x, x])[1:]], [handle, *arguments([x, x, x])[:-1]]):
        with pytest.raises(TypeError, match="cublasGemmEx takes"):
            call(*untyped)
    with pytest.raises(KeyError):
        library.cublasSgemm  # noqa: B018
    stream = cp.cuda.Stream(non_blocking=True)
    assert library.cublasSetStream_v2(handle, ctypes.c_void_p(stream.ptr)) == 0
    with stream:
        stream.begin_capture()
        assert call(handle, *arguments([x, x, x])) == 3  # it would allocate a workspace
        stream.end_capture()
    assert library.cublasDestroy_v2(handle) == 0 and call(handle, *arguments([x, x, x])) == 1


def test_erf(cp: Any) -> None:
    from cupyx.scipy.special import erf

    y = erf(cp.asarray(np.float32([0, 1, -np.inf])))
    assert y.dtype == np.float32 and np.allclose(y.get(), [0, 0.8427008, -1])
    assert erf(cp.ones(2, np.float16)).dtype == np.float64


RANKS = """
import numpy as np
from tests.cuda import standin
standin.install()
import cupy
from cupyx.distributed import init_process_group
from mpi4py import MPI
rank = MPI.COMM_WORLD.rank
group = init_process_group(2, rank, use_mpi=True)
x, y = cupy.arange(3) + 10.0 * rank, cupy.zeros(3)
group.all_reduce(x, y)
assert y.tolist() == [10, 12, 14], y
group.send_recv(x, y, 1 - rank)
assert y.tolist() == [10 - 10 * rank + i for i in range(3)], y
group.broadcast(x, 1)
assert x.tolist() == [10, 11, 12], x
group.all_reduce(x, x)
assert x.tolist() == [20, 22, 24], x
for wrong in (cupy.zeros((3, 3))[:, 0], np.zeros(3)):
    try:
        group.all_reduce(wrong, wrong)
    except TypeError:
        continue
    raise AssertionError(wrong)
stream = cupy.cuda.Stream(non_blocking=True)
with stream:
    stream.begin_capture()
    group.all_reduce(x, y)
    graph = stream.end_capture()
assert y.tolist() != [40, 44, 48], y
graph.launch()
assert y.tolist() == [40, 44, 48], y
print("right")
"""


def test_ranks_exchange_arrays() -> None:
    beside = Path(sys.executable).with_name("mpiexec")
    launcher = str(beside) if beside.exists() else shutil.which("mpiexec")
    if launcher is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("there is no mpiexec, or no mpi4py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [launcher, "-n", "2", sys.executable, "-c", RANKS]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 0 and ended.stdout.count("right") == 2, ended.stderr
