"""Cores: the batch of a step is cut into shards, and each shard runs forward and backward in one thread from start to end.

The gradient of a step is the sum of its shards' gradients in one fixed binary tree, so it does not depend on how many threads
there were or which of them was faster. Kernels know nothing of threads; BLAS runs with one thread inside a shard.
"""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tinytensor import autograd, backend
from tinytensor.autograd import Leaf
from tinytensor.backend import Array
from tinytensor.backend.memory import keep_memory
from tinytensor.state import lent, settings
from tinytensor.tensor import Tensor, root

T = TypeVar("T")
R = TypeVar("R")


def cpu_threads() -> int:
    """Threads to use: as `limited`, else TINYTENSOR_NUM_THREADS, else this process's share of the cores that it may run on.

    Where an MPI launcher started several processes on this machine and gave them all the same cores, each takes its part.
    """
    if _allowed is not None:
        return _allowed
    given = os.environ.get("TINYTENSOR_NUM_THREADS")
    if given is not None:
        if not given.isdigit() or int(given) < 1:
            raise ValueError(f"TINYTENSOR_NUM_THREADS={given!r} must be a whole number of at least 1")
        return int(given)
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 1) // _neighbours())
    cores = os.sched_getaffinity(0)
    bound = cores != os.sched_getaffinity(os.getppid())  # the launcher gave this process cores of its own
    return len(cores) if bound else max(1, len(cores) // _neighbours())


def _neighbours() -> int:
    """How many processes the MPI launcher says it started on this machine, this one included."""
    for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"):
        if os.environ.get(name, "").isdigit():
            return max(1, int(os.environ[name]))
    return 1


def map(f: Callable[[T], R], items: Iterable[T], threads: int | None = None) -> list[R]:
    """[f(x) for x in items], several at a time; each call sees the caller's `state.settings`. The first exception is raised.

    Each call has one BLAS thread, but for one item alone, which leaves BLAS all of them unless `threads` is 1.

    Random numbers drawn in f should come from a `random.scope` opened there, or they depend on who was faster.
    """
    todo = list(items)
    allowed = threads or cpu_threads()
    if not todo or (len(todo) == 1 and allowed > 1) or getattr(_worker, "busy", False):  # a map in a map has no cores to use
        return [f(x) for x in todo]
    threads = min(allowed, len(todo))
    results: list[Any] = [None] * len(todo)
    queue = iter(range(len(todo)))
    lock, failed = threading.Lock(), threading.Event()
    ours = settings()

    def work() -> None:
        _worker.busy = True
        try:
            with lent(ours):
                while not failed.is_set():
                    with lock:
                        i = next(queue, None)
                    if i is None:
                        return
                    results[i] = f(todo[i])
        except BaseException:
            failed.set()
            raise
        finally:
            _worker.busy = False

    with one_blas_thread():
        # the copied context carries numpy.errstate to the workers
        others = [_pool(threads - 1).submit(contextvars.copy_context().run, work) for _ in range(1, threads)]
        try:
            work()
        finally:
            errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error
    return results


def backward(loss_of: Callable[[T], Tensor], shards: Sequence[T], threads: int | None = None) -> list[float]:
    """Add the gradient of Σ loss_of(shard) to the leaves' .grad, and return the losses.

    `loss_of` makes one shard's loss, a tensor of one element, from scratch; weigh it so that the sum is what you want (a mean
    over equal shards: divide by their number). What it draws at random should depend on the shard alone (`random.scope`).
    """
    keep_memory()
    tree = _Tree(len(shards))

    def run(i: int) -> float:
        loss = loss_of(shards[i])
        gradients: dict[Leaf, Array] = {}

        def arrived(node: Any, g: Array, owned: bool) -> None:
            if isinstance(node, Leaf):
                gradients[node] = g if owned else backend.as_array(g).copy()
            else:
                autograd.deposit(node, g, owned)

        # the first shard writes where the sum will be wanted, so that one shard alone costs no copy
        autograd.sweep([root(loss, None, False)], arrived, slot_of=autograd.free_slot if i == 0 else None)
        tree.add(i, gradients)
        return loss.item()

    losses = map(run, range(len(shards)), threads)
    for leaf, g in tree.total().items():
        autograd.deposit(leaf, g, True)
    return losses


class _Tree:
    """Gradients summed in a fixed binary tree over the shards: the sum of a stretch is that of its first half plus its second.

    Whoever brings the second of two halves adds them up; the sum then waits for, or meets, the other half of a longer stretch.
    Halves of halves are also what 2, 4, 8, … processes share, so their sums are parts of the same tree.
    """

    def __init__(self, leaves: int) -> None:
        self._whole: dict[tuple[int, int], tuple[int, int]] = {}  # from a half to the stretch that it is a half of
        self._waiting: dict[tuple[int, int], dict[Leaf, Array]] = {}
        self._top = 0, leaves
        self._lock = threading.Lock()
        stretches = [self._top]
        for first, last in stretches:
            if last - first > 1:
                for half in ((first, (first + last) // 2), ((first + last) // 2, last)):
                    self._whole[half] = first, last
                    stretches.append(half)

    def add(self, place: int, gradients: dict[Leaf, Array]) -> None:
        stretch = place, place + 1
        while stretch != self._top:
            whole = self._whole[stretch]
            other = (whole[0], stretch[0]) if stretch[0] > whole[0] else (stretch[1], whole[1])
            with self._lock:
                if other not in self._waiting:
                    self._waiting[stretch] = gradients
                    return
                theirs = self._waiting.pop(other)
            left, right = (gradients, theirs) if stretch < other else (theirs, gradients)
            for leaf, g in right.items():
                if leaf in left:
                    left[leaf] += g
                else:
                    left[leaf] = g
            gradients, stretch = left, whole
        self._waiting[stretch] = gradients

    def total(self) -> dict[Leaf, Array]:
        return self._waiting.pop(self._top, {})


_worker = threading.local()
_allowed: int | None = None
_executor: Any = None
_executor_threads = 0
_executor_lock = threading.Lock()


def _pool(threads: int) -> Any:
    from concurrent.futures import ThreadPoolExecutor  # 8 ms that importing the library need not cost

    global _executor, _executor_threads
    with _executor_lock:
        if _executor is None or _executor_threads < threads:
            _executor, _executor_threads = ThreadPoolExecutor(threads, thread_name_prefix="tinytensor"), threads
        return _executor


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """Within this block the process computes with at most `threads` threads, those of BLAS included."""
    global _allowed
    before, _allowed = _allowed, threads
    try:
        with _blas().limit(limits=min([threads, *(library["num_threads"] for library in _blas().info())])):
            yield
    finally:
        _allowed = before


@functools.cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


_limit: Any = None
_limit_users = 0
_limit_lock = threading.Lock()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS with one thread while anybody is within: the limit is the process's, so the first sets it, the last lifts it."""
    global _limit, _limit_users
    with _limit_lock:
        if _limit_users == 0:
            _limit = _blas().limit(limits=1)
            _limit.__enter__()
        _limit_users += 1
    try:
        yield
    finally:
        with _limit_lock:
            _limit_users -= 1
            if _limit_users == 0:
                _limit.__exit__(None, None, None)
