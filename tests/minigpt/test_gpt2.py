"""GPT-2's weights both ways, with Hugging Face's transformers as the judge."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import tinytensor as tt
from minigpt import gpt2
from minigpt.config import GPTConfig
from minigpt.model import GPT
from minigpt.sampling import Sampling, generate
from minigpt.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from tests.minigpt.program import printed
from tests.minigpt.small import verse
from tests.minigpt.torch_gpt import ids, scatter_weights

BLOCK, VOCAB = 16, 300
WORDS = BPETokenizer.train([verse()], VOCAB)
SHAPE = {"vocab_size": VOCAB, "n_positions": BLOCK, "n_embd": 32, "n_layer": 2, "n_head": 4}
GREEDY = Sampling(temperature=0)


def judge(**changes: Any) -> GPT2LMHeadModel:
    """A GPT-2 of transformers whose weights, biases and norms included, are too large for a wrong one to hide."""
    torch.manual_seed(0)
    end = WORDS.end_of_text
    model = GPT2LMHeadModel(GPT2Config(**SHAPE | {"bos_token_id": end, "eos_token_id": end} | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        model.transformer.ln_f.weight *= -1  # the tied head then shuns the token just read, or text would be one token for ever
    return model


@pytest.fixture(name="theirs", scope="module")
def model_of_transformers() -> GPT2LMHeadModel:
    return judge()


@pytest.fixture(name="saved", scope="module")
def folder_of_transformers(theirs: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(WORDS.to_json(), encoding="utf-8")
    return folder


@pytest.fixture(name="folder")
def a_copy_to_change(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(name="warnings")
def what_transformers_warns_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Its messages; it has a logger of its own, which tells no other."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    monkeypatch.setattr(handler, "emit", lambda record: messages.append(record.getMessage()))
    transformers.utils.logging.add_handler(handler)
    yield messages
    transformers.utils.logging.remove_handler(handler)


def ours(model: GPT, batch: np.ndarray) -> np.ndarray:
    with tt.no_grad():
        return model.eval()(batch)[0].numpy()


def logits(model: Any, batch: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(ids(batch)).logits.float().numpy()


def batch(B: int, T: int, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(T).integers(0, vocab, (B, T))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder: Path, turn: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Another weights file from the tensors of this one."""
    path = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in turn(load_file(path)).items()}, path)


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        gpt2.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_logits_are_those_of_transformers_at_every_length(theirs: GPT2LMHeadModel, saved: Path) -> None:
    model = GPT.from_pretrained(saved)
    assert model.config == GPTConfig(VOCAB, BLOCK, n_layer=2, n_head=4, n_embd=32, bias=True)
    assert all(p.data.flags.c_contiguous for p in model.parameters())  # as training likes them
    for T in range(1, BLOCK + 1):
        expected = logits(theirs, batch(3, T))
        assert expected.std() > 1
        np.testing.assert_allclose(ours(model, batch(3, T)), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours(model.for_sampling(), batch(3, BLOCK)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = judge().to(dtype)
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert {p.dtype.name for p in model.parameters()} == {"float32"}
    np.testing.assert_allclose(ours(model, batch(2, BLOCK)), logits(theirs.float(), batch(2, BLOCK)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_shapes_that_gpt2_may_have(tmp_path: Path, activation: str) -> None:
    changes = {"n_layer": 1, "n_head": 3, "n_embd": 24, "vocab_size": 7, "n_positions": 5, "n_inner": 96}
    theirs = judge(**changes, activation_function=activation, bos_token_id=None, eos_token_id=None)
    theirs.save_pretrained(tmp_path)
    found = gpt2.load(tmp_path, dropout=0.25)
    assert (found.config.dropout, found.tokenizer) == (0.25, None)
    model = GPT.from_weights(found.config, found.weights)
    np.testing.assert_allclose(ours(model, batch(2, 5, 7)), logits(theirs, batch(2, 5, 7)), rtol=0, atol=1e-4)


def test_greedy_text_is_that_of_transformers_token_for_token(theirs: GPT2LMHeadModel, saved: Path) -> None:
    """Theirs in one batch, the shorter prompts padded at their left; none of these tokens is an end."""
    model = GPT.from_pretrained(saved).for_sampling()
    prompts = [batch(1, T)[0] for T in (1, 2, 4, 6)]
    padded = np.stack([np.pad(prompt, (6 - len(prompt), 0)) for prompt in prompts])
    mask = np.stack([np.arange(6) >= 6 - len(prompt) for prompt in prompts])
    written = theirs.generate(
        ids(padded), attention_mask=ids(mask), max_new_tokens=BLOCK - 6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for prompt, expected in zip(prompts, written[:, 6:].tolist(), strict=True):
        assert list(generate(model, prompt, BLOCK - 6, GREEDY)) == expected
        assert len(set(expected)) >= 3
    for prompt in prompts:  # alone, to the end of the context
        alone = theirs.generate(
            ids(prompt[None]), max_new_tokens=BLOCK - len(prompt), do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert list(generate(model, prompt, BLOCK - len(prompt), GREEDY)) == alone[0, len(prompt) :].tolist()


def bare(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("transformer."): t for name, t in tensors.items()}


def with_masks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, BLOCK, BLOCK).tril() for i in range(2)}
    return bare(tensors) | masks | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}


def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


@pytest.mark.parametrize("turn", [bare, with_masks, with_head])
def test_files_of_every_age_hold_the_same_model(theirs: GPT2LMHeadModel, folder: Path, turn: Any) -> None:
    rewrite(folder, turn)
    np.testing.assert_allclose(ours(GPT.from_pretrained(folder), batch(2, 9)), logits(theirs, batch(2, 9)), rtol=0, atol=1e-4)


@pytest.fixture(name="shards")
def model_in_shards(theirs: GPT2LMHeadModel, tmp_path: Path) -> Path:
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


def test_shards_are_one_model(theirs: GPT2LMHeadModel, shards: Path) -> None:
    np.testing.assert_allclose(ours(GPT.from_pretrained(shards), batch(2, 9)), logits(theirs, batch(2, 9)), rtol=0, atol=1e-4)


def test_shards_that_are_not_whole_are_refused(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    told = f"{index}: weight_map does not name a safetensors file beside it for each tensor; fetch it again"
    for wrong in (None, [], {"a": 1}, {"a": "../model.safetensors"}, {"a": ""}, {"a": "model.bin"}):
        change(index, weight_map=wrong)
        assert refusal(shards) == told
    change(index, weight_map={name: file for name, file in files.items() if name != "transformer.ln_f.bias"})
    assert "missing ln_f.bias (32,)" in refusal(shards)
    change(index, weight_map=files)
    (shards / files["transformer.wpe.weight"]).unlink()
    assert refusal(shards).endswith(f"has no {files['transformer.wpe.weight']}, which {index.name} names; fetch it again")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not 'gpt2'; use a model of GPT-2's kind"),
        ({"activation_function": "relu"}, "activation_function='relu' is not computed here; use a model with gelu_new or"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 is not computed here; use a model with 1e-05"),
        ({"n_inner": 100}, "n_inner=100 is not computed here; use a model with 128"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False is not computed here; use a model with True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not .* with False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not computed here; use a model with True"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not computed here; use a model with False"),
        ({"n_head": 5}, "n_embd=32 is not divisible by n_head=5; use 30 or 35"),
        ({"n_embd": None}, "n_embd=None must be a whole number of at least 1"),
        ({"vocab_size": "300"}, "vocab_size='300' must be a whole number of at least 1"),
    ],
)
def test_what_would_give_other_numbers_is_refused(folder: Path, values: dict[str, Any], message: str) -> None:
    change(folder / "config.json", **values)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        gpt2.load(folder)


def test_sizes_may_have_the_names_that_other_models_give_them(theirs: GPT2LMHeadModel, folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    others = {other: values.pop(name) for name, other in gpt2._ALSO.items()}
    path.write_text(json.dumps(values | others))
    assert GPT2Config.from_pretrained(folder).to_dict().items() >= {"n_head": 4, "n_embd": 32}.items()
    np.testing.assert_allclose(ours(GPT.from_pretrained(folder), batch(2, 9)), logits(theirs, batch(2, 9)), rtol=0, atol=1e-4)
    change(path, n_head=4)
    gpt2.load(folder)
    change(path, n_head=2)
    assert refusal(folder) == f"{path}: n_head=2 but num_attention_heads=4; remove the wrong one"


def test_sizes_that_a_configuration_leaves_out_are_gpt2s(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1}')
    assert "has shape (32,) where config.json makes it (768,)" in refusal(folder)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "h.1.ln_2" not in k}, "missing h.1.ln_2.weight (32,); missing h.1.ln_2.bias"),
        (lambda t: t | {"transformer.wpe.weight": torch.ones(17, 32)}, "wpe.weight has shape (17, 32) where config.json makes"),
        (lambda t: t | {"score.weight": torch.ones(2, 32)}, "unexpected score.weight (2, 32)"),
        (lambda t: t | {"wpe.weight": torch.ones(16, 32)}, "both wpe.weight and transformer.wpe.weight; remove the wrong one"),
        (lambda t: t | {"transformer.h.2.ln_1.bias": torch.ones(32)}, "unexpected h.2.ln_1.bias (32,)"),
        (lambda t: t | {"transformer.h.0.attn.c_attn.weight": torch.ones(96, 32)}, "h.0.attn.c_attn.weight has shape (96, 32)"),
        (
            lambda t: t | {"transformer.ln_f.bias": torch.ones(32, dtype=torch.int8)},
            "ln_f.bias has dtype I8, not one of F64, F32, F16, BF16",
        ),
        (lambda t: t | {"lm_head.weight": torch.ones(VOCAB, 32)}, "lm_head.weight is not wte.weight, as it always is here"),
        (lambda t: t | {"lm_head.weight": torch.ones(VOCAB, 31)}, "lm_head.weight has shape (300, 31)"),
        (lambda t: {f"a.{k}": v for k, v in t.items()}, "and 48 more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, turn: Any, message: str) -> None:
    rewrite(folder, turn)
    assert message in refusal(folder)


def test_damaged_files_are_named(folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:100], whole[:3], b"", b"\xff" * 200, whole + b"\0"):
        weights.write_bytes(damaged)
        assert refusal(folder).startswith(f"{weights} is not a whole safetensors file")
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    assert "has neither model.safetensors nor model.safetensors.index.json, and other formats are not read" in refusal(folder)
    for damaged in (b"{", b"\xff", b"[" * 100_000):
        config.write_bytes(damaged)
        assert refusal(folder).startswith(f"{config} is not JSON")
    config.write_text("[]")
    assert refusal(folder) == f"{config} holds no JSON object; fetch it again"
    config.unlink()
    assert "has no config.json; name the folder of a model" in refusal(folder)


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert refusal(folder).startswith(f"{folder / 'tokenizer.json'} cannot be used")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{")
    (folder / "merges.txt").write_text("a b")
    assert refusal(folder).startswith(f"{folder / 'vocab.json'} and merges.txt cannot be used")


def test_both_forms_of_a_vocabulary_are_one_tokenizer(folder: Path) -> None:
    whole = gpt2.load(folder).tokenizer
    (folder / "tokenizer.json").unlink()
    assert gpt2.load(folder).tokenizer is None
    state = json.loads(WORDS.to_json())["model"]
    (folder / "vocab.json").write_text(json.dumps(state["vocab"]), encoding="utf-8")
    assert gpt2.load(folder).tokenizer is None
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]), encoding="utf-8")
    pair = gpt2.load(folder).tokenizer
    text = verse(5) + f"{END_OF_TEXT} Ünseen words,  two spaces\r\n\t😀{END_OF_TEXT}"
    assert whole is not None
    assert pair is not None
    assert pair.encode(text).tolist() == whole.encode(text).tolist() == WORDS.encode(text).tolist()
    assert pair.decode(pair.encode(text)) == text
    assert pair.end_of_text == whole.end_of_text == WORDS.end_of_text


