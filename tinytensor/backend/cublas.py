"""Matrix products by cuBLAS, called directly.

CuPy's own `matmul` cannot be captured in a CUDA graph, copies transposed operands of three dimensions and upcasts half
precision there; cuBLAS itself does none of that.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from tinytensor.backend import Array

_REAL = {"float32": 0, "bfloat16": 14}  # cudaDataType: CUDA_R_32F, CUDA_R_16BF
_COMPUTE_32F, _COMPUTE_TF32 = 68, 77  # cublasComputeType_t
_NO_REDUCED_PRECISION_SUMS = 16  # cublasMath_t: sums of bfloat16 products stay float32 where they are split
_DEFAULT_ALGORITHM = -1
_WORKSPACE = 32 << 20  # bytes, as NVIDIA advises for Hopper; one of our own, for cuBLAS would allocate during a capture


@functools.cache
def load() -> Any:
    """The library that CuPy uses too."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        load_nvidia_dynamic_lib("cublas")
    except (ImportError, RuntimeError):
        pass  # an older CuPy, which loads it by its name
    import cupy

    name = f"libcublas.so.{cupy.cuda.runtime.runtimeGetVersion() // 1000}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise RuntimeError(f'{name} could not be loaded ({error}); pip install -e ".[gpu]" brings it') from None


class _Handle:
    """cuBLAS's state for one stream: which stream, and memory to work in."""

    def __init__(self, stream: int) -> None:
        import cupy

        self.pointer = ctypes.c_void_p()
        self.workspace = cupy.cuda.alloc(_WORKSPACE)
        _check("cublasCreate_v2", ctypes.byref(self.pointer))
        _check("cublasSetStream_v2", self.pointer, ctypes.c_void_p(stream))
        _check("cublasSetWorkspace_v2", self.pointer, ctypes.c_void_p(self.workspace.ptr), ctypes.c_size_t(_WORKSPACE))
        _check("cublasSetMathMode", self.pointer, ctypes.c_int(_NO_REDUCED_PRECISION_SUMS))


@functools.cache  # a captured graph goes on using its workspace
def _handle(device: int, stream: int) -> _Handle:
    return _Handle(stream)


def _check(function: str, *arguments: Any) -> None:
    if status := getattr(load(), function)(*arguments):
        raise RuntimeError(f"{function} failed with cuBLAS status {status}")


def gemm(a: Array, b: Array, out: Array, *, alpha: float = 1.0, accumulate: bool = False, tf32: bool = False) -> Array:
    """out = α·a b, or out + α·a b with `accumulate`; (m, k) × (k, n) → (m, n), or a stack of such products.

    a and b are float32 or both bfloat16, out is of their dtype or float32; sums are float32. Each matrix has one axis of
    stride 1 (a transposed view is read as it lies), out its last; a stack's matrices lie at equal distances.
    """
    import cupy

    *stack, m, k = a.shape
    n = b.shape[-1]
    if list(b.shape) != [*stack, k, n] or list(out.shape) != [*stack, m, n] or len(stack) > 1:
        raise ValueError(f"gemm: shapes {a.shape} and {b.shape} do not multiply into {out.shape}")
    if a.dtype != b.dtype or a.dtype.name not in _REAL or out.dtype not in (a.dtype, np.float32):
        raise TypeError(f"gemm: cannot multiply {a.dtype} by {b.dtype} into {out.dtype}")
    (op_a, ld_a), (op_b, ld_b), (op_out, ld_out) = (_layout(x) for x in (a, b, out))
    if op_out:
        raise ValueError(f"gemm: the result needs rows of stride 1, got strides {out.strides} for shape {out.shape}")
    handle = _handle(cupy.cuda.get_device_id(), cupy.cuda.get_current_stream().ptr)

    def operand(x: Array, ld: int) -> list[Any]:
        step = [ctypes.c_longlong(x.strides[0] // x.itemsize)] if stack else []
        return [ctypes.c_void_p(x.data.ptr), ctypes.c_int(_REAL[x.dtype.name]), ctypes.c_int(ld), *step]

    compute = ctypes.c_int(_COMPUTE_TF32 if tf32 and a.dtype == np.float32 else _COMPUTE_32F)
    # cuBLAS stores by columns, which makes ours transposed matrices: outᵀ = bᵀ aᵀ
    _check(
        "cublasGemmStridedBatchedEx" if stack else "cublasGemmEx",
        handle.pointer,
        *(ctypes.c_int(x) for x in (op_b, op_a, n, m, k)),
        ctypes.byref(ctypes.c_float(alpha)),
        *operand(b, ld_b),
        *operand(a, ld_a),
        ctypes.byref(ctypes.c_float(accumulate)),
        *operand(out, ld_out),
        *(ctypes.c_int(count) for count in stack),
        compute,
        ctypes.c_int(_DEFAULT_ALGORITHM),
    )
    return out


def _layout(x: Array) -> tuple[int, int]:
    """(whether the matrices of x are stored by columns, elements from one line of memory to the next)."""
    rows, columns = x.shape[-2:]
    step_row, step_column = (s // x.itemsize for s in x.strides[-2:])
    if (step_column == 1 or columns == 1) and (rows == 1 or step_row >= columns):
        return 0, step_row if rows > 1 else columns
    if (step_row == 1 or rows == 1) and (columns == 1 or step_column >= rows):
        return 1, step_column if columns > 1 else rows
    raise ValueError(f"gemm: no axis of a matrix of shape {x.shape} has stride 1, its strides are {x.strides}")
