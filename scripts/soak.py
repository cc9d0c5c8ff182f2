"""Kill a small run at 200 random moments and prove that nothing is lost: `python scripts/soak.py --kills 200`. Minutes."""

import sys

import tyro

from minigpt.prove import soak


def main(kills: int = 200, seed: int = 0) -> None:
    """Kill and resume, then compare bit for bit with a run that was left alone.

    Args:
        kills: how many times the run is killed.
        seed: of the moments.
    """
    sys.exit(soak(kills, seed))


if __name__ == "__main__":
    tyro.cli(main)
