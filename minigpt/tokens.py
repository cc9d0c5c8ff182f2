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
from typing import IO, Any

import numpy as np

from minigpt import disk
from minigpt.config import TrainConfig
from minigpt.corpus import KNOWN_TEXTS, Corpus
from minigpt.texts import CorpusError, Documents, documents, files
from minigpt.tokenizer import Tokenizer, from_dict, make_tokenizer
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
        source, sha256: what the text is, and the digest of its UTF-8 bytes, documents parted by line breaks.
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
            raise ValueError(f"{self.path} holds tokens of another tokenizer than the model's: prepare its text with that")
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
        dtype, count, size = np.dtype(about["dtype"]), about["tokens"], (folder / TOKENS).stat().st_size
        if size != count * dtype.itemsize:
            raise CorpusError(f"{folder / TOKENS} has {size:,} bytes, not {count * dtype.itemsize:,}: {remedy}")
        ids = np.asarray(np.memmap(folder / TOKENS, dtype, "r"))
        plain = {name: about[name] for name in ("characters", "source", "sha256")}
        return TokenFile(ids, from_dict(about["tokenizer"]), path=folder, **plain)
    except CorpusError:
        raise
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise CorpusError(f"{folder} does not hold tokens that can be read ({error!r}): {remedy}") from None


def prepare(
    data: Iterable[Path], out_dir: Path, tokenizer: str = "bpe", vocab_size: int | None = None, column: str = "text"
) -> TokenFile:
    """Make a folder of tokens from texts: files, compressed files (.gz), tables (.parquet, the text in `column`), folders.

    Between two documents stands the tokenizer's end-of-text token or, where it has none, a line break. `tokenizer` and
    `vocab_size` are as for `make_tokenizer`; "char" and "bpe" read the texts once before they are encoded. The folder appears
    when it is whole. ValueError: a text cannot be read, or the folder is there already.
    """
    paths = files(data)
    with disk.new_folder(out_dir) as made, _progress(paths, column) as reading:
        pieces = (text for text, _ in _stream(reading("reading for the tokenizer")))
        chosen = make_tokenizer(tokenizer, pieces, vocab_size)
        with open(made / TOKENS, "wb") as file:
            blank, about = _write(file, chosen, reading("encoding"))
        if blank:
            raise CorpusError(f"{_names(paths)} holds no text: name UTF-8 texts")
        source = KNOWN_TEXTS.get(about["sha256"], _names(paths))
        about |= {"schema": SCHEMA, "source": source, "tokenizer": chosen.to_dict()}
        (made / ABOUT).write_text(json.dumps(about, indent=1), "utf-8")
    return open_tokens(out_dir)


def _stream(documents: Documents) -> Iterator[tuple[str, bool]]:
    """Pieces of text; True with the line breaks that part documents."""
    for number, document in enumerate(documents):
        if number:
            yield "\n", True
        for piece in document:
            yield piece, False


def _write(file: IO[bytes], tokenizer: Tokenizer, documents: Documents) -> tuple[bool, dict[str, Any]]:
    """Write the ids of documents; whether they are blank, and what else is to be known of them."""

    def encode(piece: tuple[str, bool]) -> np.ndarray:
        text, between = piece
        end = tokenizer.end_of_text if between else None
        return (tokenizer.encode(text) if end is None else np.array([end])).astype(dtype)

    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    digest, tokens, characters, blank = hashlib.sha256(), 0, 0, True
    stream, cores = _stream(documents), parallel.cpu_threads()
    with ThreadPoolExecutor(cores) as pool:
        while pieces := list(islice(stream, 4 * cores)):  # not all at once, or they would wait in memory
            for (text, _), ids in zip(pieces, pool.map(encode, pieces), strict=True):
                file.write(ids.data)
                digest.update(text.encode())
                tokens, characters, blank = tokens + len(ids), characters + len(text), blank and not text.strip()
    return blank, {"dtype": dtype.str, "tokens": tokens, "characters": characters, "sha256": digest.hexdigest()}


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
