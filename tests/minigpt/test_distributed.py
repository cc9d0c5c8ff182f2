"""Several processes train one run: real jobs of an MPI launcher. Faults come from code that runs before the program's own."""

import hashlib
import json
import os
import platform
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minigpt import folder
from minigpt.checkpoint import LAST, load, load_newest
from minigpt.cli import STOPPED
from minigpt.distributed import Ranks
from minigpt.tracking import read_metrics
from tests.minigpt.jobs import FLAGS, HYDRA, PRELUDE, PROGRAM, Ended, Job, execute, finish, losses, notes
from tests.minigpt.program import ROOT
from tests.minigpt.small import record, trainer, verse
from tinytensor import parallel


def at(rank: int, step: int, code: str) -> str:
    """Code that runs `code` on one rank before it computes the gradient of an update, counted from 0."""
    return f"""
def faulty(self, lr, train_step=Trainer.train_step):
    if (self.ranks.rank, self.step) == ({rank}, {step}):
        note(self, "fault", str(time.time()))
        {code}
    return train_step(self, lr)


Trainer.train_step = faulty
"""


def slowly(seconds: float) -> str:
    """Code that makes every update take at least so long."""
    return f"""
def slow(self, lr, train_step=Trainer.train_step):
    time.sleep({seconds})
    return train_step(self, lr)


Trainer.train_step = slow
"""


@pytest.fixture(name="home")
def folder_with_a_text(tmp_path: Path) -> Path:
    (tmp_path / "verse.txt").write_text(verse(), encoding="utf-8")
    return tmp_path


def status_of(out_dir: Path) -> str:
    return json.loads((out_dir / "run.json").read_text())["status"]


