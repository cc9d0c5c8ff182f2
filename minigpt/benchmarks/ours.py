"""tinytensor and minigpt as a contender."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

import tinytensor as tt
from minigpt import GPT, GPTConfig
from minigpt.benchmarks.theirs import batch, chain
from minigpt.config import TrainConfig
from minigpt.sampling import Sampling, generate
from tinytensor import optim, parallel, random
from tinytensor.graph import Replayed


def step(model: dict[str, Any], rows: int) -> Callable[[], None]:
    """One training step: forward, backward, clip, AdamW."""
    config = GPTConfig(**model)
    gpt = GPT(config)
    adamw = optim.AdamW(gpt.parameter_groups(0.1), lr=1e-4, betas=(0.9, 0.99))
    x, y = batch(model, rows)
    shards = TrainConfig(micro_batch=rows, block_size=config.block_size).resolved_shards()
    parts = list(enumerate(zip(np.array_split(x, shards), np.array_split(y, shards), strict=True)))
    count = 0

    def loss_of(part: Any) -> tt.Tensor:
        place, (xs, ys) = part
        with random.scope(0, count, place):
            return gpt(xs, ys)[1] * (ys.size / y.size)

    def run() -> None:
        nonlocal count
        gpt.zero_grad()
        parallel.backward(loss_of, parts)
        optim.clip_grad_norm_(gpt.parameters(), 1.0)
        adamw.step()
        count += 1

    return run


class DeviceStep:
    """A micro-step and the optimiser's step on a GPU, as the trainer takes them: one CUDA graph, or launch by launch."""

    def __init__(self, model: dict[str, Any], rows: int, precision: Any, graph: bool = True) -> None:
        tt.backend.xp_for("cuda")
        with random.scope(0):
            self.gpt = GPT(GPTConfig(**model)).to("cuda")
        self.optimizer = optim.AdamW(self.gpt.parameter_groups(0.1), lr=1e-4, betas=(0.9, 0.99))
        x, y = (tt.backend.to_device(a.astype(np.int32), "cuda") for a in batch(model, rows))
        self.count = 0

        def loss_of() -> tt.Tensor:
            with tt.precision(precision):
                return self.gpt(x, y)[1]

        self.replayed = Replayed(loss_of, seed=0, capture=graph)

    def micro_step(self) -> Any:
        """The gradient of the batch, made anew; the loss, not waited for."""
        self.optimizer.zero_grad(set_to_none=False)
        self.count += 1
        return self.replayed(self.count, 0)

    def update(self) -> None:
        """Clip and AdamW."""
        optim.clip_grad_norm_(self.gpt.parameters(), 1.0)
        self.optimizer.step()

    def pool(self) -> int:
        """Bytes that CuPy's pools have taken from the device, the graph's own among them."""
        import cupy

        return cupy.get_default_memory_pool().total_bytes() + self.replayed._pool.total_bytes()


def gemm_peak(model: dict[str, Any], rows: int) -> Callable[[], float]:
    """Seconds for a GFLOP in the fastest matrix product, with as many threads as BLAS likes: the peak to measure a step by."""
    n, width = rows * model["block_size"], model["n_embd"]
    pairs = [
        (np.ones((n, width), "f"), np.ones((width, 4 * width), "f")),
        (np.ones((2048, 1024), "f"), np.ones((1024, 1024), "f")),
    ]

    def run() -> float:
        best = np.inf
        for a, b in pairs:
            out = np.empty((len(a), b.shape[1]), "f")
            for _ in range(8):
                start = time.perf_counter()
                np.matmul(a, b, out=out)
                best = min(best, (time.perf_counter() - start) / (2e-9 * a.size * b.shape[1]))
        return float(best)

    return run


def write(model: dict[str, Any], tokens: int) -> Callable[[], None]:
    """Generate tokens from a one-token prompt with the KV cache."""
    gpt = GPT(GPTConfig(**model)).for_sampling()

    def run() -> None:
        for _ in generate(gpt, np.zeros(1, np.int64), tokens, Sampling(temperature=1.0)):
            pass

    return run


def small_ops(n: int = 50) -> Callable[[], float]:
    """Seconds per op, forward and backward, in a chain of adds and products of four-element tensors."""
    return chain(tt.randn(4, requires_grad=True), tt.randn(4, requires_grad=True), n)
