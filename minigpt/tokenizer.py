"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, Self

import numpy as np


class Tokenizer(Protocol):
    """What the model needs of a tokenizer; `to_dict` is what a checkpoint stores."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...


class CharTokenizer:
    """One token per character; ids follow the sorted order of the symbols."""

    def __init__(self, symbols: str) -> None:
        if not symbols or len(set(symbols)) != len(symbols):
            raise ValueError("a character tokenizer needs symbols, each once")
        self.symbols = symbols
        points = np.array([ord(c) for c in symbols])
        self._ids = np.full(points.max() + 1, -1, np.int32)  # code point → id
        self._ids[points] = np.arange(len(symbols))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The tokenizer of all characters in a text."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> np.ndarray:
        """int32 ids; ValueError naming the first character that the tokenizer never saw, and its position."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = self._ids[np.minimum(points, self._ids.size - 1)]
        unknown = np.flatnonzero((ids < 0) | (points >= self._ids.size))
        if unknown.size:
            c, place = text[unknown[0]], unknown[0]
            raise ValueError(
                f"character {c!r} (U+{ord(c):04X}) at position {place} is not in the model's vocabulary of "
                f"{self.vocab_size} symbols: {self.symbols!r}"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return "".join(self.symbols[i] for i in ids)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "char", "symbols": self.symbols}


class ByteTokenizer:
    """One token per byte of the UTF-8 text: 256 ids, and no text is foreign to it."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """int32 ids."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return bytes(map(int, ids)).decode("utf-8", "replace")  # bytes(array) would be the memory of an array

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "byte"}


def make_tokenizer(kind: str, text: str) -> Tokenizer:
    """A tokenizer of a kind ("char", "byte") for a text."""
    return CharTokenizer.from_text(text) if kind == "char" else from_dict({"kind": kind})


def from_dict(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described."""
    if state.get("kind") == "char":
        return CharTokenizer(state["symbols"])
    if state.get("kind") == "byte":
        return ByteTokenizer()
    raise ValueError(f"tokenizer kind {state.get('kind')!r} is not known; use 'char' or 'byte'")
