"""This program: how it is called, and how it calls itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]  # the folder that this minigpt is imported from


def command(verb: str) -> str:
    """How to call a verb, in the way that this program was called: `minigpt train`, or `python scripts/train.py`."""
    called = sys.argv[0].rpartition(" ")[0]
    return f"{called} {verb}" if called in ("minigpt", "python -m minigpt") else f"python scripts/{verb}.py"


def child(*arguments: str) -> dict[str, Any]:
    """What subprocess takes to start a Python that imports this minigpt, whatever lies in the working directory."""
    path = os.pathsep.join([str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"args": [sys.executable, "-P", *arguments], "env": {**os.environ, "PYTHONPATH": path}}
