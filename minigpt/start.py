"""What a run starts from: the text that its settings name, and the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from minigpt import checkpoint, gpt2
from minigpt.config import PRESETS, TrainConfig
from minigpt.corpus import load_corpus, read_text
from minigpt.gpt2 import Pretrained
from minigpt.tokenizer import KINDS, make_tokenizer
from minigpt.tokens import Text, TokenFile, is_prepared, open_tokens

DATA = Path("data")
_SHAPE = ("n_layer", "n_head", "n_embd", "bias")


def text(config: TrainConfig) -> Text:
    """The text to train on."""
    if config.data is None:
        return load_corpus(config.source, DATA)
    return open_tokens(config.data) if is_prepared(config.data) else read_text(config.data)


def weights(config: TrainConfig, corpus: Text) -> tuple[TrainConfig, Pretrained | None]:
    """The weights that `init_from` names, if it names any, and the settings with the shape of their model."""
    if config.init_from is None:
        return config, None
    found = model(config.init_from)
    for name in _SHAPE:
        asked, has = getattr(config, name), getattr(found.config, name)
        if asked not in (has, getattr(PRESETS[config.preset], name)):
            raise ValueError(f"{name}={asked} does not fit the weights of {config.init_from}, which have {has}; leave it out")
    if config.block_size > found.config.block_size:
        most = found.config.block_size
        raise ValueError(f"block_size={config.block_size} is more than the {most} positions of {config.init_from}; use {most}")
    fitting = _with_tokenizer(found, config, corpus).cropped()
    fitting.weights["wpe.weight"] = fitting.weights["wpe.weight"][: config.block_size]
    return replace(config, **{name: getattr(found.config, name) for name in _SHAPE}), fitting


def model(source: str) -> Pretrained:
    """The model of a run's folder or checkpoint file, or GPT-2's of a Hugging Face folder or the hub."""
    if checkpoint.saved_in(Path(source)) or Path(source).is_file():
        return checkpoint.load_run(Path(source)).pretrained()
    return gpt2.load(source)


def _with_tokenizer(found: Pretrained, config: TrainConfig, corpus: Text) -> Pretrained:
    """Weights whose folder had no tokenizer, with the one of the prepared text, or of the model that `tokenizer` names."""
    if found.tokenizer is not None:
        if config.tokenizer is not None:
            raise ValueError(f"{config.init_from} brings its own tokenizer; leave out --tokenizer {config.tokenizer}")
        return found
    if isinstance(corpus, TokenFile):
        return found._replace(tokenizer=corpus.tokenizer)
    if config.tokenizer in (None, *KINDS):
        raise ValueError(f"{config.init_from} has no tokenizer; name a model that has the right one with --tokenizer")
    return found._replace(tokenizer=make_tokenizer(config.tokenizer, ()))
