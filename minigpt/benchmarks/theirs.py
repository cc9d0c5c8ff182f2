"""The contenders: PyTorch for everything; MyGrad and HIPS autograd for small ops; JAX for the training step, when installed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def batch(model: dict[str, Any], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The same random tokens for every contender."""
    tokens = np.random.default_rng(0).integers(0, model["vocab_size"], (rows, model["block_size"] + 1))
    return tokens[:, :-1], tokens[:, 1:]


def _torch() -> Any:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    return torch


def _torch_gpt(config: dict[str, Any]) -> Any:
    """A plain GPT of torch.nn parts with fused attention, as a PyTorch user would write it."""
    torch = _torch()
    from torch import nn
    from torch.nn import functional as F

    n_embd, n_head, p, bias = config["n_embd"], config["n_head"], config["dropout"], config["bias"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(n_embd, bias=bias), nn.LayerNorm(n_embd, bias=bias)
            self.c_attn, self.attn_proj = nn.Linear(n_embd, 3 * n_embd, bias=bias), nn.Linear(n_embd, n_embd, bias=bias)
            self.c_fc, self.mlp_proj = nn.Linear(n_embd, 4 * n_embd, bias=bias), nn.Linear(4 * n_embd, n_embd, bias=bias)
            self.drop = nn.Dropout(p)

        def forward(self, x: Any, cache: list[Any] | None = None) -> Any:
            B, T, C = x.shape
            q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(C, dim=2))
            if cache is not None:
                if cache:
                    k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
                cache[:] = [k, v]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=p if self.training else 0.0)
            x = x + self.drop(self.attn_proj(y.transpose(1, 2).reshape(B, T, C)))
            return x + self.drop(self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")))

    class TorchGPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(config["vocab_size"], n_embd), nn.Embedding(config["block_size"], n_embd)
            self.drop, self.ln_f = nn.Dropout(p), nn.LayerNorm(n_embd, bias=bias)
            self.h = nn.ModuleList(Block() for _ in range(config["n_layer"]))

        def forward(self, idx: Any, targets: Any = None, caches: list[list[Any]] | None = None, past: int = 0) -> Any:
            x = self.drop(self.wte(idx) + self.wpe.weight[past : past + idx.shape[1]])
            for i, block in enumerate(self.h):
                x = block(x, None if caches is None else caches[i])
            logits = self.ln_f(x) @ self.wte.weight.T
            return logits if targets is None else F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    return torch, TorchGPT()


class TorchStep:
    """A micro-step, forward and backward, and the optimiser's step after it: clipping and fused AdamW.

    Attention is what PyTorch chooses for the inputs; "bf16" is autocast, "tf32" and "fp32" say how float32 is multiplied.
    """

    def __init__(self, model: dict[str, Any], rows: int, precision: str, compiled: bool = False, device: str = "cuda") -> None:
        self.torch, gpt = _torch_gpt(model)
        torch = self.torch
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"PyTorch {torch.__version__} finds no GPU")
        self.gpt, self.precision, self.device = gpt.to(device), precision, device
        for p in gpt.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.02)  # as GPT-2; PyTorch's own gives logits of hundreds
        self.optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True)
        self.forward = torch.compile(gpt, dynamic=False) if compiled else gpt
        self.x, self.y = (torch.from_numpy(a.copy()).to(device) for a in batch(model, rows))

    def micro_step(self) -> Any:
        """The gradient of the batch, made anew; the loss, not waited for."""
        torch = self.torch
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.forward(self.x, self.y)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        """Clip and AdamW."""
        self.torch.nn.utils.clip_grad_norm_(self.gpt.parameters(), 1.0)
        self.optimizer.step()

    def pool(self) -> int:
        """Bytes that PyTorch's allocator has taken from the device at most since it was last told to forget."""
        return self.torch.cuda.max_memory_reserved() if self.device == "cuda" else 0


def torch_step(model: dict[str, Any], rows: int, compiled: bool = False, bf16: bool = False) -> Callable[[], None]:
    """One training step on the CPU: forward, backward, clip, fused AdamW."""
    step = TorchStep(model, rows, "bf16" if bf16 else "fp32", compiled, "cpu")

    def run() -> None:
        step.micro_step()
        step.update()

    return run


def torch_write(model: dict[str, Any], tokens: int, cached: bool) -> Callable[[], None]:
    """Generate tokens from a one-token prompt, with a KV cache or computing the whole context for each."""
    torch, gpt = _torch_gpt(model)
    gpt.eval()

    @torch.inference_mode()
    def run() -> None:
        idx = torch.zeros((1, 1), dtype=torch.long)
        caches: list[list[Any]] = [[] for _ in range(model["n_layer"])]
        for i in range(tokens):
            logits = gpt(idx[:, -1:], caches=caches, past=i) if cached else gpt(idx[:, -model["block_size"] :])
            token = torch.multinomial(torch.softmax(logits[:, -1], dim=-1), 1)
            idx = torch.cat([idx, token], dim=1)

    return run


