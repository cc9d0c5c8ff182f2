"""The learning rate of every step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt.schedule import warmup_cosine

LR, MIN_LR, WARMUP, STEPS = 3e-4, 3e-5, 10, 110


def rate(step: int, warmup: int = WARMUP, steps: int = STEPS) -> float:
    return warmup_cosine(step, LR, MIN_LR, warmup, steps)


def test_warmup_is_a_straight_line_that_does_not_start_at_zero() -> None:
    assert rate(0) == pytest.approx(LR / 11)
    for step in range(WARMUP):
        assert rate(step + 1) - rate(step) == pytest.approx(LR / 11)
    assert rate(WARMUP) == LR


def test_then_half_a_cosine_leads_down_to_the_floor() -> None:
    assert rate(60) == pytest.approx((LR + MIN_LR) / 2)
    assert rate(35) == pytest.approx(MIN_LR + (LR - MIN_LR) * (2 + math.sqrt(2)) / 4)
    falling = [rate(step) for step in range(WARMUP, STEPS + 1)]
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) == len(falling)
    assert [rate(step) for step in (110, 111, 10**9)] == [MIN_LR] * 3
    assert MIN_LR < rate(109) < MIN_LR * 1.01  # no jump at the end


def test_torch_draws_the_same_curve() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (WARMUP + 1), total_iters=WARMUP)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARMUP, eta_min=MIN_LR)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[WARMUP])
    for step in range(STEPS):
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert rate(0, warmup=0) == LR
    assert rate(55, warmup=0) == pytest.approx((LR + MIN_LR) / 2)


def test_runs_too_short_for_a_curve_have_rates_too() -> None:
    assert rate(0, warmup=0, steps=0) == MIN_LR
    assert rate(0, warmup=0, steps=1) == LR
    assert rate(5, warmup=5, steps=5) == MIN_LR
    assert rate(3, warmup=10, steps=5) == pytest.approx(LR * 4 / 11)  # stopped while still warming up


@given(step=st.integers(0, 10**6), warmup=st.integers(0, 10**5), steps=st.integers(0, 10**6), floor=st.floats(0, 1))
def test_a_rate_is_positive_and_never_above_the_peak(step: int, warmup: int, steps: int, floor: float) -> None:
    value = warmup_cosine(step, 1.0, floor, warmup, steps)
    assert 0 <= value <= 1
    assert value > 0 or (floor == 0 and step >= warmup)
    assert step < warmup or value >= floor - 1e-12
