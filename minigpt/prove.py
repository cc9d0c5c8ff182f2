"""The proof that nothing is lost: kill a run, resume it, and compare it with one that was left alone."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from minigpt import checkpoint
from minigpt.folder import METRICS
from minigpt.program import child
from minigpt.tracking import read_metrics

_SETTINGS = "--n-layer 2 --n-head 2 --n-embd 32 --block-size 32 --micro-batch 4 --accumulation 2 --dropout 0.2 --warmup-steps 4"
_OFTEN = "--eval-interval 10 --save-interval 4 --sample-tokens 20 --no-wandb"  # much to be killed in, and steps of milliseconds


def prove_resume(*flags: str) -> int:
    """Kill a run at its 13th step, between two checkpoints; the exit status. `flags` say what else to train with."""
    return _prove(24, [lambda folder: _steps(folder) >= 13], flags)


def soak(kills: int, seed: int = 0) -> int:
    """Kill a run at random moments, starting up, training, evaluating or saving; the exit status."""
    rng = random.Random(seed)

    def after(seconds: float) -> Callable[[Path], bool]:
        end = time.monotonic() + seconds
        return lambda _: time.monotonic() >= end

    return _prove(60 * kills, (after(rng.uniform(0.2, 2.5)) for _ in range(kills)))


def _prove(steps: int, moments: Iterable[Callable[[Path], bool]], further: Iterable[str] = ()) -> int:
    """Train `steps` steps twice, once killed at each of the `moments`; print the hashes of what came of it."""
    with tempfile.TemporaryDirectory() as home:
        text, whole, killed = Path(home, "text.txt"), Path(home, "whole"), Path(home, "killed")
        text.write_text("".join(f"To be, or not to be: that is question {i * i}.\n" for i in range(400)), encoding="utf-8")
        flags = ["quick", *_SETTINGS.split(), *_OFTEN.split(), "--data", str(text), "--max-steps", str(steps), *further]
        ends = [_train(whole, flags).wait()]
        for number, moment in enumerate(moments, 1):
            process = _train(killed, flags)
            while process.poll() is None and not moment(killed):
                time.sleep(0.002)
            process.kill()
            if process.wait() != -signal.SIGKILL:
                break  # it was done before its moment came
            reached, saved = _steps(killed), checkpoint.load_newest(killed).step if checkpoint.saved_in(killed) else 0
            print(f"kill {number}: after step {reached}, resumed from the checkpoint of step {saved}", flush=True)
        ends.append(_train(killed, [*flags, "--save-interval", "7"]).wait())  # checkpoints fall on other steps now
        results = [_result(whole), _result(killed)]
    for name, (losses, state) in zip(("left alone", "killed and resumed"), results, strict=True):
        print(f"{name:<20} losses {losses[:16]}  weights and optimiser {state[:16]}  (SHA-256, {steps} steps)")
    same = results[0] == results[1] and ends == [0, 0]
    print("the same, bit for bit" if same else "NOT the same")
    return 0 if same else 1


def _train(folder: Path, flags: list[str]) -> subprocess.Popen[bytes]:
    resume = ["--resume"] if checkpoint.saved_in(folder) else []
    process = child("-m", "minigpt", "train", *flags, *resume, "--out-dir", str(folder))
    process["env"] = {k: v for k, v in process["env"].items() if not k.startswith(("PMI", "OMPI_", "PMIX_"))}  # of a launcher
    return subprocess.Popen(**process, stdout=subprocess.DEVNULL)


def _steps(folder: Path) -> int:
    return len(read_metrics(folder / METRICS)) if (folder / METRICS).exists() else 0


def _result(folder: Path) -> tuple[str, str]:
    """SHA-256 of every line of the metrics but the clock, and of the final weights and moments."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder / METRICS)]
    end, digest = checkpoint.load(folder / checkpoint.LAST), hashlib.sha256()
    for array in (*(end.model[name] for name in sorted(end.model)), *end.optimizer["exp_avg"], *end.optimizer["exp_avg_sq"]):
        digest.update(array.tobytes())
    return hashlib.sha256(repr(rows).encode()).hexdigest(), digest.hexdigest()
