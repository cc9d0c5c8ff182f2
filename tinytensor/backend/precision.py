"""In which dtype a GPU's matrix products read and give; weights, sums, statistics and the residual stream stay float32."""

from __future__ import annotations

from typing import get_args

from tinytensor.state import Precision, Setting, thread


def current() -> Precision:
    return thread.precision


class precision(Setting):
    """Within this block (or decorated function), of this thread, on a GPU:

    "fp32": products of float32. "tf32": their factors rounded to 11 significant bits. "bf16": layer_norm and linear give
    bfloat16 (8 bits, with float32's range), which the ops between them keep; linear reads weights rounded to it. Derivatives
    follow their forward. On the CPU all three are fp32.
    """

    def __init__(self, name: Precision) -> None:
        if name not in get_args(Precision):
            raise ValueError(f"precision {name!r} is not known; use one of {', '.join(get_args(Precision))}")
        super().__init__("precision", name)
