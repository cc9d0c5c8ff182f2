"""Configurations: what they refuse, and what the presets say."""

import json
import math
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest

from minigpt import PRESETS, GPTConfig, TrainConfig


def refusal(make: Any, **values: Any) -> str:
    with pytest.raises(ValueError) as caught:
        make(**values)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("value", [0, -3, 2.5, "4", True, None, math.nan])
@pytest.mark.parametrize("name", ["vocab_size", "block_size", "n_layer", "n_head", "n_embd"])
def test_sizes_of_a_model_are_whole_and_positive(name: str, value: Any) -> None:
    message = refusal(GPTConfig, **{"vocab_size": 65, name: value})
    assert message == f"{name}={value!r} must be a whole number of at least 1"


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("max_steps", 1),
        ("micro_batch", 1),
        ("accumulation", 1),
        ("eval_interval", 1),
        ("sample_tokens", 0),
        ("seed", 0),
        ("warmup_steps", 0),
        ("threads", 1),
        ("shards", 1),
        ("profile", 1),
        ("n_layer", 1),
        ("block_size", 1),
    ],
)
def test_counts_of_a_run_are_whole(name: str, least: int) -> None:
    for value in (least - 1, 1.5, "1", False):
        message = refusal(TrainConfig, **{name: value})
        assert message == f"{name}={value!r} must be a whole number of at least {least}"
    if name not in ("n_layer", "block_size"):
        assert getattr(TrainConfig(**{name: least}), name) == least


@pytest.mark.parametrize(
    ("n_embd", "n_head", "options"), [(384, 5, "380 or 385"), (3, 5, "5"), (127, 4, "124 or 128"), (1, 2, "2")]
)
def test_heads_must_divide_the_width_and_the_message_offers_widths(n_embd: int, n_head: int, options: str) -> None:
    message = f"n_embd={n_embd} is not divisible by n_head={n_head}; use {options}"
    assert refusal(GPTConfig, vocab_size=65, n_embd=n_embd, n_head=n_head) == message
    assert refusal(TrainConfig, n_embd=n_embd, n_head=n_head) == message
    for width in options.split(" or "):
        GPTConfig(65, n_embd=int(width), n_head=n_head)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_dropout_is_a_probability_below_one(value: float) -> None:
    for make, others in ((GPTConfig, {"vocab_size": 65}), (TrainConfig, {})):
        assert refusal(make, dropout=value, **others) == f"dropout={value} must be at least 0 and below 1"


def test_a_model_of_no_machine_is_refused() -> None:
    message = refusal(GPTConfig, vocab_size=65, n_embd=10**6, n_head=1)
    assert message == "n_layer=6, n_embd=1000000 make 7.2e+13 parameters; use smaller sizes"


@pytest.mark.parametrize(
    ("name", "high", "values"),
    [
        ("lr", "1e+35", (-1e-3, 1e35, math.inf, math.nan)),
        ("min_lr", "inf", (-1e-3, math.inf, math.nan)),
        ("weight_decay", "inf", (-0.1, math.inf, math.nan)),
        ("beta1", "1", (-0.1, 1.0, math.nan)),
        ("beta2", "1", (-0.1, 1.0, math.nan)),
    ],
)
def test_rates_have_their_bounds(name: str, high: str, values: tuple[float, ...]) -> None:
    for value in values:
        assert refusal(TrainConfig, **{name: value}) == f"{name}={value} must be at least 0 and below {high}"
    assert getattr(TrainConfig(**{"min_lr": 0, name: 0}), name) == 0


@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_clipping_must_leave_something(value: float) -> None:
    assert refusal(TrainConfig, grad_clip=value) == f"grad_clip={value} must be positive; use inf for no clipping"
    assert TrainConfig(grad_clip=math.inf).grad_clip == math.inf


def test_the_floor_lies_below_the_peak() -> None:
    assert refusal(TrainConfig, lr=1e-5, min_lr=1e-4) == "min_lr=0.0001 must not be above lr=1e-05"
    assert TrainConfig(lr=1e-4, min_lr=1e-4).min_lr == 1e-4


def test_what_replace_makes_is_checked_too_and_nothing_changes_in_place() -> None:
    with pytest.raises(ValueError, match="n_head=7"):
        replace(PRESETS["quick"], n_head=7)
    with pytest.raises(FrozenInstanceError):
        PRESETS["quick"].lr = 1.0


