"""Training that begins with weights that are there already."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt import GPT, GPTConfig, gpt2, start
from minigpt.checkpoint import BEST, LAST, load
from minigpt.config import TrainConfig
from minigpt.corpus import read_text
from minigpt.export import write_folder
from minigpt.run import run
from minigpt.tokenizer import BPETokenizer
from minigpt.tokens import prepare
from minigpt.trainer import Trainer
from tests.minigpt.small import TINY, interrupted, record, verse

FIT = {"n_layer": 3, "n_head": 2, "n_embd": 12}  # flags that a preset would not set: what is the preset's passes for not asked
SHAPE = GPTConfig(vocab_size=320, block_size=16, **FIT)


@pytest.fixture(name="model")
def folder_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GPT:
    """A model in ./model, with more rows in its vocabulary than its tokenizer names, and a text."""
    monkeypatch.chdir(tmp_path)
    Path("verse.txt").write_text(verse(), encoding="utf-8")
    model = GPT(SHAPE)
    Path("model").mkdir()
    for i, p in enumerate(model.parameters()):
        p.data += np.random.default_rng(i).normal(0, 0.2, p.shape).astype(np.float32)
    gpt2.dump(gpt2.Pretrained(SHAPE, model.state_dict(), BPETokenizer.train([verse()], 300)), Path("model"))
    return model


def config(**changes: Any) -> TrainConfig:
    return replace(TINY, **({"data": Path("verse.txt"), "init_from": "model", "preset": "quick"} | changes))


def test_a_run_begins_with_the_weights(model: GPT) -> None:
    out_dir = run(config(**FIT, lr=0.0, min_lr=0.0, max_steps=1, eval_interval=1, block_size=16))
    saved = load(out_dir / LAST)
    expected = model.state_dict()
    expected["wte.weight"] = expected["wte.weight"][:300]  # the rows of padding are gone
    assert {name: a.tobytes() for name, a in saved.model.items()} == {name: a.tobytes() for name, a in expected.items()}
    assert (saved.config.n_layer, saved.config.n_embd, saved.config.bias, saved.config.tokenizer) == (3, 12, True, "bpe")
    assert saved.build_model().config == replace(SHAPE, vocab_size=300)


def test_the_context_may_be_shorter(model: GPT) -> None:
    settings, found = start.weights(config(**FIT, block_size=8), read_text(Path("verse.txt")))
    assert found is not None
    assert np.array_equal(found.weights["wpe.weight"], model.wpe.weight.numpy()[:8])
    assert found.config.block_size == 8
    made = Trainer(settings, read_text(Path("verse.txt")), Path("nowhere"), pretrained=found)
    ids = np.arange(8)[None]
    assert np.array_equal(made.model.eval()(ids)[0].numpy(), model.eval()(ids)[0].numpy()[..., :300])
    assert made.model.h[0].attn.c_attn.weight.data.flags.c_contiguous


def test_it_trains_and_goes_on_bit_for_bit_without_the_weights_it_began_with(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(**FIT, bias=True, dropout=0.1)
    whole = record(run(replace(settings, out_dir=Path("whole"))))
    interrupted(replace(settings, out_dir=Path("run")), 4, monkeypatch)
    Path("model").rename("elsewhere")
    assert record(run(replace(settings, out_dir=Path("run"), resume=True))) == whole
    assert whole["metrics"][-1]["val_loss"] < whole["metrics"][2]["val_loss"]


def test_an_exported_run_goes_on_with_prepared_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("verse.txt").write_text(verse(), encoding="utf-8")
    out = write_folder(run(replace(TINY, data=Path("verse.txt"))))
    made = prepare([Path("verse.txt")], Path("tokens"), "char")
    settings, found = start.weights(replace(TINY, data=Path("tokens"), init_from=str(out), preset="mine"), made)
    assert found is not None and found.tokenizer is not None
    assert made.tokens(settings, found.tokenizer)[0].to_dict() == found.tokenizer.to_dict()
    assert (found.config.block_size, found.tokenizer.kind) == (settings.block_size, "char")


def test_a_run_may_begin_where_another_ended(model: GPT) -> None:
    first = run(replace(TINY, data=Path("verse.txt"), out_dir=Path("first")))
    Path("other.txt").write_text(verse(200, seed=5), encoding="utf-8")
    settings, found = start.weights(replace(TINY, init_from="first", preset="quick"), read_text(Path("other.txt")))
    saved = load(first / BEST)
    assert found is not None
    assert settings == replace(TINY, init_from="first", preset="quick")
    assert all(np.array_equal(a, saved.model[name]) for name, a in found.weights.items())
    run(replace(settings, data=Path("other.txt"), out_dir=Path("second")))


def test_a_model_without_a_tokenizer_takes_that_of_the_tokens(model: GPT) -> None:
    Path("model/tokenizer.json").rename("tokenizer.json")
    Path("named").mkdir()
    with pytest.raises(ValueError, match=r"model has no tokenizer; name a model that has the right one with --tokenizer"):
        run(config(**FIT))
    Path("tokenizer.json").rename("named/tokenizer.json")
    named = run(config(**FIT, tokenizer="named", out_dir=Path("one")))
    prepare([Path("verse.txt")], Path("made"), "named")
    prepared = run(config(**FIT, data=Path("made"), out_dir=Path("two")))
    assert record(named) == record(prepared)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 5}, r"n_layer=5 does not fit the weights of model, which have 3; leave it out"),
        ({"block_size": 17}, r"block_size=17 is more than the 16 positions of model; use 16"),
        ({"tokenizer": "char"}, r"model brings its own tokenizer; leave out --tokenizer and --vocab-size"),
        ({"init_from": "a/b/c"}, r"there is no folder a/b/c"),
        ({"init_from": "empty"}, r"empty has no config\.json"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(model: GPT, changes: dict[str, Any], message: str) -> None:
    Path("empty").mkdir()
    before = sorted(Path().iterdir())
    with pytest.raises(ValueError, match=message):
        run(config(**(FIT | changes)))
    assert sorted(Path().iterdir()) == before
