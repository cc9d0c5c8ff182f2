"""One HTML file that needs nothing beside it: its data, style and script inside, readable in light and in dark."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

_TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}
</style>
{body}
<script type="application/json" id="data">{data}</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
{script}
</script>
</html>
"""
STYLE = """:root { color-scheme: light dark;
  --paper: light-dark(#fdfcf9, #16181c); --ink: light-dark(#1d1d1f, #e8e6e1); --faint: light-dark(#6f6d68, #97958f);
  --line: light-dark(#dcd9d0, #34383f); --panel: light-dark(#f4f1ea, #1e2127); --forward: light-dark(#2f6fb0, #7db3ea);
  --backward: light-dark(#b3462e, #f0957c); --leaf: light-dark(#3f7d3c, #8fce8a); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
code, .mono { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
button { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: 3px 10px; }
button:hover { border-color: var(--ink); }
:focus-visible { outline: 2px solid var(--forward); outline-offset: 1px; }"""


def write_page(path: str | Path, title: str, name: str, data: Any, folder: Path = Path(__file__).parent) -> Path:
    """Write the page of `name`.html and .js and .css in `folder`, with `data` in it (no NaN: JSON has none)."""
    body, script, style = ((folder / f"{name}.{kind}").read_text("utf-8") for kind in ("html", "js", "css"))
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = _TEMPLATE.format(title=html.escape(title), style=STYLE + "\n" + style, body=body, data=text, script=script)
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path
