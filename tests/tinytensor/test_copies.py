"""Copies of tensors, modules and optimisers: copy, deepcopy, pickle, and another process."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from tinytensor import inspect, nn
from tinytensor.inspect.graph import owners
from tinytensor.optim import SGD, AdamW, Optimizer, clip_grad_norm_


def doubled(g: tt.Tensor) -> tt.Tensor:
    return g * 2


class Seen:
    """A module's hook that remembers."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def note(self, g: tt.Tensor) -> None:
        self.norms.append(float((g * g).sum()))


class Net(nn.Module):
    """Weights of every kind: tied, frozen, by columns, with hooks, beside tensors that are no parameters."""

    def __init__(self) -> None:
        self.wte = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.wte.weight
        self.columns = nn.Parameter(np.asfortranarray(tt.randn(4, 4).data))
        self.frozen = nn.Parameter(tt.ones(4), requires_grad=False)
        self.table = tt.arange(5)
        self.seen = Seen()
        self.columns.register_hook(self.seen.note)
        self.blocks[0][0].bias.register_hook(doubled)
        self.blocks[1].eval()

    def forward(self, ids: Any) -> tt.Tensor:
        x = self.wte(ids) @ self.columns
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.frozen)


def loss(net: nn.Module, step: int = 0) -> tt.Tensor:
    ids = np.random.default_rng(step).integers(0, 5, (3, 6))
    return tt.cross_entropy(net(ids[:, :-1]), ids[:, 1:])


def bits(net: nn.Module) -> list[bytes]:
    return [p.data.tobytes() for p in net.parameters()]


PICKLES = {f"pickle {n}": (lambda x, n=n: pickle.loads(pickle.dumps(x, n))) for n in (2, pickle.HIGHEST_PROTOCOL)}
DUPLICATES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, **PICKLES}
duplicates = pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
OPTIMIZERS = {"AdamW": lambda p: AdamW(p, lr=0.03), "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9)}


def trained(net: Net, make: Callable[[Any], Optimizer] = OPTIMIZERS["AdamW"]) -> Optimizer:
    """The optimiser that has made some steps, and the gradients of the next in its memory."""
    optimizer = make([p for p in net.parameters() if p.requires_grad])
    for step in range(3):
        optimizer.zero_grad()
        loss(net, step).backward()
        if step < 2:
            optimizer.step()
    return optimizer


# -- modules


@duplicates
@pytest.mark.parametrize("owned", [False, True], ids=["free", "owned by an optimiser"])
def test_a_duplicate_has_all_that_the_original_has(duplicate: Callable[[Any], Any], owned: bool) -> None:
    net = Net()
    if owned:
        optimizer = trained(net)
    else:
        loss(net).backward()
    twin = duplicate(net)
    names = [name for name, _ in net.named_parameters(shared=True)]
    assert [name for name, _ in twin.named_parameters(shared=True)] == names and repr(twin) == repr(net)
    assert twin.head.weight is twin.wte.weight
    assert [m.training for m in twin.modules()] == [m.training for m in net.modules()]
    assert twin.table.tolist() == net.table.tolist()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert type(q) is nn.Parameter and q.is_leaf and q.requires_grad == p.requires_grad
        assert q.dtype == p.dtype and q.data.strides == p.data.strides and q.data.tobytes() == p.data.tobytes()
        assert not np.shares_memory(p.data, q.data)
        if p.requires_grad:
            assert p.grad.data.tobytes() == q.grad.data.tobytes() and not np.shares_memory(p.grad.data, q.grad.data)
    assert twin.columns.data.flags.f_contiguous or owned
    before, gradients = bits(net), [p.grad.tolist() for p in net.parameters() if p.requires_grad]
    trained(twin)
    assert bits(net) == before != bits(twin)
    assert [p.grad.tolist() for p in net.parameters() if p.requires_grad] == gradients
    if owned:
        optimizer.step()
        assert bits(net) != before


@duplicates
def test_hooks_come_along_and_reach_the_duplicate(duplicate: Callable[[Any], Any]) -> None:
    net = Net()
    twin = duplicate(net)
    for model in (net, twin):
        loss(model).backward()
    np.testing.assert_array_equal(twin.blocks[0][0].bias.grad.data, net.blocks[0][0].bias.grad.data)
    assert len(net.seen.norms) == 1 and twin.seen.norms == net.seen.norms  # each its own
    twin.blocks[0][0].bias.node.hooks = None
    twin.zero_grad()
    loss(twin).backward()
    np.testing.assert_allclose(twin.blocks[0][0].bias.grad.data * 2, net.blocks[0][0].bias.grad.data, 1e-5)


def test_a_shallow_copy_has_the_same_parameters() -> None:
    net = Net()
    twin = copy.copy(net)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in net.parameters()]
    twin.extra = nn.Parameter(tt.ones(1))
    twin.training = False
    assert len(list(net.parameters())) + 1 == len(list(twin.parameters())) and net.training


