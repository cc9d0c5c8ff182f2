"""A stand-in for CuPy: every branch of the library for a GPU runs on the CPU, held to the rules of a device (see array.py)."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import numpy as np

from tests.cuda.standin import array, cublas, device

__all__ = ["cublas", "install", "uninstall"]
_hidden: dict[str, ModuleType] = {}


def install() -> None:
    """Make it what `import cupy` finds."""
    uninstall()
    for name in [n for n in sys.modules if n.partition(".")[0] in ("cupy", "cupyx")]:
        _hidden[name] = sys.modules.pop(name)
    device.counts.__init__()
    special = _module("cupyx.scipy.special", erf=lambda x: array._call(_erf, x))
    scipy = _module("cupyx.scipy", special=special)
    distributed = _module("cupyx.distributed", init_process_group=_Group)
    cupyx = _module("cupyx", allow_synchronize=device.allow_synchronize, scipy=scipy, distributed=distributed)
    sys.modules.update({"cupy": array, "cupy.cuda": device, **{m.__name__: m for m in (cupyx, scipy, special, distributed)}})


def uninstall() -> None:
    """Make it be as it was before."""
    if sys.modules.get("cupy") is array:
        for name in [n for n in sys.modules if n.partition(".")[0] in ("cupy", "cupyx")]:
            del sys.modules[name]
    sys.modules.update(_hidden)
    _hidden.clear()


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    return module


def _erf(x: np.ndarray) -> np.ndarray:
    narrow = x.dtype.name in ("float32", "bfloat16")  # float16 becomes float64
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), np.float32 if narrow else np.float64)


class _Group:
    """Arrays of all ranks, added up or exchanged, as NCCL does it; through MPI here."""

    def __init__(self, n_devices: int, rank: int, use_mpi: bool = False) -> None:
        from mpi4py import MPI

        if not use_mpi or (n_devices, rank) != (MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank):
            raise ValueError(f"rank {rank} of {n_devices} is not what MPI says")
        self._comm, self._in_place = MPI.COMM_WORLD, MPI.IN_PLACE

    def all_reduce(self, in_array: array.ndarray, out_array: array.ndarray) -> None:
        source, target = _sendable(in_array), _sendable(out_array)
        device.submit(lambda: self._comm.Allreduce(self._in_place if source is target else source, target))

    def broadcast(self, in_out_array: array.ndarray, root: int = 0) -> None:
        memory = _sendable(in_out_array)
        device.submit(lambda: self._comm.Bcast(memory, root))

    def send_recv(self, in_array: array.ndarray, out_array: array.ndarray, peer: int) -> None:
        source, target = _sendable(in_array), _sendable(out_array)
        device.submit(lambda: self._comm.Sendrecv(source, peer, recvbuf=target, source=peer))


def _sendable(x: array.ndarray) -> np.ndarray:
    if not isinstance(x, array.ndarray) or x.dtype.char not in "bBiIlLqQefd" or not x.flags.c_contiguous:
        raise TypeError(f"NCCL takes contiguous arrays of numbers on the device, not {type(x)}")
    return x._array
