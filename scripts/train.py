"""Train a GPT: `python scripts/train.py [quick | shakespeare | nanogpt-char | nanogpt-cpu] [--flags]`."""

import sys

import tyro

from minigpt.config import PRESETS, TrainConfig
from minigpt.run import resumed_config, run


def main() -> None:
    args = sys.argv[1:]
    preset = args.pop(0) if args and not args[0].startswith("-") else "shakespeare"
    if preset not in PRESETS:
        sys.exit(f"error: preset {preset!r} is not known; choose {', '.join(PRESETS)}")
    description = f"Train a GPT. Presets, as the first word: {', '.join(PRESETS)}. These are the settings of {preset}."
    try:
        config = tyro.cli(TrainConfig, default=PRESETS[preset], args=args, description=description)
        if config.resume:  # the flags now change that run's settings, not the preset's
            config = tyro.cli(TrainConfig, default=resumed_config(config), args=args, description=description)
        elif config.preset != preset:
            raise ValueError(f"--preset only names a run; for its settings write: python scripts/train.py {config.preset}")
        run(config)
    except (ValueError, ArithmeticError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; --resume goes on from the last checkpoint")


if __name__ == "__main__":
    main()
