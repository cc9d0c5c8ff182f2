"""Where a number first stopped being finite."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import numpy as np

from tinytensor import backend, writes
from tinytensor.autograd import Leaf, Node, Spec, Value
from tinytensor.state import Observer, thread, within


class detect_anomaly(Observer):
    """Within this block the first op whose result, or whose gradient, is not finite though all it came from was, raises
    FloatingPointError that names it, its module, its line, and what went in.

    An infinity that was put in as a number or an array (a mask of −∞, say) is not an anomaly, nor is what follows from it.
    Every number is looked at, which takes time, and on a GPU waits for it.
    """

    def __init__(self) -> None:
        # by thread and node: its gradient, and whether that and what it saved are finite
        self._given: dict[Any, tuple[Any, bool]] = {}
        self._sent: dict[Any, bool] = {}  # by thread and node: whether all shares that it was sent are finite

    def forward(self, op: Any, inputs: tuple[Any, ...], params: dict[str, Any], run: Callable[[], Any]) -> Any:
        y = run()
        if not _finite(y.data) and all(_finite(x) for x in inputs):
            place = f"{op.name} at {writes.caller()}{within(thread.call)}"
            given = "; ".join(_statistics(f"input {i}", x) for i, x in enumerate(inputs))
            raise FloatingPointError(f"{place}: {_statistics('the result', y)}, from {given}")
        return y

    def sent(self, node: Node, edge: Any, share: Any) -> None:
        g, finite = self._given[get_ident(), node]
        self._sent[get_ident(), edge] = self._sent.get((get_ident(), edge), True) and _finite(share)
        if finite and not _finite(share):
            values = [f"input {i}" for i in range(len(node.edges))]
            given = [
                _statistics(n, v) for n, v in zip(["y", *values], node.values or (), strict=False) if not isinstance(v, Spec)
            ]
            to = " or ".join(str(i) for i, e in enumerate(node.edges) if e is edge)
            what = "a leaf" if isinstance(edge, Leaf) else str(edge)
            raise FloatingPointError(
                f"backward of {node}: {_statistics(f'the gradient of input {to} ({what})', share)}, from "
                + "; ".join([_statistics("g", g), *given])
            )

    def backward(self, node: Node, g: Any, run: Callable[[], None]) -> None:
        key = get_ident(), node
        if self._sent.pop(key, False) and not _finite(g):
            raise FloatingPointError(
                f"backward: {_statistics('the gradient', g)} of {node}, whose finite shares add up to it, or its hook"
            )
        saved = [value for value in node.values or () if not isinstance(value, Spec)]
        self._given[key] = g, _finite(g) and all(_finite(value) for value in saved)
        try:
            run()
        finally:
            del self._given[key]


def _finite(x: Any) -> bool:
    array = x.data if isinstance(x, Value) else np.asarray(x) if isinstance(x, list | tuple) else x
    if not hasattr(array, "dtype"):
        return not isinstance(array, float) or bool(np.isfinite(array))
    return not backend.is_float(array.dtype) or bool(np.isfinite(array).all())


def _statistics(name: str, x: Any) -> str:
    """ "input 0 float32[3, 4], −2 to 7.5", counting what is not finite."""
    array = np.asarray(backend.to_device(x.data if isinstance(x, Value) else x, "cpu") if hasattr(x, "dtype") else x)
    if not array.ndim:
        return f"{name} {array.item()}"
    text = f"{name} {array.dtype}{list(array.shape)}"
    finite = array[np.isfinite(array)] if backend.is_float(array.dtype) else array.reshape(-1)
    if bad := array.size - finite.size:
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        text += f" has {bad} of {array.size} not finite, the first {array[first]} at {list(first)}"
        text += "; the others" if finite.size else ""
    return f"{text}, {finite.min():.6g} to {finite.max():.6g}" if finite.size else text
