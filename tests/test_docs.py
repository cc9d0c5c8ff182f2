"""The documents hold: their code runs and prints what they say, and their links lead to the lines that they name.

In a block of Python, `# → text` beside or below a statement is what the prompt prints for it, `…` in it stands for anything.
A link to a line of code has that code for its text, [`def sweep(`](../tinytensor/autograd.py#L364), found on that line alone.
`python tests/test_docs.py --mend` rewrites the numbers after code has moved.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tinytensor as tt
from tinytensor import backend

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = {  # what the first block may take for granted: the README quotes a class of the library
    "README.md": "from tinytensor import Op",
    "docs/autograd.md": "",
    "docs/training.md": "",
}
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(?P<text>`[^`]+`|[^]`]*)\]\((?P<file>[^)#\s]*)(?:#L(?P<line>\d+))?\)")
ARROW = "# → "


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """Each block of Python, and the number of its first line."""
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, block.start()) + 2, block[1]


def run(text: str, file: str, names: dict[str, Any]) -> None:
    """Run the blocks of a document in order; AssertionError for a statement that prints something else than it says."""
    for first, block in blocks(text):
        lines, statements = block.splitlines(), ast.parse(block).body
        for i, statement in enumerate(statements):
            last = statement.end_lineno or 0
            stop = statements[i + 1].lineno - 1 if i + 1 < len(statements) else len(lines)
            said = [line.split(ARROW, 1)[1] for line in lines[last - 1 : stop] if ARROW in line]
            ast.increment_lineno(statement, first - 1)
            code = compile(ast.Interactive([statement]), file, "single", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, names)
            printed = "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
            pattern = ".*?".join(map(re.escape, "\n".join(said).split("…")))
            if said and not re.fullmatch(pattern, printed, re.DOTALL):
                told = "\n".join(said)
                raise AssertionError(f"{file}:{first - 1 + last} says\n{told}\nand it prints\n{printed}")


def place(link: re.Match[str], folder: Path) -> int:
    """The one line of its file that a link to a line speaks of; LookupError where there is none, or more."""
    code = link["text"].strip("`")
    lines = (folder / link["file"]).read_text("utf-8").splitlines()
    found = [i for i, line in enumerate(lines, 1) if code in line]
    if len(found) != 1:
        where = f"on lines {', '.join(map(str, found))}" if found else "nowhere"
        raise LookupError(f"`{code}` is {where} in {link['file']}; name code that stands on one line")
    return found[0]


def wrong_links(path: Path) -> Iterator[str]:
    """What is wrong with the links of a document to files beside it."""
    text = FENCED.sub(lambda block: "\n" * block[0].count("\n"), path.read_text("utf-8"))
    for link in LINK.finditer(text):
        at = f"{path.name}:{text.count(chr(10), 0, link.start()) + 1}"
        if "://" in link["file"] or not link["file"]:
            continue
        if not (path.parent / link["file"]).exists():
            yield f"{at}: {link['file']} does not exist"
        elif link["line"]:
            try:
                right = place(link, path.parent)
                if right != int(link["line"]):
                    yield f"{at}: {link['text']} is on line {right}, not {link['line']}; python tests/test_docs.py --mend"
            except LookupError as error:
                yield f"{at}: {error}"


def mended(text: str, folder: Path) -> str:
    """The document with each link to a line leading where its code is now."""

    def mend(link: re.Match[str]) -> str:
        return f"[{link['text']}]({link['file']}#L{place(link, folder)})" if link["line"] else link[0]

    return LINK.sub(mend, text)


@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A document may add an op and a kernel, and write files; nobody else sees them."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(backend.kernels, "cpu", dict(backend.kernels["cpu"]))
    names = dict(vars(tt))
    yield
    vars(builtins).pop("_", None)  # where Python keeps what it printed last, be it hashable or not
    for name in set(vars(tt)) - set(names):
        delattr(tt, name)


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("file", RUN)
def test_code_runs_and_prints_what_it_says(file: str) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(RUN[file], names)
    run((ROOT / file).read_text("utf-8"), file, names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_what_they_name(path: Path) -> None:
    assert list(wrong_links(path)) == []


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1 + 1  # → 3", "doc:2 says\n3\nand it prints\n2"),
        ("x = 1\nfor i in range(2):\n    print(i)\n# → 0\n# → 2", "doc:4 says\n0\n2\nand it prints\n0\n1"),
        ("None  # → 1", "doc:2 says\n1\nand it prints\n$"),
    ],
)
def test_a_false_statement_is_found(code: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        run(f"```python\n{code}\n```\n", "doc", {})


def test_a_true_statement_passes() -> None:
    names: dict[str, Any] = {}
    run(
        "```python\nx = [1,\n 2]\nx  # → [1, 2]\n```\ntext\n```python\nobject(), x\n# → (<object … at …>, [1, 2])\n```\n",
        "doc",
        names,
    )
    assert names["x"] == [1, 2]


def test_a_moved_line_is_found_and_mended(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("\n\ndef one():\n    def two():\n        x[0](1)\n")
    document = tmp_path / "doc.md"
    document.write_text("[`def one`](code.py#L3),\n[`x[0](1)`](code.py#L4), [it](code.py) ![](no.png)")
    assert list(wrong_links(document)) == [
        "doc.md:2: `x[0](1)` is on line 5, not 4; python tests/test_docs.py --mend",
        "doc.md:2: no.png does not exist",
    ]
    document.write_text(mended(document.read_text(), tmp_path))
    assert document.read_text() == "[`def one`](code.py#L3),\n[`x[0](1)`](code.py#L5), [it](code.py) ![](no.png)"


@pytest.mark.parametrize(("code", "said"), [("three", "nowhere"), ("def ", "on lines 1, 2")])
def test_code_that_is_not_on_one_line_is_refused(code: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("def one(): ...\ndef two(): ...\n")
    document = tmp_path / "doc.md"
    document.write_text(f"[`{code}`](code.py#L1)")
    assert said in " ".join(wrong_links(document))
    with pytest.raises(LookupError, match=said):
        mended(document.read_text(), tmp_path)


def test_the_script_makes_the_pictures_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from docs import pictures

    text, kept = tmp_path / "verse.txt", tmp_path / "kept"
    text.write_text("To be, or not to be, that is the question.\n" * 60)
    base = replace(pictures.BASE, max_steps=4, eval_interval=2, n_layer=1, block_size=8, micro_batch=2)
    pictures.draw(text, tmp_path, kept, base)
    shown = set(re.findall(r"\(([^)]*\.png)\)", (ROOT / "docs" / "training.md").read_text("utf-8")))
    assert {path.name for path in tmp_path.glob("*.png")} == shown
    assert all((ROOT / "docs" / name).stat().st_size < 80_000 for name in shown)
    short = pictures.train("short text", text, kept, base)
    assert [row["val_loss"] is not None for row in short] == [False, True] * 5
    monkeypatch.setattr(pictures, "Trainer", None)
    assert pictures.train("short text", text, kept, base) == short
    assert pictures.tables("abc" * 1000) == pytest.approx((math.log(3), 0), abs=1e-3)
    with pytest.raises(TypeError):  # another setting, so a run of its own
        pictures.train("short text", text, kept, replace(base, lr=1e-3))


def mend(path: Path, report: Callable[[str], Any]) -> None:
    text = path.read_text("utf-8")
    new = mended(text, path.parent)
    if new != text:
        path.write_text(new, "utf-8")
        report(f"mended {path.relative_to(ROOT)}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--mend"]:
        sys.exit("usage: python tests/test_docs.py --mend")
    for path in DOCUMENTS:
        mend(path, print)