@pytest.fixture(name="alone", scope="module")
def one_process_and_one_thread(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What one process with one thread leaves for these flags; made once."""
    made: dict[tuple[str, ...], dict[str, Any]] = {}

    def result(*flags: str, env: dict[str, str] | None = None) -> dict[str, Any]:
        key = (*flags, str(env))
        if key not in made:
            home = tmp_path_factory.mktemp("alone")
            (home / "verse.txt").write_text(verse(), encoding="utf-8")
            finish(home, 0, *flags, "--threads", "1", "--out-dir", "run", env=env)
            made[key] = record(home / "run")
        return made[key]

    return result


SHARDS = {
    "two micro-batches of two shards": "",
    "one micro-batch of four shards": "--micro-batch 5 --accumulation 1 --shards 4",
    "two micro-batches of eight shards": "--micro-batch 8 --shards 8 --max-steps 4",
    "three micro-batches of two shards": "--accumulation 3",
    "a buffer of several blocks": "--n-embd 96 --block-size 50 --max-steps 4 --eval-interval 1",
}


@pytest.mark.parametrize(
    ("shards", "ranks"),
    [
        ("two micro-batches of two shards", 4),
        ("one micro-batch of four shards", 4),
        ("two micro-batches of eight shards", 2),
        ("three micro-batches of two shards", 2),
        ("a buffer of several blocks", 4),
    ],
)
def test_powers_of_two_of_ranks_make_the_run_of_one_process(
    home: Path, alone: Callable[..., dict[str, Any]], shards: str, ranks: int
) -> None:
    flags = [*FLAGS, *SHARDS[shards].split()]
    finish(home, ranks, *flags, "--out-dir", "run")
    assert record(home / "run") == alone(*flags)
    assert len(notes(home, "weights")) == ranks
    assert len(set(notes(home, "weights"))) == 1


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_a_power_of_two_of_ranks_shares_halves_of_halves(size: int) -> None:
    """As the tree of the shards' sums is made, so that each rank's sum is a branch of it."""
    for n in range(size, 70):
        stretches = [range(n)]
        while len(stretches) < size:
            stretches = [half for s in stretches for half in (s[: len(s) // 2], s[len(s) // 2 :])]
        shares = []
        for rank in range(size):
            ranks = Ranks()
            ranks.rank, ranks.size = rank, size
            shares.append(ranks.share(n))
        assert shares == stretches, n


@pytest.mark.parametrize(("ranks", "threads"), [(0, 2), (0, 3), (2, 2)])
def test_threads_do_not_change_a_run(home: Path, alone: Callable[..., dict[str, Any]], ranks: int, threads: int) -> None:
    flags = [*FLAGS, *SHARDS["two micro-batches of eight shards"].split()]
    finish(home, ranks, *flags, "--threads", str(threads), "--out-dir", "run")
    assert record(home / "run") == alone(*flags)


def has_avx2() -> bool:
    info = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and info.exists() and "avx2" in info.read_text().split()


@pytest.mark.skipif(not has_avx2(), reason="the matrix kernels of this test need an x86-64 processor with AVX2")
def test_threads_do_not_change_a_run_where_the_threads_of_blas_change_a_product(
    home: Path, alone: Callable[..., dict[str, Any]]
) -> None:
    """Haswell's kernels, which most processors get: a product by two threads may differ from the same by one."""
    shards = "--n-embd 96 --block-size 50 --accumulation 1 --shards 4 --micro-batch 4 --eval-interval 1"
    flags, env = [*FLAGS, *shards.split(), "--max-steps", "4"], {"OPENBLAS_CORETYPE": "Haswell"}
    finish(home, 2, *flags, "--threads", "2", "--out-dir", "run", env=env)
    assert record(home / "run") == alone(*flags, env=env)


def test_three_ranks_make_the_same_run_but_for_rounding_and_always_the_same(
    home: Path, alone: Callable[..., dict[str, Any]]
) -> None:
    for out_dir in ("first", "again"):
        finish(home, 3, *FLAGS, "--out-dir", out_dir)
        assert len(notes(home, "weights")) == 3
        assert len(set(notes(home, "weights"))) == 1
    assert record(home / "first") == record(home / "again")
    expected = alone(*FLAGS)["metrics"]
    assert losses(home / "first") == pytest.approx(
        [row[name] for row in expected for name in ("train_loss", "val_loss") if row[name]], rel=1e-5
    )


TOKENS = """
from minigpt.model import GPT


def seen(self, idx, targets=None, forward=GPT.forward):
    if self.training:
        with open("notes/tokens.txt", "a") as file:
            file.write(f"{self.step} {hashlib.sha256(idx.tobytes() + targets.tobytes()).hexdigest()}\\n")
    return forward(self, idx, targets)


def counted(self, lr, train_step=Trainer.train_step):
    self.model.step = self.step
    return train_step(self, lr)


GPT.forward, Trainer.train_step = seen, counted
"""


def test_a_run_goes_on_with_any_number_of_ranks(tmp_path_factory: pytest.TempPathFactory, home: Path) -> None:
    """One process, then four, then two; each but the last is stopped on its last rank."""
    stop = "os.kill(os.getpid(), signal.SIGTERM)"
    flags = [*FLAGS, "--threads", "1", "--max-steps", "10"]
    for ranks, step in ((0, 2), (4, 6)):
        resume = ["--resume"] if step > 2 else flags
        done = execute(home, ranks, *resume, "--out-dir", "run", before=TOKENS + at(max(0, ranks - 1), step, stop))
        assert done.status == STOPPED or (ranks and not HYDRA and done.status)
        assert done.err == "" or not HYDRA
        assert f"stopped by {'another rank' if ranks else 'SIGTERM'} after step {step + 1}" in done.out
        assert status_of(home / "run") == f"stopped by {'another rank' if ranks else 'SIGTERM'}"
        assert load(home / "run" / LAST).step == step + 1
    done = finish(home, 2, "--resume", "--out-dir", "run", before=TOKENS)
    assert "resumed at step 7" in done.out
    assert status_of(home / "run") == "complete"
    other = tmp_path_factory.mktemp("other")
    (other / "verse.txt").write_text(verse(), encoding="utf-8")
    finish(other, 0, *flags, "--out-dir", "run", before=TOKENS)
    assert record(home / "run") == record(other / "run")
    tokens = [sorted((place / "notes" / "tokens.txt").read_text().splitlines()) for place in (home, other)]
    assert len(tokens[0]) == len(set(tokens[0])) == 10 * 4
    assert tokens[0] == tokens[1]


def test_a_finished_run_that_is_resumed_does_nothing_on_every_rank(home: Path) -> None:
    finish(home, 0, *FLAGS, "--out-dir", "run")

    def content() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in (home / "run").rglob("*") if p.is_file() and p.name != folder.LOCK}

    before = content()
    done = finish(home, 2, "--resume", "--out-dir", "run")
    assert f"validation loss {load(home / 'run' / LAST).val_loss:.4f} in " in done.out
    assert content() == before


