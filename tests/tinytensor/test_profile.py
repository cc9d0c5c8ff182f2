"""The profiler: what an op costs by its own formula, whose time is whose, and the table, timeline and roofline of it."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from tinytensor import nn, ops, parallel, state
from tinytensor.autograd import Op, apply
from tinytensor.inspect import cost, profile

module = sys.modules[profile.__module__]


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 GFLOP/s and 1 GB/s, measured in no time."""
    monkeypatch.setattr(cost, "_gemm_peak", lambda threads: 1e9 * threads)
    monkeypatch.setattr(cost, "copy_bandwidth", lambda: 1e9)


class Counted(np.ndarray):
    """An array that counts what is done with it as `cost` says: one for +, −, ×, ÷, a comparison or function of a number."""

    flops = 0

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **keywords: Any) -> Any:
        y = getattr(ufunc, method)(*map(plain, inputs), **{k: plain(v) for k, v in keywords.items()})
        if ufunc is np.matmul:
            Counted.flops += 2 * y.size * inputs[0].shape[-1]
        elif not ufunc.__name__.startswith(("bitwise", "logical", "isfinite")):
            Counted.flops += y.size if method == "__call__" else inputs[0].size
        return y.view(Counted) if isinstance(y, np.ndarray) else y

    def __array_function__(self, function: Any, types: Any, args: Any, keywords: Any) -> Any:
        y = function(*map(plain, args), **keywords)
        return y.view(Counted) if isinstance(y, np.ndarray) else y


def plain(x: Any) -> Any:
    return tuple(map(plain, x)) if isinstance(x, tuple) else x.view(np.ndarray) if isinstance(x, Counted) else x


def counted(call: Callable[[], Any]) -> int:
    Counted.flops = 0
    shares = call()
    for share in shares if isinstance(shares, tuple) else ():
        if callable(share):
            share()
    return Counted.flops


def an_op(name: str) -> type[Op]:
    def below(cls: type[Op]) -> Iterator[type[Op]]:
        for child in cls.__subclasses__():
            yield child
            yield from below(child)

    return next(op for op in below(Op) if op.name == name and op.__module__.startswith("tinytensor.ops"))


