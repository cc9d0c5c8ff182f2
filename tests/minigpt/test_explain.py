"""The page of a continuation: its facts against the model and PyTorch, its file, its flag, and how it behaves in a browser."""

import base64
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tinytensor as tt
from minigpt import checkpoint
from minigpt.checkpoint import Checkpoint
from minigpt.explain import Explanation, attention
from minigpt.model import GPT
from minigpt.sampling import Sampling, speak
from minigpt.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from tests import chromium
from tests.minigpt.program import call, refused
from tests.minigpt.small import TINY
from tests.minigpt.torch_gpt import ids, scatter_weights, torch_copy
from tinytensor import state

LETTERS = CharTokenizer("\n !ABCDEFGHIJKLMNOabcdefghijklmno<>/\u2028")
PROMPT = "A big\nkeg! ham"
PLAIN = Sampling()


def speaker(tokenizer: Tokenizer = LETTERS, scale: float = 0.3, **config: Any) -> Checkpoint:
    """A checkpoint of a small model with scattered weights."""
    settings = replace(TINY, **({"block_size": 24} | config))
    model = GPT(settings.model(tokenizer.vocab_size))
    scatter_weights(model, seed=3, scale=scale)
    numbers = {"step": 1200, "tokens": 0, "seconds": 0.0, "val_loss": 1.5, "best_val_loss": 1.5, "text_sha256": ""}
    optimizer: dict[str, Any] = {"steps": [], "param_groups": []}
    return Checkpoint(settings, tokenizer, model.state_dict(), optimizer, skipped=0, skipped_in_a_row=0, **numbers)


def explained(
    made: Checkpoint, prompt: str, max_tokens: int, how: Sampling = PLAIN
) -> tuple[np.ndarray, dict[str, Any], Explanation]:
    """All token ids of prompt and continuation, and what the page says of them."""
    model = made.build_model()
    page = Explanation(model, made.tokenizer, prompt, how, made.pretrained().title)
    "".join(speak(model, made.tokenizer, prompt, max_tokens, 1, how, drawn=page.drawn))
    return np.array([*made.tokenizer.encode(prompt), *page.tokens]), page.data(), page


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z.astype(np.float64) - z.max())
    return e / e.sum()


