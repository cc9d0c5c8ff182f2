"""What can happen to a run, done to it: kills, signals, flipped bits, full disks, nonsense. The runs are real processes."""

import errno
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from minigpt import checkpoint, cli
from minigpt.checkpoint import BEST, KEPT, LAST, PREVIOUS, Checkpoint, load, load_newest
from minigpt.folder import LOCK, METRICS, RECORD
from minigpt.tokenizer import CharTokenizer
from minigpt.tracking import read_metrics
from tests.minigpt.forked import (
    HERE,
    LONG,
    RESUME,
    SIZES,
    SMALL,
    Process,
    Server,
    Start,
    contents,
    die_before_naming,
    die_in,
    die_while_saving,
    fill,
    fill_disk,
    finish,
    get_signals_in,
    get_signals_in_making,
    get_signals_while_saving,
    hang_in,
    keep_every_save,
    limit_files,
    limit_memory,
    list_operations,
    pause_in_making,
    record,
    run_json,
    sentence,
    show_run_json_slowly,
    state,
    temporary,
)
from tests.minigpt.program import printed
from tests.minigpt.small import TINY, refusal, verse

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and mounts are Linux's")

SIGNALS = ["SIGINT", "SIGTERM"]


@pytest.fixture(name="server", scope="module")
def the_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(name="start_in", scope="module")
def start_in_a_folder(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Start:
    def start_in(home: Path, args: list[str], *faults: tuple[Any, ...], program: str = "train") -> Process:
        told = tmp_path_factory.mktemp("told")
        named = [[fault.__name__, *rest] for fault, *rest in faults]
        return Process(server, server.ask(home=str(home), args=args, faults=named, program=program, told=str(told)), told)

    return start_in


@pytest.fixture(name="home")
def folder_with_a_text(tmp_path: Path) -> Path:
    (tmp_path / "verse.txt").write_text(verse(), encoding="utf-8")
    return tmp_path


@pytest.fixture(name="start")
def start_at_home(start_in: Start, home: Path) -> Start:
    def start(args: list[str], *faults: tuple[Any, ...], program: str = "train") -> Process:
        return start_in(home, args, *faults, program=program)

    return start


@pytest.fixture(name="left_alone", scope="module")
def a_run_left_alone(start_in: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SMALL, and a copy of its last checkpoint from every save."""
    home = tmp_path_factory.mktemp("home")
    (home / "verse.txt").write_text(verse(), encoding="utf-8")
    finish(start_in(home, [*SMALL, *HERE], (keep_every_save,)))
    return home / "run"


@pytest.fixture(name="whole", scope="module")
def record_of_the_run_left_alone(left_alone: Path) -> dict[str, Any]:
    whole = record(left_alone)
    assert [row["step"] for row in whole["metrics"]] == list(range(1, 10))
    return whole


@pytest.fixture(name="killed", scope="module")
def a_run_killed(start_in: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last checkpoint is of step 6, as the best is, and whose previous one is of step 4."""
    home = tmp_path_factory.mktemp("home")
    (home / "verse.txt").write_text(verse(), encoding="utf-8")
    finish(start_in(home, [*SMALL, *HERE, "--save-interval", "4"], (die_in, "train_step", 7)), -signal.SIGKILL)
    assert [load(home / "run" / name).step for name in (LAST, PREVIOUS, BEST)] == [6, 4, 6]
    return home / "run"


# Kills

SAVING = ["save_file", "fsync", "replace", "fsync", "save_file", "fsync", "replace", "replace", "fsync"]  # the best, the last
MOMENTS = [*((i, "before") for i in range(len(SAVING))), (0, "amid"), (4, "amid"), (8, "after")]  # after one is before the next


def test_the_kills_below_are_at_every_operation_of_a_save(start: Start) -> None:
    process = finish(start([*SMALL, *HERE], (list_operations, 6)))
    assert re.findall("disk: (.*)", process.out) == SAVING


@pytest.mark.parametrize(("point", "when"), MOMENTS, ids=[f"{when} {i} {SAVING[i]}" for i, when in MOMENTS])
def test_killed_at_any_point_of_a_save_the_old_checkpoint_or_the_new_one_is_whole(
    start: Start, home: Path, left_alone: Path, whole: dict[str, Any], point: int, when: str
) -> None:
    finish(start([*SMALL, *HERE], (die_while_saving, 6, point, when)), -signal.SIGKILL)
    newest = load_newest(home / "run")
    assert newest.step in (3, 6)
    assert state(newest) == state(load(left_alone / f"step-{newest.step}"))
    assert not finish(start(RESUME)).err
    assert record(home / "run") == whole
    assert not temporary(home)


@pytest.mark.parametrize(("point", "when"), [(0, "before"), (0, "amid"), (2, "before"), (2, "after"), (3, "after")])
def test_killed_in_its_first_save_a_run_starts_anew_or_goes_on(
    start: Start, home: Path, whole: dict[str, Any], point: int, when: str
) -> None:
    finish(start([*SMALL, *HERE], (die_while_saving, 0, point, when)), -signal.SIGKILL)
    begun = when == "after"
    if begun:
        assert "continue it with --resume" in sentence(start([*SMALL, *HERE]))
    else:
        assert "leave out --resume to start a run there" in sentence(start(RESUME))
    finish(start(RESUME if begun else [*SMALL, *HERE]))
    assert record(home / "run") == whole
    assert not temporary(home)


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_a_run_ends_the_same_with_any_save_interval(
    start: Start, home: Path, long: dict[str, Any], seed: int
) -> None:
    rng = random.Random(seed)
    process, kills = start([*LONG, *HERE]), 0
    process.wait_for(home / "run" / LAST)  # before that there is nothing to go on with
    while kills < 6:
        time.sleep(rng.uniform(0, 0.3) if kills else 0.01)
        if process.status() is None:
            process.send("SIGKILL")
        if process.wait() != -signal.SIGKILL:
            break
        kills += 1
        process = start([*RESUME, "--save-interval", rng.choice("1347")])
    finish(process)
    assert kills
    assert record(home / "run") == long
    assert not temporary(home)


@pytest.fixture(name="long", scope="module")
def record_of_a_longer_run(start_in: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    (home / "verse.txt").write_text(verse(), encoding="utf-8")
    finish(start_in(home, [*LONG, *HERE]))
    long = record(home / "run")
    assert [row["step"] for row in long["metrics"]] == list(range(1, 41))
    return long


@pytest.mark.parametrize("name", [METRICS, RECORD])
def test_killed_while_a_record_is_replaced_a_run_has_the_old_one(
    start: Start, killed: Path, home: Path, whole: dict[str, Any], name: str
) -> None:
    shutil.copytree(killed, home / "run")
    before = contents(home / "run")[name]
    finish(start(RESUME, (die_before_naming, name)), -signal.SIGKILL)
    assert contents(home / "run")[name] == before
    assert temporary(home)
    finish(start(RESUME))
    assert record(home / "run") == whole
    assert not temporary(home)


# Damaged files


@pytest.fixture(name="short", scope="module")
def a_checkpoint_of_few_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("short") / LAST
    checkpoint.save(path, hand_made(np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)))
    load(path)
    return path


def hand_made(weight: np.ndarray) -> Checkpoint:
    """A checkpoint of one matrix."""
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "params": [0]}
    optimizer = {"steps": [3], "param_groups": [group], "exp_avg": [weight / 2], "exp_avg_sq": [weight**2]}
    numbers = {"step": 3, "tokens": 9, "seconds": 1.5, "val_loss": 2.5, "best_val_loss": 2.5, "skipped": 0}
    return Checkpoint(
        TINY, CharTokenizer("\nabé"), {"w": weight}, optimizer, **numbers, skipped_in_a_row=0, text_sha256="0" * 64
    )


def test_a_flipped_bit_anywhere_is_refused_by_name(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("eval", "exec"):
        monkeypatch.setattr(f"builtins.{name}", lambda *_, **__: pytest.fail("something was executed"))
    whole, path = short.read_bytes(), tmp_path / "flipped"
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(0)
    one_a_byte = [(i, rng.randrange(8)) for i in range(len(whole))]
    every = [(i, bit) for i in (*range(8), *rng.sample(range(8, header), 40), header, len(whole) - 1) for bit in range(8)]
    for i, bit in one_a_byte + every:
        damaged = bytearray(whole)
        damaged[i] ^= 1 << bit
        path.write_bytes(damaged)
        refusal(path)


@pytest.mark.parametrize("length", [0, 1, 2, 8, 10**8, 10**8 + 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
def test_a_header_of_any_length_is_refused_by_name(short: Path, tmp_path: Path, length: int) -> None:
    whole, path = short.read_bytes(), tmp_path / "lengthy"
    path.write_bytes(struct.pack("<Q", length) + whole[8:])
    refusal(path)
    os.truncate(path, 2 * 10**8)  # so that the header would have room
    refusal(path)


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, '{"schema": ' + "9" * 5000 + "}", '{"schema": 2, "config": ' + "[" * 10**5 + "]" * 10**5 + "}", "\ud800"],
    ids=["deep", "a number of 5000 digits", "deep within", "half a pair"],
)
def test_a_description_made_to_break_the_reader_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path, tensors = tmp_path / "made", {"model.w": np.zeros(3)}
    seal = checkpoint._seal(text, tensors) if text.isascii() else "0"
    header = {
        "__metadata__": {"minigpt": text, "sha256": seal},
        "model.w": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]},
    }
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(24))
    refusal(path)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2"])
