"""Make the runs and the pictures of docs/training.md: `python scripts/draw_training.py --data data/tiny_shakespeare.txt`."""

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from docs import pictures


def main(data: Path, out_dir: Path = Path("docs"), kept: Path | None = None) -> None:
    """Train the preset quick for 400 steps, again and again with one setting changed, and draw what came of it. Minutes.

    Args:
        data: the text to train on.
        out_dir: the folder for the pictures.
        kept: a folder that keeps the runs, so that those that are there already need not be made again.
    """
    pictures.draw(data, out_dir, kept)


if __name__ == "__main__":
    tyro.cli(main)
