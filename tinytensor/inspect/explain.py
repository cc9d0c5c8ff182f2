"""The backward pass as a page to step through: what arrives at each node, by which rule it goes on, where shares add up."""

from __future__ import annotations

import linecache
import sys
from collections import defaultdict
from inspect import cleandoc, getsource
from pathlib import Path
from textwrap import dedent
from typing import Any

from tinytensor.autograd import Leaf, Node, Op, Spec
from tinytensor.backend import Array
from tinytensor.inspect.arrays import describe, values
from tinytensor.inspect.graph import Entry, backward_pass, collect
from tinytensor.inspect.page import write_page
from tinytensor.state import Call
from tinytensor.tensor import Tensor


def explain(loss: Tensor, path: str | Path = "backward.html", max_nodes: int = 600) -> Path:
    """Write one HTML file that steps through the backward pass from `loss`, with its graph and its numbers; return its path.

    Nothing is freed, no .grad is touched and no hook runs: loss.backward() works afterwards as before. Tensors bear the names
    of the caller's variables. Of a graph of more than `max_nodes` nodes and leaves the newest are shown, and the page says so.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"explain: there is no folder {path.parent} in which to write {path.name}")
    if max_nodes < 1:
        raise ValueError(f"explain: max_nodes={max_nodes} must be at least 1")
    caller = sys._getframe(1)
    scope = {**caller.f_globals, **caller.f_locals}
    data = facts(loss, max_nodes, {k: v for k, v in scope.items() if isinstance(v, Tensor) and k[0] != "_"})
    return write_page(path, f"The backward pass of {data['nodes'][0]['name'] or 'a loss'}", "explain", data)


def facts(loss: Tensor, max_nodes: int, variables: dict[str, Tensor]) -> dict[str, Any]:
    """What the page shows, as plain data: nodes[i] is step i + 1 of the pass, and an array is its place in `arrays`."""
    page = _Pass(loss, max_nodes, variables)
    backward_pass(loss, page.seen)
    groups, places = _groups(list(page.shown))
    for node, shown in page.shown.items():
        shown["group"] = places[node]
        for given in shown["inputs"]:
            given["node"] = page.place.get(given.pop("edge"))
    return {
        "nodes": list(page.shown.values()),
        "groups": groups,
        "arrays": page.arrays,
        "left_out": page.count - len(page.shown),
        "hooks": any(node.hooks for node in page.entries),
    }


class _Pass:
    """Looks on at a backward pass and keeps of it what the page will show."""

    def __init__(self, loss: Tensor, max_nodes: int, variables: dict[str, Tensor]) -> None:
        self.max_nodes = max_nodes
        self.tensors = [loss, *variables.values()]
        self.names = {t.node: name for name, t in reversed(variables.items()) if t.node is not None}
        self.entries: dict[Any, Entry] = {}
        self.known: dict[Any, Array] = {}
        self._meet(loss)
        self.count = 0
        self.wanted: set[Any] = {loss.node}
        self.full = False
        self.shown: dict[Any, dict[str, Any]] = {}
        self.place: dict[Any, int] = {}
        self.arrays: list[dict[str, Any]] = []
        self.arrived: dict[Any, list[tuple[int | None, int]]] = defaultdict(list)  # the places of sender and share
        self.first: dict[Any, tuple[Any, int]] = {}  # each one's first share, which is its g when no other comes

    def _meet(self, result: Tensor) -> None:
        new = [entry for entry in collect(result) if entry.node not in self.entries]
        self.entries.update((entry.node, entry) for entry in new)
        self.known |= values(new, self.tensors)

    def seen(self, node: Node | Leaf, g: Any, sent: list[tuple[Node | Leaf, Any]]) -> None:
        self.count += 1
        for edge, share in sent:
            if edge not in self.entries:  # a checkpoint has just recorded its function
                self._meet(Tensor(share, edge))
        first, place = self.first.pop(node, (None, 0))
        if self._wanted(node):
            self.place[node] = len(self.place)
            self._show(node, g, place if first is g else self._array(g), sent)
            return
        for edge, share in sent:
            if edge in self.wanted:
                self.arrived[edge].append((None, self._array(share)))

    def _wanted(self, node: Node | Leaf) -> bool:
        if isinstance(node, Node) and not self.full:
            wanted = self.wanted | {node, *(edge for edge in node.edges if isinstance(edge, Leaf))}
            self.full = len(wanted) > self.max_nodes
            self.wanted = self.wanted if self.full else wanted
        return node in self.wanted

    def _show(self, node: Node | Leaf, g: Any, g_place: int, sent: list[tuple[Node | Leaf, Any]]) -> None:
        entry, inputs = self.entries[node], list[dict[str, Any]]()
        shown = {
            "op": entry.op,
            "name": self.names.get(node, ""),
            "g": g_place,
            "inputs": inputs,
            "arrived": self.arrived[node],
        }
        self.shown[node] = shown
        if isinstance(node, Leaf):
            shown |= {"name": entry.module or shown["name"], "y": self._array(self.known.get(node, Spec(g)))}
            return
        assert node.values is not None
        arguments, code = _code(node.op)
        shown |= {"y": self._array(self.known.get(node, node.values[0])), "rule": cleandoc(entry.rule), "code": code}
        shown["settings"] = ", ".join(f"{k}={text}" for k, v in node.params.items() if (text := _plain(v)))
        shown |= {"line": entry.line, "source": _source(entry.line), "kept": not isinstance(node.values[0], Spec)}
        for i, (edge, value) in enumerate(zip(node.edges, node.values[1:], strict=True)):
            constant = self._array(value) if edge is None else None
            argument = arguments[i] if i < len(arguments) else f"input {i}"
            saved = not isinstance(value, Spec)
            inputs.append({"argument": argument, "edge": edge, "saved": saved, "constant": constant, "share": None})
        places, slot = {id(g): g_place}, 0
        for edge, share in sent:
            place = places[id(share)] = places[id(share)] if id(share) in places else self._array(share)
            while slot < len(node.edges) and node.edges[slot] is not edge:
                slot += 1
            if slot >= len(node.edges):
                inputs.append({"argument": "f(…)", "edge": edge, "saved": False, "constant": None})
            inputs[slot]["share"] = place
            slot += 1
            self.first.setdefault(edge, (share, place))
            self.arrived[edge].append((self.place[node], place))

    def _array(self, value: Any) -> int:
        self.arrays.append(describe(value))
        return len(self.arrays) - 1


def _code(op: type[Op]) -> tuple[tuple[str, ...], str]:
    """The names of an op's arguments, and its derivative in code."""
    code = op.vjp.__code__
    try:
        text = dedent(getsource(op.vjp)).rstrip()
    except OSError:  # typed at a prompt
        text = ""
    return code.co_varnames[2 : code.co_argcount], text