def test_numbers_that_numpy_does_not_know_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    path, size = tmp_path / "foreign", 2 if dtype == "BF16" else 1
    header = {
        "__metadata__": {"minigpt": json.dumps({"schema": checkpoint.SCHEMA}), "sha256": "0"},
        "w": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * size]},
    }
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(4 * size))
    refusal(path)


def damage(path: Path, how: str = "flip") -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[-5] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-9], "empty": b"", "zeros": bytes(len(data))}[how])


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "zeros"])
@pytest.mark.parametrize(
    ("damaged", "missing", "step", "told"),
    [
        ([LAST], [], 6, [(LAST, BEST)]),
        ([LAST], [BEST], 4, [(LAST, PREVIOUS)]),
        ([LAST, PREVIOUS], [], 6, [(LAST, BEST)]),
        ([LAST, BEST], [], 4, {"flip": [(LAST, BEST), (BEST, PREVIOUS)], "else": [(LAST, PREVIOUS)]}),
        ([BEST], [LAST], 4, {"flip": [(BEST, PREVIOUS)], "else": []}),  # a file that tells no step is the last to be tried
        ([BEST, PREVIOUS], [], 6, []),
    ],
)
def test_the_newest_whole_checkpoint_is_used_and_newer_damaged_ones_are_named(
    killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, damaged: Any, missing: Any, step: int, told: Any
) -> None:
    out_dir = shutil.copytree(killed, tmp_path / "run")
    for name in damaged:
        damage(out_dir / name, how)
    for name in missing:
        (out_dir / name).unlink()
    assert load_newest(out_dir).step == step
    expected = told if isinstance(told, list) else told.get(how, told["else"])
    assert [tuple(re.findall(r"(\w+\.safetensors) .*; trying (\w+\.safetensors)$", m)[0]) for m in caplog.messages] == expected
    assert all(message.startswith(f"warning: {out_dir}/") for message in caplog.messages)