AUDIT = """
def watch(self, *args, init=Trainer.__init__):
    init(self, *args)
    if self.ranks.rank:

        def audit(event, args):
            written = event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            changed = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
            if (written or changed) and "notes" not in str(args[0]) and Path(args[0]).resolve().is_relative_to(Path.cwd()):
                os.write(2, f"{event} {args[0]}\\n".encode())

        sys.addaudithook(audit)


Trainer.__init__ = watch
"""


def test_only_rank_0_writes_and_prints(home: Path) -> None:
    (home / "runs" / "quick").mkdir(parents=True)
    done = finish(home, 4, *FLAGS, before=AUDIT)  # an audited write would be on standard error
    assert sorted(p.name for p in (home / "runs").iterdir()) == ["quick", "quick-2"]
    out_dir = home / "runs" / "quick-2"
    assert not list((home / "runs" / "quick").iterdir())
    assert [row["step"] for row in read_metrics(out_dir / "metrics.jsonl")] == list(range(1, 9))
    assert len((out_dir / "metrics.jsonl").read_text().splitlines()) == 8
    assert {p.name for p in (out_dir / "samples").iterdir()} == {"step-000004.txt", "step-000008.txt"}
    for words in ("run ", "text ", "model ", "device ", "time:", "more verse:", "step 4 ", "step 8 ", "validation loss"):
        lines = [line for line in done.out.splitlines() if line.startswith(words)]
        assert len(lines) == 1, words
    assert "1 threads on each of 4 ranks" in done.out or (os.cpu_count() or 1) >= 8
    described = json.loads((out_dir / "run.json").read_text())
    assert (described["status"], described["ranks"], described["config"]["shards"]) == ("complete", 4, 2)
    assert described["text"]["sha256"] == hashlib.sha256((home / "verse.txt").read_bytes()).hexdigest()


def test_more_ranks_than_shards_is_one_sentence(home: Path) -> None:
    done = execute(home, 5, *FLAGS, "--out-dir", "run")
    assert done.status not in (0, STOPPED)
    assert "5 ranks share 4 shards, so some would have nothing to do; start fewer, or raise --shards" in done.err
    assert "Traceback" not in done.err
    assert not (home / "run").exists()


FAULTS = {
    "raises": "raise KeyError('a programming error')",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "quits": "os._exit(3)",
    "quits quietly": "os._exit(0)",
    "freezes": "os.kill(os.getpid(), signal.SIGSTOP)",
    "hangs": "time.sleep(600)",
}


def broken(home: Path, rank: int, fault: str) -> Ended:
    """A job of two ranks, one of which fails after step 5; the last checkpoint is step 4's."""
    limit = 2 if fault in ("freezes", "hangs") else 600
    done = execute(home, 2, *FLAGS, "--out-dir", "run", "--rank-timeout", str(limit), before=at(rank, 5, FAULTS[fault]))
    (when,) = notes(home, "fault")
    assert done.when - float(when) < min(limit, 2) + 5
    assert load_newest(home / "run").step == 4
    assert [row["step"] for row in read_metrics(home / "run" / "metrics.jsonl")] in ([1, 2, 3, 4], [1, 2, 3, 4, 5])
    assert status_of(home / "run") != "complete"
    assert "more verse:" not in done.out
    return done


@pytest.mark.parametrize(
    ("rank", "fault"),
    [(0, "raises"), (0, "is killed"), (0, "quits"), (1, "quits"), (0, "freezes"), (1, "hangs")],
)
def test_a_job_ends_when_one_of_its_ranks_does(home: Path, rank: int, fault: str) -> None:
    assert broken(home, rank, fault).status not in (0, STOPPED)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_quits_quietly_does_not_look_like_the_end_of_a_run(home: Path, rank: int) -> None:
    """MPICH then returns 0, whatever the other ranks do: the end of a run has a mark of its own."""
    done = broken(home, rank, "quits quietly")
    assert "model, metrics, curve and samples are in" not in done.out
    assert status_of(home / "run") != "complete"


def test_an_unexpected_error_says_where_it_was_raised(home: Path) -> None:
    """One that is no mistake of the user's: its kind, its rank and the line."""
    done = broken(home, 1, "raises")
    assert done.status not in (0, STOPPED)
    assert "rank 1 of 2" in done.err
    assert "KeyError" in done.err
    assert "in faulty" in done.err


def test_the_record_names_an_error_that_has_no_message(home: Path) -> None:
    execute(home, 2, *FLAGS, "--out-dir", "run", before=at(0, 1, "raise MemoryError"))
    assert status_of(home / "run").startswith("failed: MemoryError")


