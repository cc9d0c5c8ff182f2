"""What a recorded graph keeps in memory for its backward pass: bytes by op, by module, by line."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tinytensor.autograd import Node
from tinytensor.backend import byte_bounds, memory_root
from tinytensor.inspect.graph import collect, owners, saved_arrays
from tinytensor.tensor import Tensor


@dataclass(frozen=True)
class Held:
    """One piece of memory that the graph keeps alive, and the first node that saved it."""

    bytes: int
    role: str
    """what it was to that node: "y", the name of an input or parameter, or "kernel" for what a fast kernel put aside"""
    op: str
    module: str
    line: str


class Ledger:
    """The pieces, each once however many nodes share it."""

    def __init__(self, pieces: list[Held]) -> None:
        self.pieces = pieces

    @property
    def total(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.bytes for piece in self.pieces)

    def by(self, what: str) -> dict[str, int]:
        """Bytes by "op", "module", "line" or "role", the largest first."""
        sums: Counter[str] = Counter()
        for piece in self.pieces:
            sums[getattr(piece, what)] += piece.bytes
        return dict(sums.most_common())

    def __str__(self) -> str:
        one, unit = (1e6, "MB") if self.total >= 1e6 else (1e3, "kB")
        lines = [f"{self.total / one:,.3f} {unit} held for backward, in {len(self.pieces)} pieces"]
        for what in ("op", "module", "line"):
            lines += ["", f"by {what}"]
            for name, size in list(self.by(what).items())[:20]:
                lines.append(f"{size / one:14,.3f} {unit} {size / (self.total or 1):6.1%}  {name or 'outside of modules'}")
        return "\n".join(lines)


def ledger(loss: Tensor) -> Ledger:
    """The memory that the graph of `loss` keeps alive until backward has used it.

    It is counted as it is held: a saved slice holds all of the array that it was cut from. Memory of leaves (parameters, inputs
    that require gradients) lives anyway and is left out.
    """
    entries = collect(loss)
    seen = {id(memory_root(owner.data)) for owner in owners(entries)}
    pieces = []
    for entry in entries:
        for role, array in saved_arrays(entry.node) if isinstance(entry.node, Node) else ():
            root = memory_root(array)
            if id(root) not in seen:
                seen.add(id(root))
                first, last = byte_bounds(root)
                pieces.append(Held(last - first, role, entry.op, entry.module, entry.line))
    return Ledger(pieces)