# -- tensors


def test_a_shallow_copy_of_a_leaf_is_another_name_for_it() -> None:
    x = tt.tensor([2.0], requires_grad=True)
    y = copy.copy(x)
    assert type(y) is tt.Tensor and y.data is x.data
    (x * y).sum().backward()
    assert x.grad.tolist() == y.grad.tolist() == [4]


@duplicates
def test_a_tensor_by_itself(duplicate: Callable[[Any], Any]) -> None:
    x = tt.tensor([[1.0, np.nan], [3.0, 4.0]], "float64", requires_grad=True)
    (x * x).sum().backward()
    y = duplicate(x)
    assert type(y) is tt.Tensor and y.dtype == np.float64 and y.is_leaf and y.requires_grad
    np.testing.assert_array_equal(y.data, x.data)
    np.testing.assert_array_equal(y.grad.data, x.grad.data)
    assert not duplicate(x.detach()).requires_grad and duplicate(tt.arange(3).T).tolist() == [0, 1, 2]
    assert duplicate(tt.tensor(2.0)).item() == 2 and duplicate(tt.zeros(0, 3)).shape == (0, 3)


@duplicates
def test_tensors_in_one_memory_stay_in_one(duplicate: Callable[[Any], Any]) -> None:
    x = tt.ones(3, requires_grad=True)
    y, z = duplicate((x, x.detach()))
    z[0] = 5.0
    assert y.tolist() == [5, 1, 1] and x.tolist() == [1, 1, 1]


@duplicates
def test_a_duplicate_is_known_to_those_who_look_inside(duplicate: Callable[[Any], Any]) -> None:
    x, p = duplicate((tt.ones(2, requires_grad=True), nn.Parameter(tt.ones(2))))
    assert {id(t) for t in owners(inspect.collect((x * p).sum()))} == {id(x), id(p)}
    again = copy.copy(x)
    assert owners(inspect.collect(again.sum())) == [x]


def test_bfloat16_is_copied() -> None:
    pytest.importorskip("ml_dtypes")
    p = nn.Parameter(tt.tensor([1.5, 2.0]).to("bfloat16"))
    for duplicate in DUPLICATES.values():
        q = duplicate(p)
        assert q.dtype == p.dtype and q.tolist() == [1.5, 2] and q.requires_grad


class Named(tt.Tensor):
    """A tensor with an attribute of its own."""


@duplicates
def test_a_subclass_keeps_its_attributes(duplicate: Callable[[Any], Any]) -> None:
    x: Any = Named(np.ones(2))
    x.label = "weights"
    y = duplicate(x)
    assert type(y) is Named and y.label == "weights" and y.tolist() == [1, 1]


def test_results_are_not_copied_with_their_graph() -> None:
    net = Net()
    net.last = loss(net)
    for duplicate in DUPLICATES.values():
        for what in (net, net.last):
            with pytest.raises(TypeError, match=r"a result of cross_entropy is not copied or pickled .* use detach\(\)"):
                duplicate(what)
    net.last = net.last.detach()
    assert copy.deepcopy(net).last.item() == net.last.item()


# -- optimisers


@duplicates
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("optimizer_first", [False, True], ids=["model first", "optimiser first"])
def test_a_model_and_its_optimiser_go_on_with_the_same_bits(duplicate: Any, make: Any, optimizer_first: bool) -> None:
    net = Net()
    optimizer = trained(net, make)
    if optimizer_first:
        second, twin = duplicate((optimizer, net))
    else:
        twin, second = duplicate((net, optimizer))
    assert {id(p) for group in second.param_groups for p in group["params"]} <= {id(p) for p in twin.parameters()}
    start = bits(net)
    for step in range(3, 6):  # the first update is with the gradients that came along
        for model, its in ((net, optimizer), (twin, second)):
            clip_grad_norm_(model.parameters(), 0.1)
            its.step()
            its.zero_grad(set_to_none=step == 3)
            loss(model, step).backward()
        assert bits(net) == bits(twin) != start
    ours, theirs = optimizer.state_dict(), second.state_dict()
    assert ours["steps"] == theirs["steps"] and ours["param_groups"] == theirs["param_groups"]
    for name in optimizer.state_names:
        assert all((a == b).all() for a, b in zip(ours[name], theirs[name], strict=True))


