"""What the page of a backward pass is told: its nodes, numbers and modules, and that looking changes nothing."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from tests.tinytensor.small import gpt, loss_of
from tinytensor import nn
from tinytensor.autograd import Op, apply
from tinytensor.inspect import collect, explain
from tinytensor.inspect.arrays import describe, values
from tinytensor.inspect.explain import facts

pytestmark = pytest.mark.filterwarnings("error")
Facts = dict[str, Any]


def read(page: Path) -> Facts:
    """The data in a page, read as JSON demands."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    return json.loads(text, parse_constant=refuse)


def numbers(data: Facts, place: int) -> Any:
    array = data["arrays"][place]
    return np.array(array["numbers"]).reshape(array["shape"]) if "numbers" in array else None


def node(data: Facts, **wanted: Any) -> dict[str, Any]:
    """The one node with these facts."""
    (found,) = [n for n in data["nodes"] if wanted.items() <= n.items()]
    return found


# -- the pass


def test_a_small_expression_is_told_in_full(tmp_path: Path) -> None:
    x = tt.tensor([0.5, -1.0, 2.0], requires_grad=True)
    y = tt.tensor([3.0, 2.0, -0.5], requires_grad=True)
    loss = (x * y + x.tanh()).sum()
    data = read(explain(loss, tmp_path / "page.html"))
    assert [(n["op"], n["name"]) for n in data["nodes"]] == [
        *[("sum", "loss"), ("add", ""), ("tanh", ""), ("mul", "")],
        *[("leaf", "y"), ("leaf", "x")],
    ]
    total, add, tanh, mul, *_ = data["nodes"]
    assert [[i["node"] for i in n["inputs"]] for n in data["nodes"]] == [[1], [3, 2], [5], [5, 4], [], []]
    assert [[sender for sender, _ in n["arrived"]] for n in data["nodes"]] == [[], [0], [1], [1], [3], [2, 3]]
    a, b, t = np.array([0.5, -1, 2]), np.array([3, 2, -0.5]), np.tanh([0.5, -1, 2])
    expected = {"y": [(a * b + t).sum(), a * b + t, t, a * b, b, a], "g": [1, *[np.ones(3)] * 3, a, b + 1 - t * t]}
    for key, arrays in expected.items():
        for shown, array in zip(data["nodes"], arrays, strict=True):
            np.testing.assert_allclose(numbers(data, shown[key]), array, rtol=2e-5)
    for shown, shares in ((add, [np.ones(3)] * 2), (tanh, [1 - t * t]), (mul, [b, a])):
        for given, share in zip(shown["inputs"], shares, strict=True):
            np.testing.assert_allclose(numbers(data, given["share"]), share, rtol=2e-5)
    assert [(given["argument"], given["constant"]) for given in mul["inputs"]] == [("a", None), ("b", None)]
    assert [(n["kept"], *[i["saved"] for i in n["inputs"]]) for n in (total, tanh, mul)] == [
        *[(False, False), (True, False)],
        (False, True, True),
    ]
    assert mul["rule"] == "y = a·b;  ∂y/∂a = b,  ∂y/∂b = a" and "g * b" in mul["code"]
    assert total["settings"] == "axis=None, keepdims=False"
    assert mul["source"] == "loss = (x * y + x.tanh()).sum()" and re.fullmatch(rf"{re.escape(__file__)}:\d+", mul["line"])
    assert (data["left_out"], data["hooks"], data["groups"]) == (0, False, [])