@pytest.mark.parametrize("names", [[LAST], [LAST, BEST]])
def test_with_the_last_checkpoint_damaged_a_run_goes_on_from_an_older_one_to_the_same_end(
    start: Start, killed: Path, home: Path, whole: dict[str, Any], names: list[str]
) -> None:
    shutil.copytree(killed, home / "run")
    for name in names:
        damage(home / "run" / name)
    process = finish(start(RESUME))
    assert [re.findall(r"\w+\.safetensors", line) for line in process.err.splitlines()] == [
        [LAST, BEST],
        *([[BEST, PREVIOUS]] if BEST in names else []),
    ]
    assert all(line.startswith("warning: ") for line in process.err.splitlines())
    assert record(home / "run") == whole


def test_with_every_checkpoint_damaged_there_is_one_error_and_nothing_is_touched(
    start: Start, killed: Path, home: Path
) -> None:
    shutil.copytree(killed, home / "run")
    for name in KEPT:
        damage(home / "run" / name)
    before = contents(home)
    process = finish(start(RESUME), 1)
    *warnings, error = process.err.splitlines()
    assert [re.findall(r"\w+\.safetensors", line) for line in warnings] == [[LAST, BEST], [BEST, PREVIOUS]]
    assert re.match(r"error: .*run/previous\.safetensors is damaged", error)
    assert contents(home) == before


@pytest.mark.parametrize("point", range(4))
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_damaged_last_checkpoint_never_costs_the_whole_one_before_it(
    start: Start, killed: Path, home: Path, point: int, when: str
) -> None:
    """A run that goes on from `previous` is killed in its next save: there is a whole checkpoint at any moment."""
    shutil.copytree(killed, home / "run")
    damage(home / "run" / LAST)
    (home / "run" / BEST).unlink()
    finish(start([*RESUME, "--eval-interval", "100", "--save-interval", "1"], (die_while_saving, 5, point, when)), -9)
    assert load_newest(home / "run").step in (4, 5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells no sizes of processes")
def test_loading_needs_little_more_memory_than_the_file(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).random((3, 3000, 1000), dtype=np.float32)
    saved = hand_made(weights[0])
    saved.model = {str(i): w for i, w in enumerate(weights)}
    saved.optimizer |= {"steps": [3] * 3, "exp_avg": list(weights), "exp_avg_sq": list(weights)}
    checkpoint.save(tmp_path / "large", saved)
    code = """
import re, sys
from pathlib import Path
import safetensors
from minigpt import checkpoint
def size(name): return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = size("VmRSS")
kept = checkpoint.load(Path(sys.argv[1]))
print(size("VmHWM") - before)
"""
    grown = int(printed(code, str(tmp_path / "large")))
    size = (tmp_path / "large").stat().st_size
    (tmp_path / "large").unlink()
    assert size > 10**8
    assert 0.9 * size < grown < 1.3 * size


# Full disks, and folders that cannot be written to


@pytest.fixture(name="disk")
def a_small_disk(home: Path) -> Iterator[Path]:
    """A disk of 400 KB, mounted where the run's folder will be."""
    (home / "run").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(home / "run")], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount")
    yield home / "run"
    subprocess.run(["umount", "-l", str(home / "run")], check=True)


