"""Who wrote where, and when: the log that keeps in-place writing honest.

Nodes and writes are numbered by one counter, so "was this array written after that node saved it?" is a comparison. The log
knows a write by the memory it touched, not by the tensor it went through: a write through a view, a slice or a detached
twin is found as well. An operation pays for its number; the log is searched only when some write is newer than a node.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import deque
from types import CodeType
from typing import NamedTuple

from tinytensor.backend import Array, byte_bounds, memory_root, read_only

serial = itertools.count(1)
latest = 0  # serial of the newest write

_MAX_RANGES = 64  # writes to more places of one array than this are remembered as one range over all of them


class Origin(NamedTuple):
    """A line of the user's code, kept unresolved because resolving it costs more than most ops."""

    code: CodeType
    instruction: int

    def __str__(self) -> str:
        lines = (line for start, end, line in self.code.co_lines() if start <= self.instruction < end)
        return f"{self.code.co_filename}:{next(lines, None) or self.code.co_firstlineno}"


def line(depth: int = 1) -> tuple[CodeType, int]:
    """What Origin needs of the innermost line outside this package; the nearest `depth` calls are known to be inside."""
    frame = sys._getframe(depth)
    while frame.f_globals.get("__name__", "")[:10] == "tinytensor" and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


def caller() -> Origin:
    """The innermost line outside this package that led here."""
    return Origin(*line(2))


def check(array: Array) -> None:
    """ValueError where `array` may only be read, before a write to it."""
    if read_only(array):
        raise ValueError(
            f"in-place write at {caller()} to an array of shape {array.shape} in memory that may only be read; "
            "write into a clone()"
        )


class Write(NamedTuple):
    serial: int
    origin: Origin


Log = dict[int, tuple[weakref.ref[Array], dict[tuple[int, int], Write]]]  # by the id of the array that has the memory

_log: Log = {}
_lent: set[int] = set()  # those of _log whose memory is somebody else's, and may be read after the array is gone,
_lost: deque[tuple[int, int, Write]] = deque(maxlen=64)  # and the last writes through such arrays that are
_log_lock = threading.RLock()


def record(array: Array) -> None:
    """Note that the memory of `array` has just been written, by the user's current line."""
    global latest
    root = memory_root(array)
    key = id(root)
    place, origin = byte_bounds(array), caller()
    with _log_lock:
        if key not in _log:
            _log[key] = (weakref.ref(root, lambda _: _forget(key)), {})
            if _borrowed(root):
                _lent.add(key)
        ranges = _log[key][1]
        latest = next(serial)
        ranges[place] = Write(latest, origin)
        if len(ranges) > _MAX_RANGES:
            low, high, newest = min(lo for lo, _ in ranges), max(hi for _, hi in ranges), ranges[place]
            ranges.clear()
            ranges[low, high] = newest


def _forget(key: int) -> None:
    _, ranges = _log.pop(key, (None, {}))
    if key in _lent:
        _lent.discard(key)
        _lost.extend((low, high, write) for (low, high), write in ranges.items())


def _borrowed(root: Array) -> bool:
    return root.base is not None


def newer(since: int) -> Log:
    """The writes newer than `since`, as they are known now: of several to one place, the last."""
    if latest < since:
        return {}
    with _log_lock:
        known = _log.copy()  # for the dead are forgotten at any time
        found = {key: (root, {at: w for at, w in ranges.items() if w.serial > since}) for key, (root, ranges) in known.items()}
    return {key: entry for key, entry in found.items() if entry[1]}


def find(array: Array, since: int, earlier: Log | None = None) -> Write | None:
    """A write newer than `since`, among `earlier` ones where these are given, to memory that `array` can see, or None."""
    if latest < since:
        return None
    log = _log if earlier is None else earlier
    root = memory_root(array)
    low, high = byte_bounds(array)
    with _log_lock:
        # memory that another library owns, or lends us twice, has as many roots as there are ways that led here
        keys = log.copy() if _borrowed(root) else (id(root), *_lent.copy())
        near = [ranges for owner, ranges in filter(None, map(log.get, keys)) if owner() is not None]
        places = [(lo, hi, w) for ranges in near for (lo, hi), w in ranges.items()]
        if earlier is None:  # `array` is as old as `since`; a younger one may lie where that of a lost write was
            places += _lost.copy()
        hits = [w for lo, hi, w in places if lo < high and low < hi]
    return max((w for w in hits if w.serial > since), default=None, key=lambda w: w.serial)
