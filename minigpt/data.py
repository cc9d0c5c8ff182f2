"""Token ids to batches. A batch is a function of (seed, step, micro-step, row): nothing to save, nothing to restore."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tinytensor import random


class Dataset:
    """A text's ids, the first 90% for training, the rest for validation."""

    def __init__(self, ids: np.ndarray, block_size: int, train_share: float = 0.9) -> None:
        cut = int(len(ids) * train_share)
        self.train, self.val = ids[:cut], ids[cut:]
        self.block_size = block_size
        if len(self.train) <= block_size or len(self.val) < 2:
            raise ValueError(
                f"the text has {len(ids)} tokens: {len(self.train)} to train on and {len(self.val)} to validate on, but "
                f"block_size={block_size} needs more than {block_size} and at least 2; use a longer text or a smaller block"
            )

    def batch(self, seed: int, step: int, micro_step: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets (rows, block_size): windows that start anywhere, the targets one token further on."""
        u = random.uniform(random.Key(seed, "batch", step, micro_step), (rows,), np.dtype(np.float64))
        starts = (u * (len(self.train) - self.block_size)).astype(np.int64)
        windows = self.train[starts[:, None] + np.arange(self.block_size + 1)]
        return windows[:, :-1], windows[:, 1:]

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
