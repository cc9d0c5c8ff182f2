"""Elementwise functions and their derivatives: a page of calculus.

Every class states y as a function of its inputs and the derivative, then says both in code with the same symbols; g is
∂L/∂y. Binary ops broadcast; the engine sums the gradient back over repeated axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tinytensor import backend
from tinytensor.autograd import Op, Value, apply, as_value, call

if TYPE_CHECKING:
    from tinytensor.tensor import Tensor


class Add(Op):
    """y = a + b;  ∂y/∂a = 1,  ∂y/∂b = 1"""

    def forward(xp, a, b):
        return a + b

    def vjp(g, y, a, b):
        return g, g


class Sub(Op):
    """y = a − b;  ∂y/∂a = 1,  ∂y/∂b = −1"""

    def forward(xp, a, b):
        return a - b

    def vjp(g, y, a, b):
        return g, lambda: -g


class Mul(Op):
    """y = a·b;  ∂y/∂a = b,  ∂y/∂b = a"""

    saves = {"a": "b", "b": "a"}

    def forward(xp, a, b):
        return a * b

    def vjp(g, y, a, b):
        return lambda: g * b, lambda: g * a


class Div(Op):
    """y = a/b;  ∂y/∂a = 1/b,  ∂y/∂b = −a/b² = −y/b"""

    saves = {"a": "b", "b": "y b"}

    def forward(xp, a, b):
        return a / b

    def vjp(g, y, a, b):
        return lambda: g / b, lambda: -g * y / b


class Pow(Op):
    """y = aᵇ;  ∂y/∂a = b·aᵇ⁻¹ (0 where b = 0),  ∂y/∂b = y·ln a (0 where a = 0 ≤ b)"""

    saves = {"a": "a b", "b": "y a"}

    def forward(xp, a, b):
        return a**b

    def vjp(g, y, a, b):
        def da():
            if isinstance(b, (int, float)):
                return g * (b * a ** (b - 1)) if b != 0 else g * 0
            return g * b * a ** np.where(b == 0, 0, b - 1)

        def db():
            return g * y * np.log(np.where((a == 0) & (y <= 1), np.ones_like(y), a))

        return da, db


class Neg(Op):
    """y = −x;  dy/dx = −1"""

    def forward(xp, x):
        return -x

    def vjp(g, y, x):
        return -g


class Abs(Op):
    """y = |x|;  dy/dx = sign x, taken as 0 at 0"""

    saves = "x"

    def forward(xp, x):
        return xp.abs(x)

    def vjp(g, y, x):
        return g * np.sign(x)


class Exp(Op):
    """y = eˣ;  dy/dx = y"""

    saves = "y"

    def forward(xp, x):
        return xp.exp(x)

    def vjp(g, y, x):
        return g * y


class Expm1(Op):
    """y = eˣ − 1, exact near 0;  dy/dx = y + 1"""

    saves = "y"

    def forward(xp, x):
        return xp.expm1(x)

    def vjp(g, y, x):
        return g * (y + 1)


class Log(Op):
    """y = ln x;  dy/dx = 1/x"""

    saves = "x"

    def forward(xp, x):
        return xp.log(x)

    def vjp(g, y, x):
        return g / x


class Log1p(Op):
    """y = ln(1 + x), exact near 0;  dy/dx = 1/(1 + x)"""

    saves = "x"

    def forward(xp, x):
        return xp.log1p(x)

    def vjp(g, y, x):
        return g / (1 + x)


class Sqrt(Op):
    """y = √x;  dy/dx = 1/(2y)"""

    saves = "y"

    def forward(xp, x):
        return xp.sqrt(x)

    def vjp(g, y, x):
        return g / (2 * y)


class Rsqrt(Op):
    """y = 1/√x;  dy/dx = −y³/2"""

    saves = "y"

    def forward(xp, x):
        return 1 / xp.sqrt(x)

    def vjp(g, y, x):
        return g * (y * y * y) * -0.5


class Sin(Op):
    """y = sin x;  dy/dx = cos x"""

    saves = "x"

    def forward(xp, x):
        return xp.sin(x)

    def vjp(g, y, x):
        return g * np.cos(x)


class Cos(Op):
    """y = cos x;  dy/dx = −sin x"""

    saves = "x"

    def forward(xp, x):
        return xp.cos(x)

    def vjp(g, y, x):
        return -g * np.sin(x)


class Tanh(Op):
    """y = tanh x;  dy/dx = 1 − y²"""

    saves = "y"

    def forward(xp, x):
        return xp.tanh(x)

    def vjp(g, y, x):
        return g * (1 - y * y)


class Clip(Op):
    """y = min(max(x, low), high);  dy/dx = 1 where low ≤ x ≤ high, else 0"""

    saves = "x"

    def forward(xp, x, low, high):
        return xp.clip(x, low, high)

    def vjp(g, y, x, low, high):
        inside = (True if low is None else x >= low) & (True if high is None else x <= high)
        return g * inside


class Maximum(Op):
    """y = max(a, b);  the larger input gets the gradient, equal ones half each"""

    saves = "a b"

    def forward(xp, a, b):
        return xp.maximum(a, b)

    def vjp(g, y, a, b):
        half = 0.5 * (a == b)
        return lambda: g * ((a > b) + half), lambda: g * ((b > a) + half)


class Minimum(Op):
    """y = min(a, b);  the smaller input gets the gradient, equal ones half each"""

    saves = "a b"

    def forward(xp, a, b):
        return xp.minimum(a, b)

    def vjp(g, y, a, b):
        half = 0.5 * (a == b)
        return lambda: g * ((a < b) + half), lambda: g * ((b < a) + half)


class Where(Op):
    """y = a where c, else b;  ∂y/∂a = c,  ∂y/∂b = ¬c"""

    saves = "c"

    def forward(xp, c, a, b):
        return xp.where(c, a, b)

    def vjp(g, y, c, a, b):
        return None, lambda: np.where(c, g, 0), lambda: np.where(c, 0, g)


class ToDevice(Op):
    """y = x on another device;  the gradient goes back to x's"""

    def forward(xp, x, target, source):
        return backend.to_device(x, target)

    def vjp(g, y, x, target, source):
        return call(ToDevice, g, target=source, source=target)


