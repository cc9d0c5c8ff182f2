"""Choosing the next token, and text from it."""

import codecs
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytensor as tt
from minigpt import sampling
from minigpt.checkpoint import Checkpoint, load
from minigpt.config import GPTConfig
from minigpt.model import GPT
from minigpt.sampling import Sampling, generate, speak
from minigpt.tokenizer import ByteTokenizer
from tests.minigpt.small import trainer, verse
from tests.minigpt.torch_gpt import scatter_weights
from tinytensor import random

NONE = np.array([], np.int64)
LOGITS = np.array([1.0, 3.0, -2.0, 2.0, 0.5])


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def scattered(dtype: str = "float64", block_size: int = 7) -> GPT:
    """A model whose greedy text is not one token for ever."""
    with random.scope(0):
        model = GPT(GPTConfig(vocab_size=13, block_size=block_size, n_layer=2, n_head=2, n_embd=8)).to(dtype)
    scatter_weights(model, seed=4)
    model.ln_f.weight.data *= -1  # the tied head then shuns the token just read
    return model.eval()


def constant(logits: np.ndarray) -> GPT:
    """A model with these logits whatever it reads."""
    n = len(logits)
    model = GPT(GPTConfig(vocab_size=n, block_size=2, n_layer=1, n_head=1, n_embd=n)).to("float64")
    model.wte.weight.data[...] = np.eye(n)
    model.ln_f.weight.data[...] = 0
    model.ln_f.bias.data[...] = logits
    return model.eval()


def naive(model: GPT, ids: list[int], max_tokens: int, how: Sampling, sample: int = 0) -> list[int]:
    """The whole context, cropped, through the whole model for every token; the distribution written the plain way."""
    context = list(ids)
    for position in range(max_tokens):
        with tt.no_grad():
            z = model(np.array([context[-model.config.block_size :]]))[0].numpy()[0, -1].astype(np.float64)
        for token in set(context):
            z[token] = z[token] / how.repetition_penalty if z[token] > 0 else z[token] * how.repetition_penalty
        if how.temperature == 0:
            context.append(int(np.argmax(z)))
            continue
        p = softmax(z / how.temperature)
        likeliest = sorted(range(len(p)), key=lambda i: -p[i])[: how.top_k]
        kept: list[int] = []
        for token in likeliest:
            if how.top_p is None or sum(p[i] for i in kept) < how.top_p * sum(p[i] for i in likeliest):
                kept.append(token)
        u = random.uniform(random.Key(how.seed, "sample", sample, position), (), np.dtype(np.float64))
        u *= sum(p[i] for i in kept)
        for token in sorted(kept):
            u -= p[token]
            if u < 0:
                break
        context.append(token)
    return context[len(ids) :]


WAYS = [
    Sampling(temperature=0),
    Sampling(temperature=1.0),
    Sampling(temperature=2.5, top_k=5),
    Sampling(temperature=1.5, top_p=0.7, seed=3),
    Sampling(temperature=2.0, top_k=6, top_p=0.9, repetition_penalty=1.3),
]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("prompt", [[4], [1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1]])
def test_generation_is_that_of_a_naive_loop_far_beyond_the_context(how: Sampling, prompt: list[int]) -> None:
    model = scattered()
    expected = naive(model, prompt, 40, how)
    assert len(set(expected)) > 3
    assert list(generate(model, np.array(prompt), 40, how)) == expected
    assert list(generate(model, np.array(prompt), 40, how, use_cache=False)) == expected


@pytest.mark.parametrize("how", WAYS[:2])
def test_the_cache_changes_no_token_in_float32(how: Sampling) -> None:
    model = scattered("float32", block_size=32)
    cached, fresh = (list(generate(model, np.array([1, 2]), 60, how, use_cache=use)) for use in (True, False))
    assert cached == fresh
    assert len(set(cached)) > 3


def test_a_prompt_beyond_the_context_counts_by_its_end() -> None:
    model = scattered()
    for use_cache in (True, False):
        long, short = (
            list(generate(model, np.array(prompt), 20, Sampling(), use_cache=use_cache))
            for prompt in ([3] * 50 + [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7])
        )
        assert long == short


def test_the_context_may_be_one_token() -> None:
    model = scattered(block_size=1)
    assert list(generate(model, np.array([1, 2]), 10, Sampling())) == naive(model, [1, 2], 10, Sampling())


def test_seeds_and_samples_choose_and_repeat() -> None:
    model = scattered()

    def text(seed: int, sample: int) -> tuple[int, ...]:
        return tuple(generate(model, np.array([1]), 20, Sampling(temperature=1.0, seed=seed), sample))

    different = {text(seed, sample) for seed in (0, 1, 2) for sample in (0, 1, 2)}
    assert len(different) == 9
    tt.manual_seed(99)
    with random.scope(4, 5, 6):
        assert text(2, 1) in different
        assert text(2, 1) == text(2, 1)
    assert text(2, 1)[:7] == tuple(generate(model, np.array([1]), 7, Sampling(temperature=1.0, seed=2), 1))