ABORT_RETURNS = """
from mpi4py import MPI


class Returning:
    def __init__(self, comm):
        self.comm = comm

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def Abort(self, status):
        pass


MPI.COMM_WORLD = Returning(MPI.COMM_WORLD)
"""


def test_an_error_is_not_forgotten_where_an_abort_returns(home: Path) -> None:
    """As MPICH's sometimes does while another rank aborts, too."""
    done = execute(home, 2, *FLAGS, "--out-dir", "run", "--data", "none.txt", before=ABORT_RETURNS)
    assert done.status not in (0, STOPPED)
    assert "cannot read none.txt" in done.err
    assert "Traceback" not in done.err


def test_a_broken_run_goes_on(home: Path, alone: Callable[..., dict[str, Any]]) -> None:
    assert broken(home, 1, "is killed").status not in (0, STOPPED)
    finish(home, 2, "--resume", "--out-dir", "run")
    assert status_of(home / "run") == "complete"
    assert record(home / "run") == alone(*FLAGS)


@pytest.fixture(name="running")
def jobs_that_a_test_signals() -> Iterator[list[Job]]:
    """For jobs that are waited for; whatever a failed test leaves is killed."""
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        job.kill()


def wait_for_steps(out_dir: Path, steps: int, job: Job) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and job.process.poll() is None:
        if (out_dir / "metrics.jsonl").exists() and len(read_metrics(out_dir / "metrics.jsonl")) >= steps:
            return
        time.sleep(0.01)
    pytest.fail(f"step {steps} was not reached")


@pytest.mark.parametrize(("name", "module"), [("SIGTERM", []), ("SIGINT", []), ("SIGTERM", ["-m", "mpi4py"])])
def test_a_signal_to_the_launcher_stops_and_saves(
    home: Path, running: list[Job], alone: Callable[..., dict[str, Any]], name: str, module: list[str]
) -> None:
    flags = [*FLAGS, "--max-steps", "40", "--eval-interval", "100"]
    report = "\nrun.plot = lambda *_: time.sleep(1)\n"  # as long as a curve takes
    code = PRELUDE + slowly(0.05) + report + PROGRAM
    job = Job(home, 2, [*module, "-c", code, "quick", *flags, "--out-dir", "run"])
    running.append(job)
    wait_for_steps(home / "run", 3, job)
    job.process.send_signal(getattr(signal, name))
    done = job.end(20)
    assert done.status == STOPPED or (not HYDRA and done.status != 0)
    assert status_of(home / "run").startswith("stopped by ")
    saved = load(home / "run" / LAST).step
    assert saved == len(read_metrics(home / "run" / "metrics.jsonl")) < 40
    if HYDRA:  # another launcher may forward nothing more
        assert f"stopped by {name} after step {saved}, which is saved in run" in done.out
        assert "to go on: python scripts/train.py quick --resume" in done.out
    finish(home, 2, "--resume", "--out-dir", "run")
    assert status_of(home / "run") == "complete"
    assert record(home / "run") == alone(*flags)


