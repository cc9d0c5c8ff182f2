"""The model against its PyTorch copy, and what the copy cannot judge: initial weights, counts, dropout, the cache."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tinytensor as tt
from minigpt.config import GPTConfig
from minigpt.model import GPT, MLP, Block, CausalSelfAttention, KVCache
from tests.minigpt import torch_gpt
from tests.minigpt.divergence import first_divergence
from tests.minigpt.small import distance
from tests.minigpt.torch_gpt import ids, scatter_weights, torch_copy
from tinytensor import backend, random
from tinytensor.inspect import detect_anomaly, ledger, profile

SMALL = GPTConfig(vocab_size=11, block_size=7, n_layer=2, n_head=3, n_embd=12)


def make(config: GPTConfig = SMALL, dtype: str = "float64", scattered: bool = True) -> GPT:
    with random.scope(3):
        model = GPT(config).to(dtype)
    if scattered:
        scatter_weights(model)
    return model


def batch(rows: int = 3, length: int = 7, vocab_size: int = 11, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.random.default_rng(seed).integers(0, vocab_size, (2, rows, length)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 2e-5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 4, 7])
def test_logits_loss_and_every_gradient_are_those_of_torch(dtype: str, tolerance: float, bias: bool, length: int) -> None:
    model = make(replace(SMALL, bias=bias), dtype)
    judge = torch_copy(model)
    x, y = batch(length=length)
    assert first_divergence(make(replace(SMALL, bias=bias), dtype), torch_copy(model), x, y, tolerance) == ""
    logits, loss = model(x, y)
    their_logits, their_loss = judge(ids(x), ids(y))
    assert logits.dtype == loss.dtype == np.dtype(dtype)
    assert logits.shape == (3, length, 11)
    assert distance(logits.detach(), their_logits.detach()) < tolerance
    assert loss.item() == pytest.approx(their_loss.item(), rel=tolerance)
    loss.backward()
    their_loss.backward()
    theirs = dict(judge.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(theirs)
    for name, p in model.named_parameters():
        assert distance(p.grad, theirs[name].grad) < tolerance, name


def fault_in(op: str, place: int, vjp: bool) -> Callable[..., Any]:
    """The kernel of an op, wrong by a thousandth in its n-th call."""
    kernel, calls = backend.kernels["cpu"][op], itertools.count()

    def forward(*args: Any, **params: Any) -> Any:
        result = kernel.forward(*args, **params)
        wrong = next(calls) == place and not vjp
        return (result[0] * 1.001, result[1]) if wrong else result

    def backward(*args: Any, **params: Any) -> Any:
        wrong = next(calls) == place
        share = kernel.vjp(*args, **params)
        return share * 1.001 if wrong else share

    return dataclasses.replace(kernel, **({"vjp": backward} if vjp else {"forward": forward}))


@pytest.mark.parametrize(
    ("vjp", "place", "sentence"),
    [
        (False, 0, r"the first activation that departs is that of gelu at .*model.py:\d+ in h.0.mlp: relative error 0.001"),
        (False, 1, r"the first activation that departs is that of gelu at .*model.py:\d+ in h.1.mlp: relative error 0.001"),
        (True, 0, r"the first gradient .* is that of the result of linear at .*model.py:\d+ in h.1.mlp.c_fc: .* 0.001"),
        (True, 1, r"the first gradient .* is that of the result of linear at .*model.py:\d+ in h.0.mlp.c_fc: .* 0.001"),
    ],
)
def test_a_fault_is_found_where_it_is(vjp: bool, place: int, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setitem(backend.kernels["cpu"], "gelu", fault_in("gelu", place, vjp))
    assert re.match(sentence, first_divergence(model, torch_copy(model), *batch(), 1e-9))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 1, 3, 1, 5), (5, 3, 1, 4, 4)])
def test_odd_shapes_agree_too(shape: tuple[int, ...]) -> None:
    model = make(GPTConfig(*shape))
    x, y = batch(rows=2, length=shape[1], vocab_size=shape[0])
    _, loss = model(x, y)
    _, their_loss = (judge := torch_copy(model))(ids(x), ids(y))
    loss.backward()
    their_loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-9, abs=1e-12)
    for p, their_p in zip(model.parameters(), judge.parameters(), strict=True):
        np.testing.assert_allclose(p.grad.numpy(), their_p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("part", ["mlp", "attn"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_module_by_itself_agrees_with_torch(part: str, bias: bool) -> None:
    model = make(replace(SMALL, bias=bias))
    ours, theirs = getattr(model.h[1], part), getattr(torch_copy(model).h[1], part)
    rng = np.random.default_rng(1)
    x, g = rng.standard_normal((2, 2, 5, 12))
    our_x, their_x = tt.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    y, their_y = ours(our_x), theirs(their_x)
    assert distance(y.detach(), their_y.detach()) < 1e-9
    y.backward(tt.tensor(g))
    their_y.backward(torch.from_numpy(g))
    assert distance(our_x.grad, their_x.grad) < 1e-9
    for (name, p), their_p in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert distance(p.grad, their_p.grad) < 1e-9, name


def test_without_targets_there_is_no_loss() -> None:
    model = make()
    x, y = batch()
    logits, loss = model(x)
    assert loss is None
    assert np.array_equal(logits.detach().numpy(), model(x, y)[0].detach().numpy())


@pytest.mark.parametrize("convert", [np.ndarray.tolist, tt.tensor, lambda x: x.astype(np.int32), lambda x: x.astype(np.uint8)])
def test_ids_may_be_lists_tensors_and_any_integers(convert: Any) -> None:
    model = make()
    x, y = batch()
    assert model(convert(x), convert(y))[1].item() == model(x, y)[1].item()


def test_no_position_sees_the_future() -> None:
    model = make()
    x, _ = batch(rows=2)
    before = model(x)[0].detach().numpy()
    for t in range(7):
        changed = x.copy()
        changed[:, t] = (changed[:, t] + 1 + np.arange(2)) % 11
        moved = np.abs(model(changed)[0].detach().numpy() - before).max(axis=(0, 2))
        assert moved[:t].max(initial=0) < 1e-12
        assert moved[t:].min() > 1e-6  # but every later position does see it


def test_rows_of_a_batch_know_nothing_of_each_other() -> None:
    model = make()
    x, _ = batch()
    together = model(x)[0].detach().numpy()
    for row in range(3):
        assert distance(model(x[row : row + 1])[0].detach(), together[row : row + 1]) < 1e-12


def test_the_embedding_is_the_head() -> None:
    """One parameter, named once, whose gradient is the sum of what both uses give it."""
    model = make()
    names = [name for name, _ in model.named_parameters()]
    assert names.count("wte.weight") == 1
    assert not [name for name in names if "head" in name]
    assert model.head(tt.tensor(np.eye(12))).detach().numpy().tolist() == model.wte.weight.numpy().T.tolist()
    x, y = batch()
    model(x, y)[1].backward()
    whole = model.wte.weight.grad.numpy().copy()

    parts = []
    for use in ("embedding", "head"):
        fixed = tt.tensor(model.wte.weight.numpy())
        model.zero_grad()
        stream = model.drop((tt.embedding(fixed, x) if use == "head" else model.wte(x)) + model.wpe.weight[:7])
        for block in model.h:
            stream = block(stream)
        logits = tt.linear(model.ln_f(stream), fixed if use == "embedding" else model.wte.weight)
        tt.cross_entropy(logits, y).backward()
        parts.append(model.wte.weight.grad.numpy().copy())
    assert all(np.abs(part).max() > 1e-3 for part in parts)
    assert distance(whole, parts[0] + parts[1]) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_initial_weights_are_those_of_gpt2(bias: bool) -> None:
    config = GPTConfig(vocab_size=300, block_size=128, n_layer=3, n_head=2, n_embd=96, bias=bias)
    model = make(config, "float32", scattered=False)
    for name, p in model.named_parameters():
        values = p.numpy().astype(np.float64).ravel()
        if name.endswith("bias"):
            assert not values.any(), name
        elif p.ndim == 1:
            assert (values == 1).all(), name
        else:
            std = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
            error = std / math.sqrt(values.size)  # the standard error of the mean; that of the deviation is 1/√2 of it
            assert abs(values.mean()) < 4 * error, name
            assert abs(values.std() - std) < 3 * error, name
            assert 3 * std < np.abs(values).max() < 6 * std, name  # normal, neither uniform nor cut off
    states = [p.numpy() for p in model.parameters() if p.ndim == 2]
    assert len({a.ravel()[:4].tobytes() for a in states}) == len(states)  # no two begin with the same numbers


def test_an_untrained_model_guesses_evenly() -> None:
    x, y = batch()
    assert make(dtype="float32", scattered=False)(x, y)[1].item() == pytest.approx(math.log(11), abs=0.02)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    def weights(seed: int) -> list[bytes]:
        with random.scope(seed):
            return [a.tobytes() for a in GPT(SMALL).state_dict().values()]

    assert weights(1) == weights(1) != weights(2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(65, 256, 6, 6, 384), (65, 64, 4, 4, 128), (11, 7, 2, 3, 12), (1, 1, 1, 1, 1), (9, 5, 3, 1, 7)]
)
def test_the_parameter_count_is_that_of_the_parameters(shape: tuple[int, ...], bias: bool) -> None:
    config = GPTConfig(*shape, bias=bias)
    assert config.parameter_count() == sum(p.numel() for p in torch_gpt.TorchGPT(config).parameters())
    assert config.parameter_count() == sum(p.size for p in GPT(config).parameters())


@pytest.mark.parametrize("config", [replace(SMALL, bias=False), GPTConfig(30, 64, 1, 1, 8), GPTConfig(5, 16, 4, 2, 20)])
def test_flops_are_those_that_torch_counts(config: GPTConfig) -> None:
    """Of the forward pass: linear layers, and attention in full. Backward costs twice that; half of attention is masked."""
    T = config.block_size
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch_copy(make(config))(ids(batch(1, T, config.vocab_size)[0]))
    attention = config.n_layer * 2 * 2 * T * T * config.n_embd
    linear = counter.get_total_flops() - attention
    assert config.flops_per_token() * T == 3 * (linear + attention // 2)


def test_dropout_is_for_training_and_repeats_in_its_scope() -> None:
    model = make(replace(SMALL, dropout=0.3))
    x, y = batch()

    def loss(*address: int) -> float:
        with random.scope(*address):
            return model(x, y)[1].item()

    assert loss(1, 2, 3) == loss(1, 2, 3)
    assert len({loss(1, 2, 3), loss(2, 2, 3), loss(1, 3, 3), loss(1, 2, 4)}) == 4
    model.eval()
    plain = make()(x, y)[1].item()
    assert loss(1) == loss(2) == plain
    model.train()
    assert loss(1) != plain


@pytest.mark.parametrize("place", ["embeddings", "attention", "attn", "mlp"])
def test_dropout_falls_in_four_places(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them by itself, the other three switched off, changes the training loss."""
    model = make(replace(SMALL, dropout=0.5))
    model.drop.p = 0.0
    for module in model.modules():
        if isinstance(module, CausalSelfAttention | Block):
            module.dropout = 0.0
    x, y = batch()
    plain = model(x, y)[1].item()
    assert plain == make()(x, y)[1].item()
    if place == "embeddings":
        model.drop.p = 0.5
    elif place == "attention":
        model.h[0].attn.dropout = 0.5
    else:  # of one of the two branches that join the stream
        joins, falls = tt.dropout_add, iter([place == "attn", place == "mlp", False, False])
        monkeypatch.setattr(tt, "dropout_add", lambda x, r, p, training: joins(x, r, 0.5 * next(falls), training))
    assert model(x, y)[1].item() != pytest.approx(plain, rel=1e-6)
    monkeypatch.undo()
    assert model.eval()(x, y)[1].item() == plain


