"""gradcheck and gradgradcheck find what is wrong, and say where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from tinytensor.autograd import Op, apply
from tinytensor.testing import GradientMismatch, gradcheck, gradgradcheck

X = np.array([[0.3, -0.7], [1.2, 0.4]])


class Square(Op):
    """y = x², with a derivative that is wrong at one element."""

    saves = "x"

    def forward(xp: Any, x: Any) -> Any:
        return x * x

    def vjp(g: Any, y: Any, x: Any) -> Any:
        error = np.zeros(x.shape)
        error[1, 0] = 0.01
        return 2 * g * (x + error)


class WrongTwice(Op):
    """y = x³, whose gradient is right and whose gradient's gradient is not: x² enters it as a constant."""

    saves = "x"

    def forward(xp: Any, x: Any) -> Any:
        return x**3

    def vjp(g: Any, y: Any, x: Any) -> Any:
        return 3 * g * (x.detach() if isinstance(x, tt.Tensor) else x) ** 2


class Forgetful(Op):
    """y = a·b that tells b nothing."""

    saves = "*"

    def forward(xp: Any, a: Any, b: Any) -> Any:
        return a * b

    def vjp(g: Any, y: Any, a: Any, b: Any) -> Any:
        return g * b, None


def test_the_worst_element_is_named() -> None:
    with pytest.raises(GradientMismatch, match=r"input 0: at \(1, 0\) autograd gives .*\(1 of 4 elements differ"):
        gradcheck(lambda x: apply(Square, x), [X])


def test_each_input_is_checked() -> None:
    assert gradcheck(lambda a, b: a * b, [X, X[0]])
    with pytest.raises(GradientMismatch, match="input 1: at"):
        gradcheck(lambda a, b: apply(Forgetful, a, b), [X, X])


def test_the_second_order_is_checked() -> None:
    assert gradcheck(lambda x: apply(WrongTwice, x), [X])
    with pytest.raises(GradientMismatch):
        gradgradcheck(lambda x: apply(WrongTwice, x), [X])
    assert gradgradcheck(lambda x: x**3, [X])


def test_a_missing_gradient_counts_as_zero() -> None:
    with pytest.raises(GradientMismatch, match="autograd gives 0, finite differences"):
        gradcheck(lambda x: x.detach() * 2, [X])
    assert gradcheck(lambda x: x.detach() * 0, [X]) and gradcheck(lambda x: x.argmax(), [X])
    assert gradgradcheck(lambda x: x.detach() * 0, [X]) and gradgradcheck(lambda x: x.sum(), [X])


def test_every_output_is_checked() -> None:
    assert gradcheck(lambda x: (x * 2, x.argmax(), x.exp()), [X])
    with pytest.raises(GradientMismatch):
        gradcheck(lambda x: (x * 2, apply(Square, x)), [X])


def test_an_error_that_cancels_in_a_plain_sum_is_found() -> None:
    class Swapped(Op):
        """y = 2x, its gradient given to the neighbour."""

        def forward(xp: Any, x: Any) -> Any:
            return x * 2

        def vjp(g: Any, y: Any, x: Any) -> Any:
            return np.flip(g, -1) * 2

    with pytest.raises(GradientMismatch):
        gradcheck(lambda x: apply(Swapped, x), [X])


def test_nan_is_a_mismatch() -> None:
    with pytest.raises(GradientMismatch), np.errstate(all="ignore"):
        gradcheck(lambda x: (x - x).sqrt(), [X])


def test_inputs() -> None:
    ids = np.array([1, 0])
    assert gradcheck(lambda w, ids: tt.embedding(w, ids), [X, ids])  # integers pass through
    leaf = tt.tensor(X, requires_grad=True)
    before = leaf.data.copy()
    assert gradcheck(lambda x: x.exp(), [leaf]) and leaf.grad is None
    np.testing.assert_array_equal(leaf.data, before)
    assert gradcheck(lambda x: x.sum(), [np.zeros((0, 3))]) and gradcheck(lambda x: x * x, [np.array(0.5)])
    with pytest.raises(ValueError, match="input 0 is float32; finite differences need float64"):
        gradcheck(lambda x: x, [X.astype(np.float32)])
    with tt.no_grad():
        assert gradgradcheck(lambda x: x.exp(), [X])  # records whatever the caller's mode
