"""Text to ids and back: every text that goes in comes out."""

import json
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minigpt import tokenizer
from minigpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, make_tokenizer

ANY = st.text(st.characters())  # surrogates included: Python strings may hold them
UTF8 = st.text(st.characters(exclude_categories=["Cs"]))


@given(text=ANY.filter(bool))
@example(text="b\ud800a\U0010ffff")
def test_characters_come_back(text: str) -> None:
    made = CharTokenizer.from_text(text)
    ids = made.encode(text)
    assert ids.dtype == np.int32
    assert len(ids) == len(text)
    assert made.decode(ids) == made.decode(ids.tolist()) == text
    assert set(ids.tolist()) == set(range(made.vocab_size))
    assert made.symbols == "".join(sorted(set(text)))


@given(text=UTF8)
def test_bytes_come_back(text: str) -> None:
    made = ByteTokenizer()
    ids = made.encode(text)
    assert ids.dtype == np.int32
    assert bytes(ids.tolist()) == text.encode()
    assert made.decode(ids.tolist()) == made.decode(iter(ids)) == text


@given(text=UTF8)
def test_bytes_come_back_from_an_array_too(text: str) -> None:
    made = ByteTokenizer()
    assert made.decode(made.encode(text)) == made.decode(made.encode(text).astype(np.int64)) == text


@given(known=ANY.filter(bool), text=ANY)
def test_the_first_unknown_character_is_named_with_its_position(known: str, text: str) -> None:
    made = CharTokenizer.from_text(known)
    places = [i for i, c in enumerate(text) if c not in known]
    if not places:
        assert made.decode(made.encode(text)) == text
        return
    with pytest.raises(ValueError) as caught:
        made.encode(text)
    c = text[places[0]]
    message = str(caught.value)
    assert message.startswith(f"character {c!r} (U+{ord(c):04X}) at position {places[0]} is not in the model's vocabulary")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abcad", r"character 'd' \(U\+0064\) at position 4 .* vocabulary of 3 symbols: 'abc'"),
        ("😀b", r"character '😀' \(U\+1F600\) at position 0 "),
        ("a\x00", r"character '\\x00' \(U\+0000\) at position 1 "),
        ("c\n", r"character '\\n' \(U\+000A\) at position 1 "),
    ],
)
def test_unknown_characters_below_between_and_beyond_the_known(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CharTokenizer("abc").encode(text)


def test_an_empty_text_has_no_ids() -> None:
    for made in (CharTokenizer("ab"), ByteTokenizer()):
        ids = made.encode("")
        assert (ids.shape, ids.dtype) == ((0,), np.int32)
        assert made.decode(ids) == made.decode([]) == ""


def test_ids_follow_the_order_of_the_symbols() -> None:
    made = CharTokenizer.from_text("nile, zebra\n")
    assert made.symbols == "\n ,abeilnrz"
    assert made.encode("\nz").tolist() == [0, 10]


@pytest.mark.parametrize("symbols", ["", "aba"])
def test_symbols_are_needed_each_once(symbols: str) -> None:
    with pytest.raises(ValueError, match="needs symbols, each once"):
        CharTokenizer(symbols)


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    assert ByteTokenizer().decode([0x61, 0xE2, 0x82, 0x62, 0xFF]) == "a\ufffdb\ufffd"


@given(text=ANY.filter(bool))
def test_a_tokenizer_survives_json(text: str) -> None:
    for made in (make_tokenizer("char", text), make_tokenizer("byte", text)):
        again = tokenizer.from_dict(json.loads(json.dumps(made.to_dict())))
        assert type(again) is type(made)
        assert again.vocab_size == made.vocab_size
        assert again.to_dict() == made.to_dict()


EVERY_BYTE = "".join(chr(c) for c in (*range(0x900), *range(0x900, 0x110000, 911)) if not 0xD800 <= c < 0xE000)


@given(text=UTF8.filter(bool))
@example(text=EVERY_BYTE)
def test_the_json_of_a_tokenizer_gives_the_same_ids(text: str) -> None:
    for made in (make_tokenizer("char", text), make_tokenizer("byte", text)):
        read = BPETokenizer(made.to_json())
        assert read.encode(text).tolist() == made.encode(text).tolist()
        assert read.decode(made.encode(text)) == text
        assert (read.vocab_size, read.end_of_text) == (made.vocab_size, None)


def test_unknown_kinds_are_refused() -> None:
    for state in ({"kind": "word"}, {}):
        with pytest.raises(ValueError, match=r"is not known; use 'char', 'byte' or 'bpe'"):
            tokenizer.from_dict(state)
    with pytest.raises(ValueError, match=r"tokenizer kind 'word' is not known"):
        make_tokenizer("word", "text")


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for make in (lambda: BPETokenizer("{}"), lambda: BPETokenizer.train([])):
        with pytest.raises(RuntimeError, match=r'^a BPE tokenizer needs the package tokenizers .*; pip install -e "\.\[hf\]"$'):
            make()
