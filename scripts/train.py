"""Train a GPT: `python scripts/train.py [quick | shakespeare | nanogpt-char | nanogpt-cpu] [--flags]`."""

import sys

import tyro

from minigpt.config import PRESETS, TrainConfig
from minigpt.run import run


def main() -> None:
    args = sys.argv[1:]
    preset = args.pop(0) if args and args[0] in PRESETS else "shakespeare"
    description = f"Train a GPT. Presets, as the first word: {', '.join(PRESETS)}. These are the settings of {preset}."
    config = tyro.cli(TrainConfig, default=PRESETS[preset], args=args, description=description)
    try:
        run(config)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
