"""Token files: prepared once, read in place, and training on them is training on the text."""

import gzip
import json
import math
import os
import pickle
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from minigpt import tokens
from minigpt.checkpoint import LAST, CheckpointError, load
from minigpt.run import run
from minigpt.texts import CorpusError
from minigpt.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, make_tokenizer
from minigpt.tokens import open_tokens, prepare
from tests.minigpt.program import command, environment
from tests.minigpt.small import TINY, corpus, interrupted, record, verse

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture(name="folder")
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("verse.txt").write_text(verse(), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_the_ids_are_those_of_the_text(kind: str) -> None:
    made = prepare([Path("verse.txt")], Path("made"), kind, 300 if kind == "bpe" else None)
    expected = make_tokenizer(kind, [verse()], 300 if kind == "bpe" else None)
    assert made.tokenizer.to_dict() == expected.to_dict()
    assert made.ids.tolist() == expected.encode(verse()).tolist()
    assert (made.ids.dtype, type(made.ids)) == (np.uint16, np.ndarray)
    assert Path("made/tokens.bin").stat().st_size == 2 * len(made.ids)
    text = corpus(verse())
    assert (made.characters, made.sha256) == (text.characters, text.sha256)
    assert not made.ids.flags.writeable
    assert sorted(p.name for p in Path().iterdir()) == ["made", "verse.txt"]


def test_documents_of_every_format_are_parted() -> None:
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("one\n", encoding="utf-8")
    Path("texts/b.txt.gz").write_bytes(gzip.compress("zwei €".encode()))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["trois", "vier"]}), "texts/c.parquet")
    text = "one\n\nzwei €\ntrois\nvier"
    letters = prepare([Path("texts")], Path("letters"), "char", column="body")
    assert letters.tokenizer.decode(letters.ids) == text
    pieces = prepare([Path("texts")], Path("pieces"), "bpe", 260, column="body")
    assert pieces.tokenizer.decode(pieces.ids) == f"one\n{END_OF_TEXT}zwei €{END_OF_TEXT}trois{END_OF_TEXT}vier"
    assert (letters.characters, letters.sha256) == (len(text), corpus(text).sha256)
    assert pieces.sha256 == corpus(pieces.tokenizer.decode(pieces.ids)).sha256  # not the hash of the documents joined by others
    assert letters.source == "texts/a.txt and 2 more"


def test_a_large_vocabulary_takes_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("many.txt").write_text("".join(chr(0x10000 + i) for i in range(65537)), encoding="utf-8")
    made = prepare([Path("many.txt")], Path("many"), "char")
    assert made.ids.dtype == np.uint32
    assert made.ids.tolist() == list(range(65537))
    Path("most.txt").write_text("".join(chr(0x10000 + i) for i in range(65536)), encoding="utf-8")
    assert prepare([Path("most.txt")], Path("most"), "char").ids.max() == 65535
    assert open_tokens(Path("most")).ids.dtype == np.uint16


def test_a_run_on_tokens_is_the_run_on_their_text() -> None:
    prepare([Path("verse.txt")], Path("made"), "char")
    by_text = run(replace(TINY, data=Path("verse.txt"), out_dir=Path("text")))
    by_tokens = run(replace(TINY, data=Path("made"), out_dir=Path("tokens")))
    assert record(by_text) == record(by_tokens)
    assert load(by_tokens / LAST).config.tokenizer == "char"


def test_a_run_on_tokens_goes_on_from_its_checkpoint_and_on_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare([Path("verse.txt")], Path("made"), "bpe", 300)
    config = replace(TINY, data=Path("made"), out_dir=Path("run"))
    whole = record(run(replace(config, out_dir=Path("whole"))))
    interrupted(config, 4, monkeypatch)
    prepare([Path("verse.txt")], Path("other"), "bpe", 301)
    with pytest.raises(ValueError, match=r"other holds tokens of another tokenizer than the model's"):
        run(replace(config, resume=True, data=Path("other")))
    with pytest.raises(CheckpointError, match=r"val_share 0\.1 → 0\.2"):
        run(replace(config, resume=True, val_share=0.2))
    assert record(run(replace(config, resume=True))) == whole
    assert load(Path("run") / LAST).config.tokenizer == "bpe"


