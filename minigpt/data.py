"""Token ids to batches. A batch is a function of (seed, step, micro-step, row): nothing to save, nothing to restore."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np

from tinytensor import backend, random
from tinytensor.backend import Array


class Dataset:
    """A text's ids, the last `val_share` of them for validation. They may lie in a file that is mapped into memory."""

    def __init__(self, ids: np.ndarray, block_size: int, val_share: float = 0.1) -> None:
        cut = int(len(ids) * (1 - val_share))
        self.train: Array = ids[:cut]
        self.val = ids[cut:]
        self.block_size = block_size
        if len(self.train) <= block_size or len(self.val) < 2:
            raise ValueError(
                f"the text has {len(ids)} tokens: {len(self.train)} to train on and {len(self.val)} to validate on, but "
                f"block_size={block_size} needs more than {block_size} and at least 2; use a longer text or a smaller block"
            )

    def to(self, device: str) -> Self:
        """Keep the text to train on there, in 32 bits a token; batches then come from there too."""
        if device != "cpu":
            self.train = backend.to_device(self.train.astype(np.int32), device)
        return self

    def starts(self, seed: int, step: int, micro_step: int, rows: int) -> np.ndarray:
        """Where the rows of a batch begin: anywhere."""
        u = random.uniform(random.Key(seed, "batch", step, micro_step), (rows,), np.dtype(np.float64))
        return (u * (len(self.train) - self.block_size)).astype(np.int64)

    def windows(self, starts: Array) -> tuple[Array, Array]:
        """Inputs and targets (rows, block_size) of the rows that begin at `starts`, the targets one token further on."""
        windows = self.train[starts[:, None] + np.arange(self.block_size + 1, like=starts)]
        return windows[:, :-1], windows[:, 1:]

    def batch(self, seed: int, step: int, micro_step: int, rows: int) -> tuple[Array, Array]:
        """Inputs and targets of a whole batch."""
        return self.windows(self.starts(seed, step, micro_step, rows))

    def validation(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The whole validation split in windows side by side, at most `rows` to a batch; the last window may be shorter."""
        T = self.block_size
        whole = (len(self.val) - 1) // T
        x = self.val[: whole * T].reshape(whole, T)
        y = self.val[1 : whole * T + 1].reshape(whole, T)
        for i in range(0, whole, rows):
            yield x[i : i + rows], y[i : i + rows]
        if (len(self.val) - 1) % T:
            yield self.val[None, whole * T : -1], self.val[None, whole * T + 1 :]
