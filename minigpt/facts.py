"""What the numbers of a run depend on: versions, processor, matrix kernels, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import tinytensor as tt
from minigpt.program import HOME


def versions(*packages: str) -> dict[str, str]:
    """The version of minigpt, of Python, and of each package as it is installed, "not installed" where it is not."""
    found = {"minigpt": tt.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def blas() -> str:
    """Which matrix kernels run, with a warning when the environment forces them."""
    from threadpoolctl import threadpool_info

    libraries = [p for p in threadpool_info() if p["user_api"] == "blas"]
    text = ", ".join(
        f"{p['internal_api']} {p['version']} {p.get('architecture', '')} kernels, {p['num_threads']} threads" for p in libraries
    )
    forced = os.environ.get("OPENBLAS_CORETYPE")
    return text + (f"; OPENBLAS_CORETYPE={forced} forces these, unset it to let OpenBLAS choose" if forced else "")


def gpu() -> str | None:
    """The GPU that CuPy works on, and CuPy's version; None where no array was ever put on one."""
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return None
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.get_device_id())["name"]
    return f"{name.decode()}, CuPy {cupy.__version__}"


def commit() -> str | None:
    """The git commit of this code, "+" after it where files were changed since; None outside a checkout."""
    here = Path(__file__).resolve().relative_to(HOME)

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", *words]
        return subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        git("ls-files", "--error-unmatch", str(here))  # or the commit would be that of a repository around an installed copy
        changed = git("status", "--porcelain", "--untracked-files=no", "minigpt", "tinytensor")
        return git("rev-parse", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment() -> dict[str, Any]:
    """For run.json."""
    return {
        "versions": versions("numpy", "safetensors"),
        "hardware": {"processor": processor(), "cores": cores(), "blas": blas(), "gpu": gpu(), "host": platform.node()},
        "commit": commit(),
    }
