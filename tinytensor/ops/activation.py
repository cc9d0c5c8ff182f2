"""The nonlinearities of neural networks and their derivatives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tinytensor.autograd import Op, apply, as_value, call
from tinytensor.ops.elementwise import add, floating, mul, where

if TYPE_CHECKING:
    from tinytensor.tensor import Tensor


class Sigmoid(Op):
    """y = σ(x) = 1/(1 + e⁻ˣ);  dy/dx = y(1 − y)"""

    saves = "y"

    def forward(xp, x):
        e = xp.exp(-xp.abs(x))  # never overflows
        return xp.where(x >= 0, 1, e) / (1 + e)

    def vjp(g, y, x):
        return g * y * (1 - y)


class Erf(Op):
    """y = erf x = 2/√π ∫₀ˣ e^(−t²) dt;  dy/dx = 2/√π · e^(−x²)

    With t = 2/(2 + |x|), erf x = sign(x)·(1 − t·exp(−x² + P(t))), P a Chebyshev series: absolute error below 4·10⁻¹⁶.
    """

    saves = "x"

    def forward(xp, x):
        if xp is not np:
            from cupyx.scipy.special import erf

            return erf(x)
        z = np.abs(np.asarray(x, np.float64))
        t = 2 / (2 + z)
        tail = t * np.exp(-z * z + np.polynomial.chebyshev.chebval(2 * t - 1, _ERFC))
        return np.copysign(1 - tail, x).astype(getattr(x, "dtype", np.float64))

    def vjp(g, y, x):
        return g * (2 / math.sqrt(math.pi)) * np.exp(-x * x)


class Relu(Op):
    """y = max(x, 0);  dy/dx = 1 where x > 0, else 0"""

    saves = "y"

    def forward(xp, x):
        return xp.maximum(x, 0)

    def vjp(g, y, x):
        return g * (y > 0)


class Gelu(Op):
    """y = x/2·(1 + tanh u), u = c(x + a·x³), c = √(2/π), a = 0.044715  (Hendrycks & Gimpel 2016, GPT-2's form)

    dy/dx = (1 + t)/2 + x/2·(1 − t²)·c(1 + 3a·x²),  t = tanh u
    """

    saves = "x"

    def forward(xp, x):
        return 0.5 * x * (1 + xp.tanh(_GELU_C * (x + _GELU_A * x * x * x)))

    def vjp(g, y, x):
        t = np.tanh(_GELU_C * (x + _GELU_A * x * x * x))
        return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (_GELU_C * (1 + 3 * _GELU_A * x * x)))


class Softplus(Op):
    """y = ln(1 + eˣ);  dy/dx = σ(x)"""

    saves = "x"

    def forward(xp, x):
        return xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x)))

    def vjp(g, y, x):
        return g * call(Sigmoid, x)


_GELU_C, _GELU_A = math.sqrt(2 / math.pi), 0.044715
_ERFC = [  # Chebyshev coefficients of P on t ∈ [0, 1], from erfc evaluated to 60 digits
    -0.6513268598908547,
    0.6419697923564902,
    0.01947647320418584,
    -0.009561514786808632,
    -0.0009465953444820369,
    0.0003668394978527614,
    4.252332480690777e-05,
    -2.027857811253424e-05,
    -1.624290004647026e-06,
    1.303655835580523e-06,
    1.562644172206614e-08,
    -8.523809591492654e-08,
    6.529054439098851e-09,
    5.059343495551469e-09,
    -9.913641564930331e-10,
    -2.273651222931836e-10,
    9.646791102015531e-11,
    2.39403808303908e-12,
    -6.886027526497527e-12,
    8.944879273090558e-13,
    3.13092139934302e-13,
    -1.127082236136679e-13,
    3.810905255036074e-16,
    7.106097613634408e-15,
    -1.523028201490814e-15,
    -9.457494567242474e-17,
    1.21023718877278e-16,
    -2.81666308300186e-17,
]


def sigmoid(x: Any) -> Tensor:
    """1/(1 + e⁻ˣ), without overflow."""
    return apply(Sigmoid, floating(x))


def erf(x: Any) -> Tensor:
    """The error function."""
    return apply(Erf, floating(x))


def relu(x: Any) -> Tensor:
    """max(x, 0)"""
    return apply(Relu, x)


def leaky_relu(x: Any, negative_slope: float = 0.01) -> Tensor:
    """x where x > 0, else negative_slope·x."""
    x = as_value(x)
    return where(x.data > 0, x, negative_slope * x)


def silu(x: Any) -> Tensor:
    """x·σ(x), also called swish."""
    return mul(x, sigmoid(x))


def gelu(x: Any, approximate: str = "tanh") -> Tensor:
    """Gaussian error linear unit: x·Φ(x). "tanh" is GPT-2's approximation, "none" the exact form with erf."""
    if approximate == "tanh":
        return apply(Gelu, floating(x))
    if approximate != "none":
        raise ValueError(f"gelu: approximate={approximate!r} is not known; use 'tanh' or 'none'")
    return mul(mul(x, 0.5), add(erf(mul(x, math.sqrt(0.5))), 1))


def softplus(x: Any) -> Tensor:
    """ln(1 + eˣ), without overflow."""
    return apply(Softplus, floating(x))
