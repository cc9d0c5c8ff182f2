"""Layers: parameters with their initial values and one op each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinytensor import ops
from tinytensor.nn import init
from tinytensor.nn.module import Module, Parameter
from tinytensor.tensor import Tensor


def _size(layer: str, name: str, n: int) -> int:
    if not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"{layer}: {name} must be a positive integer, got {n!r}")
    return int(n)


class Linear(Module):
    """y = x Wᵀ + b;  W (out_features, in_features), b (out_features,), x (…, in_features) → (…, out_features).

    W and b start uniform in ±1/√in_features, as in PyTorch.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype: Any = "float32") -> None:
        n, m = _size("Linear", "in_features", in_features), _size("Linear", "out_features", out_features)
        bound = 1 / math.sqrt(n)
        self.weight = Parameter(np.empty((m, n), dtype))
        init.uniform_(self.weight, -bound, bound)
        self.bias = Parameter(np.empty(m, dtype)) if bias else None
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Any) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bias={self.bias is not None}"


class Embedding(Module):
    """y = W[ids];  W (num_embeddings, embedding_dim) starts standard normal; integer ids (…) → (…, embedding_dim)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: Any = "float32") -> None:
        n, m = _size("Embedding", "num_embeddings", num_embeddings), _size("Embedding", "embedding_dim", embedding_dim)
        self.weight = Parameter(np.empty((n, m), dtype))
        init.normal_(self.weight)

    def forward(self, ids: Any) -> Tensor:
        return ops.embedding(self.weight, ids)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class LayerNorm(Module):
    """Rows of the last axis to mean 0 and variance 1, times weight (ones at first), plus bias (zeros at first)."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True, dtype: Any = "float32") -> None:
        self.weight = Parameter(np.ones(_size("LayerNorm", "dim", dim), dtype))
        self.bias = Parameter(np.zeros(dim, dtype)) if bias else None
        self.eps = eps

    def forward(self, x: Any) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"


class RMSNorm(Module):
    """x/√(mean x² + ε) over the last axis, times weight (ones at first)."""

    def __init__(self, dim: int, eps: float = 1e-6, dtype: Any = "float32") -> None:
        self.weight = Parameter(np.ones(_size("RMSNorm", "dim", dim), dtype))
        self.eps = eps

    def forward(self, x: Any) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Dropout(Module):
    """In training, each element 0 with probability p and the rest scaled by 1/(1−p); otherwise nothing."""

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"Dropout: p must be in [0, 1], got {p}")
        self.p = p

    def forward(self, x: Any) -> Tensor:
        return ops.dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"
