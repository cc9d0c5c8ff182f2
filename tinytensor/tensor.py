"""Tensor: an array, its gradient, and its place in the graph. Operators and methods are one-line calls into `ops`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tinytensor import autograd, backend, ops, writes
from tinytensor.autograd import Leaf, Node, Value
from tinytensor.dispatch import FUNCTIONS, REDUCTIONS, untracked
from tinytensor.ops.elementwise import to_device
from tinytensor.ops.index import plain_index, written


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
            if self.data.dtype.kind != "f":
                raise TypeError(f"only floating-point tensors have gradients; this one is {self.dtype}, use dtype='float32'")
            self.node = Leaf()

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
        if autograd.as_value(value).data.shape != self.shape:
            raise ValueError(f"a gradient of shape {autograd.as_value(value).data.shape} does not fit shape {self.shape}")
        self.node.grad = autograd.as_value(value)

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
        if self.requires_grad and autograd.is_grad_enabled():
            raise TypeError("a tensor that requires gradients does not turn into an array by itself; call detach().numpy()")
        return np.array(self.numpy(), dtype=dtype, copy=copy)

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

        def entry(gradient: Tensor) -> Tensor | None:  # one object for each registration, also of the same hook
            return hook(gradient)

        node.hooks = [*(node.hooks or ()), entry]

        def remove() -> None:
            node.hooks = [h for h in node.hooks or () if h is not entry] or None

        return remove

    # -- writing in place

    def __setitem__(self, index: Any, value: Any) -> None:
        index = plain_index(index)
        if self._tracks(value):
            self._rewrite(lambda before: ops.setitem(before, index, value))
        else:
            self.data[index] = value.data if isinstance(value, Value) else value
            writes.record(self.data)

    def _inplace(self, op: Callable[[Any, Any], Tensor], other: Any) -> Tensor:
        if self._tracks(other):
            self._rewrite(lambda before: op(before, before if other is self else other))
        else:
            y = op(self.detach(), other.detach() if isinstance(other, Tensor) else other)
            self._overwrite(y)
        return self

    def _tracks(self, other: Any) -> bool:
        return autograd.is_grad_enabled() and (self.requires_grad or getattr(other, "requires_grad", False))

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
        y = op(Tensor(self.data.copy(), self.node))
        self._overwrite(y)
        retained = self.node is not None and self.node.grad is not None
        self.node = written(y).node  # newer than the write: what this memory holds from now on
        if retained:
            self.retain_grad()

    def __iadd__(self, other: Any) -> Tensor:
        return self._inplace(ops.add, other)

    def __isub__(self, other: Any) -> Tensor:
        return self._inplace(ops.sub, other)

    def __imul__(self, other: Any) -> Tensor:
        return self._inplace(ops.mul, other)

    def __itruediv__(self, other: Any) -> Tensor:
        return self._inplace(ops.div, other)

    # -- operators

    def __add__(self, other: Any) -> Tensor:
        return ops.add(self, other)

    def __radd__(self, other: Any) -> Tensor:
        return ops.add(other, self)

    def __sub__(self, other: Any) -> Tensor:
        return ops.sub(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return ops.sub(other, self)

    def __mul__(self, other: Any) -> Tensor:
        return ops.mul(self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return ops.mul(other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return ops.div(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return ops.div(other, self)

    def __pow__(self, other: Any) -> Tensor:
        return ops.pow(self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return ops.pow(other, self)

    def __matmul__(self, other: Any) -> Tensor:
        return ops.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return ops.matmul(other, self)

    def __neg__(self) -> Tensor:
        return ops.neg(self)

    def __abs__(self) -> Tensor:
        return ops.abs(self)

    def __getitem__(self, index: Any) -> Tensor:
        return ops.getitem(self, index)

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return untracked(np.equal, self, other)

    def __ne__(self, other: object) -> Tensor:  # type: ignore[override]
        return untracked(np.not_equal, self, other)

    def __lt__(self, other: Any) -> Tensor:
        return untracked(np.less, self, other)

    def __le__(self, other: Any) -> Tensor:
        return untracked(np.less_equal, self, other)

    def __gt__(self, other: Any) -> Tensor:
        return untracked(np.greater, self, other)

    def __ge__(self, other: Any) -> Tensor:
        return untracked(np.greater_equal, self, other)

    def __and__(self, other: Any) -> Tensor:
        return untracked(np.bitwise_and, self, other)

    def __or__(self, other: Any) -> Tensor:
        return untracked(np.bitwise_or, self, other)

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Tensor:
        return untracked(np.invert, self)

    # -- functions as methods

    def exp(self) -> Tensor:
        return ops.exp(self)

    def expm1(self) -> Tensor:
        return ops.expm1(self)

    def log(self) -> Tensor:
        return ops.log(self)

    def log1p(self) -> Tensor:
        return ops.log1p(self)

    def sqrt(self) -> Tensor:
        return ops.sqrt(self)

    def rsqrt(self) -> Tensor:
        return ops.rsqrt(self)

    def sin(self) -> Tensor:
        return ops.sin(self)

    def cos(self) -> Tensor:
        return ops.cos(self)

    def tanh(self) -> Tensor:
        return ops.tanh(self)

    def sigmoid(self) -> Tensor:
        return ops.sigmoid(self)

    def relu(self) -> Tensor:
        return ops.relu(self)

    def silu(self) -> Tensor:
        return ops.silu(self)

    def softplus(self) -> Tensor:
        return ops.softplus(self)

    def erf(self) -> Tensor:
        return ops.erf(self)

    def abs(self) -> Tensor:
        return ops.abs(self)

    def gelu(self, approximate: str = "tanh") -> Tensor:
        return ops.gelu(self, approximate)

    def clip(self, low: float | None = None, high: float | None = None) -> Tensor:
        return ops.clip(self, low, high)

    def sum(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return ops.sum(self, axis, keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return ops.mean(self, axis, keepdims)

    def max(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return ops.max(self, axis, keepdims)

    def min(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return ops.min(self, axis, keepdims)

    def logsumexp(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return ops.logsumexp(self, axis, keepdims)

    def var(self, axis: Any = None, keepdims: bool = False, ddof: int = 0) -> Tensor:
        return ops.var(self, axis, keepdims, ddof)

    def std(self, axis: Any = None, keepdims: bool = False, ddof: int = 0) -> Tensor:
        return ops.std(self, axis, keepdims, ddof)

    def prod(self, axis: int | None = None, keepdims: bool = False) -> Tensor:
        return ops.prod(self, axis, keepdims)

    def argmax(self, axis: int | None = None, keepdims: bool = False) -> Tensor:
        return ops.argmax(self, axis, keepdims)

    def argmin(self, axis: int | None = None, keepdims: bool = False) -> Tensor:
        return ops.argmin(self, axis, keepdims)

    def softmax(self, axis: int = -1) -> Tensor:
        return ops.softmax(self, axis)

    def log_softmax(self, axis: int = -1) -> Tensor:
        return ops.log_softmax(self, axis)

    def cumsum(self, axis: int = -1) -> Tensor:
        return ops.cumsum(self, axis)

    def reshape(self, *shape: Any) -> Tensor:
        return ops.reshape(self, *shape)

    def broadcast_to(self, *shape: Any) -> Tensor:
        return ops.broadcast_to(self, *shape)

    def expand(self, *shape: Any) -> Tensor:
        return ops.expand(self, *shape)

    def transpose(self, *axes: Any) -> Tensor:
        return ops.transpose(self, *axes)

    def swapaxes(self, a: int, b: int) -> Tensor:
        return ops.swapaxes(self, a, b)

    def squeeze(self, axis: Any = None) -> Tensor:
        return ops.squeeze(self, axis)

    def unsqueeze(self, axis: Any) -> Tensor:
        return ops.unsqueeze(self, axis)

    def flip(self, axis: Any = None) -> Tensor:
        return ops.flip(self, axis)

    def tril(self, k: int = 0) -> Tensor:
        return ops.tril(self, k)

    def triu(self, k: int = 0) -> Tensor:
        return ops.triu(self, k)

    def split(self, sections: Any, axis: int = 0) -> list[Tensor]:
        return ops.split(self, sections, axis)

    def chunk(self, chunks: int, axis: int = 0) -> list[Tensor]:
        return ops.chunk(self, chunks, axis)

    def gather(self, axis: int, indices: Any) -> Tensor:
        return ops.gather(self, axis, indices)

    def scatter_add(self, axis: int, indices: Any, values: Any) -> Tensor:
        return ops.scatter_add(self, axis, indices, values)

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
