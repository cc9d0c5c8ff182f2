"""CuPy's place taken by the stand-in, for tests that ask for it."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.cuda import standin
from tinytensor import backend
from tinytensor.backend import cublas


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`tinytensor.backend.cuda` on a device that is not there; the library's "cuda" is it, until the test is over."""
    monkeypatch.delitem(sys.modules, "tinytensor.backend.cuda", raising=False)
    monkeypatch.delattr(backend, "cuda", raising=False)
    monkeypatch.setitem(backend.kernels, "cuda", {})
    library = standin.cublas.Library()
    monkeypatch.setattr(cublas, "load", lambda: library)
    cublas._handle.cache_clear()
    standin.install()
    try:
        yield importlib.import_module("tinytensor.backend.cuda")
    finally:
        standin.uninstall()
        cublas._handle.cache_clear()
        sys.modules.pop("tinytensor.backend.cuda", None)
        vars(backend).pop("cuda", None)
