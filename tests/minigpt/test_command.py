"""The command `minigpt`: its verbs, what it is called in hints, and the version that everything tells."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import minigpt
import tinytensor
from minigpt import facts, program
from minigpt.__main__ import VERBS, main
from tests.minigpt.program import ROOT, call, execute, printed


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    """Exit status, or message, standard output and standard error of `minigpt WORDS` in this process."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minigpt", *words])
    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]], ids=str)
def test_help_has_a_line_for_each_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    status, out, err = told(monkeypatch, capsys, *words)
    assert (status, err) == (0, "")
    assert out.startswith("usage: minigpt VERB")
    assert [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  ")] == [
        [verb, what] for verb, (_, what) in VERBS.items()
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_explains_its_flags_under_its_own_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    status, out, err = told(monkeypatch, capsys, verb, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: minigpt {verb} ")


@pytest.mark.parametrize("word", ["trian", "--verbose", ""])
def test_a_verb_that_is_not_known_is_named_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    status, out, err = told(monkeypatch, capsys, word, "quick")
    assert (status, out) == (2, "")
    assert err == f"error: {word!r} is not a verb of minigpt; choose {', '.join(VERBS)}\n"


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_telling_what_it_is_loads_nothing_heavy(word: str) -> None:
    code = f"""
import sys
from minigpt.__main__ import main
sys.argv = ["minigpt", "{word}"]
main()
print({{"matplotlib", "rich", "tyro", "torch", "safetensors", "cupy"}} & set(sys.modules))"""
    assert printed(code).splitlines()[-1] == "set()"


def test_a_hint_calls_the_program_as_it_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hint = "error: no run with a checkpoint below runs/; train one with: {} train quick"
    assert told(monkeypatch, capsys, "generate") == (hint.format("minigpt"), "", "")
    assert execute(tmp_path, "-m", "minigpt", "generate").stderr == hint.format("python -m minigpt") + "\n"


@pytest.mark.parametrize("called", ["scripts/train.py", "/home/my minigpt train.py", "-c", ""])
def test_elsewhere_a_hint_names_a_script(monkeypatch: pytest.MonkeyPatch, called: str) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert program.command("generate") == "python scripts/generate.py"


def test_everything_tells_the_same_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    version = tinytensor.__version__
    assert minigpt.__version__ == version
    assert told(monkeypatch, capsys, "--version") == (0, f"minigpt {version}\n", "")
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_a_repository_around_an_installed_copy_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=Anna", "-c", "user.email=anna@example.com", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for package in ("minigpt", "tinytensor"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "facts.py").touch()
    monkeypatch.setattr(facts, "__file__", str(tmp_path / "minigpt" / "facts.py"))
    monkeypatch.setattr(facts, "HOME", tmp_path)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "Begin")
    assert facts.commit() is None
    git("add", ".")
    git("commit", "-q", "-m", "Add facts")
    assert facts.commit() == git("rev-parse", "HEAD")
    (tmp_path / "README.md").touch()
    (tmp_path / "tinytensor" / "new.py").touch()
    assert facts.commit() == git("rev-parse", "HEAD")
    (tmp_path / "tinytensor" / "facts.py").write_text("changed", encoding="utf-8")
    assert facts.commit() == git("rev-parse", "HEAD") + "+"
    link = tmp_path.with_name("link")
    link.symlink_to(tmp_path)
    monkeypatch.setattr(facts, "__file__", str(link / "minigpt" / "facts.py"))
    monkeypatch.setattr(facts, "HOME", tmp_path.resolve())
    assert facts.commit() == git("rev-parse", "HEAD") + "+"


def test_the_benchmark_says_how_it_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numpy.py").write_text("raise ImportError('this folder is nobody\\'s library')")
    flags = ["imports", "--rounds", "1", "--json", "my times.json"]
    assert told(monkeypatch, capsys, "benchmark", *flags)[0] == 0
    report = json.loads(Path("my times.json").read_text())
    assert report["command"] == "minigpt benchmark imports --rounds 1 --json 'my times.json'"
    rows = ["import numpy", "import numpy, tinytensor", "median difference of the pairs"]
    assert [row[0] for row in report["tables"][0]["rows"]] == rows
    call(monkeypatch, "benchmark.py", *flags, "--markdown", "times.md")
    assert Path("times.md").read_text().startswith("`python scripts/benchmark.py imports --rounds 1")
