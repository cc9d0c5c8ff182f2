"""Texts of any size as a file of tokens, made once, and read in place by training: the memory of either is a few pieces."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from minigpt.config import TrainConfig
from minigpt.corpus import KNOWN_TEXTS
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
        opening: a prompt that suits the text.
        source, sha256: what the text is, and the digest of its UTF-8 bytes, documents parted by line breaks.
        path: the folder.
    """

    ids: np.ndarray
    tokenizer: Tokenizer
    characters: int
    opening: str
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
        return own, self.ids

    def __reduce__(self) -> tuple[Any, ...]:  # another process maps the file itself
        return open_tokens, (self.path,)


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
        plain = {name: about[name] for name in ("characters", "opening", "source", "sha256")}
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
    when it is whole. CorpusError: a text cannot be read, or the folder is there already.
    """
    if out_dir.exists():
        raise CorpusError(f"{out_dir} is there already: choose another --out-dir")
    paths = files(data)
    part = out_dir.with_name(f"{out_dir.name}.{os.getpid()}.part")
    with _progress(paths, column) as reading:
        pieces = (text for text, _ in _stream(reading("reading for the tokenizer")))
        made = make_tokenizer(tokenizer, pieces, vocab_size)
        try:
            part.mkdir(parents=True)
            with open(part / TOKENS, "wb") as file:
                about = _write(file, made, reading("encoding"))
            if not about["opening"]:
                raise CorpusError(f"{_names(paths)} holds no text: name UTF-8 texts")
            source = KNOWN_TEXTS.get(about["sha256"], _names(paths))
            about |= {"schema": SCHEMA, "source": source, "tokenizer": made.to_dict()}
            (part / ABOUT).write_text(json.dumps(about, indent=1), "utf-8")
            part.rename(out_dir)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return open_tokens(out_dir)


def _stream(documents: Documents) -> Iterator[tuple[str, bool]]:
    """Pieces of text; True with the line breaks that part documents."""
    for number, document in enumerate(documents):
        if number:
            yield "\n", True
        for piece in document:
            yield piece, False


def _write(file: IO[bytes], tokenizer: Tokenizer, documents: Documents) -> dict[str, Any]:
    """Write the ids of documents; what is to be known of them."""

    def encode(piece: tuple[str, bool]) -> np.ndarray:
        text, between = piece
        end = tokenizer.end_of_text if between else None
        return (tokenizer.encode(text) if end is None else np.array([end])).astype(dtype)

    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    digest, tokens, characters, opening = hashlib.sha256(), 0, 0, ""
    stream, cores = _stream(documents), parallel.cpu_threads()
    with ThreadPoolExecutor(cores) as pool:
        while pieces := list(islice(stream, 4 * cores)):  # not all at once, or they would wait in memory
            for (text, _), ids in zip(pieces, pool.map(encode, pieces), strict=True):
                file.write(ids.data)
                digest.update(text.encode())
                tokens, characters = tokens + len(ids), characters + len(text)
                opening = opening or next(iter(text.split(maxsplit=1)), "")
    return {"dtype": dtype.str, "tokens": tokens, "characters": characters, "opening": opening, "sha256": digest.hexdigest()}


@contextmanager
def _progress(paths: list[Path], column: str) -> Iterator[Callable[[str], Documents]]:
    """A function that reads the documents of some files, under a bar with the name it is given."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(path.stat().st_size for path in paths if path.exists())
    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:

        def reading(what: str) -> Documents:
            task = progress.add_task(what, total=total)
            yield from documents(paths, column, lambda count: progress.advance(task, count))
            progress.update(task, completed=total)

        yield reading


def _names(paths: list[Path]) -> str:
    return str(paths[0]) + (f" and {len(paths) - 1:,} more" if len(paths) > 1 else "")