AXIS = {"axis": -1, "keepdims": True}
FORMULAS: dict[str, tuple[int, dict[str, Any]]] = {  # inputs and parameters
    **dict.fromkeys(["add", "sub", "mul", "div", "maximum", "minimum"], (2, {})),
    **dict.fromkeys(["neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "sin", "cos", "tanh"], (1, {})),
    **dict.fromkeys(["sigmoid", "relu", "gelu", "softplus"], (1, {})),
    **dict.fromkeys(["sum", "max", "min", "logsumexp"], (1, AXIS)),
    **dict.fromkeys(["softmax", "log_softmax", "cumsum"], (1, {"axis": -1})),
    "layer_norm": (2, {"eps": 1e-5}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_rates_are_those_of_the_formulas(name: str) -> None:
    arity, params = FORMULAS[name]
    op, n = an_op(name), 10_000
    rng = np.random.default_rng(0)
    inputs = [rng.uniform(0.5, 1.5, (2, n)).view(Counted) for _ in range(arity)]
    if name == "layer_norm":
        inputs[1] = inputs[1][0]
    forward, *backward = cost.RATES[name]
    rates = (backward + backward[-1:] * arity)[:arity]
    y = op.forward(np, *inputs, **params)
    assert forward == round(counted(lambda: op.forward(np, *inputs, **params)) / (2 * n), 2)
    g = np.ones(y.shape).view(Counted)
    assert sum(rate or 0 for rate in rates) == round(counted(lambda: op.vjp(g, y, *inputs, **params)) / (2 * n), 2)


def test_the_rates_of_a_power() -> None:
    op, a, b = an_op("pow"), np.full(1000, 1.5).view(Counted), np.full(1000, 2.5).view(Counted)
    y = a**b
    da, db = op.vjp(y, y, a, 3.0)[0], op.vjp(y, y, a, b)[1]
    assert [counted(f) // 1000 for f in (lambda: a**b, da, db)] == list(cost.RATES["pow"])


@pytest.mark.parametrize("backward", [False, True])
def test_attention_costs_what_its_formula_does_for_each_pair(backward: bool) -> None:
    d, e, S = 3, 5, 4000
    q, k, v = (np.full(shape, 0.1).view(Counted) for shape in ((1, d), (S, d), (S, e)))  # one query, which sees every key
    op, params = an_op("causal_attention"), {"p": 0.0, "key": None}
    y = op.forward(np, q, k, v, **params)
    flops = counted(lambda: op.vjp(y, y, q, k, v, **params) if backward else op.forward(np, q, k, v, **params))
    by_rule = cost._product("causal_attention", [q, k, v], y, params, backward)
    assert flops / S == pytest.approx(by_rule / S + 2 * backward, abs=0.01)  # da and a are each multiplied by a mask of 1


def test_the_causal_half() -> None:
    q, k, v = np.ones((2, 3, 4)), np.ones((2, 5, 4)), np.ones((2, 5, 6))
    pairs = 2 * (3 + 4 + 5)
    assert cost._product("causal_attention", [q, k, v], v, {"p": 0.0}) == pairs * (2 * (4 + 6) + 6)
    assert cost._product("causal_attention", [q, k, v], v, {"p": 0.1}, True) == pairs * (2 * (3 * 4 + 2 * 6) + 11 + 3)


def one(p: profile, name: str) -> Any:
    (row,) = (row for row in p.by("op") if row.name == name)
    return row


def costs(work: Any) -> tuple[int, int]:
    return work.flops, work.bytes


def test_a_linear_layer() -> None:
    x = tt.randn(5, 3, requires_grad=True)
    w, b = tt.randn(4, 3, requires_grad=True), tt.randn(4, requires_grad=True)
    with profile() as p:
        tt.linear(x, w, b).backward(np.ones((5, 4), np.float32))
    row = one(p, "linear")
    assert (row.by, row.forward.calls, row.backward.calls) == ("kernel", 1, 1)
    assert costs(row.forward) == (2 * 5 * 3 * 4 + 20, 4 * (15 + 12 + 4 + 20))
    assert costs(row.backward) == (2 * (2 * 5 * 3 * 4) + 20, 4 * (20 + 15 + 12 + 15 + 12 + 4))
    assert row.total.attainable == pytest.approx((204 + 312) / 1e9)


def test_only_gradients_that_are_wanted_count() -> None:
    x, w = tt.randn(5, 3, requires_grad=True), tt.randn(3, 4, requires_grad=True)
    with profile() as p:
        tt.grad((x @ w).sum(), x)
    assert costs(one(p, "matmul").backward) == (
        2 * 5 * 3 * 4,
        4 * (1 + 15 + 12 + 15),
    )  # one number repeated is g, both are kept
    with profile() as p:
        (tt.randn(5, 3) @ w).sum().backward()
    assert costs(one(p, "matmul").backward) == (2 * 5 * 3 * 4, 4 * (1 + 15 + 12))


def test_einsum() -> None:
    a, b = tt.randn(2, 3, requires_grad=True), tt.randn(3, 5)
    with profile() as p:
        tt.einsum("ij,jk->ik", a, b).sum().backward()
        tt.einsum("i,j->ij", a[0].detach(), b[0].detach())
        tt.einsum("ij,jk->ik", a, b)
    assert one(p, "einsum").forward.flops == 2 * 2 * 30 + 15
    assert one(p, "einsum").backward.flops == 2 * 30
    assert cost._product("einsum", [np.ones(3), np.ones(5)], 0, {"subscripts": "i,j->ij"}) == 15


def test_what_only_looks_at_memory_moves_nothing() -> None:
    x = tt.randn(4, 6, requires_grad=True)
    with profile() as p:
        y = x.reshape(6, 4).swapaxes(0, 1)
        (y[1:] + y[:-1]).backward(np.ones((3, 6), np.float32))
    for name in ("reshape", "transpose"):
        assert costs(one(p, name).forward) == costs(one(p, name).backward) == (0, 0)
    assert costs(one(p, "getitem").forward) == (0, 0)
    assert costs(one(p, "getitem").backward) == (0, 2 * 4 * (18 + 24))
    assert costs(one(p, "add").forward) == (18, 4 * 3 * 18)
    assert costs(one(p, "add").backward) == (0, 0)


def test_a_repeated_input_has_its_gradient_summed_and_an_array_counts_once() -> None:
    x, bias = tt.randn(5, 4, requires_grad=True), tt.randn(4, requires_grad=True)
    with profile() as p:
        ((x + bias) * 2.0).backward(np.ones((5, 4), np.float32))
        x.detach() * x.detach()
    assert costs(one(p, "add").backward) == (20, 4 * (20 + 4))
    assert costs(one(p, "mul").forward) == (2 * 20, 4 * (40 + 40))


def test_kernels_and_formulas_are_told_apart() -> None:
    x = tt.randn(3, 4, requires_grad=True)
    with profile() as p:
        x.gelu().sum().backward()
        x.astype("float16").gelu()
        with tt.no_grad():
            x.gelu()
    rows = {(row.name, row.by): row for row in p.by("op")}
    assert rows["gelu", "kernel"].forward.calls == 2
    assert rows["gelu", "kernel"].backward.calls == rows["gelu", "formula"].forward.calls == 1
    assert rows["gelu", "kernel"].forward.bytes == 4 * (12 + 12 + 12) + 4 * (12 + 12)  # recorded, tanh was kept as well
    assert rows["sum", "formula"].forward.calls == 1


class Clock:
    """A clock that stands still but for what is told to take time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


@pytest.fixture(name="stopped")
def the_profile_reads_that_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "perf_counter", clock)


class Slow(Op):
    """y = 2x, in three seconds;  dy/dx = 2, in five"""

    def forward(xp, x):
        clock.now += 3
        return 2 * x

    def vjp(g, y, x):
        clock.now += 5
        return 2 * g


def slowly(x: Any) -> Any:
    return apply(Slow, x)


@pytest.mark.usefixtures("stopped")
def test_a_replay_is_not_the_time_of_what_replays() -> None:
    x = tt.randn(4, requires_grad=True)
    with profile() as p:
        tt.checkpoint(lambda x: slowly(x) + 1, x).sum().backward()
    slow, replay = one(p, "slow"), one(p, "checkpoint")
    assert (slow.forward.calls, slow.backward.calls, replay.backward.calls, replay.by) == (2, 1, 1, "replay")
    assert (slow.forward.seconds, slow.backward.seconds, p.wall) == (6, 5, 11)
    assert replay.total.seconds == pytest.approx(0, abs=1e-6)
    assert costs(replay.total) == (0, 0)


@pytest.mark.usefixtures("stopped")
def test_a_recorded_backward_pass_counts_op_by_op() -> None:
    x = tt.randn(4, requires_grad=True)
    with profile() as p:
        tt.grad(slowly((x * x).gelu()).sum(), x, create_graph=True)
    mul = one(p, "mul")
    assert mul.forward.flops == 4 * mul.forward.calls > 4 * 3  # x·x, 2·g of Slow's vjp, and g·x twice, besides gelu's
    assert costs(mul.backward) == costs(one(p, "slow").backward) == (0, 0)
    gelu = {row.by: row for row in p.by("op") if row.name == "gelu"}
    assert (gelu["kernel"].forward.calls, gelu["kernel"].backward.calls) == (1, 0)
    assert (gelu["formula"].forward.calls, gelu["formula"].backward.calls) == (0, 1)
    assert (one(p, "slow").total.seconds, p.wall) == (8, 8)


@pytest.mark.usefixtures("stopped")
def test_an_error_inside_leaves_the_account_in_order() -> None:
    x = tt.randn(4, requires_grad=True)
    p = profile()
    with p, pytest.raises(ValueError, match="do not meet"):
        tt.checkpoint(failing_the_second_time(), x).sum().backward()
    with p:
        slowly(x)
    assert one(p, "slow").forward.seconds == 9
    assert {row.name for row in p.by("op")} == {"slow", "sum", "reshape"}
    assert [seen.inside for seen in p.seen.values()] == [p.wall]
    assert state.thread.observers == ()


def failing_the_second_time() -> Any:
    calls = []

    def f(x: Any) -> Any:
        calls.append(x)
        y = slowly(x)
        return y if len(calls) == 1 else x.reshape(2, 2) @ x.reshape(1, 4)

    return f


class Net(nn.Module):
    def __init__(self) -> None:
        self.h = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        for layer in self.h:
            x = layer(x).relu()
        return self.head(x)


def in_threads(p: profile, net: Net, x: Any) -> list[float]:
    """Two shards that wait for each other, so that each has a thread of its own."""
    barrier = threading.Barrier(2)

    def loss_of(shard: int) -> Any:
        barrier.wait(10)
        return (net(x) ** 2).sum() * (1 + shard)

    with p:
        return parallel.backward(loss_of, range(2), 2)


def test_modules_have_the_time_of_their_ops_forward_and_backward() -> None:
    net = Net()
    with profile() as p:
        net(tt.randn(5, 8)).sum().backward()
    rows = {row.name: row for row in p.by("module")}
    assert set(rows) == {"h.*", "head", "Net", ""}
    assert rows["h.*"].forward.calls == rows["h.*"].backward.calls == 3
    assert rows["h.*"].forward.flops == 3 * 2 * 5 * 8 * 8
    assert (rows["Net"].forward.calls, rows[""].forward.calls) == (3, 1)  # relu, and the sum outside


def test_shards_are_seen_in_their_threads_and_measured_against_one_thread_of_blas() -> None:
    net, x, p = Net(), tt.randn(400, 8), profile()
    p.__enter__()
    p.__exit__()
    p._alone = 2
    p.peaks = {1: 1e6, 2: 2e6}  # so slow that FLOPs bound everything that has some
    losses = in_threads(p, net, x)
    linear = one(p, "linear")
    assert (linear.forward.calls, linear.backward.calls, p.used) == (8, 8, {1})
    assert linear.total.attainable == pytest.approx(linear.total.flops / 1e6)
    assert len(p.seen) == 2
    with p:
        net(x)
    assert p.used == {1, 2}
    assert one(p, "linear").total.attainable == pytest.approx(linear.total.flops / 1e6 + linear.forward.flops / 2 / 2e6)
    net.zero_grad()
    assert losses == in_threads(profile(), net, x)


def test_looking_on_changes_no_bit() -> None:
    net, x, found = Net(), tt.randn(40, 8), []
    for observed in (False, True):
        net.zero_grad()
        tt.optim.SGD(net.parameters())
        with profile() if observed else tt.enable_grad():
            loss = parallel.backward(lambda i: (net(x[i * 20 : i * 20 + 20]) ** 2).mean(), range(2), 2)
        found.append([np.array(loss).tobytes(), *(p.grad.data.tobytes() for p in net.parameters())])
    assert found[0] == found[1]


@pytest.mark.usefixtures("stopped")
def test_the_table_ends_with_what_was_outside_of_ops() -> None:
    p = profile()
    for _ in range(2):
        with p:
            slowly(tt.randn(4))
            clock.now += 2
    clock.now += 100
    summary = "10 s in 1 thread: 60% inside ops, 0% this profile, 40% Python, NumPy outside of ops, and waiting"
    assert p.summary() == p.table().caption == p.table("module").caption == summary
    assert str(p).splitlines()[-1] == summary
    assert str(p).count(summary) == 1
    p.seen[-1] = module.Seen()  # another thread, which had nothing to do
    assert p.summary().startswith("10 s in 2 threads: 30% inside ops, 0% this profile, 70% Python")


@pytest.mark.usefixtures("stopped")
def test_the_table_is_sorted_by_time_and_says_rates() -> None:
    x = tt.randn(4, requires_grad=True)
    with profile() as p:
        x.exp()
        for _ in range(2):
            slowly(x).sum().backward()
    (seen,) = p.seen.values()
    work = seen.rows["slow", "formula", ""].backward
    work.flops, work.bytes, work.attainable = 32_000_000, 16_000_000, 4
    lines = [line.split() for line in str(p).splitlines()]
    assert [line[0] for line in lines[3:6]] == ["slow", "sum", "exp"]
    assert " ".join(lines[3]) == "slow formula 2 6,000.00 10,000.00 100.0% 32 M 16 M 2 M 1 M 25%"
    assert " ".join(lines[5]) == "exp formula 1 0.00 0.0% 4 32 4 G 32 G 3200%"
    assert ["outside", "of", "modules"] in [line[:3] for line in lines]
    n = cost.blas_threads()
    assert f"attainable: {n} GFLOP/s of a matrix product with {n} thread{'s' * (n > 1)}, or the 1 GB/s of a copy" in str(p)


def test_the_timeline_is_chromes(tmp_path: Path) -> None:
    net, x, p = Net(), tt.randn(40, 8), profile()
    in_threads(p, net, x)
    events = json.loads(p.trace(tmp_path / "trace.json").read_text())["traceEvents"]
    rows = [e for e in events if e["ph"] == "M"]
    assert [row["name"] for row in rows] == ["thread_name"] * 2
    assert {row["args"]["name"] for row in rows} >= {threading.current_thread().name}
    boxes = [e for e in events if e["ph"] == "X"]
    (block,) = (e for e in boxes if e["cat"] == "block")
    calls = [e for e in boxes if e["cat"] != "block"]
    assert len(calls) == sum(row.total.calls for row in p.by("op"))
    assert {e["tid"] for e in calls} == {0, 1}
    assert all(e["ts"] >= 0 and e["ts"] + e["dur"] <= block["dur"] for e in calls)
    (first, *_) = (e for e in calls if e["name"] == "linear" and e["cat"] == "backward" and e["args"]["module"] == "head")
    assert first["args"]["shape"] == [40, 2]
    assert first["args"]["made by"] == "kernel"
    assert first["args"]["line"].startswith(f"{__file__}:")
    assert first["args"]["GFLOP/s"] == pytest.approx((2 * 2 * 40 * 8 * 2 + 80) / first["dur"] / 1e3, rel=0.05)


@pytest.mark.usefixtures("stopped")
def test_the_timeline_counts_microseconds_and_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRACED", 3)
    x = tt.randn(4)
    with profile() as p:
        for _ in range(5):
            slowly(x)
    told = json.loads(p.trace(tmp_path / "trace.json").read_text())
    boxes = [(e["name"], e["ts"], e["dur"]) for e in told["traceEvents"] if e["ph"] == "X"]
    assert boxes == [("profile", 0, 15e6), ("slow", 0, 3e6), ("slow", 3e6, 3e6), ("slow", 6e6, 3e6)]
    assert told["otherData"] == {"calls left out": 2}


def drawn(p: profile, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure that is written to the PNG."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    p.roofline(path)
    return figures[0]


def test_the_roofline_has_every_op_that_computes_and_no_name_covers_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = profile()
    with p:
        tt.randn(4).exp()
    (seen,) = p.seen.values()
    (peak,) = (p.peaks[n] for n in p.used)
    for i in range(24):  # all at nearly one place, below the name of the roof
        work = module.Work(1, 0.05, int(peak * 0.05), int(peak * (0.0005 + 0.00001 * i)))
        seen.rows[f"operation_{i}", "formula", ""] = module.Row(f"operation_{i}", "formula", work, module.Work())
    seen.rows["mover", "formula", ""] = module.Row("mover", "formula", module.Work(1, 0.1, 0, 10**8))
    seen.rows["short", "formula", ""] = module.Row("short", "formula", module.Work(1, 0.001, 10**6, 10**6))
    figure = drawn(p, tmp_path / "roofline.png", monkeypatch)
    (axes,) = figure.axes
    texts = [t for t in axes.texts if t.get_text() and t.get_window_extent().y1 < axes.get_window_extent().y1]
    names = {t.get_text().split()[0] for t in texts}
    assert names == {f"operation_{i}" for i in range(24)} | {"copy:", "matrix"}
    boxes = [t.get_window_extent() for t in texts]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert figure.get_supxlabel() == "not shown, for they move numbers and compute none: mover 7.7%"
    assert tuple(np.frombuffer((tmp_path / "roofline.png").read_bytes()[16:24], ">u4")) == (1000, 660)


def test_a_roofline_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no roofline to draw: no op that computes something was seen"):
        profile().roofline(tmp_path / "roofline.png")
    assert profile().by("op") == []
    assert "0 threads" in str(profile())


def test_arrays_on_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(np.ndarray):
        pass

    x = tt.Tensor(np.ones(3).view(Elsewhere))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=Elsewhere))
    with profile(), pytest.raises(RuntimeError, match="profile: exp works on a GPU, where only its launch would be timed"):
        ops.exp(x)


def test_the_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cost._gemm_peak.cache_clear()
    cost.copy_bandwidth.cache_clear()
    calls = []
    monkeypatch.setattr(cost, "_fastest", lambda work, times: (calls.append(times), 0.5)[1])
    for _ in range(2):
        with parallel.limited(1):
            assert cost.gemm_peak() == 2 * 2 * 2048 * 1024 * 1024
            assert cost.blas_threads() == 1
        assert cost.copy_bandwidth() == 2 * 2 * 4 * (1 << 24)
    assert calls == [8, 5]
    cost._gemm_peak.cache_clear()
    cost.copy_bandwidth.cache_clear()


def test_what_no_rule_knows_counts_its_bytes() -> None:
    x = tt.randn(4, requires_grad=True)
    with profile() as p:
        slowly(x).sum().backward()
    assert costs(one(p, "slow").forward) == (0, 4 * 8)
    assert costs(one(p, "slow").backward) == (0, 4 * (1 + 4))
