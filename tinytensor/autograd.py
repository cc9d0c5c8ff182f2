"""The engine: how operations are recorded and how derivatives flow back. It names no op.

`apply` runs an op's `forward` and, when some input wants a gradient, records a `Node`: the op, the nodes that its inputs
came from, and the arrays that its derivative will need. `sweep` walks those nodes from the newest to the oldest. A node is
newer than its inputs, so when its turn comes every gradient that it will ever receive has arrived:

    total[node] = Σ over the nodes that used its output, of the share that their vjp sends it

A vjp is written in array language, so the same line runs on arrays (the fast path: nothing is recorded) and on tensors
(`create_graph=True`: the backward pass is itself recorded, and can be differentiated again).
"""

from __future__ import annotations

import heapq
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from tinytensor import backend, writes
from tinytensor.backend import Array, Into, kernels
from tinytensor.state import Observer, Setting, thread, within

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_SCALARS = (float, int, bool)


class Value:
    """A bare tensor: an array, and its place in the graph (None when no gradient flows through it)."""

    __slots__ = ("__weakref__", "data", "node")
    data: Array
    node: Node | Leaf | None
    result_type: ClassVar[Any]  # the one hook: what `apply` returns; tensor.py sets it

    def __init__(self, data: Array, node: Node | Leaf | None = None) -> None:
        self.data = data
        self.node = node

    def __setstate__(self, state: tuple[dict[str, Any] | None, dict[str, Any]]) -> None:
        attributes, slots = state
        for name, value in {**(attributes or {}), **slots}.items():
            setattr(self, name, value)
        if isinstance(self.node, Leaf) and self.node.owner is None:  # a copied leaf, not one that two tensors share
            self.node.owner = weakref.ref(self)


class Spec:
    """What a vjp is given in place of an array that its op did not ask to save: the shape and dtype it had."""

    __slots__ = ("dtype", "shape")

    def __init__(self, array: Array) -> None:
        self.shape = array.shape
        self.dtype = array.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Op:
    """One operation. A subclass states its mathematics in its docstring and holds `forward` and `vjp` side by side.

    `forward(xp, *inputs, **params)` maps arrays to an array. `vjp(g, y, *inputs, **params)` maps g = ∂L/∂y to one ∂L/∂input
    for each input: a value, None where there is none, or a function of no arguments for a gradient that costs something,
    called only if that input wants it. The engine undoes broadcasting and dtype promotion.

    `saves` names what the vjp reads: "y", an input's name, or "*" for all inputs; space-separated for every gradient alike,
    or a dict that says it for the gradient of each input. The rest reaches the vjp as a `Spec`.
    """

    name: ClassVar[str]
    saves: ClassVar[str | dict[str, str]] = ""
    forward: ClassVar[Callable[..., Array]]
    vjp: ClassVar[Callable[..., Any]]
    unsaved_by_formula: ClassVar[dict[tuple[int, int], tuple[int, ...]]]

    def __init_subclass__(cls) -> None:
        cls.name = "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__)[1:]
        cls.unsaved_by_formula = {}

    @classmethod
    def unsaved(cls, count: int, wanted: int, kernel: backend.Kernel | None) -> tuple[int, ...]:
        """Places in (y, *inputs) that neither vjp reads when the inputs in the bit set `wanted` want a gradient."""
        code = cls.vjp.__code__
        names = list(code.co_varnames[1 : code.co_argcount])
        words: set[str] = set()
        for saves in (cls.saves, kernel.saves if kernel else ""):
            if isinstance(saves, dict):
                saves = " ".join(saves.get(names[i + 1], "") for i in range(count) if wanted >> i & 1)
            words.update(saves.split())
        if "*" in words:
            return () if "y" in words else (0,)
        return tuple(i for i in range(count + 1) if i >= len(names) or names[i] not in words)


