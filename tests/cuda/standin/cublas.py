"""The part of cuBLAS that the library calls, as C functions on memory at given addresses: matrices stored by columns."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_longlong, c_size_t, c_void_p
from typing import Any

import numpy as np

from tests.cuda.standin import device
from tinytensor.backend import bfloat16

_SUCCESS, _NOT_INITIALIZED, _ALLOC_FAILED, _INVALID_VALUE, _NOT_SUPPORTED = 0, 1, 3, 7, 15
_FLOAT, _BFLOAT16, _COMPUTE_32F, _COMPUTE_TF32 = 0, 14, 68, 77
_FACTOR = type(ctypes.byref(c_float()))
_OPERAND, _SHAPE = (c_void_p, c_int, c_int), (c_int,) * 5
_STACKED = (*_OPERAND, c_longlong)
_ARGUMENTS = {
    "cublasCreate_v2": (_FACTOR,),
    "cublasDestroy_v2": (c_void_p,),
    "cublasSetStream_v2": (c_void_p, c_void_p),
    "cublasSetWorkspace_v2": (c_void_p, c_void_p, c_size_t),
    "cublasSetMathMode": (c_void_p, c_int),
    "cublasGemmEx": (c_void_p, *_SHAPE, _FACTOR, *_OPERAND, *_OPERAND, _FACTOR, *_OPERAND, c_int, c_int),
    "cublasGemmStridedBatchedEx": (c_void_p, *_SHAPE, _FACTOR, *_STACKED, *_STACKED, _FACTOR, *_STACKED, c_int, c_int, c_int),
}


class _Handle:
    def __init__(self) -> None:
        self.stream, self.workspace = 0, 0


class Library:
    """What ctypes makes of libcublas: every argument has to come as the C type that it has there."""

    def __init__(self) -> None:
        self._handles: dict[int, _Handle] = {}

    def __getattr__(self, name: str) -> Any:
        types = _ARGUMENTS[name]

        def function(*arguments: Any) -> int:
            if len(arguments) != len(types) or not all(isinstance(a, t) for a, t in zip(arguments, types, strict=True)):
                raise TypeError(f"{name} takes {[t.__name__ for t in types]}, got {[type(a).__name__ for a in arguments]}")
            values = [a._obj if isinstance(a, _FACTOR) else a.value or 0 for a in arguments]
            if name == "cublasCreate_v2":
                values[0].value = number = 1 + len(self._handles)
                self._handles[number] = _Handle()
                return _SUCCESS
            handle = self._handles.get(values[0])
            return _NOT_INITIALIZED if handle is None else getattr(self, "_" + name)(handle, *values[1:])

        return function

    def _cublasDestroy_v2(self, handle: _Handle) -> int:
        self._handles = {number: h for number, h in self._handles.items() if h is not handle}
        return _SUCCESS

    def _cublasSetStream_v2(self, handle: _Handle, stream: int) -> int:
        handle.stream, handle.workspace = stream, 0
        return _SUCCESS

    def _cublasSetWorkspace_v2(self, handle: _Handle, workspace: int, size: int) -> int:
        if not workspace or workspace % 256:
            return _INVALID_VALUE
        handle.workspace = size
        return _SUCCESS

    def _cublasSetMathMode(self, handle: _Handle, mode: int) -> int:
        return _SUCCESS if mode in (0, 2, 3, 16) else _INVALID_VALUE

    def _cublasGemmEx(self, handle: _Handle, *values: Any) -> int:
        shape, alpha, a, b, beta, c = values[:5], values[5], values[6:9], values[9:12], values[12], values[13:16]
        return _gemm(handle, shape, alpha, (*a, 0), (*b, 0), beta, (*c, 0), 1, values[16])

    def _cublasGemmStridedBatchedEx(self, handle: _Handle, *values: Any) -> int:
        shape, alpha, a, b, beta, c = values[:5], values[5], values[6:10], values[10:14], values[14], values[15:19]
        return _gemm(handle, shape, alpha, a, b, beta, c, values[19], values[20])


def _gemm(
    handle: _Handle, shape: Sequence[int], alpha: c_float, a: Any, b: Any, beta: c_float, c: Any, count: int, compute: int
) -> int:
    """C = α·op(A) op(B) + β·C for a stack; each operand is (address, type, leading dimension, elements to the next)."""
    transpose_a, transpose_b, m, n, k = shape
    sizes = [(k, m) if transpose_a else (m, k), (n, k) if transpose_b else (k, n), (m, n)]
    if not {transpose_a, transpose_b} <= {0, 1, 2} or min(m, n, k, count) < 0:
        return _INVALID_VALUE
    kinds = tuple(x[1] for x in (a, b, c))
    if kinds not in ((_FLOAT,) * 3, (_BFLOAT16,) * 3, (_BFLOAT16, _BFLOAT16, _FLOAT)):
        return _NOT_SUPPORTED
    if compute != _COMPUTE_32F and (compute != _COMPUTE_TF32 or a[1] != _FLOAT):
        return _NOT_SUPPORTED
    for (address, kind, leading, _), (rows, _) in zip((a, b, c), sizes, strict=True):
        if not address or address % _dtype(kind).itemsize or leading < max(1, rows):
            return _INVALID_VALUE
    stream = device.Stream.by_pointer[handle.stream]
    if stream.is_capturing() and not handle.workspace:
        return _ALLOC_FAILED
    left, right, out = (_matrices(*x, *size, count) for x, size in zip((a, b, c), sizes, strict=True))
    factor, keep = alpha.value, beta.value

    def run() -> None:
        x, y = (_tf32(z) if compute == _COMPUTE_TF32 else z.astype(np.float32) for z in (left, right))
        x, y = x.swapaxes(1, 2) if transpose_a else x, y.swapaxes(1, 2) if transpose_b else y
        with np.errstate(all="ignore"):
            out[...] = factor * (x @ y) + (keep * out.astype(np.float32) if keep else 0)

    device.submit(run, stream)
    return _SUCCESS


def _dtype(kind: int) -> np.dtype:
    return np.dtype(np.float32) if kind == _FLOAT else bfloat16()


def _matrices(address: int, kind: int, leading: int, step: int, rows: int, columns: int, count: int) -> np.ndarray:
    dtype = _dtype(kind)
    extent = leading * (columns - 1) + rows + step * (count - 1) if min(rows, columns, count) else 0
    memory = np.frombuffer((ctypes.c_char * (extent * dtype.itemsize)).from_address(address), dtype)
    strides = tuple(s * dtype.itemsize for s in (step, 1, leading))
    return np.lib.stride_tricks.as_strided(memory, (count, rows, columns), strides)


def _tf32(x: np.ndarray) -> np.ndarray:
    """float32 with 10 bits of mantissa, rounded to nearest."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return np.where(np.isfinite(x), ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32), x)
