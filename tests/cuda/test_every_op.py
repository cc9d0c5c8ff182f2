"""Every public op on CuPy's stand-in: the registry's calls give there what they give on the CPU, to second order."""

from __future__ import annotations

import numpy as np
import pytest

import tinytensor as tt
from tests.tinytensor.registry import OPS, Call, OpInfo

pytestmark = [pytest.mark.usefixtures("cuda"), pytest.mark.filterwarnings("ignore")]
CASES = [pytest.param(info, call, id=f"{info}-{call}"[:90]) for info in OPS for call in info.calls]


def results(info: OpInfo, call: Call, device: str, dtype: str) -> list[np.ndarray]:
    """Outputs, their gradients, and the gradients of the gradients' squares."""
    leaves = [tt.tensor(a, dtype=dtype, device=device, requires_grad=True) for a in call.arrays(info.domain)]
    args, kwargs = call.bind(leaves, lambda other: tt.tensor(other, device=device))
    out = info.function(*args, **kwargs)
    outs = list(out) if isinstance(out, list | tuple) else [out]
    found = [y for y in outs if isinstance(y, tt.Tensor)]
    assert all(y.device == device for y in found)
    graded = [y for y in found if y.requires_grad]
    if graded and leaves:
        first = tt.grad(sum((y * y).sum() for y in graded), leaves, create_graph=True, allow_unused=True)
        found += [g for g in first if g is not None]
        assert all(g.device == device and g.dtype == dtype for g in first if g is not None)
        again = [g for g in first if g is not None and g.requires_grad]
        if again:
            second = tt.grad(sum((g * g).sum() for g in again), leaves, allow_unused=True)
            found += [g for g in second if g is not None]
    return [y.numpy() for y in found]


@pytest.mark.parametrize(("info", "call"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_there_as_here(info: OpInfo, call: Call, dtype: str) -> None:
    there, here = (results(info, call, device, dtype) for device in ("cuda", "cpu"))
    assert len(there) == len(here)
    tolerance = 1e-4 if dtype == "float32" else 1e-11
    for a, b in zip(there, here, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, tolerance, tolerance * max(1.0, float(np.abs(b).max(initial=0))))


def test_inputs_on_two_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="add: inputs live on cpu and cuda; move them with"):
        tt.ones(2) + tt.ones(2, device="cuda")
