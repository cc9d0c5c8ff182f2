"""Tensors from nothing: constants, ranges and random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinytensor import backend
from tinytensor.autograd import Value
from tinytensor.backend import dlpack, random
from tinytensor.tensor import Tensor


def tensor(data: Any, dtype: Any = None, device: str = "cpu", requires_grad: bool = False) -> Tensor:
    """A tensor with a copy of `data`: numbers, nested lists, an array, a buffer (bytes, array.array, mmap, …), or a tensor.

    dtype: by name ("float32", "float64", "float16", "int64", …); by default that of an array or buffer, float32 for Python
    floats, int64 for Python integers. device: "cpu" or "cuda". Raises ValueError for ragged lists, TypeError for non-numbers.
    """
    source = data.data if isinstance(data, Value) else data
    if isinstance(source, (list, tuple)):
        source = _unwrapped(source)
    array = backend.as_array(source, dtype, device)
    t = Tensor(array.copy() if backend.xp_of(array) is backend.xp_of(source) else array)
    t.requires_grad = requires_grad
    return t


def _unwrapped(data: Any) -> Any:
    """Nested lists with the tensors in them replaced by arrays' numbers."""
    if isinstance(data, (list, tuple)):
        return [_unwrapped(d) for d in data]
    return data.data.tolist() if isinstance(data, Value) else data


def _make(array: Any, dtype: Any, device: str, requires_grad: bool) -> Tensor:
    t = Tensor(backend.as_array(array, dtype, device))
    t.requires_grad = requires_grad
    return t


def _shape(shape: tuple[Any, ...]) -> tuple[int, ...]:
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int | np.integer) else shape
    if any(n < 0 for n in sizes):
        raise ValueError(f"a shape has no negative sizes, got {sizes}")
    return tuple(int(n) for n in sizes)


def as_tensor(data: Any, dtype: Any = None, device: str | None = None) -> Tensor:
    """`data` as a tensor without copying where possible: a tensor as it is, an array or buffer sharing its memory."""
    t = data if isinstance(data, Tensor) else Tensor(backend.as_array(data, dtype, device))
    t = t if dtype is None else t.astype(dtype)
    return t if device is None else t.to(device)


def from_dlpack(x: Any, /) -> Tensor:
    """A tensor in the memory of another library's array, one with `__dlpack__` (array API standard): nothing is copied.

    On the CPU or on a CUDA device, where x is; what one side writes the other reads, unnoticed by autograd. Memory that its
    owner declares constant (JAX's) may only be read. Raises TypeError for a dtype that tensors do not have, ValueError for
    another device.
    """
    return Tensor(dlpack.from_dlpack(x))


def zeros(*shape: Any, dtype: Any = "float32", device: str = "cpu", requires_grad: bool = False) -> Tensor:
    """Zeros of a shape, given as numbers or as one tuple."""
    return _make(np.zeros(_shape(shape), backend.as_dtype(dtype)), None, device, requires_grad)


def ones(*shape: Any, dtype: Any = "float32", device: str = "cpu", requires_grad: bool = False) -> Tensor:
    """Ones of a shape."""
    return _make(np.ones(_shape(shape), backend.as_dtype(dtype)), None, device, requires_grad)


def full(shape: Any, value: Any, dtype: Any = "float32", device: str = "cpu", requires_grad: bool = False) -> Tensor:
    """One value everywhere."""
    sizes = _shape((shape,) if isinstance(shape, int | np.integer) else tuple(shape))
    return _make(np.full(sizes, value, backend.as_dtype(dtype)), None, device, requires_grad)


def zeros_like(x: Tensor) -> Tensor:
    """Zeros of x's shape, dtype and device."""
    return Tensor(np.zeros_like(x.data))


def ones_like(x: Tensor) -> Tensor:
    """Ones of x's shape, dtype and device."""
    return Tensor(np.ones_like(x.data))


def arange(*limits: Any, dtype: Any = None, device: str = "cpu") -> Tensor:
    """arange(stop) or arange(start, stop[, step]): int64 for integers, float32 otherwise, unless dtype says."""
    array = np.arange(*limits)
    return _make(array, dtype or (backend.default_dtype if array.dtype.kind == "f" else array.dtype), device, False)


def eye(n: int, m: int | None = None, dtype: Any = "float32", device: str = "cpu") -> Tensor:
    """The identity matrix, (n, m or n)."""
    return _make(np.eye(n, m), dtype, device, False)


def rand(*shape: Any, dtype: Any = "float32", device: str = "cpu", requires_grad: bool = False) -> Tensor:
    """Uniform on [0, 1); the numbers are those of the next key of `random.scope` or `manual_seed`."""
    return _make(random.uniform(random.next_key("rand"), _shape(shape), backend.as_dtype(dtype)), None, device, requires_grad)


def randn(*shape: Any, dtype: Any = "float32", device: str = "cpu", requires_grad: bool = False) -> Tensor:
    """Standard normal; keyed as `rand`."""
    return _make(random.normal(random.next_key("randn"), _shape(shape), backend.as_dtype(dtype)), None, device, requires_grad)


def randint(low: int, high: int, shape: Any, device: str = "cpu") -> Tensor:
    """Uniform integers in [low, high), int64; keyed as `rand`."""
    sizes = _shape((shape,) if isinstance(shape, int | np.integer) else tuple(shape))
    return _make(random.integers(random.next_key("randint"), low, high, sizes), None, device, False)
