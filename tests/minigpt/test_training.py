"""The whole GPT in training, step by step against PyTorch: loss, gradients, clipping, schedule, AdamW."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tinytensor as tt
from minigpt.model import GPT
from minigpt.schedule import warmup_cosine
from minigpt.trainer import Trainer
from tests.minigpt.small import TINY, distance, trainer
from tests.minigpt.torch_gpt import ids, scatter_weights, torch_copy
from tinytensor import optim

STEPS = 30
TRAINING = replace(
    TINY, bias=True, max_steps=STEPS, accumulation=3, lr=2e-2, min_lr=2e-3, warmup_steps=5, weight_decay=0.1, grad_clip=1.0
)


def prepared(dtype: str, bias: bool) -> Trainer:
    """A trainer in any precision, with weights that leave nothing near zero."""
    made = trainer(**{**vars(TRAINING), "bias": bias})
    made.model.to(dtype)
    scatter_weights(made.model)
    made.optimizer = optim.AdamW(
        made.model.parameter_groups(TRAINING.weight_decay), lr=0.0, betas=(TRAINING.beta1, TRAINING.beta2)
    )
    return made


class Judge:
    """The same training, written with PyTorch's own optimiser, clipping and schedules."""

    def __init__(self, ours: Trainer) -> None:
        self.data, self.model = ours.data, torch_copy(ours.model)
        groups = [
            {"params": [p for p in self.model.parameters() if p.dim() >= 2], "weight_decay": TRAINING.weight_decay},
            {"params": [p for p in self.model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=TRAINING.lr, betas=(TRAINING.beta1, TRAINING.beta2), foreach=False)
        w = TRAINING.warmup_steps
        up = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1 / (w + 1), total_iters=w)
        down = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS - w, eta_min=TRAINING.min_lr)
        self.schedule = torch.optim.lr_scheduler.SequentialLR(self.optimizer, [up, down], milestones=[w])

    def train_step(self, step: int) -> tuple[float, float]:
        self.optimizer.zero_grad()
        total = 0.0
        for micro_step in range(TRAINING.accumulation):
            x, y = self.data.batch(TRAINING.seed, step, micro_step, TRAINING.micro_batch)
            _, loss = self.model(ids(x), ids(y))
            (loss / TRAINING.accumulation).backward()
            total += loss.item() / TRAINING.accumulation
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), TRAINING.grad_clip)
        self.optimizer.step()
        self.schedule.step()
        return total, float(norm)


def our_step(ours: Trainer) -> tuple[float, float]:
    lr = warmup_cosine(ours.step, TRAINING.lr, TRAINING.min_lr, TRAINING.warmup_steps, TRAINING.max_steps)
    result = ours.train_step(lr)
    ours.step += 1
    return result


@pytest.mark.parametrize("bias", [True, False])
def test_thirty_steps_in_float64_are_those_of_torch(bias: bool) -> None:
    ours = prepared("float64", bias)
    judge = Judge(ours)
    norms = []
    for step in range(STEPS):
        (loss, norm, *_), (their_loss, their_norm) = our_step(ours), judge.train_step(step)
        assert loss == pytest.approx(their_loss, rel=1e-9), step
        assert norm == pytest.approx(their_norm, rel=1e-9), step
        norms.append(norm)
        gradients = np.concatenate([p.grad.numpy().ravel() for p in ours.model.parameters()])
        theirs = np.concatenate([p.grad.numpy().ravel() for p in judge.model.parameters()])
        assert distance(gradients, theirs) < 1e-9, step
    for (name, p), their_p in zip(ours.model.named_parameters(), judge.model.parameters(), strict=True):
        assert distance(p.numpy(), their_p.detach()) < 1e-9, name
    assert min(norms) < TRAINING.grad_clip < max(norms)  # some gradients were clipped, and some were not


def test_thirty_steps_in_float32_have_the_losses_of_torch() -> None:
    ours = prepared("float32", bias=False)
    judge = Judge(ours)
    for step in range(STEPS):
        loss, their_loss = our_step(ours)[0], judge.train_step(step)[0]
        assert loss == pytest.approx(their_loss, rel=1e-4), step


def test_micro_batches_have_the_gradient_of_one_large_batch() -> None:
    ours = prepared("float64", bias=True)
    ours.config = replace(ours.config, grad_clip=1e9)
    loss, norm, *_ = ours.train_step(0.0)
    gradients = [p.grad.numpy().copy() for p in ours.model.parameters()]
    batches = [ours.data.batch(TRAINING.seed, 0, micro_step, TRAINING.micro_batch) for micro_step in range(3)]
    ours.model.zero_grad()
    _, large = ours.model(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
    large.backward()
    assert loss == pytest.approx(large.item(), rel=1e-12)
    for gradient, (name, p) in zip(gradients, ours.model.named_parameters(), strict=True):
        assert distance(gradient, p.grad) < 1e-9, name
    assert norm == pytest.approx(np.sqrt(sum((g**2).sum() for g in gradients)), rel=1e-9)


def test_gradients_do_not_pile_up_over_steps() -> None:
    ours = prepared("float64", bias=True)
    assert ours.train_step(0.0) == ours.train_step(0.0)


def test_training_learns_the_text() -> None:
    ours = trainer(micro_batch=16, accumulation=1)
    before = ours.evaluate()
    assert before == pytest.approx(np.log(ours.tokenizer.vocab_size), abs=0.05)
    losses = [ours.train_step(1e-2)[0] for ours.step in range(120)]
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    assert ours.evaluate() < 0.5 * before


def test_threads_change_no_bit_and_shards_only_the_rounding() -> None:
    def losses(**changes: int) -> list[float]:
        made = trainer(micro_batch=5, dropout=0.0, **changes)
        return [made.train_step(1e-2)[0] for made.step in range(4)] + [made.evaluate()]

    one = losses(shards=3, threads=1)
    assert losses(shards=3, threads=2) == losses(shards=3, threads=5) == one
    for shards in (1, 2, 5, 99):
        assert losses(shards=shards) == pytest.approx(one, rel=1e-4)


def test_every_shard_draws_dropout_of_its_own() -> None:
    made = trainer(dropout=0.5, micro_batch=4, accumulation=2, shards=2)
    made.data.batch = lambda *_: (np.full((4, 8), 3), np.full((4, 8), 4))
    losses = {(made.step, shard): made.shard_loss(shard).item() for made.step in range(3) for shard in range(4)}
    assert len(set(losses.values())) == 12
    assert losses[2, 1] == made.shard_loss(1).item()


def test_the_weights_are_a_function_of_the_seed() -> None:
    def weights(seed: int) -> list[bytes]:
        return [a.tobytes() for a in trainer(seed=seed).model.state_dict().values()]

    assert weights(1) == weights(1) != weights(2)


def test_evaluation_is_the_mean_over_every_target_without_dropout() -> None:
    ours = trainer(dropout=0.5)
    scatter_weights(ours.model)
    val = ours.data.val
    judge = torch_copy(ours.model).double()
    total = 0.0
    for start in range(0, len(val) - 1, TINY.block_size):
        window = val[start : start + TINY.block_size + 1]
        _, loss = judge(ids(window[None, :-1]), ids(window[None, 1:]))
        total += loss.item() * (len(window) - 1)
    assert ours.evaluate() == pytest.approx(total / (len(val) - 1), rel=1e-5)
    assert ours.model.training


def test_evaluation_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, recording = trainer(), []
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *args: (recording.append(tt.is_grad_enabled()), forward(*args))[1])
    ours.evaluate()
    assert set(recording) == {False}
