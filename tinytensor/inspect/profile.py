"""Where the time of a block goes: per op and per module, as a table, a timeline and a roofline."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tinytensor import backend, parallel, state, writes
from tinytensor.autograd import Node, Value
from tinytensor.backend import kernels
from tinytensor.inspect import charts, cost, roofline
from tinytensor.inspect.cost import Cost

if TYPE_CHECKING:
    from rich.table import Table

TRACED = 50_000  # calls of each thread that the timeline shows; the totals have all of them


@dataclass
class Work:
    """What some calls took and did, all forward or all backward."""

    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0
    attainable: float = 0.0
    """seconds they would take at this machine's rates: of each max(FLOPs/peak, bytes/bandwidth)"""

    def add(self, other: Work) -> Work:
        self.calls += other.calls
        self.seconds += other.seconds
        self.flops += other.flops
        self.bytes += other.bytes
        self.attainable += other.attainable
        return self


@dataclass
class Row:
    """The calls of one op, by its fast kernel or by its formula, or of one module."""

    name: str
    by: str = ""
    """of an op "kernel", "formula", or "replay" for what checkpoint() runs again"""
    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)

    @property
    def total(self) -> Work:
        return Work().add(self.forward).add(self.backward)


class Event(NamedTuple):
    op: str
    by: str
    backward: bool
    start: float
    end: float
    module: str
    shape: tuple[int, ...]
    line: writes.Origin
    cost: Cost


class Seen:
    """What one thread did."""

    def __init__(self) -> None:
        self.name = threading.current_thread().name
        self.rows: dict[tuple[str, str, str], Row] = {}  # by op, kernel or formula, module
        self.events: list[Event] = []
        self.inside = 0.0  # seconds that observed calls inside the current one have taken
        self.own = 0.0  # seconds that the profile itself took


class profile(state.Observer):
    """`with profile() as p:` times each op, forward and backward, in this thread and those that `parallel` gives its work to.

    Times are an op's own: what runs inside a backward call (the replay of checkpoint(), the recorded pass of create_graph)
    counts where it belongs. Adding up the gradients that meet at one place is the time of the op that sends the later one.
    FLOPs and bytes are counted as `cost` says. The attainable rate is min(peak, FLOPs/bytes · bandwidth): the peak is that of
    a float32 matrix product, with one thread where `parallel` has cut the work into shards, else with those that BLAS has; the
    bandwidth that of one thread's copy of arrays too large for a cache. More than 100% says that arrays were still in the
    cache. (Williams, Waterman & Patterson, "Roofline", 2009.)

    What is not recorded (under no_grad) does not tell how it was made: it counts as a kernel's work where one is registered.
    The same profile may be entered again, one block after another; it adds up. On a GPU only the launches could be timed from
    here, so arrays there are refused.
    """

    def __init__(self) -> None:
        self.wall = 0.0
        """seconds within the blocks so far"""
        self.peaks: dict[int, float] = {}
        """FLOP/s of a matrix product, by the threads that BLAS has: one within shards"""
        self.used: set[int] = set()
        """which of them apply to what was seen"""
        self.bandwidth = 0.0
        """bytes/s of a copy"""
        self.seen: dict[int, Seen] = {}
        """by thread"""
        self.blocks: list[tuple[int, float, float]] = []
        """thread, start and end of each block"""
        self._paths: dict[Any, str] = {None: ""}

    def __enter__(self) -> Self:
        if not self.peaks:
            self._alone = cost.blas_threads()
            self.peaks[self._alone] = cost.gemm_peak()
            with parallel.one_blas_thread():
                self.peaks[1] = cost.gemm_peak()
            self.bandwidth = cost.copy_bandwidth()
        self._entered = perf_counter()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        now = perf_counter()
        self.wall += now - self._entered
        self.blocks.append((threading.get_ident(), self._entered, now))

    def forward(self, op: Any, inputs: tuple[Any, ...], params: dict[str, Any], run: Callable[[], Any]) -> Any:
        arrays = [x.data if isinstance(x, Value) else x for x in inputs]
        if "cupy" in sys.modules and any(backend.device_of(a) == "cuda" for a in arrays if hasattr(a, "strides")):
            raise RuntimeError(
                f"profile: {op.name} works on a GPU, where only its launch would be timed; profile on the CPU, or use nsys"
            )

        def facts(y: Any) -> tuple[Any, ...]:
            node = y.node if isinstance(y.node, Node) and y.node.op is op else None
            kernel = op.name in kernels["cpu"] if node is None else node.vjp is not None
            kept = None if node is None else getattr(node.vjp, "residual", None)
            counted = cost.forward(op.name, arrays, y.data, kept, params)
            line = writes.caller() if node is None else node.origin
            return op.name, "kernel" if kernel else "formula", state.thread.call, y.data.shape, line, counted

        return self._watch(run, False, facts)

    def backward(self, node: Any, g: Any, run: Callable[[], None]) -> None:
        recorded = state.thread.recording  # the pass itself, op by op: they are what is counted

        def facts(_: Any) -> tuple[Any, ...]:
            by = "replay" if node.opaque else "kernel" if node.vjp and not recorded else "formula"
            counted = Cost(0, 0) if recorded else cost.backward(node, g, _visited(run))
            return node.op.name, by, node.call, g.shape, node.origin, counted

        self._watch(run, True, facts)

    def _watch(self, run: Callable[[], Any], backward: bool, facts: Callable[[Any], tuple[Any, ...]]) -> Any:
        entered, ident = perf_counter(), threading.get_ident()
        seen = self.seen.get(ident) or self.seen.setdefault(ident, Seen())
        outer, seen.inside = seen.inside, 0.0
        start = perf_counter()
        try:
            result = run()
            end = perf_counter()
            op, by, call, shape, line, counted = facts(result)
            module = self._path(call)
            row = seen.rows.setdefault((op, by, module), Row(op, by))
            threads = 1 if getattr(parallel._worker, "busy", False) else self._alone
            self.used.add(threads)
            attainable = max(counted.flops / self.peaks[threads], counted.bytes / self.bandwidth)
            own = max(end - start - seen.inside, 1e-9)
            (row.backward if backward else row.forward).add(Work(1, own, counted.flops, counted.bytes, attainable))
            if len(seen.events) < TRACED:
                seen.events.append(Event(op, by, backward, start, end, module, shape, line, counted))
            seen.own += perf_counter() - entered - (end - start)
            return result
        finally:
            seen.inside = outer + perf_counter() - entered

    def _path(self, call: Any) -> str:
        try:
            if call not in self._paths:
                self._paths[call] = state.path(call) or type(call[0]()).__name__
            return self._paths[call]
        except TypeError:  # the module is no more
            return state.path(call)

    def by(self, what: str) -> list[Row]:
        """The calls by "op" (an op's kernel and its formula apart) or by "module" (alike layers as one), longest first."""
        rows: dict[tuple[str, str], Row] = {}
        for seen in list(self.seen.values()):
            for (op, by, module), row in list(seen.rows.items()):
                key = (op, by) if what == "op" else (re.sub(r"(?<![^.])\d+(?![^.])", "*", module), "")
                total = rows.setdefault(key, Row(*key))
                total.forward.add(row.forward)
                total.backward.add(row.backward)
        return sorted(rows.values(), key=lambda row: -row.total.seconds)

    def summary(self) -> str:
        """What of the threads' time was inside ops, and what was not."""
        seen = list(self.seen.values())
        time = self.wall * len(seen) or 1.0
        ops, own = sum(row.total.seconds for row in self.by("op")) / time, sum(s.own for s in seen) / time
        return (
            f"{self.wall:.3g} s in {len(seen)} thread{'s' * (len(seen) != 1)}: {ops:.0%} inside ops, {own:.0%} this profile, "
            f"{1 - ops - own:.0%} Python, NumPy outside of ops, and waiting"
        )

    def table(self, by: str = "op") -> Table:
        """A rich table of `by(by)`; its last line is the summary."""
        return charts.table(self, by)

    def __str__(self) -> str:
        return charts.text(self)

    def trace(self, path: str | Path) -> Path:
        """Write a timeline for chrome://tracing or ui.perfetto.dev: a row for each thread, a box for each call."""
        return charts.trace(self, Path(path))

    def roofline(self, path: str | Path) -> Path:
        """Draw each op's rate over its FLOPs per byte, forward and backward, below what this machine could do, to a PNG."""
        return roofline.draw(self, Path(path))


def _visited(run: Any) -> set[Any] | None:
    """The nodes that a backward pass has to do with, None for all: the last argument of the engine's own call."""
    while isinstance(run, partial):
        run = run.args[-1]
    return run if isinstance(run, set) else None
