"""The same GPT in plain PyTorch: the judge of the model and of its training. Parameters bear the same names."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from minigpt.config import GPTConfig
from minigpt.model import GPT

torch.set_num_threads(1)  # on arrays this small, threads that wait for each other cost far more than they bring


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TorchGPT(nn.Module):
    """No dropout: no two libraries draw the same masks."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def ids(array: Any) -> torch.Tensor:
    """Token ids as PyTorch wants them."""
    return torch.from_numpy(np.asarray(array, np.int64))


def torch_copy(model: GPT) -> TorchGPT:
    """The PyTorch model with the weights of `model`, all of them, by name."""
    copy = TorchGPT(model.config).to(getattr(torch, next(model.parameters()).dtype.name))
    copy.load_state_dict({name: torch.from_numpy(array) for name, array in model.state_dict().items()}, strict=True)
    return copy


def scatter_weights(model: GPT, seed: int = 0, scale: float = 0.3) -> None:
    """Replace the initial weights by larger ones, biases and norms included, so that a wrong one cannot hide."""
    rng = np.random.default_rng(seed)
    for name, p in model.named_parameters():
        around = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
        p.data[...] = around + scale * rng.standard_normal(p.shape)