def test_rows_that_pad_the_vocabulary_are_cropped_for_speech(folder: Path) -> None:
    theirs = judge(vocab_size=VOCAB + 20)
    with torch.no_grad():
        theirs.transformer.wte.weight[VOCAB:] *= 10  # so that a row without a token would be the likeliest
    theirs.save_pretrained(folder)
    found = gpt2.load(folder)
    assert found.weights["wte.weight"].shape == (VOCAB + 20, 32)
    expected = logits(theirs, batch(2, BLOCK))
    assert (expected.argmax(-1) >= VOCAB).any()
    model = GPT.from_weights(*found.cropped()[:2])
    assert model.config.vocab_size == VOCAB
    np.testing.assert_allclose(ours(model, batch(2, BLOCK)), expected[..., :VOCAB], rtol=0, atol=1e-4)
    (folder / "tokenizer.json").unlink()
    assert gpt2.load(folder).cropped().config.vocab_size == VOCAB + 20


def test_a_tokenizer_with_more_ids_than_rows_is_refused(folder: Path) -> None:
    judge(vocab_size=VOCAB - 1).save_pretrained(folder)
    with pytest.raises(ValueError, match="the tokenizer has 300 ids and the model 299 rows for them"):
        gpt2.load(folder).cropped()


def test_the_arrays_are_adopted_and_no_others_drawn(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpt2.load(saved)
    monkeypatch.setattr(tt.backend.random, "normal", None)
    monkeypatch.setattr(tt.backend.random, "uniform", None)
    model = GPT.from_weights(found.config, found.weights)
    assert all(p.data is found.weights[name] for name, p in model.named_parameters())
    assert all(a.flags.writeable and a.dtype == np.float32 for a in found.weights.values())


RESIDENT = """
import sys
from minigpt.model import GPT

def most() -> int:
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024

before = most()
model = GPT.from_pretrained(sys.argv[1])
print((most() - before) / (4 * model.config.parameter_count()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process its largest size here")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    config = GPTConfig(vocab_size=4096, block_size=64, n_layer=4, n_head=8, n_embd=512, bias=True)
    with tt.nn.init.skip():
        model = GPT(config)
    for p in model.parameters():
        p.data[...] = 0.5
    gpt2.dump(gpt2.Pretrained(config, {name: p.data for name, p in model.named_parameters()}, CharTokenizer("ab")), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert 0.95 < float(printed(RESIDENT, str(tmp_path))) < 1.35


TEXT = verse(5) + "naïve €\r\n\ttwo  spaces , . 's n't \u2028é e\u0301😀\x00\x7f ROMEO:\n\n"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "words", [CharTokenizer.from_text(TEXT), ByteTokenizer(), WORDS], ids=lambda words: type(words).__name__
)
def test_ours_is_read_by_transformers_and_comes_back(
    tmp_path: Path, words: Tokenizer, bias: bool, warnings: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = GPT(GPTConfig(words.vocab_size, 300, n_layer=2, n_head=4, n_embd=32, dropout=0.1, bias=bias))
    scatter_weights(model)
    gpt2.dump(gpt2.Pretrained(model.config, model.state_dict(), words), tmp_path)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    given = tokenizer(TEXT[-200:], return_tensors="pt")
    written = theirs.generate(**given, do_sample=False)  # as far as the context goes
    theirs.save_pretrained(tmp_path / "again")
    assert (warnings, [str(w.message) for w in recwarn]) == ([], [])

    assert tokenizer(TEXT[-200:])["input_ids"] == words.encode(TEXT[-200:]).tolist()
    assert tokenizer.decode(words.encode(TEXT).tolist()) == TEXT
    assert len(tokenizer) == words.vocab_size
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == theirs.config.eos_token_id == words.end_of_text
    x = batch(2, 64, words.vocab_size)
    np.testing.assert_allclose(ours(model, x), logits(theirs, x), rtol=0, atol=1e-4)
    prompt = words.encode(TEXT[-200:])
    new = written[0, len(prompt) :].tolist()
    assert len(prompt) + len(new) == 300 or new[-1] == words.end_of_text
    assert list(generate(model, prompt, len(new), GREEDY)) == new

    for folder in (tmp_path, tmp_path / "again"):
        found = gpt2.load(folder)
        assert found.config == replace(model.config, dropout=0.0, bias=True)
        state = model.state_dict()
        zeros = {name for name in found.weights if name not in state}
        assert all(found.weights[name].tobytes() == a.tobytes() for name, a in state.items())
        assert zeros == (set() if bias else {name for name in found.weights if name.endswith("bias")})
        assert not any(found.weights[name].any() for name in zeros)
    back = gpt2.load(tmp_path).tokenizer
    assert back is not None
    assert back.encode(TEXT).tolist() == words.encode(TEXT).tolist()
    assert back.decode(words.encode(TEXT)) == TEXT
    assert (back.vocab_size, back.end_of_text) == (words.vocab_size, words.end_of_text)


def test_a_character_without_a_token_does_not_pass_silently(tmp_path: Path) -> None:
    words = CharTokenizer("abc")
    gpt2.dump(gpt2.Pretrained((model := GPT(GPTConfig(3, 4, 1, 1, 4))).config, model.state_dict(), words), tmp_path)
    with pytest.raises(Exception, match=r"WordLevel error"):
        AutoTokenizer.from_pretrained(tmp_path)("abd")
    back = gpt2.load(tmp_path).tokenizer
    assert back is not None
    with pytest.raises(ValueError, match=r"character 'd' .* is not in the model's vocabulary of 3 symbols"):
        back.encode("abd")