def test_a_checkpoint_larger_than_files_may_be_leaves_the_old_one(
    start: Start, home: Path, left_alone: Path, whole: dict[str, Any]
) -> None:
    told = sentence(start([*SMALL, *HERE], (limit_files, 8000, "sample", 6)))
    assert re.match(r"run/best\.safetensors could not be written \(.*File too large", told)
    assert "--resume" in told
    assert not temporary(home)
    for name in (LAST, BEST):
        assert state(load(home / "run" / name)) == state(load(left_alone / "step-3"))
    assert run_json(home / "run")["status"].startswith("failed: run/best.safetensors could not be written")
    finish(start(RESUME))
    assert record(home / "run") == whole


def test_a_full_disk_leaves_the_old_checkpoint(start: Start, disk: Path, left_alone: Path, whole: dict[str, Any]) -> None:
    told = sentence(start([*SMALL, *HERE], (fill_disk, "run/filler", "save", 6)))
    for name in (LAST, BEST):
        assert state(load(disk / name)) == state(load(left_alone / "step-3"))
    left = temporary(disk)
    (disk / "filler").unlink()
    finish(start(RESUME))
    assert record(disk) == whole
    assert not left
    assert re.match(r"run/best\.safetensors could not be written \(.*No space left", told)


@pytest.mark.parametrize(("method", "step"), [("train_step", 1), ("sample", 3), ("sample", 6), ("save", 9)])
def test_wherever_a_disk_fills_up_the_run_ends_in_a_sentence_that_names_a_file(
    start: Start, disk: Path, whole: dict[str, Any], method: str, step: int
) -> None:
    told = sentence(start([*SMALL, *HERE], (fill_disk, "run/filler", method, step)))
    assert "No space left" in told
    left = temporary(disk)
    (disk / "filler").unlink()
    finish(start(RESUME))
    assert record(disk) == whole
    assert not left
    assert re.search(r"run/\S+", told), told


def test_on_a_disk_full_from_the_start_no_run_begins(start: Start, disk: Path) -> None:
    fill(disk / "filler")
    before = contents(disk)
    told = sentence(start([*SMALL, *HERE]))
    assert re.match(r"cannot write to run\b.*No space left.*; choose another folder with --out-dir", told)
    assert contents(disk) == before | {LOCK: b""} or contents(disk) == before


def test_on_a_disk_full_when_a_run_goes_on_nothing_is_touched(
    start: Start, disk: Path, killed: Path, whole: dict[str, Any]
) -> None:
    shutil.copytree(killed, disk, dirs_exist_ok=True)
    fill(disk / "filler")
    before = contents(disk)
    told = sentence(start(RESUME))
    after = contents(disk)
    (disk / "filler").unlink()
    finish(start(RESUME))
    assert record(disk) == whole
    assert after | {LOCK: b""} == before | {LOCK: b""}
    assert re.search(r"\brun\b.*No space left", told), told


def test_a_first_checkpoint_that_cannot_be_written_promises_no_older_one(start: Start, home: Path) -> None:
    told = sentence(start([*SMALL, *HERE], (limit_files, 8000, "save", 0)))
    assert re.match(r"run/last\.safetensors could not be written \(.*File too large", told)
    assert "--resume" not in told
    finish(start([*SMALL, *HERE]))


def test_metrics_larger_than_files_may_be_end_the_run_in_a_sentence_that_names_them(
    start: Start, home: Path, long: dict[str, Any]
) -> None:
    told = sentence(start([*LONG, *HERE], (limit_files, 5000, "train_step", 29)))
    assert run_json(home / "run")["status"] == f"failed: {told}"
    assert not temporary(home)
    finish(start(RESUME))
    assert record(home / "run") == long
    assert re.search(r"run/metrics\.jsonl.*File too large", told), told


def test_what_cannot_be_written_to_is_refused_before_the_first_step(start: Start, home: Path) -> None:
    (home / "file").touch()
    (home / "taken" / LOCK).mkdir(parents=True)
    before = contents(home)
    for name in ("file", "file/below", "taken"):
        told = sentence(start([*SMALL, "--out-dir", name]))
        assert re.match(rf"cannot write to {name}: [A-Z][a-z ]+; choose another folder with --out-dir$", told)
    assert contents(home) == before