def test_another_tokenizer_than_the_tokens_is_refused() -> None:
    prepare([Path("verse.txt")], Path("made"), "byte")
    with pytest.raises(ValueError, match=r"made holds tokens of kind 'byte': leave out --tokenizer char"):
        run(replace(TINY, data=Path("made"), tokenizer="char"))
    with pytest.raises(ValueError, match=r"made has a vocabulary of 256: leave out --vocab-size 300"):
        run(replace(TINY, data=Path("made"), vocab_size=300))
    with pytest.raises(ValueError, match=r"vocab_size=300 is for the tokenizer bpe; char brings its own"):
        run(replace(TINY, data=Path("verse.txt"), vocab_size=300))


def test_another_process_maps_the_same_file() -> None:
    made = prepare([Path("verse.txt")], Path("made"), "char")
    sent = pickle.dumps(made)
    assert len(sent) < 200
    assert np.array_equal(pickle.loads(sent).ids, made.ids)


@pytest.mark.parametrize(
    ("data", "kwargs", "message"),
    [
        (
            "verse.txt",
            {"out_dir": Path("there")},
            r"there is there already; choose another folder with --out-dir",
        ),
        ("none.txt", {}, r"cannot read none\.txt \(No such file"),
        ("blank.txt", {}, r"blank\.txt holds no text"),
        ("bad.txt", {}, r"bad\.txt is not UTF-8 \(byte 0xff at offset 3\)"),
        ("verse.txt", {"tokenizer": "a/b/c"}, r"there is no folder a/b/c"),
        ("verse.txt", {"vocab_size": 5}, r"vocab_size=5 must be at least 257"),
        ("verse.txt", {"tokenizer": "char", "vocab_size": 5}, r"vocab_size=5 is for the tokenizer bpe; char brings its own"),
    ],
)
def test_what_cannot_be_prepared_leaves_nothing(data: str, kwargs: dict[str, Any], message: str) -> None:
    Path("there").mkdir()
    Path("there/mine").touch()
    Path("blank.txt").write_text(" \n")
    Path("bad.txt").write_bytes(b"abc\xff")
    before = sorted(Path().iterdir())
    with pytest.raises(ValueError, match=message):
        prepare([Path(data)], **({"out_dir": Path("made")} | kwargs))
    assert sorted(Path().iterdir()) == before


def test_a_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens, "_write", full)
    with pytest.raises(OSError, match=r"made could not be written \(.*No space left on device\)"):
        prepare([Path("verse.txt")], Path("made"), "byte")
    assert [p.name for p in Path().iterdir()] == ["verse.txt"]


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_what_can_be_read_only_once_is_refused_where_it_would_be_read_twice(tokenizer: str) -> None:
    os.mkfifo("pipe.txt")
    with pytest.raises(CorpusError, match=rf"pipe\.txt can be read only once, and {tokenizer} reads texts twice: save it"):
        prepare([Path("verse.txt"), Path("pipe.txt")], Path("made"), tokenizer)
    assert not Path("made").exists()


def test_an_interrupted_preparation_leaves_nothing() -> None:
    os.mkfifo("endless.txt")
    pipe = os.open("endless.txt", os.O_RDWR)  # as long as it is open here, those who read the text wait for more
    words = command("prepare.py", "endless.txt", "--out-dir", "made", "--tokenizer", "byte")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        while not list(Path().glob("made.*.tmp")):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    os.close(pipe)
    assert errors.splitlines()[-1] == "interrupted; nothing was made"
    assert sorted(p.name for p in Path().iterdir()) == ["endless.txt", "verse.txt"]