COMMON = {
    "out_dir": None,
    "data": None,
    "source": "tiny",
    "tokenizer": None,
    "vocab_size": None,
    "val_share": 0.1,
    "init_from": None,
    "bias": False,
    "warmup_steps": 100,
    "beta1": 0.9,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "sample_tokens": 300,
    "seed": 1337,
    "device": "cpu",
    "precision": "fp32",
    "cuda_graph": True,
    "threads": None,
    "shards": None,
    "resume": False,
    "prove_resume": False,
    "save_interval": None,
    "max_skipped": 10,
    "rank_timeout": 600,
    "checkpoint_activations": False,
    "profile": None,
    "wandb": True,
}
LARGE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2, "micro_batch": 64}
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "dropout": 0.0, "micro_batch": 12}
EXPECTED: dict[str, dict[str, Any]] = {
    "shakespeare": LARGE | {"accumulation": 4, "max_steps": 2000, "lr": 3e-4, "min_lr": 3e-5, "eval_interval": 100},
    "nanogpt-char": LARGE | {"accumulation": 1, "max_steps": 5000, "lr": 1e-3, "min_lr": 1e-4, "eval_interval": 250},
    "nanogpt-cpu": SMALL | {"accumulation": 1, "max_steps": 2000, "lr": 1e-3, "min_lr": 1e-4, "eval_interval": 250},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_is_exactly_this(name: str) -> None:
    assert PRESETS[name].to_dict() == {"preset": name, **COMMON, **EXPECTED[name]}


def test_there_are_no_other_presets_and_the_first_of_them_is_the_default() -> None:
    assert set(PRESETS) == {*EXPECTED, "quick"}
    assert all(config.preset == name for name, config in PRESETS.items())
    assert TrainConfig() == PRESETS["shakespeare"]


def test_the_presets_have_the_sizes_they_claim() -> None:
    assert PRESETS["shakespeare"].model(65).parameter_count() == 10_745_088
    assert PRESETS["nanogpt-cpu"].model(65).parameter_count() == 804_096
    assert PRESETS["shakespeare"].tokens_per_step == 65_536
    assert PRESETS["nanogpt-char"].tokens_per_step == 16_384
    assert PRESETS["nanogpt-cpu"].tokens_per_step == 768


def test_quick_is_for_minutes() -> None:
    """Its numbers are tuned; what it promises is a small model, few steps, and whole evaluations at the end."""
    quick = PRESETS["quick"]
    flops = quick.model(65).flops_per_token() * quick.tokens_per_step * quick.max_steps
    assert flops < 1e13
    assert quick.max_steps % quick.eval_interval == 0
    assert quick.warmup_steps < quick.max_steps / 4


def test_a_run_hands_its_shape_to_the_model() -> None:
    config = TrainConfig(n_layer=1, n_head=2, n_embd=6, block_size=3, dropout=0.25, bias=True, checkpoint_activations=True)
    assert config.model(9) == GPTConfig(9, 3, 1, 2, 6, 0.25, True, True)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_configuration_survives_json(name: str) -> None:
    config = replace(PRESETS[name], out_dir=Path("a b/ü"), data=Path("/x/y.txt"), grad_clip=math.inf, bias=True)
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert isinstance(again.out_dir, Path)
    assert {f.name: type(getattr(again, f.name)) for f in fields(again)} == {
        f.name: type(getattr(config, f.name)) for f in fields(config)
    }


def test_unknown_fields_are_named_and_missing_ones_have_defaults() -> None:
    with pytest.raises(ValueError, match=r"unknown fields \['lr2', 'n_heads'\]"):
        TrainConfig.from_dict({"n_heads": 2, "lr": 1e-3, "lr2": 0})
    assert TrainConfig.from_dict({"lr": 1e-3}) == TrainConfig(lr=1e-3)
    with pytest.raises(ValueError, match="lr=-1"):
        TrainConfig.from_dict({"lr": -1})


def test_a_precision_below_fp32_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="precision='bf16' needs device='cuda'; the CPU computes in fp32"):
        TrainConfig(precision="bf16")
    assert TrainConfig(precision="bf16", device="cuda").resolved_shards() == 1


def test_a_profile_needs_the_cpu() -> None:
    with pytest.raises(ValueError, match="profile=3 needs device='cpu'; on a GPU only launches could be timed from here"):
        TrainConfig(profile=3, device="cuda")
