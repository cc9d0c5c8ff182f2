"""Write verse with a trained model: `python scripts/generate.py --prompt "ROMEO:" --max-tokens 200`."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from minigpt.checkpoint import load_run, newest_run
from minigpt.sampling import Sampling, speak


@dataclass(frozen=True)
class Args:
    """Continue a prompt with a trained model."""

    run: Path | None = None
    """run folder or checkpoint file; by default the newest run below runs/"""
    prompt: str | None = None
    """text to continue, by default a line break; "-" reads it from standard input"""
    prompt_file: Path | None = None
    """read the prompt from a file instead"""
    max_tokens: int = 500
    """tokens to write"""
    num_samples: int = 1
    """how many continuations"""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)


def main() -> None:
    try:
        args = tyro.cli(Args)
        prompt = "\n" if args.prompt is None else sys.stdin.read() if args.prompt == "-" else args.prompt
        if args.prompt_file:
            prompt = args.prompt_file.read_text("utf-8")
        checkpoint = load_run(args.run or newest_run())
        for text in speak(checkpoint, prompt, args.max_tokens, args.num_samples, args.sampling):
            print(text, end="", flush=True)
    except BrokenPipeError:  # the reader has seen enough, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
