"""The arrays of a graph, as far as they are still known, and an array as plain data that JSON can hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinytensor import backend, writes
from tinytensor.autograd import Leaf, Node, Spec, Value
from tinytensor.backend import Array
from tinytensor.inspect.graph import Entry, owners
from tinytensor.tensor import Tensor

SMALL = 24  # elements: an array of no more is given as numbers
BINS = 24


def describe(value: Any) -> dict[str, Any]:
    """Shape and dtype; of all but a Spec also the numbers, or the statistics and a histogram of those that are finite."""
    if isinstance(value, Value):
        value = value.data
    if isinstance(value, int | float):
        return {"shape": [], "dtype": type(value).__name__, "numbers": [number(value)]}
    about: dict[str, Any] = {"shape": list(value.shape), "dtype": str(value.dtype)}
    if isinstance(value, Spec):
        return about
    array = np.asarray(backend.to_device(value, "cpu"))
    if array.size <= SMALL:
        exact = array if array.dtype.kind in "iub" else array.astype(np.float64)
        return about | {"numbers": [number(x) for x in exact.ravel().tolist()]}
    numbers = array.astype(np.float64).ravel()
    finite = numbers[np.isfinite(numbers)]
    about |= {"zeros": number(1 - np.count_nonzero(numbers) / numbers.size), "not_finite": numbers.size - finite.size}
    if finite.size:
        low, high = finite.min(), finite.max()
        above = finite / 2 - low / 2  # half the distance: the whole may be too large for a float
        bins = np.minimum((above / (above.max() or 1) * BINS).astype(np.intp), BINS - 1)
        about |= {"min": number(low), "max": number(high), "bins": np.bincount(bins, minlength=BINS).tolist()}
        with np.errstate(over="ignore", invalid="ignore"):
            about |= {"mean": number(finite.mean()), "std": number(finite.std())}
    return about


def number(x: Any) -> Any:
    """x, a float to six digits; "nan", "inf" or "-inf" for what JSON has no number for."""
    if isinstance(x, int):
        return x
    return float(f"{x:.6g}") if math.isfinite(x) else str(float(x))


def values(entries: list[Entry], tensors: list[Tensor]) -> dict[Node | Leaf, Array]:
    """The arrays that these nodes and leaves made: kept for some derivative, held by a tensor, or small and made again."""
    known: dict[Any, Array] = {}
    read: dict[Any, int] = {}  # when its value was first used
    for entry in entries:
        node = entry.node
        if isinstance(node, Node) and node.values is not None:
            for place, value in zip([node, *node.edges], node.values, strict=True):
                read.setdefault(place, node.serial)
                if not isinstance(value, Spec):
                    known.setdefault(place, value.data if isinstance(value, Value) else value)
    for tensor in (*tensors, *owners(entries)):
        if not writes.find(tensor.data, read.get(tensor.node, 0)):
            known.setdefault(tensor.node, tensor.data)
    known.pop(None, None)  # constants have no place in the graph
    for entry in entries:
        node = entry.node
        if isinstance(node, Node) and node.values and node not in known and math.prod(node.values[0].shape) <= SMALL:
            inputs = [known.get(e, v) if isinstance(v, Spec) else v for e, v in zip(node.edges, node.values[1:], strict=True)]
            if not node.opaque and not any(isinstance(v, Spec) for v in inputs):
                with np.errstate(all="ignore"):  # the forward pass has warned of it
                    y = node.op.forward(backend.xp_of(*inputs), *inputs, **node.params)
                known[node] = y.astype(node.values[0].dtype)
    return known