class Leaf:
    """The place in the graph of a tensor that the user made: where its gradient arrives and stays."""

    __slots__ = ("busy", "grad", "hooks", "owner", "serial", "slot")
    op, edges, opaque = None, (), False

    def __init__(self, owner: Value | None = None) -> None:
        self.owner = None if owner is None else weakref.ref(owner)  # whose place this is, for those who look inside
        self.serial = next(writes.serial)
        self.grad: Value | None = None
        self.slot: Array | None = None  # memory that the gradient must live in, when an optimiser owns it
        self.busy = False  # whether a backward pass is making its gradient there
        self.hooks: list[Callable[[Any], Any]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # a copied or unpickled leaf is a new place, and in no optimiser's memory
        return Leaf, (), (None, {"grad": self.grad, "hooks": self.hooks})


class Node:
    """One recorded operation: where its inputs came from and what its derivative needs. Holds no tensor."""

    __slots__ = ("call", "code", "edges", "grad", "hooks", "instruction", "op", "params", "serial", "values", "vjp")
    opaque = False  # whether gradients may go elsewhere than to its edges

    def __init__(self, op: type[Op], params: dict[str, Any], edges: list[Any], values: list[Any], vjp: Any) -> None:
        self.op = op
        self.params = params
        self.edges = edges
        self.values: list[Any] | None = values  # [y, *inputs]; None once a backward pass has used them
        self.vjp = vjp  # the kernel's vjp when a kernel ran forward, else None
        self.serial = next(writes.serial)
        self.code, self.instruction = writes.line(3)
        self.call = thread.call
        self.grad: Any = None  # None, or True then the gradient, after retain_grad
        self.hooks: list[Callable[[Any], Any]] | None = None

    @property
    def origin(self) -> writes.Origin:
        """The user's line that made this node."""
        return writes.Origin(self.code, self.instruction)

    def __str__(self) -> str:
        return f"{self.op.name} at {self.origin}{within(self.call)}"

    def __reduce__(self) -> Any:
        raise TypeError(f"a result of {self.op.name} is not copied or pickled together with its graph; use detach()")

    def free(self) -> None:
        """Let go of what was saved."""
        self.values = self.vjp = None

    def pull(self, g: Any, create_graph: bool, send: Callable[[Any, Any], None], wanted: set[Any] | None) -> None:
        """Call send(node, share) for each input (only those in `wanted`) with what g = ∂L/∂y sends to it."""
        values = self.values
        if values is None:
            raise RuntimeError(
                f"{self}: a second backward through this graph, whose saved arrays the first one "
                "freed; pass retain_graph=True to the first"
            )
        if writes.latest > self.serial:
            self.check_unwritten(values, self.params, self.serial)
        if create_graph:
            make = Value.result_type
            nodes = [self, *self.edges]
            linked = [v if n is None or isinstance(v, Spec) else make(v, n) for v, n in zip(values, nodes, strict=True)]
            gradients = self.op.vjp(g, *linked, **self.params)
        elif self.vjp is not None:
            gradients = self.vjp(g, *values, **self.params)
        else:
            gradients = self.op.vjp(g, *values, **self.params)
        if type(gradients) is not tuple:
            gradients = (gradients,)
        edges = self.edges
        if len(gradients) != len(edges):
            raise ValueError(f"vjp of {self}: {len(gradients)} gradients for {len(edges)} inputs")
        place = 0
        for edge in edges:
            share = gradients[place]
            place += 1
            if edge is None or (wanted is not None and edge not in wanted):
                continue
            if type(share) is not np.ndarray:
                if type(share) is Into:
                    send(edge, share)
                    continue
                if callable(share):
                    share = share()
                if share is None:
                    continue
            value = values[place]
            if share.shape != value.shape:
                try:
                    share = unbroadcast(share, value.shape)
                except ValueError as error:
                    raise ValueError(f"vjp of {self}: {error}") from None
            if share.dtype is not value.dtype and share.dtype != value.dtype:  # identity settles almost all
                share = share.astype(value.dtype)
            send(edge, share)

    def check_unwritten(self, values: list[Any], params: dict[str, Any], since: int, earlier: writes.Log | None = None) -> None:
        """RuntimeError where somebody has written into one of these arrays in the meantime: see `writes.find`."""
        flat = [p for param in params.values() for p in (param if isinstance(param, tuple) else (param,))]
        for value in (*values, *flat):
            if hasattr(value, "strides") and (write := writes.find(value, since, earlier)):
                raise RuntimeError(
                    f"{self} saved an array of shape {value.shape} for its gradient, and "
                    f"{write.origin} wrote into it in place before backward; write into a copy (x.clone()) instead"
                )


def unbroadcast(g: Any, shape: tuple[int, ...]) -> Any:
    """Sum g over the axes along which an input of `shape` was repeated to g's shape."""
    extra = g.ndim - len(shape)
    if extra < 0 or any(n not in (1, m) for n, m in zip(shape, g.shape[extra:], strict=True)):
        raise ValueError(f"a gradient of shape {g.shape} does not fit an input of shape {shape}")
    axes = tuple(range(extra)) + tuple(i + extra for i, n in enumerate(shape) if n == 1 and g.shape[i + extra] != 1)
    return g.sum(axis=axes).reshape(shape)


def apply(op: type[Op], *inputs: Any, **params: Any) -> Any:
    """Run `op` on tensors, arrays and Python numbers; return a tensor, recorded when an input wants a gradient.

    float64 comes out only where an input is float64 or a `dtype` is asked for: Python numbers, NumPy scalars and integer
    arrays yield to float32.
    """
    if thread.observers:
        return _observed(op, inputs, params)
    recording = thread.recording
    arrays: list[Any] = []
    edges: list[Node | Leaf | None] = []
    wanted, bit = 0, 1
    for x in inputs:
        if isinstance(x, Value):
            node = x.node
            if node is not None and recording:
                wanted |= bit
                if writes.latest > node.serial and node.op is not None:
                    check_current(x, node)
            arrays.append(x.data)
            edges.append(node)
        else:
            arrays.append(x if type(x) in _SCALARS else _operand(op, x))
            edges.append(None)
        bit += bit
    device = "cpu" if "cupy" not in sys.modules else _common_device(op, arrays)
    kernel = kernels[device].get(op.name)
    residual = None
    try:
        if kernel is not None:
            result = kernel.forward(*arrays, **params)
            if result is NotImplemented:
                kernel = None
            else:
                y, residual = result
        if kernel is None:
            y = op.forward(np if device == "cpu" else backend.xp_for(device), *arrays, **params)
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise _explained(op, arrays, error) from None
    if type(y) is not np.ndarray and isinstance(y, np.generic):
        y = np.asarray(y)
    if y.dtype is _FLOAT64 and "dtype" not in params and not any(getattr(a, "dtype", _FLOAT32) == _FLOAT64 for a in arrays):
        y = y.astype(backend.default_dtype)
    if not wanted or (y.dtype is not _FLOAT32 and not backend.is_float(y.dtype)):
        return Value.result_type(y)

    values = [y, *arrays]
    cache = op.unsaved_by_formula if kernel is None else kernel.unsaved
    unsaved = cache.get((bit, wanted))  # bit says how many inputs there are
    if unsaved is None:
        unsaved = cache[bit, wanted] = op.unsaved(len(arrays), wanted, kernel)
    spec = None
    for i in unsaved:
        value = values[i]
        if type(value) not in _SCALARS:
            if spec is None or value.shape != spec.shape or value.dtype is not spec.dtype:
                spec = Spec(value)
            values[i] = spec
    vjp = None if kernel is None else kernel.vjp if residual is None else _Residual(kernel.vjp, residual)
    return Value.result_type(y, Node(op, params, edges, values, vjp))


def _observed(op: type[Op], inputs: tuple[Any, ...], params: dict[str, Any]) -> Any:
    """`apply`, with whoever looks on around it, the first who came outermost."""
    observers, thread.observers = thread.observers, ()
    line = writes.line(2)

    def run() -> Any:
        y = apply(op, *inputs, **params)
        if isinstance(y.node, Node):
            y.node.code, y.node.instruction = line  # not a line of the observers between
        return y

    try:
        for observer in reversed(observers):
            run = partial(observer.forward, op, inputs, params, run)
        return run()
    finally:
        thread.observers = observers


class _Residual:
    """A kernel's vjp together with what its forward kept for it."""

    __slots__ = ("residual", "vjp")

    def __init__(self, vjp: Callable[..., Any], residual: Any) -> None:
        self.vjp = vjp
        self.residual = residual

    def __call__(self, g: Array, *values: Any, **params: Any) -> Any:
        return self.vjp(g, *values, residual=self.residual, **params)


def call(op: type[Op], *inputs: Any, **params: Any) -> Any:
    """`op` in the language its inputs speak: recorded on tensors, bare on arrays. For ops that NumPy has no name for."""
    if any(isinstance(x, Value) for x in inputs):
        return apply(op, *inputs, **params)
    return op.forward(backend.xp_of(*inputs), *inputs, **params)


def as_value(x: Any) -> Any:
    """x itself when it is a tensor, else a tensor made of it."""
    return x if isinstance(x, Value) else Value.result_type(backend.as_array(x))


def beside(x: Any, constant: Array) -> Array:
    """A constant array on the device of x, an array or a tensor."""
    return backend.to_device(constant, backend.device_of(x.data if isinstance(x, Value) else x))


def _operand(op: type[Op], x: Any) -> Any:
    if isinstance(x, np.generic) or (isinstance(x, np.ndarray) and x.ndim == 0):
        x = x.item()
        if type(x) in _SCALARS:
            return x
    try:
        return backend.as_array(x)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{op.name} at {writes.caller()}: {error}") from None


def _common_device(op: type[Op], arrays: list[Any]) -> str:
    devices = {backend.device_of(a) for a in arrays if type(a) not in _SCALARS}
    if len(devices) > 1:
        raise RuntimeError(f"{op.name}: inputs live on {' and '.join(sorted(devices))}; move them with .to(device)")
    if "cuda" not in devices:
        return "cpu"
    if not kernels["cuda"]:
        backend.xp_for("cuda")  # registers them
    return "cuda"


def check_current(x: Value, node: Node | Leaf) -> None:
    """RuntimeError where x, a result, was written behind its node's back."""
    if write := writes.find(x.data, node.serial):
        raise RuntimeError(
            f"a result of shape {x.data.shape} made at {getattr(node, 'origin', 'an unknown line')} was written in place "
            f"by {write.origin} through other memory or under no_grad, so its gradient is no longer known; "
            "use clone() or an out-of-place operation"
        )


def _explained(op: type[Op], arrays: list[Any], error: Exception) -> Exception:
    shapes = ", ".join(f"{a.dtype}{list(a.shape)}" if hasattr(a, "shape") else repr(a) for a in arrays)
    kind = ValueError if isinstance(error, ZeroDivisionError) else type(error)
    return (kind if kind in (ValueError, TypeError, IndexError) else ValueError)(
        f"{op.name}({shapes}) at {writes.caller()}{within(thread.call)}: {error}"
    )


def sweep(
    roots: Sequence[tuple[Node | Leaf, Any]],
    arrived: Callable[[Node | Leaf, Any, bool], Any],
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
    wanted: Iterable[Node | Leaf] | None = None,
    slot_of: Callable[[Leaf], tuple[Array | None, Array | None]] | None = None,
) -> None:
    """Send gradients from `roots` back through the graph, newest node first.

    `arrived(node, total, owned)` is called for each leaf, each node with a hook or a retained gradient, and each node of
    `wanted`, with its whole gradient; `owned` says that nobody else holds that array. With `wanted`, only nodes on a way to
    one of them are visited. `slot_of(leaf)` offers memory in which a kernel may make that leaf's gradient, and
    what to add it to, as `Into.add` takes them.
    """
    on_the_way = None if wanted is None else _ways_to(set(wanted), [node for node, _ in roots])
    total: dict[Any, Any] = {}
    owned: set[Any] = set()
    heap: list[tuple[int, Any]] = []

    def add(node: Node | Leaf, g: Any) -> None:
        old = total.get(node)
        if old is None:
            if type(g) is Into:
                g = g.add(*(slot_of(node) if slot_of is not None and node.op is None else (None, None)))
                owned.add(node)
            total[node] = g
            heapq.heappush(heap, (-node.serial, node))
        elif type(g) is Into:
            total[node] = g.add(old, old) if node in owned else g.add(None, backend.as_array(old))
            owned.add(node)
        elif node in owned:
            old += g
        else:
            total[node] = old = old + g
            if type(old) is np.ndarray:  # made here, so later gradients may be added in place
                owned.add(node)

    for node, g in roots:
        add(node, g)
    free = not (retain_graph or create_graph)
    with Setting("recording", create_graph):
        while heap:
            node = heapq.heappop(heap)[1]
            g = total.pop(node)
            if node.hooks is not None and (wanted is None or node.op is not None or node in wanted):
                for hook in node.hooks:
                    g = _hooked(hook, g, create_graph)
            if node.op is None:
                arrived(node, g, node in owned and node.hooks is None)
                continue
            if node.grad is not None or (wanted is not None and node in wanted):
                arrived(node, g, False)
            if thread.observers:
                _observed_pull(node, g, create_graph, add, on_the_way)
            else:
                node.pull(g, create_graph, add, on_the_way)
            if free:
                node.free()


def _observed_pull(node: Node, g: Any, create_graph: bool, add: Callable[[Any, Any], None], wanted: set[Any] | None) -> None:
    """`pull`, with whoever looks on around it."""
    observers = thread.observers

    def send(edge: Any, share: Any) -> None:
        share = share.add(None, None) if type(share) is Into else share
        for observer in observers:
            observer.sent(node, edge, share)
        add(edge, share)

    curious = any(type(observer).sent is not Observer.sent for observer in observers)
    run: Callable[[], None] = partial(node.pull, g, create_graph, send if curious else add, wanted)
    for observer in reversed(observers):
        run = partial(observer.backward, node, g, run)
    run()


def _ways_to(wanted: set[Any], roots: list[Any]) -> set[Any] | None:
    """The nodes between `roots` and `wanted`; None, for all, where a replayed function may lead anywhere."""
    seen, stack = set(roots), list(roots)
    while stack:
        for edge in stack.pop().edges:
            if edge is not None and edge not in seen:
                seen.add(edge)
                stack.append(edge)
    if any(node.opaque for node in seen):
        return None
    ways = set(wanted)
    for node in sorted(seen, key=lambda n: n.serial):  # inputs come before what was made of them
        if any(edge in ways for edge in node.edges):
            ways.add(node)
    return ways


def _hooked(hook: Callable[[Any], Any], g: Any, create_graph: bool) -> Any:
    given = g if create_graph else Value.result_type(np.asarray(g) if np.isscalar(g) else g)
    result = hook(given)
    if result is None:
        return g
    replacement: Any = as_value(result)
    if replacement.data.shape != g.shape:
        raise ValueError(f"a gradient hook returned shape {replacement.data.shape} for a gradient of shape {g.shape}")
    replacement = replacement.astype(g.dtype)
    return replacement if create_graph else replacement.data


def free_slot(leaf: Leaf) -> tuple[Array | None, Array | None]:
    """The memory that an optimiser keeps for a leaf's gradient, for one pass to write into when no gradient is there yet."""
    with _deposit_lock:
        if leaf.slot is None or leaf.grad is not None or leaf.busy:
            return None, None
        leaf.busy = True
        return leaf.slot, None


def filled_slot(leaf: Leaf) -> tuple[Array | None, Array | None]:
    """That memory with the gradient in it, for a pass to add to; not for leaves with hooks, which want to see its own."""
    in_slot = leaf.grad is not None and leaf.grad.data is leaf.slot and leaf.hooks is None
    return (leaf.slot, leaf.slot) if in_slot else (None, None)


_deposit_lock = threading.Lock()  # two threads may differentiate through the same parameters


def deposit(node: Node | Leaf, g: Any, owned: bool) -> None:
    """Add a gradient to what `node.grad` holds already; the first one is copied unless it is ours alone."""
    recorded = isinstance(g, Value)
    if isinstance(node, Node):
        own = as_value(g).clone()
        node.grad = own if node.grad is True else node.grad + own
        return
    with _deposit_lock:
        in_slot = not recorded and g is node.slot
        if node.grad is None:
            if recorded:
                node.grad = g.clone()  # a vjp may have sent this tensor to several inputs
            elif node.slot is not None and (in_slot or not node.busy):
                if not in_slot:
                    node.slot[...] = g
                writes.record(node.slot)
                node.grad = Value.result_type(node.slot)
            else:
                node.grad = Value.result_type(g if owned else backend.as_array(g).copy())
        elif recorded or node.grad.node is not None:
            node.grad = node.grad + g
        else:
            if g is not node.grad.data:  # which a kernel has added to in its own memory
                node.grad.data += g
            writes.record(node.grad.data)
        if in_slot:
            node.busy = False
