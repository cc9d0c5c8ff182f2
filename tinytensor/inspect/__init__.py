"""Look inside: what autograd recorded, why, and what it costs. Nothing here is paid for unless it is called."""

from tinytensor.inspect.graph import Entry, backward_pass, collect

__all__ = ["Entry", "backward_pass", "collect"]
