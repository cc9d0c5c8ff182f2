"""The program as tests run it: most commands in this process, for each new one costs a second, some in one of their own."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_ELSEWHERE = ("WANDB_", "NETRC", "HF_", "HUGGINGFACE_")  # what a user may have set for services that tests do not ask


def call(monkeypatch: pytest.MonkeyPatch, script: str, *args: object) -> None:
    """Run a script of scripts/ in this process."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")


def refused(monkeypatch: pytest.MonkeyPatch, script: str, *args: object) -> str:
    """The one line for standard error with which a script must end; it makes its exit status 1."""
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, script, *args)
    message = caught.value.code
    assert isinstance(message, str)
    assert "\n" not in message
    return message


def environment(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_ELSEWHERE)}
    ours = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "COLUMNS": "300", "TINYTENSOR_NUM_THREADS": "1"}
    return kept | ours | settings


def command(script: str, *args: str) -> list[str]:
    """The words that start a script of scripts/, or what an option of Python's names."""
    return [sys.executable, script if script.startswith("-") else str(ROOT / "scripts" / script), *args]


def execute(home: Path, script: str, *args: str, stdin: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    words, env = command(script, *args), environment(**settings)
    return subprocess.run(words, cwd=home, env=env, input=stdin, capture_output=True, encoding="utf-8", timeout=60)


def printed(code: str, *args: str, **settings: str) -> str:
    """What code prints in a process of its own, which must end well."""
    done = execute(ROOT, "-c", code, *args, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout
