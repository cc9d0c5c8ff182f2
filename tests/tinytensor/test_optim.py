"""Optimisers step by step against PyTorch's, and the flat buffers behind them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tinytensor as tt
from tinytensor import nn
from tinytensor.optim import SGD, AdamW, Optimizer, clip_grad_norm_

SHAPES = [(3, 4), (4,), (), (17,), (2, 1, 5)]
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def parameters(dtype: str = "float64", seed: int = 0) -> tuple[list[nn.Parameter], list[torch.nn.Parameter]]:
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(rng.normal(size=s)).astype(dtype) for s in SHAPES]
    return [nn.Parameter(a.copy()) for a in arrays], [torch.nn.Parameter(torch.from_numpy(a.copy())) for a in arrays]


def gradients(step: int, dtype: str = "float64") -> list[np.ndarray]:
    rng = np.random.default_rng(1000 + step)
    return [np.asarray(rng.normal(size=s)).astype(dtype) for s in SHAPES]


def backward(ours: list[Any], theirs: list[Any], step: int, dtype: str = "float64", skip: tuple[int, ...] = ()) -> None:
    """Give both the same gradients by a backward pass, but none to the parameters `skip`."""
    weights = gradients(step, dtype)
    kept = [i for i in range(len(ours)) if i not in skip]
    sum((ours[i] * tt.Tensor(weights[i])).sum() for i in kept).backward()
    sum((theirs[i] * torch.from_numpy(weights[i])).sum() for i in kept).backward()


def assert_equal(ours: list[Any], theirs: list[Any], rtol: float) -> None:
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.data, q.detach().numpy(), rtol, rtol)


OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD": (SGD, torch.optim.SGD, {"lr": 0.1}),
    "SGD momentum": (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "SGD Nesterov": (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD weight decay": (SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2}),
    "AdamW": (AdamW, torch.optim.AdamW, {}),
    "AdamW betas": (AdamW, torch.optim.AdamW, {"lr": 0.03, "betas": (0.7, 0.95), "eps": 1e-4, "weight_decay": 0.3}),
    "AdamW no decay": (AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0}),
}


def pair(name: str, ours: Any, theirs: Any, **changes: Any) -> tuple[Optimizer, torch.optim.Optimizer]:
    mine, torchs, settings = OPTIMIZERS[name]
    return mine(ours, **{**settings, **changes}), torchs(theirs, **{**settings, **changes})


def advance(*optimizers: Any) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_sixty_steps_equal_torch(name: str, dtype: str) -> None:
    ours, theirs = parameters(dtype)
    optimizer, reference = pair(name, ours, theirs)
    for step in range(60):
        backward(ours, theirs, step, dtype)
        advance(optimizer, reference)
        assert_equal(ours, theirs, TOLERANCE[dtype])
    assert all(p.dtype == dtype and p.shape == s for p, s in zip(ours, SHAPES, strict=True))


@pytest.mark.parametrize("name", ["SGD Nesterov", "AdamW betas"])
def test_more_elements_than_a_block(name: str) -> None:
    values = np.random.default_rng(0).normal(size=(3, 30_001))
    ours, theirs = [nn.Parameter(values.copy())], [torch.nn.Parameter(torch.from_numpy(values.copy()))]
    optimizer, reference = pair(name, ours, theirs)
    for _ in range(3):
        for p in (ours[0], theirs[0]):
            (p**3).sum().backward()
        advance(optimizer, reference)
    assert_equal(ours, theirs, 1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_and_changing_learning_rates(name: str) -> None:
    ours, theirs = parameters()
    split = [{"params": slice(0, 2), "lr": 0.02}, {"params": slice(2, 4), "weight_decay": 0.5}, {"params": slice(4, 5)}]
    optimizer, reference = pair(
        name,
        [{**g, "params": ours[g["params"]]} for g in split],
        [{**g, "params": theirs[g["params"]]} for g in split],
    )
    for step in range(50):
        for k in range(3):
            optimizer.param_groups[k]["lr"] = reference.param_groups[k]["lr"] = 0.05 / (1 + step + k)
        backward(ours, theirs, step)
        advance(optimizer, reference)
    assert_equal(ours, theirs, 1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_without_gradient_are_left_alone(name: str) -> None:
    """They neither move nor decay nor age, and their neighbours in the buffer do."""
    ours, theirs = parameters()
    optimizer, reference = pair(name, ours, theirs)
    for step in range(50):
        backward(ours, theirs, step, skip=tuple(i for i in range(5) if (step + i) % 3 == 0))
        advance(optimizer, reference)
        assert_equal(ours, theirs, 1e-10)
    before = [p.data.copy() for p in ours]
    optimizer.step()
    assert all((p.data == b).all() for p, b in zip(ours, before, strict=True))


def test_mixed_dtypes() -> None:
    ours, theirs = parameters("float32")
    more, others = parameters("float64", seed=1)
    mixed, torchs = [ours[0], more[1], ours[2], more[3]], [theirs[0], others[1], theirs[2], others[3]]
    optimizer, reference = pair("AdamW", mixed, torchs)
    for _ in range(50):
        for p, q in zip(mixed, torchs, strict=True):
            p.grad, q.grad = None, None
            (p * p).sum().backward()
            (q * q).sum().backward()
        optimizer.step()
        reference.step()
    assert [p.dtype for p in mixed] == [np.float32, np.float64] * 2
    assert_equal(mixed[::2], torchs[::2], 1e-5)
    assert_equal(mixed[1::2], torchs[1::2], 1e-10)


# -- flat buffers, and users who replace what is in them


def test_gradients_live_in_the_flat_buffer() -> None:
    ours, theirs = parameters()
    optimizer = AdamW(ours)
    backward(ours, theirs, 0)
    bases = {id(p.grad.data.base) for p in ours}
    assert len(bases) == 1 and all(p.grad.data is p.node.slot for p in ours)
    assert len({id(p.data.base) for p in ours}) == 1
    addresses = [p.data.ctypes.data for p in ours]
    assert all(a % 64 == addresses[0] % 64 for a in addresses)  # each on a cache line of its own
    backward(ours, theirs, 1)  # added up in place
    for p, a, b in zip(ours, gradients(0), gradients(1), strict=True):
        np.testing.assert_allclose(p.grad.data, a + b, 1e-14)
        assert p.grad.data is p.node.slot
    optimizer.step()
    assert [p.data.ctypes.data for p in ours] == addresses


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW"])
def test_replaced_values_and_gradients_are_used(name: str) -> None:
    ours, theirs = parameters()
    optimizer, reference = pair(name, ours, theirs)
    for step in range(50):
        backward(ours, theirs, step)
        if step % 5 == 1:
            ours[0].data = ours[0].data * 0.5
            theirs[0].data = theirs[0].data * 0.5
        if step % 5 == 2:
            ours[1].grad = tt.tensor(np.arange(4.0))
            theirs[1].grad = torch.arange(4.0, dtype=torch.float64)
        if step % 5 == 3:
            ours[3].grad *= 2
            theirs[3].grad *= 2
        if step % 5 == 4:
            with tt.no_grad(), torch.no_grad():
                ours[4] += 1
                theirs[4] += 1
        advance(optimizer, reference)
        assert_equal(ours, theirs, 1e-10)
    assert len({id(p.data.base) for p in ours}) == 1  # brought back into the buffer


def test_a_frozen_parameter_is_skipped_and_comes_back() -> None:
    ours, theirs = parameters()
    optimizer, reference = pair("AdamW", ours, theirs)
    for step in range(6):
        for p in (ours[0], theirs[0]):
            p.requires_grad = step % 2 == 0
        backward(ours, theirs, step, skip=() if step % 2 == 0 else (0,))
        advance(optimizer, reference)
    assert_equal(ours, theirs, 1e-10)


def test_recorded_gradients_are_used_too() -> None:
    ours, theirs = parameters()
    optimizer, reference = pair("SGD", ours, theirs)
    sum((p**3).sum() for p in ours).backward(create_graph=True)
    sum((p**3).sum() for p in theirs).backward()
    clip_grad_norm_(ours, 1.0)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    optimizer.step()
    reference.step()
    assert_equal(ours, theirs, 1e-10)


@pytest.mark.parametrize("use", [lambda p: p * 3, lambda p: tt.linear(tt.ones(2, 4, dtype="float64"), p), lambda p: p[1:]])
def test_a_gradient_kept_from_the_last_step_is_not_used_for_another(use: Callable[..., Any]) -> None:
    """Its memory is the buffer's: a graph that saved it says so instead of using the new gradient."""
    p = parameters()[0][0]
    SGD([p])
    (p * p).sum().backward()
    kept, p.grad = p.grad, None
    loss = (p * kept).sum()
    use(p).sum().backward()
    with pytest.raises(RuntimeError, match="wrote into it in place"):
        loss.backward()


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    ours, _ = parameters()
    optimizer = SGD(ours)
    loss = (ours[0] * ours[0]).sum()
    ours[1].sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"mul at .*test_optim.* wrote into it in place"):
        loss.backward()


