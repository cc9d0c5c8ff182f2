"""Tensor: an array, its gradient, and its place in the graph. Its operators and methods are the functions of `ops`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from tinytensor import autograd, backend, notebook, ops, writes
from tinytensor.autograd import Leaf, Node, Value
from tinytensor.backend import dlpack
from tinytensor.dispatch import FUNCTIONS, REDUCTIONS, untracked
from tinytensor.ops.elementwise import to_device
from tinytensor.ops.index import plain_index, written
from tinytensor.state import is_differentiated


def _swapped(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: f(other, self)


def _in_place(f: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Any]:
    return lambda self, other: self._write(f, other)


class Tensor(Value):
    """An array with a derivative.

    `data` is the NumPy or CuPy array itself. `grad` is None until a backward pass has reached a leaf (a tensor that the user
    made with requires_grad=True) or a tensor that called retain_grad(). Arithmetic follows NumPy; float32 stays float32
    when it meets Python numbers, NumPy scalars, or 0-d tensors of another float dtype.
    """

    __slots__ = ()
    __hash__ = object.__hash__

    # -- what it is

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def device(self) -> str:
        return backend.device_of(self.data)

    @property
    def T(self) -> Tensor:
        return ops.transpose(self)

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if isinstance(self.node, Node):
            if not wanted:
                raise RuntimeError("requires_grad of a result follows from its inputs; use detach()")
        elif not wanted:
            self.node = None
        elif self.node is None:
            if not backend.is_float(self.data.dtype):
                raise TypeError(f"only floating-point tensors have gradients; this one is {self.dtype}, use dtype='float32'")
            self.node = Leaf(self)

    @property
    def is_leaf(self) -> bool:
        return not isinstance(self.node, Node)

    @property
    def grad(self) -> Tensor | None:
        grad: Any = None if self.node is None else self.node.grad
        return None if grad is True else grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is None:
            if self.node is not None:
                self.node.grad = True if isinstance(self.node, Node) and self.node.grad is not None else None
            return
        if self.node is None:
            raise RuntimeError("a tensor that does not require gradients has no .grad; set requires_grad=True")
        gradient = autograd.as_value(value)
        if gradient.shape != self.shape:
            raise ValueError(f"a gradient of shape {gradient.shape} does not fit shape {self.shape}")
        self.node.grad = gradient.clone() if backend.read_only(gradient.data) else gradient  # more may be added to it

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError("a 0-d tensor has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        body = np.array2string(backend.to_device(self.data, "cpu"), separator=", ", prefix="tensor(", threshold=1000)
        notes = [body, f"shape={self.shape}", f"dtype={self.dtype}"]
        if self.device != "cpu":
            notes.append(f"device={self.device}")
        if isinstance(self.node, Node):
            notes.append(f"op={self.node.op.name}")
        elif self.node is not None:
            notes.append("requires_grad=True")
        return f"tensor({', '.join(notes)})"

    def _repr_html_(self) -> str:
        return notebook.tensor_html(self)

    # -- leaving the graph

    def item(self) -> Any:
        """The only element, as a Python number."""
        if self.size != 1:
            raise ValueError(f"item() needs exactly one element, this tensor has shape {self.shape}")
        return self.data.item()

    def tolist(self) -> Any:
        """Nested lists of Python numbers."""
        return self.data.tolist()

    def numpy(self) -> np.ndarray:
        """The array, on the CPU. It shares this tensor's memory there; writing into it goes unnoticed by autograd."""
        return backend.to_device(self.data, "cpu")

    def detach(self) -> Tensor:
        """The same memory outside the graph."""
        return Tensor(self.data)

    def clone(self) -> Tensor:
        """A copy, differentiable."""
        return ops.cast(self, self.dtype)

    def to(self, target: Any) -> Tensor:
        """On another device ("cpu", "cuda") or in another dtype, differentiably; the same tensor when it is so already."""
        return to_device(self, target) if target in ("cpu", "cuda") else self.astype(target)

    def astype(self, dtype: Any) -> Tensor:
        """In another dtype; the same tensor when it has that dtype already."""
        return self if self.dtype == backend.as_dtype(dtype) else ops.cast(self, dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.requires_grad and is_differentiated():
            raise TypeError("a tensor that requires gradients does not turn into an array by itself; call detach().numpy()")
        if self.device != "cpu":
            if copy is False:
                raise ValueError(f"a tensor on {self.device} becomes a NumPy array by a copy only; leave out copy=False")
            copy = None  # the transfer is one
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None) -> Any:
        if self.requires_grad:
            raise BufferError("a tensor that requires gradients does not leave by DLPack, past autograd; use detach()")
        return dlpack.to_dlpack(self.data, stream=stream, max_version=max_version, dl_device=dl_device, copy=copy)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.data.__dlpack_device__()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else repr(self)

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __index__(self) -> int:
        if self.dtype.kind not in "iu":
            raise TypeError(f"only integer tensors can be an index, not {self.dtype}")
        return int(self.item())

    # -- gradients

    def backward(self, gradient: Any = None, retain_graph: bool = False, create_graph: bool = False) -> None:
        """Add ∂self/∂leaf, times `gradient`, to the grad of every leaf that self was made from.

        `gradient` has self's shape and may be left out for one element. The graph is freed on the way unless retain_graph;
        create_graph records the pass, so that the gradients can be differentiated again.
        """
        seed = root(self, gradient, create_graph)
        autograd.sweep(
            [seed],
            autograd.deposit,
            retain_graph=retain_graph,
            create_graph=create_graph,
            slot_of=None if create_graph else autograd.free_slot,
        )

    def retain_grad(self) -> None:
        """Keep this result's gradient in .grad after backward, as a leaf does."""
        if self.node is None:
            raise RuntimeError("a tensor that does not require gradients will never have one to retain")
        if isinstance(self.node, Node) and self.node.grad is None:
            self.node.grad = True

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Callable[[], None]:
        """Call hook(gradient) when this tensor's whole gradient is known; what it returns replaces it. Returns a remover."""
        node = self.node
        if node is None:
            raise RuntimeError("a tensor that does not require gradients will never call a hook")
        entry = partial(hook)  # one object for each registration, also of the same hook; pickled if hook can be
        node.hooks = [*(node.hooks or ()), entry]

        def remove() -> None:
            node.hooks = [h for h in node.hooks or () if h is not entry] or None

        return remove

    # -- writing in place

    def __setitem__(self, index: Any, value: Any) -> None:
        index = plain_index(index, self)
        writes.check(self.data)
        if self._tracks(value):
            self._rewrite(lambda before: ops.setitem(before, index, value))
        else:
            self.data[index] = value.data if isinstance(value, Value) else value
            writes.record(self.data)

    def _write(self, op: Callable[[Any, Any], Tensor], other: Any) -> Tensor:
        writes.check(self.data)
        if self._tracks(other):
            self._rewrite(lambda before: op(before, before if other is self else other))
        else:
            self._overwrite(op(self, other))
        return self

    def _tracks(self, other: Any) -> bool:
        return is_differentiated() and (self.requires_grad or getattr(other, "requires_grad", False))

    def _overwrite(self, y: Tensor) -> None:
        if y.shape != self.shape or not np.can_cast(y.dtype, self.dtype, "same_kind"):
            raise ValueError(f"in-place result of shape {y.shape}, {y.dtype} does not fit into {self.shape}, {self.dtype}")
        self.data[...] = y.data
        writes.record(self.data)

    def _rewrite(self, op: Callable[[Tensor], Tensor]) -> None:
        """self = op(self) in self's own memory, recorded. What op saves of self is a copy of how it was before."""
        if isinstance(self.node, Leaf):
            raise RuntimeError(
                f"in-place write at {writes.caller()} to a leaf that requires gradients; do it under no_grad(), or to a clone()"
            )
        if self.data.base is not None:
            raise RuntimeError(
                f"in-place write at {writes.caller()} to a view of shape {self.shape}, whose base would not learn of its "
                "gradient; write into the base, or into a clone()"
            )
        if self.node is not None and writes.latest > self.node.serial:
            autograd.check_current(self, self.node)
        y = op(Tensor(self.data.copy(), self.node))
        self._overwrite(y)
        retained = self.node is not None and self.node.grad is not None
        self.node = written(y).node  # newer than the write: what this memory holds from now on
        if retained:
            self.retain_grad()

    # -- operators and methods: the functions of `ops`, with self for their first argument

    __add__, __radd__ = ops.add, _swapped(ops.add)
    __sub__, __rsub__ = ops.sub, _swapped(ops.sub)
    __mul__, __rmul__ = ops.mul, _swapped(ops.mul)
    __truediv__, __rtruediv__ = ops.div, _swapped(ops.div)
    __pow__, __rpow__ = ops.pow, _swapped(ops.pow)
    __matmul__, __rmatmul__ = ops.matmul, _swapped(ops.matmul)
    __neg__, __abs__, __getitem__ = ops.neg, ops.abs, ops.getitem
    __eq__, __ne__ = untracked(np.equal), untracked(np.not_equal)
    __lt__, __le__ = untracked(np.less), untracked(np.less_equal)
    __gt__, __ge__ = untracked(np.greater), untracked(np.greater_equal)
    __and__, __or__, __invert__ = untracked(np.bitwise_and), untracked(np.bitwise_or), untracked(np.invert)
    __rand__, __ror__ = __and__, __or__
    __iadd__, __isub__, __imul__, __itruediv__ = _in_place(ops.add), _in_place(ops.sub), _in_place(ops.mul), _in_place(ops.div)

    exp, expm1, log, log1p, sqrt, rsqrt = ops.exp, ops.expm1, ops.log, ops.log1p, ops.sqrt, ops.rsqrt
    sin, cos, tanh, abs, clip = ops.sin, ops.cos, ops.tanh, ops.abs, ops.clip
    sigmoid, relu, silu, softplus, erf, gelu = ops.sigmoid, ops.relu, ops.silu, ops.softplus, ops.erf, ops.gelu
    sum, mean, max, min, prod, var, std = ops.sum, ops.mean, ops.max, ops.min, ops.prod, ops.var, ops.std
    logsumexp, softmax, log_softmax, cumsum = ops.logsumexp, ops.softmax, ops.log_softmax, ops.cumsum
    argmax, argmin, gather, scatter_add = ops.argmax, ops.argmin, ops.gather, ops.scatter_add
    reshape, transpose, swapaxes, squeeze, unsqueeze = ops.reshape, ops.transpose, ops.swapaxes, ops.squeeze, ops.unsqueeze
    broadcast_to, expand, flip, tril, triu = ops.broadcast_to, ops.expand, ops.flip, ops.tril, ops.triu
    split, chunk = ops.split, ops.chunk

    # -- NumPy's functions on tensors (NEP 13 and NEP 18)

    __array_priority__ = 1000

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        f = FUNCTIONS.get(ufunc) if method == "__call__" else None
        if method == "reduce" and ufunc in REDUCTIONS:
            f = REDUCTIONS[ufunc]
            kwargs.setdefault("axis", 0)  # unlike np.sum
        if f is None or kwargs.get("out") is not None:
            return NotImplemented
        return f(*inputs, **{k: v for k, v in kwargs.items() if k != "out"})

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        f = FUNCTIONS.get(func)
        return NotImplemented if f is None else f(*args, **kwargs)


Value.result_type = Tensor


def root(output: Tensor, gradient: Any, create_graph: bool) -> tuple[Any, Any]:
    """A node and its seed gradient, for `sweep`: an array, or a tensor when the pass is to be recorded."""
    if output.node is None:
        raise RuntimeError(
            "backward from a tensor that no gradient flows to: none of its inputs requires gradients, or it was made under "
            "no_grad() or detach()"
        )
    if gradient is None:
        if output.size != 1:
            raise ValueError(f"backward from a tensor of shape {output.shape} needs `gradient` of that shape, or .sum() first")
        seed = Tensor(np.ones_like(output.data))
    else:
        seed = autograd.as_value(gradient)
        if seed.data.shape != output.shape:
            raise ValueError(f"gradient of shape {seed.data.shape} does not fit the output's shape {output.shape}")
        seed = seed.astype(output.dtype)
    return output.node, seed if create_graph else seed.data
