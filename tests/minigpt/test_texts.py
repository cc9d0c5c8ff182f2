"""Texts of any size, read in pieces: what comes out is what a whole reading would give."""

import gzip
import os
import threading
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt import texts
from minigpt.texts import CorpusError, documents, files

LETTERS = st.text(st.sampled_from("ab \n\r\té€😀\u2028"), max_size=60)


def read(*paths: Path) -> list[str]:
    return ["".join(document) for document in documents(list(paths))]


@given(text=LETTERS, piece=st.integers(1, 9), compressed=st.booleans())
def test_pieces_make_the_text(tmp_path_factory: pytest.TempPathFactory, text: str, piece: int, compressed: bool) -> None:
    """Whatever falls on the border of two pieces: half a character, half a line end, a byte order mark."""
    path = tmp_path_factory.mktemp("text") / ("verse.txt.gz" if compressed else "verse.txt")
    data = ("\ufeff" + text).encode()
    path.write_bytes(gzip.compress(data) if compressed else data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_PIECE", piece)
        assert read(path) == [text.replace("\r\n", "\n").replace("\r", "\n")]


def test_pieces_end_between_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "verse.txt"
    path.write_text("one two\nthree four! five", encoding="utf-8")
    monkeypatch.setattr(texts, "_PIECE", 8)
    (document,) = documents([path])
    assert [piece for piece in document if piece] == ["one", " two\nthree", " four! five"]


@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9 noir", r"not UTF-8 \(byte 0xe9 at offset 3\)"),
        (b"\xef\xbb\xbfab\xe2\x82", r"not UTF-8 \(byte 0xe2 at offset 5\)"),
        (b"abcdefg\0h", r"binary data \(byte 0x00 at offset 7\)"),
    ],
)
def test_what_is_no_text_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str, piece: int
) -> None:
    monkeypatch.setattr(texts, "_PIECE", piece)
    for path, stored in (tmp_path / "bad.txt", data), (tmp_path / "bad.txt.gz", gzip.compress(data)):
        path.write_bytes(stored)
        with pytest.raises(CorpusError, match=rf"{path.name} is .*{message}: name a UTF-8 text"):
            read(path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"no" + data, lambda data: data[:20] + b"\xff" + data[21:]]
)
def test_a_damaged_archive_is_one_sentence(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "bad.gz"
    path.write_bytes(damage(gzip.compress(b"to be, or not to be " * 9)))  # type: ignore[operator]
    with pytest.raises(CorpusError, match=r"cannot read .*bad\.gz \(.*name a UTF-8 text"):
        read(path)


def table(path: Path, **columns: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_the_rows_of_a_table_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["one\r\ntwo", "", None, "naïve €", "four", "five"]
    path, seen = table(tmp_path / "rows.parquet", text=rows, other=[1, 2, 3, 4, 5, 6]), []
    monkeypatch.setattr(texts, "_ROWS", 2)
    assert ["".join(d) for d in documents([path], read=seen.append)] == ["one\ntwo", "naïve €", "four", "five"]
    assert len(seen) == 3
    assert path.stat().st_size - 3 < sum(seen) <= path.stat().st_size


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("body", r"has no column 'body', but text, other: name the one with the text with --column"),
        ("other", r"column 'other' of .* holds int64, not text: name another with --column"),
    ],
)
def test_a_column_that_is_not_the_text_is_refused(tmp_path: Path, column: str, message: str) -> None:
    path = table(tmp_path / "rows.parquet", text=["a"], other=[1])
    with pytest.raises(CorpusError, match=message):
        list(documents([path], column))


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"not a table")
    with pytest.raises(CorpusError, match=r"cannot read .*rows\.parquet"):
        read(path)


def test_folders_are_read_by_name(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/y.txt.gz", "picture.png", "c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [p.relative_to(tmp_path).as_posix() for p in files([tmp_path / "picture.png", tmp_path])]
    assert names == ["picture.png", "a/y.txt.gz", "a/z.txt", "b.txt", "c.parquet"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"empty \(a folder without files in \.txt, \.gz, \.parquet\)"):
        files([tmp_path / "empty"])


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"cannot read .*none\.txt \(No such file or directory\): name a UTF-8 text"):
        files([tmp_path / "none.txt"])


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """A text of 200 MB, in one line, of which a few pieces of 1 MB are held at once."""
    path = tmp_path / "long.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b"word " * 400_000)
    tracemalloc.start()
    length = sum(len(piece) for document in documents([path]) for piece in document)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length == 200_000_000
    assert peak < 2e7


def test_a_pipe_is_read_and_what_is_hidden_is_not(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes("naïve".encode() * 9))
    writer.start()
    assert read(pipe) == ["naïve" * 9]
    writer.join()
    for name in ("seen.txt", ".git/hidden.txt"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(name)
    assert files([tmp_path / "folder"]) == [tmp_path / "folder" / "seen.txt"]
    with pytest.raises(CorpusError, match="there is nothing to read: name files, or folders of them"):
        files([])
