"""What the graph tells of itself: order and names, memory, where gradients end, where numbers stop being finite."""

from __future__ import annotations

import gc
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from tests.tinytensor.small import gpt, loss_of
from tinytensor import inspect, nn, parallel, state
from tinytensor.inspect import backward_pass, collect, detect_anomaly, ledger, why_no_grad

HERE = __file__


def leaf(*shape: int, dtype: str = "float32") -> tt.Tensor:
    return tt.tensor(np.linspace(0.5, 2, int(np.prod(shape))).reshape(shape), dtype=dtype, requires_grad=True)


# -- the graph


def test_entries_are_in_order_and_know_their_op_line_and_inputs() -> None:
    x, y = leaf(3), leaf(3)
    z = (x * y + x.tanh()).sum()
    entries = collect(z)
    assert [e.op for e in entries] == ["leaf", "leaf", "mul", "tanh", "add", "sum"]
    _, _, mul, tanh, add, total = entries
    assert (mul.inputs, tanh.inputs, add.inputs, total.inputs) == (entries[:2], [entries[0]], [mul, tanh], [add])
    assert mul.line == f"{HERE}:{tanh.line.rpartition(':')[2]}" and mul.rule.startswith("y = a·b")


def test_modules_and_parameters_have_their_names() -> None:
    model = gpt()
    entries = collect(loss_of(model))
    assert {e.module for e in entries if e.op == "leaf"} == {name for name, _ in model.named_parameters()}
    modules = [e.module for e in entries if e.op == "linear"]
    one = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert modules == [f"h.{i}.{name}" for i in range(2) for name in one] + [""]  # the head is the model's own
    assert [e.module for e in entries if e.op == "gelu"] == ["h.0.mlp", "h.1.mlp"]


def test_a_graph_whose_model_is_no_more() -> None:
    loss = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))(leaf(4, 3)).sum()
    gc.collect()
    assert [e.op for e in collect(loss)].count("linear") == 2
    assert ledger(loss).total > 0


def test_a_graph_does_not_keep_its_model_alive() -> None:
    model = nn.Linear(3, 2)
    model.last = model(leaf(4, 3))  # a module that holds its own result is no cycle: nodes refer to modules weakly
    node = model.last.node
    gc.collect()
    gc.disable()
    try:
        import weakref

        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert state.path(node.call) == ""


def test_an_error_within_a_module_names_it() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Any) -> Any:
            return x @ tt.ones(7, 7)

    with pytest.raises(
        ValueError, match=rf"matmul\(float32\[2, 3\], float32\[7, 7\]\) at {re.escape(HERE)}:\d+ in 1.0: 3 columns"
    ):
        nn.Sequential(nn.Linear(3, 3), nn.Sequential(Wrong()))(tt.ones(2, 3))
    y = nn.Sequential(nn.Dropout(), nn.Linear(3, 3))(tt.ones(2, 3)).sum()
    y.backward()
    with pytest.raises(RuntimeError, match=rf"sum at {re.escape(HERE)}:\d+: a second backward"):
        y.backward()


def test_a_backward_pass_that_changes_nothing() -> None:
    """Totals and shares are those of the real one, and the graph, its gradients and hooks are as before."""
    model = gpt()
    loss, called = loss_of(model), []
    next(model.parameters()).register_hook(lambda g: called.append(g))
    seen: dict[Any, tuple[Any, list[Any]]] = {}
    backward_pass(loss, lambda node, g, sent: seen.update({node: (g, sent)}))
    assert not called and all(p.grad is None for p in model.parameters())
    assert [n.serial for n in seen] == sorted((n.serial for n in seen), reverse=True)
    for node, (g, _) in seen.items():
        shares = [share for _, sent in seen.values() for edge, share in sent if edge is node]
        assert node is loss.node or np.allclose(sum(shares), g)
    loss.backward()
    for p in model.parameters():
        np.testing.assert_allclose(seen[p.node][0], p.grad.data, rtol=1e-5, atol=1e-7)


# -- memory


def held_by_arrays(f: Callable[[], tt.Tensor]) -> tuple[tt.Tensor, int]:
    """The result, and by how much more memory of arrays lives after f than before it."""
    f()  # caches are filled
    gc.collect()
    domain = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    tracemalloc.start()
    try:
        y = f()
        return y, sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([domain]).traces)
    finally:
        tracemalloc.stop()


