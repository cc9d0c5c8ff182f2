"""Runs the kernels of a `.cu` file on the CPU, compiled as C++ with `emulator.h` in CUDA's place."""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinytensor.backend import memory_root
from tinytensor.backend.launcher import _checked, kernels_of

_HERE = Path(__file__).resolve().parent
_HEADERS = [_HERE / name for name in ("emulator.h", "fibers.h", "cuda_bf16.h")]
_FLAGS = ("-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-gnu-unique", "-fvisibility=hidden", f"-I{_HERE}")
# Misaligned vectors fault on a device and pass on a CPU.
_SANITIZED = ("-g", "-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all")
_WRAPPER = """#include "emulator.h"
#include "{source}"
extern "C" __attribute__((visibility("default")))
const char* emulated_launch(int kernel, const unsigned* grid, int threads, void** arguments) {{
switch (kernel) {{
{cases}
}}
return "there is no such kernel";
}}
"""


def sanitizer() -> str | None:
    """The AddressSanitizer library of g++; None where it is not installed."""
    if shutil.which("g++") is None:
        return None
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    return found if Path(found).is_absolute() else None


def cache() -> Path:
    """The folder of what was compiled."""
    folder = Path(tempfile.gettempdir()) / f"emulated-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class Library:
    """The kernels of `source`, under the names that the launcher gives them.

    With `sanitize`, each launch runs in a process of its own under AddressSanitizer, on copies of the arrays' whole memory, and
    leaving that memory, or loading a misaligned vector, is an error that names the line. Addresses cannot be passed then.
    """

    def __init__(self, source: Path, sanitize: bool = False) -> None:
        self.kernels = kernels_of(source.read_text(encoding="utf-8"))
        self._sanitized = sanitize
        self._path = _build(source, list(self.kernels), _FLAGS + _SANITIZED * sanitize)

    def launch(self, name: str, grid: tuple[int, ...], block: int, *arguments: Any) -> None:
        """Run a kernel on `grid` blocks of `block` threads; RuntimeError when threads hang or, sanitized, leave their memory.

        Arguments are held to the declared parameters: arrays (`Strided` unless contiguous), addresses, None, numbers.
        """
        types = self.kernels[name]
        if len(arguments) != len(types) or not 0 < block <= 1024:
            raise TypeError(f"kernel {name} takes {len(types)} arguments and 1 to 1024 threads, not {len(arguments)}, {block}")
        values = [
            np.uintp(a) if t.endswith("*") and isinstance(a, int | np.integer) else _checked(name, i, t, a)
            for i, (t, a) in enumerate(zip(types, arguments, strict=True))
        ]
        call = str(self._path), list(self.kernels).index(name), (*grid, 1, 1)[:3], block
        message = _apart(call, values) if self._sanitized else _call(call, values)
        if message:
            raise RuntimeError(f"kernel {name}: {message}")


def _build(source: Path, kernels: list[str], flags: tuple[str, ...]) -> Path:
    """The shared library of these kernels, made when there is none of these very texts yet."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    cases = "\n".join(
        f"        case {i}: return emulated::launch({k}, grid, threads, arguments);" for i, k in enumerate(kernels)
    )
    wrapper = _WRAPPER.format(source=source.resolve(), cases=cases)
    texts = [wrapper, " ".join(flags), *(p.read_text(encoding="utf-8") for p in (source, *_HEADERS))]
    library = cache() / f"{source.stem}-{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:20]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as scratch:
            file, made = Path(scratch, "wrapper.cpp"), Path(scratch, "made.so")
            file.write_text(wrapper, encoding="utf-8")
            compiled = subprocess.run(["g++", *flags, str(file), "-o", str(made)], capture_output=True, text=True)
            if compiled.returncode:
                raise RuntimeError(f"{source.name} does not compile as C++:\n{compiled.stderr[:4000]}")
            made.replace(library)
    return library


def _call(call: tuple[Any, ...], values: list[Any]) -> str | None:
    path, kernel, grid, block = call
    cells = [np.array(v.ctypes.data if isinstance(v, np.ndarray) else v) for v in values]
    run = ctypes.PyDLL(path).emulated_launch  # holds the interpreter's lock: there is one set of fibers
    run.restype = ctypes.c_char_p
    message = run(kernel, (ctypes.c_uint * 3)(*grid), block, (ctypes.c_void_p * len(cells))(*(c.ctypes.data for c in cells)))
    return message and message.decode()


def _apart(call: tuple[Any, ...], values: list[Any]) -> str | None:
    roots: dict[int, tuple[int, int]] = {}  # (place, bytes) by address
    sent = []
    for value in values:
        if isinstance(value, np.ndarray):
            root = memory_root(value)
            number, *_ = roots.setdefault(root.ctypes.data, (len(roots), root.nbytes))
            value = number, value.ctypes.data - root.ctypes.data
        sent.append(value)
    job = pickle.dumps((call, sent, [ctypes.string_at(address, size) for address, (_, size) in roots.items()]))
    environment = dict(os.environ, LD_PRELOAD=sanitizer() or "", ASAN_OPTIONS="detect_leaks=0")
    child = subprocess.run([sys.executable, __file__], input=job, capture_output=True, env=environment)
    if child.returncode:
        return child.stderr.decode(errors="replace")[:6000]
    message, memories = pickle.loads(child.stdout)
    for address, memory in zip(roots, memories, strict=True):
        ctypes.memmove(address, memory, len(memory))
    return message


def _child() -> None:
    call, sent, memories = pickle.load(sys.stdin.buffer)
    arrays = [np.frombuffer(m, np.uint8).copy() for m in memories]  # of their own, so that each has guards around it
    message = _call(call, [arrays[v[0]][v[1] :] if isinstance(v, tuple) else v for v in sent])
    sys.stdout.buffer.write(pickle.dumps((message, [a.tobytes() for a in arrays])))


if __name__ == "__main__":
    _child()