POISON = """
def poisoned(self, optimizer, add_up=distributed.MPIRanks.add_up):
    if poison:
        optimizer.flat_gradients()[0][7] = poison.pop()
    add_up(self, optimizer)


poison = []
distributed.MPIRanks.add_up = poisoned
"""


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(home: Path, number: str) -> None:
    done = execute(home, 4, *FLAGS, "--out-dir", "run", before=POISON + at(2, 3, f"poison.append(float({number!r}))"))
    assert done.status == 0  # NumPy may warn
    assert "step 4: loss or gradient is not finite, update skipped" in done.out
    rows = read_metrics(home / "run" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [4]
    saved = load(home / "run" / LAST)
    assert (saved.step, saved.skipped, set(saved.optimizer["steps"])) == (8, 1, {7})
    assert len(notes(home, "weights")) == 4
    assert len(set(notes(home, "weights"))) == 1


def test_too_many_skipped_updates_stop_every_rank_with_a_sentence(home: Path) -> None:
    poisoned = POISON + at(1, 2, "poison.append(float('nan'))")
    done = execute(home, 2, *FLAGS, "--out-dir", "run", "--max-skipped", "1", before=poisoned)
    assert done.status not in (0, STOPPED)
    assert "its gradient norm nan" in done.err
    assert "--resume" in done.err
    assert "Traceback" not in done.err
    assert status_of(home / "run").startswith("failed: the loss of step")
    assert load_newest(home / "run").step == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_whose_weights_differ_stop_and_name_the_parameter(home: Path, rank: int) -> None:
    change = "self.model.h[1].mlp.c_fc.weight.data[3, 5] += 1e-6"
    compare_often = "\ntrainer._COMPARE_EVERY = 2\n" + at(rank, 3, change)
    done = execute(home, 2, *FLAGS, "--out-dir", "run", before=compare_often)
    assert done.status not in (0, STOPPED)
    assert "the weights h.1.mlp.c_fc.weight of ranks" in done.err
    assert "Traceback" not in done.err
    assert status_of(home / "run") != "complete"
    assert load_newest(home / "run").step in (0, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--n-head 3", r"n_embd=16 is not divisible by n_head=3"),
        ("--data none.txt", r"cannot read none\.txt .*name a UTF-8 text"),
        ("--block-size 99999", r"block_size=99999 needs more than 99999"),
        ("--out-dir verse.txt/below", r"cannot write to verse\.txt/below"),
        ("--out-dir taken", r"taken already holds a run; continue it with --resume"),
        ("--out-dir used", r"used is in use by the run of process \d+"),
        ("--resume --out-dir none", r"none holds no checkpoint to resume"),
    ],
)
def test_what_is_wrong_is_told_and_every_rank_ends(home: Path, flags: str, message: str) -> None:
    (home / "taken").mkdir()
    (home / "taken" / LAST).touch()
    with folder.locked(home / "used"):
        before = {p for p in home.rglob("*") if p.is_file()}
        done = execute(home, 2, *FLAGS, "--out-dir", "run", *flags.split())
    assert done.status not in (0, STOPPED)
    assert re.search(message, done.err)
    assert "Traceback" not in done.err
    assert {p for p in home.rglob("*") if p.is_file()} == before


FULL_DISK = """
def full(path, state, save=checkpoint.save):
    if state.step:
        raise OSError(28, "No space left on device", str(path))
    save(path, state)


checkpoint.save = full
"""


def test_a_save_that_fails_on_rank_0_ends_every_rank(home: Path) -> None:
    done = execute(home, 3, *FLAGS, "--out-dir", "run", before=FULL_DISK)
    assert done.status not in (0, STOPPED)
    assert "No space left on device" in done.err
    assert "Traceback" not in done.err
    assert status_of(home / "run").startswith("failed: [Errno 28] No space left on device")
    assert load_newest(home / "run").step == 0


def test_what_happens_on_rank_0_first_reaches_every_rank(home: Path) -> None:
    code = """
import json, os
from pathlib import Path
from minigpt.distributed import ranks


def fails():
    raise FileNotFoundError(2, "gone", "a.txt")


with ranks("cpu", 60) as job:
    told = [job.first(lambda: os.getpid())]
    try:
        job.first(fails)
    except FileNotFoundError as error:
        told.append(error.filename)
    told += [job.gather(range(job.rank, 2 * job.rank)), list(job.share(7))]
    Path("notes", f"told-{job.rank}").write_text(json.dumps(told))
"""
    done = Job(home, 3, ["-c", code]).end()
    assert (done.status, done.err) == (0, "")
    told = [json.loads(text) for text in notes(home, "told")]
    assert len({pid for pid, *_ in told}) == 1
    assert [rest for _, *rest in told] == [
        ["a.txt", [1, 2, 3], [0, 1]],
        ["a.txt", [1, 2, 3], [2, 3]],
        ["a.txt", [1, 2, 3], [4, 5, 6]],
    ]