@pytest.mark.parametrize("protocol", [0, 1])
def test_the_oldest_protocols_pickle_too(protocol: int) -> None:
    net, named = Net(), Named(np.ones(2))
    named.label = "weights"
    optimizer = trained(net)
    twin, second, again = pickle.loads(pickle.dumps((net, optimizer, named), protocol))
    for its in (optimizer, second):
        its.step()
    assert bits(twin) == bits(net) and twin.head.weight is twin.wte.weight
    assert type(again) is Named and again.label == "weights" and again.tolist() == [1, 1]


@duplicates
def test_a_duplicated_optimiser_owns_its_parameters_memory(duplicate: Callable[[Any], Any]) -> None:
    net = Net()
    twin, second = duplicate((net, trained(net)))
    assert all(p.grad.data is p.node.slot for p in twin.parameters() if p.requires_grad)
    (gradients,) = second.flat_gradients()
    for p in twin.parameters():
        if p.requires_grad:
            assert p.grad.data.base is gradients
    before = twin.wte.weight.grad.tolist()
    gradients *= 2
    assert twin.wte.weight.grad.tolist() == [[2 * g for g in row] for row in before]


def test_an_optimiser_by_itself_has_parameters_of_its_own() -> None:
    net = Net()
    optimizer = trained(net)
    before = bits(net)
    copy.deepcopy(optimizer).step()
    assert bits(net) == before
    optimizer.step()
    assert bits(net) != before


@duplicates
def test_gradients_beside_the_optimisers_memory_and_frozen_parameters_come_along(duplicate: Callable[[Any], Any]) -> None:
    p, q, r = (nn.Parameter(tt.full(3, value)) for value in (1.0, 2.0, 3.0))
    optimizer = SGD([p, q, r], lr=1.0)
    p.grad, q.requires_grad = tt.ones(3), False
    (p2, q2, r2), second = duplicate(([p, q, r], optimizer))
    assert p2.grad.data is not p2.node.slot  # where clipping would add its squares up in another order
    second.step()
    assert (p2.tolist(), q2.tolist(), r2.tolist()) == ([0, 0, 0], [2, 2, 2], [3, 3, 3])
    assert p.tolist() == [1, 1, 1] and not q2.requires_grad and r2.grad is None
    optimizer.step()
    assert p.tolist() == [0, 0, 0]


# -- another process


def trained_there(net: Net, optimizer: Optimizer) -> tuple[Net, Optimizer, list[bytes]]:
    optimizer.step()
    return net, optimizer, bits(net)


def test_a_spawned_worker_trains_a_model_and_sends_it_back() -> None:
    net = Net()
    optimizer = trained(net)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        back, second, there = pool.apply(trained_there, (net, optimizer))
    optimizer.step()
    assert bits(net) == there == bits(back)
    for model, its in ((net, optimizer), (back, second)):
        its.zero_grad()
        loss(model, 9).backward()
        its.step()
    assert bits(net) == bits(back)


class Trainer:
    """What hooks lead back to, the optimiser in it."""

    def __init__(self) -> None:
        self.model = tt.nn.Linear(2, 2)
        self.optimizer = tt.optim.AdamW(self.model.parameters(), lr=0.1)
        self.seen = 0
        self.model.weight.register_hook(self.note)

    def note(self, gradient: tt.Tensor) -> None:
        self.seen += 1

    def step(self) -> list[float]:
        self.optimizer.zero_grad()
        self.model(tt.ones(1, 2)).sum().backward()
        self.optimizer.step()
        return self.model.weight.tolist()


@duplicates
def test_a_hook_may_lead_to_the_optimiser(duplicate: Callable[[Any], Any]) -> None:
    trainer = Trainer()
    trainer.step()
    twin = duplicate(trainer)
    assert [trainer.step(), trainer.step()] == [twin.step(), twin.step()]
    assert twin.seen == trainer.seen == 3
    assert twin.model.weight.data.base is twin.optimizer._buffers[0][0].data


@duplicates
def test_an_optimiser_whose_parameters_changed_dtype_goes_on_the_same(duplicate: Callable[[Any], Any]) -> None:
    model = tt.nn.Sequential(tt.nn.Linear(4, 5), tt.nn.Linear(5, 3))
    optimizer = tt.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: tt.nn.Module, optimizer: tt.optim.AdamW) -> list[bytes]:
        optimizer.zero_grad()
        model(tt.ones(1, 4)).sum().backward()
        optimizer.step()
        return [p.data.tobytes() for p in model.parameters()]

    step(model, optimizer)
    model[0].to("float64")
    twin = duplicate((model, optimizer))
    assert step(model, optimizer) == step(*twin)
