"""Where time goes: every second counts once, for the innermost phase."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from minigpt.clock import Clock


@pytest.fixture(name="now")
def a_clock_of_ours(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_an_outer_phase_is_without_the_inner_ones(now: list[float]) -> None:
    clock = Clock()
    with clock.phase("backward"):
        now[0] += 3
        with clock.phase("forward"):
            now[0] += 2
        now[0] += 1
    assert (clock.seconds["backward"], clock.seconds["forward"]) == (4, 2)
    assert clock.summary() == "backward 67%, forward 33%"


def test_work_side_by_side_counts_divided_by_the_threads(now: list[float]) -> None:
    clock = Clock()
    with clock.phase("backward"), ThreadPoolExecutor(1) as pool:

        def shard() -> None:
            with clock.phase("forward", 2):
                now[0] += 4

        pool.submit(shard).result()
        now[0] += 1
    assert (clock.seconds["forward"], clock.seconds["backward"]) == (2, 3)


def test_a_phase_that_fails_counts(now: list[float]) -> None:
    clock = Clock()
    with pytest.raises(KeyError), clock.phase("checkpoint"):
        now[0] += 5
        raise KeyError
    assert clock.seconds["checkpoint"] == 5
