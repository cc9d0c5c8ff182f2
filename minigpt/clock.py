"""Where a run's time goes, by phase."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("data", "forward", "backward", "exchange", "optimiser", "evaluation", "checkpoint")


class Clock:
    """Seconds by phase. Work that several threads do side by side counts divided by their number."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str, threads: int = 1) -> Iterator[None]:
        """Time within counts for `name`, less what phases inside of it count."""
        start, inside = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            elapsed = (time.perf_counter() - start) / threads
            with self._lock:
                # phases side by side add to these sums too, so only one that is alone takes off what is inside of it
                others = sum(self.seconds.values()) - inside if threads == 1 else 0.0
                self.seconds[name] += max(0.0, elapsed - others)

    def summary(self) -> str:
        """ "backward 55%, forward 30%, …": shares of all phases together, the largest first."""
        total = sum(self.seconds.values()) or 1.0
        shares = sorted(((s / total, name) for name, s in self.seconds.items()), reverse=True)
        return ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= 0.005)
