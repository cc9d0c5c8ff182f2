"""Initial weights, written in place. The numbers come from the next key of `random.scope` or `manual_seed`."""

from __future__ import annotations

import math
from collections.abc import Callable

from tinytensor import backend, writes
from tinytensor.backend import Array, random
from tinytensor.state import Setting, thread
from tinytensor.tensor import Tensor


def skip() -> Setting:
    """Within this block (or decorated function) this thread draws no random initial weights, for a model that is about to be
    given others: until then they are whatever was in memory. Constants are still written.
    """
    return Setting("initialises", False)


def normal_(x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Fill with N(mean, std²)."""
    return _write(x, lambda: mean + std * random.normal(random.next_key("init"), x.shape, x.dtype))


def uniform_(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Fill with the uniform distribution on [low, high)."""
    return _write(x, lambda: low + (high - low) * random.uniform(random.next_key("init"), x.shape, x.dtype))


def constant_(x: Tensor, value: float) -> Tensor:
    """Fill with one value."""
    writes.check(x.data)
    x.data[...] = value
    writes.record(x.data)
    return x


def zeros_(x: Tensor) -> Tensor:
    """Fill with 0."""
    return constant_(x, 0.0)


def ones_(x: Tensor) -> Tensor:
    """Fill with 1."""
    return constant_(x, 1.0)


def xavier_uniform_(x: Tensor, gain: float = 1.0) -> Tensor:
    """Uniform in ±gain·√(6/(fan_in + fan_out)) (Glorot & Bengio 2010)."""
    fan_in, fan_out = _fans(x)
    bound = gain * math.sqrt(6 / (fan_in + fan_out))
    return uniform_(x, -bound, bound)


def kaiming_normal_(x: Tensor, gain: float = math.sqrt(2)) -> Tensor:
    """N(0, gain²/fan_in) (He et al. 2015); the default gain suits relu."""
    return normal_(x, std=gain / math.sqrt(_fans(x)[0]))


def _fans(x: Tensor) -> tuple[int, int]:
    if x.ndim < 2:
        raise ValueError(f"fan-in and fan-out need at least 2 dimensions, got shape {x.shape}")
    field = math.prod(x.shape[2:])
    return x.shape[1] * field, x.shape[0] * field


def _write(x: Tensor, draw: Callable[[], Array]) -> Tensor:
    if thread.initialises:
        writes.check(x.data)
        x.data[...] = backend.to_device(draw(), x.device)
        writes.record(x.data)
    return x
