"""GPT-2's weights as Hugging Face stores them: one folder of JSON and safetensors, in which nothing can be executed.

Names and shapes are GPT-2's and ours alike, but for the matrices within blocks, which it stores as (in, out): x W, not x Wᵀ.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minigpt import disk, hub
from minigpt.config import GPTConfig
from minigpt.tokenizer import END_OF_TEXT, BPETokenizer, Tokenizer, from_file

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
PREFIX = "transformer."  # of every name but the head's, where the head was saved too
HEAD = "lm_head.weight"

_SIZES = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}  # where none are given
_ALSO = {  # transformers' own names of the same
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
_COMPUTED = {  # the settings that change the numbers, with the values that this GPT computes
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal masks in old files
_SHARD = re.compile(r"[\w.-]+\.safetensors")
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Pretrained(NamedTuple):
    """A model by itself: its shape, its float32 weights by their names in `GPT`, its tokenizer, if it has one, and a title."""

    config: GPTConfig
    weights: dict[str, np.ndarray]
    tokenizer: Tokenizer | None
    title: str = ""

    def cropped(self) -> Pretrained:
        """Without the rows of wte beyond the tokenizer's last id, which only pad it: so that none of them is ever drawn."""
        if self.tokenizer is None or self.tokenizer.vocab_size == self.config.vocab_size:
            return self
        rows = self.tokenizer.vocab_size
        if rows > self.config.vocab_size:
            raise ValueError(
                f"{self.title}: the tokenizer has {rows} ids and the model {self.config.vocab_size} rows for them; "
                "use the tokenizer that the model was trained with"
            )
        weights = self.weights | {"wte.weight": self.weights["wte.weight"][:rows]}
        return self._replace(config=replace(self.config, vocab_size=rows), weights=weights)


def load(source: str | Path, dropout: float = 0.0) -> Pretrained:
    """GPT-2's weights from a folder or a repository of the hub ("gpt2", "owner/name"): config.json, model.safetensors or its
    shards, and tokenizer.json, or vocab.json with merges.txt, or no tokenizer.

    The arrays are float32 whatever the files have, and fresh: nobody else holds them. All rows of wte are kept, also those
    beyond the tokenizer's ids (see `Pretrained.cropped`). Everything but the numbers is checked before they are read.
    ValueError says what is missing, damaged, misshapen, or would give other numbers than GPT-2's; see also `hub.find`.
    """
    source = str(source)
    config = replace(_config(source), dropout=dropout)
    places = _places(source)
    if config.n_layer > len(places):  # before a name is made for each
        raise ValueError(f"{source} has {len(places)} tensors, but {CONFIG} says n_layer={config.n_layer}; fetch it again")
    shapes = _shapes(config)
    _check(source, places, shapes)
    tokenizer = _tokenizer(source)
    weights = {name: _turned(name, places[name].read()) for name in shapes}
    if HEAD in places and not np.array_equal(places[HEAD].read(), weights["wte.weight"], equal_nan=True):
        raise ValueError(f"{source}: {HEAD} is not wte.weight, as it always is here; use a model with tied embeddings")
    return Pretrained(config, weights, tokenizer, source)


class _Place(NamedTuple):
    """Where a tensor lies in a file."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The tensor. Read, not mapped, or pages of the file would be in memory beside it."""
        flat = np.fromfile(self.path, _DTYPES[self.dtype], math.prod(self.shape), offset=self.offset)
        if flat.size != math.prod(self.shape):
            raise OSError(f"{self.path} became shorter while it was read; load it again")
        if self.dtype == "BF16":  # the upper half of a float32
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(self.shape)