def test_gradients_are_the_real_ones_and_looking_changes_nothing(tmp_path: Path) -> None:
    model = gpt()
    loss, called = loss_of(model), []
    model.ln_f.weight.register_hook(lambda g: called.append(g))
    data = read(explain(loss, tmp_path / "page.html"))
    assert data["hooks"] and not called and all(p.grad is None for p in model.parameters())
    loss.backward()
    for name, p in model.named_parameters():
        leaf = node(data, op="leaf", name=name)
        about, g = data["arrays"][leaf["g"]], p.grad.numpy().astype(np.float64)
        assert about["shape"] == list(p.shape)
        if "numbers" in about:
            np.testing.assert_allclose(about["numbers"], g.ravel(), rtol=1e-4, atol=1e-7)
        else:
            np.testing.assert_allclose([about["std"], about["max"]], [g.std(), g.max()], rtol=1e-4)
    assert len(called) == 1


def test_what_arrives_is_what_was_sent() -> None:
    model = gpt()
    data = facts(loss_of(model), 600, {})
    sent = [(given["node"], i, given["share"]) for i, n in enumerate(data["nodes"]) for given in n["inputs"]]
    arrived = [(i, sender, share) for i, n in enumerate(data["nodes"]) for sender, share in n["arrived"]]
    assert sorted(arrived) == sorted(s for s in sent if s[2] is not None)
    assert [len(n["arrived"]) for n in data["nodes"] if n["name"] == "wte.weight"] == [2]  # tied: embedding and head
    assert all(n["g"] == n["arrived"][0][1] for n in data["nodes"] if len(n["arrived"]) == 1)  # told once


def test_an_input_given_twice_gets_two_shares() -> None:
    x = tt.tensor([2.0, 3.0], requires_grad=True)
    data = facts((x / x).sum(), 600, {})
    np.testing.assert_allclose(
        [numbers(data, s["share"]) for s in data["nodes"][1]["inputs"]], [[1 / 2, 1 / 3], [-1 / 2, -1 / 3]], 1e-5
    )
    np.testing.assert_allclose(numbers(data, data["nodes"][2]["g"]), [0, 0], atol=1e-7)


def test_a_checkpointed_function_is_shown_as_it_runs_again() -> None:
    x, w = tt.tensor([1.0, 2.0], requires_grad=True), tt.tensor([3.0, -1.0], requires_grad=True)
    data = facts(tt.checkpoint(lambda t: (t * w).exp(), x * 2).sum(), 600, {"w": w})
    assert [n["op"] for n in data["nodes"]] == ["sum", "checkpoint", "exp", "mul", "mul", "leaf", "leaf"]
    first, again = data["nodes"][1]["inputs"]
    assert (first["node"], first["share"], again["node"], again["argument"]) == (4, None, 2, "f(…)")
    w_node = node(data, name="w")
    np.testing.assert_allclose(numbers(data, w_node["g"]), [2 * np.exp(6), 4 * np.exp(-4)], rtol=1e-5)


# -- values


def test_values_that_no_derivative_keeps_are_told_where_they_are_known(tmp_path: Path) -> None:
    """Of a sum nothing is kept: its inputs are known while their tensors live, large results when a variable names them."""
    x, big = tt.tensor([1.0, 2.0], requires_grad=True), tt.tensor(np.arange(30.0), "float32", requires_grad=True)
    _hidden = named = big + 1
    loss = (x + tt.tensor([5.0, 5.0], requires_grad=True)).sum() + (named + big).sum()
    gc.collect()
    data = read(explain(loss, tmp_path / "page.html"))
    assert numbers(data, node(data, name="x")["y"]).tolist() == [1, 2]
    dead = node(data, op="leaf", name="")
    assert data["arrays"][dead["y"]] == {"shape": [2], "dtype": "float32"}
    assert "mean" in data["arrays"][node(data, name="named")["y"]]
    assert all(n["name"] != "_hidden" for n in data["nodes"])
    unnamed = [n for n in data["nodes"] if n["op"] == "add" and data["arrays"][n["y"]]["shape"] == [30] and not n["name"]]
    assert [data["arrays"][n["y"]] for n in unnamed] == [{"shape": [30], "dtype": "float32"}]