@pytest.fixture(name="without_mpi4py")
def environments_without_mpi4py(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """An environment in which mpi4py is not there, or finds no MPI library."""

    def hide(how: str) -> dict[str, str]:
        (package := tmp_path / "hidden" / "mpi4py").mkdir(parents=True)
        missing, no_library = "raise ImportError('hidden')", r"raise RuntimeError('cannot load MPI library\nlibmpi.so: none')"
        (package / "__init__.py").write_text(missing if how == "missing" else "")
        (package / "MPI.py").write_text(no_library)
        return {"PYTHONPATH": f"{package.parent}{os.pathsep}{ROOT}"}

    return hide


@pytest.mark.parametrize("how", ["missing", "without a library"])
def test_a_launcher_without_mpi4py_is_told_what_to_install(
    home: Path, without_mpi4py: Callable[[str], dict[str, str]], how: str
) -> None:
    done = execute(home, 2, *FLAGS, "--out-dir", "run", env=without_mpi4py(how))
    assert done.status not in (0, STOPPED)
    assert 'pip install -e ".[mpi]"' in done.err
    assert "an MPI launcher started 2 processes, which needs the package mpi4py (" in done.err
    assert "Traceback" not in done.err
    assert not (home / "run").exists()


@pytest.mark.parametrize("ranks", [0, 1])
def test_one_process_never_imports_mpi4py(home: Path, without_mpi4py: Callable[[str], dict[str, str]], ranks: int) -> None:
    finish(home, ranks, *FLAGS, "--max-steps", "1", "--out-dir", "run", env=without_mpi4py("missing"))


NOTE_THREADS = """
from threadpoolctl import threadpool_info
from tinytensor import parallel


def counting(self, shard, shard_loss=Trainer.shard_loss):
    inside.append(max(p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"))
    return shard_loss(self, shard)


def told(self, lr, train_step=Trainer.train_step):
    blas = max(p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas")
    step = train_step(self, lr)
    note(self, "threads", f"[{self.threads}, {parallel.cpu_threads()}, {blas}, {max(inside)}]")
    return step


inside = []
Trainer.shard_loss, Trainer.train_step = counting, told
"""


@pytest.mark.parametrize(
    ("flags", "env", "expected"),
    [
        ([], {}, None),
        (["--threads", "2"], {}, 2),
        ([], {"TINYTENSOR_NUM_THREADS": "2"}, 2),
    ],
)
def test_ranks_share_the_cores_unless_told_otherwise(
    home: Path, flags: list[str], env: dict[str, str], expected: int | None
) -> None:
    finish(home, 2, *FLAGS, "--max-steps", "1", *flags, "--out-dir", "run", before=NOTE_THREADS, env=env)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for noted in notes(home, "threads"):
        threads, default, blas, inside = json.loads(noted)
        if expected is None:
            assert default == max(1, cores // 2) or not HYDRA
            assert max(threads, default, blas) * 2 <= max(2, cores)
        else:
            assert threads == expected
            assert blas == min(expected, cores)
        assert inside == 1


@pytest.mark.parametrize(
    ("variables", "cores", "allowed", "expected"),
    [
        ({}, 8, 8, 8),
        ({"MPI_LOCALNRANKS": "2", "PMI_SIZE": "4"}, 8, 8, 4),  # MPICH
        ({"MPI_LOCALNRANKS": "3"}, 8, 8, 2),
        ({"MPI_LOCALNRANKS": "16"}, 8, 8, 1),
        ({"MPI_LOCALNRANKS": "4"}, 8, 2, 2),  # bound to cores of its own
        ({"PMI_SIZE": "4"}, 8, 8, 8),  # on other machines, for all that is known
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "16"}, 8, 8, 2),  # Open MPI
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 8, 1, 1),
        ({"MPI_LOCALNRANKS": "2", "TINYTENSOR_NUM_THREADS": "7"}, 8, 8, 7),
        ({"MPI_LOCALNRANKS": "0"}, 8, 8, 8),
        ({"MPI_LOCALNRANKS": "many"}, 8, 8, 8),
    ],
)
def test_threads_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], cores: int, allowed: int, expected: int
) -> None:
    for name in ("TINYTENSOR_NUM_THREADS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MV2_COMM_WORLD_LOCAL_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores if process else allowed)), raising=False)
    assert parallel.cpu_threads() == expected


def test_a_run_of_one_thread_updates_a_large_model_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(threads: int) -> Any:
        raise AssertionError(f"{threads} more threads")

    monkeypatch.setattr(parallel, "_pool", started)
    with parallel.limited(1):
        trainer(n_layer=1, n_embd=256, micro_batch=2).train_step(1e-3)


def test_the_module_mpi4py_runs_the_script(home: Path, alone: Callable[..., dict[str, Any]]) -> None:
    done = Job(home, 2, ["-m", "mpi4py", str(ROOT / "scripts" / "train.py"), "quick", *FLAGS, "--out-dir", "run"]).end()
    assert (done.status, done.err) == (0, "")
    assert done.out.count("more verse:") == 1
    assert record(home / "run") == alone(*FLAGS)
    assert (home / "run" / "curve.png").exists()
