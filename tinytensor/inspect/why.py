"""Why a tensor has no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tinytensor import backend, state, writes
from tinytensor.autograd import Node, Value
from tinytensor.backend import byte_bounds, memory_root
from tinytensor.inspect.graph import collect, saved_arrays
from tinytensor.state import Observer
from tinytensor.tensor import Tensor


def why_no_grad(x: Tensor, loss: Tensor | Callable[[], Tensor]) -> str:
    """One sentence: what keeps a gradient of `loss` from reaching x.grad, or that nothing does.

    With a function that computes the loss from x in place of the loss, it is run once more, and each op that x passes is looked
    at, so that the answer can name the line of a no_grad(), a detach() or an integer dtype which cut the way.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"why_no_grad: x is a {type(x).__name__}, not a tensor")
    if not backend.is_float(x.dtype):
        return f"x is {x.dtype}: only floating-point tensors have gradients; use x.astype('float32') before the first operation"
    trace = _Trace()
    if not isinstance(loss, Value):
        with trace:
            loss = loss()
    if not isinstance(loss, Tensor):
        raise TypeError(f"why_no_grad: loss is a {type(loss).__name__}, not a tensor or a function that returns one")
    if x.node is None:
        return (
            "x does not require gradients: set x.requires_grad = True before the computation (detach() and no_grad() drop it)"
        )
    reached = {id(entry.node): entry for entry in collect(loss)} if loss.node is not None else {}
    if x.grad is not None:
        return "x has a gradient"
    if id(x.node) not in reached:
        replayed = [entry.node for entry in reached.values() if entry.node.opaque]
        if replayed:
            return f"x may be reached inside {replayed[0]}, which only backward() records; call it and look at x.grad"
        return trace.cut(x, loss) or _cut_by_memory(x, reached) or _not_reached(loss, trace)
    if isinstance(x.node, Node) and x.node.grad is None:
        return f"a gradient reaches x, a result ({x.node}), but only leaves keep theirs; call x.retain_grad() before backward()"
    if getattr(loss.node, "values", ()) is None:
        return "a backward pass has freed this graph and left x none: it was asked for others, or x.grad was cleared after it"
    return "nothing: a gradient reaches x as soon as loss.backward() is called"


def _not_reached(loss: Tensor, trace: _Trace) -> str:
    if trace.last:
        return f"what came of x left the graph as a number or another array after {trace.last}: through item() or numpy(), say"
    if trace.steps:
        return "loss was not computed from x: no op took x"
    if loss.node is None:
        return (
            "nothing was recorded for loss: it was computed under no_grad(), detached, or from nothing that requires "
            "gradients; pass a function that computes it to learn where"
        )
    return (
        "none of the arrays that loss keeps for backward is x's; pass a function that computes loss to learn where it was cut"
    )


def _cut_by_memory(x: Tensor, reached: dict[int, Any]) -> str | None:
    """An op that read x's memory, though through a tensor without gradient."""
    low, high = byte_bounds(x.data)
    for entry in reached.values():
        for role, array in saved_arrays(entry.node) if isinstance(entry.node, Node) else ():
            first, last = byte_bounds(array)
            if memory_root(array) is memory_root(x.data) and first < high and low < last and role not in ("y", "kernel"):
                if x.node is not None and entry.node.serial < x.node.serial:
                    return f"x.requires_grad was set after {entry.node} had taken x"
                return f"{entry.node} took x's memory without its gradient, through detach(), .data or .numpy()"
    return None


class _Step(NamedTuple):
    inputs: list[Any]  # tensors and arrays
    result: Tensor
    recording: bool | None  # as in `state`
    text: str


class _Trace(Observer):
    """Every op that runs, recorded or not."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.last = ""  # the last op that took what came of x

    def forward(self, op: Any, inputs: tuple[Any, ...], params: dict[str, Any], run: Callable[[], Any]) -> Any:
        text = f"{op.name} at {writes.caller()}{state.within(state.thread.call)}"
        y = run()
        self.steps.append(_Step([i for i in inputs if hasattr(i, "dtype")], y, state.thread.recording, text))
        return y

    def cut(self, x: Tensor, loss: Tensor) -> str | None:
        """Where what came of x, on its way to loss, first went on without a gradient."""
        leading = {id(memory_root(loss.data))}  # memory of loss and of what it was made from; the steps keep it alive
        on_the_way = set()
        for step in reversed(self.steps):
            if id(memory_root(step.result.data)) in leading:
                leading.update(_roots(step.inputs))
                on_the_way.add(id(step.result))
        came = {id(memory_root(x.data))}  # memory of x and of what was made from it
        for inputs, result, recording, text in self.steps:
            ours = [i for i in inputs if _roots([i]) <= came]
            if not ours:
                continue
            self.last = text
            came.add(id(memory_root(result.data)))
            linked = result.node is not None and any(isinstance(i, Value) and i.node is not None for i in ours)
            if linked or recording is None or id(result) not in on_the_way:  # None: backward will do it again
                continue
            if not recording:
                return f"{text} ran under no_grad()"
            if not backend.is_float(result.dtype):
                return f"{text} gave {result.dtype}, through which no gradient flows"
            return f"{text} took what came of x without its gradient, through detach(), .data or .numpy()"
        return None


def _roots(inputs: list[Any]) -> set[int]:
    return {id(memory_root(i.data if isinstance(i, Value) else i)) for i in inputs}