X, W, V = leaf(40, 30), leaf(30, 50), leaf(40)
COMPUTATIONS: dict[str, Callable[[], tt.Tensor]] = {
    "products": lambda: ((X @ W).tanh() @ W.T).sigmoid().sum(),
    "views": lambda: (X.exp()[0] * X.reshape(30, 40)[0, :30].sin()).sum(),
    "broadcast": lambda: (X * V.reshape(40, 1)).softmax(-1).log().mean(),
    "indices": lambda: X[np.arange(80) % 7].gelu().sum(),
    "dropout": lambda: tt.dropout_add(tt.dropout(X, 0.3), X, 0.2).sum(),
    "norm": lambda: tt.layer_norm(X, W[:, 0].tanh()).var(),
}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_the_ledger_is_what_the_process_holds(name: str) -> None:
    y, held = held_by_arrays(COMPUTATIONS[name])
    pieces = ledger(y)
    assert abs(pieces.total - held) <= y.data.nbytes + 64, (
        f"{pieces}\nheld {held}"
    )  # the result, and an array or two of one number
    assert pieces.total > 1000


def test_the_ledger_of_a_model() -> None:
    model = gpt(block_size=64, n_embd=64)
    y, held = held_by_arrays(lambda: loss_of(model))
    pieces = ledger(y)
    assert pieces.total == pytest.approx(held, rel=0.01)
    for what in ("op", "module", "line", "role"):
        assert sum(pieces.by(what).values()) == pieces.total
    assert pieces.by("op")["gelu"] > 0 and "h.1.mlp" in pieces.by("module") and "model.py" in next(iter(pieces.by("line")))
    assert list(pieces.by("op").values()) == sorted(pieces.by("op").values(), reverse=True)
    text = str(pieces)
    assert f"{pieces.total / 1e3:,.3f} kB held for backward" in text and "h.0.attn" in text
    y.backward()
    assert set(ledger(y).by("role")) <= {"ids", "targets"}  # integers, which stay with the graph


def test_parameters_of_an_optimiser_are_nobodys() -> None:
    model = gpt()
    before = ledger(loss_of(model)).total
    optimizer = tt.optim.AdamW(model.parameters())
    assert ledger(loss_of(model)).total == before and optimizer


# -- why there is no gradient


def no_grad_within(x: tt.Tensor) -> tt.Tensor:
    with tt.no_grad():
        h = x.exp()
    return (h * leaf(3)).sum()


def unrecorded(x: tt.Tensor) -> tt.Tensor:
    with tt.no_grad():
        return x.sum()


REASONS: dict[str, tuple[Callable[[tt.Tensor], tt.Tensor], str]] = {
    "no_grad": (no_grad_within, r"exp at .*test_inspect.py:\d+ ran under no_grad\(\)"),
    "detach": (
        lambda x: (x.exp().detach() * leaf(3)).sum(),
        r"mul at .*:\d+ took what came of x without its gradient, through",
    ),
    "integer": (lambda x: (x.astype("int32") * leaf(3)).sum(), r"cast at .*:\d+ gave int32, through which no gradient flows"),
    "data": (lambda x: (tt.Tensor(x.data) + leaf(3)).sum(), r"add at .*:\d+ took what came of x without its gradient"),
    "not used": (lambda x: leaf(3).sum(), "loss was not computed from x: no op took x"),
    "a number": (
        lambda x: (leaf(3) * x.sum().item()).sum(),
        r"what came of x left the graph .* after sum at .*:\d+: through item",
    ),
    "a metric beside it": (
        lambda x: (unrecorded(x), (x.detach() * leaf(3)).sum())[1],
        r"mul at .*:\d+ took what came of x without",
    ),
    "inside checkpoint": (lambda x: tt.checkpoint(lambda w: (w * x).sum(), leaf(3)), "x may be reached inside checkpoint at"),
    "nothing": (lambda x: (x * 2).sum(), "nothing: a gradient reaches x as soon as"),
    "one of two ways": (lambda x: (x.detach() * x).sum(), "nothing: a gradient reaches x as soon as"),
}


@pytest.mark.parametrize("name", REASONS)
def test_why_with_a_function(name: str) -> None:
    f, sentence = REASONS[name]
    x = leaf(3)
    assert re.match(sentence, why_no_grad(x, lambda: f(x))), why_no_grad(x, lambda: f(x))
    assert state.thread.observers == ()


