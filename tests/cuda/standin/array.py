"""The module `cupy` of a device that is not there: NumPy's arrays and functions, held to what CuPy allows.

Nothing becomes a NumPy array unasked, and nothing takes one but scalars. Reading a value counts as waiting for the device, and
is refused where that is. While the current stream is captured nothing runs: results hold garbage until the graph is launched.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.cuda.emulate import Library, cache
from tests.cuda.standin import device as cuda
from tinytensor.backend import memory_root
from tinytensor.backend.launcher import _SCALARS, Strided

__version__ = "14.2.0"
_SCALAR_TYPES = (bool, int, float, complex, np.generic)
_ABSENT = """asmatrix block bmat einsum_path frompyfunc geomspace histogram_bin_edges insert isnat matvec nanpercentile
    nanquantile nested_iters polyder polydiv polyint seterr spacing unstack vecdot vecmat"""
_WAITING = ("argwhere", "compress", "extract", "flatnonzero", "nonzero", "unique")  # for the size of their result
_CUBLAS = ("dot", "einsum", "inner", "matmul", "tensordot", "vdot")
_WRITING = ("copyto", "fill_diagonal", "place", "put", "put_along_axis", "putmask")
_METHODS = """all any argmax argmin argsort astype clip conj copy cumprod cumsum diagonal dot flatten max mean min prod ravel
    repeat reshape round searchsorted squeeze std sum swapaxes take trace transpose var view"""
_ATTRIBUTES = "dtype flags itemsize nbytes ndim shape size strides"
_COMPARISONS = {
    "lt": "less", "le": "less_equal", "eq": "equal", "ne": "not_equal", "gt": "greater", "ge": "greater_equal",
}  # fmt: skip
_ATOMICS = {"add": "int32 int64 uint32 uint64 float16 float32 float64", "subtract": "int32 uint32"}
_ATOMICS["maximum"] = _ATOMICS["minimum"] = "int32 int64 uint32 uint64 float32 float64"
_READING = "item tolist tobytes __bool__ __int__ __float__"


class ndarray:
    """An array on the device. `base` owns the memory of a view."""

    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, array: np.ndarray, base: ndarray | None = None) -> None:
        self._array, self.base = array, base
        if base is None:
            cuda.current_pool().hold(self, memory_root(array))

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct one explicitly.")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc.__name__ in _ABSENT.split() or not all(isinstance(x, (ndarray, np.ndarray, *_SCALAR_TYPES)) for x in inputs):
            return NotImplemented
        if ufunc.__name__ in _COMPARISONS.values():
            inputs = tuple(map(_scalar, inputs))
        function = __getattr__(ufunc.__name__)
        return (function if method == "__call__" else getattr(function, method))(*inputs, **kwargs)

    def __array_function__(self, function: Callable, types: Any, args: tuple, kwargs: dict) -> Any:
        name = function.__name__
        if (
            getattr(np, name, None) is not function
            or name in _ABSENT.split()
            or not all(t in (ndarray, np.ndarray) for t in types)
        ):
            return NotImplemented
        return getattr(sys.modules[__name__], name)(*args, **kwargs)

    @property
    def data(self) -> cuda.MemoryPointer:
        return cuda.MemoryPointer(self._array)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def get(self) -> np.ndarray:
        cuda.synchronise("reading an array")
        return self._array.copy()

    def set(self, array: np.ndarray) -> None:
        if not isinstance(array, np.ndarray) or array.dtype != self.dtype:
            raise TypeError(f"set wants a NumPy array of dtype {self.dtype}")
        if array.shape != self.shape:
            raise ValueError(f"set wants an array of shape {self.shape}, not {array.shape}")
        if not self.flags.forc:
            raise RuntimeError("set cannot copy to an array that is not contiguous")
        cuda.copy_from_host("set")
        self._array[...] = array

    def fill(self, value: Any) -> None:
        _into(np.ndarray.fill, self, _scalar(value))

    def __getitem__(self, index: Any) -> ndarray:
        _checked(index)
        return _call(_item, self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        _checked(index)
        if not isinstance(value, (ndarray, np.ndarray, *_SCALAR_TYPES)):
            raise TypeError(f"cannot assign {type(value)} to an array on the device")
        _into(operator.setitem, self, index, _scalar(value))

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return repr(self.get())

    def __str__(self) -> str:
        return str(self.get())

    def __format__(self, form: str) -> str:
        return format(self.get(), form)


def _item(array: np.ndarray, index: Any) -> np.ndarray:
    parts = index if isinstance(index, tuple) else (index,)
    return array[parts if any(p is Ellipsis for p in parts) else (*parts, ...)]  # one element, too, is a view and no scalar


def _checked(index: Any) -> tuple[Any, ...]:
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        if not (part is None or part is Ellipsis or isinstance(part, (ndarray, slice, int, np.integer))):
            raise TypeError(f"an index of an array on the device cannot be {type(part)}")
        if isinstance(part, ndarray) and part.dtype == bool:
            cuda.synchronise("an index that is a mask")
    return parts


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with function applied to whatever lies in its lists, tuples and dicts."""
    if type(value) in (list, tuple):
        return type(value)(_map(function, v) for v in value)
    return {k: _map(function, v) for k, v in value.items()} if type(value) is dict else function(value)


