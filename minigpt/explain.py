"""A page that shows, for a prompt and its continuation, what else each token could have been, and what every head read."""

from __future__ import annotations

import base64
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tinytensor as tt
from minigpt.config import GPTConfig
from minigpt.model import GPT
from minigpt.sampling import Sampling
from minigpt.tokenizer import Tokenizer
from tinytensor.inspect.page import write_page
from tinytensor.state import Observer

CANDIDATES = 10  # shown at each place


class Attention(Observer):
    """Keeps the weights of every causal attention of one sequence that runs while it looks on: arrays (n_head, T, S)."""

    def __init__(self) -> None:
        self.layers: list[np.ndarray] = []

    def forward(self, op: Any, inputs: tuple[Any, ...], params: dict[str, Any], run: Callable[[], Any]) -> Any:
        if op.name == "causal_attention":
            self.layers.append(attention(*(x.numpy()[0].astype(np.float64) for x in inputs[:2])))
        return run()


def attention(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """softmax(q kᵀ/√d), where the key is not after the query: (…, T, d), (…, S, d) → (…, T, S)."""
    (T, d), S = q.shape[-2:], k.shape[-2]
    scores = np.where(np.tri(T, S, S - T, dtype=bool), q @ k.swapaxes(-1, -2) / math.sqrt(d), -np.inf)
    a = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return a / a.sum(axis=-1, keepdims=True)


class Explanation:
    """What a page shows of one continuation. `drawn` follows it while it is drawn; then `write` makes the page."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, prompt: str, sampling: Sampling, title: str = "") -> None:
        self.model, self.tokenizer, self.prompt, self.sampling, self.title = model, tokenizer, prompt, sampling, title
        self.tokens: list[int] = []
        self.places: deque[dict[str, Any]] = deque(maxlen=model.config.block_size)

    def drawn(self, logits: np.ndarray, p: np.ndarray, token: int) -> None:
        self.tokens.append(token)
        self.places.append(_place(logits, p, token))

    def write(self, path: Path) -> Path:
        """Write the page; OSError says why it cannot."""
        return write_page(path, "Attention and predictions", "explain", self.data(), Path(__file__).parent)

    def data(self) -> dict[str, Any]:
        """The page's facts, of the last block_size tokens. For T tokens there are T + 1 places: the last is that of the token
        to come. At place t stands token t; row t − 1 of a head's weights is what it read to predict it.
        """
        model, decode = self.model, self.tokenizer.decode
        context = np.append(self.tokenizer.encode(self.prompt), np.array(self.tokens, np.int64))
        window = context[-model.config.block_size :]
        watch = Attention()
        with tt.no_grad(), watch:
            logits = model.head(model.features(window[None])).numpy()[0]
        given = max(0, len(window) - len(self.tokens))  # of the window, part of the prompt
        before = [_place(logits[t - 1], _softmax(logits[t - 1]), int(window[t])) if t else None for t in range(given)]
        after = _place(logits[-1], self.sampling.probabilities(logits[-1], context))
        weights = np.stack(watch.layers)[..., *np.tril_indices(len(window))]  # (n_layer, n_head, T(T+1)/2), row by row
        roots = np.rint(255 * np.sqrt(weights)).astype(np.uint8)  # finer for small weights than the weights would be
        return {
            "about": [
                self.title,
                _size(model.config),
                f"drawn with {(sampling := _words(self.sampling))}, seed {self.sampling.seed}",
            ],
            "sampling": sampling,
            "symbols": [_symbol(i, decode([i])) for i in range(self.tokenizer.vocab_size)],
            "tokens": window.tolist(),
            "given": given,
            "left_out": len(context) - len(window),
            "places": [*before, *self.places, after],
            "layers": weights.shape[0],
            "heads": weights.shape[1],
            "roots": base64.b64encode(roots.tobytes()).decode(),
        }


def _place(logits: np.ndarray, p: np.ndarray, token: int | None = None) -> dict[str, Any]:
    """One place: its candidates [id, probability it was drawn with, the model's own], likeliest first, with the token that
    stands there among them; how many could be drawn; its rank, and the bits of surprise that it is to the model itself.
    """
    own = _softmax(logits)
    order = np.lexsort((-own, -p))
    row = [[int(i), _digits(p[i]), _digits(own[i])] for i in order[:CANDIDATES]]
    facts: dict[str, Any] = {"candidates": row, "open": int((p > 0).sum())}
    if token is not None:
        facts["rank"] = int(np.flatnonzero(order == token)[0]) + 1
        if facts["rank"] > CANDIDATES:
            row[-1] = [token, _digits(p[token]), _digits(own[token])]
        z = logits.astype(np.float64)
        facts["bits"] = _digits((np.log(np.exp(z - z.max()).sum()) + z.max() - z[token]) / math.log(2))
    return facts


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()


def _digits(x: float) -> float:
    return float(f"{x:.4g}")


def _symbol(i: int, text: str) -> str:
    """A token as text; a control character as ‹07›, and bytes that are no character on their own as the token's number."""
    if "\ufffd" in text:
        return f"‹{i:02X}›"
    return "".join(c if c.isprintable() or c in "\n\r\t" else f"‹{ord(c):02X}›" for c in text)


def _size(config: GPTConfig) -> str:
    size = f"{_count(config.n_layer, 'layer')} of {_count(config.n_head, 'head')}, width {config.n_embd}"
    return f"{size}, context of {_count(config.block_size, 'token')}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _words(how: Sampling) -> str:
    words = [f"temperature {how.temperature:g}"]
    words += [f"top-k {how.top_k}"] if how.top_k is not None else []
    words += [f"top-p {how.top_p:g}"] if how.top_p is not None else []
    words += [f"repetition penalty {how.repetition_penalty:g}"] if how.repetition_penalty != 1 else []
    return ", ".join(words)
