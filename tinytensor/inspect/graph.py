"""The recorded graph of a tensor as plain facts: what every node already knows, put in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tinytensor import state
from tinytensor.autograd import Leaf, Node, Spec, Value
from tinytensor.backend import Array, Into
from tinytensor.tensor import Tensor, root


@dataclass(eq=False)
class Entry:
    """One node of a graph, or one leaf."""

    node: Node | Leaf
    inputs: list[Entry | None] = field(default_factory=list)  # in the order of the op's arguments; None where no gradient flows
    module: str = ""
    """dotted name of the module in whose forward it was made: "h.3.mlp"; of a parameter, its own: "h.3.mlp.c_fc.weight" """

    @property
    def op(self) -> str:
        return "leaf" if isinstance(self.node, Leaf) else self.node.op.name

    @property
    def rule(self) -> str:
        """The op's mathematics, its docstring."""
        return "" if isinstance(self.node, Leaf) else (self.node.op.__doc__ or "").strip()

    @property
    def line(self) -> str:
        """file:line of the user's code that made it."""
        return "" if isinstance(self.node, Leaf) else str(self.node.origin)


def collect(loss: Tensor) -> list[Entry]:
    """Every node and leaf that a gradient of `loss` passes, oldest first."""
    if loss.node is None:
        raise RuntimeError("nothing was recorded for this tensor: none of its inputs requires gradients, or it was detached")
    found: dict[int, Entry] = {}
    stack: list[Node | Leaf] = [loss.node]
    while stack:
        node = stack.pop()
        if id(node) not in found:
            found[id(node)] = Entry(node)
            stack.extend(edge for edge in node.edges if edge is not None)
    entries = sorted(found.values(), key=lambda entry: entry.node.serial)
    names: dict[int, str] = {}  # of parameters, by their leaf
    paths: dict[int, str] = {}  # by a call's identity: that of a module which is no more cannot be hashed
    for entry in entries:
        if isinstance(entry.node, Node):
            entry.inputs = [None if edge is None else found[id(edge)] for edge in entry.node.edges]
            call = entry.node.call
            if id(call) not in paths:
                paths[id(call)] = state.path(call)
                names.update(_parameters(call))
            entry.module = paths[id(call)]
    for entry in entries:
        if isinstance(entry.node, Leaf):
            entry.module = names.get(id(entry.node), "")
    return entries


def _parameters(call: state.Call | None) -> Iterator[tuple[int, str]]:
    """The leaves of all parameters of the outermost module of a call, and their names."""
    while call is not None and call[1] is not None:
        call = call[1]
    if call is not None and (module := call[0]()) is not None:
        for name, parameter in module.named_parameters():
            yield id(parameter.node), name


def owners(entries: list[Entry]) -> list[Value]:
    """The tensors whose leaves are among these, as far as they still live."""
    found = [e.node.owner() for e in entries if isinstance(e.node, Leaf) and e.node.owner is not None]
    return [owner for owner in found if owner is not None]


def saved_arrays(node: Node) -> Iterator[tuple[str, Array]]:
    """(role, array) for each array that a node holds for backward: "y", the name of an input or parameter, or "kernel"."""
    code = node.op.vjp.__code__
    names = ["y", *code.co_varnames[2 : code.co_argcount]]
    for i, value in enumerate(node.values or ()):
        if not isinstance(value, Spec):
            yield from arrays_in(names[i] if i < len(names) else f"input {i - 1}", value)
    yield from arrays_in("kernel", getattr(node.vjp, "residual", None))
    for name, value in node.params.items():
        yield from arrays_in(name, value)


def arrays_in(role: str, value: Any) -> Iterator[tuple[str, Array]]:
    """(role, array) for each array in a value, its lists and tuples."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from arrays_in(role, part)
    elif isinstance(value, Value):
        yield role, value.data
    elif hasattr(value, "nbytes") and hasattr(value, "base"):
        yield role, value


def backward_pass(loss: Tensor, seen: Callable[[Node | Leaf, Any, list[tuple[Node | Leaf, Any]]], None]) -> None:
    """Walk back from `loss` and call seen(node, g, sent) for each node and leaf, newest first: g is its whole gradient, `sent`
    what it sends to each input. Nothing is freed, no .grad is touched, no hook runs.
    """
    node, g = root(loss, None, False)
    total: dict[Any, Any] = {node: g}
    while total:
        node = max(total, key=lambda n: n.serial)
        g = total.pop(node)
        sent: list[tuple[Node | Leaf, Any]] = []
        if isinstance(node, Node):
            node.pull(g, False, _appending(sent), None)
        seen(node, g, sent)
        for edge, share in sent:
            total[edge] = total[edge] + share if edge in total else share


def _appending(sent: list[tuple[Node | Leaf, Any]]) -> Callable[[Any, Any], None]:
    return lambda edge, share: sent.append((edge, share.add(None, None) if isinstance(share, Into) else share))
