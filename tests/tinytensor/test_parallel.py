"""Shards in threads: the same sum whatever their number, and errors that arrive."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from tinytensor import nn, parallel
from tinytensor.backend import random


def problem() -> tuple[nn.Sequential, list[tt.Tensor]]:
    model = nn.Sequential(nn.Linear(48, 96), nn.LayerNorm(96), nn.Linear(96, 8))
    rng = np.random.default_rng(0)
    return model, [tt.tensor(rng.normal(size=(40, 48)), "float32") for _ in range(5)]


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
@pytest.mark.parametrize("flat", [False, True])
def test_the_gradient_is_the_sum_whatever_the_threads(shards: int, flat: bool) -> None:
    model, inputs = problem()
    if flat:
        tt.optim.SGD(model.parameters())
    loss_of = lambda x: (model(x) ** 2).mean()  # noqa: E731
    for x in inputs[:shards]:
        loss_of(x).backward()
    expected = [p.grad.data.copy() for p in model.parameters()]
    results = []
    for threads in (1, 2, 4):
        model.zero_grad()
        losses = parallel.backward(loss_of, inputs[:shards], threads)
        assert losses == [loss_of(x).item() for x in inputs[:shards]]
        results.append([p.grad.data.copy() for p in model.parameters()])
    for one, *others, plain in zip(*results, expected, strict=True):
        np.testing.assert_allclose(one, plain, 1e-4, 1e-6)
        assert all(one.tobytes() == other.tobytes() for other in others)
    if flat:
        assert all(p.grad.data is p.node.slot for p in model.parameters())
    parallel.backward(loss_of, inputs[:shards], 2)  # gradients add up
    for p, plain in zip(model.parameters(), expected, strict=True):
        np.testing.assert_allclose(p.grad.data, 2 * plain, 1e-4, 2e-6)


def test_a_parameter_that_only_some_shards_use() -> None:
    a, b = nn.Parameter(np.ones(2, np.float32)), nn.Parameter(np.ones(2, np.float32))
    losses = parallel.backward(lambda use: (a * 2 + b * 3 if use else a * 2).sum(), [False, True, False], 2)
    assert losses == [4, 10, 4]
    assert a.grad.tolist() == [6, 6] and b.grad.tolist() == [3, 3]
    assert parallel.backward(lambda x: x, []) == []


def test_dropout_depends_on_the_shard_alone() -> None:
    w = nn.Parameter(np.ones(100, np.float32))

    def loss_of(i: int) -> tt.Tensor:
        with random.scope(3, 0, i):
            return tt.dropout(w, 0.5).sum()

    results = []
    for threads in (1, 3):
        w.grad = None
        parallel.backward(loss_of, range(6), threads)
        results.append(w.grad.tolist())
    assert results[0] == results[1]


def test_map() -> None:
    seen = set()

    def f(i: int) -> Any:
        seen.add(threading.get_ident())
        return i * i, tt.is_grad_enabled(), parallel.map(lambda j: i + j, [1, 2])

    with tt.no_grad():
        results = parallel.map(f, range(20), threads=3)
    assert results == [(i * i, False, [i + 1, i + 2]) for i in range(20)]
    assert tt.is_grad_enabled() and parallel.map(f, []) == []


def test_an_error_in_a_shard_arrives() -> None:
    w = nn.Parameter(np.ones(2, np.float32))

    def loss_of(i: int) -> tt.Tensor:
        if i == 2:
            raise KeyError("shard 2")
        return w.sum()

    for threads in (1, 2):
        with pytest.raises(KeyError, match="shard 2"):
            parallel.backward(loss_of, range(4), threads)
        assert w.grad is None
    assert parallel.backward(lambda i: w.sum(), range(2), 2) == [2, 2] and w.grad.tolist() == [2, 2]


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_the_number_of_threads_must_be_a_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYTENSOR_NUM_THREADS", value)
    with pytest.raises(ValueError, match=r"TINYTENSOR_NUM_THREADS=.* must be a whole number of at least 1"):
        parallel.cpu_threads()
    monkeypatch.setenv("TINYTENSOR_NUM_THREADS", "3")
    assert parallel.cpu_threads() == 3


def test_blas_gets_its_threads_back_when_maps_overlap() -> None:
    from threadpoolctl import threadpool_info

    def threads() -> list[int]:
        return [p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas" and "numpy" in p["filepath"]]

    before, first_in, second_in, first_out = threads(), *(threading.Event() for _ in range(3))

    def first() -> None:
        parallel.map(lambda _: (first_in.set(), second_in.wait(10)), [0, 1], 1)
        first_out.set()

    other = threading.Thread(target=first)
    other.start()
    first_in.wait(10)
    within = parallel.map(lambda _: (second_in.set(), first_out.wait(10), threads())[2], [0, 1], 1)
    other.join()
    assert within == [[1] * len(before)] * 2
    assert threads() == before
