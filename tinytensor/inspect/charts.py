"""A profile as text and as a timeline."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from tinytensor.inspect.profile import profile


def table(p: profile, by: str) -> Table:
    """A row for each op or module, the longest first."""
    from rich import box
    from rich.table import Table

    rows = p.by(by)
    seconds = sum(row.total.seconds for row in rows) or 1.0
    made = Table(box=box.SIMPLE_HEAD, caption=p.summary(), caption_justify="left", caption_style="", pad_edge=False)
    for name in (by, "made by") if by == "op" else (by,):
        made.add_column(name)
    for name in ("calls", "forward ms", "backward ms", "time", "FLOPs", "bytes", "FLOP/s", "bytes/s", "of attainable"):
        made.add_column(name, justify="right")
    for row in rows:
        work, names = row.total, (row.name or "outside of modules", row.by)
        made.add_row(
            *names[: 2 if by == "op" else 1],
            f"{row.forward.calls or row.backward.calls:,}",
            *(f"{part.seconds * 1e3:,.2f}" if part.calls else "" for part in (row.forward, row.backward)),
            f"{work.seconds / seconds:.1%}",
            *(short(x) if x else "" for x in (work.flops, work.bytes, work.flops / work.seconds, work.bytes / work.seconds)),
            f"{work.attainable / work.seconds:.0%}" if work.attainable else "",
        )
    return made


def text(p: profile) -> str:
    """Both tables, what they are measured against, and the summary."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=150, no_color=True)
    for by in ("op", "module"):
        made = table(p, by)
        made.caption = None
        console.print(made)
    for n in sorted(p.used):
        peak = f"{short(p.peaks[n])}FLOP/s of a matrix product with {n} thread{'s' * (n != 1)}"
        console.print(f"attainable: {peak}, or the {short(p.bandwidth)}B/s of a copy times FLOPs per byte, where that is less")
    console.print(p.summary())
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def short(x: float) -> str:
    """ "12.3 G": three digits and a prefix."""
    for prefix in ("", "k", "M", "G"):
        if x < 999.5:
            return f"{x:.3g} {prefix}"
        x /= 1000
    return f"{x:.3g} T"


def trace(p: profile, path: Path) -> Path:
    """Chrome's trace format: microseconds since the first block."""
    first = p.blocks[0][1] if p.blocks else 0.0
    events: list[dict[str, Any]] = []

    def box(row: int, name: str, kind: str, start: float, end: float, args: dict[str, Any]) -> None:
        place = {"ph": "X", "pid": os.getpid(), "tid": row, "ts": round((start - first) * 1e6, 3)}
        events.append({"name": name, "cat": kind, **place, "dur": round((end - start) * 1e6, 3), "args": args})

    left_out = 0
    for i, (thread, seen) in enumerate(list(p.seen.items())):
        events.append({"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": i, "args": {"name": seen.name}})
        for entered, start, end in p.blocks:
            if entered == thread:
                box(i, "profile", "block", start, end, {})
        for e in seen.events:
            rate = round(e.cost.flops / max(e.end - e.start, 1e-9) / 1e9, 3)
            args = {"module": e.module, "line": str(e.line), "shape": list(e.shape), "made by": e.by, "GFLOP/s": rate}
            box(i, e.op, "backward" if e.backward else "forward", e.start, e.end, args | {"bytes": e.cost.bytes})
        left_out += sum(row.total.calls for row in seen.rows.values()) - len(seen.events)
    whole = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"calls left out": left_out}}
    path.write_text(json.dumps(whole, separators=(",", ":")), encoding="utf-8")
    return path
