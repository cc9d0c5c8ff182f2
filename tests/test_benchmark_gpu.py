"""`minigpt benchmark gpu`, tiny, on CuPy's stand-in, with PyTorch on the CPU: all of it runs, and checks can fail."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from minigpt.benchmarks import gpu, gpu_checks, gpu_launches, gpu_speed, gpu_training
from minigpt.benchmarks.gpu_checks import Check, Sizes
from minigpt.benchmarks.gpu_speed import COMPILED, EAGER, OURS, Plan, Session
from minigpt.benchmarks.suite import Report
from minigpt.config import GPTConfig, TrainConfig
from tests.cuda.conftest import cuda  # noqa: F401  (the fixture)
from tests.cuda.standin import device
from tinytensor import backend, optim
from tinytensor.graph import Replayed

TINY = TrainConfig(
    preset="tiny",
    n_layer=1,
    n_head=2,
    n_embd=32,  # heads of 16, which flash.cu takes
    block_size=16,
    micro_batch=2,
    accumulation=1,
    max_steps=20,
    lr=1e-2,
    min_lr=1e-4,
    eval_interval=5,
    wandb=False,
)
SIZES = Sizes(TINY, rows=2, steps=3, vocabulary=301, queries=17)
MODEL = vars(TINY.model(65))
pytestmark = pytest.mark.filterwarnings("ignore:var.*degrees of freedom")  # PyTorch's, of an empty reduction

PLAN = Plan(
    model=MODEL,
    rows=2,
    gpt2={**MODEL, "bias": True},
    gpt2_rows=2,
    training=replace(TINY, device="cuda", precision="bf16"),
    goal=3.5,
    checks=SIZES,
    gemm=64,
    copy=1 << 16,
    rounds=2,
    repeat=2,
    torch_device="cpu",
)


@pytest.fixture
def gpu_in_reach(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:  # noqa: F811
    """The stand-in, with what only this benchmark asks of CuPy and CUDA. torch.compile, which takes a minute, does nothing."""
    poison = lambda self, value, size: device.poisoned(self.mem)  # noqa: E731
    monkeypatch.setattr(device.MemoryPointer, "memset_async", poison, raising=False)
    monkeypatch.setattr(gpu_launches, "graph_nodes", lambda graph: len(graph._nodes))
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    set_threads(1)  # several of them wait for each other on a busy machine
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    yield cuda
    set_threads(threads)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"To be, or not to be: that is question {i * i}.\n" for i in range(200)), encoding="utf-8")
    return path


def session(**found: float) -> Session:
    return Session(Report(), PLAN, None, time.monotonic() + 1000, dict(found))


def failures(checks: list[Check]) -> list[str]:
    return [check.what for check in checks if not check.passed]


# -- the whole of it


@pytest.mark.usefixtures("gpu_in_reach")
def test_every_part_runs_and_is_told(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu.run(Report(), PLAN, 1000, text, tmp_path / "out.json")
    tables = {t["title"]: t for t in json.loads((tmp_path / "out.json").read_text())["tables"]}
    parts = next(t for title, t in tables.items() if title.endswith("s in all"))
    assert [row for row in parts["rows"] if row[2] != "done"] == []
    assert [row[0] for row in parts["rows"]] == [title for title, _ in gpu.parts()]
    assert status == 0
    found = {row[0]: row[1] for row in tables["gpu: bars"]["rows"]}
    assert [what for what, value in found.items() if value == "not measured"] == [
        "peak memory in bf16: ours / the smaller of PyTorch's"
    ]
    for precision in ("fp32", "tf32", "bf16"):
        rows = next(t for title, t in tables.items() if title.startswith(f"gpu: micro-step in {precision}"))["rows"]
        assert [row[0] for row in rows] == [OURS, EAGER, COMPILED]
        assert not any("failed" in cell for row in rows for cell in row)
    assert "| launches of a micro-step in bf16 outside of a graph |" in capsys.readouterr().out


def test_the_plan_is_what_the_bars_are_about() -> None:
    plan = Plan()
    assert (GPTConfig(**plan.model).parameter_count(), plan.rows, plan.model["dropout"]) == (10_745_088, 64, 0.2)
    assert round(GPTConfig(**plan.gpt2).parameter_count() / 1e6) == 124
    assert (plan.training.preset, plan.training.precision, plan.goal) == ("nanogpt-char", "bf16", 1.47)


def only(monkeypatch: pytest.MonkeyPatch, **parts: Callable[[Session], Any]) -> None:
    monkeypatch.setattr(gpu, "parts", lambda: list(parts.items()))


def states(path: Path) -> dict[str, str]:
    return {row[0]: row[2] for row in json.loads(path.read_text())["tables"][-1]["rows"]}


@pytest.mark.usefixtures("gpu_in_reach")
def test_without_a_checkout_what_needs_its_registry_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "op_registry", raising=False)
    monkeypatch.setattr(gpu_checks, "HOME", tmp_path)
    parts, poisoned = dict(gpu.parts()), "against float64, poisoned"
    for title in ("compiling", f"kernels {poisoned}", f"ops {poisoned}", "every kernel was checked"):
        told = parts[title](session()) or ""
        assert told.startswith(f"skipped: {tmp_path}/tests/tinytensor/registry.py does not exist; run ")


@pytest.mark.usefixtures("gpu_in_reach")
def test_a_part_that_fails_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_: Session) -> None:
        raise ValueError("of no [/use]")

    only(monkeypatch, first=broken, second=lambda s: s.found.update(memory=0.8))
    assert gpu.run(Report(), PLAN, 1000, None, tmp_path / "out.json") == 1
    assert states(tmp_path / "out.json") == {"first": "FAILED: ValueError: of no [/use]", "second": "done"}
    tables = json.loads((tmp_path / "out.json").read_text())["tables"]
    assert tables[0]["title"] == "gpu: first FAILED" and "of no [/use]" in tables[0]["rows"][-1][0]
    assert ["0.8", "≤ 1: met", "≤ 0.7: NOT met"] in [row[1:] for row in tables[1]["rows"]]


@pytest.mark.usefixtures("gpu_in_reach")
def test_what_is_due_after_the_budget_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    only(monkeypatch, first=lambda _: time.sleep(0.2), second=lambda _: seen.append(1))
    assert gpu.run(Report(), PLAN, 0.1, None, tmp_path / "out.json") == 0
    assert states(tmp_path / "out.json") == {"first": "done", "second": "skipped: the budget of 0 s is used up"}
    assert not seen


@pytest.mark.usefixtures("gpu_in_reach")
def test_a_part_without_end_is_ended_and_the_files_are_there_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def endless(_: Session) -> None:
        assert json.loads((tmp_path / "out.json").read_text())["tables"][0]["rows"] == [["1"]]
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    monkeypatch.setattr(gpu, "GRACE", -998.0)  # which leaves two seconds
    only(monkeypatch, first=lambda s: s.report.add("t", ["n"], [["1"]], None), second=endless)
    assert gpu.run(Report(), PLAN, 1000, None, tmp_path / "out.json") == 1
    assert states(tmp_path / "out.json")["second"].startswith("FAILED: OutOfTime")


@pytest.mark.usefixtures("gpu_in_reach")
def test_a_check_that_fails_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_checks, "masks", lambda sizes: [Check("a", "1", "0", False), Check("b", "0", "0", True)])
    part = dict(gpu.parts())["dropout's masks against NumPy's"]
    only(monkeypatch, masks=part)
    assert gpu.run(Report(), PLAN, 1000, None, tmp_path / "out.json") == 1
    assert states(tmp_path / "out.json") == {"masks": "FAILED: 1 of 2 checks"}


def test_without_a_gpu_there_is_one_sentence() -> None:
    with pytest.raises(RuntimeError, match='device "cuda"'):
        gpu.run(Report(), PLAN)


# -- each check notices what it is for


def spoiled(monkeypatch: pytest.MonkeyPatch, name: str, **parts: Callable[..., Any]) -> None:
    """A kernel whose forward or vjp is another."""
    kernel = backend.kernels["cuda"][name]
    monkeypatch.setitem(backend.kernels["cuda"], name, dataclasses.replace(kernel, **parts))


def calls_of(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Check these kernels only."""
    every = list(gpu_checks.kernel_calls(SIZES))
    monkeypatch.setattr(gpu_checks, "kernel_calls", lambda sizes: [call for call in every if call[0] in names])