# -- clipping

FLAT: dict[str, Callable[[list[Any]], Any]] = {
    "no buffer": lambda params: None,
    "flat": lambda params: AdamW(params),
    "two buffers": lambda params: (SGD(params[:2]), SGD(params[2:])),
    "partly flat": lambda params: SGD(params[1:4]),
}


@pytest.mark.parametrize("memory", FLAT)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_clip_grad_norm_equals_torch(memory: str, max_norm: float, dtype: str) -> None:
    ours, theirs = parameters(dtype)
    keep = FLAT[memory](ours)
    for skip, chosen in [((), range(5)), ((1, 3), range(5)), ((), (0, 2, 3)), ((), (4,))]:
        for p, q in zip(ours, theirs, strict=True):
            p.grad, q.grad = None, None
        backward(ours, theirs, 0, dtype, skip)
        norm = clip_grad_norm_([ours[i] for i in chosen], max_norm)
        expected = torch.nn.utils.clip_grad_norm_([theirs[i] for i in chosen], max_norm)
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        for p, q in zip(ours, theirs, strict=True):
            if q.grad is None:
                assert p.grad is None
            else:
                np.testing.assert_allclose(p.grad.data, q.grad.numpy(), 1e-5, 1e-7)
    del keep


def test_clipping_leaves_the_rest_of_a_users_array_alone() -> None:
    (p,) = (nn.Parameter(np.zeros(10, np.float32)),)
    mine = np.arange(16, dtype=np.float32)
    p.grad = tt.Tensor(mine[:10])
    assert clip_grad_norm_(p, 1.0) == pytest.approx(np.linalg.norm(np.arange(10)), rel=1e-6)
    np.testing.assert_array_equal(mine[10:], np.arange(10, 16))
    assert np.linalg.norm(mine[:10]) == pytest.approx(1, rel=1e-4)


