"""Several processes train one model.

Each rank holds the whole model and computes its share of a step's shards; their gradients are added up in a binary tree, so
every rank takes the same step, bit for bit. Where the ranks are a power of two, the tree is that of one process, and a run on
CPUs does not depend on their number. Rank 0 alone writes and prints. Ranks come from an MPI launcher:
`mpiexec -n 4 python scripts/train.py …`.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from minigpt.program import SENTENCES, missing
from tinytensor import backend
from tinytensor.backend import Array
from tinytensor.optim import Optimizer

T = TypeVar("T")


class Ranks:
    """The processes of a job. This class is a job of one: rank 0 of 1."""

    rank, size = 0, 1

    def share(self, n: int) -> range:
        """This rank's part of 0 … n − 1: halves of halves, as the tree of a step's gradient has them, then equal stretches."""
        first, last, size = 0, n, self.size
        while size > 1 and size % 2 == 0:
            middle, size = (first + last) // 2, size // 2
            first, last = (middle, last) if self.rank & size else (first, middle)
        n, rank = last - first, self.rank % size
        return range(first + n * rank // size, first + n * (rank + 1) // size)

    def gather(self, items: Iterable[T]) -> list[T]:
        """Every rank's items, in the order of the ranks, on every rank."""
        return list(items)

    def first(self, f: Callable[[], T]) -> T:
        """f(), called on rank 0 while the others wait; its result, or its error, on every rank."""
        return f()

    def add_up(self, optimizer: Optimizer) -> None:
        """Replace the gradients by the sum of every rank's."""

    def at_rest(self) -> None:
        """Say that this rank has nothing more to wait for."""


class MPIRanks(Ranks):
    """The ranks of an MPI job. Arrays on the CPU travel by MPI, those on a GPU by NCCL."""

    def __init__(self, comm: Any, timeout: float) -> None:
        self.comm, self.timeout = comm, timeout
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._inbox: Array = np.empty(0)
        self._nccl: Any = None

    def gather(self, items: Iterable[T]) -> list[T]:
        self._alive()
        return [item for part in self.comm.allgather(list(items)) for item in part]

    def first(self, f: Callable[[], T]) -> T:
        self._alive()
        answer: tuple[T | None, Exception | None] = None, None
        if self.rank == 0:
            try:
                answer = f(), None
            except Exception as error:
                answer = None, error
        result, failure = self.comm.bcast(answer)
        if failure is not None:
            raise failure
        return result

    def add_up(self, optimizer: Optimizer) -> None:
        for gradients in optimizer.flat_gradients():
            self.sum_(gradients)

    def sum_(self, array: Array) -> None:
        """Replace a flat array by the sum of every rank's, in place.

        A power of two of ranks halves and doubles (Rabenseifner 2004): with each peer at distance 1, 2, 4, … a rank trades half
        of the stretch that it still works on and adds up the other half; then the finished stretches travel back. That moves
        2·(size − 1)/size of the array, as little as any way of adding, and adds every element in the tree that the shards'
        sums began, for a + b and b + a are the same bits. Other numbers of ranks add in the order that MPI or NCCL likes.
        """
        if self.size & (self.size - 1):
            if isinstance(array, np.ndarray):
                from mpi4py import MPI

                self.comm.Allreduce(MPI.IN_PLACE, array)
            else:
                self._gpus().all_reduce(array, array)
            return
        if self._inbox.shape != array.shape or self._inbox.dtype != array.dtype:
            self._inbox = backend.xp_of(array).empty_like(array)
        stretch, trades, distance = slice(0, array.size), [], 1
        while distance < self.size:
            middle = (stretch.start + stretch.stop) // 2
            keep, give = slice(stretch.start, middle), slice(middle, stretch.stop)
            if self.rank & distance:
                keep, give = give, keep
            self._swap(array[give], self._inbox[keep], self.rank ^ distance)
            array[keep] += self._inbox[keep]
            trades.append((self.rank ^ distance, keep, give))
            stretch, distance = keep, distance * 2
        for peer, keep, give in reversed(trades):
            self._swap(array[keep], array[give], peer)

    def _swap(self, out: Array, into: Array, peer: int) -> None:
        if isinstance(out, np.ndarray):
            self.comm.Sendrecv(out, peer, recvbuf=into, source=peer)
        else:
            self._gpus().send_recv(out, into, peer)

    def _gpus(self) -> Any:
        if self._nccl is None:
            from cupyx.distributed import init_process_group

            self._nccl = init_process_group(self.size, self.rank, use_mpi=True)
        return self._nccl

    def _alive(self) -> None:
        """Say that this rank goes on, wherever it meets the others: one that is not seen there for `timeout` seconds hangs."""
        faulthandler.dump_traceback_later(self.timeout, exit=True)

    def at_rest(self) -> None:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def ranks(device: str, timeout: float) -> Iterator[Ranks]:
    """The job that this process belongs to. An error on one rank ends all of them, with a status that is not 0."""
    if _launched() < 2 and "mpi4py" not in sys.modules:
        yield Ranks()
        return
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the package, or the MPI library below it
        cause = str(error).partition("\n")[0]
        raise RuntimeError(
            f"an MPI launcher started {_launched()} processes, which needs {missing('mpi4py', 'mpi', cause)}"
        ) from None
    comm = MPI.COMM_WORLD
    if comm.Get_size() == 1:
        if _launched() > 1:
            raise RuntimeError(
                f"an MPI launcher started {_launched()} processes, but mpi4py sees one: it was built for another MPI than the "
                "launcher's; use the mpiexec of the MPI that mpi4py was installed with"
            )
        yield Ranks()
        return
    job = MPIRanks(comm, timeout)
    try:
        if device == "cuda":
            import cupy

            local = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()
            cupy.cuda.Device(local % cupy.cuda.runtime.getDeviceCount()).use()
        yield job
        comm.Barrier()  # nobody leaves before rank 0 has written and said everything: a launcher may end the rest then
    except BaseException as error:
        if not isinstance(error, (*SENTENCES, MemoryError, KeyboardInterrupt)):
            traceback.print_exc()
        if job.rank:
            time.sleep(1)  # for rank 0 to write down what it, too, may have met
        sys.stdout.flush()
        print(f"error on rank {job.rank} of {job.size}: {str(error) or repr(error)}", file=sys.stderr, flush=True)
        time.sleep(0.2)  # for the launcher to pass that on
        comm.Abort(1)  # the others may be waiting for this rank, and would wait for ever
        os._exit(1)
    finally:
        job.at_rest()


def _launched() -> int:
    """How many processes the launcher says there are."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1
