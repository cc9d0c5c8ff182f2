"""Writing in place: the same as in PyTorch, or refused with the lines that it is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tinytensor as tt
from tests.tinytensor.small import close, leaf, line

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore:.*torch.jit.script")]


def inplace_cases() -> dict[str, Callable[[Any, Any], Any]]:
    """f(library, leaf) → loss, the same code in both libraries; `y = x·2` is an interior result."""

    def number(lib: Any, x: Any) -> Any:
        y = x * 2
        y += 3
        y -= 1
        y *= 0.5
        y /= 4
        return (y * y).sum()

    def tensors(lib: Any, x: Any) -> Any:
        y = x * 2
        y += x
        y *= x
        y -= x * x
        y /= x + 9
        return (y * y).sum()

    def constants_first(lib: Any, x: Any) -> Any:
        y = lib.zeros(3, dtype=x.dtype) if lib is torch else lib.zeros(3, dtype="float64")
        y += x
        y[1] = x[0] * 3
        y[2:] = x[1:2]
        return (y * y).sum()

    def items(lib: Any, x: Any) -> Any:
        y = x * 2
        y[0] = 5.0
        y[1:] = x[:2] * 3
        y[[0, 2]] = x[1]
        return (y * y * x).sum()

    def mask(lib: Any, x: Any) -> Any:
        y = x * 2
        y[x > 0] = 0.0
        y[x <= 0] = x[0]
        return (y * y).sum()

    def after_a_use_that_saves_nothing(lib: Any, x: Any) -> Any:
        y = x * 2
        z = y + 1
        y += 10
        return (z * y).sum()

    def input_of_exp(lib: Any, x: Any) -> Any:
        y = x * 2
        z = y.exp()
        y *= 3
        return (z * y).sum()

    def leaf_under_no_grad(lib: Any, x: Any) -> Any:
        with lib.no_grad():
            x += 1
            x[0] = 2.0
        return (x**3).sum()

    def a_clone_of_a_leaf(lib: Any, x: Any) -> Any:
        y = x.clone()
        y += x
        y[0] = 0.0
        return (y * y * x).sum()

    def with_itself(lib: Any, x: Any) -> Any:
        y = x * 2
        y += y
        return (y * y).sum()

    def two_names(lib: Any, x: Any) -> Any:
        y = x * 2
        z = y
        y += 1
        return (z * y).sum()

    def a_write_into_what_was_never_saved(lib: Any, x: Any) -> Any:
        y = x * 2
        y.detach()[0] = 7.0
        return y.detach().sum() * x.sum()

    return {name: f for name, f in locals().items() if callable(f)}


@pytest.mark.parametrize("name", inplace_cases())
def test_writes_in_place_equal_torch(name: str) -> None:
    f, values = inplace_cases()[name], [0.7, -1.2, 0.4]
    x, y = leaf(values), torch.tensor(values, dtype=torch.float64, requires_grad=True)
    ours, theirs = f(tt, x), f(torch, y)
    close(ours, theirs)
    ours.backward()
    theirs.backward()
    close(x.grad, y.grad)


def refused_cases() -> dict[str, Callable[[Any, Any], Any]]:
    """The same, where both libraries must refuse: a gradient needs what was overwritten."""

    def leaf_itself(lib: Any, x: Any) -> Any:
        x += 1

    def leaf_item(lib: Any, x: Any) -> Any:
        x[0] = 1.0

    def output_of_exp(lib: Any, x: Any) -> Any:
        y = x.exp()
        z = y * 1
        y += 1
        return z.sum()

    def factor(lib: Any, x: Any) -> Any:
        y = x * 2
        z = x * y
        y[0] = 0.0
        return z.sum()

    def through_a_view(lib: Any, x: Any) -> Any:
        y = x * 2
        z = x * y
        with lib.no_grad():
            y[1:].reshape(2)[0:1] += 1
        return z.sum()

    def through_a_detached_twin(lib: Any, x: Any) -> Any:
        y = x * 2
        z = x * y
        twin = y.detach()
        twin *= 2
        return z.sum()

    def constant_factor(lib: Any, x: Any) -> Any:
        c = x.detach() * 1
        z = x * c
        c[0] = 9.0
        return z.sum()

    def index(lib: Any, x: Any) -> Any:
        ids = lib.tensor([0, 2])
        z = x[ids] * x[ids]
        ids[0] = 1
        return z.sum()

    return {name: f for name, f in locals().items() if callable(f)}


@pytest.mark.parametrize("name", refused_cases())
def test_writes_that_spoil_a_gradient_are_refused_as_in_torch(name: str) -> None:
    f, values = refused_cases()[name], [0.7, -1.2, 0.4]
    with pytest.raises(RuntimeError):
        f(torch, torch.tensor(values, dtype=torch.float64, requires_grad=True)).backward()
    x = leaf(values)
    with pytest.raises(RuntimeError, match=r"in-place write|wrote into it in place"):
        f(tt, x).backward()
    if not name.startswith("leaf"):
        assert x.grad is None


def test_the_error_names_op_and_both_lines() -> None:
    x = leaf([1.0, 2.0])
    y = x * 2
    saved, wrote = line() + 1, line() + 2
    z = x * y
    y += 1
    place = r".*test_writes\.py:"
    message = rf"mul at {place}{saved} saved an array of shape \(2,\) .* and {place}{wrote} wrote into it in place"
    with pytest.raises(RuntimeError, match=message):
        z.sum().backward()


def test_writes_to_leaves_and_views_name_the_line() -> None:
    x = leaf([[1.0, 2.0]])
    with pytest.raises(RuntimeError, match=rf"in-place write at .*test_writes\.py:{line() + 1} to a leaf"):
        x += 1
    y = x * 2
    row = y[0]
    with pytest.raises(RuntimeError, match=rf"test_writes\.py:{line() + 1} to a view of shape \(2,\)"):
        row += 1
    assert y.tolist() == [[2, 4]]


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.detach().__iadd__(1),
        lambda y: tt.Tensor(y.data[1:]).__imul__(0),
        lambda y: tt.Tensor(y.data.reshape(3, 1)[::2]).__setitem__(0, 1.0),
        lambda y: tt.Tensor(y.data[::-1]).__setitem__(slice(0, 1), 1.0),
    ],
    ids=["twin", "slice", "strided", "reversed"],
)
def test_a_result_written_elsewhere_is_not_used_again(write: Callable[..., Any]) -> None:
    """Neither by a derivative that saved it, nor by a new op that would take the old gradient for the new values."""
    x = leaf([1.0, 2.0, 3.0])
    y = x * 2
    z = y * y
    write(y)
    with pytest.raises(RuntimeError, match=r"mul at .* saved an array of shape \(3,\)"):
        z.sum().backward()
    with pytest.raises(RuntimeError, match=r"a result of shape \(3,\) made at .* was written in place by .*test_writes"):
        y.sum()


def test_a_view_taken_before_a_write_is_not_used_after_it() -> None:
    x = leaf([1.0, 2.0, 3.0])
    y = x * 2
    v = y[:2]
    y += 1
    with pytest.raises(RuntimeError, match=r"a result of shape \(2,\) .* was written in place"):
        v * 2
    (y[:2] * 3).sum().backward()
    assert x.grad.tolist() == [6, 6, 0]


def test_a_write_beside_what_was_saved_is_no_error() -> None:
    x, b = leaf([1.0, 2.0]), tt.zeros(6, dtype="float64")
    y = x * b[:2]
    tt.Tensor(b.data[2:])[...] = 5.0
    y.sum().backward()
    assert x.grad.tolist() == [0, 0]
    y = x * b[2:4]
    for i in range(100):  # more places than the log keeps apart
        tt.Tensor(b.data[4 + i % 2 :])[0] = float(i)
    y.sum().backward()
    y = x * b[:2]
    for i in range(100):
        tt.Tensor(b.data[i % 6 : i % 6 + 1])[...] = 1.0
    with pytest.raises(RuntimeError, match="wrote into it"):
        y.sum().backward()


@pytest.mark.parametrize(
    "op",
    [
        lambda w, ids: tt.embedding(w, ids).sum(),
        lambda w, ids: tt.cross_entropy(w[:3], ids),
        lambda w, ids: tt.gather(w, 0, tt.Tensor(np.stack([ids.data] * 3, 1))).sum() + w[ids].sum(),
        lambda w, ids: w[ids, 0].sum(),
    ],
    ids=["embedding", "cross_entropy", "gather", "getitem"],
)
def test_integers_that_a_gradient_needs_are_watched_too(op: Callable[..., Any]) -> None:
    w, ids = leaf(np.random.default_rng(0).normal(size=(4, 3))), tt.tensor([0, 2, 1])
    loss = op(w, ids)
    ids[0] = 1
    with pytest.raises(RuntimeError, match="wrote into it in place"):
        loss.backward()


def test_an_in_place_result_must_fit() -> None:
    x = tt.tensor([1, 2])
    with pytest.raises(ValueError, match=r"in-place result of shape \(2,\), float32 does not fit into \(2,\), int64"):
        x += 1.5
    y = leaf([1.0, 2.0]) * 1
    with pytest.raises(ValueError, match=r"does not fit into \(2,\), float64"):
        y += tt.ones(3, 2)
    assert x.tolist() == [1, 2] and y.tolist() == [1, 2]


def test_what_linear_returns_may_be_written_in_place() -> None:
    x, w = tt.ones(2, 3, requires_grad=True), tt.ones(4, 3, requires_grad=True)
    h = tt.linear(x, w)
    h += 1
    h.sum().backward()
    assert h.tolist() == [[4] * 4] * 2 and x.grad.tolist() == [[4] * 3] * 2


def test_a_result_written_behind_its_back_is_not_written_on() -> None:
    h = leaf([3.0]) * 2
    with tt.no_grad():
        h *= 2
    with pytest.raises(RuntimeError, match=r"was written in place by .* its gradient is no longer known"):
        h *= 3
    assert h.item() == 12

    def into_a_list(hs: list[tt.Tensor]) -> tt.Tensor:
        hs[0] += 1
        return hs[0] * hs[0]

    h = leaf([2.0, 3.0]) * 1
    with pytest.raises(RuntimeError, match=r"written in place|wrote into it"):
        tt.checkpoint(into_a_list, [h]).sum().backward()
