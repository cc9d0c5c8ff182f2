"""How exactly a GPU multiplies matrices. Everything else stays as it is: weights, their gradients, the residual stream and all
statistics are float32, and so is every sum."""

from __future__ import annotations

from contextlib import ContextDecorator
from typing import get_args

from tinytensor.state import Precision, thread


def current() -> Precision:
    return thread.precision


class precision(ContextDecorator):
    """Within this block (or decorated function), of this thread, on a GPU:

    "fp32": products of float32. "tf32": their factors rounded to 11 significant bits. "bf16": layer_norm and linear give
    bfloat16 (8 bits, with float32's range), which the ops between them keep; linear reads weights rounded to it. Derivatives
    follow their forward. On the CPU all three are fp32.
    """

    def __init__(self, name: Precision) -> None:
        if name not in get_args(Precision):
            raise ValueError(f"precision {name!r} is not known; use one of {', '.join(get_args(Precision))}")
        self.name = name
        self._outer: list[Precision] = []

    def __enter__(self) -> None:
        self._outer.append(thread.precision)
        thread.precision = self.name

    def __exit__(self, *_: object) -> None:
        thread.precision = self._outer.pop()

    def _recreate_cm(self) -> precision:  # a decorated function may recurse or run in several threads
        return precision(self.name)
