"""The whole of training on CuPy's stand-in: the same model as on NumPy, as a graph or not, saved and resumed on either."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from minigpt.checkpoint import LAST, load
from minigpt.sampling import Sampling, generate
from minigpt.tracking import Quiet
from minigpt.trainer import Trainer
from tests.cuda import standin
from tests.minigpt.small import TINY, corpus, verse
from tinytensor.graph import Replayed

pytestmark = pytest.mark.usefixtures("cuda")
GPT16 = replace(TINY, n_embd=32, block_size=20, dropout=0.2, shards=None, bias=True)  # heads of 16, which flash.cu takes


def trainer(out_dir: Path = Path("nowhere"), resumed: Any = None, **changes: Any) -> Trainer:
    return Trainer(replace(GPT16, **changes), corpus(verse()), out_dir, resumed)


def steps(t: Trainer, n: int) -> list[tuple[float, float]]:
    made = []
    for _ in range(n):
        made.append(t.train_step(1e-2)[:2])
        t.step += 1
    return made


def weights(t: Trainer) -> dict[str, np.ndarray]:
    return t.model.state_dict()


def distance(a: Trainer, b: Trainer) -> float:
    theirs = weights(b)
    return max(np.linalg.norm(w - theirs[name]) / np.linalg.norm(w) for name, w in weights(a).items())


def test_losses_and_weights_are_those_on_the_cpu() -> None:
    """Dropout and batches are the same numbers on both; what differs is rounding."""
    here, there = trainer(shards=1), trainer(device="cuda")
    for a, b in zip(steps(here, 4), steps(there, 4), strict=True):
        assert a == pytest.approx(b, rel=2e-5)
    assert distance(here, there) < 1e-3  # AdamW divides by gradients that may be nearly 0


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_lower_precision_takes_nearly_the_same_steps(precision: Any) -> None:
    here, there = trainer(shards=1), trainer(device="cuda", precision=precision)
    for a, b in zip(steps(here, 3), steps(there, 3), strict=True):
        assert a == pytest.approx(b, rel=2e-2)
        assert a != pytest.approx(b, rel=1e-6), "it makes no difference"
    assert all(w.dtype == np.float32 for w in weights(there).values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_graph_checkpointed_activations_and_the_same_run_twice_give_the_same_bits(precision: Any, shards: int) -> None:
    ways = [(True, False), (True, False), (False, False), (True, True), (False, True)]
    common = {"device": "cuda", "precision": precision, "shards": shards}
    runs = [trainer(**common, cuda_graph=graph, checkpoint_activations=lean) for graph, lean in ways]
    first, *others = [steps(t, 5) for t in runs]
    assert others == [first] * 4
    for t in runs[1:]:
        assert all(np.array_equal(w, weights(t)[name]) for name, w in weights(runs[0]).items())


def test_a_micro_step_is_one_launch_and_waits_for_nothing() -> None:
    from cupyx import allow_synchronize

    t = trainer(device="cuda", precision="bf16")
    steps(t, 2)
    t.optimizer.zero_grad(set_to_none=False)
    before = replace(standin.device.counts)
    with allow_synchronize(False):
        t.replayed(t.step, 0, t.starts(0))
    after = standin.device.counts
    assert after.launches - before.launches == 3  # where it is, the graph, and the copy of its loss
    assert after.host_copies - before.host_copies == 1  # where the rows begin
    assert after.synchronisations == before.synchronisations


def test_without_a_graph_a_micro_step_is_few_launches() -> None:
    """For a model of L layers at most 38·L + 28: for the six of `shakespeare` 256."""
    t = trainer(device="cuda", precision="bf16", cuda_graph=False, bias=False)
    steps(t, 1)
    t.optimizer.zero_grad(set_to_none=False)
    before = standin.device.counts.launches
    t.replayed(t.step, 0, t.starts(0))
    assert standin.device.counts.launches - before <= 38 * 2 + 28


@pytest.mark.parametrize("devices", [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_where_it_stopped_on_either_device(devices: tuple[str, str], tmp_path: Path) -> None:
    whole = trainer(device=devices[0], shards=1)
    made = steps(whole, 5)
    part = trainer(tmp_path, device=devices[0], shards=1)
    assert steps(part, 3) == made[:3]
    part.save()
    resumed = trainer(tmp_path, load(tmp_path / LAST), device=devices[1], shards=1)
    exact = devices[0] == devices[1]
    for a, b in zip(steps(resumed, 2), made[3:], strict=True):
        assert a == (b if exact else pytest.approx(b, rel=1e-4))
    assert distance(resumed, whole) < (1e-12 if exact else 5e-3)


def test_a_whole_run_with_evaluation_and_samples(tmp_path: Path) -> None:
    """`train` itself, in bf16: its losses are finite, its samples text, and its validation loss nearly the CPU's."""
    there, here = (trainer(tmp_path / d, device=d, precision=p, shards=1) for d, p in (("cuda", "bf16"), ("cpu", "fp32")))
    for t in (there, here):
        (tmp_path / t.config.device).mkdir()
        assert t.train(Quiet())
    assert there.val_loss == pytest.approx(here.val_loss, rel=2e-2)
    assert isinstance(there.sample(), str) and there.sample() == there.sample()


def test_the_same_text_on_both_devices() -> None:
    model = trainer(device="cpu").model.eval()
    for p in model.parameters():
        p.data *= 10  # so that it does not repeat one token
    text = [list(generate(model, np.array([1, 2]), 30, Sampling(temperature=0)))]
    text.append(list(generate(model.to("cuda"), np.array([1, 2]), 30, Sampling(temperature=0))))
    text.append(list(generate(model.for_sampling(), np.array([1, 2]), 30, Sampling(temperature=0), use_cache=False)))
    assert text[0] == text[1] == text[2] and len(set(text[0])) > 5


