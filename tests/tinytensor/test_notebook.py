"""What notebooks show of tensors and modules: the numbers, their bounds, and that nothing in them is taken for markup."""

from __future__ import annotations

import html
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from tests import chromium
from tinytensor import backend, nn


class Balanced(HTMLParser):
    """Fails where a tag has no end, or would run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag not in ("script", "img", "link", "iframe") and not [k for k, _ in attrs if k.startswith("on")]
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def text(shown: Any) -> str:
    page = shown._repr_html_()
    Balanced(page)
    lines = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"</(div|tr|summary)>", "\n", re.sub(r"(</td>|</th>)", " ", lines))))


def rows(shown: Any) -> list[list[str]]:
    """The table's rows, its heads among them."""
    found = re.findall(r"<tr>(.*?)</tr>", shown._repr_html_())
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in found]


# -- tensors


def test_the_line_says_what_it_is() -> None:
    x = nn.Parameter(tt.ones(2, 3))
    assert text(x).startswith("Parameter (2, 3) · float32 · cpu · requires_grad=True\n")
    assert text(x.exp()).startswith("Tensor (2, 3) · float32 · cpu · op=exp\n")
    assert text(tt.arange(2)).startswith("Tensor (2,) · int64 · cpu\n")


def test_tables_from_no_axes_to_two() -> None:
    assert rows(tt.tensor(3.14159)) == [["3.142"]]
    assert rows(tt.tensor([1, -20])) == [["0", "1"], ["1", "-20"]]
    assert rows(tt.tensor([[1.5, 0.0], [2.25, -3.0]])) == [["", "0", "1"], ["0", "1.500", "0.000"], ["1", "2.250", "-3.000"]]
    assert rows(tt.tensor([[True, False]])) == [["", "0", "1"], ["0", "True", "False"]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, -30.0], "1 2 -30"),
        ([0.0123, -0.00456], "0.01230 -0.00456"),
        ([123.456, 2.0], "123.5 2.0"),
        ([1e9, 2.5e8, 0.0], "1.000e+09 2.500e+08 0"),
        ([1e-9, 2e-7], "1.000e-09 2.000e-07"),
        ([1.5] * 10 + [1e-6], "1.500 1.500 1.500 1.500 1.500 1.500 1.500 1.500 1.500 1.500 1e-06"),
        ([1000.5, 1e-6], "1.000e+03 1.000e-06"),
        ([np.nan, np.inf, -np.inf, 1.25], "nan inf -inf 1.250"),
        ([np.nan], "nan"),
        ([5e-324, 1.5e308], "4.941e-324 1.500e+308"),
    ],
)
def test_few_digits_in_line(values: list[float], expected: str) -> None:
    assert rows(tt.tensor(values, "float64"))[1] == expected.split()


def test_what_is_not_finite_and_zero_is_marked() -> None:
    page = tt.tensor([1.5, np.nan, -np.inf, 0.0])._repr_html_()
    assert page.count('class="bad"') == 2 and page.count('class="zero"') == 1
    assert "0.40" in page  # how strongly the largest is coloured


def test_long_axes_are_cut_in_the_middle() -> None:
    table = rows(tt.arange(1200).reshape(40, 30))
    assert table[0] == ["", "0", "1", "2", "3", "4", "…", "25", "26", "27", "28", "29"]
    assert [row[0] for row in table[1:]] == ["0", "1", "2", "3", "4", "⋮", "35", "36", "37", "38", "39"]
    assert table[1] == ["0", "0", "1", "2", "3", "4", "…", "25", "26", "27", "28", "29"] and table[6][6] == "⋱"
    assert table[-1][-2:] == ["1198", "1199"]
    assert [len(rows(tt.zeros(n, 2))) for n in (11, 12)] == [12, 12]
    assert rows(tt.arange(12))[1] == ["0", "1", "2", "3", "4", "…", "7", "8", "9", "10", "11"]


def test_of_more_axes_the_first_slice() -> None:
    x = tt.arange(120).reshape(2, 3, 4, 5)
    assert "[0, 0, :, :], the first of 6 slices" in text(x)
    assert rows(x)[1:] == [[str(i), *map(str, range(5 * i, 5 * i + 5))] for i in range(4)]


def test_without_elements() -> None:
    for shape in ((0,), (0, 3), (2, 0, 3)):
        assert text(tt.zeros(shape)).endswith("no elements\n\n")