def test_gradients_with_dropout_are_those_of_the_masked_function() -> None:
    """Within one scope the loss is a plain function; its slope along a direction is what the gradients say."""
    model = make(replace(SMALL, dropout=0.3))
    x, y = batch()

    def loss() -> tt.Tensor:
        with random.scope(5):
            return model(x, y)[1]

    loss().backward()
    rng = np.random.default_rng(2)
    start = model.state_dict()
    direction = {name: rng.standard_normal(a.shape) for name, a in start.items()}
    slope = sum(float((p.grad.numpy() * direction[name]).sum()) for name, p in model.named_parameters())
    ends = []
    for step in (1e-6, -1e-6):
        model.load_state_dict({name: a + step * direction[name] for name, a in start.items()})
        ends.append(loss().item())
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def lean(**changes: Any) -> GPT:
    return make(replace(SMALL, checkpoint_activations=True, **changes), "float32")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_activations_change_no_bits(dropout: float) -> None:
    x, y = batch()
    plain, other = make(replace(SMALL, dropout=dropout), "float32"), lean(dropout=dropout)
    losses = []
    for model in (plain, other):
        with random.scope(5):
            losses.append(model(x, y)[1])
        losses[-1].backward()
    assert losses[0].item() == losses[1].item()
    for (name, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert p.grad.numpy().tobytes() == q.grad.numpy().tobytes(), name


def test_blocks_run_again_only_for_gradients_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, forward = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *inputs: runs.append(self) or forward(self, *inputs))
    model, (x, y) = lean(), batch()
    first, last = model.h

    def backward() -> list[Block]:
        runs.clear()
        model(x, y)[1].backward()
        return runs

    assert backward() == [first, last, last, first]
    model.eval()
    assert backward() == [first, last]
    model.train()
    runs.clear()
    cache = KVCache(SMALL, len(x))
    with tt.no_grad():
        model(x, y)
        model.features(x, cache)
    assert runs == [first, last] * 2 and cache.memory.all()


