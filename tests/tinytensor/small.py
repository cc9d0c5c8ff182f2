"""What the tests of `inspect` share: a small GPT and its loss."""

from typing import Any

import numpy as np

import tinytensor as tt
from minigpt.config import GPTConfig
from minigpt.model import GPT


def gpt(**changes: Any) -> GPT:
    settings = {"vocab_size": 11, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.2, **changes}
    return GPT(GPTConfig(**settings))


def loss_of(model: GPT) -> tt.Tensor:
    ids = np.random.default_rng(0).integers(0, 11, (3, 17))
    return model(ids[:, :-1], ids[:, 1:])[1]
