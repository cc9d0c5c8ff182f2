"""Losses and gradients that are not finite: left out, counted, and in the end told of."""

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from minigpt.checkpoint import LAST, load
from minigpt.config import TrainConfig
from minigpt.run import run
from minigpt.trainer import Trainer
from tests.minigpt.forked import leave_out_what_takes_longest, record, run_json, state
from tests.minigpt.small import TINY, verse


@pytest.fixture(name="config")
def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """TINY in this process, without what takes longest."""
    (tmp_path / "verse.txt").write_text(verse(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    leave_out_what_takes_longest(monkeypatch.setattr)
    return RUN


RUN = replace(TINY, data=Path("verse.txt"), max_steps=9, dropout=0.2, save_interval=1)
BAD = ["nan loss", "inf loss", "-inf loss", "nan gradient", "inf gradient"]


def spoil(monkeypatch: pytest.MonkeyPatch, how: str, steps: tuple[int, ...], shards: tuple[int, ...] = (1,)) -> None:
    """Let the loss of some shards, or only its gradient, be no number at some steps."""
    shard_loss = Trainer.shard_loss

    def spoiled(self: Trainer, shard: int) -> tt.Tensor:
        loss = shard_loss(self, shard)
        if self.step not in steps or shard not in shards:
            return loss
        value, what = how.split()
        if what == "loss":
            return loss * float(value)
        w = self.model.wte.weight
        nothing = (w - w.detach()).sum()  # 0, and its gradient is 1
        return loss + (nothing * 1e38 * 1e38 if value == "inf" else nothing * 1e38 * 1e38 - nothing * 1e38 * 1e38)

    monkeypatch.setattr(Trainer, "shard_loss", spoiled)


def only_finite(folder: Path) -> bool:
    files = list(folder.rglob("*.safetensors"))
    saved = [load(path) for path in files]
    arrays = [a for s in saved for a in (*s.model.values(), *s.optimizer["exp_avg"], *s.optimizer["exp_avg_sq"])]
    return bool(files) and all(np.isfinite(a).all() for a in arrays)


@pytest.fixture(name="update_left_out", scope="module")
def record_of_a_run_without_its_fifth_update(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    make = Trainer.train_step

    def without_update(self: Trainer, lr: float) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            if self.step == 4:
                inner.setattr(self.optimizer, "step", lambda: None)
            return make(self, lr)

    with pytest.MonkeyPatch.context() as patch:
        (home / "verse.txt").write_text(verse(), encoding="utf-8")
        patch.chdir(home)
        leave_out_what_takes_longest(patch.setattr)
        patch.setattr(Trainer, "train_step", without_update)
        return record(run(replace(RUN, out_dir=home / "run")))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("how", BAD)
def test_a_step_that_is_not_finite_changes_no_weight_and_no_moment_and_is_counted(
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    update_left_out: dict[str, Any],
    how: str,
) -> None:
    spoil(monkeypatch, how, (4,), (1,) if "inf" in how else (0, 1, 2, 3))
    kept: dict[int, dict[str, Any]] = {}
    save = Trainer.save

    def keep(self: Trainer) -> None:
        save(self)
        kept[self.step] = state(load(self.out_dir / LAST))

    monkeypatch.setattr(Trainer, "save", keep)
    out_dir = run(config)
    made = record(out_dir)
    for name in ("model", "moments"):
        assert kept[5][name] == kept[4][name] != kept[6][name]
        assert made[name] == update_left_out[name]
    assert [row["skipped"] for row in made["metrics"]] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert [kept[step]["numbers"][4] for step in sorted(kept)] == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert load(out_dir / LAST).skipped == run_json(out_dir)["summary"]["skipped"] == 1
    for row, other in zip(made["metrics"], update_left_out["metrics"], strict=True):
        changed = ("train_loss", "grad_norm", "skipped") if row["step"] == 5 else ("skipped",)
        assert row | dict.fromkeys(changed) == other | dict.fromkeys(changed)
    assert made["metrics"][4]["grad_norm"] is None
    assert (made["metrics"][4]["train_loss"] is None) == how.endswith("loss")
    assert only_finite(out_dir)
    assert capsys.readouterr().out.count("step 5: loss or gradient is not finite, update skipped") == 1


def test_skipped_updates_are_counted_on_after_a_run_was_resumed(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "nan loss", (1, 4, 7))
    whole = record(run(replace(config, out_dir=Path("whole"))))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step = Trainer.train_step

        def interrupted(self: Trainer, lr: float) -> Any:
            if self.step == 5:
                raise KeyboardInterrupt
            return at_step(self, lr)

        patch.setattr(Trainer, "train_step", interrupted)
        run(replace(config, out_dir=Path("again")))
    assert load(Path("again") / LAST).skipped == 2
    assert record(run(replace(config, out_dir=Path("again"), resume=True))) == whole
    assert whole["metrics"][-1]["skipped"] == load(Path("whole") / LAST).skipped == 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("how", "limit"), [(how, 3) for how in BAD] + [("nan loss", 1), ("nan loss", 2)])
def test_as_many_skipped_in_a_row_as_allowed_end_the_run_in_one_sentence(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, how: str, limit: int
) -> None:
    spoil(monkeypatch, how, tuple(range(3, 9)))
    with pytest.raises(FloatingPointError) as caught:
        run(replace(config, max_skipped=limit))
    message, folder = str(caught.value), Path("runs/tiny")
    assert "\n" not in message
    assert re.match(rf"the loss of step {limit + 3} is .* its gradient norm (nan|inf), .*--resume and a smaller --lr", message)
    assert re.search(rf"\b{limit}\D+in a row", message)
    assert run_json(folder)["status"] == f"failed: {message}"
    assert run_json(folder)["summary"]["skipped"] == limit
    assert only_finite(folder)
    assert (load(folder / LAST).step, load(folder / LAST).skipped) == (limit + 2, limit - 1)


@pytest.mark.parametrize(("limit", "word"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th")])
def test_the_sentence_counts_as_one_speaks(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, limit: int, word: str) -> None:
    spoil(monkeypatch, "nan loss", tuple(range(9)))
    with pytest.raises(FloatingPointError, match=f"the {word} step in a row|^(?!.*th step)"):
        run(replace(config, max_skipped=limit, save_interval=None))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_good_steps_in_between_begin_the_count_anew(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "nan gradient", (0, 1, 3, 4, 6, 7))
    out_dir = run(replace(config, max_skipped=3))
    assert load(out_dir / LAST).skipped == 6
    assert only_finite(out_dir)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("lr", "weight_decay"), [(1e20, 0.1), (1e30, 0.1), (9e34, 0.1), (1e6, 1e5)])
def test_no_settings_make_a_checkpoint_that_is_not_finite(config: TrainConfig, lr: float, weight_decay: float) -> None:
    with suppress(ArithmeticError, ValueError):
        run(replace(config, lr=lr, weight_decay=weight_decay, warmup_steps=0, eval_interval=100, max_steps=20))
    folder = Path("runs/tiny")
    assert not folder.exists() or only_finite(folder)
