"""Jobs of an MPI launcher that train one run, and what their ranks note."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from minigpt.tracking import read_metrics
from tests.minigpt.program import environment

# of the Python that runs the tests, or else on PATH; the module itself is not imported, for then every later run would be a job
BESIDE = Path(sys.executable).with_name("mpiexec")
MPIEXEC = str(BESIDE) if BESIDE.exists() else shutil.which("mpiexec")
if importlib.util.find_spec("mpi4py") is None:
    pytest.skip("mpi4py is not installed", allow_module_level=True)
if MPIEXEC is None:
    pytest.skip(f"no mpiexec beside {sys.executable} or on PATH", allow_module_level=True)
HYDRA = "HYDRA" in subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True, timeout=20).stdout

SMALL = (  # two micro-batches of two unequal shards
    "--data verse.txt --no-wandb --n-layer 2 --n-head 2 --n-embd 16 --block-size 8 --dropout 0.2 --micro-batch 3 --shards 2 "
    "--accumulation 2 --max-steps 8 --warmup-steps 2 --eval-interval 4 --sample-tokens 8 --lr 1e-2"
)
FLAGS = SMALL.split()
PRELUDE = """
import hashlib, os, signal, sys, time
from pathlib import Path
from minigpt import checkpoint, distributed, run, trainer
from minigpt.trainer import Trainer

run.plot, run.gemm_peak = lambda *_: None, lambda: 1e9  # the curve and the machine's peak, which take longest


def note(trainer, name, text):
    Path("notes", f"{name}-{trainer.ranks.rank}").write_text(text)


def noting(self, tracker, train=Trainer.train):
    finished = train(self, tracker)
    digest = hashlib.sha256()
    for p in self.model.parameters():
        digest.update(p.data.tobytes())
    note(self, "weights", digest.hexdigest())
    return finished


Trainer.train = noting
"""
PROGRAM = "\nfrom minigpt.cli import train\ntrain()\n"


class Ended(NamedTuple):
    """How a job ended, and when."""

    status: int
    out: str
    err: str
    when: float


class Job:
    """Processes that a launcher started, or with ranks=0 one process without a launcher."""

    def __init__(self, home: Path, ranks: int, program: list[str], env: dict[str, str] | None = None) -> None:
        (home / "notes").mkdir(exist_ok=True)
        launcher = [str(MPIEXEC), "-n", str(ranks)] if ranks else []
        self.files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (closed by `end`)
        self.process = subprocess.Popen(
            [*launcher, sys.executable, *program],
            cwd=home,
            env=job_environment(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=self.files[0],
            stderr=self.files[1],
            start_new_session=True,
        )

    def end(self, timeout: float = 40) -> Ended:
        """Wait for the end of the job; one that goes on beyond `timeout` is killed, and has failed."""
        status: int | None = None
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            when = time.time()
            self.kill()
        out, err = (self._told(file) for file in self.files)
        assert status is not None, f"the job did not end\n{out}\n{err}"
        return Ended(status, out, err, when)

    def _told(self, file: IO[bytes]) -> str:
        with file:
            file.seek(0)
            return file.read().decode(errors="replace")

    def kill(self) -> None:
        """End what is left; a launcher that is killed takes its ranks with it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def job_environment(settings: dict[str, str]) -> dict[str, str]:
    open_mpi = {  # as root, and with more ranks than cores; it gives each rank a terminal, hence the dumb one
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "TERM": "dumb",
    }
    given = environment(**open_mpi)
    del given["TINYTENSOR_NUM_THREADS"]
    return given | settings


def start(home: Path, ranks: int, *flags: str, before: str = "", env: dict[str, str] | None = None) -> Job:
    return Job(home, ranks, ["-c", PRELUDE + before + PROGRAM, "quick", *flags], env)


def execute(home: Path, ranks: int, *flags: str, before: str = "", env: dict[str, str] | None = None) -> Ended:
    return start(home, ranks, *flags, before=before, env=env).end()


def finish(home: Path, ranks: int, *flags: str, before: str = "", env: dict[str, str] | None = None) -> Ended:
    """A run that must reach its last step."""
    done = execute(home, ranks, *flags, before=before, env=env)
    assert (done.status, done.err) == (0, ""), done.out
    return done


def losses(out_dir: Path) -> list[float]:
    return [row[name] for row in read_metrics(out_dir / "metrics.jsonl") for name in ("train_loss", "val_loss") if row[name]]


def notes(home: Path, name: str) -> list[str]:
    """What each rank noted."""
    return [p.read_text() for p in sorted((home / "notes").glob(f"{name}-*"))]
