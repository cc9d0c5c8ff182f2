"""Runs from end to end: what they leave behind, and that an interrupted one goes on as if nothing had happened."""

import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from minigpt import checkpoint, corpus, start
from minigpt import run as run_module
from minigpt.checkpoint import BEST, LAST, PREVIOUS, CheckpointError, load
from minigpt.config import TrainConfig
from minigpt.folder import to_resume
from minigpt.run import run
from minigpt.schedule import warmup_cosine
from minigpt.tracking import read_metrics
from minigpt.trainer import Trainer
from tests.minigpt.small import TINY, interrupted, record, trainer, verse

KEYS = ["step", "train_loss", "val_loss", "lr", "grad_norm", "tokens", "seconds", "skipped"]


@pytest.fixture(name="config")
def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """TINY on a text of its own, in a folder of its own, without the curve, which takes longest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "plot", lambda *_: None)
    Path("verse.txt").write_text(verse(), encoding="utf-8")
    return replace(TINY, data=Path("verse.txt"))


def losses(out_dir: Path) -> list[float]:
    return [row["train_loss"] for row in read_metrics(out_dir / "metrics.jsonl")]


def test_metrics_have_a_line_a_step(config: TrainConfig) -> None:
    out_dir = run(config)
    assert out_dir == Path("runs/tiny")
    assert {p.name for p in out_dir.iterdir()} == {LAST, PREVIOUS, BEST, "metrics.jsonl", "run.json", "run.lock", "samples"}
    rows = read_metrics(out_dir / "metrics.jsonl")
    assert len((out_dir / "metrics.jsonl").read_text().splitlines()) == len(rows) == 6
    for step, row in enumerate(rows, 1):
        assert list(row) == KEYS
        assert row["step"] == step
        assert 0 < row["train_loss"] < 5
        assert row["grad_norm"] > 0
        assert row["lr"] == warmup_cosine(step - 1, 1e-2, 1e-3, 2, 6)
        assert row["tokens"] == step * 3 * 2 * 8
        assert (row["val_loss"] is not None) == (step in (3, 6))
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert rows[-1]["val_loss"] == load(out_dir / LAST).val_loss


def test_samples_are_verse_of_the_length_asked_for(config: TrainConfig) -> None:
    out_dir = run(config)
    samples = sorted((out_dir / "samples").iterdir())
    assert [p.name for p in samples] == ["step-000003.txt", "step-000006.txt"]
    assert all(len(p.read_text(encoding="utf-8")) == 5 for p in samples)
    silent = run(replace(config, sample_tokens=0))
    assert not (silent / "samples").exists()


def test_the_folder_is_all_that_a_model_needs(config: TrainConfig) -> None:
    out_dir = run(replace(config, max_steps=3))
    (moved := Path("elsewhere")).mkdir()
    os.replace(out_dir / LAST, moved / "one-file")
    Path("verse.txt").unlink()
    saved = load(moved / "one-file")
    assert saved.tokenizer.decode(saved.tokenizer.encode("ANNA:\nThe kettle")) == "ANNA:\nThe kettle"
    assert saved.build_model().config == config.model(len(set(verse())))


def test_the_curve_is_drawn(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt.curve import plot

    monkeypatch.setattr(run_module, "plot", plot)
    out_dir = run(config)
    assert (out_dir / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(out_dir / "curve.png")[..., :3]
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 600
    assert 0.005 < (pixels != pixels[0, 0]).any(axis=-1).mean() < 0.5


@pytest.mark.parametrize(
    ("step", "during"),
    [(2, "train_step"), (3, "train_step"), (5, "train_step"), (6, "evaluate"), (6, "sample"), (6, "save"), (7, "train_step")],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, step: int, during: str
) -> None:
    config = replace(config, max_steps=8, dropout=0.2, bias=True)
    whole = record(run(replace(config, out_dir=Path("whole"))))
    out_dir = interrupted(config, step, monkeypatch, during)
    done = load(out_dir / LAST).step
    assert done == {2: 0, 7: 6}.get(step, 3)
    assert run(replace(config, resume=True)) == out_dir
    assert [row["step"] for row in whole["metrics"]] == list(range(1, 9))
    assert record(out_dir) == whole
    seconds = [row["seconds"] for row in read_metrics(out_dir / "metrics.jsonl")]
    assert seconds == sorted(seconds)  # the clock goes on, too


def test_activations_may_be_checkpointed_or_not_from_one_step_to_the_next(config: TrainConfig) -> None:
    config = replace(config, max_steps=8, dropout=0.2, lr=1e-2, min_lr=1e-2, warmup_steps=0)
    whole = record(run(replace(config, out_dir=Path("whole"))))
    out_dir = run(replace(config, max_steps=3, checkpoint_activations=True))
    run(replace(config, max_steps=6, resume=True))
    run(replace(config, resume=True, checkpoint_activations=True))
    assert record(out_dir)["metrics"][3:6] == whole["metrics"][3:6]
    assert record(out_dir) == whole


def test_a_run_may_be_interrupted_more_than_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, max_steps=10, dropout=0.2)
    whole = record(run(replace(config, out_dir=Path("whole"))))
    out_dir = interrupted(config, 4, monkeypatch)
    for step in (5, 8, 9):
        interrupted(replace(config, resume=True), step, monkeypatch)
    run(replace(config, resume=True))
    assert record(out_dir) == whole


def test_a_finished_run_goes_on_when_it_is_given_more_steps(config: TrainConfig) -> None:
    config = replace(config, dropout=0.2, lr=1e-2, min_lr=1e-2, warmup_steps=0)  # a rate that knows no end
    whole = run(replace(config, max_steps=12, out_dir=Path("whole")))
    out_dir = run(config)
    run(replace(config, max_steps=12, resume=True))
    assert record(out_dir) == record(whole)


def test_a_finished_run_that_is_resumed_does_nothing(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    out_dir = run(config)
    before = {p: p.read_bytes() for p in out_dir.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert run(replace(config, resume=True)) == out_dir
    assert f"validation loss {load(out_dir / LAST).val_loss:.4f} in " in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="tiny is at step 6 already; max_steps=4 must not be less"):
        run(replace(config, resume=True, max_steps=4))
    assert {p: p.read_bytes() for p in out_dir.rglob("*") if p.is_file()} == before


def test_lines_after_the_checkpoint_and_a_torn_one_are_written_anew(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = record(run(replace(config, out_dir=Path("whole"))))
    out_dir = interrupted(config, 5, monkeypatch)
    assert len(losses(out_dir)) == 5
    with open(out_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train_lo')
    run(replace(config, resume=True))
    assert record(out_dir)["metrics"] == whole["metrics"]


def test_a_run_whose_metrics_were_deleted_goes_on(config: TrainConfig) -> None:
    out_dir = run(config)
    (out_dir / "metrics.jsonl").unlink()
    run(replace(config, resume=True, max_steps=8))
    assert [row["step"] for row in read_metrics(out_dir / "metrics.jsonl")] == [7, 8]


def test_what_is_given_on_resume_counts(config: TrainConfig) -> None:
    out_dir = run(config)
    changed = replace(
        config, resume=True, max_steps=9, weight_decay=0.5, beta1=0.5, beta2=0.75, accumulation=1, grad_clip=0.25, dropout=0.5
    )
    run(changed)
    saved = load(out_dir / LAST)
    assert saved.config == replace(changed, resume=False, out_dir=out_dir, tokenizer="char")
    assert [group["weight_decay"] for group in saved.optimizer["param_groups"]] == [0.5, 0.0]
    assert all(list(group["betas"]) == [0.5, 0.75] for group in saved.optimizer["param_groups"])
    assert read_metrics(out_dir / "metrics.jsonl")[-1]["tokens"] == 6 * 48 + 3 * 24
    assert saved.build_model().drop.p == 0.5


def test_the_settings_of_a_run_are_what_flags_change(config: TrainConfig) -> None:
    out_dir = run(replace(config, lr=5e-3))
    saved = load(out_dir / LAST)
    assert saved.config == replace(config, lr=5e-3, out_dir=out_dir, tokenizer="char")
    moved = out_dir.rename("runs/tiny-7")
    assert to_resume(replace(TINY, resume=True)) == moved


def test_another_model_cannot_go_on_and_the_differences_are_named(config: TrainConfig) -> None:
    out_dir = run(config)
    before = (out_dir / LAST).read_bytes()
    with pytest.raises(CheckpointError) as caught:
        run(replace(config, resume=True, n_embd=32, n_layer=1, tokenizer="byte", lr=1e-2))
    message = str(caught.value)
    for difference in ("n_layer 2 → 1", "n_embd 16 → 32", "tokenizer char → byte"):
        assert difference in message
    assert not [name for name in ("n_head", "block_size", "bias", "lr") if name in message]
    assert "\n" not in message
    for changes in ({"n_head": 4}, {"block_size": 4}, {"bias": True}):
        with pytest.raises(CheckpointError, match=next(iter(changes))):
            run(replace(config, resume=True, **changes))
    assert (out_dir / LAST).read_bytes() == before


def test_another_text_cannot_go_on(config: TrainConfig) -> None:
    out_dir = run(config)
    Path("other.txt").write_text(verse(seed=1), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tiny was trained on another text than other\.txt .*--data"):
        run(replace(config, resume=True, data=Path("other.txt")))
    Path("copy.txt").write_text(verse(), encoding="utf-8")
    assert run(replace(config, resume=True, data=Path("copy.txt"))) == out_dir  # the same text may lie elsewhere


def test_a_folder_that_holds_a_run_is_refused(config: TrainConfig) -> None:
    config = replace(config, out_dir=Path("mine"))
    run(config)
    before = {p: p.read_bytes() for p in Path("mine").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"mine already holds a run; continue it with --resume, or choose another --out-dir"):
        run(config)
    for name in (LAST, PREVIOUS, BEST):
        (Path("mine") / name).unlink()
        del before[Path("mine") / name]
        with pytest.raises(ValueError, match="already holds a run"):
            run(config)
    assert {p: p.read_bytes() for p in Path("mine").rglob("*") if p.is_file()} == before


def test_a_folder_with_other_things_in_it_is_used(config: TrainConfig) -> None:
    (folder := Path("deep/er")).mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert run(replace(config, out_dir=folder)) == folder
    assert (folder / "notes.txt").read_text() == "mine"


def test_default_folders_are_numbered(config: TrainConfig) -> None:
    config = replace(config, max_steps=1)
    assert [run(config) for _ in range(3)] == [Path("runs/tiny"), Path("runs/tiny-2"), Path("runs/tiny-3")]
    Path("runs/tiny-4").write_text("in the way")
    assert run(config) == Path("runs/tiny-5")


def test_resume_finds_the_newest_run_of_its_preset(config: TrainConfig) -> None:
    short = replace(config, max_steps=1)
    folders = [run(short), run(short), run(replace(short, preset="tiny-verse")), run(replace(short, preset="other"))]
    for age, folder in enumerate(folders):
        os.utime(folder / LAST, (1e9 + age, 1e9 + age))
    again = replace(config, resume=True, max_steps=2)
    assert run(again) == Path("runs/tiny-2")
    os.utime(folders[0] / LAST, (4e9, 4e9))
    assert run(replace(again, max_steps=3)) == Path("runs/tiny")
    with pytest.raises(CheckpointError, match=r"no run of preset quick with a checkpoint below runs/"):
        run(replace(again, preset="quick"))


def test_the_same_seed_gives_the_same_run_and_another_does_not(config: TrainConfig) -> None:
    config = replace(config, dropout=0.2)
    first, again, other = (run(replace(config, seed=seed)) for seed in (5, 5, 6))
    assert record(first) == record(again)
    assert not set(losses(first)) & set(losses(other))


def test_shards_are_settled_when_a_run_begins(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run resumed on a machine with more cores gives the same numbers."""
    config = replace(config, shards=None, max_steps=8)
    monkeypatch.setenv("TINYTENSOR_NUM_THREADS", "1")
    whole = record(run(replace(config, out_dir=Path("whole"))))
    out_dir = interrupted(config, 4, monkeypatch)
    monkeypatch.setenv("TINYTENSOR_NUM_THREADS", "2")
    run(replace(load(out_dir / LAST).config, resume=True))
    assert record(out_dir) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Path("none.txt")}, r"cannot read none\.txt"),
        ({"block_size": 10**5}, r"block_size=100000 needs more than 100000"),
        ({"tokenizer": "a/b/c"}, r"there is no folder a/b/c"),
        ({"device": "gpu"}, r"gpu"),
        ({"resume": True}, r"no run of preset tiny with a checkpoint below runs/"),
        ({"resume": True, "out_dir": Path("none")}, r"none holds no checkpoint to resume"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(config: TrainConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(replace(config, **changes))
    assert [p.name for p in Path().iterdir()] == ["verse.txt"]


@pytest.mark.parametrize("name", ["a[/b]c", "[red]", "$^^$", ":cat:", "ü 東", "a\\", "100%"])
def test_folders_and_texts_may_have_any_name(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from minigpt.curve import plot

    if name.startswith("$"):  # the title of the curve: one is enough
        monkeypatch.setattr(run_module, "plot", plot)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name + ".txt").write_text(verse(), encoding="utf-8")
    out_dir = run(replace(config, data=Path(name + ".txt"), out_dir=Path(name)))
    assert (out_dir / LAST).is_file()
    printed = capsys.readouterr().out
    assert f"{name}.txt, " in printed
    assert printed.count(name) >= 3


def test_a_run_of_bytes(config: TrainConfig) -> None:
    out_dir = run(replace(config, tokenizer="byte", sample_tokens=40))
    assert load(out_dir / LAST).tokenizer.vocab_size == 256
    sample = (out_dir / "samples" / "step-000003.txt").read_bytes()
    assert len(sample.decode()) <= 40


def test_a_text_of_one_line_and_one_symbol(config: TrainConfig) -> None:
    Path("a.txt").write_text("a" * 500)
    out_dir = run(replace(config, data=Path("a.txt")))
    assert losses(out_dir) == [0] * 6
    assert (out_dir / "samples" / "step-000003.txt").read_text() == "aaaaa"


def test_a_run_that_diverges_says_so(config: TrainConfig) -> None:
    with (
        np.errstate(all="ignore"),
        pytest.raises(
            FloatingPointError,
            match=r"loss of step \d+ is .* norm (nan|inf), not finite for 10 steps in a row; .*--resume and a smaller --lr",
        ),
    ):
        run(replace(config, lr=1e30, grad_clip=math.inf, warmup_steps=0, max_steps=30))
    rows = read_metrics(Path("runs/tiny/metrics.jsonl"))  # strict JSON: no NaN in it
    assert rows[0]["train_loss"] > 0
    assert "NaN" not in Path("runs/tiny/metrics.jsonl").read_text()


def test_the_best_checkpoint_is_the_best(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    best = []
    for made.step, made.val_loss in enumerate((3.0, 2.0, 2.0, math.nan, 2.5, 2.25, 1.5, math.inf, 1.75)):
        made.save()
        assert load(tmp_path / LAST).step == made.step
        best.append(load(tmp_path / BEST).step)
    assert best == [0, 1, 1, 1, 1, 1, 6, 6, 6]
    assert load(tmp_path / LAST).best_val_loss == 1.5


def test_a_resumed_run_remembers_its_best(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    out_dir = run(config)
    best = load(out_dir / BEST)
    monkeypatch.setattr(Trainer, "evaluate", lambda _: best.val_loss + 0.5)
    run(replace(config, resume=True, max_steps=9))
    assert load(out_dir / LAST).step == 9
    assert load(out_dir / LAST).best_val_loss == best.val_loss
    assert load(out_dir / BEST).step == best.step == 6


def test_killed_between_two_saves_the_best_is_not_lost(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last and best are two files: whichever was written when the kill came, the resumed run ends with both right."""
    whole = record(run(replace(config, out_dir=Path("whole"))))
    save, saved = checkpoint.save, []

    def killed(path: Path, state: Any) -> None:
        if len(saved) == 3:  # two at step 3; of those at step 6 the first is written
            raise KeyboardInterrupt
        save(path, state)
        saved.append(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", killed)
        run(config)
    out_dir = run(replace(config, resume=True))
    assert load(out_dir / BEST).val_loss == min(row["val_loss"] for row in whole["metrics"] if row["val_loss"])
    assert record(out_dir) == whole


def test_the_default_text_is_fetched_by_name(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetched(source: str, folder: Path) -> corpus.Corpus:
        asked.append((source, folder))
        return corpus.read_text(Path("verse.txt"))

    monkeypatch.setattr(start, "load_corpus", fetched)
    run(replace(config, data=None, source="complete"))
    assert asked == [("complete", Path("data"))]


def test_a_step_that_is_skipped_names_the_op_that_made_it_so() -> None:
    """The step is made once more, each number looked at; the weights stay as they were."""
    made = trainer(max_skipped=3)
    made.model.h[1].mlp.c_fc.weight.data[...] = 3e38
    before = made.model.state_dict()
    sentence = r"linear at .*model.py:\d+ in h.1.mlp.c_fc: the result float32\[1, 8, 64\] has \d+ of 512 not finite"
    with np.errstate(all="ignore"):
        first, second = made.train_step(1e-3), made.train_step(1e-3)
        assert not np.isfinite(first.loss) and re.match(sentence, first.anomaly) and second.anomaly == ""
        with pytest.raises(FloatingPointError, match=f"3 steps in a row; .* What was not finite first: {sentence}"):
            made.train_step(1e-3)
    assert all(np.array_equal(w, before[name]) for name, w in made.model.state_dict().items())