def test_clipping_details() -> None:
    p = nn.Parameter(np.zeros((2, 3), np.float16))
    p.grad = tt.full((2, 3), 300.0, dtype="float16")
    assert clip_grad_norm_([p, p], 1.0) == pytest.approx(300 * 6**0.5, rel=1e-3)  # counted once
    assert p.grad.dtype == np.float16 and p.grad.data.max() == pytest.approx(1 / 6**0.5, rel=1e-2)
    assert clip_grad_norm_([nn.Parameter(np.zeros(2, np.float32))], 1.0) == 0
    q = nn.Parameter(np.zeros((300, 400)))
    q.grad = tt.Tensor(np.ones((400, 300)).T)
    assert clip_grad_norm_(q, 1.0) == pytest.approx(120_000**0.5, rel=1e-12)
    assert np.linalg.norm(q.grad.data) == pytest.approx(1, rel=1e-5)
    for bad in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="max_norm must be positive"):
            clip_grad_norm_([p], bad)


# -- state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimiser_goes_on_exactly(name: str) -> None:
    kind, _, settings = OPTIMIZERS[name]

    def run(params: list[Any], optimizer: Any, steps: range) -> None:
        for step in steps:
            weights = gradients(step)
            present = [i for i in range(5) if (step + i) % 4]
            sum((params[i] ** 2 * tt.Tensor(weights[i])).sum() for i in present).backward()
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.step()
            optimizer.zero_grad()

    straight, _ = parameters()
    run(straight, kind(straight, **settings), range(20))
    first, _ = parameters()
    optimizer = kind(first, **settings)
    run(first, optimizer, range(9))
    state = copy.deepcopy(optimizer.state_dict())
    resumed = [nn.Parameter(p.data.copy()) for p in first]
    run(first, optimizer, range(9, 12))  # the saved state is a copy: this does not touch it
    restored = kind(resumed, lr=123.0)
    restored.load_state_dict(state)
    run(resumed, restored, range(9, 20))
    for p, q in zip(straight, resumed, strict=True):
        np.testing.assert_array_equal(p.data, q.data)


