"""The training loop."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tinytensor as tt
from minigpt import checkpoint
from minigpt.checkpoint import Checkpoint
from minigpt.clock import Clock
from minigpt.config import TrainConfig
from minigpt.data import Dataset
from minigpt.distributed import Ranks
from minigpt.gpt2 import Pretrained
from minigpt.model import GPT
from minigpt.sampling import Sampling, decoded, generate
from minigpt.schedule import warmup_cosine
from minigpt.signals import StopRequest
from minigpt.tokens import Text
from minigpt.tracking import Quiet
from tinytensor import backend, optim, parallel, random
from tinytensor.backend import Array
from tinytensor.graph import Replayed
from tinytensor.inspect import detect_anomaly

_COMPARE_EVERY = 200  # steps between two comparisons of all ranks' weights


class Step(NamedTuple):
    """What one optimiser step was: mean loss, gradient norm before clipping, whether any rank was asked to stop, and which op
    gave a number that is not finite, found at the first of several such steps in a row."""

    loss: float
    norm: float
    stop: bool
    anomaly: str


class Trainer:
    """One run: the model, its data, its optimiser, and the step it has reached."""

    def __init__(
        self,
        config: TrainConfig,
        corpus: Text,
        out_dir: Path,
        resumed: Checkpoint | None = None,
        ranks: Ranks | None = None,
        pretrained: Pretrained | None = None,
    ) -> None:
        before = resumed or pretrained
        self.tokenizer, ids = corpus.tokens(config, before.tokenizer if before else None)
        config = replace(config, tokenizer=config.tokenizer or self.tokenizer.kind)
        self.config, self.corpus, self.out_dir = config, corpus, out_dir
        self.ranks, self.stop = ranks or Ranks(), StopRequest()
        self.data = Dataset(ids, config.block_size, config.val_share).to(config.device)
        self.shards = config.resolved_shards()
        parts = config.accumulation * self.shards
        self.mine = self.ranks.share(parts)
        if not self.mine:
            raise ValueError(
                f"{self.ranks.size} ranks share {parts} shards, so some would have nothing to do; "
                "start fewer, or raise --shards, --micro-batch or --accumulation"
            )
        cores = self.cores = parallel.cpu_threads() if config.device == "cpu" else 1
        self.side_by_side = min(cores, len(self.mine))
        self.threads = cores if parts == 1 else self.side_by_side  # a single shard leaves the cores to BLAS
        with random.scope(config.seed):
            shape = config.model(self.tokenizer.vocab_size)
            self.model = (GPT.from_weights(shape, pretrained.weights) if pretrained else GPT(shape)).to(config.device)
        self.optimizer = optim.AdamW(
            self.model.parameter_groups(config.weight_decay), lr=config.lr, betas=(config.beta1, config.beta2)
        )
        self.replayed = Replayed(self.loss_at, config.seed, config.cuda_graph) if config.device == "cuda" else None
        self.clock = Clock()
        self.around_step: Callable[[], AbstractContextManager[None]] = nullcontext  # for whoever wants to look on
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.skipped = self.skipped_in_a_row = 0
        self.val_loss = self.best_val_loss = math.inf
        if resumed:
            self.model.load_state_dict(resumed.model)
            # without the saved groups, for the hyper-parameters are those of `config`
            self.optimizer.load_state_dict(resumed.optimizer | {"param_groups": [{}] * len(self.optimizer.param_groups)})
            self.step, self.tokens, self.seconds = resumed.step, resumed.tokens, resumed.seconds
            self.val_loss, self.best_val_loss = resumed.val_loss, resumed.best_val_loss
            self.skipped, self.skipped_in_a_row = resumed.skipped, resumed.skipped_in_a_row

    def train(self, tracker: Quiet) -> bool:
        """Train from the current step to max_steps, or until asked to stop; whether max_steps was reached."""
        config = self.config
        started = time.perf_counter() - self.seconds
        if self.step == 0:
            self.save()  # so that a run that is stopped at any time can be resumed
        else:
            self._compare_ranks()  # they may have read different checkpoints
        while self.step < config.max_steps:
            lr = warmup_cosine(self.step, config.lr, config.min_lr, config.warmup_steps, config.max_steps)
            with self.around_step():
                made = self.train_step(lr)
            self.step += 1
            self.tokens += config.tokens_per_step
            self.seconds = time.perf_counter() - started
            evaluated = self.step % config.eval_interval == 0 or self.step == config.max_steps
            if evaluated:
                self.val_loss = self.evaluate()
            tracker.step(self.row(made, lr, self.val_loss if evaluated else None), made.anomaly)
            if evaluated:
                tracker.sample(self.step, self.sample())
            if evaluated or made.stop or (config.save_interval and self.step % config.save_interval == 0):
                self.seconds = time.perf_counter() - started
                self.save()
            if made.stop or (evaluated and any(self.ranks.gather([self.stop.received is not None]))):
                break
        self.ranks.at_rest()
        return self.step >= config.max_steps

    def train_step(self, lr: float) -> Step:
        """One optimiser step on `accumulation` micro-batches."""
        config, clock = self.config, self.clock
        with clock.phase("backward"):
            losses = self.gradients()
        with clock.phase("exchange"):
            gathered = self.ranks.gather([(losses, self.stop.received is not None)])
            self.ranks.add_up(self.optimizer)
        with clock.phase("optimiser"), np.errstate(invalid="ignore"):  # an infinite gradient times 0
            loss, anomaly = sum(part for losses, _ in gathered for part in losses), ""
            norm = optim.clip_grad_norm_(self.model.parameters(), config.grad_clip)
            if math.isfinite(loss + norm):
                self.skipped_in_a_row = 0
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                self.optimizer.step()
            else:  # the same numbers on every rank, so every rank leaves this update out
                anomaly = self._skip(loss, norm, lr)
        if self.step % _COMPARE_EVERY == 0:
            self._compare_ranks()
        return Step(loss, norm, any(stopping for _, stopping in gathered), anomaly)

    def row(self, made: Step, lr: float, val_loss: float | None) -> dict[str, Any]:
        """The line of metrics.jsonl for the step just made."""
        return {
            "step": self.step,
            "train_loss": made.loss,
            "val_loss": val_loss,
            "lr": lr,
            "grad_norm": made.norm,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "skipped": self.skipped,
        }

    def gradients(self) -> list[float]:
        """Make the gradient of this rank's shards, a few rows of one micro-batch each; their shares of the step's mean loss."""
        if self.replayed is None:
            self.model.zero_grad()
            return parallel.backward(self.shard_loss, self.mine, self.threads)
        self.optimizer.zero_grad(set_to_none=False)
        losses = [self.replayed(self.step, shard, self.starts(shard)) for shard in self.mine]
        return [loss.item() for loss in losses]  # after all are under way: the device is waited for once

    def shard_loss(self, shard: int) -> tt.Tensor:
        with self.clock.phase("data", self.side_by_side):
            starts = backend.to_device(self.starts(shard), self.config.device)
        with self.clock.phase("forward", self.side_by_side), random.scope(self.config.seed, self.step, shard):
            return self.loss_at(starts)

    def starts(self, shard: int) -> np.ndarray:
        """Where the rows of a shard begin in the text."""
        micro_step, part = divmod(shard, self.shards)
        starts = self.data.starts(self.config.seed, self.step, micro_step, self.config.micro_batch)
        return starts[part * len(starts) // self.shards : (part + 1) * len(starts) // self.shards]

    def loss_at(self, starts: Array) -> tt.Tensor:
        """The share of a step's mean loss that comes from these rows."""
        return self.loss(*self.data.windows(starts)) * (len(starts) * self.config.block_size / self.config.tokens_per_step)

    def loss(self, x: Array, y: Array) -> tt.Tensor:
        with tt.precision(self.config.precision):
            return self.model(x, y)[1]

    def _skip(self, loss: float, norm: float, lr: float) -> str:
        self.skipped += 1
        self.skipped_in_a_row += 1
        last = self.skipped_in_a_row >= self.config.max_skipped
        if not last and self.skipped_in_a_row > 1:
            return ""
        found = [place for place in self.ranks.gather([self._anomaly()]) if place]
        anomaly = found[0] if found else "no op by itself, but the sum of all gradients or of their squares"
        if last:
            raise FloatingPointError(
                f"the loss of step {self.step + 1} is {loss} and its gradient norm {norm}, not finite for "
                f"{self.skipped_in_a_row} steps in a row; go on from the last checkpoint with --resume and a smaller --lr "
                f"than {lr:g}. What was not finite first: {anomaly}"
            )
        return anomaly

    def _anomaly(self) -> str:
        """Which op of this rank's shards first gives something that is not finite; found by making them once more."""
        for shard in self.mine:
            try:
                with detect_anomaly():
                    self.shard_loss(shard).backward()
            except FloatingPointError as error:
                return str(error)
        return ""

    def _compare_ranks(self) -> None:
        """Stop when the ranks' weights differ, which no sequence of correct steps can make them do."""
        if self.ranks.size == 1:
            return
        names = [name for name, _ in self.model.named_parameters()]
        hashes = [hashlib.sha256(backend.to_device(p.data, "cpu").tobytes()).digest() for p in self.model.parameters()]
        for rank, theirs in enumerate(self.ranks.gather([hashes])):
            for name, own, other in zip(names, hashes, theirs, strict=True):
                if own != other:
                    raise RuntimeError(
                        f"the weights {name} of ranks {self.ranks.rank} and {rank} differ: they read different checkpoints, "
                        "run different versions, or one computes wrongly; go on from the last checkpoint with --resume"
                    )

    def evaluate(self) -> float:
        """Mean loss in nats per token over the whole validation split."""

        def total(batch: tuple[np.ndarray, np.ndarray]) -> float:
            return self.loss(*batch).item() * batch[1].size

        self.model.eval()
        with tt.no_grad(), self.clock.phase("evaluation"):
            batches = list(self.data.validation(rows=max(1, 2048 // self.config.block_size)))
            mine = [batches[i] for i in self.ranks.share(len(batches))]
            threads = min(self.cores, len(mine)) or 1  # one batch: one thread of BLAS, for two may round otherwise
            totals = self.ranks.gather(parallel.map(total, mine, threads))
        self.model.train()
        return sum(totals) / (len(self.data.val) - 1)

    def sample(self) -> str:
        """Verse from the model as it is now."""
        try:
            prompt = self.tokenizer.encode("\n")
        except ValueError:  # a text of one line
            prompt = self.data.val[:1]

        def write() -> list[int]:
            return list(generate(self.model, prompt, self.config.sample_tokens, Sampling(seed=self.config.seed)))

        self.model.eval()
        with self.clock.phase("evaluation"), parallel.limited(1):  # more may round otherwise
            ids = self.ranks.first(write)
        self.model.train()
        return "".join(decoded(self.tokenizer, ids))

    def save(self) -> None:
        """Write the last checkpoint, and the best when this is it."""
        best = self.val_loss < self.best_val_loss
        self.best_val_loss = min(self.best_val_loss, self.val_loss)  # in this order a NaN changes nothing

        def write() -> None:
            state = Checkpoint(
                config=self.config,
                tokenizer=self.tokenizer,
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                step=self.step,
                tokens=self.tokens,
                seconds=self.seconds,
                val_loss=self.val_loss,
                best_val_loss=self.best_val_loss,
                skipped=self.skipped,
                skipped_in_a_row=self.skipped_in_a_row,
                text_sha256=self.corpus.sha256,
            )
            for name, array in state.model.items():
                if not np.isfinite(array).all():  # one update can do that, where lr · weight_decay is absurd
                    raise FloatingPointError(
                        f"the weights {name} are not finite after step {self.step}, which is not saved; go on from the last "
                        "checkpoint with --resume and a smaller --lr or --weight-decay"
                    )
            # best first: whoever is killed in between goes on from the older last, and comes by here again
            for name in (checkpoint.BEST, checkpoint.LAST) if best else (checkpoint.LAST,):
                checkpoint.save(self.out_dir / name, state)

        self._compare_ranks()
        with self.clock.phase("checkpoint"):
            self.ranks.first(write)
