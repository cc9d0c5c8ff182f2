"""The proofs that need a GPU: the whole model against NumPy, and training that gives the same bits however it is run."""

from __future__ import annotations

import functools
import hashlib
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import tinytensor as tt
from minigpt import GPT, GPTConfig, checkpoint
from minigpt.benchmarks.gpu_checks import PRECISIONS, Check, Sizes, attempt, below, distance
from minigpt.corpus import Corpus
from minigpt.tracking import Quiet
from minigpt.trainer import Trainer
from tinytensor import optim, random
from tinytensor.graph import Replayed

LIMITS = {"fp32": 1e-5, "tf32": 5e-3, "bf16": 5e-2}  # of the whole model's loss and gradient


def whole_model(sizes: Sizes) -> list[Check]:
    """The gradient of three micro-steps with dropout: same weights, tokens and keys on NumPy and CuPy, beside float64."""
    config = replace(sizes.training.model(65), dropout=0.2, bias=True)
    tokens = np.random.default_rng(0).integers(0, 65, (3, max(2, sizes.rows // 8), config.block_size + 1))
    exact, checks = _gradient(config, tokens, "cpu", "float64"), []

    def found(device: str, precision: Any) -> tuple[str, bool]:
        errors = [distance(a, e) for a, e in zip(_gradient(config, tokens, device, precision), exact, strict=True)]
        text, passed = below(LIMITS[precision], np.max(errors))
        return f"{text}, losses {errors[0]:.1e}", passed

    for device, precision in (("cpu", "fp32"), *(("cuda", p) for p in PRECISIONS)):
        what = f"{'NumPy' if device == 'cpu' else 'CuPy'} in {precision}"
        checks.append(attempt(what, f"below {LIMITS[precision]:.0e}", functools.partial(found, device, precision)))
    return checks


def _gradient(config: GPTConfig, tokens: np.ndarray, device: str, precision: Any) -> tuple[list[float], np.ndarray]:
    """The losses, and all gradients end to end. On a GPU the first micro-step runs as written, the others as a graph."""
    with random.scope(1):
        gpt = GPT(config)
    rng = np.random.default_rng(1)
    for p in gpt.parameters():
        if p.ndim == 1:  # norms and biases, which begin as ones and zeros
            p.data += 0.1 * rng.standard_normal(p.shape).astype(np.float32)
    gpt.to("float64" if precision == "float64" else device)

    def loss_of(batch: Any) -> tt.Tensor:
        with tt.precision("fp32" if precision == "float64" else precision):
            return gpt(batch[:, :-1], batch[:, 1:])[1]

    if device == "cuda":
        adamw, replayed = optim.AdamW(gpt.parameters()), Replayed(loss_of, seed=7)
        adamw.zero_grad(set_to_none=False)
        losses = [replayed(3, i, batch).item() for i, batch in enumerate(tokens.astype(np.int32))]
    else:
        losses = []
        for i, batch in enumerate(tokens):
            with random.scope(7, 3, i):
                loss = loss_of(batch)
            loss.backward()
            losses.append(loss.item())
    return losses, np.concatenate([p.grad.numpy().reshape(-1) for p in gpt.parameters() if p.grad is not None])


def random_text(length: int) -> Corpus:
    """Letters drawn from 65."""
    text = "".join(map(chr, np.random.default_rng(0).integers(48, 48 + 65, length)))
    return Corpus(text, "random letters", hashlib.sha256(text.encode()).hexdigest(), Path("random letters"))


def trainer(sizes: Sizes, folder: Path, resumed: Any = None, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {"device": "cuda", "sample_tokens": 0, "wandb": False, "eval_interval": sizes.steps}
    config = replace(sizes.training, **{**settings, "max_steps": sizes.steps, **changes})
    return Trainer(config, random_text(40 * config.block_size), folder, resumed)


def differences(a: Trainer, b: Trainer) -> str:
    """Which weights and moments of two trainers are not the same bits; empty where all are."""
    arrays = []
    for t in (a, b):
        moments = t.optimizer.state_dict()
        arrays.append([*t.model.state_dict().values(), *moments["exp_avg"], *moments["exp_avg_sq"]])
    wrong = sum(x.tobytes() != y.tobytes() for x, y in zip(*arrays, strict=True))
    return f"{wrong} of {len(arrays[0])} arrays differ" if wrong else ""


def bits(sizes: Sizes) -> list[Check]:
    """Training steps as a graph, as a graph again, and launch by launch."""

    def trained(precision: Any, graph: bool) -> tuple[Trainer, list[tuple[float, float]]]:
        t, made = trainer(sizes, Path("nowhere"), precision=precision, cuda_graph=graph), []
        for _ in range(sizes.steps):
            made.append(t.train_step(1e-3)[:2])
            t.step += 1
        return t, made

    def found(precision: Any, graph: bool) -> tuple[str, bool]:
        (a, first), (b, second) = trained(precision, True), trained(precision, graph)
        apart = [i for i, (x, y) in enumerate(zip(first, second, strict=True)) if x != y]
        wrong = f"losses differ from step {apart[0] + 1} on" if apart else differences(a, b)
        return wrong or f"the same, loss {first[-1][0]:.4f}", not wrong and bool(np.isfinite(first).all())

    checks = []
    for precision in PRECISIONS:
        for graph, name in ((True, "the same run twice"), (False, "a graph and launch by launch")):
            what, find = f"{sizes.steps} steps in {precision}: {name}", functools.partial(found, precision, graph)
            checks.append(attempt(what, "the same bits", find))
    return checks


class _StopAt(Quiet):
    """Asks the run to stop after a step."""

    def __init__(self, run: Trainer, step: int) -> None:
        self.run, self.last = run, step

    def step(self, row: dict[str, Any], anomaly: str = "") -> None:
        if row["step"] == self.last:
            self.run.stop.received = "this check"


def resuming(sizes: Sizes) -> list[Check]:
    """A run of two layers at most that was stopped half-way and went on from its checkpoint, beside one left alone."""
    layers = {"n_layer": min(2, sizes.training.n_layer)}

    def found(precision: Any) -> tuple[str, bool]:
        with tempfile.TemporaryDirectory() as home:
            whole, part = Path(home, "whole"), Path(home, "part")
            for folder in (whole, part):
                folder.mkdir()
            alone, first = (trainer(sizes, folder, precision=precision, **layers) for folder in (whole, part))
            alone.train(Quiet())
            first.train(_StopAt(first, sizes.steps // 2))
            again = trainer(sizes, part, checkpoint.load_newest(part), precision=precision, **layers)
            begun = again.step
            again.train(Quiet())
        wrong = differences(alone, again) or ("" if alone.val_loss == again.val_loss else "validation losses differ")
        if not 0 < begun < alone.step == again.step:
            wrong = "it was not stopped"
        return wrong or f"the same, resumed at {begun}, validation loss {again.val_loss:.4f}", not wrong

    what, wanted = f"{sizes.steps} steps", "the same bits"
    return [attempt(f"{what} in {p}", wanted, functools.partial(found, p)) for p in PRECISIONS]


def waiting(sizes: Sizes) -> list[Check]:
    """A micro-step under `cupyx.allow_synchronize(False)`; its capture in a graph forbids more, and shows that too."""

    def found(graph: bool) -> tuple[str, bool]:
        import cupyx

        t = trainer(sizes, Path("nowhere"), precision="bf16", cuda_graph=graph)
        for _ in range(2):
            t.train_step(1e-3)
        t.optimizer.zero_grad(set_to_none=False)
        assert t.replayed
        with warnings.catch_warnings(action="ignore"), cupyx.allow_synchronize(False):
            loss = t.replayed(0, 0, t.starts(0))
        return f"loss {loss.item():.4f}", bool(np.isfinite(loss.item()))

    names = {True: "as a graph", False: "launch by launch"}
    return [attempt(name, "no wait", functools.partial(found, graph)) for graph, name in names.items()]
