"""Look inside: what autograd recorded, why, and what it costs. Nothing here is paid for unless it is called."""

from tinytensor.inspect.anomaly import detect_anomaly
from tinytensor.inspect.explain import explain
from tinytensor.inspect.graph import Entry, backward_pass, collect
from tinytensor.inspect.ledger import Held, Ledger, ledger
from tinytensor.inspect.profile import profile
from tinytensor.inspect.why import why_no_grad

__all__ = [
    "Entry",
    "Held",
    "Ledger",
    "backward_pass",
    "collect",
    "detect_anomaly",
    "explain",
    "ledger",
    "profile",
    "why_no_grad",
]