def dump(found: Pretrained, folder: Path) -> None:
    """The inverse of `load`: write a model and its tokenizer into a folder, for transformers and all that read its files.

    A model without biases gets biases of 0, for GPT-2 has some everywhere. OSError where a file cannot be written.
    """
    config, weights, tokenizer, _ = found
    tensors = {}
    for name, shape in _shapes(config).items():
        left_out = name.endswith("bias") and not config.bias
        tensors[PREFIX + name] = np.zeros(shape, np.float32) if left_out else _turned(name, weights[name])
    end = tokenizer.end_of_text if tokenizer else None
    ends = {"bos_token_id": end, "eos_token_id": end}
    _write(folder / CONFIG, _settings(config) | ends)
    length = {"max_length": config.block_size}  # transformers' default may exceed the context
    _write(folder / "generation_config.json", ends | length)
    if tokenizer:
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        symbol = None if end is None else END_OF_TEXT
        limits = {"model_max_length": config.block_size, "bos_token": symbol, "eos_token": symbol}
        _write(folder / "tokenizer_config.json", kind | limits)
        (folder / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    disk.write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


def _settings(config: GPTConfig) -> dict[str, Any]:
    """What config.json says of a model's shape and computation."""
    sizes = {"vocab_size": config.vocab_size, "n_positions": config.block_size}
    sizes |= {name: getattr(config, name) for name in ("n_embd", "n_layer", "n_head")}
    dropout = {f"{place}_pdrop": config.dropout for place in ("embd", "attn", "resid")}
    computed = {name: values[0] for name, values in _COMPUTED.items()}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **sizes, "n_inner": None, **dropout, **computed}


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _config(source: str) -> GPTConfig:
    """The model's shape; ValueError where its config.json asks for what is not computed here."""
    path = hub.find(source, CONFIG)
    if path is None:
        raise ValueError(f"{source} has no {CONFIG}; name the folder of a model that save_pretrained or minigpt export made")
    values = _read_json(path)
    if values.get("model_type") != "gpt2":
        raise ValueError(f"{path}: model_type={values.get('model_type')!r} is not 'gpt2'; use a model of GPT-2's kind")
    for name, other in _ALSO.items():
        if other in values and values.setdefault(name, values[other]) != values[other]:
            raise ValueError(f"{path}: {name}={values[name]!r} but {other}={values[other]!r}; remove the wrong one")
    sizes = {name: values.get(name, size) for name, size in _SIZES.items()}
    try:
        config = GPTConfig(block_size=sizes.pop("n_positions"), **sizes, bias=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, computed in (_COMPUTED | {"n_inner": (None, 4 * config.n_embd)}).items():
        if name in values and values[name] not in computed:
            instead = " or ".join(str(value) for value in computed if value is not None)
            raise ValueError(f"{path}: {name}={values[name]!r} is not computed here; use a model with {instead}")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    """What a file of JSON says."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; fetch it again")
    return values


def _places(source: str) -> dict[str, _Place]:
    """Every tensor of the model's file or shards, under GPT-2's name without the prefix."""
    if whole := hub.find(source, WEIGHTS):
        found = _header(whole)
    elif index := hub.find(source, INDEX):
        found = _shards(source, index)
    else:
        raise ValueError(
            f"{source} has neither {WEIGHTS} nor {INDEX}, and other formats are not read, for they can hold programs; "
            "save the model with transformers: save_pretrained(folder)"
        )
    named = {name.removeprefix(PREFIX): place for name, place in found.items()}
    if twice := [name for name in named if name in found and PREFIX + name in found]:
        raise ValueError(f"{source} has both {twice[0]} and {PREFIX}{twice[0]}; remove the wrong one")
    return named


def _shards(source: str, index: Path) -> dict[str, _Place]:
    """The tensors of the shards that an index names."""
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) and _SHARD.fullmatch(file) for file in files.values()):
        raise ValueError(f"{index}: weight_map does not name a safetensors file beside it for each tensor; fetch it again")
    headers = {}
    for file in sorted(set(files.values())):
        shard = hub.find(source, file)
        if shard is None:
            raise ValueError(f"{source} has no {file}, which {INDEX} names; fetch it again")
        headers[file] = _header(shard)
    return {name: headers[file][name] for name, file in files.items() if name in headers[file]}


def _header(path: Path) -> dict[str, _Place]:
    """The tensors of a safetensors file: its first 8 bytes are the length of the JSON that follows, and the data is behind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # proves that the header is true and the file whole
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: _Place(path, 8 + length + facts["data_offsets"][0], facts["dtype"], tuple(facts["shape"]))
        for name, facts in header.items()
    }


def _check(source: str, places: Mapping[str, _Place], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError names every tensor that is missing, of another shape or dtype, or nothing that this model has."""
    problems = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in places]
    for name, place in places.items():
        expected = shapes["wte.weight"] if name == HEAD else shapes.get(name)
        if expected is None:
            problems += [f"unexpected {name} {place.shape}"] if not _MASK.fullmatch(name) else []
        elif place.shape != expected:
            problems.append(f"{name} has shape {place.shape} where {CONFIG} makes it {expected}")
        elif place.dtype not in _DTYPES:
            problems.append(f"{name} has dtype {place.dtype}, not one of {', '.join(_DTYPES)}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"the tensors of {source} are not those of its {CONFIG}: {'; '.join(problems[:8])}{more}")


def _shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor by name, with its shape in the file."""
    C = config.n_embd
    norms = {f"{norm}.{kind}": (C,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    sizes = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    matrices = {f"{name}.weight": shape for name, shape in sizes.items()}
    biases = {f"{name}.bias": shape[1:] for name, shape in sizes.items()}
    block: dict[str, tuple[int, ...]] = {**norms, **matrices, **biases}
    return {
        "wte.weight": (config.vocab_size, C),
        "wpe.weight": (config.block_size, C),
        **{f"h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in block.items()},
        "ln_f.weight": (C,),
        "ln_f.bias": (C,),
    }


def _turned(name: str, array: np.ndarray) -> np.ndarray:
    """A file's array as it is here, or ours as it is there, where the matrices within blocks are (in, out), not (out, in)."""
    within = name.startswith("h.") and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return np.ascontiguousarray(array.T if within else array, np.float32)


def _tokenizer(source: str) -> Tokenizer | None:
    if path := hub.find(source, TOKENIZER):
        return from_file(path)
    vocab, merges = hub.find(source, "vocab.json"), hub.find(source, "merges.txt")
    return BPETokenizer.from_vocab(vocab, merges) if vocab and merges else None
