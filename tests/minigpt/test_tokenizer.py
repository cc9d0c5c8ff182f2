"""Text to ids and back: every text that goes in comes out."""

import json
import pickle
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from minigpt import tokenizer
from minigpt.texts import parts
from minigpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, make_tokenizer
from tests.minigpt.small import verse

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
    assert {made.decode(given) for given in (ids, ids.astype(np.int64), ids.tolist(), iter(ids))} == {text}


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
        read = tokenizers.Tokenizer.from_str(made.to_json())
        assert read.encode(text).ids == made.encode(text).tolist()
        assert read.decode(made.encode(text).tolist()) == text
        assert read.get_vocab_size() == made.vocab_size


def test_a_file_brings_back_its_tokenizer(tmp_path: Path, pieces: BPETokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    saved = {"truncation": None, "post_processor": {"type": "Sequence", "processors": []}}  # by transformers
    for made in (CharTokenizer("cba \n"), ByteTokenizer(), pieces):
        path.write_text(json.dumps(json.loads(made.to_json()) | saved), "utf-8")
        read = tokenizer.from_file(path)
        assert (type(read) is type(made)) is (made.kind != "byte")  # bytes are pieces that are not joined
        assert (read.vocab_size, read.end_of_text) == (made.vocab_size, made.end_of_text)
        assert read.encode("a cab\n").tolist() == made.encode("a cab\n").tolist()
        assert read.decode(read.encode("a cab\n")) == "a cab\n"


def test_unknown_kinds_are_refused() -> None:
    for state in ({"kind": "word"}, {}):
        with pytest.raises(ValueError, match=r"is not known; use char, byte, bpe"):
            tokenizer.from_dict(state)
    with pytest.raises(ValueError, match=r"there is no folder no/such/model"):
        make_tokenizer("no/such/model", "text")


@pytest.fixture(scope="module")
def pieces() -> BPETokenizer:
    return BPETokenizer.train([verse()], vocab_size=400)


@given(text=UTF8 | st.text(st.sampled_from("ab 1'!\n\r\t\x1c\u00a0\u2028é😀"), max_size=200))
def test_any_text_comes_back_from_pieces_of_words(pieces: BPETokenizer, text: str) -> None:
    ids = pieces.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert pieces.decode(ids) == text
    assert not text or 0 <= ids.min() <= ids.max() < pieces.vocab_size


LATER = (  # the pattern of Llama 3's words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def later() -> BPETokenizer:
    """Pieces of other words, as Llama 3 cuts them."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LATER), "isolated")
    on_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, on_bytes])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=on_bytes.alphabet(), show_progress=False)
    bpe.train_from_iterator([verse(), "It was.\n\n one\n" * 99], trainer)
    return BPETokenizer(bpe.to_str())


SPACES = [" ", "  ", "\n", "\n\n", " \n", "\n ", "\t", " \u00a0"]


@given(
    words=st.lists(
        st.tuples(st.sampled_from(["a", "it's", "naïve", "12", "was.", "😀!"]), st.sampled_from(SPACES)), max_size=30
    ),
    size=st.integers(16, 40),
)
def test_cutting_a_text_where_a_word_begins_leaves_its_tokens(
    pieces: BPETokenizer, later: BPETokenizer, words: list[tuple[str, str]], size: int
) -> None:
    text = "".join(word + space for word, space in words)
    cuts = list(parts(text, size))
    assert "".join(cuts) == text
    assert all(len(part) <= size for part in cuts)
    if all(a[-1].isalnum() and b[0].isspace() for a, b in pairwise(cuts)):  # otherwise there was no such place
        for bpe in (pieces, later):
            assert [i for part in cuts for i in bpe.encode(part)] == bpe.encode(text).tolist()


@given(text=st.text(max_size=60), size=st.integers(1, 20))
def test_a_text_without_such_a_place_is_cut_anywhere(text: str, size: int) -> None:
    cuts = list(parts(text, size))
    assert "".join(cuts) == text
    assert all(1 <= len(part) <= size for part in cuts) or text == ""


@pytest.mark.parametrize("kind", ["pieces", "later"])
def test_a_long_text_has_the_tokens_that_the_package_gives_it_whole(kind: str, request: pytest.FixtureRequest) -> None:
    bpe: BPETokenizer = request.getfixturevalue(kind)
    for text in (verse(4000), "It was.\n\n one " * 9000, "one\n" * 20_000):
        assert len(list(parts(text, tokenizer._PART))) > 1
        whole = tokenizers.Tokenizer.from_str(bpe.to_json()).encode(text, add_special_tokens=False).ids
        assert bpe.encode(text).tolist() == whole
        assert len(whole) < len(text)


def test_the_end_of_a_text_is_a_token_of_its_own(pieces: BPETokenizer) -> None:
    assert 300 < pieces.vocab_size <= 400
    assert pieces.decode([pieces.end_of_text]) == tokenizer.END_OF_TEXT
    assert pieces.encode(f"a{tokenizer.END_OF_TEXT}b").tolist().count(pieces.end_of_text) == 1
    assert pieces.end_of_text not in pieces.encode(verse())


def test_pieces_survive_json_copying_and_other_processes(pieces: BPETokenizer) -> None:
    for again in (tokenizer.from_dict(json.loads(json.dumps(pieces.to_dict()))), pickle.loads(pickle.dumps(pieces))):
        assert again.to_dict() == pieces.to_dict()
        assert again.encode(verse()).tolist() == pieces.encode(verse()).tolist()


@pytest.mark.parametrize("size", [0, 256, 2**31])
def test_a_vocabulary_must_hold_the_bytes(size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size={size} must be at least 257"):
        BPETokenizer.train(["text"], size)


def test_a_file_of_gpt2s_time_is_read(pieces: BPETokenizer) -> None:
    """Its model has no type, empty strings where there is nothing, and each pair in one string."""
    state = json.loads(pieces.to_json())
    model = state["model"]
    del model["type"]
    model |= {"unk_token": "", "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    assert BPETokenizer(json.dumps(state)).encode(verse()).tolist() == pieces.encode(verse()).tolist()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[1]", b'{"model": 1}', b'{"model": []}', b"[" * 99_999])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used: "):
        tokenizer.from_file(path)


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RuntimeError, match=r'needs the package tokenizers .*; pip install -e "\.\[hf\]"'):
        make_tokenizer("bpe", ["text"])


def test_the_same_text_has_the_same_tokens_also_where_training_dropped_some(pieces: BPETokenizer) -> None:
    state = json.loads(pieces.to_json())
    state["model"]["dropout"] = 0.5
    again = BPETokenizer(json.dumps(state))
    assert again.encode(verse()).tolist() == pieces.encode(verse()).tolist()
    assert again.to_dict() == pieces.to_dict()


def test_no_token_is_left_out_or_filled_in(pieces: BPETokenizer) -> None:
    cut = tokenizers.Tokenizer.from_str(pieces.to_json())
    cut.enable_truncation(5)
    cut.enable_padding(length=9)
    again = BPETokenizer(cut.to_str())
    for text in ("A", verse()):
        assert again.encode(text).tolist() == pieces.encode(text).tolist()
    assert again.to_dict() == pieces.to_dict()


MASK = {
    "id": 400,
    "content": "<mask>",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": " "}, "behavior": "Removed", "invert": False}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
        {"decoder": None},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        {"decoder": {"type": "Fuse"}},
        {"normalizer": {"type": "NFC"}},
        {"added_tokens": [MASK | {"lstrip": True}]},
        {"added_tokens": [MASK | {"content": "é"}]},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "?": 1}, "merges": [], "unk_token": "?", "fuse_unk": True}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"String": "…"}, "behavior": "Removed", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                ],
            }
        },
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "…"}, "content": "..."}},
        {"decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "Fuse"}]}},
        {"pre_tokenizer": None},
    ],
)
def test_a_tokenizer_that_may_change_texts_is_refused(pieces: BPETokenizer, change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not every text comes back from this tokenizer as it was"):
        BPETokenizer(json.dumps(json.loads(pieces.to_json()) | change))


@pytest.mark.parametrize("mark", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_a_tokenizer_that_marks_pieces_is_refused(pieces: BPETokenizer, mark: str) -> None:
    state = json.loads(pieces.to_json())
    state["model"][mark] = "##"
    with pytest.raises(ValueError, match="not every text comes back from this tokenizer as it was"):
        BPETokenizer(json.dumps(state))


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"decoder": None},
        {"added_tokens": [MASK]},
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "word": 1}, "unk_token": ""}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 2}, "unk_token": ""}},
        {"model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}},
    ],
)
def test_characters_that_may_not_come_back_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(CharTokenizer("ab").to_json()) | change), "utf-8")
    with pytest.raises(ValueError, match="not every text comes back from this tokenizer as it was"):
        tokenizer.from_file(path)


def test_a_tokenizer_may_cut_texts_as_it_likes(pieces: BPETokenizer) -> None:
    """As those of later models do: by their own pattern, digits and punctuation apart, then into bytes."""
    on_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cuts = [
        {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "MergedWithPrevious", "invert": False},
        {"type": "Digits", "individual_digits": True},
        {"type": "Punctuation", "behavior": "Isolated"},
        on_bytes,
    ]
    change = {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "normalizer": {"type": "Sequence", "normalizers": []},
    }
    other = BPETokenizer(json.dumps(json.loads(pieces.to_json()) | change))
    text = "In 1599, at the Globe: ÆÐ — 🎭\n" + verse()
    assert other.decode(other.encode(text)) == text
    assert other.encode(text).tolist() != pieces.encode(text).tolist()