def about(change: Callable[[dict[str, Any]], object]) -> Callable[[], object]:
    def damage() -> None:
        values = json.loads(Path("made/tokens.json").read_text("utf-8"))
        change(values)
        Path("made/tokens.json").write_text(json.dumps(values))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: os.truncate("made/tokens.bin", 99), r"made/tokens\.bin is damaged: .* prepare its text again"),
        (lambda: Path("made/tokens.bin").write_bytes(Path("made/tokens.bin").read_bytes()[::-1]), r"tokens\.bin is damaged"),
        (lambda: Path("made/tokens.bin").unlink(), r"made does not hold tokens that can be read"),
        (lambda: Path("made/tokens.json").write_text("{"), r"made does not hold tokens that can be read"),
        (about(lambda values: values.pop("source")), r"made does not hold tokens that can be read \(KeyError\('source'\)\)"),
        (about(lambda values: values.update(tokenizer=3)), r"made does not hold tokens that can be read \(Attribute"),
        (about(lambda values: values.update(characters=math.inf)), r"made does not hold tokens that can be read \(Overflow"),
        (lambda: Path("made/tokens.json").write_text("[" * 99_999), r"made does not hold tokens that can be read \(Recursion"),
        (about(lambda values: values.update(schema=2)), r"made has schema 2, this program reads 1"),
        (about(lambda values: values.update(tokenizer={"kind": "x"})), r"tokenizer kind 'x' is not known"),
    ],
)
def test_damaged_tokens_are_refused(damage: Callable[[], object], message: str) -> None:
    prepare([Path("verse.txt")], Path("made"), "byte")
    damage()
    with pytest.raises(CorpusError, match=message):
        run(replace(TINY, data=Path("made")))


@pytest.mark.parametrize(("share", "warned"), [(0.2, True), (0.02, False)])
def test_evaluations_that_take_longer_than_training_are_told_of(
    capsys: pytest.CaptureFixture[str], share: float, warned: bool
) -> None:
    """A tenth of a large text is more than anybody wants to wait for."""
    run(replace(TINY, data=Path("verse.txt"), val_share=share))
    told = " ".join(capsys.readouterr().out.split())
    expected = "tokens, which takes longer than 3 steps; use a smaller --val-share than 0.2, or a larger"
    assert (expected in told) is warned
    assert ("warning" in told) is warned


def test_a_text_too_large_to_hold_is_to_be_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt.corpus.IN_MEMORY", 100)
    with pytest.raises(CorpusError, match=r"verse\.txt is .* GB of text: make tokens of it, once, with .*prepare"):
        run(replace(TINY, data=Path("verse.txt")))


def test_a_run_trains_its_own_pieces_of_words() -> None:
    out_dir = run(replace(TINY, data=Path("verse.txt"), tokenizer="bpe", vocab_size=300))
    saved = load(out_dir / LAST)
    assert isinstance(saved.tokenizer, BPETokenizer)
    assert saved.tokenizer.vocab_size == saved.build_model().config.vocab_size == 300
    assert saved.tokenizer.decode(saved.tokenizer.encode(verse())) == verse()


def test_nobody_elses_unfinished_work_is_touched() -> None:
    """Two programs may have one number, each in a container of its own."""
    other = Path(f"made.{os.getpid()}.tmp")
    other.mkdir()
    (other / "tokens.bin").write_bytes(b"theirs")
    prepare([Path("verse.txt")], Path("made"), "byte")
    assert (other / "tokens.bin").read_bytes() == b"theirs"


def test_what_a_text_says_of_its_end_is_not_where_it_ends() -> None:
    """One hash stands for one sequence of tokens, so a run goes on with no other."""
    Path("texts").mkdir()
    for name in "ab":
        Path("texts", f"{name}.txt").write_text(verse(), encoding="utf-8")
    Path("joined.txt").write_text(f"{verse()}\n{verse()}", encoding="utf-8")
    run(replace(TINY, data=prepare([Path("texts")], Path("made"), "bpe", 300).path, out_dir=Path("run")))
    with pytest.raises(CheckpointError, match="was trained on another text"):
        run(replace(TINY, data=Path("joined.txt"), out_dir=Path("run"), resume=True))


def test_samples_need_no_line_breaks_in_the_vocabulary() -> None:
    Path("letters").mkdir()
    Path("letters/tokenizer.json").write_text(CharTokenizer.from_text(["a line of letters "]).to_json(), "utf-8")
    Path("line.txt").write_text("a line of letters " * 99, encoding="utf-8")
    run(replace(TINY, data=Path("line.txt"), tokenizer="letters"))