@pytest.mark.parametrize("dtype", [*backend.DTYPES, "bfloat16"])
def test_every_dtype(dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x = tt.ones(30, 30).to(dtype)
    assert rows(x)[1][1] == ("True" if dtype == "bool" else "1")


def test_only_what_is_shown_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, fetch = [], backend.to_device
    monkeypatch.setattr(backend, "to_device", lambda a, device: fetched.append(a.size) or fetch(a, device))
    huge = tt.Tensor(np.broadcast_to(np.float32(1.5), (1 << 20, 1 << 20, 1 << 20)))
    tracemalloc.start()
    page = huge._repr_html_()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(fetched) < 1000 and len(page) < 20_000 and peak < 1 << 20


# -- modules


class Net(nn.Module):
    def __init__(self) -> None:
        self.wte = nn.Embedding(50, 40)
        self.body = nn.Sequential(nn.Linear(40, 40), nn.Dropout(0.5))
        self.head = nn.Linear(40, 50)
        self.head.weight = self.wte.weight
        self.again = self.body
        self.scale = nn.Parameter(tt.ones(3), requires_grad=False)


def test_a_tree_with_types_shapes_and_counts() -> None:
    net = Net()
    lines = [re.sub(r"\s+", " ", line).strip() for line in text(net).splitlines() if line.strip()]
    assert lines == [
        "Net3,693 parameters · 14.8 kB · 3 frozen",
        "scale (3,) float32 frozen3",
        "wte Embedding(50, 40)2,000",
        "weight (50, 40) float322,000",
        "body Sequential1,640",
        "0 Linear(40, 40, bias=True)1,640",
        "weight (40, 40) float321,600",
        "bias (40,) float3240",
        "1 Dropout(p=0.5)",
        "head Linear(40, 50, bias=True)50",
        "weight (50, 40) float32the same as wte.weight",
        "bias (50,) float3250",
        "again Sequential the same as body",
    ]
    assert net._repr_html_().count("<details open>") == 1


def test_a_module_without_parameters() -> None:
    assert "Dropout(p=0.5)0 parameters · 0 bytes" in text(nn.Dropout(0.5))


def test_names_are_not_markup() -> None:
    class Sly(nn.Module):
        def extra_repr(self) -> str:
            return "<script>alert(1)</script>"

    class Bold(tt.Tensor):
        pass

    Sly.__name__ = "<script>"
    Bold.__name__ = "<b onclick=x>"
    net = nn.Sequential(Sly())
    setattr(net, "<img src=x>", nn.Linear(2, 2))
    setattr(net, "<i>", nn.Parameter(tt.ones(1)))
    net.tied = nn.Sequential()
    net.tied.weight = getattr(net, "<i>")
    net.same = getattr(net, "<img src=x>")
    for name in ("<script>", "<script>alert(1)</script>", "<img src=x>", "the same as <i>", "the same as <img src=x>"):
        assert name in text(net)
    assert "<b onclick=x>" in text(Bold(np.ones(1)))


# -- in a browser


@pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium")
def test_it_stands_in_a_page_of_either_theme(tmp_path: Path) -> None:
    shown = [tt.randn(30, 30), tt.tensor([1.5, np.nan]), Net()]
    with chromium.Browser(tmp_path / "profile") as browser:
        for dark in (False, True):
            page = tmp_path / f"{dark}.html"
            colours = "body { background: #111; color: #ddd }" if dark else ""
            body = "".join(x._repr_html_() for x in shown)
            page.write_text(f"<!doctype html><meta charset=utf-8><style>{colours}</style>{body}", "utf-8")
            browser.open(page, dark=dark)
            colour = "getComputedStyle(document.querySelector('td:not([class])')).color"
            assert browser.js(colour) == ("rgb(221, 221, 221)" if dark else "rgb(0, 0, 0)")
            ends = "[...document.querySelectorAll('tbody tr')].map(r => r.lastElementChild.getBoundingClientRect().right)"
            assert len(set(browser.js(ends)[:11])) == 1
            visible = "[...document.querySelectorAll('.row')].filter(r => r.checkVisibility()).length"
            before = browser.js(visible)
            browser.click("details details summary")
            assert browser.js(visible) == before + 1
            right = "[...document.querySelectorAll('summary > :last-child')].filter(e => e.checkVisibility())"
            assert browser.js(f"new Set({right}.map(e => Math.round(e.getBoundingClientRect().right))).size") == 1
        assert not browser.errors
