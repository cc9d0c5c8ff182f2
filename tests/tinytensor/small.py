"""What these tests share: leaves, what is close, a small GPT and its loss."""

import sys
from typing import Any

import numpy as np
import torch

import tinytensor as tt
from minigpt.config import GPTConfig
from minigpt.model import GPT


def leaf(values: Any, dtype: str = "float64") -> tt.Tensor:
    return tt.tensor(values, dtype, requires_grad=True)


def close(a: Any, b: Any, rtol: float = 1e-12) -> None:
    a, b = (x.detach().numpy() if isinstance(x, (tt.Tensor, torch.Tensor)) else np.asarray(x) for x in (a, b))
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol, 1e-14)


def line() -> int:
    """The caller's line."""
    return sys._getframe(1).f_lineno


def gpt(**changes: Any) -> GPT:
    settings = {"vocab_size": 11, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.2, **changes}
    return GPT(GPTConfig(**settings))


def loss_of(model: GPT) -> tt.Tensor:
    ids = np.random.default_rng(0).integers(0, 11, (3, 17))
    return model(ids[:, :-1], ids[:, 1:])[1]
