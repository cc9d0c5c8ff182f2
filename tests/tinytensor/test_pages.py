"""The page of a backward pass in a browser: it steps, opens modules, and lays out any graph so that nothing overlaps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytensor as tt
from minigpt.config import GPTConfig
from minigpt.model import GPT
from tests import chromium
from tinytensor import nn
from tinytensor.inspect import explain

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium")

NOW = "document.querySelector('.now[data-node] .name, .now[data-group] .name')?.textContent"
# What stands on the wrong side of something: boxes that overlap, boxes outside of their module, edges that go up.
AMISS = """(() => {
  const wrong = [], drawn = [...cards, ...modules].filter(box => !box.open && visible(box.node ?? box.members[0]) === box);
  const right = box => box.X + box.w, bottom = box => box.Y + box.h;
  (function within(box) {
    for (const [i, a] of box.children.entries()) {
      const inside = a.X >= box.X && a.Y >= box.Y && right(a) <= right(box) && bottom(a) <= bottom(box);
      if (!inside) wrong.push(`${a.id} outside of ${box.id}`);
      for (const b of box.children.slice(i + 1)) {
        if (a.X < right(b) && b.X < right(a) && a.Y < bottom(b) && b.Y < bottom(a)) wrong.push(`${a.id} on ${b.id}`);
      }
      if (a.open) within(a);
    }
  })(root);
  for (const edge of edges) {
    const runs = runsOf(edge), name = `the edge from ${edge.from.id} to ${edge.to.id}`;
    for (const [i, [x, top, end]] of runs.entries()) {
      if (end < top || (i && top < runs[i - 1][2])) wrong.push(`${name} goes up`);
      for (const box of drawn) {
        const common = Math.min(end, bottom(box)) - Math.max(top, box.Y);
        if (x > box.X && x < right(box) && common > 1) wrong.push(`${name} crosses ${box.id}`);
      }
    }
  }
  return wrong;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    with chromium.Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(autouse=True)
def _no_complaints(browser: chromium.Browser) -> Iterator[None]:
    yield
    complaints, browser.errors = browser.errors, []
    assert not complaints


def gpt() -> tuple[GPT, tt.Tensor]:
    """A model, to which nodes refer weakly, and its loss."""
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=6, n_head=2, n_embd=16, dropout=0.2))
    ids = np.random.default_rng(0).integers(0, 11, (3, 9))
    return model, model(ids[:, :-1], ids[:, 1:])[1]


def test_it_steps_with_keys_and_pointer(browser: chromium.Browser, tmp_path: Path) -> None:
    x, y = tt.tensor([0.5, -1.0, 2.0], requires_grad=True), tt.tensor([3.0, 2.0, -0.5], requires_grad=True)
    loss = (x * y + x.tanh()).sum()
    browser.open(explain(loss, tmp_path / "page.html"))

    def panel() -> str:
        return browser.js("document.getElementById('panel').innerText")

    def sees(step: int, name: str | None, *texts: str) -> None:
        assert (browser.js("document.body.dataset.step"), browser.js(NOW)) == (str(step), name)
        missing = [text for text in texts if text not in panel()]
        assert not missing, panel()

    shares = "[...document.querySelectorAll('.share text')].map(e => e.textContent)"
    cards = "[...document.querySelectorAll('.card .value:last-of-type')].map(e => e.textContent)"
    arrows = "document.querySelectorAll('path.backward.sent').length"
    assert browser.js(arrows) == 0
    sees(0, None, "made loss = −0.8355", "4 operations on 2 leaves", "values y flow down")
    browser.press("ArrowRight", "ArrowRight", "ArrowRight")
    sees(3, "tanh", "dy/dx = 1 − y²", "loss = (x * y + x.tanh()).sum()", "test_pages.py", "[0.7864, 0.42, 0.07065]", "⊕ 1 of 2")
    assert browser.js(shares) == ["x: [0.786, 0.42, 0.0707]"]
    assert "1 of 2 shares" in browser.js(cards)
    assert browser.js(arrows) == 4
    assert browser.js("getComputedStyle(document.querySelector('.plus.on')).visibility") == "visible"
    browser.press("ArrowRight")
    sees(4, "mul", "kept for the rule")
    assert sorted(browser.js(shares)) == ["a: [3, 2, −0.5]", "b: [0.5, −1, 2]"]
    browser.press("ArrowLeft")
    sees(3, "tanh")
    browser.press("End")
    sees(6, "x", "⊕ 2 shares arrived; they add up to", "[3.786, 2.42, −0.4293]")
    browser.press("Home")
    sees(0, None)
    browser.click('[aria-label="mul, step 4"]')
    sees(4, "mul")
    browser.click("#panel .jump")
    sees(2, "add")
    browser.click("#timeline span:nth-child(6)")
    sees(5, "y")
    browser.click('button[data-key="ArrowLeft"]')
    sees(4, "mul")
    browser.js("document.activeElement.blur()")
    browser.press("End", " ")  # plays from the start, and stops at the end
    assert browser.js("[document.body.className, step]") == ["playing", 0]
    browser.press(" ", "End", "ArrowLeft", " ")
    assert browser.js("new Promise(done => setTimeout(() => done(step), 1500))") == 6
    assert browser.js("document.body.className") == ""