def test_a_value_made_again_warns_of_nothing() -> None:
    x = tt.tensor([1e30], requires_grad=True)
    with np.errstate(over="ignore"):
        loss = (x * x).sum()
    data = facts(loss, 600, {})
    assert data["arrays"][data["nodes"][1]["y"]]["numbers"] == ["inf"]


def test_a_value_written_since_is_not_told() -> None:
    x, y = (tt.tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
    loss = (x + y).sum()
    with tt.no_grad():
        x += 1
    data = facts(loss, 600, {"x": x, "y": y})
    assert numbers(data, node(data, name="x")["y"]) is None
    assert numbers(data, node(data, name="y")["y"]).tolist() == [1, 2]


def test_values_of_parameters_are_told() -> None:
    net = nn.Linear(2, 1)
    data = facts(net(tt.ones(1, 2)).sum(), 600, {})
    assert numbers(data, node(data, name="bias")["y"]) == pytest.approx(net.bias.numpy(), rel=1e-5)


def test_what_is_known_are_arrays() -> None:
    x = tt.tensor([1.0, 2.0], requires_grad=True)
    loss = tt.checkpoint(lambda t: t.exp(), x).sum()
    assert {type(array) for array in values(collect(loss), [loss]).values()} == {np.ndarray}


def test_constants_are_told_when_the_rule_keeps_them() -> None:
    x, other = tt.tensor([1.0, 2.0], requires_grad=True), tt.tensor([9.0, 9.0])
    data = facts((x * tt.tensor([3, 4]) + tt.tensor([7.0, 8.0])).sum() * 2, 600, {"x": x, "other": other})
    outer, add, mul = (data["nodes"][i]["inputs"][1] for i in (0, 2, 3))
    assert [given["node"] for given in (outer, add, mul)] == [None] * 3
    assert data["arrays"][outer["constant"]] == {"shape": [], "dtype": "int", "numbers": [2]}
    assert numbers(data, mul["constant"]).tolist() == [3, 4]
    assert data["arrays"][data["nodes"][3]["y"]] == {"shape": [2], "dtype": "float32", "numbers": [3, 8]}
    unknown = {"shape": [2], "dtype": "float32"}
    assert [data["arrays"][place] for place in (add["constant"], data["nodes"][2]["y"])] == [unknown, unknown]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_statistics_are_those_of_the_finite_numbers(dtype: str) -> None:
    array = np.r_[np.random.default_rng(0).normal(size=400), [0] * 100].astype(
        tt.backend.bfloat16() if dtype == "bfloat16" else dtype
    )
    about = describe(array)
    plain = array.astype(np.float64)
    counts, edges = np.histogram(plain, 24)
    inner = np.abs(plain[:, None] - edges[1:-1]).min() > 1e-9
    assert inner and about["bins"] == counts.tolist()
    np.testing.assert_allclose(
        [about[k] for k in ("min", "max", "mean", "std", "zeros")],
        [plain.min(), plain.max(), plain.mean(), plain.std(), (plain == 0).mean()],
        rtol=1e-5,
    )
    array[:3] = [np.nan, np.inf, -np.inf]
    worse = describe(array)
    assert (worse["not_finite"], sum(worse["bins"])) == (3, 497)
    np.testing.assert_allclose([worse["mean"], worse["max"]], [plain[3:].mean(), plain[3:].max()], rtol=1e-5)


def test_odd_arrays() -> None:
    assert describe(np.array([np.nan, np.inf, -np.inf, 1 / 3]))["numbers"] == ["nan", "inf", "-inf", 0.333333]
    assert describe(np.array([[True, False]])) == {"shape": [1, 2], "dtype": "bool", "numbers": [True, False]}
    assert describe(np.array(2**40 + 1))["numbers"] == [2**40 + 1]
    assert describe(np.zeros((2, 0), "float32")) == {"shape": [2, 0], "dtype": "float32", "numbers": []}
    assert describe(np.full(30, np.nan)) == {"shape": [30], "dtype": "float64", "zeros": 0.0, "not_finite": 30}
    assert describe(np.full(30, 2.5))["bins"] == [30] + [0] * 23
    assert json.loads(json.dumps(describe(np.array([-1.7e308, 1.7e308] * 15)), allow_nan=False))["bins"][0] > 0
    assert len(describe(np.zeros(24))["numbers"]) == 24 and "bins" in describe(np.zeros(25))


# -- modules


def names(data: Facts, shown: dict[str, Any]) -> list[str]:
    """The boxes around a node, outermost first."""
    place, around = shown["group"], []
    while place is not None:
        around.insert(0, data["groups"][place]["name"])
        place = data["groups"][place]["parent"]
    return around


def test_a_models_nodes_and_parameters_lie_in_their_modules() -> None:
    model = gpt()
    data = facts(loss_of(model), 600, {})
    assert names(data, node(data, op="gelu", inputs=data["nodes"][6]["inputs"])) == ["h.1", "mlp"]
    where = {n["name"]: ".".join(names(data, n)) for n in data["nodes"] if n["op"] == "leaf"}
    tied = {"wte.weight", "wpe.weight"}  # the model itself reads these
    assert where == {name: "" if name in tied else name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert {g["kind"] for g in data["groups"] if g["name"] == "attn"} == {"CausalSelfAttention"}
    assert [g["name"] for g in data["groups"] if g["parent"] is None] == ["wte", "drop", "h.0", "h.1", "ln_f"]


def test_each_call_is_a_box_and_what_calls_share_is_outside() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            self.mix = nn.Linear(2, 2)

        def forward(self, h: Any) -> Any:
            return self.mix(h).tanh()

    class Twice(nn.Module):
        def __init__(self) -> None:
            self.cell, self.out = Cell(), nn.Linear(2, 1)

        def forward(self, h: Any) -> Any:
            return self.out(self.cell(self.cell(h)))

    model = Twice()
    data = facts(model(tt.ones(1, 2)).sum(), 600, {})
    assert [(g["name"], g["kind"], g["call"], g["parent"]) for g in data["groups"]] == [
        *[("cell", "Cell", 1, None), ("mix", "Linear", 1, 0)],
        *[("cell", "Cell", 2, None), ("mix", "Linear", 1, 2), ("out", "Linear", 1, None)],
    ]
    assert names(data, node(data, name="cell.mix.weight")) == []
    assert names(data, node(data, name="out.weight")) == ["out"]
    head = nn.Linear(2, 1)
    loss = (model(tt.ones(1, 2)) * head(tt.ones(1, 2))).sum()
    assert [g["name"] for g in facts(loss, 600, {})["groups"] if g["parent"] is None] == ["Twice", "Linear"]
    del head
    assert [g["name"] for g in facts(loss, 600, {})["groups"] if g["parent"] is None] == ["Twice", "module"]


# -- what does not fit


@pytest.mark.parametrize("most", [1, 2, 25])
def test_the_newest_nodes_are_shown_and_the_rest_is_counted(most: int) -> None:
    model = gpt()
    loss = loss_of(model)
    whole, data = facts(loss, 600, {}), facts(loss, most, {})
    assert 0 < len(data["nodes"]) <= most and data["left_out"] == len(whole["nodes"]) - len(data["nodes"]) > 0
    ops = [n for n in data["nodes"] if n["op"] != "leaf"]
    assert [(n["op"], n["line"]) for n in ops] == [(n["op"], n.get("line")) for n in whole["nodes"]][: len(ops)]
    ends = [given for n in ops for given in n["inputs"] if given["node"] is None and given["share"] is not None]
    assert ends
    if most == 25:
        tied, full = node(data, name="wte.weight"), node(whole, name="wte.weight")
        assert [sender for sender, _ in tied["arrived"]] == [2, None]
        assert data["arrays"][tied["g"]] == whole["arrays"][full["g"]]  # with the share of what is left out


def test_a_six_layer_gpt_makes_a_small_page_that_needs_nothing(tmp_path: Path) -> None:
    model = gpt(n_layer=6, n_embd=48)
    loss = loss_of(model)
    text = explain(loss, tmp_path / "page.html").read_text("utf-8")
    assert len(read(tmp_path / "page.html")["nodes"]) > 200
    assert len(text.encode()) < 500_000
    assert not re.search(r"(src|href)=|@import|url\(['\"h]|fetch\(|XMLHttpRequest|\bimport\b\s*[\"'{(]", text)
    assert set(re.findall(r"https?://[^\"'\s]*", text)) == {"http://www.w3.org/2000/svg"}


TYPED = """
class Same(Op):
    def forward(xp, x):
        return x + 0
    def vjp(g, y, x):
        return g
def f(x):
    return apply(Same, x)
"""


def test_odd_rules_and_parameters() -> None:
    class Odd(Op):
        """y = x </script><b> & more"""

        def forward(xp: Any, *xs: Any, **_: Any) -> Any:
            return xs[0] + xs[1]

        def vjp(g: Any, y: Any, *xs: Any, **_: Any) -> Any:
            return g, None

    x = tt.tensor([1.0, 2.0], requires_grad=True)
    given = {
        "index": (..., slice(1, None), slice(0, 4, 2), [0, "a"]),
        "array": np.ones(3),
        "mixed": (1, np.ones(2)),
        "none": None,
    }
    data = facts(apply(Odd, x, x, **given).sum(), 600, {})
    shown = data["nodes"][1]
    assert shown["settings"] == "index=(..., 1:, 0:4:2, (0, 'a')), none=None"
    assert [(i["argument"], i["share"] is None) for i in shown["inputs"]] == [("input 0", False), ("input 1", True)]

    exec(TYPED, scope := {"Op": Op, "apply": apply})
    shown = facts(scope["f"](x).sum(), 600, {})["nodes"][1]
    assert (shown["op"], shown["source"], shown["code"]) == ("same", "", "")


def test_text_in_the_page_stays_text(tmp_path: Path) -> None:
    x = tt.tensor([1.0], requires_grad=True)
    loss = (x * 2).sum()  # </script><script>throw 1</script>
    page = explain(loss, str(tmp_path / "page.html"))
    assert "</script><script>throw" in read(page)["nodes"][0]["source"]
    assert page.read_text("utf-8").count("</script>") == 2
    assert "<title>The backward pass of loss</title>" in page.read_text("utf-8")


# -- errors


def freed() -> tt.Tensor:
    y = (tt.ones(2, requires_grad=True) * 2).sum()
    y.backward()
    return y


REFUSED: dict[str, tuple[Callable[[], tt.Tensor], type[Exception], str]] = {
    "not recorded": (lambda: tt.ones(2).sum(), RuntimeError, r"nothing was recorded for this tensor: .*"),
    "not one element": (
        lambda: tt.ones(2, requires_grad=True) * 2,
        ValueError,
        r"backward from a tensor of shape \(2,\) .*sum\(\).*",
    ),
    "freed": (freed, RuntimeError, r"sum at .*:\d+: a second backward through this graph, .* retain_graph=True to the first"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_explained_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    make, error, sentence = REFUSED[name]
    with pytest.raises(error) as refused:
        explain(make(), tmp_path / "page.html")
    assert re.fullmatch(sentence, str(refused.value))
    assert not list(tmp_path.iterdir())


def test_where_and_how_much_are_checked_first(tmp_path: Path) -> None:
    loss = tt.ones(2, requires_grad=True).sum()
    with pytest.raises(FileNotFoundError, match=r"explain: there is no folder .*missing in which to write page.html"):
        explain(loss, tmp_path / "missing" / "page.html")
    with pytest.raises(ValueError, match="explain: max_nodes=0 must be at least 1"):
        explain(loss, tmp_path / "page.html", max_nodes=0)
