"""Benchmarks: the same work in tinytensor and in its peers, side by side. `python scripts/benchmark.py` runs them."""
