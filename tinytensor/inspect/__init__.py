"""Look inside: what autograd recorded, why, and what it costs. Nothing here is paid for unless it is called."""

from tinytensor.inspect.anomaly import detect_anomaly
from tinytensor.inspect.graph import Entry, backward_pass, collect
from tinytensor.inspect.ledger import Held, Ledger, ledger
from tinytensor.inspect.why import why_no_grad

__all__ = ["Entry", "Held", "Ledger", "backward_pass", "collect", "detect_anomaly", "ledger", "why_no_grad"]
