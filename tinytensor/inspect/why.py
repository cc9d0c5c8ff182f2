"""Why a tensor has no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tinytensor import backend, state, writes
from tinytensor.autograd import Node, Value
from tinytensor.backend import memory_root
from tinytensor.inspect.graph import collect, saved_arrays
from tinytensor.state import Observer
from tinytensor.tensor import Tensor


def why_no_grad(x: Tensor, loss: Tensor | Callable[[], Tensor]) -> str:
    """One sentence: what keeps a gradient of `loss` from reaching x.grad, or that nothing does.

    With a function that computes the loss from x in place of the loss, it is run once more, and each op that x passes is looked
    at, so that the answer can name the line of a no_grad(), a detach() or an integer dtype which cut the way.
    """
    if not backend.is_float(x.dtype):
        return f"x is {x.dtype}: only floating-point tensors have gradients; use x.astype('float32') before the first operation"
    trace = _Trace()
    if not isinstance(loss, Value):
        with trace:
            loss = loss()
    if x.node is None:
        return (
            "x does not require gradients: set x.requires_grad = True before the computation (detach() and no_grad() drop it)"
        )
    reached = {id(entry.node): entry for entry in collect(loss)} if loss.node is not None else {}
    if id(x.node) not in reached:
        return trace.cut(x) or _cut_by_memory(x, reached) or _not_reached(x, loss, bool(trace.steps))
    if x.grad is not None:
        return "x has a gradient"
    if isinstance(x.node, Node):
        return f"a gradient reaches x, a result ({x.node}), but only leaves keep theirs; call x.retain_grad() before backward()"
    if loss.node is not None and getattr(loss.node, "values", ()) is None:
        return "backward() ran and reached x, whose gradient was cleared after it, by x.grad = None or zero_grad()"
    return "nothing: a gradient reaches x as soon as loss.backward() is called"


def _not_reached(x: Tensor, loss: Tensor, traced: bool) -> str:
    if traced:
        return "loss was not computed from x: no op took x, or what came of it, on the way to loss"
    if loss.node is None:
        return (
            "nothing was recorded for loss: it was computed under no_grad(), detached, or from nothing that requires "
            "gradients; pass a function that computes it to learn where"
        )
    if x.node is not None and x.node.serial > loss.node.serial:
        return "x was made after loss, so loss cannot depend on it"
    return (
        "no recorded op of loss took x, or what came of it; pass a function that computes loss to learn where the way was cut"
    )


def _cut_by_memory(x: Tensor, reached: dict[int, Any]) -> str | None:
    """An op that read x's memory, though through a tensor without gradient."""
    root = memory_root(x.data)
    for entry in reached.values():
        if isinstance(entry.node, Node):
            for role, array in saved_arrays(entry.node):
                if memory_root(array) is root and role not in ("y", "kernel"):
                    return f"{entry.node} took x's memory without its gradient, through detach(), .data or .numpy()"
    return None


class _Step(NamedTuple):
    inputs: list[Any]  # tensors and arrays
    result: Tensor
    recording: bool
    text: str


class _Trace(Observer):
    """Every op that runs, recorded or not."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []

    def forward(self, op: Any, inputs: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        place = f" in {module}" if (module := state.path(state.thread.call)) else ""
        text = f"{op.name} at {writes.caller()}{place}"
        y = run()
        self.steps.append(_Step([i for i in inputs if hasattr(i, "dtype")], y, state.is_grad_enabled(), text))
        return y

    def cut(self, x: Tensor) -> str | None:
        """Where what came of x first went on without a gradient."""
        came = {id(memory_root(x.data))}  # memory that holds x or what was computed from it; the steps keep it alive
        for inputs, result, recording, text in self.steps:
            ours = [i for i in inputs if id(memory_root(i.data if isinstance(i, Value) else i)) in came]
            if not ours:
                continue
            came.add(id(memory_root(result.data)))
            if result.node is not None and any(isinstance(i, Value) and i.node is not None for i in ours):
                continue
            if not recording:
                return f"{text} ran under no_grad()"
            if not backend.is_float(result.dtype):
                return f"{text} gave {result.dtype}, through which no gradient flows"
            return f"{text} took what came of x without its gradient, through detach(), .data or .numpy()"
        return None
