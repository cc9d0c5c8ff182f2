"""Runs in processes of their own, and what can be done to them there.

They are forked from one that has imported the program and waits (`serve`), for that costs each a second; faults that must
strike at an exact place are functions here, which the new process calls before it begins.
"""

import functools
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors.numpy

from minigpt import cli, facts
from minigpt import run as run_module
from minigpt.checkpoint import BEST, LAST, Checkpoint, load
from minigpt.config import PRESETS, TrainConfig
from minigpt.folder import METRICS, RECORD
from minigpt.trainer import Trainer
from tests.minigpt.program import command, environment

resource = pytest.importorskip("resource", reason="limits of a process, for which this system has none")

SIZES = ["quick", "--data", "verse.txt", "--n-layer", "1", "--n-head", "2", "--n-embd", "8", "--block-size", "8"]
SIZES += ["--micro-batch", "3", "--accumulation", "2", "--shards", "2", "--dropout", "0.2", "--lr", "1e-2", "--min-lr", "1e-3"]
SIZES += ["--warmup-steps", "2", "--sample-tokens", "5", "--seed", "1", "--no-wandb"]
SMALL = [*SIZES, "--max-steps", "9", "--eval-interval", "3"]
LONG = [*SIZES, "--threads", "2", "--max-steps", "40", "--eval-interval", "10", "--save-interval", "4"]
HERE = ["--out-dir", "run"]
RESUME = ["quick", "--resume", *HERE]


# Processes