def test_a_disk_that_may_only_be_read_is_refused_before_the_first_step(start: Start, disk: Path, killed: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for place in ("run", "run/below"):
        told = sentence(start([*SMALL, "--out-dir", place]))
        assert told == f"cannot write to {place}: {os.strerror(errno.EROFS)}; choose another folder with --out-dir"
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    shutil.copytree(killed, disk, dirs_exist_ok=True)
    before = contents(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert "cannot write to run: " in sentence(start(RESUME))
    assert contents(disk) == before


# Two runs in one folder


def test_a_folder_in_use_is_refused_with_the_process_that_uses_it(start: Start, home: Path, whole: dict[str, Any]) -> None:
    first = start([*SMALL, *HERE], (hang_in, "train_step", 4))
    first.wait_for(home / "hangs")
    before = contents(home)
    told = sentence(start(RESUME))
    assert told == f"run is in use by the run of process {first.pid}; stop it, or choose another --out-dir"
    assert "already holds a run" in sentence(start([*SMALL, *HERE]))
    assert contents(home) == before
    first.send("SIGKILL")
    finish(first, -signal.SIGKILL)
    finish(start(RESUME))
    assert record(home / "run") == whole


def test_a_folder_in_use_is_refused_before_there_is_a_checkpoint_in_it(start: Start, home: Path) -> None:
    first = start([*SMALL, *HERE], (hang_in, "save", 0))
    first.wait_for(home / "hangs")
    before = contents(home)
    told = sentence(start([*SMALL, *HERE]))
    assert told == f"run is in use by the run of process {first.pid}; stop it, or choose another --out-dir"
    assert contents(home) == before
    first.send("SIGKILL")
    finish(first, -signal.SIGKILL)
    finish(start([*SMALL, *HERE]))


def test_a_run_slow_to_start_does_not_write_over_one_that_took_its_folder(
    start: Start, home: Path, whole: dict[str, Any]
) -> None:
    slow = start([*SMALL, *HERE], (pause_in_making,))
    slow.wait_for(home / "paused")
    finish(start([*SMALL, *HERE]))
    slow.send("SIGCONT")
    assert slow.wait() == 1
    assert "run was written to by another run while this one was starting" in slow.err
    assert record(home / "run") == whole


def test_a_run_slow_to_resume_does_not_take_back_what_another_has_added(start: Start, killed: Path, home: Path) -> None:
    shutil.copytree(killed, home / "run")
    slow = start(RESUME, (pause_in_making,))
    slow.wait_for(home / "paused")
    finish(start([*RESUME, "--max-steps", "12"]))
    slow.send("SIGCONT")
    slow.wait()
    assert load(home / "run" / LAST).step == 12


# Signals


def stopped(process: Process, name: str, step: int, folder: Path) -> None:
    """The process ended as one does that was asked to."""
    finish(process, cli.STOPPED)
    assert process.err == ""
    *_, said, how = process.out.splitlines()
    assert said == f"stopped by {name} after step {step}, which is saved in {folder.name}"
    assert shlex.split(how.removeprefix("to go on: ")) == ["python", "scripts/train.py", *RESUME]
    assert load(folder / LAST).step == step == len(read_metrics(folder / METRICS))
    assert run_json(folder)["status"] == f"stopped by {name}"
    assert not temporary(folder)


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize(
    ("after", "fault"),
    [
        (1, (get_signals_in, "train", 0)),
        (1, (get_signals_in, "save", 0)),
        (5, (get_signals_in, "train_step", 4)),
        (8, (get_signals_in, "shard_loss", 7)),
        (3, (get_signals_in, "evaluate", 3)),
        (6, (get_signals_in, "sample", 6)),
        (6, (get_signals_in, "save", 6)),
        (3, (get_signals_while_saving, 3)),
    ],
)
def test_a_signal_ends_a_run_after_the_step_it_is_in_and_it_goes_on_bit_for_bit(
    start: Start, home: Path, whole: dict[str, Any], name: str, after: int, fault: tuple[Any, ...]
) -> None:
    process = start([*SMALL, *HERE, "--threads", "2"], (*fault, name))
    stopped(process, name, after, home / "run")
    finish(start(RESUME))
    assert record(home / "run") == whole
    assert run_json(home / "run")["status"] == "complete"


@pytest.mark.parametrize(
    ("name", "method", "step"),
    [("SIGINT", "train_step", 8), ("SIGTERM", "evaluate", 9), ("SIGINT", "sample", 9), ("SIGTERM", "save", 9)],
)
def test_a_signal_in_the_last_step_finds_a_complete_run(
    start: Start, home: Path, whole: dict[str, Any], name: str, method: str, step: int
) -> None:
    assert not finish(start([*SMALL, *HERE], (get_signals_in, method, step, name))).err
    assert record(home / "run") == whole
    assert run_json(home / "run")["status"] == "complete"


@pytest.mark.parametrize("seed", range(2))
def test_signals_at_random_moments_stop_a_run_that_goes_on_to_the_same_end(
    start: Start, home: Path, long: dict[str, Any], seed: int
) -> None:
    rng = random.Random(seed)
    process = start([*LONG, *HERE])
    for _ in range(4):
        process.wait_for(home / "run" / RECORD)  # before that a signal kills it
        time.sleep(rng.uniform(0, 0.2))
        if process.status() is None:
            process.send(rng.choice(SIGNALS))
        if process.wait() != cli.STOPPED:
            break
        step = load(home / "run" / LAST).step
        assert f"after step {step}, which is saved in run" in process.out
        assert [row["step"] for row in read_metrics(home / "run" / METRICS)] == list(range(1, step + 1))
        process = start([*RESUME, "--save-interval", rng.choice("1347")])
    if process.wait() == cli.STOPPED:
        process = start(RESUME)
    process.wait()  # a signal may have come when all was done
    assert record(home / "run") == long


@pytest.mark.parametrize(
    ("method", "step", "first", "second"),
    [
        ("train_step", 5, "SIGINT", "SIGINT"),
        ("evaluate", 6, "SIGINT", "SIGTERM"),
        ("sample", 6, "SIGTERM", "SIGINT"),
        ("save", 6, "SIGTERM", "SIGTERM"),
    ],
)
def test_a_second_signal_ends_a_run_at_once_with_its_own_status(
    start: Start, home: Path, whole: dict[str, Any], method: str, step: int, first: str, second: str
) -> None:
    process = start([*SMALL, *HERE], (hang_in, method, step, first))
    process.wait_for(home / "hangs")
    assert process.status() is None
    process.send(second)
    assert process.wait(5) == -signal.Signals[second]
    assert load_newest(home / "run").step == 3
    finish(start(RESUME))
    assert record(home / "run") == whole


@pytest.mark.parametrize("name", SIGNALS)
def test_a_second_signal_in_the_middle_of_writing_a_checkpoint_loses_nothing(
    start: Start, home: Path, whole: dict[str, Any], name: str
) -> None:
    finish(start([*SMALL, *HERE], (get_signals_while_saving, 6, name, name)), -signal.Signals[name])
    assert load_newest(home / "run").step == 3
    finish(start(RESUME))
    assert record(home / "run") == whole
    assert not temporary(home)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_before_a_run_has_begun_leaves_nothing(start: Start, home: Path, name: str) -> None:
    before = contents(home)
    process = start([*SMALL, *HERE], (get_signals_in_making, name))
    if name == "SIGINT":
        assert finish(process, 1).err == "interrupted before the first step\n"
    else:
        assert finish(process, -signal.SIGTERM).err == ""
    assert contents(home) == before
    assert not (home / "run").exists()


@pytest.mark.parametrize("flags", [[], ["--out-dir", "runs/mine"], ["--out-dir", "a b"], ["--out-dir", "a$1"]], ids=" ".join)
def test_the_command_that_is_told_goes_on_with_the_run(
    start: Start, home: Path, whole: dict[str, Any], flags: list[str]
) -> None:
    process = finish(start([*SMALL, *flags], (get_signals_in, "train_step", 4, "SIGTERM")), cli.STOPPED)
    folder = home / re.search("which is saved in (.*)", process.out)[1]
    finish(start(words_of("to go on: python scripts/train.py (.*)", process)))
    assert record(folder) == whole


@pytest.mark.parametrize("symbol", ["'", '"', "$", "`", "\\", " ", "€"])
def test_the_command_for_more_verse_works_whatever_the_text_is_made_of(start: Start, home: Path, symbol: str) -> None:
    (home / "text.txt").write_text((symbol * 9 + "\n-") * 40, encoding="utf-8")
    process = finish(start([*SIZES, "--max-steps", "1", *HERE, "--data", "text.txt"]))
    words = words_of("more verse: python scripts/generate.py (.*)", process)
    assert words[:2] == ["--run", "run"]
    assert finish(start([*words, "--max-tokens", "3"], program="generate")).out.startswith((symbol, "-"))


def words_of(pattern: str, process: Process) -> list[str]:
    """What a shell makes of a command that was told."""
    (told,) = re.findall(pattern, process.out)
    return subprocess.run(
        ["sh", "-c", f'printf "%s\\n" {told}'], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_the_command_that_is_told_goes_on_with_this_run_and_not_with_a_newer_one(
    start: Start, home: Path, whole: dict[str, Any]
) -> None:
    process = finish(start(SMALL, (get_signals_in, "train_step", 4, "SIGTERM")), cli.STOPPED)
    finish(start(SMALL))
    finish(start(words_of("to go on: python scripts/train.py (.*)", process)))
    assert record(home / "runs" / "quick") == whole


# Nonsense


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"text\.txt holds no text \(0 bytes\): name a UTF-8 text"),
        (b" \n\n", r"text\.txt holds no text \(3 bytes\): name a UTF-8 text"),
        (
            b"To be.\n",
            r"the text has 7 tokens: 6 to train on and 1 to validate on, but block_size=8 needs .*; use a longer text",
        ),
        (b"caf\xe9 noir " * 99, r"text\.txt is not UTF-8 \(byte 0xe9 at offset 3\): name a UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), r"text\.txt is not UTF-8 \(byte 0x89 at offset 0\): name a UTF-8 text"),
        (b"abc" + bytes(9), r"text\.txt is binary data \(byte 0x00 at offset 3\): name a UTF-8 text"),
    ],
    ids=["empty", "blank", "short", "Latin-1", "image", "zeros"],
)
def test_a_text_that_is_none_is_refused_with_place_and_remedy(start: Start, home: Path, data: bytes, message: str) -> None:
    (home / "text.txt").write_bytes(data)
    before = contents(home)
    assert re.match(message, sentence(start([*SMALL, "--data", "text.txt"])))
    assert contents(home) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n-embd", "10", "--n-head", "4"], "n_embd=10 is not divisible by n_head=4; use 8 or 12"),
        (["--n-embd", "-16"], "n_embd=-16 must be a whole number of at least 1"),
        (["--n-layer", "0"], "n_layer=0 must be a whole number of at least 1"),
        (["--max-steps", "-1"], "max_steps=-1 must be a whole number of at least 1"),
        (["--micro-batch", "0"], "micro_batch=0 must be a whole number of at least 1"),
        (["--max-skipped", "0"], "max_skipped=0 must be a whole number of at least 1"),
        (["--n-embd", "1000000"], "n_embd=1000000 make 1.2e+13 parameters; use smaller sizes"),
        (["--n-layer", "1000000000000"], "parameters; use smaller sizes"),
        (["--lr", "nan"], "lr=nan must be at least 0 and below 1e+35"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_settings_are_refused_with_value_and_remedy(
    start: Start, home: Path, flags: list[str], message: str
) -> None:
    before = contents(home)
    process = finish(start([*SMALL, *flags]), 2)
    told = " ".join(re.sub(r"[│╭╮╰╯─]", " ", process.out + process.err).split())
    assert message in told
    assert "Traceback" not in told
    assert contents(home) == before


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("block-size", 10**9),
        ("micro-batch", 10**12),
        ("accumulation", 10**12),
        ("seed", 10**40),
        ("threads", 10**9),
        ("shards", 10**9),
        ("eval-interval", 10**30),
    ],
)
def test_absurd_sizes_work_or_are_refused_in_one_sentence_that_names_them(
    start: Start, home: Path, flag: str, value: int
) -> None:
    process = start([*SMALL, *HERE, f"--{flag}", str(value)], (limit_memory, 4 * 2**30))
    if process.wait() != 0:
        told = process.out + process.err
        assert not re.search("Traceback|Exception|MemoryError", told), told
        assert re.search(rf"{flag.replace('-', '_')}\W{value}\b", told)
        assert not (home / "run").exists()