@pytest.mark.parametrize(
    "how", [Sampling(temperature=1.0), Sampling(temperature=0.5), Sampling(temperature=2.0, top_k=3), Sampling(top_p=0.6)]
)
def test_tokens_come_as_often_as_their_probability_says(how: Sampling) -> None:
    expected = softmax(LOGITS / how.temperature)
    if how.top_k:
        expected[[2, 4]] = 0
    if how.top_p:
        expected[[0, 2, 4, 3]] = 0  # the likeliest has more than 0.6
    expected /= expected.sum()
    draws = 1500
    counts = np.bincount(list(generate(constant(LOGITS), np.array([0]), draws, how)), minlength=5)
    deviations = np.sqrt(draws * expected * (1 - expected))
    assert (np.abs(counts - draws * expected) <= 4 * deviations).all()
    assert not counts[expected == 0].any()


def test_temperature_zero_is_the_likeliest_token() -> None:
    assert Sampling(temperature=0).probabilities(LOGITS, NONE).tolist() == [0, 1, 0, 0, 0]
    assert list(generate(constant(LOGITS), np.array([0]), 5, Sampling(temperature=0))) == [1] * 5
    assert Sampling(temperature=1e-3).probabilities(LOGITS, NONE).tolist() == [0, 1, 0, 0, 0]
    tie = np.array([0.0, 2.0, 2.0])
    assert Sampling(temperature=0).probabilities(tie, NONE).tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    p = Sampling(temperature=temperature).probabilities(LOGITS.astype(np.float32), NONE)
    assert p.dtype == np.float64
    np.testing.assert_allclose(p, softmax(LOGITS / temperature), rtol=1e-12)


