"""CUDA graphs: a loss and its backward recorded once and replayed, so that a step's hundreds of launches cost the CPU one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from tinytensor import autograd, backend
from tinytensor.backend import Array, random
from tinytensor.tensor import Tensor, root


class Replayed:
    """Adds the gradient of loss_of(*inputs) to the leaves, and returns the loss, an array of one element on the device.

    The first call with inputs of some shapes runs as it is written, which compiles kernels and finds memory; the second is
    recorded, and replayed from then on. So loss_of may draw random numbers, but not look at values or copy from the host, and
    is not called again: what it reads beside its inputs (weights) must stay in place. Gradients must lie in an optimiser's
    memory already (`zero_grad(set_to_none=False)`). With capture=False every call runs as it is written: the same bits.
    """

    def __init__(self, loss_of: Callable[..., Tensor], seed: int, capture: bool = True) -> None:
        cupy = backend.xp_for("cuda")
        self._cupy: Any = cupy
        self._loss_of, self._seed, self._capture = loss_of, seed, capture
        self._stream = cupy.cuda.Stream(non_blocking=True)  # the only kind that can be captured
        self._pool = cupy.cuda.MemoryPool()  # memory that a graph works in is nobody else's
        self._place = cupy.zeros(2, np.uint64)
        self._recorded: dict[Any, _Recording] = {}

    def __call__(self, step: int, micro_step: int, *inputs: np.ndarray) -> Array:
        """At (step, micro_step) of the random numbers of the seed."""
        caller = self._cupy.cuda.get_current_stream()
        self._stream.wait_event(caller.record())
        with self._stream, self._cupy.cuda.using_allocator(self._pool.malloc):
            key = tuple((a.shape, a.dtype.str) for a in inputs)
            if key not in self._recorded:
                self._recorded[key] = _Recording([self._cupy.empty(a.shape, a.dtype) for a in inputs])
            recording = self._recorded[key]
            for memory, values in zip(recording.inputs, inputs, strict=True):
                memory.set(values)
            backend.cuda.set_place(self._place, step, micro_step)
            if recording.loss is None or not self._capture:
                recording.loss = self._run(recording.inputs, step, micro_step)
            else:
                if recording.graph is None:
                    self._record(recording)
                recording.graph.launch(self._stream)
        caller.wait_event(self._stream.record())
        return recording.loss.copy()  # the next replay writes into it

    def _record(self, recording: _Recording) -> None:
        self._stream.begin_capture()
        try:
            recording.loss = self._run(recording.inputs, 0, 0)
        except BaseException:
            with suppress(Exception):  # the failure may have ended the capture
                self._stream.end_capture()
            raise
        recording.graph = self._stream.end_capture()

    def _run(self, inputs: list[Array], step: int, micro_step: int) -> Array:
        with random.scope(self._seed, step, micro_step, place=self._place):
            loss = self._loss_of(*inputs)
        autograd.sweep([root(loss, None, False)], _add, slot_of=autograd.filled_slot)
        return loss.data


def _add(node: Any, g: Array, owned: bool) -> None:
    if node.op is None and node.grad is None:
        raise RuntimeError("Replayed adds to gradients where they lie; call optimizer.zero_grad(set_to_none=False) before it")
    autograd.deposit(node, g, owned)


class _Recording:
    """A graph, the memory that its inputs are put into, and the memory that its loss comes out of."""

    def __init__(self, inputs: list[Array]) -> None:
        self.inputs = inputs
        self.loss: Array = None
        self.graph: Any = None
