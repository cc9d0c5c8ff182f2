"""What a run tells: the record on disk, the numbers on the terminal, the curve."""

import io
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from rich.console import Console

from minigpt.curve import plot
from minigpt.tracking import Tracker, duration, read_metrics


def tracker(folder: Path, max_steps: int = 9, first_step: int = 0) -> Tracker:
    return Tracker(folder, max_steps, first_step, Console(file=io.StringIO(), width=200))


def row(step: int, loss: float = 2.0, seconds: float = 0.1, val_loss: float | None = None, norm: float = 0.5) -> dict[str, Any]:
    numbers = {"step": step, "train_loss": loss, "val_loss": val_loss, "lr": 1e-3, "grad_norm": norm}
    return numbers | {"tokens": step * 10, "seconds": seconds, "skipped": 0}


def told(made: Tracker) -> str:
    return made.console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.04, "0.0 s"),
        (59.4, "59.4 s"),
        (59.6, "1 min 0 s"),
        (725, "12 min 5 s"),
        (3599.6, "1 h 0 min"),
        (12000, "3 h 20 min"),
        (360000, "100 h 0 min"),
    ],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_is_on_disk_as_soon_as_its_step_is_done(tmp_path: Path) -> None:
    with tracker(tmp_path) as made:
        for step in (1, 2, 3):
            made.step(row(step, val_loss=1.5 if step == 3 else None))
            assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, step + 1))
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == row(3, val_loss=1.5)
    assert "step 3  validation loss 1.5000" in told(made)


@pytest.mark.filterwarnings("error")
def test_the_record_is_strict_json_whatever_the_numbers(tmp_path: Path) -> None:
    with tracker(tmp_path) as made:
        made.step(row(1, math.nan, val_loss=-math.inf, norm=math.inf))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=pytest.fail)
    assert (read["train_loss"], read["val_loss"], read["grad_norm"]) == (None, None, None)
    assert "step 1: loss or gradient is not finite, update skipped" in told(made)
    assert "step 1  validation loss not finite" in told(made)
    plot(tmp_path / "metrics.jsonl", tmp_path / "curve.png", "nothing to draw")


def test_a_sample_is_shown_as_it_is(tmp_path: Path) -> None:
    sample = "ANNA:\n[bold]not markup[/b] :cat: [/]\n3\n4\n5\n6\n7"
    with tracker(tmp_path) as made:
        made.step(row(8, val_loss=1.5))
        made.sample(8, sample)
        assert "[bold]not markup[/b] :cat: [/]" in told(made)
        assert told(made).endswith("\n6\n\n")  # six lines on the way …
        made.sample(9, sample)
    assert "7" in told(made)  # … and all of them at the end
    assert (tmp_path / "samples" / "step-000008.txt").read_text() == sample


@pytest.mark.parametrize(("step_seconds", "words"), [(1.0, "about 1 min 33 s to go"), (200.0, "train.py quick")])
def test_an_estimate_is_given_once(tmp_path: Path, step_seconds: float, words: str) -> None:
    with tracker(tmp_path, max_steps=97) as made:
        for step in range(1, 12):
            made.step(row(step, seconds=step * step_seconds))
    assert told(made).count("to go and the evaluations, measured on") == 1
    assert told(made).count(words) == 1
    assert ("for verse within minutes" in told(made)) == (step_seconds == 200)


def test_resuming_forgets_what_will_be_made_again(tmp_path: Path) -> None:
    with tracker(tmp_path) as made:
        for step in range(1, 6):
            made.step(row(step, float(step)))
    with tracker(tmp_path, first_step=3) as made:
        made.step(row(4, 9.0))
    assert [line["train_loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 9]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 2, "val', "{", "", '{"step": 2,\n'])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + torn)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_the_curve_has_a_line_for_each_loss(tmp_path: Path) -> None:
    with tracker(tmp_path) as made:
        for step in range(1, 9):
            made.step(row(step, 4.0 - step / 4, val_loss=None if step % 4 else 4.2 - step / 4))
    plot(tmp_path / "metrics.jsonl", tmp_path / "curve.png", "a $^^$ title with \\signs_")
    pixels = (matplotlib.image.imread(tmp_path / "curve.png")[..., :3] * 255).round().astype(int)
    for colour in ((0x2B, 0x5C, 0x9E), (0xC8, 0x50, 0x2B), (0x55, 0x55, 0x55)):  # training, validation, learning rate
        assert (pixels == colour).all(axis=-1).sum() > 50
