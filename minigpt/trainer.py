"""The training loop."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

import tinytensor as tt
from minigpt import checkpoint
from minigpt.checkpoint import Checkpoint
from minigpt.config import TrainConfig
from minigpt.corpus import Corpus
from minigpt.data import Dataset
from minigpt.model import GPT
from minigpt.sampling import Sampling, generate
from minigpt.schedule import warmup_cosine
from minigpt.tokenizer import make_tokenizer
from minigpt.tracking import Tracker
from tinytensor import optim, parallel, random


class Trainer:
    """One run: the model, its data, its optimiser, and the step it has reached."""

    def __init__(self, config: TrainConfig, corpus: Corpus, out_dir: Path, resumed: Checkpoint | None = None) -> None:
        self.config, self.corpus, self.out_dir = config, corpus, out_dir
        self.tokenizer = resumed.tokenizer if resumed else make_tokenizer(config.tokenizer, corpus.text)
        self.data = Dataset(self.tokenizer.encode(corpus.text), config.block_size)
        with random.scope(config.seed):
            self.model = GPT(config.model(self.tokenizer.vocab_size)).to(config.device)
        self.shards = config.resolved_shards()
        self.optimizer = optim.AdamW(
            self.model.parameter_groups(config.weight_decay), lr=config.lr, betas=(config.beta1, config.beta2)
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.val_loss = self.best_val_loss = math.inf
        if resumed:
            self.model.load_state_dict(resumed.model)
            # without the saved groups, for the hyper-parameters are those of `config`
            self.optimizer.load_state_dict(resumed.optimizer | {"param_groups": [{}] * len(self.optimizer.param_groups)})
            self.step, self.tokens, self.seconds = resumed.step, resumed.tokens, resumed.seconds
            self.val_loss, self.best_val_loss = resumed.val_loss, resumed.best_val_loss

    def train(self, tracker: Tracker) -> None:
        """Train from the current step to max_steps."""
        config = self.config
        started = time.perf_counter() - self.seconds
        if self.step == 0:
            self.save()  # so that a run that is stopped at any time can be resumed
        while self.step < config.max_steps:
            lr = warmup_cosine(self.step, config.lr, config.min_lr, config.warmup_steps, config.max_steps)
            loss, norm = self.train_step(lr)
            self.step += 1
            self.tokens += config.tokens_per_step
            self.seconds = time.perf_counter() - started
            tracker.step(self.step, loss, lr, norm, self.tokens, self.seconds)
            if self.step % config.eval_interval == 0 or self.step == config.max_steps:
                self.val_loss = self.evaluate()
                self.seconds = time.perf_counter() - started
                tracker.evaluation(self.step, self.val_loss, self.tokens, self.seconds, self.sample())
                self.save()

    def train_step(self, lr: float) -> tuple[float, float]:
        """One optimiser step on `accumulation` micro-batches; its loss and the gradient norm before clipping."""
        config = self.config
        self.model.zero_grad()
        losses = parallel.backward(self.shard_loss, range(config.accumulation * self.shards), config.threads)
        norm = optim.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        if not math.isfinite(sum(losses) + norm):  # before it reaches the weights
            raise FloatingPointError(
                f"the loss of step {self.step} is {sum(losses)} and its gradient norm {norm}; go on from the last checkpoint "
                f"with --resume and a smaller --lr than {config.lr:g}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return sum(losses), norm

    def shard_loss(self, shard: int) -> tt.Tensor:
        """The share of a step's mean loss that comes from one shard, a few rows of one of its micro-batches."""
        config = self.config
        micro_step, part = divmod(shard, self.shards)
        x, y = self.data.batch(config.seed, self.step, micro_step, config.micro_batch)
        rows = slice(part * len(x) // self.shards, (part + 1) * len(x) // self.shards)
        with random.scope(config.seed, self.step, shard):
            _, loss = self.model(x[rows], y[rows])
        return loss * (y[rows].size / config.tokens_per_step)

    def evaluate(self) -> float:
        """Mean loss in nats per token over the whole validation split."""

        def total(batch: tuple[np.ndarray, np.ndarray]) -> float:
            return self.model(*batch)[1].item() * batch[1].size

        self.model.eval()
        with tt.no_grad():
            batches = self.data.validation(rows=max(1, 2048 // self.config.block_size))
            totals = parallel.map(total, batches, self.config.threads)
        self.model.train()
        return sum(totals) / (len(self.data.val) - 1)

    def sample(self) -> str:
        """Verse from the model as it is now."""
        try:
            prompt = self.tokenizer.encode("\n")
        except ValueError:  # a text of one line
            prompt = self.data.val[:1]
        self.model.eval()
        ids = list(generate(self.model, prompt, self.config.sample_tokens, Sampling(seed=self.config.seed)))
        self.model.train()
        return self.tokenizer.decode(ids)

    def save(self) -> None:
        """Write the last checkpoint, and the best when this is it."""
        best = self.val_loss < self.best_val_loss
        self.best_val_loss = min(self.best_val_loss, self.val_loss)  # in this order a NaN changes nothing
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
            text_sha256=self.corpus.sha256,
        )
        # best first: whoever is killed in between goes on from the older last, and comes by here again
        for name in (checkpoint.BEST, checkpoint.LAST) if best else (checkpoint.LAST,):
            checkpoint.save(self.out_dir / name, state)