def test_why_with_a_loss() -> None:
    before, x = leaf(3).sum(), leaf(3)
    assert re.match(r"mul at .*:\d+ took x's memory without", why_no_grad(x, (x.detach() * leaf(3)).sum()))
    assert "pass a function that computes loss" in why_no_grad(x, leaf(3).sum() * 1)
    assert "pass a function that computes loss" in why_no_grad(leaf(2), before)
    base = np.arange(6, dtype=np.float32)
    halves = [tt.Tensor(base[:3]), tt.Tensor(base[3:])]
    loss = (halves[1] * leaf(3)).sum()
    halves[0].requires_grad = halves[1].requires_grad = True
    assert "took" not in why_no_grad(halves[0], loss), "memory beside x's is not x's"
    assert re.match(r"x.requires_grad was set after mul at .*:\d+ had taken x", why_no_grad(halves[1], loss))
    for wrong in (lambda: 1.0, lambda: None):
        with pytest.raises(TypeError, match=r"why_no_grad: loss is a .*, not a tensor or a function that returns one"):
            why_no_grad(x, wrong)
    assert "x is int64: only floating-point tensors" in why_no_grad(tt.tensor([1, 2]), leaf(3).sum())
    assert "set x.requires_grad = True" in why_no_grad(tt.ones(2), leaf(3).sum())
    with tt.no_grad():
        unrecorded = x.sum()
    assert "nothing was recorded for loss" in why_no_grad(x, unrecorded)
    loss = (x * 2).sum()
    h = x * 3
    whole = (h * 2).sum() + loss
    assert re.match(r"a gradient reaches x, a result \(mul at .*\), but only leaves keep theirs", why_no_grad(h, whole))
    whole.backward()
    assert why_no_grad(x, whole) == "x has a gradient"
    x.grad = None
    assert "a backward pass has freed this graph and left x none" in why_no_grad(x, whole)
    kept = x * 2
    kept.retain_grad()
    assert why_no_grad(kept, kept.sum()).startswith("nothing: a gradient reaches x as soon as")
    checkpointed = tt.checkpoint(lambda w: (w * x).sum(), leaf(3))
    checkpointed.backward()
    assert why_no_grad(x, checkpointed) == "x has a gradient"


def test_why_after_a_checkpoint() -> None:
    x = leaf(3)
    told = why_no_grad(x, lambda: tt.checkpoint(lambda x: x * 2, x).detach().sum())
    assert re.match(r"sum at .*:\d+ took what came of x without its gradient, through detach", told)


