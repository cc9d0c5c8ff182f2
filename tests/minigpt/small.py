"""What the tests share: a small invented text, and the smallest run that still uses every part."""

import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt.checkpoint import BEST, LAST, CheckpointError, load
from minigpt.config import TrainConfig
from minigpt.corpus import Corpus
from minigpt.run import run
from minigpt.tracking import read_metrics
from minigpt.trainer import Trainer

NAMES = ("ANNA", "BERT", "THE MILLER", "ZOË")
OPENINGS = ("The kettle", "My lantern", "A naïve cat", "Your bread")
DEEDS = ("sings", "sleeps", "is not yet risen", "costs two € more")
PLACES = ("by the river.", "in the mill!", "at noon, and so do I.", "again?")


def verse(lines: int = 120, seed: int = 0) -> str:
    """Invented speeches, not all of ASCII: always the same for a seed."""
    rng = random.Random(seed)
    speeches = [f"{rng.choice(NAMES)}:\n{rng.choice(OPENINGS)} {rng.choice(DEEDS)} {rng.choice(PLACES)}" for _ in range(lines)]
    return "\n\n".join(speeches) + "\n"


TINY = TrainConfig(
    preset="tiny",
    n_layer=2,
    n_head=2,
    n_embd=16,
    block_size=8,
    dropout=0.0,
    max_steps=6,
    micro_batch=3,
    accumulation=2,
    shards=2,  # of 3 rows, so that they are unequal
    lr=1e-2,
    min_lr=1e-3,
    warmup_steps=2,
    eval_interval=3,
    sample_tokens=5,
    seed=1,
    wandb=False,
)


def corpus(text: str) -> Corpus:
    return Corpus(text, "invented verse", hashlib.sha256(text.encode()).hexdigest(), Path("verse.txt"))


def trainer(out_dir: Path = Path("nowhere"), **changes: Any) -> Trainer:
    """A trainer of the small text; it writes nothing until it saves."""
    return Trainer(replace(TINY, **changes), corpus(verse()), out_dir)


def interrupted(config: TrainConfig, step: int, monkeypatch: pytest.MonkeyPatch, during: str = "train_step") -> Path:
    """The run as far as its step `step`, at which it is killed."""
    method = getattr(Trainer, during)

    def killed(self: Trainer, *args: Any) -> Any:
        if self.step == step:
            raise KeyboardInterrupt
        return method(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, during, killed)
        run(config)
    return Path("runs/tiny") if config.out_dir is None else config.out_dir


def distance(ours: Any, theirs: Any) -> float:
    """‖ours − theirs‖ / ‖theirs‖; the norm of ours where theirs is 0."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape
    norm = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / (norm or 1.0)


def record(out_dir: Path) -> dict[str, Any]:
    """Everything that a run leaves but the time it took."""
    saved = load(out_dir / LAST)
    return {
        "metrics": [row | {"seconds": None} for row in read_metrics(out_dir / "metrics.jsonl")],
        "model": {name: a.tobytes() for name, a in saved.model.items()},
        "moments": [a.tobytes() for name in ("exp_avg", "exp_avg_sq") for a in saved.optimizer[name]],
        "numbers": (saved.step, saved.tokens, saved.val_loss, saved.best_val_loss, saved.skipped, saved.optimizer["steps"]),
        "best": load(out_dir / BEST).step,
        "samples": {p.name: p.read_text() for p in (out_dir / "samples").iterdir()},
    }


def refusal(path: Path) -> str:
    """What `load` says of a file that it refuses: one line that names it."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message