def test_kernels_notice_one_per_cent(gpu_in_reach: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = gpu_in_reach.Gelu.vjp
    calls_of(monkeypatch, "gelu", "dropout")
    assert failures(gpu_checks.kernels(SIZES)) == []
    spoiled(monkeypatch, "gelu", vjp=lambda *args: backward(*args) * 1.01)
    assert failures(gpu_checks.kernels(SIZES)) == ["gelu in fp32, 2 calls", "gelu in tf32, 2 calls"]  # bf16 is no better


def test_an_element_that_nobody_writes_is_noticed(gpu_in_reach: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    forward = gpu_in_reach.Gelu.forward

    def last_missing(x: Any) -> Any:
        y, residual = forward(x)
        fresh = cupy.empty(y.shape, y.dtype)
        fresh[:-1] = y[:-1]
        return fresh, residual

    spoiled(monkeypatch, "gelu", forward=last_missing)
    calls_of(monkeypatch, "gelu")
    assert all(not check.passed and check.found == "nan" for check in gpu_checks.kernels(SIZES))


@pytest.mark.parametrize("check", [gpu_checks.kernels, gpu_checks.ops])
@pytest.mark.usefixtures("gpu_in_reach")
def test_ops_and_kernels_are_computed_in_poisoned_memory(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    pools, compute = [], gpu_checks.computed

    def noted(info: Any, call: Any, arrays: Any, where: str) -> Any:
        pools.append((where, type(device.current_pool()) is not cupy.cuda.MemoryPool))
        return compute(info, call, arrays, where)

    calls_of(monkeypatch, "gelu")
    cases = gpu_checks.each_call()[:5]
    monkeypatch.setattr(gpu_checks, "each_call", lambda: cases)
    monkeypatch.setattr(gpu_checks, "computed", noted)
    check(SIZES)
    assert set(pools) == {("cuda", True)} and len(pools) > 4


def test_poison_fills_every_allocation(gpu_in_reach: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    filled = []
    monkeypatch.setattr(device.MemoryPointer, "memset_async", lambda self, value, size: filled.append((value, size)))
    with gpu_checks.poisoned():
        cupy.cuda.alloc(48)
    assert filled == [(0xFF, 48)]


@pytest.mark.usefixtures("gpu_in_reach")
def test_ops_notice_a_wrong_and_a_failing_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in gpu_checks.each_call() if case[0].name in ("tanh", "sin")]
    monkeypatch.setattr(gpu_checks, "each_call", lambda: cases)
    assert failures(gpu_checks.ops(SIZES)) == []
    tanh = next(info for info, *_ in cases if info.name == "tanh")
    cases[0] = (dataclasses.replace(cases[0][0], reference=lambda x: torch.tanh(x) * 1.0001), *cases[0][1:])
    cases[-1] = (dataclasses.replace(tanh, name="no_such_op"), *cases[-1][1:])
    wrong = [check for check in gpu_checks.ops(SIZES) if not check.passed]
    assert len(wrong) == 3  # and the sum of them
    assert "AttributeError" in wrong[1].found


@pytest.mark.parametrize("name", ["dropout", "dropout_add", "causal_attention"])
def test_masks_notice_another_key(name: str, gpu_in_reach: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(gpu_checks.masks(SIZES)) == []
    forward = backend.kernels["cuda"][name].forward
    spoiled(
        monkeypatch, name, forward=lambda *args, **params: forward(*args, **{**params, "key": params["key"]._replace(call=2)})
    )
    assert all(what.startswith(name + ",") for what in failures(gpu_checks.masks(SIZES)))
    assert failures(gpu_checks.masks(SIZES))


def test_the_optimiser_is_noticed(gpu_in_reach: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(gpu_checks.optimiser(SIZES)) == []
    adamw, squares = gpu_in_reach.adamw, gpu_in_reach.sum_of_squares
    with monkeypatch.context() as patch:
        patch.setattr(gpu_in_reach, "adamw", lambda *args, rate, **rest: adamw(*args, rate=rate * 1.001, **rest))
        assert failures(gpu_checks.optimiser(SIZES)) == ["weights"]
    monkeypatch.setattr(gpu_in_reach, "sum_of_squares", lambda x: squares(x) * 1.001)
    assert "norms" in failures(gpu_checks.optimiser(SIZES))


def test_the_whole_model_is_noticed(gpu_in_reach: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a micro-step replaces the gradient of the one before."""
    gemm = gpu_in_reach.gemm
    monkeypatch.setattr(gpu_in_reach, "gemm", lambda *args, accumulate=False, **options: gemm(*args, **options))
    assert failures(gpu_training.whole_model(SIZES)) == ["CuPy in fp32", "CuPy in tf32", "CuPy in bf16"]


@pytest.mark.usefixtures("gpu_in_reach")
def test_bits_notice_an_eager_step_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Replayed._run

    def other(self: Replayed, *args: Any) -> Any:
        loss = run(self, *args)
        return loss if self._capture else loss * np.float32(1 + 2**-20)

    monkeypatch.setattr(Replayed, "_run", other)
    wrong = failures(gpu_training.bits(SIZES))
    assert wrong == [f"3 steps in {p}: a graph and launch by launch" for p in ("fp32", "tf32", "bf16")]


@pytest.mark.usefixtures("gpu_in_reach")
def test_resuming_notices_a_moment_that_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    load = optim.AdamW.load_state_dict

    def forgetful(self: Any, state: dict[str, Any]) -> None:
        load(self, {**state, "exp_avg": [0 * a for a in state["exp_avg"]]})

    with monkeypatch.context() as patch:
        patch.setattr(optim.AdamW, "load_state_dict", forgetful)
        assert len(failures(gpu_training.resuming(SIZES))) == 3
    monkeypatch.setattr(gpu_training, "differences", lambda a, b: "1 of 9 arrays differ")
    assert {check.found for check in gpu_training.resuming(SIZES)} == {"1 of 9 arrays differ"}


@pytest.mark.usefixtures("gpu_in_reach")
def test_one_bit_of_a_weight_or_a_moment_is_a_difference() -> None:
    a, b = (gpu_training.trainer(SIZES, Path("nowhere")) for _ in range(2))
    assert gpu_training.differences(a, b) == ""
    moments = b.optimizer.state_dict()
    moments["exp_avg_sq"][3].flat[0] = 1e-30
    b.optimizer.load_state_dict(moments)
    assert gpu_training.differences(a, b).startswith("1 of")
    next(b.model.parameters()).data[0, 0] *= 1 + 2**-23
    assert gpu_training.differences(a, b).startswith("2 of")


@pytest.mark.usefixtures("gpu_in_reach")
def test_waiting_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Replayed.__call__

    def peeking(self: Replayed, *args: Any) -> Any:
        loss = call(self, *args)
        loss.item()
        return loss

    monkeypatch.setattr(Replayed, "__call__", peeking)
    assert failures(gpu_training.waiting(SIZES)) == ["as a graph", "launch by launch"]


@pytest.mark.usefixtures("gpu_in_reach")
def test_a_kernel_that_never_ran_is_noticed() -> None:
    names = {*backend.cuda._kernels.kernels, *backend.cuda._flash.kernels, "gemm"}
    assert failures(gpu_checks.coverage(names)) == []
    (check,) = gpu_checks.coverage(names - {"gelu<bf16>"})
    assert not check.passed and check.found == "never run: gelu<bf16>"


def test_a_nan_never_passes() -> None:
    assert gpu_checks.below(1e-5, 1e-6) == ("1.0e-06", True)
    assert not gpu_checks.below(1e-5, float("nan"))[1]
    assert np.isnan(gpu_checks.worst([np.ones(2), np.array([1, np.nan])], [np.ones(2), np.ones(2)]))
    with pytest.raises(ValueError, match="shape"):
        gpu_checks.distance(np.ones(1), np.ones(2))


# -- measurements


@pytest.mark.usefixtures("gpu_in_reach")
def test_ratios_are_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes 2, 4, 6 ms where tinytensor takes 1: after one uncounted round, 5 in the middle."""

    class Fake:
        def __init__(self, name: str, loss: float = 0.0) -> None:
            self.name, self.loss, self.turn = name, loss, 0

        def micro_step(self) -> float:
            return self.loss

        update = micro_step

    fakes = {OURS: Fake(OURS), EAGER: Fake(EAGER), "wrong": Fake("wrong", float("nan"))}

    def timed(work: Callable[[], Any], repeat: int) -> float:
        fake = work()
        fake.turn += 1
        return 1e-3 if fake.name == OURS else 2e-3 * fake.turn

    def broken() -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu_speed, "contenders", lambda *_: {n: lambda n=n: fakes[n] for n in fakes} | {COMPILED: broken})
    monkeypatch.setattr(gpu_speed, "timed", timed)
    here = session()
    gpu_speed.contest(here, "race", MODEL, 2, "bf16", {"step": lambda step: step})
    assert here.found == {
        ("race", "step", OURS): 1e-3,
        ("race", "step", EAGER): pytest.approx(5e-3),
        ("race", EAGER): pytest.approx(5),
    }
    (table,) = here.report.tables
    assert [row[1] for row in table["rows"][2:]] == [
        "failed: FloatingPointError: its loss is nan",
        "failed: RuntimeError: no compiler",
    ]
    assert table["rows"][0][2] == "32,000"  # tokens a second


@pytest.mark.usefixtures("gpu_in_reach")
def test_memory_is_what_the_device_has_less(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([1000, 400, 1000, 200, 1000, 100])
    monkeypatch.setattr(device.runtime, "memGetInfo", lambda: (next(free), 2000))
    here = session()
    gpu_speed.memory(here)
    assert here.found["memory"] == 600 / 800


@pytest.mark.usefixtures("gpu_in_reach")
def test_bytes_and_flops_of_a_launch() -> None:
    import cupy

    from tinytensor.backend.launcher import Strided

    a, b, out = (cupy.zeros(shape, np.float32) for shape in ((5, 2, 3), (5, 3, 4), (5, 2, 4)))
    assert gpu_launches.work_of("gemm", (a, b, out)) == ("gemm 5 × 2 × 3 × 4 in float32", 4 * (30 + 60 + 40), 2 * 5 * 2 * 3 * 4)
    assert gpu_launches.work_of("gelu<float>", (a, Strided(b), None, 7)) == ("gelu<float>", 4 * 90, 0)
    q = cupy.zeros((2, 3, 4, 16), np.float32)
    pairs = 3 + 4 + 5 + 6  # of 4 queries, the last of 6 positions
    assert gpu_launches.work_of("flash_forward<16>", (Strided(q), 1, 2, 3, 4, 6))[2] == 2 * 2 * 2 * 3 * 16 * pairs


def test_a_race_ends_at_its_goal_and_counts_the_others_steps(gpu_in_reach: ModuleType, text: Path) -> None:
    here = session()
    here.data = text
    here.found |= {("micro-step in bf16", kind, EAGER): s for kind, s in (("micro-step", 2.0), ("clip and AdamW", 1.0))}
    assert gpu_speed.race(here) is None
    (table,) = here.report.tables
    ours, theirs = table["rows"]
    assert "to validation loss 3.5" in table["title"] and 5 <= int(ours[1]) < 20
    assert float(theirs[3]) == 3.0 * int(ours[1])
    here.plan = replace(PLAN, goal=0.1)
    gpu_speed.race(here)
    assert "NOT to 0.1" in here.report.tables[-1]["title"]


def test_a_race_ends_with_its_time(gpu_in_reach: ModuleType, text: Path) -> None:
    here = session()
    here.data, here.deadline = text, time.monotonic()
    gpu_speed.race(here)
    assert int(here.report.tables[0]["rows"][0][1]) <= 2


def test_without_a_text_there_is_no_race(gpu_in_reach: ModuleType, tmp_path: Path) -> None:
    here = session()
    here.data = tmp_path / "nothing.txt"
    assert str(gpu_speed.race(here)).startswith("skipped")


@pytest.mark.parametrize(
    ("value", "limit", "expected"),
    [
        (0.8, 0.8, "≥ 0.8: met"),
        (0.79, 0.8, "≥ 0.8: NOT met"),
        (250, -250, "≤ 250: met"),
        (251, -250, "≤ 250: NOT met"),
        (None, 1.0, "≥ 1"),
    ],
)
def test_bars(value: float | None, limit: float, expected: str) -> None:
    assert gpu._met(value, limit) == expected


def test_the_tokens_are_the_same_for_all(gpu_in_reach: ModuleType) -> None:
    """And the micro-step's gradient is made anew each time."""
    from minigpt.benchmarks.ours import DeviceStep
    from minigpt.benchmarks.theirs import TorchStep

    model = {**MODEL, "dropout": 0.0}
    ours, theirs = DeviceStep(model, 2, "fp32"), TorchStep(model, 2, "fp32", device="cpu")
    with torch.no_grad():
        for (name, p), q in zip(ours.gpt.named_parameters(), named(theirs.gpt), strict=True):
            q.copy_(torch.from_numpy(p.numpy()))
            assert tuple(q.shape) == p.shape, name
    for _ in range(3):
        assert ours.micro_step().item() == pytest.approx(float(theirs.micro_step()), rel=1e-6)
    for p, q in zip(ours.gpt.parameters(), named(theirs.gpt), strict=True):
        np.testing.assert_allclose(p.grad.numpy(), q.grad.numpy(), 1e-4, 1e-6)


def named(gpt: Any) -> list[Any]:
    """PyTorch's parameters in the order of ours."""
    blocks = [[b.ln_1, b.c_attn, b.attn_proj, b.ln_2, b.c_fc, b.mlp_proj] for b in gpt.h]
    return [m.weight for m in (gpt.wte, gpt.wpe, *(m for block in blocks for m in block), gpt.ln_f)]
