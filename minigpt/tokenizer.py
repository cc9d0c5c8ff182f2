"""Text to token ids and back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from minigpt import hub
from minigpt.program import missing
from minigpt.texts import parts

END_OF_TEXT = "<|endoftext|>"  # GPT-2's name of the token that parts documents
KINDS = ("char", "byte", "bpe")
BPE_VOCAB_SIZE = 1024
_CUTS = ("ByteLevel", "Digits", "Punctuation", "Split")  # steps that part a text into words, and may keep all of it
_FAR = (*range(0x800, 0xD000, 0x1000), 0xD000, 0xE000, 0xF000, *range(0x10000, 0x100000, 0x40000), 0x100000)
_PROBE = f"A  b\n\n{''.join(map(chr, (*range(0x800), *_FAR)))} A  "  # has every byte of UTF-8
_PART, _GROUP = 1 << 16, 64  # characters that one core encodes at a time, and parts that wait in memory


class Tokenizer(Protocol):
    """What the model needs of a tokenizer; `to_dict` is what a checkpoint stores."""

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text(self) -> int | None: ...  # the id that parts documents, where there is one
    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...
    def to_json(self) -> str: ...  # the text of a tokenizer.json, in which the package `tokenizers` finds the same ids


class CharTokenizer:
    """One token per character; ids follow the sorted order of the symbols."""

    kind, end_of_text = "char", None

    def __init__(self, symbols: str) -> None:
        if not symbols or len(set(symbols)) != len(symbols):
            raise ValueError("a character tokenizer needs symbols, each once")
        self.symbols = symbols
        points = np.array([ord(c) for c in symbols])
        self._ids = np.full(points.max() + 1, -1, np.int32)  # code point → id
        self._ids[points] = np.arange(len(symbols))

    @classmethod
    def from_text(cls, text: Iterable[str]) -> Self:
        """The tokenizer of all characters in a text, or in pieces of texts."""
        symbols = "".join(sorted(set(chain.from_iterable(text))))
        if not symbols:
            raise ValueError("the text is empty; name one with characters in it")
        return cls(symbols)

    @classmethod
    def from_json(cls, tokenizer_json: str) -> Self | None:
        """The tokenizer whose `to_json` this is, also after transformers has saved it; None where it is none's."""
        with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
            state = json.loads(tokenizer_json)
            vocab = state["model"]["vocab"]
            found = cls("".join(sorted(vocab, key=vocab.get)))
            own = json.loads(found.to_json())
            if all(state[step] == own[step] for step in ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")):
                return found
        return None

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
        return {"kind": self.kind, "symbols": self.symbols}

    def to_json(self) -> str:
        """The text of tokenizer.json: words of one character each, of which an unknown one is an error."""
        one = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        vocab = {c: i for i, c in enumerate(self.symbols)}
        return _tokenizer_json(one, {"type": "WordLevel", "vocab": vocab, "unk_token": ""}, {"type": "Fuse"})


class ByteTokenizer:
    """One token per byte of the UTF-8 text: 256 ids, and no text is foreign to it."""

    kind, vocab_size, end_of_text = "byte", 256, None

    def encode(self, text: str) -> np.ndarray:
        """int32 ids."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return bytes(map(int, ids)).decode("utf-8", "replace")  # bytes(array) would be the memory of an array

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def to_json(self) -> str:
        """The text of tokenizer.json: byte-pair encoding that joins no pairs."""
        on_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocab = {c: b for b, c in enumerate(_byte_symbols())}
        return _tokenizer_json(on_bytes, {"type": "BPE", "vocab": vocab, "merges": []}, on_bytes)


class BPETokenizer:
    """One token per frequent piece of a word, put together from bytes pair by pair, so no text is foreign to it. The work is
    done by the package `tokenizers`; all of a tokenizer is in one JSON text, the `tokenizer.json` of Hugging Face's models.

    (Sennrich et al., "Neural machine translation of rare words with subword units", 2016; on bytes: Radford et al. 2019.)
    """

    kind = "bpe"

    def __init__(self, tokenizer_json: str) -> None:
        package = _tokenizers()
        try:
            state = json.loads(tokenizer_json)
            state["model"]["dropout"] = None  # the same text is to have the same tokens,
            state["truncation"] = state["padding"] = None  # all of them and no others
            whole = _reads_all(state)
            self._bpe: Any = package.Tokenizer.from_str(json.dumps(state)) if whole else None
        except Exception as error:  # the package raises nothing more precise
            raise ValueError(f"this is not the tokenizer.json of a tokenizer: {error!r}") from None
        if not whole or not self._returns_all():
            raise ValueError(
                "not every text comes back from this tokenizer as it was; use one that works on the text's bytes, as GPT-2's"
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = BPE_VOCAB_SIZE) -> Self:
        """The tokenizer of the pieces most frequent in some texts: END_OF_TEXT, the 256 bytes, and the pieces, as far as there
        are so many, that make `vocab_size` tokens."""
        if not 257 <= vocab_size < 2**31:
            raise ValueError(f"vocab_size={vocab_size} must be at least 257: the 256 bytes and {END_OF_TEXT}")
        package = _tokenizers()
        bpe = _on_bytes(package, package.models.BPE())
        alphabet = package.pre_tokenizers.ByteLevel.alphabet()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT], show_progress=False
        )
        _interruptibly(lambda: bpe.train_from_iterator((part for text in texts for part in parts(text, _PART)), trainer))
        return cls(bpe.to_str())

    @classmethod
    def from_vocab(cls, vocab: Path, merges: Path) -> Self:
        """The tokenizer of GPT-2's own two files: token → id in vocab.json, and merges.txt, one pair to join a line."""
        package = _tokenizers()
        try:
            bpe = _on_bytes(package, package.models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:  # the package raises nothing more precise
            raise ValueError(f"{vocab} and {merges.name} cannot be used: {error}") from None
        if bpe.token_to_id(END_OF_TEXT) is not None:
            bpe.add_special_tokens([END_OF_TEXT])
        return cls(bpe.to_str())

    @cached_property
    def vocab_size(self) -> int:
        return max(self._bpe.get_vocab().values()) + 1

    @cached_property
    def end_of_text(self) -> int | None:
        return self._bpe.token_to_id(END_OF_TEXT)

    def encode(self, text: str) -> np.ndarray:
        """int32 ids; ValueError where the text has no bytes (lone surrogates)."""
        pieces, ids = list(parts(text, _PART)), []
        try:
            for i in range(0, len(pieces), _GROUP):
                for found in self._bpe.encode_batch_fast(pieces[i : i + _GROUP], add_special_tokens=False):  # on all cores
                    ids.append(np.array(found.ids, np.int32))
        except Exception as error:  # the package raises nothing more precise
            raise ValueError(f"the text cannot be encoded by the model's tokenizer: {error}") from None
        return np.concatenate(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._bpe.decode([int(i) for i in ids], skip_special_tokens=False)

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return self._bpe.to_str()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokenizer": json.loads(self.to_json())}

    def _returns_all(self) -> bool:
        """Whether each byte has a token, and what is around added tokens comes back too."""
        added = [token.content for token in self._bpe.get_added_tokens_decoder().values()]
        try:
            return all(self.decode(self.encode(t)) == t for t in (_PROBE, f" {_PROBE}", " a ".join(["", *added, ""])))
        except ValueError:
            return False


def _reads_all(state: dict[str, Any]) -> bool:
    """Whether the steps of a tokenizer.json before and after its model only part a text into words, and these into bytes."""
    first = state.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    parts_only = all(step.get("type") in _CUTS and step.get("behavior") != "Removed" for step in steps)
    normalizes = (state.get("normalizer") or {"normalizers": []}).get("normalizers") != []
    marks = any(state["model"].get(mark) for mark in ("continuing_subword_prefix", "end_of_word_suffix"))
    return parts_only and not normalizes and not marks and (state.get("decoder") or {}).get("type") == "ByteLevel"


def _interruptibly(work: Callable[[], object]) -> None:
    """Do work that lasts and never looks for Ctrl-C, in a thread that is left behind when that comes."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeError(f"a tokenizer.json needs {missing('tokenizers', 'hf', error)}") from None
    return tokenizers


def _on_bytes(package: Any, model: Any) -> Any:
    """A tokenizer with a model of pairs, on words as GPT-2 cuts them and on the bytes of their letters."""
    bpe = package.Tokenizer(model)
    bpe.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = package.decoders.ByteLevel()
    return bpe


def _tokenizer_json(pre_tokenizer: dict[str, Any], model: dict[str, Any], decoder: dict[str, Any]) -> str:
    steps = {"pre_tokenizer": pre_tokenizer, "model": model, "decoder": decoder}
    return json.dumps({"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, **steps})


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in GPT-2's vocabulary: its own where that can be seen, or one from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(b if b in visible else next(others)) for b in range(256)]


def make_tokenizer(name: str, texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer "char" or "byte"; "bpe", trained on pieces of texts to `vocab_size` tokens; or that of a model, by the name
    of its folder or its repository on the Hugging Face hub ("gpt2").
    """
    if vocab_size is not None and name != "bpe":
        raise ValueError(f"vocab_size={vocab_size} is for the tokenizer bpe; {name} brings its own")
    match name:
        case "char":
            return CharTokenizer.from_text(texts)
        case "byte":
            return ByteTokenizer()
        case "bpe":
            return BPETokenizer.train(texts, BPE_VOCAB_SIZE if vocab_size is None else vocab_size)
    if (path := hub.find(name, "tokenizer.json")) is None:
        raise ValueError(f"{name} has no tokenizer.json; use {', '.join(KINDS)}, or a model with one")
    return from_file(path)


def from_file(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json."""
    try:
        text = path.read_text("utf-8")
        return CharTokenizer.from_json(text) or BPETokenizer(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from None


def from_dict(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described."""
    match state.get("kind"):
        case "char":
            return CharTokenizer(state["symbols"])
        case "byte":
            return ByteTokenizer()
        case "bpe":
            return BPETokenizer(json.dumps(state["tokenizer"]))
    raise ValueError(f"tokenizer kind {state.get('kind')!r} is not known; use {', '.join(KINDS)}")
