"""Checkpoints: what was saved comes back, and nothing else is taken for one."""

import json
import os
import pickle
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open
from safetensors.numpy import save_file

from minigpt import checkpoint
from minigpt.checkpoint import BEST, LAST, PREVIOUS, CheckpointError, load, load_run
from minigpt.folder import newest
from minigpt.trainer import Trainer
from tests.minigpt.small import refusal, trainer


@pytest.fixture(name="trained")
def a_trainer_with_three_steps(tmp_path: Path) -> Trainer:
    made = trainer(tmp_path, dropout=0.1, bias=True)
    for made.step in range(3):
        made.train_step(1e-2)
    made.step, made.tokens, made.seconds, made.val_loss = 3, 144, 1.25, 2.5
    made.save()
    return made


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, dtypes and types included."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_a_checkpoint_comes_back_bit_for_bit(trained: Trainer) -> None:
    saved = load(trained.out_dir / LAST)
    assert same(trained.model.state_dict(), saved.model)
    ours = trained.optimizer.state_dict()
    assert set(ours) == set(saved.optimizer) == {"steps", "param_groups", "exp_avg", "exp_avg_sq"}
    assert all(same(ours[name], saved.optimizer[name]) for name in ours)
    assert any(a.any() for a in saved.optimizer["exp_avg"])
    assert saved.config == trained.config
    assert saved.tokenizer.to_dict() == trained.tokenizer.to_dict()
    assert (saved.step, saved.tokens, saved.seconds, saved.val_loss, saved.best_val_loss) == (3, 144, 1.25, 2.5, 2.5)
    assert saved.text_sha256 == trained.corpus.sha256


def test_the_model_of_a_checkpoint_is_the_one_saved_and_does_not_drop(trained: Trainer) -> None:
    model = load(trained.out_dir / LAST).build_model()
    x, y = trained.data.batch(0, 0, 0, 4)
    assert not model.training
    assert model(x, y)[1].item() == trained.model.eval()(x, y)[1].item()


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_others_may_read_what_the_user_lets_them(tmp_path: Path, trained: Trainer, umask: int) -> None:
    before = os.umask(umask)
    try:
        checkpoint.save(tmp_path / LAST, load(trained.out_dir / LAST))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / LAST).stat().st_mode) == 0o666 & ~umask


def test_float64_weights_survive(tmp_path: Path, trained: Trainer) -> None:
    saved = load(trained.out_dir / LAST)
    saved.model = {name: a.astype(np.float64) / 3 for name, a in saved.model.items()}
    checkpoint.save(tmp_path / "double", saved)
    assert same(load(tmp_path / "double").model, saved.model)


def test_numbers_that_are_not_finite_survive(tmp_path: Path, trained: Trainer) -> None:
    saved = load(trained.out_dir / LAST)
    saved.val_loss, saved.best_val_loss = float("nan"), float("inf")
    checkpoint.save(tmp_path / "diverged", saved)
    again = load(tmp_path / "diverged")
    assert np.isnan(again.val_loss)
    assert again.best_val_loss == float("inf")


def test_loading_knows_no_pickle(tmp_path: Path, trained: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(np, "load", forbidden)
    load(trained.out_dir / LAST)

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    monkeypatch.undo()
    (tmp_path / "trap").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="trap cannot be read as a checkpoint"):
        load(tmp_path / "trap")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("where", ["before the first byte", "half-way", "before the rename"])
