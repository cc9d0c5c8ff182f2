"""The module `cupy.cuda` of a device that is not there: streams, captures, memory, and counts of what a real one waits for.

Operations run at once, but for those on a stream that is being captured: these only become part of the graph.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

_ALIGNMENT = 512  # bytes, of a new block of memory
_MEMORY = 80 << 30


@dataclass
class Counts:
    """What has happened on the device, or to the host because of it, since the stand-in was installed."""

    launches: int = 0  # operations and graphs
    host_copies: int = 0  # from the host
    synchronisations: int = 0  # waits of the host, to read what it copies among others


counts = Counts()
_live: dict[int, np.ndarray] = {}  # memory in use, by its id


def submit(operation: Callable[[], Any], stream: Stream | None = None) -> None:
    """Run an operation on memory, or keep it for the graph that the stream is being captured into."""
    stream = stream or get_current_stream()
    if stream.nodes is None:
        counts.launches += 1
        operation()
    else:
        stream.nodes.append(operation)


def synchronise(what: str) -> None:
    _refuse_in_capture(what)
    if not _thread.may_synchronise:
        raise RuntimeError(f"{what} waits for the device, which is disallowed here")
    counts.synchronisations += 1


def copy_from_host(what: str) -> None:
    _refuse_in_capture(what)
    counts.host_copies += 1


def _refuse_in_capture(what: str) -> None:
    if is_capturing():
        raise RuntimeError(f"{what} cannot be captured in a graph")


def is_capturing() -> bool:
    return get_current_stream().nodes is not None


@contextmanager
def allow_synchronize(allow: bool) -> Iterator[None]:
    before, _thread.may_synchronise = _thread.may_synchronise, allow
    try:
        yield
    finally:
        _thread.may_synchronise = before


class Stream:
    null: Stream
    by_pointer: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
    _pointers = itertools.count(0, 64)

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.is_non_blocking = non_blocking
        self.ptr = next(self._pointers)
        self.nodes: list[Callable[[], Any]] | None = None
        self.memories: list[np.ndarray] = []
        self.by_pointer[self.ptr] = self

    def __enter__(self) -> Stream:
        _thread.streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _thread.streams.pop()

    def use(self) -> Stream:
        _thread.streams[-1] = self
        return self

    def synchronize(self) -> None:
        synchronise("Stream.synchronize")

    def is_capturing(self) -> bool:
        return self.nodes is not None

    def begin_capture(self, mode: Any = None) -> None:
        if not self.is_non_blocking or self.nodes is not None:
            raise RuntimeError("only a stream that is non-blocking, and not being captured yet, can be captured")
        self.nodes, self.memories = [], list(_live.values())

    def end_capture(self) -> Graph:
        if self.nodes is None:
            raise RuntimeError("end_capture of a stream that is not being captured")
        nodes, self.nodes = self.nodes, None
        return Graph(nodes, self.memories)

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if self.nodes is not None and not event.captured:
            raise RuntimeError("a stream that is being captured cannot wait for an event outside of the capture")


class Graph:
    """Operations, which may know addresses only, and all memory that was there, or came, while they were captured."""

    def __init__(self, nodes: list[Callable[[], Any]], memories: list[np.ndarray]) -> None:
        self._nodes, self._memories = nodes, memories

    def launch(self, stream: Stream | None = None) -> None:
        submit(self._replay, stream)

    def _replay(self) -> None:
        for node in self._nodes:
            node()


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.captured, self.seconds = False, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.captured, self.seconds = (stream or get_current_stream()).is_capturing(), time.perf_counter()

    def synchronize(self) -> None:
        synchronise("Event.synchronize")


def get_current_stream() -> Stream:
    return _thread.streams[-1]


def get_elapsed_time(start: Event, end: Event) -> float:
    return 1000 * (end.seconds - start.seconds)


class MemoryPointer:
    def __init__(self, memory: np.ndarray) -> None:
        self.mem, self.ptr = memory, memory.ctypes.data


class MemoryPool:
    """Counts the memory that is in use; what is freed is filled with NaN, for another may write there from then on."""

    def __init__(self) -> None:
        self._used = self._total = 0

    def malloc(self, size: int) -> MemoryPointer:
        whole = np.empty(size + _ALIGNMENT, np.uint8)
        pointer = MemoryPointer(poisoned(whole[-whole.ctypes.data % _ALIGNMENT :][:size]))
        self.hold(pointer, pointer.mem)
        return pointer

    def hold(self, holder: Any, memory: np.ndarray) -> None:
        """Count `memory` until `holder` is gone."""
        self._used += memory.nbytes
        self._total = max(self._total, self._used)
        _live[id(memory)] = memory
        if is_capturing():
            get_current_stream().memories.append(memory)
        weakref.finalize(holder, self._free, memory).atexit = False

    def _free(self, memory: np.ndarray) -> None:
        self._used -= memory.nbytes
        del _live[id(memory)]
        poisoned(memory)

    def used_bytes(self) -> int:
        return self._used

    def total_bytes(self) -> int:
        return self._total

    def free_all_blocks(self) -> None:
        self._total = self._used


def poisoned(memory: np.ndarray) -> np.ndarray:
    """`memory`, filled with NaN, −1 or the largest number, by its dtype."""
    if memory.flags.writeable:
        ctypes.memset(memory.ctypes.data, 0xFF if memory.dtype != bool else 1, memory.nbytes)
    return memory


@contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer]) -> Iterator[None]:
    _thread.allocators.append(allocator)
    try:
        yield
    finally:
        _thread.allocators.pop()


def alloc(size: int) -> MemoryPointer:
    return _thread.allocators[-1](size)


def current_pool() -> MemoryPool:
    return _thread.allocators[-1].__self__


class Device:
    compute_capability = "90"
    attributes = {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlock": 48 << 10}

    def __init__(self, device: int = 0) -> None:
        if device != 0:
            raise RuntimeError(f"there is one device, number 0, not {device}")
        self.id = device

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def use(self) -> Device:
        return self

    def synchronize(self) -> None:
        synchronise("Device.synchronize")


def get_device_id() -> int:
    return 0


def is_available() -> bool:
    return True


runtime = SimpleNamespace(
    getDeviceCount=lambda: 1,
    getDeviceProperties=lambda device: {"name": b"CuPy stand-in", "totalGlobalMem": _MEMORY, "multiProcessorCount": 132},
    memGetInfo=lambda: (_MEMORY - default_pool.used_bytes(), _MEMORY),
)


class _Thread(threading.local):
    """What each thread of the host has of its own."""

    def __init__(self) -> None:
        self.streams = [Stream.null]
        self.allocators: list[Any] = [default_pool.malloc]
        self.may_synchronise = True


Stream.null = Stream(null=True)
default_pool = MemoryPool()
_thread = _Thread()
