"""This program: how it is called, how it calls itself, and how it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SENTENCES = (ValueError, ArithmeticError, RuntimeError, OSError)  # errors whose message is all that there is to say
HOME = Path(__file__).resolve().parents[1]  # the folder that this minigpt is imported from


def command(verb: str) -> str:
    """How to call a verb, in the way that this program was called: `minigpt train`, or `python scripts/train.py`."""
    called = sys.argv[0].rpartition(" ")[0]
    return f"{called} {verb}" if called in ("minigpt", "python -m minigpt") else f"python scripts/{verb}.py"


def missing(package: str, extra: str, error: object) -> str:
    """What to do about a package that is not there, after "… needs "."""
    return f"the package {package} ({error}); {install(extra)}"


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install -e ".[{extra}]"' if (HOME / "setup.cfg").exists() else f'pip install "minigpt-shakespeare[{extra}]"'


def child(*arguments: str) -> dict[str, Any]:
    """What subprocess takes to start a Python that imports this minigpt, whatever lies in the working directory."""
    path = os.pathsep.join([str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"args": [sys.executable, "-P", *arguments], "env": {**os.environ, "PYTHONPATH": path}}


@contextmanager
def errors_as_sentences(interrupted: str = "") -> Iterator[None]:
    """What goes wrong within this block (or decorated function), or Ctrl-C, ends the program with one sentence."""
    try:
        yield
    except BrokenPipeError:  # the reader has seen enough, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError as error:
        sys.exit(f"error: out of memory ({error}); use a smaller model, or a smaller --micro-batch to train it")
    except SENTENCES as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(interrupted)
