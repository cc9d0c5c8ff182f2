"""Texts of any size, read piece by piece: UTF-8 files, compressed ones (.gz), tables (.parquet), and folders of them."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minigpt.program import missing

SUFFIXES = (".txt", ".gz", ".parquet")  # of the files that are read in a folder
_PIECE = 1 << 20  # bytes read at a time
_ROWS = 256  # of a table read at a time
_REMEDY = "name a UTF-8 text"

Documents = Iterator[Iterable[str]]
"""Documents one after the other, each in pieces."""


class CorpusError(ValueError):
    """A text cannot be had; the message is one sentence that ends in a remedy."""


def files(paths: Iterable[Path]) -> list[Path]:
    """The files of texts among `paths`, in their order; of a folder, and of the folders in it, those that are not hidden."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise CorpusError(f"cannot read {path} (No such file or directory): {_REMEDY}")
        inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]
        inside = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not inside:
            raise CorpusError(f"cannot read {path} (a folder without files in {', '.join(SUFFIXES)}): {_REMEDY}")
        found += inside
    if not found:
        raise CorpusError("there is nothing to read: name files, or folders of them")
    return found


def documents(paths: list[Path], column: str = "text", read: Callable[[int], object] = lambda _: None) -> Documents:
    """The documents of some files: each file is one, or each row of a table, where `column` holds the text.

    A file's byte order mark is dropped and line ends become "\\n", for either would cost the vocabulary a symbol; nothing else
    is changed. `read` is told of every number of bytes read. Memory: a few pieces of 1 MB. CorpusError: a file cannot be read,
    or is not UTF-8 text.
    """
    for path in paths:
        if path.suffix == ".parquet":
            for text in _rows(path, column, read):
                yield (text,)
        else:
            yield _pieces(path, read)


def _pieces(path: Path, read: Callable[[int], object]) -> Iterator[str]:
    """A file in pieces that end where a word does, as far as there are words."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    done, rest, first = 0, "", True
    for data in _chunks(path, read):
        try:
            text = lines.decode(data, final=not data)
        except UnicodeDecodeError as error:
            offset = done + len(data) - len(error.object) + error.start
            where = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
            raise CorpusError(f"{path} is not UTF-8 ({where}): {_REMEDY}") from error
        if b"\0" in data:
            raise CorpusError(f"{path} is binary data (byte 0x00 at offset {done + data.index(0)}): {_REMEDY}")
        done += len(data)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        rest += text
        end = (_cut(rest, 1, len(rest) - 1) or len(rest)) if data else len(rest)
        yield rest[:end]
        rest = rest[end:]


def _chunks(path: Path, read: Callable[[int], object]) -> Iterator[bytes]:
    """The bytes of a file, and at last none."""
    told = 0
    try:
        with open(path, "rb") as raw:
            file: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            data = b"-"
            while data:
                yield (data := file.read(_PIECE))
                done = raw.tell() if file is not raw else told + len(data)  # a pipe cannot tell
                read(done - told)
                told = done
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"cannot read {path} ({getattr(error, 'strerror', None) or error}): {_REMEDY}") from error


def _rows(path: Path, column: str, read: Callable[[int], object]) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CorpusError(f"{path} needs {missing('pyarrow', 'data', error)}") from None
    try:
        with parquet.ParquetFile(path) as table:
            if column not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise CorpusError(f"{path} has no column {column!r}, but {names}: name the one with the text with --column")
            size, rows = path.stat().st_size, max(1, table.metadata.num_rows)
            for batch in table.iter_batches(_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str | None):
                        kind = batch.column(0).type
                        raise CorpusError(f"column {column!r} of {path} holds {kind}, not text: name another with --column")
                    if text:
                        yield text.replace("\r\n", "\n").replace("\r", "\n")
                read(size * len(batch) // rows)
    except (OSError, ArrowException, UnicodeDecodeError) as error:
        raise CorpusError(f"cannot read {path} ({getattr(error, 'strerror', None) or error}): {_REMEDY}") from error


def parts(text: str, size: int) -> Iterator[str]:
    """A text in parts of at most `size` characters, cut where the patterns of GPT-2 and of later models begin a word anyway, if
    there is such a place: at a space or a line break between two words. The parts' tokens are then the text's.
    """
    start = 0
    while len(text) - start > size:
        end = _cut(text, start + 1, start + size) or start + size
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, low: int, high: int) -> int:
    """The last place in text[low:high] of a space or a line break, alone, after a letter or digit; 0 where there is none."""
    for end in range(high - 1, low - 1, -1):
        if text[end] in " \n" and text[end - 1].isalnum() and not text[end + 1].isspace():
            return end
    return 0
