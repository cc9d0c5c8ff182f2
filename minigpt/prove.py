"""The proof that resuming is exact: kill a run at some step, resume it, and compare it with one that was left alone."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minigpt import checkpoint
from minigpt.folder import METRICS
from minigpt.tracking import read_metrics

_STEPS, _KILL_AT = 24, 13
_SETTINGS = (  # dropout, accumulation, and evaluations and checkpoints on both sides of the kill
    "quick --n-layer 2 --n-head 2 --n-embd 32 --block-size 32 --dropout 0.2 --micro-batch 4 --accumulation 2 "
    f"--max-steps {_STEPS} --warmup-steps 4 --eval-interval 10 --save-interval 4 --sample-tokens 20 --no-wandb"
).split()


def prove_resume() -> int:
    """Run the proof, print the hashes; the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        text, whole, killed = Path(folder, "text.txt"), Path(folder, "whole"), Path(folder, "killed")
        text.write_text("".join(f"To be, or not to be: that is question {i * i}.\n" for i in range(400)), encoding="utf-8")
        _train(text, whole).wait()
        process = _train(text, killed)
        while process.poll() is None and _steps(killed) < _KILL_AT:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached, saved = _steps(killed), checkpoint.load_newest(killed).step
        print(f"killed after step {reached}, resumed from the checkpoint of step {saved}, up to step {_STEPS}")
        _train(text, killed, "--resume", "--save-interval", "7").wait()  # checkpoints fall on other steps now
        results = [_result(whole), _result(killed)]
    for name, (losses, weights) in zip(("left alone", "killed and resumed"), results, strict=True):
        print(f"{name:<20} losses {losses[:16]}  weights and optimiser {weights[:16]}  (SHA-256)")
    same = results[0] == results[1]
    print("the same, bit for bit" if same else "NOT the same")
    return 0 if same else 1


def _train(text: Path, out_dir: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from minigpt.cli import train; train()"]
    command += [*_SETTINGS, "--data", str(text), "--out-dir", str(out_dir), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def _steps(folder: Path) -> int:
    return len(read_metrics(folder / METRICS)) if (folder / METRICS).exists() else 0


def _result(folder: Path) -> tuple[str, str]:
    """Hashes of all losses and of the final state."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder / METRICS)]
    end = checkpoint.load(folder / checkpoint.LAST)
    digest = hashlib.sha256()
    for name in sorted(end.model):
        digest.update(end.model[name].tobytes())
    for moment in ("exp_avg", "exp_avg_sq"):
        for array in end.optimizer[moment]:
            digest.update(array.tobytes())
    return hashlib.sha256(repr(rows).encode()).hexdigest(), digest.hexdigest()
