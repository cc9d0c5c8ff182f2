"""What an array is: devices, dtypes, transfer, and the table of fast kernels.

Nothing here knows of tensors or derivatives. An array is a `numpy.ndarray` ("cpu") or a `cupy.ndarray` ("cuda");
`xp` is the module whose functions work on it. CuPy is imported only when a CUDA array is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray: CuPy is optional, so no common type can be named

default_dtype = np.dtype(np.float32)
_NAMES = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 bool"
DTYPES = {name: np.dtype(name) for name in _NAMES.split()}


def bfloat16() -> np.dtype:
    """The dtype of 16-bit floats with float32's range, which NumPy knows from the package ml_dtypes."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise RuntimeError(f'bfloat16 needs ml_dtypes ({error}); pip install -e ".[gpu]"') from None
    return np.dtype(ml_dtypes.bfloat16)


def is_float(dtype: np.dtype) -> bool:
    """Whether gradients flow through arrays of this dtype."""
    return dtype.kind == "f" or dtype.name == "bfloat16"  # whose kind is "V"


def xp_of(*arrays: Array) -> ModuleType:
    """The array module, NumPy or CuPy, that owns these arrays."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and any(isinstance(a, cupy.ndarray) for a in arrays):
        return cupy
    return np


def xp_for(device: str) -> ModuleType:
    """The array module of a device name; RuntimeError when "cuda" has no usable GPU, never a silent fallback."""
    if device == "cpu":
        return np
    if device != "cuda":
        raise ValueError(f"device {device!r} is not known; use 'cpu' or 'cuda'")
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f'device "cuda" needs CuPy ({error}); pip install -e ".[gpu]"') from None
    if not cupy.cuda.is_available():
        raise RuntimeError('device "cuda" was asked for, but CuPy finds no usable GPU; use device "cpu"')
    from tinytensor.backend import cuda  # noqa: F401  (registers its kernels, the first time)

    return cupy


def device_of(array: Array) -> str:
    return "cpu" if type(array) is np.ndarray else "cuda" if xp_of(array) is not np else "cpu"


def to_device(array: Array, device: str) -> Array:
    """The array on `device`; the same object when it is there already."""
    if device_of(array) == device:
        return array
    xp = xp_for(device)
    return array.get() if xp is np else xp.asarray(array)


def as_dtype(dtype: Any) -> np.dtype:
    """A supported NumPy dtype from its name, type or dtype object."""
    try:
        resolved = np.dtype(dtype)
    except TypeError:
        resolved = np.dtype(object)
    if resolved not in DTYPES.values() and resolved.name != "bfloat16":
        raise TypeError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    return resolved


def as_array(data: Any, dtype: Any = None, device: str | None = None) -> Array:
    """Anything array-like as an array. Python floats become `default_dtype`; arrays and buffers keep their dtype and device."""
    if type(data) is np.ndarray or xp_of(data) is not np:
        array = data
    else:
        try:
            source = _buffer(data)
            array = np.asarray(source)
        except ValueError as error:
            raise ValueError(f"cannot make an array of this {type(data).__name__}: {error}") from None
        if array.dtype == np.float64 and dtype is None and not _is_array(source):
            array = array.astype(default_dtype)
    if dtype is not None:
        array = array.astype(as_dtype(dtype), copy=False)
    elif array.dtype not in DTYPES.values() and array.dtype.name != "bfloat16":
        remedy = f"convert it to one of {', '.join(DTYPES)}" if array.dtype.kind in "biufc" else "use numbers"
        raise TypeError(f"cannot make a tensor of dtype {array.dtype} from {type(data).__name__}; {remedy}")
    return array if device is None else to_device(array, device)


def _buffer(data: Any) -> Any:
    """The memory of an object with the buffer protocol, where NumPy would take bytes for text; `data` if it is none."""
    if isinstance(data, np.ndarray | np.generic):
        return data
    try:
        return memoryview(data)
    except TypeError:
        return data


def _is_array(data: Any) -> bool:
    return isinstance(data, memoryview) or hasattr(data, "__array__") or hasattr(data, "__array_interface__")


def memory_root(array: Array) -> Array:
    """The array that owns the memory that `array` views: two arrays share memory only when their roots are one."""
    while isinstance(base := array.base, type(array)):
        array = base
    return array


def byte_bounds(array: Array) -> tuple[int, int]:
    """First byte and one past the last byte that a NumPy or CuPy array can touch."""
    start = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    if array.size == 0:
        return start, start
    reach = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    return start + sum(r for r in reach if r < 0), start + sum(r for r in reach if r > 0) + array.itemsize


def read_only(array: Array) -> bool:
    """Whether `array` lies in memory that may not be written: bytes, a broadcast, another library's constant."""
    return not getattr(array.flags, "writeable", True)  # which CuPy's arrays always are


def is_basic_index(index: Any) -> bool:
    """Whether the index names each element at most once, so that plain assignment adds."""
    parts = index if isinstance(index, tuple) else (index,)
    for p in parts:
        if not (type(p) is slice or type(p) is int or p is None or p is Ellipsis or isinstance(p, int | np.integer)):
            return False
    return True


class Into:
    """A gradient that a kernel's vjp can make in memory that the engine already has, on top of what is there.

    `add(out, base)` returns base + the gradient, or the gradient alone where base is None, in `out`, or in a new array where
    that is None. `out` may be `base` itself. All have exactly the input's shape and dtype.
    """

    __slots__ = ("add",)

    def __init__(self, add: Callable[[Array | None, Array | None], Array]) -> None:
        self.add = add


@dataclass(eq=False, slots=True)
class Kernel:
    """A fast override of one op on one device.

    `forward(*arrays, **params) -> (y, residual)` or NotImplemented to leave these arguments to the formula; `residual`
    is whatever its own `vjp(g, y, *arrays, residual=residual, **params)` wants to find again. `saves` is read as
    `Op.saves` is.
    """

    forward: Callable[..., Any]
    vjp: Callable[..., Any]
    saves: str | dict[str, str]
    unsaved: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)  # what a node need not keep, worked out once


kernels: dict[str, dict[str, Kernel]] = {"cpu": {}, "cuda": {}}


def register_kernel(device: str, op_name: str, saves: str | dict[str, str] = "") -> Callable[[type], type]:
    """Class decorator: its `forward` and `vjp` override the op of that name on that device."""

    def decorate(cls: Any) -> Any:
        kernels[device][op_name] = Kernel(cls.forward, cls.vjp, saves)
        return cls

    return decorate
