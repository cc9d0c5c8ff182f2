"""Arrays that share their memory with another library's, by DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinytensor.backend import DTYPES, Array, as_array, read_only, xp_for

_DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}  # by DLPack's numbers; 3 is pinned, 13 managed memory


def to_dlpack(array: Array, **options: Any) -> Any:
    """A capsule that another library makes its own array of. BufferError for what others cannot take."""
    if array.dtype.name == "bfloat16":
        raise BufferError("bfloat16 does not travel by DLPack; use astype('float32')")
    if read_only(array) and not options.get("copy"):  # which PyTorch does not ask for
        raise BufferError(f"an array of shape {array.shape} that may only be read does not travel by DLPack; use clone()")
    if any(stride < 0 for stride in array.strides):  # PyTorch ends the process when it meets one
        raise BufferError(f"an array of shape {array.shape} with negative strides does not travel by DLPack; use clone()")
    return array.__dlpack__(**options)


def from_dlpack(source: Any) -> Array:
    """An array in the memory of `source`. TypeError for what is no array or has no dtype of ours, ValueError for its device."""
    name = type(source).__name__
    if not hasattr(source, "__dlpack__") or not hasattr(source, "__dlpack_device__"):
        raise TypeError(f"from_dlpack takes an array with __dlpack__ and __dlpack_device__, which {name} has not; use tensor()")
    kind = source.__dlpack_device__()[0]
    if kind not in _DEVICES:
        device = getattr(kind, "name", f"of DLPack's type {kind}")
        raise ValueError(f"from_dlpack: this {name} lives on a device {device}; move it to the CPU or to a CUDA device first")
    xp = xp_for(_DEVICES[kind])
    try:
        array = xp.from_dlpack(source)
    except (RuntimeError, TypeError, BufferError) as error:
        if isinstance(error, BufferError) and not isinstance(source, np.ndarray):
            raise  # a refusal of its own, such as that it requires gradients
        raise TypeError(
            f"from_dlpack: {xp.__name__} takes no {name} of dtype {getattr(source, 'dtype', 'unknown')} ({error}); "
            f"convert it to one of {', '.join(DTYPES)} first"
        ) from None
    return as_array(array)
