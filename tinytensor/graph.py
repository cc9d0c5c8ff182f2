"""CUDA graphs: a loss and its backward recorded once and replayed, so that a step's hundreds of launches cost the CPU one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from tinytensor import autograd, backend, writes
from tinytensor.autograd import Leaf
from tinytensor.backend import Array, random
from tinytensor.tensor import Tensor, root


class Replayed:
    """Adds the gradient of loss_of(*inputs) to the leaves, and returns the loss, an array of one element on the device.

    The first call with inputs of some shapes runs as it is written, which compiles kernels and finds memory; the second is
    recorded, and replayed from then on. So loss_of may draw random numbers, but not look at values, copy from the host, or
    multiply by `@` and einsum, which CuPy does not let be recorded. It is not called again: what it reads beside its inputs
    (weights) must stay in place. Gradients must lie in an optimiser's memory already (`zero_grad(set_to_none=False)`). With
    capture=False every call runs as it is written: the same bits.
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
        try:
            with self._stream, self._cupy.cuda.using_allocator(self._pool.malloc):
                recording = self._make(step, micro_step, inputs)
        finally:  # also where a part of it was made
            caller.wait_event(self._stream.record())
        return recording.loss.copy()  # the next replay writes into it

    def _make(self, step: int, micro_step: int, inputs: tuple[np.ndarray, ...]) -> _Recording:
        key = tuple((a.shape, a.dtype.str) for a in inputs)
        if key not in self._recorded:
            self._recorded[key] = _Recording([self._cupy.empty(a.shape, a.dtype) for a in inputs])
        recording = self._recorded[key]
        for memory, values in zip(recording.inputs, inputs, strict=True):
            memory.set(values)
        backend.cuda.set_place(self._place, step, micro_step)
        if recording.loss is None or not self._capture:
            self._run(recording, step, micro_step)
            return recording
        if recording.graph is None:
            self._record(recording)
        if any(_gradient(leaf) is not memory for leaf, memory in recording.gradients):
            raise RuntimeError(
                "Replayed has recorded where gradients lie, and one lies elsewhere now: another optimizer owns it, or its "
                ".grad was set; make a new Replayed"
            )
        recording.graph.launch(self._stream)
        return recording

    def _record(self, recording: _Recording) -> None:
        self._stream.begin_capture()
        try:
            self._run(recording, 0, 0)
        except BaseException:
            with suppress(Exception):  # the failure may have ended the capture
                self._stream.end_capture()
            raise
        recording.graph = self._stream.end_capture()

    def _run(self, recording: _Recording, step: int, micro_step: int) -> None:
        begun = next(writes.serial)  # a leaf that is newer is loss_of's own
        gradients: list[tuple[Leaf, Array]] = []

        def add(node: Any, g: Array, owned: bool) -> None:
            if node.op is None and node.serial < begun:
                gradients.append((node, _gradient(node)))
            autograd.deposit(node, g, owned)

        with random.scope(self._seed, step, micro_step, place=self._place):
            loss = self._loss_of(*recording.inputs)
        autograd.sweep([root(loss, None, False)], add, slot_of=autograd.filled_slot)
        recording.loss, recording.gradients = loss.data, gradients


def _gradient(leaf: Leaf) -> Array:
    if leaf.grad is None:
        raise RuntimeError("Replayed adds to gradients where they lie; call optimizer.zero_grad(set_to_none=False) before it")
    return leaf.grad.data


class _Recording:
    """A graph, the memory that its inputs are put into, and the memory that its loss comes out of and its gradients lie in."""

    def __init__(self, inputs: list[Array]) -> None:
        self.inputs = inputs
        self.loss: Array = None
        self.gradients: list[tuple[Leaf, Array]] = []
        self.graph: Any = None
