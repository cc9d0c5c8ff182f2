"""Memory for compute: a function whose results are not kept, but made again when their gradients are wanted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from tinytensor import backend, state, writes
from tinytensor.autograd import Node, Op, Spec, Value
from tinytensor.backend import precision, random
from tinytensor.tensor import Tensor


def checkpoint(f: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """f(*inputs) without keeping what happens inside f: backward runs f a second time, with the same random numbers.

    Gradients reach the inputs and everything f closes over, with the same bits as without it (derivatives of higher order are
    sums in another order). f must return one tensor and do the same when called again, with the tensors that it closes over
    unchanged; nothing is recorded at first, so it cannot ask for gradients itself. (Chen et al., "Training deep nets with
    sublinear memory cost", 2016.)
    """
    begun, reads = next(writes.serial), _Reads()
    edges = [x.node if isinstance(x, Value) else None for x in inputs]
    with state.to_be_replayed(), random.noted() as keys, nullcontext() if any(edges) else reads:
        y = f(*inputs)
    if not isinstance(y, Tensor):
        raise TypeError(f"checkpoint: f must return one tensor, it returned {type(y).__name__}")
    if not (any(edges) or reads.wanted) or not state.is_grad_enabled() or not backend.is_float(y.dtype):
        return y
    values = [x for x in inputs if isinstance(x, Value)]
    if any(writes.find(x.data, begun) for x in values):
        raise RuntimeError("checkpoint: f wrote into an input in place, which backward would do again; write into a clone()")
    # twins, for somebody may give a tensor other data; and a view, for y may be an input, or a tensor that f closes over
    twins = [Tensor(x.data, x.node) if isinstance(x, Value) else x for x in inputs]
    node = _Replay(Checkpoint, {}, edges, [Spec(y.data), *twins], None)
    node.f, node.keys, node.precision, node.begun = f, keys, precision.current(), begun
    known = y.node is not None or any(y.data is x.data for x in values)
    return Tensor(y.data.view() if known else y.data, node)


class _Reads(state.Observer):
    """Notes whether f reads anything, of what it closes over, that wants a gradient."""

    wanted = False

    def forward(self, op: type[Op], inputs: tuple[Any, ...], params: dict[str, Any], run: Callable[[], Any]) -> Any:
        if state.is_differentiated():
            self.wanted |= any(isinstance(x, Value) and x.node is not None for x in inputs)
        return run()


class Checkpoint(Op):
    """y = f(x₁, x₂, …), keeping only the inputs;  backward runs f again, this time recorded"""

    def vjp(g, y, *inputs):  # for those who look inside: `_Replay.pull` stands in its place
        raise NotImplementedError


class _Replay(Node):
    """A node that stands for a whole function: on its turn it records the function's graph and hands the gradient to that."""

    __slots__ = ("begun", "f", "keys", "precision")
    begun: int  # the serial when f first began to read
    f: Callable[..., Tensor] | None
    keys: list[random.Key]  # of the random numbers that f drew
    precision: state.Precision
    opaque = True  # what f closes over (its parameters) is not among the edges

    def free(self) -> None:
        super().free()
        self.f, self.keys = None, []

    def pull(self, g: Any, create_graph: bool, send: Callable[[Any, Any], None], wanted: set[Any] | None) -> None:
        if self.values is None or self.f is None:
            super().pull(g, create_graph, send, wanted)  # raises: freed
            return
        written = writes.newer(self.begun)  # before f writes again
        watch = [_Unwritten(self, written)] if written else []
        observers = (*state.thread.observers, *watch)
        # f belongs to the module that called it
        with state.lent((True, self.precision, self.call, observers)), random.noted(self.keys) as keys:
            y = self.f(*self.values[1:])
        if keys != self.keys:
            raise RuntimeError(
                f"{self}: f drew {len(self.keys)} random arrays in forward, and not the same ones ({len(keys)}) when backward "
                "ran it again; it must do the same both times, so call train() or eval() after backward"
            )
        if y.node is not None:
            send(y.node, g)


class _Unwritten(state.Observer):
    """Refuses what f reads again although somebody has written there since it was read first."""

    def __init__(self, node: _Replay, written: writes.Log) -> None:
        self.node, self.written = node, written

    def forward(self, op: type[Op], inputs: tuple[Any, ...], params: dict[str, Any], run: Callable[[], Any]) -> Any:
        if state.is_differentiated():  # under f's own no_grad it may read anything
            arrays = [x.data if isinstance(x, Value) else x for x in inputs]
            self.node.check_unwritten(arrays, params, self.node.begun, self.written)
        return run()