def test_a_model_larger_than_the_memory_is_refused_in_one_sentence(start: Start, home: Path) -> None:
    process = start([*SMALL, *HERE, "--n-embd", "40000"], (limit_memory, 4 * 2**30))
    assert re.search("memory|allocate", sentence(process))
    assert not (home / "run").exists()


def test_another_vocabulary_is_refused_with_the_remedy(start: Start, killed: Path, home: Path) -> None:
    shutil.copytree(killed, home / "run")
    (home / "other.txt").write_text(verse() + "ß", encoding="utf-8")
    before = contents(home)
    told = sentence(start([*RESUME, "--data", "other.txt"]))
    assert re.match(r"run was trained on another text than other\.txt .*; name its text with --data", told)
    told = sentence(start([*RESUME, "--tokenizer", "byte"]))
    assert re.match(r"run cannot go on with another model \(tokenizer char → byte\); drop those flags", told)
    (home / "verse.txt").write_text(verse() + "ß", encoding="utf-8")  # the text itself was edited
    assert "another text than verse.txt" in sentence(start(RESUME))
    (home / "verse.txt").write_text(verse(), encoding="utf-8")
    assert contents(home) == before


def test_without_a_gpu_cuda_is_refused_with_the_remedy(start: Start, killed: Path, home: Path) -> None:
    with suppress(RuntimeError):
        tt.backend.xp_for("cuda")
        pytest.skip("there is a GPU")
    shutil.copytree(killed, home / "mine")
    before = contents(home)
    for args in ([*SMALL, *HERE], ["quick", "--resume", "--out-dir", "mine"]):
        assert re.match(r'device "cuda" .*(pip install|use device "cpu")', sentence(start([*args, "--device", "cuda"])))
    assert contents(home) == before