def test_what_cannot_be_captured_fails_at_once_and_leaves_no_capture_open() -> None:
    """A loss that looks at values works as it is written; its recording does not, and the stream is free again."""
    w = tt.nn.Parameter(np.ones(4, np.float32))
    w.data = tt.backend.to_device(w.data, "cuda")
    adamw = tt.optim.AdamW([w])
    adamw.zero_grad(set_to_none=False)

    def loss_of(x: Any) -> tt.Tensor:
        y = (w * tt.Tensor(x)).sum()
        return y * (2 if y.item() > 0 else 1)

    replayed = Replayed(loss_of, seed=0)
    x = np.ones(4, np.float32)
    assert replayed(0, 0, x).item() == 8
    for _ in range(2):
        with pytest.raises(RuntimeError, match="captured"):
            replayed(0, 0, x)
    assert not replayed._stream.is_capturing()
    assert Replayed(lambda x: (w * tt.Tensor(x)).sum(), seed=0)(0, 0, x).item() == 4


@pytest.mark.parametrize("capture", [True, False])
def test_gradients_that_lie_nowhere_are_refused(capture: bool) -> None:
    w = tt.nn.Parameter(np.ones(4, np.float32))
    w.data = tt.backend.to_device(w.data, "cuda")
    adamw = tt.optim.AdamW([w])
    replayed = Replayed(lambda x: (w * tt.Tensor(x)).sum(), seed=0, capture=capture)
    adamw.zero_grad()
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"call optimizer.zero_grad\(set_to_none=False\) before it"):
            replayed(0, 0, np.ones(4, np.float32))


def test_a_replay_whose_gradients_moved_since_the_recording_is_refused() -> None:
    w = tt.nn.Parameter(np.ones(4, np.float32))
    w.data = tt.backend.to_device(w.data, "cuda")
    adamw, x = tt.optim.AdamW([w]), np.ones(4, np.float32)
    adamw.zero_grad(set_to_none=False)
    replayed = Replayed(lambda x: (w * tt.Tensor(x)).sum(), seed=0)
    for _ in range(3):
        replayed(0, 0, x)
    adamw.zero_grad()
    with pytest.raises(RuntimeError, match=r"call optimizer.zero_grad\(set_to_none=False\) before it"):
        replayed(0, 0, x)
    w.grad = tt.Tensor(tt.backend.to_device(x, "cuda"))
    with pytest.raises(RuntimeError, match="one lies elsewhere now"):
        replayed(0, 0, x)
    assert w.grad.tolist() == [1, 1, 1, 1]
    adamw.zero_grad(set_to_none=False)
    replayed(0, 0, x)
    assert w.grad.tolist() == [1, 1, 1, 1]


def test_a_loss_may_make_leaves_of_its_own() -> None:
    w = tt.nn.Parameter(np.full(4, 3, np.float32))
    w.data = tt.backend.to_device(w.data, "cuda")
    tt.optim.AdamW([w]).zero_grad(set_to_none=False)

    def loss_of(x: Any) -> tt.Tensor:
        leaf = tt.Tensor(x)
        leaf.requires_grad = True
        (slope,) = tt.grad((leaf * leaf * w).sum(), leaf, create_graph=True)
        return slope.sum()

    replayed = Replayed(loss_of, seed=0)
    for calls in (1, 2, 3):
        assert replayed(0, 0, np.ones(4, np.float32)).item() == 24
        assert w.grad is not None and w.grad.tolist() == [2 * calls] * 4


def test_the_caller_waits_for_what_a_failed_call_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = []
    monkeypatch.setattr(standin.device.Stream, "wait_event", lambda self, event: waiting.append(self))
    replayed = Replayed(lambda x: tt.Tensor(x).no_such_method(), seed=0)
    with pytest.raises(AttributeError):
        replayed(0, 0, np.ones(4, np.float32))
    assert waiting == [replayed._stream, standin.device.Stream.null]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_step_draws_its_own_numbers_without_a_graph_too(dtype: str) -> None:
    w = tt.nn.Parameter(np.ones(64, dtype))
    w.data = tt.backend.to_device(w.data, "cuda")
    adamw = tt.optim.AdamW([w])
    replayed = Replayed(lambda x: (tt.dropout(w, 0.5) * tt.Tensor(x)).sum(), seed=3, capture=False)
    masks = []
    for step in range(3):
        adamw.zero_grad(set_to_none=False)
        replayed(step, 0, np.ones(64, dtype))
        masks.append(tuple(w.grad.numpy()))
    assert len(set(masks)) == 3


def test_the_gradients_of_all_micro_steps_add_up() -> None:
    w = tt.nn.Parameter(np.arange(4, dtype=np.float32))
    w.data = tt.backend.to_device(w.data, "cuda")
    adamw = tt.optim.AdamW([w])
    adamw.zero_grad(set_to_none=False)
    replayed = Replayed(lambda x: (tt.dropout(w, 0.5) * tt.Tensor(x)).sum(), seed=3)
    expected = np.zeros(4)
    for micro_step in range(5):
        x = np.full(4, micro_step + 1, np.float32)
        replayed(7, micro_step, x)
        with tt.random.scope(3, 7, micro_step):
            kept = tt.dropout(tt.ones(4), 0.5).numpy()
        expected += kept * x
    assert w.grad is not None and np.array_equal(w.grad.numpy(), expected)
