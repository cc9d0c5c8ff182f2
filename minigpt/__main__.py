"""The command `minigpt`: its verbs, and where each is done."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from minigpt import __version__

VERBS = {  # the module that has a function of the verb's name, and what that does
    "train": ("minigpt.cli", "train a GPT on a text, or go on with a run"),
    "generate": ("minigpt.cli", "write with a trained model"),
    "prepare": ("minigpt.cli", "make tokens of texts of any size"),
    "export": ("minigpt.cli", "write a trained model for other programs"),
    "benchmark": ("minigpt.benchmarks.cli", "measure this library beside its peers"),
}


def main() -> None:
    """Do what the first word says: `minigpt VERB [--flags]`. A verb that is not known ends with status 2."""
    program = "python -m minigpt" if Path(sys.argv[0]).name == "__main__.py" else "minigpt"
    verb = sys.argv.pop(1) if sys.argv[1:] else "--help"
    if verb in VERBS:
        sys.argv[0] = f"{program} {verb}"  # what usage texts, and hints, call the program
        getattr(importlib.import_module(VERBS[verb][0]), verb)()
    elif verb == "--version":
        print(f"minigpt {__version__}")
    elif verb in ("--help", "-h"):
        lines = [f"  {name:<10} {what}" for name, (_, what) in VERBS.items()]
        print(f"usage: {program} VERB [--flags]", "", *lines, "", f"{program} VERB --help explains its flags.", sep="\n")
    else:
        print(f"error: {verb!r} is not a verb of {program}; choose {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