def _scalar(value: Any) -> Any:
    """An array of the host without dimensions as a scalar: CuPy takes one where it compares or assigns, and nowhere else."""
    return value[()] if isinstance(value, np.ndarray) and not value.ndim else value


def _memory(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}: an array of shape {value.shape} on the host, where the device works")
    return value._array if isinstance(value, ndarray) else value


def _into(function: Callable[..., Any], target: ndarray, *args: Any, **kwargs: Any) -> ndarray:
    """Submit function(target, …), which writes into its first argument or into its keyword argument `out`."""
    arguments, options = _map(_memory, (args, kwargs))
    leading = () if "out" in kwargs else (target._array,)

    def run() -> None:
        with np.errstate(all="ignore"):
            function(*leading, *arguments, **options)

    cuda.submit(run)
    return target


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A function of NumPy's, on the device. Its results are views of its arguments where NumPy's are, else new arrays."""
    if not isinstance(function, np.ufunc) and (extra := {"where", "initial"} & set(kwargs)):
        raise TypeError(f"CuPy's {function.__name__} takes no {extra.pop()}")
    if isinstance(out := kwargs.get("out"), tuple):
        kwargs["out"] = out = out[0]
    if out is not None:
        return _into(function, out, *args, **kwargs)
    given: dict[int, ndarray] = {}

    def taken(value: Any) -> Any:
        if isinstance(value, ndarray):
            given[id(value._array)] = value
        return _memory(value)

    arguments = _map(taken, (args, kwargs))
    owners = {id(memory_root(a._array)): a if a.base is None else a.base for a in given.values()}
    fresh: list[np.ndarray] = []

    def wrapped(value: Any) -> Any:
        if isinstance(value, np.generic):
            value = np.asarray(value)
        if not isinstance(value, np.ndarray):
            return value
        if id(value) in given:
            return given[id(value)]
        memory = memory_root(value)
        owner = owners.get(id(memory))
        if owner is None:
            fresh.append(value)
        result = ndarray(value, owner)
        owners.setdefault(id(memory), result)
        return result

    def run() -> Any:
        with np.errstate(all="ignore"):
            return function(*arguments[0], **arguments[1])

    def replay() -> None:
        again: list[Any] = []
        _map(again.append, [run()])
        for memory, value in zip(fresh, again, strict=True):
            memory[...] = value

    results = _map(wrapped, run())
    if fresh and cuda.is_capturing():
        for memory in fresh:
            cuda.poisoned(memory_root(memory))
        cuda.submit(replay)
    else:
        cuda.counts.launches += bool(fresh)
    return results


def _method(function: Callable[..., Any]) -> Any:
    return lambda self, *args, **kwargs: _call(function, self, *args, **kwargs)


def _read(name: str) -> Any:
    return lambda self, *args: getattr(self.get(), name)(*args)


def _operator(name: str, place: str) -> Any:
    def method(self: ndarray, other: Any) -> Any:
        if not isinstance(other, (ndarray, np.ndarray, *_SCALAR_TYPES)):
            return NotImplemented
        operands = (other, self) if place == "r" else (self, _scalar(other) if name in _COMPARISONS.values() else other)
        return __getattr__(name)(*operands, **({"out": self} if place == "i" else {}))

    return method


for _name in _METHODS.split():
    setattr(ndarray, _name, _method(getattr(np.ndarray, _name)))
for _name in _ATTRIBUTES.split():
    setattr(ndarray, _name, property(operator.attrgetter(f"_array.{_name}")))
ndarray.T = property(_method(operator.attrgetter("T")))  # type: ignore[attr-defined]
for _name in _READING.split():
    setattr(ndarray, _name, _read(_name))
for _name, _function in {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide", "mod": "remainder",
    "pow": "power", "matmul": "matmul", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "lshift": "left_shift",
    "rshift": "right_shift",
}.items():  # fmt: skip
    for _place in ("", "r") if _name == "matmul" else ("", "r", "i"):
        setattr(ndarray, f"__{_place}{_name}__", _operator(_function, _place))
for _name, _function in _COMPARISONS.items():
    setattr(ndarray, f"__{_name}__", _operator(_function, ""))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(ndarray, f"__{_name}__", _method(getattr(operator, f"__{_name}__")))


class _Function:
    """One of NumPy's functions, as CuPy has it."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name, self._function = name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self._name
        if name in _WAITING or (name == "where" and len(args) == 1):
            cuda.synchronise(name)
        if name in _CUBLAS and cuda.is_capturing():
            raise NotImplementedError(f"CuPy cannot capture {name}, which calls cuBLAS")
        return (_into if name in _WRITING else _call)(self._function, *args, **kwargs)

    def at(self, array: ndarray, index: Any, *values: Any) -> None:
        if self._name not in _ATOMICS:
            raise NotImplementedError(f"CuPy has no {self._name}.at")
        if array.dtype.name not in _ATOMICS[self._name].split():
            raise TypeError(f"CuPy's {self._name}.at takes no {array.dtype}")
        _checked(index)
        _into(self._function.at, array, index, *values)

    def __getattr__(self, name: str) -> Any:
        if name in ("reduce", "accumulate") and self._name not in ("add", "multiply"):
            raise NotImplementedError(f"CuPy has no {self._name}.{name}")
        return functools.partial(_call, getattr(self._function, name))


