"""Measure tinytensor beside its peers: `python scripts/benchmark.py step`, or `ops`, `generate`, …, or all of them."""

from minigpt.benchmarks.cli import benchmark

if __name__ == "__main__":
    benchmark()
