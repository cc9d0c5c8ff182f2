"""Train a GPT: `python scripts/train.py [quick | shakespeare | nanogpt-char | nanogpt-cpu] [--flags]`."""

from minigpt.cli import train

if __name__ == "__main__":
    train()
