"""What a model is and how a run goes: frozen dataclasses, validated when they are made, and the presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

SourceName = Literal["tiny", "complete"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_whole(config: Any, **least: int) -> None:
    for name, low in least.items():
        value = getattr(config, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        _require(whole and value >= low, f"{name}={value!r} must be a whole number of at least {low}")
        _require(value < 2**63, f"{name}={value!r} must be below 2^63")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT."""

    vocab_size: int
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0
    bias: bool = True
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        _check_whole(self, vocab_size=1, block_size=1, n_layer=1, n_head=1, n_embd=1)
        if self.n_embd % self.n_head:
            below = self.n_embd - self.n_embd % self.n_head
            options = [str(n) for n in (below, below + self.n_head) if n > 0]
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; use {' or '.join(options)}")
        _require(0 <= self.dropout < 1, f"dropout={self.dropout} must be at least 0 and below 1")
        _require(
            self.parameter_count() < 10**11,
            f"n_layer={self.n_layer}, n_embd={self.n_embd} make {self.parameter_count():.2g} parameters; use smaller sizes",
        )

    def parameter_count(self) -> int:
        """Trainable numbers: 12·L·C² + (V + T)·C for the matrices, and the vectors; the tied head counts once."""
        C, b = self.n_embd, int(self.bias)
        block = 12 * C * C + b * 9 * C + (1 + b) * 2 * C
        return self.n_layer * block + (self.vocab_size + self.block_size) * C + (1 + b) * C

    def flops_per_token(self) -> int:
        """Multiplications and additions to train on one token: 6 per matrix parameter (2 forward, 4 backward), and
        12·L·C·T/2 for attention, of which the causal mask leaves half. (Chowdhery et al., "PaLM", 2022, appendix B.)"""
        matrices = 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd
        return 6 * matrices + 6 * self.n_layer * self.n_embd * self.block_size


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are the preset `shakespeare`."""

    preset: str = "shakespeare"
    """name of these settings, for folders and titles"""
    out_dir: Path | None = None
    """folder of the run; by default runs/PRESET, or the next free runs/PRESET-2, -3, …"""
    data: Path | None = None
    """a UTF-8 text file, also .gz, or a folder that `minigpt prepare` made; by default Tiny Shakespeare, fetched into data/"""
    source: SourceName = "tiny"
    """which Shakespeare to fetch: tiny (1.1 MB) or complete (all the plays, 4.7 MB)"""
    tokenizer: str | None = None
    """char, byte, bpe (trained on the text), or the name of a model (gpt2); by default that of data or init_from, or char"""
    vocab_size: int | None = None
    """tokens of a bpe tokenizer, by default 1,024"""
    val_share: float = 0.1
    """share of the text, its end, that is kept for validation"""
    init_from: str | None = None
    """weights to begin with, and their shape: GPT-2's, from a folder or the Hugging Face hub (gpt2), or those of a run"""

    n_layer: int = 6
    """transformer blocks"""
    n_head: int = 6
    """attention heads per block; divides n_embd"""
    n_embd: int = 384
    """width of the residual stream"""
    block_size: int = 256
    """context length, in tokens"""
    dropout: float = 0.2
    """probability with which embeddings, attention weights and residual branches are zeroed in training"""
    bias: bool = False
    """biases in Linear and LayerNorm layers, as in GPT-2"""

    max_steps: int = 2000
    """optimiser steps"""
    micro_batch: int = 64
    """sequences per forward and backward pass"""
    accumulation: int = 4
    """passes per optimiser step; their gradients are averaged, as in one batch of micro_batch × accumulation sequences"""
    lr: float = 3e-4
    """peak learning rate"""
    min_lr: float = 3e-5
    """learning rate at the end of the cosine"""
    warmup_steps: int = 100
    """steps of linear warmup to lr"""
    beta1: float = 0.9
    """AdamW: decay of the gradient's running mean"""
    beta2: float = 0.99
    """AdamW: decay of the squared gradient's running mean"""
    weight_decay: float = 0.1
    """AdamW: decay of matrices, times the learning rate, per step"""
    grad_clip: float = 1.0
    """largest gradient norm; longer gradients are scaled down to it"""

    eval_interval: int = 100
    """steps between evaluations on the whole validation split, each with a checkpoint and a sample"""
    save_interval: int | None = None
    """steps between checkpoints, besides those at evaluations"""
    max_skipped: int = 10
    """updates in a row that may be skipped for a loss or gradient that is not finite, before the run stops"""
    sample_tokens: int = 300
    """tokens of verse to print at each evaluation (0 for none)"""
    seed: int = 1337
    """weights, batches and dropout are functions of it"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the arrays live"""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """how exactly a GPU multiplies matrices; weights, sums and the residual stream are float32 in any case"""
    cuda_graph: bool = True
    """replay each micro-step on a GPU as one CUDA graph; the same bits without"""
    threads: int | None = None
    """cores to use; by default TINYTENSOR_NUM_THREADS, or all that this process may run on"""
    shards: int | None = None
    """parts of a micro-batch, a thread each; dropout and rounding depend on them. By default 1 per 1,024 tokens, at least 2"""
    rank_timeout: int = 600
    """seconds without a step after which a job of several processes ends, because one of them hangs"""
    checkpoint_activations: bool = False
    """keep only the inputs of transformer blocks for backward, which runs them again: less memory, the same bits"""
    profile: int | None = None
    """steps to profile, after the first two: a table, a timeline and a roofline of every op are put into the run's folder"""
    wandb: bool = True
    """mirror the run to Weights & Biases, where that is installed and logged in"""
    resume: bool = False
    """go on from the last checkpoint of out_dir, or of the preset's newest run, with its settings but for flags given here"""
    prove_resume: bool = False
    """instead of training: kill and resume a small run, and compare it bit for bit with one that was left alone"""

    def __post_init__(self) -> None:
        _check_whole(self, max_steps=1, micro_batch=1, accumulation=1, eval_interval=1, sample_tokens=0, seed=0, warmup_steps=0)
        _check_whole(self, max_skipped=1, rank_timeout=1)
        for name, low, high in (
            ("lr", 0, 1e35),  # times a parameter's largest update, still a float32
            ("min_lr", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("beta1", 0, 1),
            ("beta2", 0, 1),
        ):
            value = getattr(self, name)
            _require(low <= value < high, f"{name}={value} must be at least {low} and below {high}")
        _require(0 < self.val_share < 1, f"val_share={self.val_share} must be above 0 and below 1")
        _require(self.grad_clip > 0, f"grad_clip={self.grad_clip} must be positive; use inf for no clipping")
        _require(self.min_lr <= self.lr, f"min_lr={self.min_lr} must not be above lr={self.lr}")
        optional = ("threads", "shards", "save_interval", "profile", "vocab_size")
        _check_whole(self, **{name: 1 for name in optional if getattr(self, name) is not None})
        self.model(vocab_size=1)
        _require(
            self.precision == "fp32" or self.device == "cuda",
            f"precision={self.precision!r} needs device='cuda'; the CPU computes in fp32",
        )
        _require(
            self.profile is None or self.device == "cpu",
            f"profile={self.profile} needs device='cpu'; on a GPU only launches could be timed from here",
        )
        _require(
            self.tokens_per_step < 10**10,
            f"micro_batch={self.micro_batch}, accumulation={self.accumulation} and block_size={self.block_size} make "
            f"{self.tokens_per_step:.2g} tokens a step; use smaller ones",
        )

    def model(self, vocab_size: int) -> GPTConfig:
        """The model of this run for a vocabulary."""
        shared = {f.name for f in fields(GPTConfig)} & {f.name for f in fields(self)} - {"vocab_size"}
        return GPTConfig(vocab_size, **{name: getattr(self, name) for name in sorted(shared)})

    def resolved_shards(self) -> int:
        """`shards`, or by default a power of two: one for 1,024 tokens or so, at least two, at most micro_batch; 1 on a GPU."""
        if self.shards is not None:
            return min(self.shards, self.micro_batch)
        if self.device == "cuda":
            return 1
        wanted = max(2, self.micro_batch * self.block_size / 1024)
        return 2 ** math.floor(math.log2(min(wanted, self.micro_batch)))

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batch * self.accumulation * self.block_size

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of to_dict; unknown fields are a ValueError that names them."""
        unknown = set(values) - {f.name for f in fields(cls)}
        _require(not unknown, f"the configuration has unknown fields {sorted(unknown)}")
        paths = {k: Path(values[k]) for k in ("out_dir", "data") if values.get(k) is not None}
        return cls(**{**values, **paths})


PRESETS: dict[str, TrainConfig] = {
    "quick": TrainConfig(  # 0.4M parameters: in a minute, two layers that saw more text beat four that saw less
        preset="quick",
        n_layer=2,
        n_head=4,
        n_embd=128,
        block_size=64,
        dropout=0.0,
        micro_batch=12,
        accumulation=1,
        max_steps=1300,
        lr=4e-3,
        min_lr=1e-4,
        eval_interval=325,
    ),
    "shakespeare": TrainConfig(),
    "nanogpt-char": TrainConfig(preset="nanogpt-char", accumulation=1, max_steps=5000, lr=1e-3, min_lr=1e-4, eval_interval=250),
    "nanogpt-cpu": TrainConfig(
        preset="nanogpt-cpu",
        n_layer=4,
        n_head=4,
        n_embd=128,
        block_size=64,
        dropout=0.0,
        micro_batch=12,
        accumulation=1,
        max_steps=2000,
        lr=1e-3,
        min_lr=1e-4,
        eval_interval=250,
    ),
}