class Process:
    """A run that was started: its number, its end, and what it told."""

    def __init__(self, server: "Server", pid: int, told: Path) -> None:
        self.server, self.pid, self.told = server, pid, told
        self._status: int | None = None

    def status(self) -> int | None:
        """The exit status, negative after a signal; None while it runs."""
        if self._status is None:
            self._status = self.server.ask(pid=self.pid)
        return self._status

    def wait(self, seconds: float = 30) -> int:
        end = time.monotonic() + seconds
        while (status := self.status()) is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                pytest.fail(f"still running after {seconds} s: {self.out} {self.err}")
            time.sleep(0.002)
        return status

    def wait_for(self, path: Path) -> None:
        """Until there is a file, and it is newer than the process."""
        end, began = time.monotonic() + 30, self.told.stat().st_mtime_ns
        while not (path.exists() and path.stat().st_mtime_ns > began):
            assert self.status() is None, (self.status(), self.err)
            assert time.monotonic() < end, (self.out, self.err)
            time.sleep(0.001)

    def send(self, name: str) -> None:
        os.kill(self.pid, signal.Signals[name])

    @property
    def out(self) -> str:
        return (self.told / "out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return (self.told / "err").read_text(encoding="utf-8")


class Server:
    """The process that has imported the program and forks off runs."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            command("-c", "from tests.minigpt.forked import serve; serve()"),
            env=environment(OPENBLAS_NUM_THREADS="1", WANDB_MODE="disabled"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **job: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=10)


def serve() -> None:
    """Start a process for a line on standard input that describes one; tell how a process is that a line numbers."""
    import rich.progress
    import rich.table
    import threadpoolctl
    import tyro

    assert rich.progress and rich.table and threadpoolctl
    tyro.cli(TrainConfig, default=PRESETS["quick"], args=[])
    leave_out_what_takes_longest(setattr)
    facts.versions, facts.commit = functools.cache(facts.versions), functools.cache(facts.commit)
    facts.environment()
    gc.freeze()  # so that collecting garbage does not copy what the processes share
    for line in sys.stdin:
        job = json.loads(line)
        if "pid" in job:
            pid, status = os.waitpid(job["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            become(job)
        print(json.dumps(answer), flush=True)


def leave_out_what_takes_longest(assign: Callable[[Any, str, Any], None]) -> None:
    assign(run_module, "plot", lambda *_: None)
    assign(run_module, "gemm_peak", lambda: 1e9)


def become(job: dict[str, Any]) -> NoReturn:
    """What a script is in a process of its own, with the faults that are to strike."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have us ignore it
    for descriptor, path in enumerate((os.devnull, f"{job['told']}/out", f"{job['told']}/err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    os.chdir(job["home"])
    sys.argv = [job["program"], *job["args"]]
    for fault, *args in job["faults"]:
        globals()[fault](*args)
    status = 0
    try:
        getattr(cli, job["program"])()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)  # an interpreter that puts everything away takes as long as the run


Start = Callable[..., Process]


def finish(process: Process, status: int = 0) -> Process:
    assert process.wait() == status, (process.out, process.err)
    return process


def sentence(process: Process, status: int = 1) -> str:
    """What a process that failed told: one line, and nothing else."""
    finish(process, status)
    assert re.fullmatch(r"error: [^\n]+\n", process.err), process.err
    return process.err[len("error: ") : -1]


# What a run leaves


def state(saved: Checkpoint) -> dict[str, Any]:
    """Everything in a checkpoint that training computes, to the bit."""
    return {
        "model": {name: a.tobytes() for name, a in saved.model.items()},
        "moments": [a.tobytes() for name in ("exp_avg", "exp_avg_sq") for a in saved.optimizer[name]],
        "numbers": (saved.step, saved.tokens, saved.val_loss, saved.best_val_loss, saved.skipped, saved.optimizer["steps"]),
    }


def strict(line: str) -> Any:
    return json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def record(out_dir: Path) -> dict[str, Any]:
    """Everything that a run leaves but the time it took. Every line of its metrics is whole."""
    text = (out_dir / METRICS).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return {
        "metrics": [strict(line) | {"seconds": None} for line in text.splitlines()],
        "best": state(load(out_dir / BEST)),
        "samples": {p.name: p.read_text(encoding="utf-8") for p in (out_dir / "samples").iterdir()},
        **state(load(out_dir / LAST)),
    }


def run_json(out_dir: Path) -> dict[str, Any]:
    return strict((out_dir / RECORD).read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def temporary(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*.tmp")]


# Faults: what a process does to itself


def at(method: str, step: int, act: Callable[[Trainer], Any]) -> None:
    """Let a trainer `act` when it first enters a method at a step (a number of steps done)."""
    entered, todo = getattr(Trainer, method), [act]

    def wrapped(self: Trainer, *args: Any) -> Any:
        for once in [todo.pop()] if self.step == step and todo else []:
            once(self)
        return entered(self, *args)

    setattr(Trainer, method, wrapped)


def kill(name: str = "SIGKILL") -> None:
    os.kill(os.getpid(), signal.Signals[name])


def die_in(method: str, step: int) -> None:
    at(method, step, lambda _: kill())


def get_signals_in(method: str, step: int, *names: str) -> None:
    at(method, step, lambda _: [kill(name) for name in names])


def get_signals_in_making(name: str) -> None:
    made = Trainer.__init__

    def signalled(self: Trainer, *args: Any) -> None:
        made(self, *args)
        kill(name)

    Trainer.__init__ = signalled


def pause_in_making() -> None:
    """Stop until SIGCONT where a run has chosen its folder and read its checkpoint, but not yet taken the folder."""
    made = Trainer.__init__

    def paused(self: Trainer, *args: Any) -> None:
        Path("paused").touch()
        kill("SIGSTOP")
        made(self, *args)

    Trainer.__init__ = paused


def hang_in(method: str, step: int, *names: str) -> None:
    """Get signals, then say so by a file, and hang."""

    def hang(_: Trainer) -> None:
        for name in names:
            kill(name)
        Path("hangs").touch()
        time.sleep(60)

    at(method, step, hang)


def keep_every_save() -> None:
    save = Trainer.save

    def kept(self: Trainer) -> None:
        save(self)
        shutil.copy(self.out_dir / LAST, self.out_dir / f"step-{self.step}")

    Trainer.save = kept


def die_before_naming(name: str) -> None:
    def heard(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and Path(args[1]).name == name:
            kill()

    sys.addaudithook(heard)


def watch_saving(step: int, strike: Callable[[int, str, str], None]) -> None:
    """Call strike(i, operation, "before" or "amid" or "after") at every operation on disk i of the save after `step`."""
    save, operations = Trainer.save, iter(range(99))
    armed = False

    def armed_save(self: Trainer) -> None:
        nonlocal armed
        armed = self.step == step
        save(self)
        armed = False

    def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not armed:
                return operation(*args, **kwargs)
            i, name = next(operations), operation.__name__
            strike(i, name, "before")
            if name == "save_file":
                data = safetensors.numpy.save(args[0], kwargs["metadata"])
                Path(args[1]).write_bytes(data[: len(data) // 2])
                strike(i, name, "amid")
            result = operation(*args, **kwargs)
            strike(i, name, "after")
            return result

        return wrapped

    Trainer.save = armed_save
    for module, name in ((safetensors.numpy, "save_file"), (os, "fsync"), (os, "link"), (os, "rename"), (os, "replace")):
        setattr(module, name, watched(getattr(module, name)))


def die_while_saving(step: int, point: int, when: str) -> None:
    watch_saving(step, lambda i, _, moment: kill() if (i, moment) == (point, when) else None)


def list_operations(step: int) -> None:
    watch_saving(step, lambda _, name, moment: print("disk:", name) if moment == "before" else None)


def get_signals_while_saving(step: int, *names: str) -> None:
    watch_saving(step, lambda i, _, moment: [kill(name) for name in names] if (i, moment) == (0, "amid") else None)


def limit_files(size: int, method: str, step: int) -> None:
    at(method, step, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def limit_memory(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def fill_disk(path: str, method: str, step: int) -> None:
    at(method, step, lambda _: fill(Path(path)))


def fill(path: Path) -> None:
    """A file that leaves not one byte of its disk."""
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with suppress(OSError), open(path, "ab", buffering=0) as file:
        while True:
            file.write(b"0")


def show_run_json_slowly() -> None:
    """Steps so slow that whoever looks sees run.json in all its states."""
    for step in range(9):
        at("train_step", step, lambda _: time.sleep(0.01))