def test_why_within_a_model_names_the_module() -> None:
    class Cut(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.detach().exp()

    net, x = nn.Sequential(nn.Linear(2, 2), Cut(), nn.Linear(2, 2)), leaf(3, 2)
    assert re.match(r"exp at .*:\d+ in 1 took what came of x without its gradient", why_no_grad(x, lambda: net(x).sum()))


# -- where numbers stop being finite


def test_the_first_result_that_is_not_finite() -> None:
    x = tt.tensor([[1.0, 0.0], [2.0, 3.0]], requires_grad=True)
    with pytest.raises(FloatingPointError) as error, np.errstate(divide="ignore"), detect_anomaly():
        ((x * 2).log() * 0).sum()
    assert re.match(
        rf"log at {re.escape(HERE)}:\d+: the result float32\[2, 2\] has 1 of 4 not finite, "
        r"the first -inf at \[0, 1\]; the others, 0.693147 to 1.79176, from input 0 float32\[2, 2\], 0 to 6",
        str(error.value),
    )


def test_the_first_gradient_that_is_not_finite() -> None:
    x = tt.tensor([4.0, 0.0], requires_grad=True)
    y = (x * 2).sqrt().sum()
    with pytest.raises(FloatingPointError) as error, np.errstate(divide="ignore"), detect_anomaly():
        y.backward()
    assert re.match(
        rf"backward of sqrt at {re.escape(HERE)}:\d+: the gradient of input 0 \(mul at .*\) float32\[2\] has 1 of 2 "
        r"not finite, the first inf at \[1\]; .*, from g float32\[2\], 1 to 1; y float32\[2\], 0 to 2.8",
        str(error.value),
    )


@pytest.mark.filterwarnings("ignore")
def test_the_module_of_an_anomaly_in_a_model_and_in_threads() -> None:
    model = gpt()
    model.h[1].mlp.c_fc.weight.data[3, 2] = np.inf
    model.h[1].mlp.c_fc.weight.data[3, 3] = -np.inf  # an infinite weight was put in; what it makes is no anomaly
    with detect_anomaly():
        loss_of(model)
    model = gpt()
    model.h[1].ln_2.weight.data[...] = 3e38
    sentence = r"(layer_norm|linear) at .*model.py:\d+ in h.1.(ln_2|mlp.c_fc): the result"
    with pytest.raises(FloatingPointError, match=sentence), np.errstate(all="ignore"), detect_anomaly():
        parallel.backward(lambda _: loss_of(model), [0, 1], threads=2)
    assert state.thread.observers == ()


def test_finite_shares_that_add_up_to_infinity() -> None:
    y = leaf(1) * 1
    loss = (y * 3e38 + y * 3e38).sum()
    sentence = r"backward: the gradient .* of mul at .*, whose finite shares"
    with pytest.raises(FloatingPointError, match=sentence), np.errstate(over="ignore"), detect_anomaly():
        loss.backward()
    y = leaf(1) * 1
    y.register_hook(lambda g: g * np.nan)
    loss = (y * 3).sum()
    with pytest.raises(FloatingPointError, match="or its hook"), detect_anomaly():
        loss.backward()


def test_an_observer_looks_on_once_and_lets_go() -> None:
    anomalies = detect_anomaly()
    with anomalies, pytest.raises(RuntimeError, match=r"this detect_anomaly\(\) looks on already"), anomalies:
        pass
    with pytest.raises(FloatingPointError), np.errstate(divide="ignore", invalid="ignore"), anomalies:
        leaf(2).log().sqrt().sum().backward() or (leaf(2) * 0).log()
    assert state.thread.observers == () and not anomalies._given


def test_modules_within_checkpoint_keep_their_names() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))

        def forward(self, x: Any) -> Any:
            return tt.checkpoint(self.inner, x)

    class Seen(state.Observer):
        def __init__(self) -> None:
            self.paths: set[str] = set()

        def backward(self, node: Any, g: Any, run: Callable[[], None]) -> None:
            self.paths.add(f"{node.op.name} {state.path(node.call)}")
            run()

    net = nn.Sequential(Checkpointed(), Checkpointed())
    loss = net(leaf(3, 2)).sum()
    with Seen() as seen:
        loss.backward()
    assert {"linear 0.inner.0", "linear 1.inner.0"} <= seen.paths


def test_paths_of_modules_that_call_themselves_or_strangers() -> None:
    paths: list[str] = []

    class Recursive(nn.Module):
        def forward(self, depth: int) -> None:
            paths.append(state.path(state.thread.call))
            if depth:
                self(depth - 1)
            else:
                Recursive.stranger(0)

    class Stranger(nn.Module):
        def forward(self, _: int) -> None:
            paths.append(state.path(state.thread.call))

    Recursive.stranger = Stranger()
    nn.Sequential(Recursive())(2)
    assert paths == ["0", "0", "0", "0.Stranger"]


def test_work_lent_to_threads_belongs_to_the_module_that_lends_it() -> None:
    class Spread(nn.Module):
        def forward(self, x: Any) -> Any:
            return parallel.map(lambda _: (x * 2).node, [0, 1, 2], threads=2)

    net = nn.Sequential(Spread())
    nodes = net(leaf(3))
    assert [state.path(node.call) for node in nodes] == ["0"] * 3


def test_infinities_that_were_put_in_are_no_anomaly() -> None:
    x = leaf(4)
    with np.errstate(invalid="ignore"), detect_anomaly():
        y = tt.where(np.array([True, False, True, True]), x, -np.inf).softmax(-1)
        (y * y).sum().backward()
        (x * tt.tensor([-np.inf, 0.0, 0.0, 1.0])).softmax(-1)[1:].sum().backward()


def test_observers_change_no_number_and_leave_nothing_behind() -> None:
    model = gpt()
    plain, watched = [], []
    for results, context in ((plain, state.Observer()), (watched, detect_anomaly())):
        model.zero_grad()
        with tt.random.scope(1), context:
            loss = loss_of(model)
            loss.backward()
        results += [loss.data, *(p.grad.data for p in model.parameters())]
    assert all(np.array_equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert inspect.collect(loss)