def check_place(place: dict[str, Any], logits: np.ndarray, p: np.ndarray, token: int | None) -> None:
    own = softmax(logits)
    shown = [row[0] for row in place["candidates"]]
    likeliest = sorted(range(len(p)), key=lambda i: (-p[i], -own[i]))
    assert len(shown) == 10
    assert place["open"] == np.count_nonzero(p)
    np.testing.assert_allclose([row[1:] for row in place["candidates"]], [(p[i], own[i]) for i in shown], rtol=2e-3, atol=1e-9)
    if token is None:
        assert shown == likeliest[:10]
        assert place.keys() == {"candidates", "open"}
        return
    assert place["rank"] == likeliest.index(token) + 1
    assert shown == (likeliest[:10] if place["rank"] <= 10 else [*likeliest[:9], token])
    assert place["bits"] == pytest.approx(-math.log2(own[token]), rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("how", [Sampling(temperature=2.0), Sampling(1.4, top_k=6, top_p=0.9, repetition_penalty=1.3)])
@pytest.mark.parametrize(
    ("letters", "max_tokens", "given", "left_out"),
    [(9, 12, 9, 0), (14, 10, 14, 0), (14, 15, 9, 5), (3, 40, 0, 19), (14, 0, 14, 0)],
)
def test_candidates_are_those_that_were_drawn_from(
    how: Sampling, letters: int, max_tokens: int, given: int, left_out: int
) -> None:
    """In the prompt the model's own for what stands there; after it those of the moment, after all that was read by then."""
    made = speaker()
    context, data, _ = explained(made, PROMPT[:letters], max_tokens, how)
    model = made.build_model()
    assert (data["given"], data["left_out"]) == (given, left_out)
    assert data["tokens"] == context[left_out:].tolist()
    assert len(data["places"]) == len(data["tokens"]) + 1
    with tt.no_grad():
        window = model(context[left_out:][None])[0].numpy()[0]
        for t, place in enumerate(data["places"]):
            if t < given:
                if t == 0:
                    assert place is None
                else:
                    check_place(place, window[t - 1], softmax(window[t - 1]), context[left_out + t])
                continue
            before = context[: left_out + t]
            logits = model(before[-24:][None])[0].numpy()[0, -1]
            token = int(context[left_out + t]) if left_out + t < len(context) else None
            check_place(place, logits, how.probabilities(logits, before), token)


def test_a_drawn_token_beyond_the_likeliest_is_shown_in_place_of_the_last() -> None:
    _, data, _ = explained(speaker(), "A", 23, Sampling(temperature=3.0))
    assert max(place["rank"] for place in data["places"][1:-1]) > 10
    assert min(place["rank"] for place in data["places"][1:-1]) <= 10


def test_weights_are_those_of_pytorch() -> None:
    made = speaker(n_layer=3, n_head=4, scale=0.6)
    context, data, _ = explained(made, PROMPT[:9], 8)
    copy = torch_copy(made.build_model())
    expected: list[np.ndarray] = []

    def watch(module: Any, _: Any, output: torch.Tensor) -> None:
        q, k, _ = (part.unflatten(2, (4, -1)).transpose(1, 2)[0] for part in output.split(16, dim=2))
        future = torch.ones(17, 17, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(1, 2) / math.sqrt(4)).masked_fill(future, -math.inf)
        expected.append(scores.softmax(-1).detach().numpy())

    for block in copy.h:
        block.attn.c_attn.register_forward_hook(watch)
    copy(ids(context[None]))
    roots = np.frombuffer(base64.b64decode(data["roots"]), np.uint8).reshape(data["layers"], data["heads"], -1) / 255
    rows, columns = np.tril_indices(17)
    assert np.abs(roots - np.sqrt(np.stack(expected)[:, :, rows, columns])).max() < 0.5 / 255 + 1e-3
    assert roots.max() > 0.95 and np.median(roots[:, :, rows > 8]) < 0.3  # weights that a mistake would change
    assert state.thread.observers == ()


def test_attention_is_what_reading_the_identity_gives() -> None:
    """Of fewer queries than keys, too, as new tokens have that attend to cached ones."""
    q, k = (np.random.default_rng(n).standard_normal((3, n, 4)) * 2 for n in (5, 7))
    expected = tt.causal_attention(q, k, np.broadcast_to(np.eye(7), (3, 7, 7))).numpy()
    np.testing.assert_allclose(attention(q, k), expected, atol=1e-12)


def test_symbols_are_text_and_what_is_none_has_a_number() -> None:
    made = speaker(ByteTokenizer())
    _, data, _ = explained(made, "é\t\n\x07 A", 0)
    assert [data["symbols"][t] for t in data["tokens"]] == ["‹C3›", "‹A9›", "\t", "\n", "‹07›", " ", "A"]
    assert explained(speaker(), "A", 0)[1]["symbols"] == [*LETTERS.symbols[:-1], "‹2028›"]


def test_the_page_says_what_made_it() -> None:
    made = speaker(n_layer=1)
    how = Sampling(temperature=0.5, top_k=7, top_p=0.25, repetition_penalty=1.5, seed=9)
    about = " · ".join(explained(made, "A", 0, how)[1]["about"])
    assert about == (
        "tiny after 1,200 steps, validation loss 1.500 · 1 layer of 2 heads, width 16, context of 24 tokens · "
        "drawn with temperature 0.5, top-k 7, top-p 0.25, repetition penalty 1.5, seed 9"
    )
    assert explained(made, "A", 0)[1]["sampling"] == "temperature 0.8"


def test_a_page_of_six_layers_and_heads_and_256_positions_is_below_3_mb(tmp_path: Path) -> None:
    made = speaker(n_layer=6, n_head=6, n_embd=12, block_size=256)
    _, data, page = explained(made, "A" * 300, 4)
    assert (len(data["tokens"]), data["left_out"]) == (256, 48)
    assert page.write(tmp_path / "page.html").stat().st_size < 3e6


@pytest.fixture(name="run", scope="module")
def folder_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "last.safetensors", speaker(preset="</script><!--<script>"))
    return folder