def test_what_checkpointed_activations_hold() -> None:
    """The input of each block; and of what is outside of the blocks the same as without."""
    x, y = batch()
    plain, other = (ledger(model(x, y)[1]) for model in (make(dtype="float32"), lean()))
    assert [module for module in plain.by("module") if module.startswith("h.")]
    assert not [module for module in other.by("module") if module.startswith("h.")]
    assert other.by("op")["checkpoint"] == SMALL.n_layer * x.size * SMALL.n_embd * 4
    for module in ("ln_f", "wte", "wpe"):
        assert other.by("module").get(module) == plain.by("module").get(module)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_anomaly_in_checkpointed_activations_is_named_as_without(where: str) -> None:
    messages, (x, y) = [], batch()
    for model in (make(dtype="float32"), lean()):
        mlp = model.h[1].mlp
        mlp.c_fc.weight.data *= 1e38 if where == "forward" else 1e20
        mlp.c_proj.weight.data *= 1e-20
        with pytest.raises(FloatingPointError) as caught, np.errstate(all="ignore"), detect_anomaly():
            (model(x, y)[1] * (1 if where == "forward" else 1e38)).backward()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert " in h.1.mlp" in messages[1] and messages[1].startswith("backward of ") == (where == "backward")


def test_a_profile_counts_checkpointed_activations_twice() -> None:
    x, y = batch()
    counts = []
    for model in (make(dtype="float32"), lean()):
        with profile() as p:
            model(x, y)[1].backward()
        rows = {row.name: row for row in p.by("module")}
        counts.append({name: (row.forward.calls, row.backward.calls) for name, row in rows.items()})
    plain, other = counts
    assert other["h.*.mlp.c_fc"] == (2 * plain["h.*.mlp.c_fc"][0], plain["h.*.mlp.c_fc"][1]) == (4, 2)
    assert other["ln_f"] == plain["ln_f"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("pieces", [(7,), (1,) * 7, (3, 1, 1, 2), (2, 4, 1)])
def test_the_cache_changes_no_logits(dtype: str, tolerance: float, pieces: tuple[int, ...]) -> None:
    model = make(dtype=dtype).eval()
    x, _ = batch(rows=2)
    cache = KVCache(SMALL, 2, dtype)
    with tt.no_grad():
        whole = model(x)[0].numpy()
        ends = np.cumsum(pieces)
        parts = [model.head(model.features(x[:, end - n : end], cache)).numpy() for n, end in zip(pieces, ends, strict=True)]
    assert cache.length == 7
    assert distance(np.concatenate(parts, axis=1), whole) < tolerance


def test_a_full_cache_is_told() -> None:
    model = make().eval()
    cache = KVCache(SMALL, 1, "float64")
    with tt.no_grad():
        model.features(batch(rows=1, length=6)[0], cache)
        with pytest.raises(ValueError, match=r"8 positions do not fit block_size=7; crop the context"):
            model.features(batch(rows=1, length=2)[0], cache)
        assert cache.length == 6
        model.features(batch(rows=1, length=1)[0], cache)


@pytest.mark.parametrize(
    ("idx", "targets", "message"),
    [
        ([1, 2, 3], None, r"idx must have shape \(B, T\), got \(3,\); use idx\[None\] for one sequence"),
        (np.zeros((1, 1, 1), int), None, r"idx must have shape \(B, T\), got \(1, 1, 1\)"),
        (np.zeros((2, 8), int), None, r"8 positions do not fit block_size=7; crop the context"),
        ([[0, 11]], None, r"embedding: index 11 is outside 0 … 10"),
        ([[0, -1]], None, r"embedding: index -1 is outside 0 … 10"),
        ([[0, 1]], [[0, 11]], r"cross_entropy: index 11 is outside 0 … 10"),
        ([[0, 1]], [[0]], r"\(1, 2\).*\(1, 1\)"),
    ],
)
def test_wrong_ids_are_refused_in_a_sentence(idx: Any, targets: Any, message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        make()(idx, targets)


def test_ids_that_are_no_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="integer"):
        make()(np.zeros((1, 2)))


def test_a_model_moves_to_float64_and_back() -> None:
    model = make(dtype="float32")
    x, y = batch()
    single = model(x, y)[1]
    double = model.to("float64")(x, y)[1]
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    assert single.item() == pytest.approx(double.item(), rel=1e-5)
    double.backward()
    assert all(p.grad.dtype == np.float64 for p in model.parameters())
    assert model.to("float32")(x, y)[1].item() == single.item()


def test_matrices_decay_and_vectors_do_not() -> None:
    model = make()
    decayed, rest = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in rest["params"]} == {1}
    assert sorted(map(id, decayed["params"] + rest["params"])) == sorted(map(id, model.parameters()))


def test_a_model_without_bias_has_none() -> None:
    assert not [name for name, _ in make(replace(SMALL, bias=False)).named_parameters() if "bias" in name]
    assert isinstance(make().h[0].mlp, MLP)