def test_arrays_are_shown_in_their_shape(browser: chromium.Browser, tmp_path: Path) -> None:
    x = tt.tensor(np.arange(12.0).reshape(3, 2, 2), requires_grad=True)
    big = tt.tensor([[np.nan] * 2, [-np.inf, 2.5]] * 8, requires_grad=True)
    loss = x.sum() + big.sum() * 1e-9
    browser.open(explain(loss, tmp_path / "page.html"))

    def panel(name: str) -> list[str]:
        browser.click(f'[aria-label^="{name}, step"]')
        text = browser.js("document.getElementById('panel').innerText").partition("Value\n")[2]
        return [line for line in text.splitlines() if line]

    slices = ["[0]", "0\t1", "2\t3", "[1]", "4\t5", "6\t7", "[2]", "8\t9", "10\t11"]
    assert panel("x") == ["x", "float64 (3×2×2)", *slices]
    assert panel("big") == ["big", "float32 (16×2)", "every finite element is 2.5 · 24 not finite"]
    x = tt.tensor(np.r_[np.zeros(10), np.linspace(-1, 3, 30)], requires_grad=True)
    browser.open(explain((x * 1e-7).sum(), tmp_path / "page.html"))
    assert panel("x") == ["x", "float64 (40)", "−1", "3", "mean 0.75 · std 1.121 · 25 % zeros"]
    assert browser.js("document.querySelectorAll('.forward .histogram rect').length") == 24
    assert "all 1e−7" in browser.js(
        "document.querySelector('[data-node] .value:last-of-type').parentNode.parentNode.textContent"
    )


def test_a_gpt_opens_module_by_module(browser: chromium.Browser, tmp_path: Path) -> None:
    _model, loss = gpt()
    browser.open(explain(loss, tmp_path / "page.html"), width=1440, height=900)
    boxes = "[...document.querySelectorAll('#world [role=button]')].map(e => e.ariaLabel)"
    top = ["embedding", "getitem", "add", "dropout", *[f"h.{i}, closed" for i in range(6)], "ln_f, closed"]
    shown = [label.split(", step")[0] for label in browser.js(boxes)]
    assert sorted(shown) == sorted([*top, "linear", "reshape", "loss = cross_entropy", "wte.weight", "wpe.weight"])
    browser.click('[aria-label="h.5, closed"]')
    assert {"h.5, open", "attn, closed", "mlp, closed", "ln_2, closed"} <= set(browser.js(boxes))
    assert browser.js("document.activeElement.ariaLabel") == "h.5, open"
    assert browser.js(AMISS) == []
    browser.press("Enter")
    assert "attn, closed" not in browser.js(boxes)
    browser.press("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight")
    assert (browser.js("document.body.dataset.step"), browser.js(NOW)) == ("5", "▸ h.5")
    browser.press("ArrowRight", shift=True)  # over what happens inside
    assert (browser.js("document.body.dataset.step"), browser.js(NOW)) == ("26", "▸ h.4")
    browser.press("ArrowLeft", "ArrowLeft", shift=True)
    assert (browser.js("document.body.dataset.step"), browser.js(NOW)) == ("4", "▸ ln_f")
    browser.press("o")
    assert not [label for label in browser.js(boxes) if "closed" in label]
    assert len([label for label in browser.js(boxes) if ", step" in label]) == 210
    assert browser.js(AMISS) == []
    assert browser.js(
        "document.documentElement.scrollWidth <= innerWidth && document.documentElement.scrollHeight <= innerHeight"
    )


class Cell(nn.Module):
    def __init__(self) -> None:
        self.mix = nn.Linear(3, 3)

    def forward(self, h: Any) -> Any:
        return self.mix(h).tanh()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        self.cell, self.out = Cell(), nn.Linear(3, 1)

    def forward(self, h: Any) -> Any:
        for _ in range(4):
            h = self.cell(h) + h
        return self.out(h)


def graphs() -> Iterator[tuple[str, tt.Tensor]]:
    x = tt.tensor(np.linspace(0.5, 2, 30), requires_grad=True)
    yield "one leaf", tt.tensor(1.0, requires_grad=True)
    yield "one op", x.sum()
    yield "twice the same", (x * x).sum()
    yield "wide", sum((((x * k).sin() * x).sum() for k in range(2, 40)), x.sum())
    yield "deep", sum_of_powers(x)
    yield "tangled", tangled(x)
    yield "not finite", ((x - 0.5) ** -1 - (x - 0.5) ** -2).sum()
    recurrent, net, ones = Recurrent(), nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)]), tt.ones(2, 3)
    yield "recurrent", recurrent(ones).sum()
    yield "the model twice", net(ones[:, :2]).sum() * net(net(ones[:, 1:])).mean()
    yield "checkpoint", tt.checkpoint(lambda t: net(t).tanh(), x[:2].reshape(1, 2)).sum()
    _model, loss = gpt()
    yield "cut", loss


def sum_of_powers(x: tt.Tensor) -> tt.Tensor:
    y = total = x
    for _ in range(12):
        y = y * x
        total = total + y
    return total.mean()


def tangled(x: tt.Tensor) -> tt.Tensor:
    rng, made = np.random.default_rng(0), [x, x * 2, x * 3]
    for _ in range(60):
        a, b = rng.integers(max(0, len(made) - 12), len(made), 2)
        made.append(made[a] + made[b])
    return sum(made[-12:], x).sum()


@pytest.mark.filterwarnings("ignore:.*encountered")
def test_any_graph_is_laid_out_and_stepped_through(browser: chromium.Browser, tmp_path: Path) -> None:
    for name, loss in graphs():
        browser.open(explain(loss, tmp_path / f"{name}.html", 60 if name == "cut" else 600), width=420, height=860, dark=True)
        for _ in range(2):  # as it opens, then with all modules open, or closed
            assert (name, browser.js(AMISS)) == (name, [])
            assert browser.js("(() => { for (let i = 0; i < last; i += 1 + last / 20 | 0) go(i); go(last); return true; })()")
            browser.press("o")
        assert "NaN" not in browser.js("document.getElementById('world').innerHTML.replaceAll('>NaN<', '')"), name
    assert browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
