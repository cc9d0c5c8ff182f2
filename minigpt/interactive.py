"""A prompt to play with a model: lines in, verse out, settings on the way."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import groupby
from types import TracebackType
from typing import Any, TextIO, get_args, get_type_hints

import numpy as np

from minigpt.model import GPT
from minigpt.sampling import Sampling, decoded, generate
from minigpt.tokenizer import Tokenizer

HISTORY, KEPT = "~/.minigpt_history", 1000  # lines


@dataclass(frozen=True)
class Settings(Sampling):
    """What can be changed between two samples."""

    max_tokens: int = 500
    """tokens to write"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens={self.max_tokens} must not be negative")

    def __str__(self) -> str:
        return ", ".join(self.shown(name) for name in NAMES)

    def shown(self, name: str) -> str:
        value = getattr(self, name)
        return f"{name} {'none' if value is None else value}"

    def changed(self, name: str, text: str) -> Settings:
        """These settings with another value, given as text; ValueError says what is wrong with it."""
        kind, *others = get_args(KINDS[name]) or (KINDS[name],)
        try:
            value: Any = None if others and text == "none" else kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name} takes {what}{' or none' if others else ''}, not {text!r}") from None
        return replace(self, **{name: value})


NAMES = [field.name for field in fields(Settings)]
KINDS = get_type_hints(Settings)
COMMANDS = [*NAMES, "settings", "help", "quit"]
HELP = f"""\
A line is a prompt, which the model continues; an empty line goes on with the text so far.
  text\\            the prompt goes on in the next line
  ::text           a prompt that begins with a colon
  :                all settings
  :NAME VALUE      changes one, by its name or the beginning of it:
                   {", ".join(NAMES)}
                   (top_k and top_p may be none; a seed begins its samples anew)
  Ctrl-C           stops the writing, or clears the line
  Ctrl-D, :quit    ends
Tab completes names; the lines written at a terminal are remembered in {HISTORY}.
"""


