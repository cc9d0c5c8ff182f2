"""Modules: the tree, its state, and each layer against PyTorch's."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tinytensor as tt
from tinytensor import nn


class Net(nn.Module):
    """Two blocks, a shared weight, and attributes that are no parameters."""

    def __init__(self) -> None:
        self.wte = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)) for _ in range(2))
        self.scale = nn.Parameter(np.ones(3, np.float32))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.wte.weight
        self.table = tt.arange(3)
        self.name = "net"

    def forward(self, ids: Any) -> tt.Tensor:
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale)


NAMES = [
    "wte.weight",
    "blocks.0.0.weight",
    "blocks.0.0.bias",
    "blocks.1.0.weight",
    "blocks.1.0.bias",
    "scale",
]


# -- the tree


def test_parameters_by_name_each_once() -> None:
    net = Net()
    assert [name for name, _ in net.named_parameters()] == NAMES
    assert [name for name, _ in net.named_parameters(shared=True)] == [*NAMES, "head.weight"]
    assert [id(p) for p in net.parameters()] == [id(p) for _, p in net.named_parameters()]
    assert all(isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf for p in net.parameters())


def test_a_module_that_is_reached_from_within_itself_is_named_once() -> None:
    net = Net()
    net.blocks.whole, net.itself = net, net
    net.again = net.blocks[0]
    assert [name for name, _ in net.named_parameters()] == NAMES
    again = ["again.0.weight", "again.0.bias"]
    assert [name for name, _ in net.named_parameters(shared=True)] == [*NAMES, "head.weight", *again]
    net.load_state_dict(net.state_dict())


def test_modules_by_name_each_once() -> None:
    net = Net()
    net.again = net.blocks[0]
    names = [name for name, _ in net.named_modules()]
    assert names == ["", "wte", "blocks", *(f"blocks.{i}{part}" for i in range(2) for part in ("", ".0", ".1")), "head"]
    assert len(list(net.modules())) == len(names)
    assert [name for name, _ in net.named_children()] == ["wte", "blocks", "head", "again"]
    assert list(net.children()) == [net.wte, net.blocks, net.head, net.again]


def test_train_and_eval_reach_every_module() -> None:
    net = Net()
    assert net.eval() is net and not any(m.training for m in net.modules())
    assert net(tt.tensor([0, 1])).tolist() == net(tt.tensor([0, 1])).tolist()
    assert net.train() is net and all(m.training for m in net.modules())
    assert net(tt.tensor([0, 1])).tolist() != net(tt.tensor([0, 1])).tolist()


def test_requires_grad_zero_grad_and_frozen_parameters() -> None:
    net = Net().eval()
    net(tt.tensor([0, 1])).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    net.requires_grad_(False)
    assert not net(tt.tensor([0])).requires_grad
    net.zero_grad()
    assert net.to("float64") is net and all(p.dtype == np.float64 for p in net.parameters())
    net.requires_grad_()
    assert net(tt.tensor([0])).requires_grad


def test_a_shared_weight_gets_both_gradients() -> None:
    net = Net().eval()
    net(tt.tensor([1, 1])).sum().backward()
    both = net.wte.weight.grad.data.copy()
    net.zero_grad()
    weight = net.head.weight
    net.head.weight = nn.Parameter(weight.data.copy())
    net(tt.tensor([1, 1])).sum().backward()
    np.testing.assert_allclose(both, net.wte.weight.grad.data + net.head.weight.grad.data, 1e-6)


def test_to_a_dtype() -> None:
    layer = nn.Linear(2, 3).to("float64")
    assert layer(tt.ones(1, 2, dtype="float64")).dtype == np.float64
    with pytest.raises(TypeError, match="parameters need a floating-point dtype, not int64"):
        layer.to("int64")
    assert layer.to("cpu") is layer


def test_module_list_and_sequential() -> None:
    layers = [nn.Linear(2, 2) for _ in range(3)]
    modules = nn.ModuleList(layers[:2]).append(layers[2])
    assert len(modules) == 3 and list(modules) == layers and modules[-1] is layers[2]
    x = tt.ones(1, 2)
    assert nn.Sequential(*layers)(x).tolist() == layers[2](layers[1](layers[0](x))).tolist()
    assert nn.Sequential()(x) is x
    with pytest.raises(NotImplementedError, match=r"ModuleList defines no forward\(\)"):
        modules(x)


def test_repr() -> None:
    assert repr(nn.Linear(2, 3)) == "Linear(2, 3, bias=True)"
    assert repr(nn.Sequential(nn.Dropout(0.1), nn.LayerNorm(4, bias=False))) == (
        "Sequential(\n  (0): Dropout(p=0.1)\n  (1): LayerNorm(4, eps=1e-05, bias=False)\n)"
    )
    assert repr(nn.Embedding(3, 4)) == "Embedding(3, 4)" and repr(nn.RMSNorm(4)) == "RMSNorm(4, eps=1e-06)"


def test_a_deep_copy_is_independent() -> None:
    net = Net().eval()
    twin = copy.deepcopy(net)
    assert twin.head.weight is twin.wte.weight is not net.wte.weight
    (net(tt.tensor([0])) * twin(tt.tensor([0]))).sum().backward()  # both in one graph
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        np.testing.assert_allclose(p.grad.data, q.grad.data, 1e-5, 1e-7)
        assert not np.shares_memory(p.data, q.data) and not np.shares_memory(p.grad.data, q.grad.data)


# -- state


def test_state_dict_holds_copies() -> None:
    net = Net()
    state = net.state_dict()
    assert list(state) == NAMES and all(type(a) is np.ndarray for a in state.values())
    state["scale"][...] = 7
    assert net.scale.tolist() == [1, 1, 1]


def test_load_state_dict_writes_in_place() -> None:
    net, other = Net(), Net()
    arrays = [p.data for p in net.parameters()]
    net.load_state_dict(other.state_dict())
    for p, array, q in zip(net.parameters(), arrays, other.parameters(), strict=True):
        assert p.data is array and p.tolist() == q.tolist()
    x = tt.tensor([1, 2])
    assert net.eval()(x).tolist() == other.eval()(x).tolist()


def test_load_state_dict_takes_tensors_other_dtypes_and_any_name_of_a_shared_weight() -> None:
    net = Net()
    state: dict[str, Any] = {k: tt.tensor(v.astype(np.float64) + 1) for k, v in net.state_dict().items()}
    state["head.weight"] = state.pop("wte.weight")
    expected = net.wte.weight.data + 1
    net.load_state_dict(state)
    assert net.wte.weight.dtype == np.float32
    np.testing.assert_allclose(net.wte.weight.data, expected, 1e-6)


def test_load_state_dict_names_every_fault_and_writes_nothing() -> None:
    net = Net()
    before = net.state_dict()
    state = {k: v + 1 for k, v in before.items()}
    del state["blocks.0.0.bias"], state["wte.weight"]
    state["scale"] = np.ones((3, 1))
    state["blocks.1.0.bias"] = np.array(["a", "b", "c"])
    state["extra"] = np.ones(2)
    with pytest.raises(ValueError, match="state does not fit Net") as caught:
        net.load_state_dict(state)
    for fault in (
        r"missing blocks.0.0.bias (3,)",
        r"missing wte.weight (5, 3)",
        r"unexpected extra (2,)",
        r"scale has shape (3, 1) where the model has (3,)",
        r"blocks.1.0.bias has dtype <U1, which is not a number",
    ):
        assert fault in str(caught.value)
    for name, array in net.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_load_state_dict_that_is_not_strict() -> None:
    net = Net()
    net.load_state_dict({"scale": np.full(3, 2.0), "extra": np.ones(1)}, strict=False)
    assert net.scale.tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match=r"scale has shape \(2,\)"):
        net.load_state_dict({"scale": np.ones(2)}, strict=False)


def test_load_state_dict_may_take_the_arrays_themselves() -> None:
    net = Net()
    net(tt.tensor([0, 1])).sum().backward()
    state = {k: v + 1 for k, v in net.state_dict().items()}
    state["scale"] = state["scale"].astype(np.float64)
    net.load_state_dict(state, assign=True)
    for name, p in net.named_parameters():
        assert (p.data is state[name]) == (name != "scale")
        assert p.dtype == np.float32
        assert p.grad is None
        np.testing.assert_array_equal(p.data, state[name])
    assert net.head.weight is net.wte.weight
    with pytest.raises(ValueError, match=r"scale has shape \(2,\)"):
        net.load_state_dict(state | {"scale": np.ones(2)}, assign=True)
    net(tt.tensor([0, 1])).sum().backward()
    assert net.scale.grad is not None


def test_loading_after_a_forward_pass_spoils_its_gradient() -> None:
    net = Net().eval()
    loss = net(tt.tensor([0, 1])).sum()
    net.load_state_dict(net.state_dict())
    with pytest.raises(RuntimeError, match="wrote into it in place"):
        loss.backward()


# -- layers


def twin(ours: nn.Module, theirs: torch.nn.Module) -> tuple[nn.Module, torch.nn.Module]:
    """Both with our weights, in float64."""
    ours.to("float64")
    theirs.double().load_state_dict({k: torch.from_numpy(v) for k, v in ours.state_dict().items()})
    return ours, theirs


LAYERS: dict[str, Callable[[], tuple[nn.Module, torch.nn.Module, Any]]] = {
    "Linear": lambda: (nn.Linear(4, 3), torch.nn.Linear(4, 3), (2, 5, 4)),
    "Linear without bias": lambda: (nn.Linear(4, 3, bias=False), torch.nn.Linear(4, 3, bias=False), (4,)),
    "Embedding": lambda: (nn.Embedding(6, 3), torch.nn.Embedding(6, 3), np.array([[0, 5, 5], [2, 1, 0]])),
    "LayerNorm": lambda: (nn.LayerNorm(4), torch.nn.LayerNorm(4), (2, 3, 4)),
    "LayerNorm without bias": lambda: (nn.LayerNorm(4, 0.1, bias=False), torch.nn.LayerNorm(4, 0.1, bias=False), (3, 4)),
    "RMSNorm": lambda: (nn.RMSNorm(4), torch.nn.RMSNorm(4, eps=1e-6), (2, 3, 4)),
    "Sequential": lambda: (
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)),
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2)),
        (3, 4),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_torch(name: str) -> None:
    ours, theirs, shape = LAYERS[name]()
    for p in ours.parameters():  # not their special initial values
        nn.init.normal_(p)
    twin(ours, theirs)
    values = shape if isinstance(shape, np.ndarray) else np.random.default_rng(0).normal(size=shape)
    x = tt.tensor(values, requires_grad=values.dtype == np.float64)
    y = torch.tensor(values, requires_grad=values.dtype == np.float64)
    ours_out, theirs_out = ours(x), theirs(y)
    np.testing.assert_allclose(ours_out.data, theirs_out.detach().numpy(), 1e-12, 1e-13)
    (ours_out**2).sum().backward()
    (theirs_out**2).sum().backward()
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True)) + ([(x, y)] if x.requires_grad else [])
    for p, q in pairs:
        np.testing.assert_allclose(p.grad.data, q.grad.numpy(), 1e-11, 1e-12)


def test_dropout_follows_the_mode() -> None:
    layer, x = nn.Dropout(0.25), tt.ones(10_000)
    y = layer(x).data
    assert abs((y == 0).mean() - 0.25) < 0.03 and set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert layer.eval()(x) is x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(0, 3), "Linear: in_features must be a positive integer, got 0"),
        (lambda: nn.Linear(3, 2.5), "Linear: out_features must be a positive integer, got 2.5"),
        (lambda: nn.Embedding(-1, 3), "Embedding: num_embeddings must be a positive integer, got -1"),
        (lambda: nn.LayerNorm(0), "LayerNorm: dim must be a positive integer, got 0"),
        (lambda: nn.Dropout(1.5), r"Dropout: p must be in \[0, 1\], got 1.5"),
    ],
)
def test_layers_refuse_bad_sizes(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- initial values


def test_initial_weights_have_their_spread() -> None:
    n, m = 400, 300
    x = tt.zeros(m, n)
    layer = nn.Linear(n, m)
    bound = 1 / math.sqrt(n)
    assert abs(layer.weight.data).max() <= bound and layer.weight.data.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(layer.bias.data).max() <= bound
    assert nn.Embedding(n, m).weight.data.std() == pytest.approx(1, rel=0.02)
    assert nn.init.xavier_uniform_(x).data.std() == pytest.approx(math.sqrt(2 / (n + m)), rel=0.02)
    assert nn.init.kaiming_normal_(x).data.std() == pytest.approx(math.sqrt(2 / n), rel=0.02)
    assert nn.init.normal_(x, 3.0, 0.5).data.mean() == pytest.approx(3, rel=0.01)
    assert nn.init.uniform_(x, 2.0, 4.0).data.min() >= 2
    assert set(nn.init.ones_(x).data.flat) == {1} and set(nn.init.zeros_(x).data.flat) == {0}
    assert set(nn.init.constant_(x, 2.5).data.flat) == {2.5}
    with pytest.raises(ValueError, match=r"fan-in and fan-out need at least 2 dimensions, got shape \(3,\)"):
        nn.init.xavier_uniform_(tt.zeros(3))


def test_initial_weights_follow_the_seed_and_not_the_dtype() -> None:
    tt.manual_seed(3)
    a = Net().state_dict()
    tt.manual_seed(3)
    b = Net().state_dict()
    assert all((a[k] == b[k]).all() for k in a)
    tt.manual_seed(3)
    single = nn.Embedding(4, 2).weight.data
    tt.manual_seed(3)
    np.testing.assert_array_equal(nn.Embedding(4, 2, dtype="float64").weight.data.astype(np.float32), single)


def test_initial_values_can_be_left_out_in_this_thread() -> None:
    x = tt.zeros(3, 2)
    seen: list[bool] = []
    with nn.init.skip():
        for left_out in (nn.init.normal_, nn.init.uniform_, nn.init.xavier_uniform_, nn.init.kaiming_normal_):
            assert left_out(x) is x and not x.data.any()
        other = threading.Thread(target=lambda: seen.append(bool(nn.init.normal_(tt.zeros(2)).data.all())))
        other.start()
        other.join()
    assert seen == [True]
    tt.manual_seed(3)
    with nn.init.skip():
        nn.Linear(2, 3)
    drawn = nn.Embedding(4, 2).weight.data
    tt.manual_seed(3)
    np.testing.assert_array_equal(nn.Embedding(4, 2).weight.data, drawn)  # what is left out uses up no random numbers


def test_initialising_is_a_write() -> None:
    layer = nn.Linear(2, 2)
    x = tt.ones(1, 2, requires_grad=True)
    loss = layer(x).sum()
    nn.init.zeros_(layer.weight)
    with pytest.raises(RuntimeError, match="wrote into it in place"):
        loss.backward()


def test_read_only_arrays_may_be_replaced_by_others() -> None:
    model = nn.Linear(2, 2, bias=False)
    for _ in range(2):
        model.load_state_dict({"weight": np.frombuffer(bytes(16), np.float32).reshape(2, 2)}, assign=True)


def test_modules_that_know_their_parent_have_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].parent = model
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
