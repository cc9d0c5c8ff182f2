"""The roofline of a profile: how fast each op was, over how much it computes for each byte that it moves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tinytensor.inspect.charts import short

if TYPE_CHECKING:
    from tinytensor.inspect.profile import profile

_PAPER, _INK, _FAINT, _FORWARD, _BACKWARD = "#fdfcf9", "#1d1d1f", "#6f6d68", "#2f6fb0", "#b3462e"
_LEAST = 0.005  # of the time: what took less is left out
Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


class _Point(NamedTuple):
    share: float  # of the time
    x: float  # FLOPs per byte
    y: float  # FLOPs per second
    name: str
    ink: str


def draw(p: profile, path: Path) -> Path:
    """Each op forward and backward, a point with the area of its share of the time, below the roof of this machine."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = p.by("op")
    seconds = sum(row.total.seconds for row in rows) or 1.0
    points = sorted(
        (
            _Point(work.seconds / seconds, work.flops / work.bytes, work.flops / work.seconds, row.name, ink)
            for row in rows
            for work, ink in ((row.forward, _FORWARD), (row.backward, _BACKWARD))
            if work.flops and work.bytes and work.seconds >= _LEAST * seconds
        ),
        reverse=True,
    )
    if not points:
        raise ValueError("there is no roofline to draw: no op that computes something was seen")
    roofs = sorted((p.peaks[n], n) for n in p.used)
    low = min(roofs[0][0] / p.bandwidth / 8, min(q.x for q in points) / 2)
    high = max(roofs[-1][0] / p.bandwidth * 8, max(q.x for q in points) * 2)
    figure = Figure(figsize=(10, 6.6), dpi=100, facecolor=_PAPER, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
    axes = figure.add_subplot(facecolor=_PAPER, xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(min(low * p.bandwidth, *(q.y for q in points)) / 2, max(roofs[-1][0], *(q.y for q in points)) * 3)
    for peak, _ in roofs:
        axes.plot([low, peak / p.bandwidth, high], [low * p.bandwidth, peak, peak], color=_INK, linewidth=1.2, zorder=1)
    axes.scatter(*zip(*((q.x, q.y, _area(q), q.ink) for q in points), strict=True), alpha=0.8, linewidths=0, zorder=3)
    axes.grid(color=_INK, alpha=0.08, linewidth=0.8)
    axes.tick_params(colors=_FAINT, which="both", length=0)
    axes.spines[:].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value) if value >= 1 else f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("FLOPs per byte moved", color=_INK)
    axes.set_ylabel("FLOPs per second", color=_INK)
    axes.set_title("Rate of each op, and what this machine could do", loc="left", fontsize=13, color=_INK, pad=30)
    for place, what, ink in (
        (0, "● forward", _FORWARD),
        (70, "● backward", _BACKWARD),
        (152, "area: share of the time", _FAINT),
    ):
        axes.annotate(what, (0, 1), (place, 9), "axes fraction", textcoords="offset points", color=ink)
    idle = [row for row in rows if not row.total.flops and row.total.seconds >= seconds / 1000]
    if idle:
        shares = ", ".join(f"{row.name} {row.total.seconds / seconds:.1%}" for row in idle)
        figure.supxlabel(
            f"not shown, for they move numbers and compute none: {shares}", x=0.985, ha="right", fontsize=9, color=_FAINT
        )
    figure.draw_without_rendering()  # which settles where everything is
    taken = _name_roofs(axes, roofs, p.bandwidth)
    _name_points(axes, points, taken)
    figure.savefig(path)
    return path


def _area(point: _Point) -> float:
    """In square points."""
    return 16 + 1600 * point.share


def _name_roofs(axes: Any, roofs: list[tuple[float, int]], bandwidth: float) -> list[Box]:
    """Write along each roof what it is; the pixels that are taken by that and by the lines."""
    low, high = axes.get_xlim()
    taken = []
    for peak, n in roofs:
        what = f"matrix product, {n} thread{'s' * (n != 1)}: {short(peak)}FLOP/s"
        named = axes.annotate(what, (high, peak), (-6, 4), textcoords="offset points", ha="right", color=_INK)
        taken.append(named.get_window_extent().extents)
        for i in range(400):
            x = low * (high / low) ** (i / 400)
            px, py = axes.transData.transform((x, min(peak, x * bandwidth)))
            taken.append((px, py - 2, px + 3, py + 2))
    (x0, y0), (x1, y1) = axes.transData.transform([(low, low * bandwidth), (2 * low, 2 * low * bandwidth)])
    turn = math.atan2(y1 - y0, x1 - x0)
    along = {"rotation": math.degrees(turn), "rotation_mode": "anchor", "color": _INK}
    place = x0 + 16 * math.cos(turn) - 8 * math.sin(turn), y0 + 16 * math.sin(turn) + 8 * math.cos(turn)
    named = axes.annotate(f"copy: {short(bandwidth)}B/s", place, xycoords="figure pixels", **along)
    return [*taken, named.get_window_extent().extents]


def _name_points(axes: Any, points: list[_Point], taken: list[Box]) -> None:
    """Write each point's name at the nearest place where it covers nothing, the longest first."""
    centres = [(*axes.transData.transform((q.x, q.y)), math.sqrt(_area(q) / math.pi) * axes.figure.dpi / 72) for q in points]
    taken = taken + [(x - r, y - r, x + r, y + r) for x, y, r in centres]
    frame = axes.get_window_extent().extents
    for q, (x, y, r) in zip(points, centres, strict=True):
        at = {"xycoords": "figure pixels", "ha": "center", "va": "center", "color": q.ink}
        name = axes.annotate(f"{q.name} {q.share:.1%}", (x, y), fontsize=10 if q.share >= 0.02 else 8.5, **at)
        left, bottom, right, top = name.get_window_extent().extents
        w, h = (right - left) / 2 + 2, (top - bottom) / 2 + 1
        for gap, turn in ((gap, turn) for gap in range(2, 400, 3) for turn in range(16)):
            dx, dy = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
            cx, cy = x + dx * (r + gap + w * abs(dx)), y + dy * (r + gap + h * abs(dy))
            box = cx - w, cy - h, cx + w, cy + h
            inside = frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
            if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                break
        name.set_position((cx, cy))
        taken.append(box)
        if gap > 20:  # far enough to wonder whose name it is
            axes.annotate("", (x + dx * r, y + dy * r), (cx - dx * w, cy - dy * h), "figure pixels",
                          arrowprops={"arrowstyle": "-", "color": q.ink, "linewidth": 0.6})  # fmt: skip