def _source(line: str) -> str:
    file, _, number = line.rpartition(":")
    return linecache.getline(file, int(number)).strip()


def _plain(value: Any) -> str:
    """A parameter of an op as code, "" when it is an array or holds one."""
    if type(value) in (tuple, list):
        parts = [_plain(part) for part in value]
        return f"({', '.join(parts)})" if all(parts) else ""
    if isinstance(value, slice):
        return ":".join("" if end is None else str(end) for end in (value.start, value.stop, value.step)).removesuffix(":")
    return "..." if value is Ellipsis else repr(value) if isinstance(value, int | float | str | None) else ""


def _groups(shown: list[Any]) -> tuple[list[dict[str, Any]], dict[Any, int | None]]:
    """The calls of modules as boxes in boxes, oldest first, and the box of each node; a leaf is where all its users are."""
    chains: dict[Any, list[Call]] = {node: _calls(node.call) for node in shown if isinstance(node, Node)}
    if len({id(chain[0]) for chain in chains.values() if chain}) == 1:
        chains = {node: chain[1:] for node, chain in chains.items()}  # one model around everything says nothing
    for node, chain in list(chains.items()):
        for edge in node.edges:
            if isinstance(edge, Leaf):
                chains[edge] = [a for a, b in zip(chains.get(edge, chain), chain, strict=False) if a is b]
    groups: list[dict[str, Any]] = []
    known: dict[int, int] = {}
    times: dict[Any, int] = defaultdict(int)
    places: dict[Any, int | None] = {}
    for node in sorted(shown, key=lambda node: (isinstance(node, Leaf), node.serial)):
        parent = None
        for call in chains.get(node, ()):
            if id(call) not in known:
                module, outer = call[0](), call[1][0]() if call[1] else None
                kind = type(module).__name__ if module is not None else "module"
                inside = outer.named_modules() if outer is not None else ()
                name = next((name for name, m in inside if m is module), kind)
                times[parent, name] += 1
                known[id(call)] = len(groups)
                groups.append({"name": name, "kind": kind, "parent": parent, "call": times[parent, name]})
            parent = known[id(call)]
        places[node] = parent
    return groups, places


def _calls(call: Call | None) -> list[Call]:
    return [] if call is None else [*_calls(call[1]), call]
