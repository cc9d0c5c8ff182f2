"""Texts of any size as a file of tokens, made once and read in place by training; neither holds more than a few megabytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from minigpt import disk
from minigpt.config import TrainConfig
from minigpt.corpus import KNOWN_TEXTS, Corpus
from minigpt.texts import CorpusError, Documents, documents, files
from minigpt.tokenizer import END_OF_TEXT, Tokenizer, from_dict, make_tokenizer
from tinytensor import parallel

SCHEMA = 1
TOKENS, ABOUT = "tokens.bin", "tokens.json"


@dataclass(frozen=True)
class TokenFile:
    """A folder that `prepare` made: the ids in tokens.bin, mapped into memory, and what they are in tokens.json.

    Attributes:
        ids: uint16 or, from 65,537 tokens in the vocabulary on, uint32; little-endian.
        tokenizer: whose ids they are.
        characters: of the text.
        source, sha256: what the text is; the digest of its UTF-8 bytes, those between its documents included.
        path: the folder.
    """

    ids: np.ndarray
    tokenizer: Tokenizer
    characters: int
    source: str
    sha256: str
    path: Path

    def tokens(self, config: TrainConfig, tokenizer: Tokenizer | None = None) -> tuple[Tokenizer, np.ndarray]:
        """The ids and their tokenizer; ValueError when another one is asked for."""
        own = self.tokenizer
        if tokenizer is not None and tokenizer.to_dict() != own.to_dict():
            raise ValueError(
                f"{self.path} holds tokens of another tokenizer than the model's: prepare its text with --tokenizer MODEL"
            )
        if tokenizer is None and config.tokenizer not in (None, own.kind):
            raise ValueError(f"{self.path} holds tokens of kind {own.kind!r}: leave out --tokenizer {config.tokenizer}")
        if config.vocab_size not in (None, own.vocab_size):
            raise ValueError(f"{self.path} has a vocabulary of {own.vocab_size}: leave out --vocab-size {config.vocab_size}")
        return own, self.ids

    def __reduce__(self) -> tuple[Any, ...]:  # another process maps the file itself
        return open_tokens, (self.path,)


Text = Corpus | TokenFile
"""What can be trained on."""


def is_prepared(folder: Path) -> bool:
    return (folder / ABOUT).is_file()


def open_tokens(folder: Path) -> TokenFile:
    """Map the tokens of a folder into memory; CorpusError when they are not whole."""
    remedy = "prepare its text again into another folder"
    try:
        about = json.loads((folder / ABOUT).read_text("utf-8"))
        if about["schema"] != SCHEMA:
            raise CorpusError(f"{folder} has schema {about['schema']}, this program reads {SCHEMA}: {remedy}")
        with open(folder / TOKENS, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != about["tokens_sha256"]:
                raise CorpusError(f"{folder / TOKENS} is damaged: its SHA-256 is not that of {ABOUT}: {remedy}")
        tokenizer = from_dict(about["tokenizer"])
        ids = np.asarray(np.memmap(folder / TOKENS, _dtype(tokenizer), "r"))
        return TokenFile(ids, tokenizer, int(about["characters"]), about["source"], about["sha256"], folder)
    except CorpusError:
        raise
    except (OSError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CorpusError(f"{folder} does not hold tokens that can be read ({error!r}): {remedy}") from None


def prepare(
    data: Iterable[Path],
    out_dir: Path,
    tokenizer: str | Tokenizer = "bpe",
    vocab_size: int | None = None,
    column: str = "text",
) -> TokenFile:
    """Make a folder of tokens from texts: files, compressed files (.gz), tables (.parquet, the text in `column`), folders.

    Between two documents stands the tokenizer's end-of-text token or, where it has none, a line break. `tokenizer`, if not one
    already, and `vocab_size` are as for `make_tokenizer`; "char" and "bpe" read the texts once before they are encoded. The
    folder appears when it is whole. ValueError: a text cannot be read, or the folder is there already.
    """
    paths = files(data)
    once = next((path for path in paths if not path.is_file()), None)
    if once is not None and tokenizer in ("char", "bpe"):
        raise CorpusError(f"{once} can be read only once, and {tokenizer} reads texts twice: save it as a file first")
    with disk.new_folder(out_dir) as made, _progress(paths, column) as reading:
        if isinstance(tokenizer, str):
            tokenizer = make_tokenizer(tokenizer, _stream(reading("reading for the tokenizer"), "\n"), vocab_size)
        with open(made / TOKENS, "wb") as file:
            about, blank = _write(file, tokenizer, reading("encoding"))
        if blank:
            raise CorpusError(f"{_names(paths)} holds no text: name UTF-8 texts")
        source = KNOWN_TEXTS.get(about["sha256"], _names(paths))
        about |= {"schema": SCHEMA, "source": source, "tokenizer": tokenizer.to_dict()}
        (made / ABOUT).write_text(json.dumps(about, indent=1), "utf-8")
    return open_tokens(out_dir)


T = TypeVar("T")


def _stream(documents: Documents, between: T) -> Iterator[str | T]:
    """The pieces of all documents, with `between` between two documents."""
    for number, document in enumerate(documents):
        if number:
            yield between
        yield from document


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _write(file: IO[bytes], tokenizer: Tokenizer, documents: Documents) -> tuple[dict[str, Any], bool]:
    """Write the ids of documents; what is to be known of them, and whether they hold nothing but space."""
    end, dtype = tokenizer.end_of_text, _dtype(tokenizer)

    def encode(piece: str | None) -> np.ndarray:
        return (np.array([end]) if piece is None else tokenizer.encode(piece)).astype(dtype)

    digest, ids_digest, characters, blank = hashlib.sha256(), hashlib.sha256(), 0, True
    stream, cores = _stream(documents, "\n" if end is None else None), parallel.cpu_threads()
    with ThreadPoolExecutor(cores) as pool:
        while pieces := list(islice(stream, 4 * cores)):  # not all at once, or they would wait in memory
            for piece, ids in zip(pieces, pool.map(encode, pieces), strict=True):
                text = END_OF_TEXT if piece is None else piece
                file.write(ids.data)
                ids_digest.update(ids.data)
                digest.update(text.encode())
                characters, blank = characters + len(text), blank and not text.strip()
    digests = {"sha256": digest.hexdigest(), "tokens_sha256": ids_digest.hexdigest()}
    return {"characters": characters, **digests}, blank


@contextmanager
def _progress(paths: list[Path], column: str) -> Iterator[Callable[[str], Documents]]:
    """Yield `reading(title)`: the documents of some files, as a progress bar of that title moves."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(path.stat().st_size for path in paths if path.exists())
    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def reading(what: str) -> Documents:
            task = progress.add_task(what, total=total)
            yield from documents(paths, column, lambda count: progress.advance(task, count))
            progress.update(task, completed=total)

        yield reading


def _names(paths: list[Path]) -> str:
    return str(paths[0]) + (f" and {len(paths) - 1:,} more" if len(paths) > 1 else "")