def test_the_flag_writes_a_page_and_changes_no_word(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page holds the text that was printed, and needs nothing beside it, whatever the text has in it."""
    page = tmp_path / "page.html"
    args = ["generate.py", "--run", run, "--prompt", "</HEAD><!", "--max-tokens", 14, "--temperature", 3]
    call(monkeypatch, *args)
    printed = capsys.readouterr()
    for _ in range(2):  # a page takes the place of a page
        call(monkeypatch, *args, "--explain", page)
        assert capsys.readouterr() == printed
    text = page.read_text("utf-8")
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[0])
    assert "".join(data["symbols"][t] for t in data["tokens"]).replace("‹2028›", "\u2028") + "\n" == printed.out
    assert data["about"][0].startswith("</script><!--<script> after")
    assert not re.search(r"https?:|\bsrc=|@import|url\(", text)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--explain", "none/page.html"], r"--explain none/page\.html: there is no folder none to write the page into"),
        (["--explain", "."], r"--explain \. is a folder; name a file in it, such as page\.html"),
        (["--explain", "p.html", "--num-samples", "3"], r"--explain shows one continuation, not num_samples=3; leave out one"),
    ],
)
def test_what_cannot_be_explained_is_refused_before_a_word_is_said(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    told = refused(monkeypatch, "generate.py", "--run", run, "--prompt", "A", "--max-tokens", 3, *args)
    assert re.match(f"error: {message}", told)
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_a_page_takes_the_place_of_no_other_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run / "last.safetensors"
    before = path.read_bytes()
    told = refused(monkeypatch, "generate.py", "--run", run, "--explain", path)
    assert told == f"error: --explain {path} is there already, and no page; name another file"
    assert path.read_bytes() == before


SAYS = "document.getElementById('%s').textContent"
SEEN = """(() => {
    const all = selector => [...document.querySelectorAll(selector)], texts = selector => all(selector).map(e => e.textContent);
    return {
      on: texts(".chip.on"), place: texts("#token")[0], verdict: texts("#verdict")[0], head: texts("#which")[0],
      candidates: texts("#candidates li:not(.empty)"), taken: texts("#candidates .taken .mono"),
      reads: texts("#reads li:not(.empty)"), shades: all(".chip").map(e => +getComputedStyle(e).getPropertyValue("--a")),
      pressed: all("#grid button").findIndex(e => e.getAttribute("aria-pressed") === "true")};
})()"""


def point(browser: chromium.Browser, element: str, x: float = 0.5, y: float = 0.5) -> None:
    """Move the pointer to a place in an element, given in parts of its width and height."""
    box = f"document.querySelector({json.dumps(element)}).getBoundingClientRect()"
    left, top, width, height = browser.js(f"(r => [r.left, r.top, r.width, r.height])({box})")
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=left + x * width, y=top + y * height)


@pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium")
def test_the_page_answers_keys_and_pointer(tmp_path: Path) -> None:
    made = speaker(block_size=40)
    context, data, page = explained(made, "Geolio\nA big keg\nham gold!\nOlin MacFee", 18, Sampling(temperature=2.0, top_k=8))
    rows, columns = np.tril_indices(40)
    weights = np.zeros((2, 3, 40, 40))
    weights[:, :2, rows, columns] = np.frombuffer(base64.b64decode(data["roots"]), np.uint8).reshape(2, 2, -1) / 255
    weights[:, 2] = np.sqrt((weights[:, :2] ** 2).mean(axis=1))
    texts = [data["symbols"][t] for t in data["tokens"]]
    chips = [text.replace("\n", "↵") for text in texts]

    with chromium.Browser(tmp_path / "profile") as browser:
        browser.open(page.write(tmp_path / "page.html"), height=1400)

        def looks_at(t: int, layer: int, head: int) -> None:
            """At place t, in a layer's head, of which the last is the mean of both."""
            seen = browser.js(SEEN)
            assert (seen["on"], seen["pressed"]) == ([chips[t]], 3 * layer + head)
            assert seen["head"] == f"Layer {layer + 1}, " + ("mean of 2 heads" if head == 2 else f"head {head + 1}")
            np.testing.assert_allclose(seen["shades"], [*(weights[layer, head, t - 1] if t else np.zeros(40)), 0], atol=0.003)
            assert seen["place"].endswith(f"token {t + 1} of 40")
            assert len(seen["reads"]) == min(t, 6)
            if t == 0:
                assert (seen["candidates"], seen["taken"]) == ([], [])
                assert seen["verdict"].startswith("The text shown begins here")
                return
            assert len(seen["candidates"]) == 10
            assert seen["taken"] == ["␣" if texts[t] == " " else chips[t]]
            assert re.match("Drawn with" if t >= data["given"] else "The model gives it", seen["verdict"])
            assert f"{data['places'][t]['bits']:.2f} bits of surprise" in seen["verdict"]

        assert browser.js("[...document.querySelectorAll('.chip')].map(e => e.textContent)") == [*chips, "?"]
        assert browser.js("document.querySelectorAll('#grid canvas').length") == 6
        assert f"The text has {len(context)} tokens; the model sees the last 40, which" in browser.js(SAYS % "notes")
        looks_at(data["given"], 1, 2)
        browser.press("Home")
        looks_at(0, 1, 2)
        browser.press("ArrowRight", "ArrowRight")
        looks_at(2, 1, 2)
        browser.press("ArrowUp", "ArrowLeft", shift=True)
        looks_at(2, 0, 1)
        point(browser, "#t32")
        looks_at(32, 0, 1)
        point(browser, "h1")
        looks_at(2, 0, 1)
        browser.click("#t5")
        looks_at(5, 0, 1)
        browser.click("#grid button:nth-of-type(4)")
        looks_at(5, 1, 0)
        browser.click("#t2")
        browser.press("ArrowDown")
        looks_at(12, 1, 0)  # on the next line, below

        x, y = browser.js("[2, 9].map(i => (frame.margin + (i + 0.5) * frame.cell) / matrix.clientWidth)")
        point(browser, "#matrix", x, y)
        looks_at(10, 1, 0)
        told = re.fullmatch(r"To choose .* \(11\), .* \(3\) is read with ([\d.]+) %\.", browser.js(SAYS % "readout"))
        assert told
        assert float(told[1]) == pytest.approx(100 * weights[1, 0, 9, 2] ** 2, rel=0.1, abs=0.02)
        point(browser, "h1")

        browser.press("End")
        seen = browser.js(SEEN)
        assert (seen["on"], seen["taken"], seen["verdict"]) == (["?"], [], "Not drawn: these may come next.")
        browser.press("Escape")
        seen = browser.js(SEEN)
        assert (seen["on"], seen["candidates"], max(seen["shades"])) == ([], [], 0)
        bits = [place and place["bits"] for place in data["places"][:-1]]
        assert seen["verdict"] == (
            f"The model's surprise, on average: {np.mean(bits[1 : data['given']]):.2f} bits a token over the prompt, "
            f"{np.mean(bits[data['given'] :]):.2f} over what was drawn."
        )
        assert browser.errors == []


CELLS = """(() => {
    const {data: bytes} = matrix.getContext("2d").getImageData(0, 0, matrix.width, matrix.width), found = [];
    const middle = i => Math.floor((frame.margin + (i + 0.5) * frame.cell) * devicePixelRatio);
    for (let i = 0; i < T; i++) for (let j = 0; j < T; j++) {
      const at = 4 * (middle(i) * matrix.width + middle(j));
      found.push([...bytes.slice(at, at + 4)]);
    }
    return found;
})()"""


@pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_the_matrix_is_the_chosen_heads_weights_in_light_and_dark(tmp_path: Path, dark: bool) -> None:
    """Its blue grows with the weight, its future is blank; nothing is wider than a narrow window."""
    _, data, page = explained(speaker(n_layer=1, n_head=1, scale=0.6), PROMPT, 10)
    roots = np.frombuffer(base64.b64decode(data["roots"]), np.uint8) / 255
    with chromium.Browser(tmp_path / "profile") as browser:
        browser.open(page.write(tmp_path / "page.html"), width=360, dark=dark)
        browser.press("Escape")
        blue, panel = (np.array(browser.js(f"ink({name!r})")) for name in ("forward", "panel"))
        cells = np.array(browser.js(CELLS)).reshape(24, 24, 4)
        assert browser.js("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert browser.errors == []
    weights = np.zeros((24, 24, 1))
    weights[np.tril_indices(24)] = roots.reshape(-1, 1)
    past = np.tri(24, dtype=bool)
    np.testing.assert_allclose(cells[past], np.insert(panel + (blue - panel) * weights, 3, 255, axis=2)[past], atol=3)
    assert not cells[~past].any()
    assert (panel.sum() < 300) == dark