class Session:
    """A model, settings, and the text so far. The same lines give the same session: its samples are numbered."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, sampling: Sampling, max_tokens: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.settings = Settings(**asdict(sampling), max_tokens=max_tokens)
        self.sample = 0
        self.ids: list[int] = []
        self.stopped = False

    def say(self, line: str) -> Iterator[str]:
        """Do as a line says, yielding text to print. ValueError tells what cannot be, and changes nothing; EOFError quits."""
        if line.startswith(":") and not line.startswith("::"):
            yield self._command(*line[1:].replace("=", " ", 1).lower().split(maxsplit=1))
        elif line:
            yield from self.continued(line[1:] if line.startswith(":") else line)
        elif self.ids:
            self._forget_unfinished_character()
            yield from self._sampled()
        else:
            yield from self.continued("\n")

    def continued(self, prompt: str) -> Iterator[str]:
        """Yield a prompt and its continuation, piece by piece."""
        if not prompt:
            raise ValueError("the prompt is empty; give at least one character")
        self.ids = self.tokenizer.encode(prompt).tolist()
        yield prompt
        yield from self._sampled()

    def stop(self) -> None:
        """End the sample that is being written before its next token."""
        self.stopped = True

    def _sampled(self) -> Iterator[str]:
        self.stopped, sample = False, self.sample
        self.sample += 1
        try:
            yield from decoded(self.tokenizer, self._tokens(sample))
        except Exception:
            yield "\n"  # so that the error's sentence begins a line
            raise
        yield "\n"

    def _tokens(self, sample: int) -> Iterator[int]:
        for token in generate(self.model, np.array(self.ids), self.settings.max_tokens, self.settings, sample):
            if self.stopped:
                return
            self.ids.append(token)
            yield token

    def _forget_unfinished_character(self) -> None:
        """Its other bytes would make no text on their own; the model writes it anew."""
        while len(self.ids) > 1 and self.tokenizer.decode(self.ids[-4:]).endswith("\ufffd"):
            self.ids.pop()

    def _command(self, word: str = "settings", value: str = "") -> str:
        name = _full(word.replace("-", "_"))
        if name == "quit":
            raise EOFError
        if name not in NAMES:
            if value:
                raise ValueError(f":{name} takes nothing, not {value!r}; :NAME VALUE changes a setting")
            return HELP if name == "help" else f"{self.settings}\n"
        if value:
            self.settings = self.settings.changed(name, value)
            self.sample = 0 if name == "seed" else self.sample
        return f"{self.settings.shown(name)}\n"


def _full(word: str) -> str:
    """The command that a word is or begins."""
    found = [name for name in COMMANDS if name.startswith(word)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f":{word} may be {' or '.join(found)}; write more of it")
    raise ValueError(f":{word} is none of {', '.join(COMMANDS)}; a prompt that begins with a colon is written with two")


def converse(session: Session, title: str, prompt: str | None = None) -> None:
    """Say to a session the lines of standard input, until it ends, after a first prompt if one is given.

    At a terminal lines are edited and remembered, and Ctrl-C stops a sample; in a pipe they are only read.
    """
    for stream in (sys.stdin, sys.stdout):  # a character that cannot be shown, or bytes that are none, end no session
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if sys.stdin.isatty() and sys.stdout.isatty():
        print(f"{title}\n{session.settings}\nWrite a prompt; :help tells more.")
        with Keyboard(session) as keyboard:
            _converse(session, keyboard.read, prompt)
    else:
        _converse(session, partial(_line, lambda _: input()), prompt)


def _converse(session: Session, read: Callable[[], str], prompt: str | None) -> None:
    said = iter(()) if prompt is None else session.continued(prompt)
    with suppress(EOFError):
        while True:
            try:
                for piece in said:
                    print(piece, end="", flush=True)
            except (ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
            said = session.say(read())


def _line(ask: Callable[[str], str]) -> str:
    text = ask("> ")
    while text.endswith("\\"):
        text = text[:-1] + "\n"
        with suppress(EOFError):
            text += ask(". ")
    return text


class Keyboard:
    """A terminal's lines, with the editing, the history and the completion of `readline` where Python has it. Within this
    context Ctrl-C clears the line being written; at other times it stops the session's sample."""

    def __init__(self, session: Session) -> None:
        self.session, self.reading = session, False
        try:
            import readline
        except ImportError:  # on Windows
            return
        readline.set_completer_delims("")
        readline.set_completer(_completion)
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
        for line, _ in groupby(_recalled()):
            readline.add_history(line)

    def __enter__(self) -> Keyboard:
        self.before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self.before)

    def read(self) -> str:
        """The next line; EOFError when there is none."""
        while True:
            try:
                return _line(self._ask)
            except (KeyboardInterrupt, SystemError):  # the latter from two at once, which `input` cannot bear
                print()
            except EOFError:
                print()
                raise

    def _ask(self, prompt: str) -> str:
        try:
            self.reading = True
            line = input(prompt)
        finally:
            self.reading = False
        if line:
            _remember(line)
        return line

    def _interrupted(self, *_: Any) -> None:
        if self.reading:
            self.reading = False  # one is enough for a line
            raise KeyboardInterrupt
        self.session.stop()


def _completion(text: str, n: int) -> str | None:
    found = [f":{name}{' ' * (name in NAMES)}" for name in COMMANDS if f":{name}".startswith(text) and text]
    return found[n] if n < len(found) else None


@contextmanager
def _history() -> Iterator[TextIO]:
    """The history's file, for this process alone."""
    import fcntl

    path = os.path.expanduser(HISTORY)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="utf-8", errors="surrogateescape") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _recalled() -> list[str]:
    """The last lines of the history, which loses the others; none where it cannot be written."""
    with suppress(ImportError, OSError), _history() as file:
        lines = file.read().split("\n")[:-1]
        if len(lines) > KEPT:
            file.seek(0)
            file.writelines(f"{line}\n" for line in lines[-KEPT:])
            file.truncate()
        return lines[-KEPT:]
    return []


def _remember(line: str) -> None:
    with suppress(ImportError, OSError), _history() as file:
        file.seek(0, os.SEEK_END)
        file.write(f"{line}\n")
