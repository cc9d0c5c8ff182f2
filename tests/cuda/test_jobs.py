"""The program itself on CuPy's stand-in: one process, and the ranks of an MPI job that exchange gradients as NCCL would."""

import json
from pathlib import Path

import pytest

from tests.minigpt import jobs  # skips where there is no MPI
from tests.minigpt.small import verse

BEFORE = """
from tests.cuda import standin
from tinytensor.backend import cublas

standin.install()
library = standin.cublas.Library()
cublas.load = lambda: library
"""
FLAGS = [*jobs.FLAGS, "--shards", "1", "--device", "cuda", "--out-dir", "run"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "verse.txt").write_text(verse(), encoding="utf-8")
    return tmp_path


def finish(home: Path, ranks: int, *flags: str) -> list[float]:
    """The losses of a run that reached its last step; all ranks' weights are the same."""
    jobs.finish(home, ranks, *FLAGS, *flags, before=BEFORE)
    assert len(set(jobs.notes(home, "weights"))) == 1
    return jobs.losses(home / "run")


def test_one_process(home: Path) -> None:
    done = jobs.finish(home, 0, *FLAGS, "--precision", "bf16", before=BEFORE)
    assert "cuda, CuPy stand-in, CuPy 14.2.0, bf16" in done.out
    record = json.loads((home / "run" / "run.json").read_text())
    assert record["status"] == "complete" and record["hardware"]["gpu"] == "CuPy stand-in, CuPy 14.2.0"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_take_the_steps_of_one_process(home: Path, tmp_path_factory: pytest.TempPathFactory, ranks: int) -> None:
    """The gradients of three micro-batches are added in another order, so the last bits differ."""
    alone = tmp_path_factory.mktemp("alone")
    (alone / "verse.txt").write_text(verse(), encoding="utf-8")
    single = finish(alone, 0, "--accumulation", "3")
    assert finish(home, ranks, "--accumulation", "3") == pytest.approx(single, rel=1e-4)


def test_a_gpu_that_is_not_there_is_one_sentence(home: Path) -> None:
    done = jobs.execute(home, 0, *FLAGS, before=BEFORE + "import cupy\ncupy.cuda.is_available = lambda: False\n")
    assert done.status == 1 and not (home / "run").exists()
    assert done.err == 'error: device "cuda" was asked for, but CuPy finds no usable GPU; use device "cpu"\n'
