"""Tensors and modules as HTML, which notebooks show: no scripts, and colours that stand on light and on dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinytensor import backend
from tinytensor.backend import Array

_END = 5  # indices shown at either end of an axis that is cut
_STYLE = """<style>
.tinytensor { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; color: inherit; width: max-content; }
.tinytensor .faint { opacity: .6; }
.tinytensor b { color: #3987cf; }
.tinytensor.tinytensor.tinytensor table { border-collapse: collapse; border: 0; margin: 5px 0 2px; font: inherit; }
.tinytensor.tinytensor.tinytensor tr { background: none; }
.tinytensor.tinytensor.tinytensor :is(td, th) { border: 0; padding: 2px 8px; text-align: right; white-space: nowrap;
  font-weight: normal; }
.tinytensor.tinytensor.tinytensor th { opacity: .5; font-size: 11px; }
.tinytensor.tinytensor.tinytensor tr > th + td { border-left: 1px solid rgba(128, 128, 128, .4); }
.tinytensor.tinytensor.tinytensor thead th { border-bottom: 1px solid rgba(128, 128, 128, .4); }
.tinytensor td.zero { color: rgba(128, 128, 128, .8); }
.tinytensor.tinytensor.tinytensor td.bad { background: #c9302c; color: #fff; font-weight: bold; }
.tinytensor.tree { width: auto; max-width: 46em; }
.tinytensor details > :not(summary) { margin-left: 6px; padding-left: 14px; border-left: 1px solid rgba(128, 128, 128, .3); }
.tinytensor :is(summary, .row) { display: flex; gap: 1ch; white-space: nowrap; list-style: none; }
.tinytensor summary { cursor: pointer; }
.tinytensor summary::-webkit-details-marker { display: none; }
.tinytensor :is(summary, .row)::before { content: ""; flex: none; width: 1ch; opacity: .6; }
.tinytensor summary::before { content: "▸"; }
.tinytensor details[open] > summary::before { content: "▾"; }
.tinytensor :is(summary, .row):hover { background: rgba(128, 128, 128, .15); }
.tinytensor :is(summary, .row) > :last-child { margin-left: auto; padding-left: 2ch; }
</style>"""


def tensor_html(tensor: Any) -> str:
    """One line that says what a tensor is, over a table of its numbers: of the last two axes, and the ends of long ones.

    Only the numbers shown leave the device. NaN and ±inf stand out; a colour behind a float grows with its magnitude.
    """
    facts = [str(tensor.shape), str(tensor.dtype), tensor.device]
    if tensor.node is not None:
        facts.append("requires_grad=True" if tensor.is_leaf else f"op={tensor.node.op.name}")
    line = f"<b>{html.escape(type(tensor).__name__)}</b> " + ' <span class="faint">·</span> '.join(map(html.escape, facts))
    if tensor.size == 0:
        return _page(f'<div>{line}</div><div class="faint">no elements</div>')
    array, note = tensor.data, ""
    if array.ndim > 2:
        first = ", ".join(["0"] * (array.ndim - 2))
        note = f'<div class="faint">[{first}, :, :], the first of {math.prod(array.shape[:-2]):,} slices</div>'
        array = array[(0,) * (array.ndim - 2)]
    return _page(f"<div>{line}</div>{note}{_table(array)}")


def module_html(module: Any) -> str:
    """A tree that unfolds: names, types, and shapes and counts of parameters, a shared one counted where it comes first."""
    parameters = list(module.parameters())
    total, frozen = sum(p.size for p in parameters), sum(p.size for p in parameters if not p.requires_grad)
    facts = f"{total:,} parameters · {_bytes(sum(p.data.nbytes for p in parameters))}" + (
        f" · {frozen:,} frozen" if frozen else ""
    )
    return _page(_branch(module, "", {}, f"<span>{facts}</span>")[0], "tinytensor tree")


def _page(body: str, name: str = "tinytensor") -> str:
    return f'{_STYLE}<div class="{name}">{body}</div>'


def _table(array: Array) -> str:
    matrix = array.reshape(1, 1) if array.ndim == 0 else array[None] if array.ndim == 1 else array
    rows, columns = (_ends(n) for n in matrix.shape)
    parts = [[backend.to_device(matrix[r, c], "cpu") for c in columns] for r in rows]
    values = np.block(parts) if len(rows) > 1 or len(columns) > 1 else parts[0][0]
    shown = values if values.dtype.kind in "iub" else values.astype(np.float64)
    cells = _cells(shown)
    if len(columns) > 1:
        cells = [[*row[:_END], '<td class="faint">…</td>', *row[_END:]] for row in cells]
    if len(rows) > 1:
        across = "⋱" if len(columns) > 1 else "⋮"
        cells.insert(_END, [f'<td class="faint">{across if i == _END else "⋮"}</td>' for i in range(len(cells[0]))])
    if array.ndim == 2:
        cells = [[f"<th>{name}</th>", *row] for name, row in zip(_names(rows, "⋮"), cells, strict=True)]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    head = "".join(f"<th>{name}</th>" for name in [*[""] * (array.ndim - 1), *_names(columns, "…")]) if array.ndim else ""
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def _ends(n: int) -> list[slice]:
    return [slice(0, n)] if n <= 2 * _END + 1 else [slice(0, _END), slice(n - _END, n)]


def _names(parts: list[slice], gap: str) -> list[str]:
    names = [[str(i) for i in range(part.start, part.stop)] for part in parts]
    return names[0] if len(names) == 1 else [*names[0], gap, *names[1]]


def _cells(values: np.ndarray) -> list[list[str]]:
    text = _format(values)
    finite = np.abs(values[np.isfinite(values)]) if values.dtype.kind == "f" else np.zeros(0)
    largest = finite.max(initial=0.0)

    def cell(x: Any) -> str:
        if isinstance(x, float) and not math.isfinite(x):
            return f'<td class="bad">{x}</td>'
        if not x:
            return f'<td class="zero">{text(x)}</td>'
        if not largest:
            return f"<td>{text(x)}</td>"
        colour = "57, 135, 207" if x > 0 else "222, 120, 40"
        return f'<td style="background: rgba({colour}, {0.4 * abs(x) / largest:.2f})">{text(x)}</td>'

    return [[cell(x) for x in row] for row in values.tolist()]


def _format(values: np.ndarray) -> Callable[[Any], str]:
    """How to write each of them so that their points are in line: four digits of the largest, or powers of ten."""
    if values.dtype.kind != "f":
        return str
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    largest = sizes.max(initial=0.0)
    if largest < 1e6 and (sizes == np.rint(sizes)).all():
        return "{:.0f}".format
    magnitude = math.floor(math.log10(largest))
    decimals = max(3 - magnitude, 0)
    lost = sizes < 0.5 * 10.0**-decimals
    if not -4 <= magnitude < 6 or lost.mean() > 0.1:
        return lambda x: f"{x:.3e}" if x else "0"
    return lambda x: f"{x:.{decimals}f}" if not x or abs(x) >= 0.5 * 10.0**-decimals else f"{x:.0e}"


def _branch(module: Any, path: str, places: dict[int, str], facts: str = "") -> tuple[str, int]:
    """A module and what is below it, and how many parameters are there that have no earlier place."""
    title = f"{html.escape(path.rpartition('.')[2])} <b>{html.escape(type(module).__name__)}</b>"
    if id(module) in places:
        return _row(title, "", f"the same as {places[id(module)]}"), 0
    places[id(module)] = path
    rows, count = [], 0
    for name, p in module.named_parameters(shared=True):
        if "." in name:
            continue
        place = f"{path}.{name}" if path else name
        first = places.setdefault(id(p), place)
        count += p.size if first == place else 0
        about = f"{p.shape} {p.dtype}" + ("" if p.requires_grad else " frozen")
        rows.append(_row(html.escape(name), about, f"{p.size:,}" if first == place else f"the same as {first}"))
    for name, child in module.named_children():
        row, new = _branch(child, f"{path}.{name}" if path else name, places)
        rows.append(row)
        count += new
    extra = module.extra_repr()
    title = f'<span>{title}<span class="faint">{html.escape(f"({extra})" if extra else "")}</span></span>'
    facts = facts or f'<span class="faint">{f"{count:,}" if count else ""}</span>'
    if not rows:
        return f'<div class="row">{title}{facts}</div>', 0
    return f"<details{'' if path else ' open'}><summary>{title}{facts}</summary>{''.join(rows)}</details>", count


def _row(title: str, about: str, facts: str) -> str:
    return (
        f'<div class="row"><span>{title} <span class="faint">{html.escape(about)}</span></span>'
        f'<span class="faint">{html.escape(facts)}</span></div>'
    )


def _bytes(n: int) -> str:
    power = min(int(math.log(n, 1000)), 4) if n else 0
    return f"{n / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