@pytest.mark.parametrize(("k", "kept"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_k_likeliest(k: int, kept: list[int]) -> None:
    p = Sampling(temperature=1.0, top_k=k).probabilities(LOGITS, NONE)
    assert np.flatnonzero(p).tolist() == kept
    np.testing.assert_allclose(p[kept], softmax(LOGITS[kept]), rtol=1e-12)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, [1]), (0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (0.76, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float, kept: list[int]) -> None:
    logits = np.log([0.125, 0.5, 0.25, 0.125])
    if top_p == 0.76:
        kept = [0, 1, 2]  # of the two that tie, the first
    p = Sampling(temperature=1.0, top_p=top_p).probabilities(logits, NONE)
    assert np.flatnonzero(p).tolist() == kept
    np.testing.assert_allclose(p[kept], softmax(logits[kept]), rtol=1e-12)


def test_top_p_counts_within_top_k() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    p = Sampling(temperature=1.0, top_k=2, top_p=0.5).probabilities(logits, NONE)
    assert np.flatnonzero(p).tolist() == [0]  # 0.4 of 0.7 is more than half
    p = Sampling(temperature=1.0, top_k=2, top_p=0.6).probabilities(logits, NONE)
    np.testing.assert_allclose(p, [4 / 7, 3 / 7, 0, 0], rtol=1e-12)


def test_the_repetition_penalty_makes_what_was_said_less_likely() -> None:
    how = Sampling(temperature=1.0, repetition_penalty=2.0)
    p = how.probabilities(LOGITS, np.array([1, 2, 1, 1]))
    np.testing.assert_allclose(p, softmax(np.array([1.0, 1.5, -4.0, 2.0, 0.5])), rtol=1e-12)
    assert LOGITS.tolist() == [1.0, 3.0, -2.0, 2.0, 0.5]  # untouched
    greedy = replace(how, temperature=0)
    assert greedy.probabilities(LOGITS, np.array([1])).argmax() == 3
    assert list(generate(constant(LOGITS), np.array([1]), 3, greedy)) == [3, 1, 1]


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    temperature=st.floats(0, 10),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0, 1, exclude_min=True),
    penalty=st.floats(0.1, 10),
)
def test_probabilities_are_probabilities(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None, penalty: float
) -> None:
    z = np.array(logits, np.float32)
    p = Sampling(temperature, top_k, top_p, penalty).probabilities(z, np.arange(len(z) // 2))
    assert p.shape == z.shape
    assert (p >= 0).all()
    assert p.sum() == pytest.approx(1)
    assert top_k is None or np.count_nonzero(p) <= top_k
    if penalty == 1 or len(z) < 2:
        assert p[z.argmax()] == p.max()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be finite and not negative"),
        ({"temperature": np.inf}, "temperature=inf must be finite and not negative"),
        ({"temperature": np.nan}, "temperature=nan must be finite and not negative"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1"),
        ({"top_p": np.nan}, "top_p=nan must be above 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive"),
        ({"repetition_penalty": np.nan}, "repetition_penalty=nan must be positive"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_model_that_diverged_says_so(temperature: float) -> None:
    for bad in (np.nan, np.inf):
        logits = LOGITS.copy()
        logits[3] = bad
        with pytest.raises(ValueError, match=r"logits are not finite"):
            Sampling(temperature).probabilities(logits, NONE)
        with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=r"logits are not finite"):
            next(generate(constant(logits), np.array([0]), 1, Sampling(temperature)))


@pytest.mark.filterwarnings("error")
def test_settings_at_the_edge_of_numbers_choose_or_say_why_not() -> None:
    with pytest.raises(ValueError, match=r"repetition_penalty=1e-320 takes logits beyond all numbers; choose one nearer to 1"):
        Sampling(repetition_penalty=1e-320).probabilities(LOGITS, np.array([1]))
    assert Sampling(1.0, repetition_penalty=1e308).probabilities(-LOGITS * 100, np.array([1, 3])).argmax() == 2
    assert Sampling(temperature=1e-320).probabilities(LOGITS, NONE).tolist() == [0, 1, 0, 0, 0]


def test_logits_of_minus_infinity_forbid_a_token() -> None:
    p = Sampling(temperature=1.0).probabilities(np.array([0.0, -np.inf, 0.0]), NONE)
    assert p.tolist() == [0.5, 0, 0.5]


def test_generation_leaves_the_model_as_it_was() -> None:
    model = scattered().train()
    stream = generate(model, np.array([1]), 3, Sampling())
    next(stream)
    assert model.training
    list(stream)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_dropout_has_no_part_in_generation() -> None:
    model = scattered()
    expected = list(generate(model, np.array([1]), 20, Sampling()))
    model.train()
    model.drop.p = model.h[0].attn.attn_dropout = 0.5
    assert list(generate(model, np.array([1]), 20, Sampling())) == expected


def test_nothing_is_asked_of_an_empty_prompt() -> None:
    with pytest.raises(ValueError, match="the prompt is empty; give at least one token"):
        next(generate(scattered(), NONE, 1))
    assert list(generate(scattered(), np.array([1]), 0)) == []


@pytest.fixture(name="spoken", scope="module")
def trained_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("run")
    made = trainer(folder)
    made.val_loss = made.evaluate()
    made.save()
    return load(folder / "last.safetensors")


def test_speech_is_the_prompt_and_what_follows(spoken: Checkpoint) -> None:
    how = Sampling(seed=4)
    ids = spoken.tokenizer.encode("ANNA:\n")
    continuations = [
        spoken.tokenizer.decode(generate(spoken.build_model(), ids, 12, how, sample=sample)) for sample in range(3)
    ]
    assert len(set(continuations)) == 3
    text = "".join(speak(spoken.build_model(), spoken.tokenizer, "ANNA:\n", 12, 3, how))
    assert text == "---\n".join(f"ANNA:\n{continuation}\n" for continuation in continuations)
    assert "".join(speak(spoken.build_model(), spoken.tokenizer, "ANNA:\n", 0, 1, how)) == "ANNA:\n\n"


def test_speech_arrives_token_by_token(spoken: Checkpoint) -> None:
    pieces = list(speak(spoken.build_model(), spoken.tokenizer, "A", 30, 1, Sampling()))
    assert pieces[0] == "A"
    assert [len(piece) for piece in pieces[1:-1]] == [1] * 30


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "samples", "message"),
    [
        ("ANNA: ð", 5, 1, r"character 'ð' \(U\+00F0\) at position 6 is not in the model's vocabulary of \d+ symbols"),
        ("", 5, 1, "the prompt is empty; give at least one character"),
        ("A", -1, 1, "max_tokens=-1 must not be negative"),
        ("A", 5, 0, "num_samples=0 must be at least 1"),
    ],
)
def test_what_cannot_be_spoken_is_refused(spoken: Checkpoint, prompt: str, max_tokens: int, samples: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(speak(spoken.build_model(), spoken.tokenizer, prompt, max_tokens, samples, Sampling()))


@pytest.mark.parametrize(
    "written",
    [
        "naïve €, 😀!".encode(),
        "😀".encode() * 3,
        b"cut short \xf0\x9f\x98",
        b"not \xff\xfe text \xe2\x82 at all",
        b"\xe2",
        b"",
        verse(3).encode(),
    ],
)
def test_characters_of_several_bytes_are_never_torn(
    monkeypatch: pytest.MonkeyPatch, spoken: Checkpoint, written: bytes
) -> None:

    def dictated(*_: Any, **__: Any) -> Iterator[int]:
        yield from written

    monkeypatch.setattr(sampling, "generate", dictated)
    pieces = list(speak(spoken.build_model(), ByteTokenizer(), "→ ", 99, 1, Sampling()))
    assert "".join(pieces) == "→ " + written.decode("utf-8", "replace") + "\n"
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    _, *pieces = pieces
    steps = [decoder.decode(bytes([b])) for b in written]
    if "\ufffd" not in "".join(steps):  # every character comes with its last byte, and only then
        whole = [step for step in steps if step]
        assert pieces[: len(whole)] == whole