class Cast(Op):
    """y = x in another dtype;  the gradient is cast back"""

    def forward(xp, x, dtype):
        return x.astype(dtype)

    def vjp(g, y, x, dtype):
        return g


def floating(x: Any) -> Any:
    """x, with integers as float32: NumPy would compute functions of small integers in float16."""
    dtype = getattr(x, "dtype", None)
    return x if dtype is None or backend.is_float(dtype) else cast(x, backend.default_dtype)


def _binary(op: type[Op], a: Any, b: Any) -> Tensor:
    """Apply op, with a 0-d tensor taking the dtype of the array that it meets (as in PyTorch; NumPy would promote)."""
    if isinstance(a, Value) and isinstance(b, Value) and a.data.dtype is not b.data.dtype:
        if a.data.ndim == 0 < b.data.ndim and a.data.dtype.kind == b.data.dtype.kind:
            a = cast(a, b.data.dtype)
        elif b.data.ndim == 0 < a.data.ndim and a.data.dtype.kind == b.data.dtype.kind:
            b = cast(b, a.data.dtype)
    return apply(op, a, b)


def add(a: Any, b: Any) -> Tensor:
    """a + b, broadcasting."""
    return _binary(Add, a, b)


def sub(a: Any, b: Any) -> Tensor:
    """a − b, broadcasting."""
    return _binary(Sub, a, b)


def mul(a: Any, b: Any) -> Tensor:
    """a·b elementwise, broadcasting."""
    return _binary(Mul, a, b)


def div(a: Any, b: Any) -> Tensor:
    """a/b elementwise, broadcasting; integers divide to float32."""
    return _binary(Div, a, b)


def pow(a: Any, b: Any) -> Tensor:
    """aᵇ elementwise, broadcasting; both base and exponent may want gradients."""
    return _binary(Pow, a, b)


def maximum(a: Any, b: Any) -> Tensor:
    """The larger of a and b elementwise, broadcasting; NaN wins."""
    return _binary(Maximum, a, b)


def minimum(a: Any, b: Any) -> Tensor:
    """The smaller of a and b elementwise, broadcasting; NaN wins."""
    return _binary(Minimum, a, b)


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where the boolean condition holds, else b; all three broadcast."""
    return apply(Where, condition, a, b)


def neg(x: Any) -> Tensor:
    """−x"""
    return apply(Neg, x)


def abs(x: Any) -> Tensor:
    """|x|; gradient 0 at 0."""
    return apply(Abs, x)


def exp(x: Any) -> Tensor:
    """eˣ"""
    return apply(Exp, floating(x))


def expm1(x: Any) -> Tensor:
    """eˣ − 1, accurate near 0."""
    return apply(Expm1, floating(x))


def log(x: Any) -> Tensor:
    """Natural logarithm; −inf at 0, NaN below."""
    return apply(Log, floating(x))


def log1p(x: Any) -> Tensor:
    """ln(1 + x), accurate near 0."""
    return apply(Log1p, floating(x))


def sqrt(x: Any) -> Tensor:
    """√x; NaN below 0."""
    return apply(Sqrt, floating(x))


def rsqrt(x: Any) -> Tensor:
    """1/√x"""
    return apply(Rsqrt, floating(x))


def sin(x: Any) -> Tensor:
    """sin x, x in radians."""
    return apply(Sin, floating(x))


def cos(x: Any) -> Tensor:
    """cos x, x in radians."""
    return apply(Cos, floating(x))


def tanh(x: Any) -> Tensor:
    """tanh x"""
    return apply(Tanh, floating(x))


def clip(x: Any, low: float | None = None, high: float | None = None) -> Tensor:
    """x limited to [low, high]; None leaves that side open."""
    if low is None and high is None:
        raise ValueError("clip: give low, high, or both")
    if isinstance(low, Value) or isinstance(high, Value):
        raise TypeError("clip: low and high are numbers; use maximum and minimum for tensors")
    return apply(Clip, x, low=low, high=high)


def to_device(x: Any, device: str) -> Tensor:
    """x on "cpu" or "cuda", differentiably; x itself when it is there already."""
    x = as_value(x)
    source = backend.device_of(x.data)
    return x if source == device else apply(ToDevice, x, target=device, source=source)


def cast(x: Any, dtype: Any) -> Tensor:
    """x in another dtype. Casting to an integer or bool dtype ends the gradient."""
    return apply(Cast, as_value(x), dtype=backend.as_dtype(dtype))