def test_a_prompt_that_cannot_be_read_is_refused_with_character_and_place(start: Start, killed: Path, home: Path) -> None:
    before = contents(home)
    for prompt, message in (
        ("ANNA: 東", r"character '東' \(U\+6771\) at position 6 is not in the model's vocabulary of 44 symbols"),
        ("A\tB", r"character '\\t' \(U\+0009\) at position 1 is not in the model's vocabulary"),
        ("", "the prompt is empty; give at least one character"),
    ):
        process = start(["--run", str(killed), "--prompt", prompt], program="generate")
        assert re.match(message, sentence(process))
        assert process.out == ""
    assert contents(home) == before


def test_of_a_prompt_longer_than_the_context_the_end_counts_and_that_is_told(start: Start, killed: Path) -> None:
    long, end = "ANNA:\nThe kettle sings at noon", "s at noon"[-8:]
    told = []
    for prompt in (long, end):
        process = finish(start(["--run", str(killed), "--prompt", prompt, "--max-tokens", "20"], program="generate"))
        assert process.out.startswith(prompt)
        told.append((process.out.removeprefix(prompt), process.err))
    assert told[0][0] == told[1][0]
    assert told[1][1] == ""
    assert re.fullmatch(r"[^\n]*\b8\b[^\n]*\n", told[0][1])  # the length of the context