@functools.cache
def __getattr__(name: str) -> Any:
    value = getattr(np, name, None)
    if name in _ABSENT.split() or name.startswith("__") or value is None or isinstance(value, ModuleType):
        raise AttributeError(f"the stand-in for CuPy has no {name}")
    return _Function(name, _OTHERWISE.get(name, value)) if callable(value) and not isinstance(value, type) else value


def _matmul(a: np.ndarray, b: np.ndarray, **options: Any) -> np.ndarray:
    if max(a.ndim, b.ndim) > 2 and "bfloat16" in (a.dtype.name, b.dtype.name) and a.dtype == b.dtype:
        raise TypeError("CuPy multiplies no stacks of matrices of bfloat16")
    y = np.matmul(a, b, **options)
    return y.astype(a.dtype) if a.dtype == b.dtype else y  # NumPy's product of bfloat16 is float32


def _widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """What CuPy has no loop of bfloat16 for it does in float32."""

    def widen(value: Any) -> Any:
        return value.astype(np.float32) if getattr(getattr(value, "dtype", None), "name", "") == "bfloat16" else value

    return lambda *args, **kwargs: function(*map(widen, args), **kwargs)


def _refused(function: Callable[..., Any]) -> Callable[..., Any]:
    """What CuPy cannot compile for bfloat16."""

    def refuse(a: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        if a.dtype.name == "bfloat16":
            raise TypeError(f"CuPy cannot compile {function.__name__} for bfloat16")
        return function(a, *args, **kwargs)

    return refuse


def _with_axes(function: Callable[..., Any]) -> Callable[..., Any]:
    """An array without dimensions has no axis 0, which NumPy grants it."""

    @functools.wraps(function)
    def checked(a: np.ndarray, *args: Any, axis: Any = None, **kwargs: Any) -> Any:
        if a.ndim == 0 and axis not in (None, ()):
            raise np.exceptions.AxisError(axis, 0)
        return function(a, *args, axis=axis, **kwargs)

    return checked


_OTHERWISE = {
    "matmul": _matmul,
    "allclose": lambda *args, **kwargs: np.asarray(np.allclose(*args, **kwargs)),
    "array_equal": lambda *args, **kwargs: np.asarray(np.array_equal(*args, **kwargs)),
    **{name: _widened(getattr(np, name)) for name in ("clip", "tril", "triu", "where")},
    "cumsum": _refused(np.cumsum),
    **{name: _with_axes(getattr(np, name)) for name in ("max", "mean", "min", "sum")},
}
for _name in ("all", "any", "argmax", "argmin", "max", "mean", "min", "prod", "std", "sum", "var"):
    setattr(ndarray, _name, _method(_with_axes(getattr(np.ndarray, _name))))
for _name, _wrapped in {"clip": _widened, "cumsum": _refused, "cumprod": _refused}.items():
    setattr(ndarray, _name, _method(_wrapped(getattr(np.ndarray, _name))))


def asarray(a: Any, dtype: Any = None) -> ndarray:
    return array(a, dtype, copy=None)


def array(a: Any, dtype: Any = None, copy: bool | None = True) -> ndarray:
    if isinstance(a, ndarray):
        return _call(np.array, a, dtype, copy=copy)
    cuda.copy_from_host("array")
    return ndarray(np.array(a, dtype))


def from_dlpack(source: Any) -> ndarray:
    if source.__dlpack_device__()[0] not in (2, 13):
        raise TypeError("CuPy takes memory of the device only")
    there = SimpleNamespace(__dlpack__=source.__dlpack__, __dlpack_device__=lambda: (1, 0))
    return ndarray(np.from_dlpack(there), source)


def empty(shape: Any, dtype: Any = float) -> ndarray:
    return ndarray(cuda.poisoned(np.empty(shape, dtype)))


def empty_like(a: ndarray, dtype: Any = None, shape: Any = None) -> ndarray:
    return ndarray(cuda.poisoned(np.empty_like(a._array, dtype, shape=shape)))


def asnumpy(a: Any) -> np.ndarray:
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def get_default_memory_pool() -> cuda.MemoryPool:
    return cuda.default_pool


class _Grid:
    def __getitem__(self, index: Any) -> Any:
        return _call(lambda: np.ogrid[index])


ogrid = _Grid()


class RawModule:
    """Kernels that run on the CPU, one thread at a time."""

    def __init__(self, *, code: str, options: tuple[str, ...] = (), name_expressions: list[str] | None = None) -> None:
        if type(options) is not tuple:
            raise TypeError(f"options are a tuple, not {type(options)}")
        self._code, self._names = code, name_expressions or []

    def get_function(self, name: str) -> Callable[..., None]:
        if name not in self._names:
            raise RuntimeError(f"{name} is not among the name expressions")
        return functools.partial(self._run, name)

    def _run(self, name: str, grid: tuple[int, ...], block: tuple[int], args: tuple[Any, ...], shared_mem: int = 0) -> None:
        library = _library(self._code)
        kinds = library.kernels[name]
        if shared_mem or len(block) != 1 or len(kinds) != len(args):
            raise TypeError(f"kernel {name}: {len(kinds)} arguments, blocks of 1 dimension, no shared memory; got {len(args)}")
        for kind, value in zip(kinds, args, strict=True):
            if not isinstance(value, (ndarray, np.uintp) if kind.endswith("*") else _SCALARS[kind]):
                raise TypeError(f"kernel {name} reads a {kind} where {type(value)} was given")
        held = [a._array if isinstance(a, ndarray) else a.item() for a in args]

        def run() -> None:
            library.launch(name, grid, block[0], *(Strided(a) if isinstance(a, np.ndarray) else a for a in held))

        cuda.submit(run)


@functools.cache
def _library(code: str) -> Library:
    source = cache() / f"{hashlib.sha256(code.encode()).hexdigest()[:20]}.cu"
    own = source.with_suffix(f".{os.getpid()}")  # other ranks may read and write it, too
    own.write_text(code, encoding="utf-8")
    own.replace(source)
    return Library(source)