def chain(x: Any, y: Any, n: int) -> Callable[[], float]:
    """Seconds per op in z ← z·y + x, n times, summed and differentiated: any library whose tensors have operators."""

    def run() -> float:
        start = time.perf_counter()
        for _ in range(20):
            z = x
            for _ in range(n):
                z = z * y + x
            z.sum().backward()
        return (time.perf_counter() - start) / (20 * (2 * n + 1))

    return run


def torch_small_ops(n: int = 50) -> Callable[[], float]:
    """Seconds per op, forward and backward, in a chain of adds and products of four-element tensors."""
    torch = _torch()
    return chain(torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True), n)


def mygrad_small_ops(n: int = 50) -> Callable[[], float]:
    """As torch_small_ops."""
    import mygrad

    return chain(mygrad.tensor(np.ones(4, "f")), mygrad.tensor(np.ones(4, "f")), n)


def autograd_small_ops(n: int = 50) -> Callable[[], float]:
    """As torch_small_ops; HIPS autograd differentiates functions, so the chain is one."""
    import autograd

    def chain(xy: Any) -> Any:
        x, y = xy
        z = x
        for _ in range(n):
            z = z * y + x
        return (z * np.ones(4, "f")).sum()

    gradient = autograd.grad(chain)
    xy = (np.ones(4, "f"), np.ones(4, "f"))

    def run() -> float:
        start = time.perf_counter()
        for _ in range(20):
            gradient(xy)
        return (time.perf_counter() - start) / (20 * (2 * n + 2))

    return run


def jax_step(model: dict[str, Any], rows: int) -> Callable[[], None]:
    """One jitted training step in JAX, dropout included, with hand-written AdamW."""
    import jax
    import jax.numpy as jnp

    L, H, C, p = model["n_layer"], model["n_head"], model["n_embd"], model["dropout"]
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * 0.02)

    params: dict[str, Any] = {"wte": matrix(model["vocab_size"], C), "wpe": matrix(model["block_size"], C), "ln_f": jnp.ones(C)}
    for i in range(L):
        params[f"h{i}"] = {
            "ln_1": jnp.ones(C),
            "ln_2": jnp.ones(C),
            "c_attn": matrix(C, 3 * C),
            "attn_proj": matrix(C, C),
            "c_fc": matrix(C, 4 * C),
            "mlp_proj": matrix(4 * C, C),
        }

    def norm(x: Any, weight: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * weight

    def drop(x: Any, key: Any) -> Any:
        return x if p == 0 else jnp.where(jax.random.bernoulli(key, 1 - p, x.shape), x / (1 - p), 0)

    def loss(params: Any, x: Any, y: Any, key: Any) -> Any:
        keys = iter(jax.random.split(key, 3 * L + 1))
        B, T = x.shape
        h = drop(params["wte"][x] + params["wpe"][:T], next(keys))
        past = jnp.tril(jnp.ones((T, T), bool))
        for i in range(L):
            w = params[f"h{i}"]
            q, k, v = (
                t.reshape(B, T, H, C // H).swapaxes(1, 2) for t in jnp.split(norm(h, w["ln_1"]) @ w["c_attn"], 3, axis=-1)
            )
            a = jax.nn.softmax(jnp.where(past, q @ k.swapaxes(2, 3) / np.sqrt(C // H), -jnp.inf))
            out = (drop(a, next(keys)) @ v).swapaxes(1, 2).reshape(B, T, C)
            h = h + drop(out @ w["attn_proj"], next(keys))
            h = h + drop(jax.nn.gelu(norm(h, w["ln_2"]) @ w["c_fc"]) @ w["mlp_proj"], next(keys))
        logits = norm(h, params["ln_f"]) @ params["wte"].T
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], -1).mean()

    @jax.jit
    def update(state: Any, x: Any, y: Any, t: Any) -> Any:
        params, m, v = state
        g = jax.grad(loss)(params, x, y, jax.random.key(t))
        total = jnp.sqrt(sum(jnp.sum(a * a) for a in jax.tree.leaves(g)))
        g = jax.tree.map(lambda a: a * jnp.minimum(1.0, 1.0 / (total + 1e-6)), g)
        m = jax.tree.map(lambda m, a: 0.9 * m + 0.1 * a, m, g)
        v = jax.tree.map(lambda v, a: 0.99 * v + 0.01 * a * a, v, g)
        scale = jnp.sqrt(1 - 0.99**t) / (1 - 0.9**t)
        params = jax.tree.map(lambda p, m, v: p * (1 - 1e-5) - 1e-4 * scale * m / (jnp.sqrt(v) + 1e-8), params, m, v)
        return params, m, v

    zeros = jax.tree.map(jnp.zeros_like, params)
    x, y = batch(model, rows)
    state, count = (params, zeros, zeros), 0

    def run() -> None:
        nonlocal state, count
        count += 1
        state = update(state, x, y, count)
        jax.block_until_ready(state)

    return run