def test_state_that_does_not_fit_changes_nothing() -> None:
    ours, theirs = parameters()
    optimizer = AdamW(ours, lr=0.5)
    backward(ours, theirs, 0)
    optimizer.step()
    before = optimizer.state_dict()
    wrong = AdamW(parameters()[0][:3]).state_dict()
    groups = AdamW([{"params": ours[:1]}, {"params": ours[1:]}]).state_dict()
    foreign = SGD([nn.Parameter(p.data.copy()) for p in ours]).state_dict()
    for state, message in [(wrong, "exp_avg has shapes"), (groups, "number of .* groups"), (foreign, "no exp_avg")]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["steps"] == before["steps"] and after["param_groups"] == before["param_groups"]
    for a, b in zip(after["exp_avg"], before["exp_avg"], strict=True):
        np.testing.assert_array_equal(a, b)


# -- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SGD([]), "SGD got no parameters"),
        (lambda p: SGD([p, p]), r"a parameter of shape \(2,\) was given twice"),
        (lambda p: SGD([{"params": [p]}, {"params": p}]), "was given twice"),
        (lambda p: SGD([{"params": [p], "beta": 1}]), r"SGD does not know \['beta'\]; it takes \['lr', 'momentum'"),
        (lambda p: AdamW([tt.ones(2)]), "AdamW optimises leaf tensors that require gradients"),
        (lambda p: AdamW([p * 2]), "AdamW optimises leaf tensors"),
        (lambda p: AdamW([np.ones(2)]), "AdamW optimises leaf tensors"),
        (lambda p: AdamW([p], lr=-1), "AdamW: lr must be finite and not negative, got -1"),
        (lambda p: AdamW([p], betas=(0.9, 1.0)), r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        (lambda p: AdamW([p], weight_decay=float("nan")), "weight_decay must be finite"),
        (lambda p: SGD([p], nesterov=True), "Nesterov needs momentum > 0, got 0.0"),
    ],
)
def test_what_is_refused(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(nn.Parameter(np.ones(2, np.float32)))


def test_one_tensor_is_a_group() -> None:
    p = nn.Parameter(np.ones(2, np.float32))
    optimizer = SGD([{"params": p, "lr": 1.0}])
    p.sum().backward()
    optimizer.step()
    assert p.tolist() == [0, 0]


def test_two_optimisers_may_share_a_parameter() -> None:
    p = nn.Parameter(np.ones(3, np.float32))
    first, second = SGD([p], lr=0.1), SGD([p], lr=0.01)
    for optimizer, expected in ((first, 0.8), (second, 0.78), (first, 0.58)):
        optimizer.zero_grad()
        (p * 2).sum().backward()
        optimizer.step()
        np.testing.assert_allclose(p.data, expected, rtol=1e-6)


def test_zeroed_gradients_leave_frozen_parameters_alone() -> None:
    model = tt.nn.Linear(2, 2)
    optimizer = AdamW(model.parameters())
    model.weight.requires_grad = False
    optimizer.zero_grad(set_to_none=False)
    assert model.weight.grad is None and model.bias.grad.tolist() == [0, 0]


@pytest.mark.parametrize("how", ["zero_grad", "flat_gradients", "gather"])
def test_what_an_optimiser_writes_is_known_to_graphs_that_read_it(how: str) -> None:
    p, w = nn.Parameter(np.ones(2, np.float32)), tt.ones(2, requires_grad=True)
    optimizer = SGD([p], lr=0.1)
    (p * p).sum().backward()
    loss = ((p if how == "gather" else p.grad) * w).sum()
    if how == "zero_grad":
        optimizer.zero_grad(set_to_none=False)
    elif how == "flat_gradients":
        p.grad = None
        optimizer.flat_gradients()
    else:
        p.data = np.full(2, 50, np.float32)
        optimizer.flat_gradients()
    with pytest.raises(RuntimeError, match=r"mul at .* saved an array of shape \(2,\) .* wrote into it in place"):
        loss.backward()
