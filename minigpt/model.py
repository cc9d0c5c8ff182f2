"""GPT: the decoder of "Attention is all you need" as GPT-2 arranged it (Radford et al. 2019).

ids ─ wte + wpe ─ dropout ─┬──── ln_1 ─ attn ────┬────── ln_2 ─ mlp ─────┬─ … ─ ln_f ─ wteᵀ ─ logits
                           └───────────────────(+)└────────────────────(+)└ n_layer times
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

import tinytensor as tt
from minigpt import gpt2
from minigpt.config import GPTConfig
from tinytensor import Tensor, nn


class KVCache:
    """Keys and values of the positions seen so far, so that a new token costs one position of work, not all of them.

    It holds bare arrays, through which no gradient flows: for use under no_grad.
    """

    def __init__(self, config: GPTConfig, rows: int, dtype: Any = "float32", device: str = "cpu") -> None:
        head = config.n_embd // config.n_head
        shape = (config.n_layer, 2, rows, config.n_head, config.block_size, head)
        self.memory = tt.zeros(shape, dtype=dtype, device=device).data
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store this layer's new keys and values (B, n_head, T, d); return all so far."""
        keys, values = self.memory[layer]
        end = self.length + k.shape[2]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k.data, v.data
        return Tensor(keys[:, :, :end]), Tensor(values[:, :, :end])


class CausalSelfAttention(nn.Module):
    """Every position reads from those before it: n_head attentions side by side, then mixed by c_proj."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout, self.n_head, self.layer = config.dropout, config.n_head, layer

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.reshape(B, T, self.n_head, C // self.n_head).swapaxes(1, 2)  # (B, T, C) → (B, n_head, T, C/n_head)
            for part in self.c_attn(x).split(C, axis=-1)
        )
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = tt.causal_attention(q, k, v, self.dropout, self.training)
        return self.c_proj(y.swapaxes(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Every position thinks for itself: C → 4C → gelu → C."""

    def __init__(self, config: GPTConfig) -> None:
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x).gelu())


class Block(nn.Module):
    """Pre-norm: each branch reads a normalised stream and adds what it found."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = tt.dropout_add(self.attn(self.ln_1(x), cache), x, self.dropout, self.training)
        return tt.dropout_add(self.mlp(self.ln_2(x)), x, self.dropout, self.training)


class GPT(nn.Module):
    """A language model: logits for the next token at every position, and their loss when targets are given."""

    def __init__(self, config: GPTConfig) -> None:
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head: the weights are tied
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.init_weights()

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: Mapping[str, np.ndarray]) -> Self:
        """The model whose weights are these arrays, by name (see `load_state_dict`); no others are drawn for it first."""
        with nn.init.skip():
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        return model

    @classmethod
    def from_pretrained(cls, source: str | Path, dropout: float = 0.0) -> Self:
        """The model of a Hugging Face folder, or of a repository of the hub ("gpt2"); `gpt2.load` says what it may be."""
        found = gpt2.load(source, dropout)
        return cls.from_weights(found.config, found.weights)

    def init_weights(self) -> None:
        """GPT-2's: N(0, 0.02²), 0 for biases, and residual projections smaller by 1/√(2·n_layer), the number of additions."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim >= 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02)

    def forward(self, idx: Any, targets: Any = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, vocab_size) for integer ids (B, T), and with targets (B, T) the mean cross-entropy in nats."""
        logits = self.head(self.features(idx))
        return logits, None if targets is None else tt.cross_entropy(logits, targets)

    def features(self, idx: Any, cache: KVCache | None = None) -> Tensor:
        """The stream after the last norm, (B, T) → (B, T, n_embd). With a cache, idx continues what the cache holds."""
        idx = tt.as_tensor(idx)
        past = 0 if cache is None else cache.length
        if idx.ndim != 2:
            raise ValueError(f"idx must have shape (B, T), got {idx.shape}; use idx[None] for one sequence")
        T = idx.shape[1]
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} positions do not fit block_size={self.config.block_size}; crop the context")
        x = self.drop(self.wte(idx) + self.wpe.weight[past : past + T])  # (B, T, C)
        recompute = self.config.checkpoint_activations and self.training and cache is None
        for block in self.h:
            x = tt.checkpoint(block, x) if recompute else block(x, cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def head(self, x: Tensor) -> Tensor:
        """Logits of features, through the token embedding: (…, n_embd) → (…, vocab_size)."""
        return tt.linear(x, self.wte.weight)

    def for_sampling(self) -> GPT:
        """Itself in evaluation mode, its matrices stored by columns: a product with one row reads them 1.5× as fast."""
        for p in self.parameters():
            p.data = tt.backend.xp_of(p.data).asfortranarray(p.data)
        return self.eval()

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For the optimiser: weight decay on matrices, none on vectors."""
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        rest = [p for p in self.parameters() if p.ndim < 2]
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
