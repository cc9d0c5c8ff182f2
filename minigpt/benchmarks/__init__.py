"""Benchmarks: the same work in tinytensor and in its peers, side by side. `minigpt benchmark` runs them."""
