"""What a run starts from: the text that its settings name, and the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

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
    found, usual = model(config.init_from), PRESETS.get(config.preset, TrainConfig())
    for name in _SHAPE:
        asked, has = getattr(config, name), getattr(found.config, name)
        if asked not in (has, getattr(usual, name)):
            raise ValueError(f"{name}={asked} does not fit the weights of {config.init_from}, which have {has}; leave it out")
    most = found.config.block_size
    if config.block_size > most and config.block_size != usual.block_size:
        raise ValueError(f"block_size={config.block_size} is more than the {most} positions of {config.init_from}; use {most}")
    config = replace(config, block_size=min(config.block_size, most))
    for name, array in found.weights.items():
        if not np.isfinite(array).all():
            raise ValueError(f"the weights {name} of {config.init_from} are not finite; begin with others")
    fitting = _with_tokenizer(found, config, corpus).cropped()
    positions = {"wpe.weight": fitting.weights["wpe.weight"][: config.block_size]}
    shaped = replace(config, **{name: getattr(found.config, name) for name in _SHAPE})
    shorter = replace(fitting.config, block_size=config.block_size)
    return shaped, fitting._replace(config=shorter, weights=fitting.weights | positions)


def model(source: str) -> Pretrained:
    """The model of a run's folder or checkpoint file, or GPT-2's of a Hugging Face folder or the hub."""
    if checkpoint.saved_in(Path(source)) or Path(source).is_file():
        return checkpoint.load_run(Path(source)).pretrained()
    return gpt2.load(source)


def _with_tokenizer(found: Pretrained, config: TrainConfig, corpus: Text) -> Pretrained:
    """Weights whose folder had no tokenizer, with the one of the prepared text, or of the model that `tokenizer` names."""
    own = found.tokenizer or (corpus.tokenizer if isinstance(corpus, TokenFile) else None)
    if own is not None:
        if config.tokenizer is not None or config.vocab_size is not None:
            of = config.init_from if found.tokenizer else config.data
            raise ValueError(f"{of} brings its own tokenizer; leave out --tokenizer and --vocab-size")
        return found._replace(tokenizer=own)
    if config.tokenizer in (None, *KINDS):
        raise ValueError(f"{config.init_from} has no tokenizer; name a model that has the right one with --tokenizer")
    return found._replace(tokenizer=make_tokenizer(config.tokenizer, ()))
