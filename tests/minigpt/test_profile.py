"""train.py --profile: a few steps looked at in a run that goes on as if they had not been."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minigpt import run as run_module
from minigpt.checkpoint import LAST, load
from minigpt.run import Stopped, run
from minigpt.trainer import Trainer
from tests.minigpt.small import TINY, record, verse
from tinytensor import state
from tinytensor.inspect import cost

FILES = ("profile.json", "profile.txt", "roofline.png")


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_gemm_peak", lambda threads: 1e9)
    monkeypatch.setattr(cost, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(run_module, "plot", lambda *_: None)
    monkeypatch.setattr(run_module, "gemm_peak", lambda: 1e9)


def trained(folder: Path, **changes: Any) -> Path:
    text = folder.parent / "verse.txt"
    text.write_text(verse(), encoding="utf-8")
    return run(replace(TINY, out_dir=folder, data=text, **changes))


def blocks(folder: Path) -> int:
    """Steps in the timeline."""
    return sum(e.get("cat") == "block" for e in json.loads((folder / "profile.json").read_text())["traceEvents"])


def test_a_profiled_run_is_the_run_it_would_have_been(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, seen = trained(tmp_path / "plain"), trained(tmp_path / "seen", profile=2)
    assert record(seen) == record(plain)
    assert load(seen / LAST).config == replace(
        load(plain / LAST).config, out_dir=seen
    )  # so a resumed run is not profiled again
    assert not [name for name in FILES if (plain / name).exists()]
    assert blocks(seen) == 2
    text = (seen / "profile.txt").read_text(encoding="utf-8")
    calls = 2 * TINY.accumulation * TINY.resolved_shards()
    assert f"causal_attention   kernel    {calls * TINY.n_layer:5}" in text
    said = capsys.readouterr().out
    assert f"profiled 2 steps: {text.splitlines()[-1]}\n" in said
    assert f"profile.txt, profile.json (for ui.perfetto.dev) and roofline.png are in {seen}\n" in said


def test_only_those_steps_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at, step = [], Trainer.train_step

    def noting(self: Trainer, lr: float) -> Any:
        looked_at.append(len(state.thread.observers))
        return step(self, lr)

    monkeypatch.setattr(Trainer, "train_step", noting)
    trained(tmp_path / "a", profile=2)
    trained(tmp_path / "b", max_steps=2)
    assert looked_at == [0, 0, 1, 1, 0, 0, 0, 0]


def test_a_run_that_ends_early_tells_of_the_steps_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert blocks(trained(tmp_path / "a", profile=9, max_steps=3)) == 1
    assert "profiled 1 step: " in capsys.readouterr().out
    trained(tmp_path / "b", profile=9, max_steps=2)
    assert "nothing was profiled: the run ended within the two steps that are left out" in capsys.readouterr().out


def test_a_run_that_was_stopped_tells_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.train_step

    def stopping(self: Trainer, lr: float) -> Any:
        made = step(self, lr)
        return made._replace(stop=self.step == 3)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    with pytest.raises(Stopped):
        trained(tmp_path / "a", profile=9)
    assert blocks(tmp_path / "a") == 2


def test_a_profile_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a" / "roofline.png").mkdir(parents=True)
    trained(tmp_path / "a", profile=1)
    assert load(tmp_path / "a" / LAST).step == TINY.max_steps
    assert "the profile could not be written ([Errno 21] Is a directory" in capsys.readouterr().out
