"""Random numbers as a pure function of (seed, stream, step, micro_step, call, index): nothing to save, nothing to restore.

The function is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): its 128-bit key is
(seed, stream) and its 256-bit counter (index, call, micro_step, step). The same key gives the same numbers in any
process, thread or order, so a resumed run, another rank, or a recomputed activation sees what the first one saw.
"""

from __future__ import annotations

import itertools
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from tinytensor.backend import Array


class Key(NamedTuple):
    """The address of one array of random numbers."""

    seed: int
    stream: str
    step: int = 0
    micro_step: int = 0
    call: int = 0
    place: Array | None = None  # where a captured CUDA graph reads step and micro_step, in their stead

    def words(self) -> tuple[int, int, int, int, int]:
        """(seed, stream, call, micro_step, step) in 64 bits each: Philox's key and the upper words of its counter."""
        numbers = self.seed, zlib.crc32(self.stream.encode()), self.call, self.micro_step, self.step
        return tuple(n & (1 << 64) - 1 for n in numbers)  # type: ignore[return-value]

    def generator(self) -> np.random.Generator:
        """A NumPy generator that starts at this address."""
        seed, stream, *counter = self.words()
        bits = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=np.array([0, *counter], np.uint64))
        return np.random.Generator(bits)


def uniform(key: Key, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Uniform on [0, 1)."""
    if dtype.itemsize == 2:  # whose rounding would reach 1
        steps = 2048 if dtype == np.float16 else 256  # of bfloat16
        return (key.generator().integers(0, steps, shape) / steps).astype(dtype)
    return key.generator().random(shape, np.float32 if dtype.itemsize <= 4 else np.float64).astype(dtype, copy=False)


def normal(key: Key, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Standard normal; drawn in float64 so that every dtype sees the same weights, rounded."""
    return key.generator().standard_normal(shape).astype(dtype, copy=False)


def integers(key: Key, low: int, high: int, shape: tuple[int, ...]) -> Array:
    """Uniform integers in [low, high), int64."""
    return key.generator().integers(low, high, shape)


def keep_mask(key: Key, shape: tuple[int, ...], p: float) -> Array:
    """Boolean mask that is False with probability p, rounded to a multiple of 2⁻¹⁶ (`keep_probability`)."""
    size = int(np.prod(shape))
    words = key.generator().bit_generator.random_raw((size + 3) // 4)  # four 16-bit draws a word
    return (words.view(np.uint16)[:size] >= drop_threshold(p)).reshape(shape)


def drop_threshold(p: float) -> int:
    return min(round(p * 65536), 65535) if p < 1 else 65536


def keep_probability(p: float) -> float:
    """The exact probability with which `keep_mask` keeps, so that 1/keep_probability makes dropout unbiased."""
    return 1 - drop_threshold(p) / 65536


_default_seed = 0
_default_calls = itertools.count()


def _of_the_process(stream: str) -> Key:
    return Key(_default_seed, stream, call=next(_default_calls))


class _Local(threading.local):
    draw: Callable[[str], Key] = staticmethod(_of_the_process)


_local = _Local()


def manual_seed(seed: int) -> None:
    """Restart the process-wide sequence that `next_key` hands out outside any `scope`."""
    global _default_seed, _default_calls
    _default_seed, _default_calls = int(seed), itertools.count()


def next_key(stream: str) -> Key:
    """A key that nobody else has: the next call number of the current scope."""
    return _local.draw(stream)


@contextmanager
def _drawing(draw: Callable[[str], Key]) -> Iterator[None]:
    outer, _local.draw = _local.draw, draw
    try:
        yield
    finally:
        _local.draw = outer


@contextmanager
def scope(seed: int, step: int = 0, micro_step: int = 0, place: Array | None = None) -> Iterator[None]:
    """Within this block (of this thread) `next_key` counts from 0 at (seed, step, micro_step)."""
    seed, step, micro_step, calls = int(seed), int(step), int(micro_step), itertools.count()
    with _drawing(lambda stream: Key(seed, stream, step, micro_step, next(calls), place)):
        yield


@contextmanager
def noted(again: Sequence[Key] = ()) -> Iterator[list[Key]]:
    """Within this block `next_key` hands out the keys `again`, then goes on as it does outside; the list has all of them."""
    left, outer = iter(again), _local.draw
    keys: list[Key] = []

    def draw(stream: str) -> Key:
        key = next(left, None)
        keys.append(outer(stream) if key is None else key._replace(stream=stream))
        return keys[-1]

    with _drawing(draw):
        yield keys
