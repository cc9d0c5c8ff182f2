"""Memory that the process keeps: a fresh large array costs as much in page faults as two passes over it."""

from __future__ import annotations

import ctypes
import functools
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # glibc's malloc.h


@functools.cache
def keep_memory() -> bool:
    """Tell glibc's allocator to reuse freed memory rather than return it to the system; True where that took effect.

    It lasts for the life of the process. Elsewhere than on glibc it does nothing.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 1 << 30, _TOP_PAD: 64 << 20, _ARENA_MAX: 1}
    accepted = [libc.mallopt(name, value) == 1 for name, value in settings.items()]  # each, whatever became of the others
    return all(accepted)
