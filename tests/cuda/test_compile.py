"""The sources compile for the devices that they are meant for, without spilling registers; where NVIDIA's compiler is there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tinytensor import backend
from tinytensor.backend.launcher import kernels_of

FOLDER = Path(backend.__file__).parent


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["kernels", "flash"])
def test_nvcc(name: str, architecture: str, tmp_path: Path) -> None:
    source = FOLDER / f"{name}.cu"
    kernels = kernels_of(source.read_text())
    uses = [f"auto* use_{i} = &{kernel};" for i, kernel in enumerate(kernels) if "<" in kernel]
    whole = tmp_path / "whole.cu"
    whole.write_text("\n".join([f'#include "{source}"', *uses]))
    command = ["nvcc", "-std=c++17", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-o", "made", str(whole)]
    log = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert log.returncode == 0, log.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.stderr)
    assert len(spills) >= len(kernels) and set(spills) == {("0", "0")}, log.stderr


@pytest.mark.parametrize("name", ["kernels", "flash"])
def test_nothing_that_nvrtc_lacks(name: str) -> None:
    """NVRTC, which compiles these on a user's machine, has no C library: no headers but CUDA's own, no macros of <cmath>."""
    source = re.sub(r"//[^\n]*", "", (FOLDER / f"{name}.cu").read_text())
    assert re.findall(r"#include *(\S+)", source) == ["<cuda_bf16.h>"]
    assert not re.search(r"\b(INFINITY|NAN|FLT_MAX|M_PI|uint32_t|uint16_t|std::|assert|printf|atomicAdd)\b", source)
