"""Text from a model, one token at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

import tinytensor as tt
from minigpt.model import GPT, KVCache
from minigpt.tokenizer import Tokenizer
from tinytensor import parallel, random

log = logging.getLogger(__name__)

Drawn = Callable[[np.ndarray, np.ndarray, int], object]
"""Is told of each token as it is drawn: the model's logits, the probabilities that it was drawn with, and its id."""


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token from its logits."""

    temperature: float = 0.8
    """divides the logits: below 1 safer, above 1 wilder, 0 always the likeliest token"""
    top_k: int | None = None
    """choose among the k likeliest tokens only"""
    top_p: float | None = None
    """choose among the fewest tokens that together have probability p"""
    repetition_penalty: float = 1.0
    """above 1: logits of tokens already in the context are divided by it if positive, multiplied if negative"""
    seed: int = 1337
    """the same seed, prompt and model give the same text"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise ValueError(f"temperature={self.temperature} must be finite and not negative")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 < self.repetition_penalty < np.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive")

    def probabilities(self, logits: np.ndarray, context: np.ndarray) -> np.ndarray:
        """Distribution of the next token, float64 (V,), from logits (V,) and the ids seen so far."""
        z = logits.astype(np.float64)
        if not np.isfinite(z.max()):
            raise ValueError("the model's logits are not finite: its training diverged; train again with a smaller lr")
        if self.repetition_penalty != 1:
            seen = np.unique(context)
            with np.errstate(over="ignore"):
                z[seen] = np.where(z[seen] > 0, z[seen] / self.repetition_penalty, z[seen] * self.repetition_penalty)
            if not np.isfinite(z.max()):
                raise ValueError(
                    f"repetition_penalty={self.repetition_penalty} takes logits beyond all numbers; choose one nearer to 1"
                )
        if self.temperature == 0:
            p = np.zeros_like(z)
            p[z.argmax()] = 1
            return p
        with np.errstate(over="ignore"):  # of a temperature next to 0
            z = (z - z.max()) / self.temperature
        order = np.argsort(-z, kind="stable")  # likeliest first
        p = np.exp(z[order])
        if self.top_k is not None:
            p[self.top_k :] = 0
        p /= p.sum()
        if self.top_p is not None:
            p[np.cumsum(p) - p >= self.top_p] = 0
            p /= p.sum()
        result = np.empty_like(p)
        result[order] = p
        return result


def generate(
    model: GPT,
    ids: np.ndarray,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    sample: int = 0,
    use_cache: bool = True,
    drawn: Drawn | None = None,
) -> Iterator[int]:
    """Yield up to max_tokens ids that continue the prompt `ids` (at least one), each chosen from the last block_size tokens.

    `sample` numbers the continuations of one seed. The cache changes nothing but the time: once the context is full, every
    position shifts with each token, and the window is computed afresh.
    """
    context = np.asarray(ids, np.int64).reshape(-1)
    if context.size == 0:
        raise ValueError("the prompt is empty; give at least one token")
    block = model.config.block_size
    p0 = next(model.parameters())
    cache = KVCache(model.config, 1, p0.dtype, p0.device) if use_cache else None
    fed = 0  # tokens of the context that the cache holds
    for position in range(max_tokens):
        if cache is not None and context.size > block:
            cache = None
        window = context[-block:] if cache is None else context[fed:]
        was_training = model.training  # restored before each yield: the caller may train between two tokens
        if was_training:
            model.eval()
        one = parallel.one_blas_thread() if window.size == 1 else nullcontext()  # more wait for each other
        with tt.no_grad(), one:
            logits = model.head(model.features(window[None], cache)[:, -1]).numpy()[0]
        if was_training:
            model.train()
        fed = context.size
        u = random.uniform(random.Key(sampling.seed, "sample", step=sample, micro_step=position), (), np.dtype(np.float64))
        p = sampling.probabilities(logits, context)
        cumulative = np.cumsum(p)
        token = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
        if drawn is not None:
            drawn(logits, p, token)
        context = np.append(context, token)
        yield token


def speak(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    num_samples: int,
    sampling: Sampling,
    drawn: Drawn | None = None,
) -> Iterator[str]:
    """Yield the prompt and its continuations piece by piece, ready to print. A continuation stops at an end-of-text token."""
    if max_tokens < 0:
        raise ValueError(f"max_tokens={max_tokens} must not be negative")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character")
    ids = tokenizer.encode(prompt)
    if len(ids) > (block := model.config.block_size):
        log.warning("warning: the prompt has %d tokens; the model sees the last %d", len(ids), block)
    for sample in range(num_samples):
        yield prompt
        tokens = generate(model, ids, max_tokens, sampling, sample, drawn=drawn)
        yield from decoded(tokenizer, tokens)
        yield "\n" + ("---\n" if sample + 1 < num_samples else "")


def decoded(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, up to the one that ends a text, in pieces as they come."""
    waiting: list[int] = []
    for token in tokens:
        if token == tokenizer.end_of_text:
            break
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd"):  # else bytes of an unfinished character wait for the rest
            yield text
            waiting = []
    if waiting:
        yield tokenizer.decode(waiting)


def opening(tokenizer: Tokenizer) -> str:
    """ "ROMEO:", or where the tokenizer cannot encode that, one of its tokens: a letter or a digit if it has one."""
    try:
        tokenizer.encode("ROMEO:")
    except ValueError:
        tokens = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        return max(tokens, key=lambda text: (text.isalnum(), text.isprintable() and not text.startswith("-")))
    return "ROMEO:"