# run.json


FIELDS = {"id", "started", "status", "config", "parameters", "text", "ranks", "threads", "versions", "hardware", "commit"}
SUMMARY = {"step", "val_loss", "best_val_loss", "seconds", "skipped", "steps_timed", "seconds_by_phase", "peak_memory"}


def test_run_json_is_whole_at_any_moment(start: Start, home: Path) -> None:
    process = start([*SMALL, *HERE], (show_run_json_slowly,))
    path, seen = home / "run" / RECORD, []
    process.wait_for(path)
    while process.status() is None:
        told = run_json(home / "run")
        assert set(told) >= FIELDS
        if told["status"] not in seen:
            seen.append(told["status"])
    finish(process)
    assert seen[0] == "running"
    told = run_json(home / "run")
    assert told["status"] == "complete"
    assert set(told) == FIELDS | {"summary"}
    assert set(told["summary"]) == SUMMARY
    assert told["summary"]["step"] == told["summary"]["steps_timed"] == 9
    assert told["config"]["max_steps"] == 9
    assert told["parameters"] > 0
    assert re.fullmatch("[0-9a-f]{64}", told["text"]["sha256"])


def test_run_json_of_a_run_with_infinite_settings_is_strict_json(start: Start, home: Path) -> None:
    finish(start([*SMALL, *HERE, "--grad-clip", "inf"]))
    assert run_json(home / "run")["status"] == "complete"


def test_run_json_says_failed_stopped_and_complete_and_keeps_what_the_run_is(start: Start, home: Path) -> None:
    sentence(start([*SMALL, *HERE], (limit_files, 8000, "sample", 3)))
    failed = run_json(home / "run")
    finish(start(RESUME, (get_signals_in, "train_step", 4, "SIGINT")), cli.STOPPED)
    interrupted = run_json(home / "run")
    finish(start(RESUME, (die_in, "train_step", 7)), -signal.SIGKILL)
    assert run_json(home / "run")["status"] == "running"  # nobody was there to say otherwise
    finish(start(RESUME))
    complete = run_json(home / "run")
    assert failed["status"].startswith("failed: run/best.safetensors could not be written")
    assert interrupted["status"] == "stopped by SIGINT"
    assert complete["status"] == "complete"
    for told, step, steps in ((failed, 3, 3), (interrupted, 5, 5), (complete, 9, 3)):
        assert set(told) == FIELDS | {"summary"}
        assert set(told["summary"]) == SUMMARY
        assert (told["summary"]["step"], told["summary"]["steps_timed"]) == (step, steps)
        assert (told["id"], told["started"]) == (complete["id"], complete["started"])
        assert all(v is None or math.isfinite(v) for k, v in told["summary"].items() if k != "seconds_by_phase")
