"""Being asked to stop."""

import os
import signal

import pytest

from minigpt.signals import SIGNALS, StopRequest


@pytest.mark.parametrize("name", [name for name in SIGNALS if hasattr(signal, name)])
def test_each_signal_only_asks_and_the_handlers_come_back(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == name
        patient = name not in ("SIGINT", "SIGTERM")
        assert (signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL) == patient  # a second SIGINT or SIGTERM would end us
    assert signal.getsignal(number) is before


def test_the_four_signals_are_there_where_the_system_has_them() -> None:
    assert {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"} == set(SIGNALS)
