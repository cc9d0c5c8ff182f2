"""tinytensor: reverse-mode automatic differentiation on NumPy and CuPy arrays, with every derivative written here.

Read in this order: autograd (the engine), ops (the mathematics), tensor (the surface), nn and optim, backend (the speed).
"""

from tinytensor import backend, nn, optim, parallel, testing
from tinytensor.autograd import Op, apply
from tinytensor.backend import cpu as _cpu_kernels  # noqa: F401  (registers them)
from tinytensor.backend import random
from tinytensor.backend.precision import precision
from tinytensor.backend.random import manual_seed
from tinytensor.creation import (
    arange,
    as_tensor,
    eye,
    from_dlpack,
    full,
    ones,
    ones_like,
    rand,
    randint,
    randn,
    tensor,
    zeros,
    zeros_like,
)
from tinytensor.ops import *  # noqa: F403  (the ops are the library; ops/__init__ lists them)
from tinytensor.ops import __all__ as _op_names
from tinytensor.recompute import checkpoint
from tinytensor.state import enable_grad, is_grad_enabled, no_grad
from tinytensor.tensor import Tensor
from tinytensor.transforms import grad, jvp, value_and_grad, vjp

__version__ = "0.2.0"

__all__ = [
    *_op_names,
    "Op",
    "Tensor",
    "apply",
    "arange",
    "as_tensor",
    "backend",
    "checkpoint",
    "enable_grad",
    "eye",
    "from_dlpack",
    "full",
    "grad",
    "is_grad_enabled",
    "jvp",
    "manual_seed",
    "nn",
    "no_grad",
    "ones",
    "ones_like",
    "optim",
    "parallel",
    "precision",
    "rand",
    "randint",
    "randn",
    "random",
    "tensor",
    "testing",
    "value_and_grad",
    "vjp",
    "zeros",
    "zeros_like",
]