def test_a_failure_while_writing_leaves_the_old_file(trained: Trainer, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    before = {p.name: p.read_bytes() for p in trained.out_dir.iterdir()}

    def no_space(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
        if where == "half-way":
            Path(path).write_bytes(safetensors.numpy.save(tensors, metadata)[:1000])
        raise OSError(28, "No space left on device")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    if where == "before the rename":
        monkeypatch.setattr(os, "replace", killed)
    else:
        monkeypatch.setattr(safetensors.numpy, "save_file", no_space)
    trained.train_step(1e-2)
    trained.val_loss = 1.0
    with pytest.raises((OSError, KeyboardInterrupt)):
        trained.save()
    assert {p.name: p.read_bytes() for p in trained.out_dir.iterdir()} == before
    monkeypatch.undo()
    trained.save()
    assert load(trained.out_dir / LAST).val_loss == 1.0


def test_the_file_is_on_disk_before_it_has_its_name(trained: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    checkpoint.save(trained.out_dir / "x", load(trained.out_dir / LAST))
    assert order == ["sync", "rename", "sync"]  # the file, its name, the folder that holds the name


def test_a_file_cut_short_anywhere_is_refused_by_name(trained: Trainer, tmp_path: Path) -> None:
    whole = (trained.out_dir / LAST).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in (0, 1, 7, 8, 100, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        path = tmp_path / f"cut-{size}"
        path.write_bytes(whole[:size])
        assert "cannot be read as a checkpoint" in refusal(path)


@pytest.mark.parametrize(
    "content", [b"ANNA:\nThe kettle sings.\n" * 50, b"\x00" * 4096, b"\xff" * 4096, b"PK\x03\x04" + b"x" * 99, b"{}"]
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    assert "cannot be read as a checkpoint" in refusal(tmp_path / "other")


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    refusal(tmp_path / "none")
    refusal(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_weights_of_another_program_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"w": np.zeros(3)}, tmp_path / "foreign", metadata=metadata)
    assert "is a safetensors file, but not a checkpoint of minigpt" in refusal(tmp_path / "foreign")


def edited(path: Path, change: Any) -> Path:
    """The checkpoint beside `path` whose JSON, or whose tensors, `change` has changed."""
    with safe_open(path, framework="numpy") as file:
        state = json.loads(file.metadata()["minigpt"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    text = change(state, tensors)
    target = path.with_name("edited")
    text = json.dumps(state) if text is None else text
    save_file(tensors, target, metadata={"minigpt": text, "sha256": checkpoint._seal(text, tensors)})
    return target


def test_a_newer_schema_is_refused(trained: Trainer) -> None:
    path = edited(trained.out_dir / LAST, lambda state, _: state.update(schema=3))
    assert refusal(path) == f"{path} has schema 3, this program reads 2; update the program"
    path = edited(trained.out_dir / LAST, lambda state, _: state.update(schema=1))
    assert refusal(path) == f"{path} has schema 1, this program reads 2; load it with the version that wrote it"


@pytest.mark.parametrize(
    "change",
    [
        lambda state, tensors: "not JSON",
        lambda state, tensors: "[1, 2]",
        lambda state, tensors: "7",
        lambda state, tensors: "{}",
        lambda state, tensors: state.pop("schema") and None,
        lambda state, tensors: state.update(schema="new"),
        lambda state, tensors: state.pop("config") and None,
        lambda state, tensors: state["config"].update(n_heads=3),
        lambda state, tensors: state["config"].update(n_head=0),
        lambda state, tensors: state["config"].update(n_head=None),
        lambda state, tensors: state.update(tokenizer={"kind": "word"}),
        lambda state, tensors: state.update(tokenizer=[]),
        lambda state, tensors: state.pop("step") and None,
        lambda state, tensors: state["optimizer"].pop("steps") and None,
        lambda state, tensors: tensors.pop("optimizer.exp_avg.3") is None,
    ],
)
def test_a_damaged_description_is_refused_by_name(trained: Trainer, change: Any) -> None:
    def changed(state: dict[str, Any], tensors: dict[str, np.ndarray]) -> str | None:
        text = change(state, tensors)
        return text if isinstance(text, str) else None

    refusal(edited(trained.out_dir / LAST, changed))


def test_a_checkpoint_without_a_weight_cannot_speak(trained: Trainer) -> None:
    path = edited(trained.out_dir / LAST, lambda _, tensors: tensors.pop("model.h.0.attn.c_proj.weight") is None or None)
    with pytest.raises(ValueError, match=r"missing h\.0\.attn\.c_proj\.weight \(16, 16\)"):
        load(path).build_model()


def test_a_run_speaks_from_its_best_and_a_file_from_itself(trained: Trainer, tmp_path: Path) -> None:
    trained.train_step(1e-2)
    trained.step, trained.val_loss = 4, 9.0
    trained.save()
    assert load_run(tmp_path).step == 3
    assert load_run(tmp_path / LAST).step == 4
    (tmp_path / BEST).unlink()
    assert load_run(tmp_path).step == 4
    (tmp_path / LAST).unlink()
    assert load_run(tmp_path).step == 3
    (tmp_path / PREVIOUS).unlink()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint \(last\.safetensors, "):
        load_run(tmp_path)


def test_the_newest_run_is_the_one_saved_last(tmp_path: Path) -> None:
    for age, name in enumerate(("b", "c", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / LAST).touch()
        os.utime(tmp_path / name / LAST, (1e9 - age, 1e9 - age))
    (tmp_path / "z").mkdir()  # made last, but nothing was ever saved in it
    (tmp_path / LAST).touch()
    assert newest(root=tmp_path) == tmp_path / "b"
    os.utime(tmp_path / "a" / LAST, (2e9, 2e9))
    assert newest(root=tmp_path) == tmp_path / "a"


def test_without_runs_the_message_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run with a checkpoint below .*/; train one with: python scripts/train\.py"):
        newest(root=tmp_path)
    with pytest.raises(CheckpointError, match="no run with a checkpoint"):
        newest(root=tmp_path / "none")
