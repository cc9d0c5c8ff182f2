"""A session line by line, and the program as a user meets it: in a terminal, and in a pipe."""

import itertools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt import interactive
from minigpt.checkpoint import LAST, Checkpoint, load
from minigpt.interactive import HELP, KEPT, NAMES, Keyboard, Session, Settings
from minigpt.sampling import Sampling, generate, speak
from minigpt.tokenizer import ByteTokenizer
from tests.minigpt.program import command, environment, refused
from tests.minigpt.small import trainer

SPAWN = [sys.executable, "-c", "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"]
UP = "\x1b[A"


@pytest.fixture(name="home", scope="module")
def home_with_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "runs" / "tiny").mkdir(parents=True)
    trainer(home / "runs" / "tiny").save()
    return home


@pytest.fixture(name="saved", scope="module")
def checkpoint_of_the_run(home: Path) -> Checkpoint:
    return load(home / "runs" / "tiny" / LAST)


def session_of(saved: Checkpoint, max_tokens: int = 12, **settings: Any) -> Session:
    return Session(saved.build_model(), saved.tokenizer, Sampling(**settings), max_tokens)


@pytest.fixture(name="session")
def session_of_the_run(saved: Checkpoint) -> Session:
    return session_of(saved)


def said(session: Session, *lines: str) -> list[str]:
    return ["".join(session.say(line)) for line in lines]


def test_a_line_is_continued_as_any_prompt_is_token_by_token(saved: Checkpoint, session: Session) -> None:
    expected = "".join(speak(saved.build_model(), saved.tokenizer, "ANNA:", 12, 1, Sampling()))
    pieces = list(session.say("ANNA:"))
    assert "".join(pieces) == expected
    assert [len(piece) for piece in pieces] == [5, *[1] * 12, 1]


def test_each_sample_is_another_and_the_same_lines_give_the_same_session(saved: Checkpoint, session: Session) -> None:
    lines = ["ANNA:", "ANNA:", "", ":temperature 2", "ANNA:", "ANNA: 7", "", "ANNA:"]

    def everything(session: Session) -> list[str]:
        return said(session, *lines[:5]) + refusals(session, lines[5]) + said(session, *lines[6:])

    first = everything(session)
    assert len({first[i] for i in (0, 1, 4, 7)}) == 4
    assert everything(session_of(saved)) == first
    assert everything(session_of(saved, seed=2)) != first


def test_an_empty_line_goes_on_with_the_text_so_far(saved: Checkpoint, session: Session) -> None:
    text, more = said(session, "ANNA:", "")
    ids = saved.tokenizer.encode(text[:-1])
    expected = saved.tokenizer.decode(generate(saved.build_model(), ids, 12, sample=1))
    assert more == expected + "\n"
    assert session.ids == [*ids, *saved.tokenizer.encode(expected)]


def test_at_first_an_empty_line_begins_as_no_prompt_does(saved: Checkpoint, session: Session) -> None:
    assert said(session, "") == ["".join(speak(saved.build_model(), saved.tokenizer, "\n", 12, 1, Sampling()))]


def test_two_colons_begin_a_prompt_with_one(session: Session) -> None:
    assert said(session, "::my lantern")[0].startswith(":my lantern")
    assert len(session.ids) == len(":my lantern") + 12


@pytest.mark.parametrize(
    ("line", "name", "value", "told"),
    [
        (":temperature 0", "temperature", 0.0, "temperature 0.0"),
        (":te 1e-1", "temperature", 0.1, "temperature 0.1"),
        (":TEMP=2", "temperature", 2.0, "temperature 2.0"),
        (":top_k 3", "top_k", 3, "top_k 3"),
        (":top-k  none", "top_k", None, "top_k none"),
        (":top_p 0.5", "top_p", 0.5, "top_p 0.5"),
        (":top_p None", "top_p", None, "top_p none"),
        (": r 1.5 ", "repetition_penalty", 1.5, "repetition_penalty 1.5"),
        (":see -4", "seed", -4, "seed -4"),
        (":m 0", "max_tokens", 0, "max_tokens 0"),
        (":temperature", "temperature", 0.8, "temperature 0.8"),
    ],
)
def test_a_setting_changes_by_its_name_or_beginning(saved: Checkpoint, line: str, name: str, value: Any, told: str) -> None:
    session = session_of(saved, top_k=7, top_p=0.9)
    before = session.settings
    assert said(session, line) == [told + "\n"]
    assert session.settings == Settings(**{**vars(before), name: value})
    assert type(getattr(session.settings, name)) is type(value)


def refusals(session: Session, *lines: str) -> list[str]:
    """What the session says of lines that it refuses, and that they changed nothing of it."""
    before, messages = (session.settings, session.sample, session.ids), []
    for line in lines:
        with pytest.raises(ValueError, match=r"^\S.*\S$") as caught:
            list(session.say(line))
        messages.append(str(caught.value))
    assert (session.settings, session.sample, session.ids) == before
    return messages


def test_what_cannot_be_is_refused_in_a_sentence(session: Session) -> None:
    said(session, "ANNA:")
    names = "temperature, top_k, top_p, repetition_penalty, seed, max_tokens, settings, help, quit"
    assert refusals(
        session,
        ":temp -1",
        ":temp warm",
        ":temp none",
        ":top_k 0",
        ":top_k 2.5",
        ":top_k 1 2",
        ":max -1",
        ":top 3",
        ":warmth 3",
        ":set temperature 3",
    ) == [
        "temperature=-1.0 must be finite and not negative",
        "temperature takes a number, not 'warm'",
        "temperature takes a number, not 'none'",
        "top_k=0 must be at least 1",
        "top_k takes a whole number or none, not '2.5'",
        "top_k takes a whole number or none, not '1 2'",
        "max_tokens=-1 must not be negative",
        ":top may be top_k or top_p; write more of it",
        f":warmth is none of {names}; a prompt that begins with a colon is written with two",
        ":settings takes nothing, not 'temperature 3'; :NAME VALUE changes a setting",
    ]
    (message,) = refusals(session, "ANNA: 7")
    assert message.startswith("character '7' (U+0037) at position 6 is not in the model's vocabulary")


def test_settings_are_shown_and_help_names_them(session: Session) -> None:
    expected = "temperature 0.8, top_k none, top_p none, repetition_penalty 1.0, seed 1337, max_tokens 12\n"
    assert said(session, ":", ":settings", ": ", ":set") == [expected] * 4
    (told,) = said(session, ":help")
    assert told == HELP
    assert all(word in told for word in (*NAMES, ":quit", "~/.minigpt_history"))


@pytest.mark.parametrize("line", [":quit", ":q"])
def test_quitting_is_the_end_of_input(session: Session, line: str) -> None:
    with pytest.raises(EOFError):
        list(session.say(line))


def test_settings_count_at_once(saved: Checkpoint, session: Session) -> None:
    how = Sampling(2.0, 5, 0.9, 1.5, 4)
    said(session, ":temp 2", ":top_k 5", ":top_p 0.9", ":rep 1.5", ":max 20", "ANNA:", ":seed 4")
    expected = "".join(speak(saved.build_model(), saved.tokenizer, "ANNA:", 20, 1, how))  # a seed begins its samples anew
    assert said(session, "ANNA:") == [expected]


def test_a_stopped_sample_is_text_so_far(saved: Checkpoint) -> None:
    session = session_of(saved, max_tokens=10**9)
    writing = session.say("ANNA:")
    text = "".join(itertools.islice(writing, 6))
    session.stop()
    assert list(itertools.islice(writing, 2)) == ["\n"]
    assert session.ids == saved.tokenizer.encode(text).tolist()
    more = "".join(itertools.islice(session.say(""), 7))
    assert more == saved.tokenizer.decode(generate(saved.build_model(), np.array(session.ids[:10]), 7, sample=1))
    assert not session.model.training


def test_after_its_end_a_text_is_followed_by_another(monkeypatch: pytest.MonkeyPatch, saved: Checkpoint) -> None:
    tokenizer, contexts = ByteTokenizer(), []
    monkeypatch.setattr(tokenizer, "end_of_text", ord("|"), raising=False)

    def dictated(model: object, ids: np.ndarray, *_: Any, **__: Any) -> Iterator[int]:
        contexts.append(bytes(ids.tolist()))
        yield from b" done|not read"

    monkeypatch.setattr(interactive, "generate", dictated)
    session = Session(saved.build_model(), tokenizer, Sampling(), 99)
    assert said(session, "All", "") == ["All done\n", " done\n"]
    assert contexts == [b"All", b"All done|"]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_cut_short_is_written_anew(monkeypatch: pytest.MonkeyPatch, saved: Checkpoint, cut: int) -> None:
    contexts, written = [], ["→ naïve 😀".encode()[: -4 + cut], b" and on"]

    def dictated(model: object, ids: np.ndarray, *_: Any, **__: Any) -> Iterator[int]:
        contexts.append(bytes(ids.tolist()).decode())
        yield from written.pop(0)

    monkeypatch.setattr(interactive, "generate", dictated)
    session = Session(saved.build_model(), ByteTokenizer(), Sampling(), 99)
    assert said(session, "€", "") == ["€→ naïve \ufffd\n", " and on\n"]
    assert contexts == ["€", "€→ naïve "]


def test_an_error_in_mid_sample_begins_a_line(session: Session) -> None:
    session.model.ln_f.weight.data[...] = np.nan
    writing = session.say("ANNA:")
    assert [next(writing), next(writing)] == ["ANNA:", "\n"]
    with pytest.raises(ValueError, match="logits are not finite"):
        next(writing)


class Terminal:
    """The program in a terminal of its own, where somebody types."""

    def __init__(self, cwd: Path, *args: str, home: Path | None = None) -> None:
        words = [*SPAWN, *command("generate.py", "--interactive", *args)]
        pipe, env = subprocess.PIPE, environment(HOME=str(home or cwd), TERM="dumb", INPUTRC=os.devnull)
        self.process = subprocess.Popen(words, cwd=cwd, env=env, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
        self.shown = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def type(self, keys: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(keys.encode())

    def interrupt(self) -> None:
        time.sleep(0.1)  # what was shown last is on the way to the next key, where a signal would wait for that key
        self.type("\x03")

    def until(self, text: str, seconds: float = 30) -> str:
        """All that is shown before `text`; the next call looks behind it."""
        deadline, out = time.monotonic() + seconds, self.process.stdout
        assert out is not None
        while text not in self.shown:
            ready, _, _ = select.select([out], [], [], max(0, deadline - time.monotonic()))
            new = os.read(out.fileno(), 65536) if ready else b""
            assert new, f"{text!r} was not shown, but {self.shown!r}"
            self.shown += new.decode(errors="replace").replace("\r\n", "\n")
        before, _, self.shown = self.shown.partition(text)
        return before

    def enter(self, line: str) -> str:
        """What is shown between a line and the next prompt."""
        self.type(line + "\n")
        self.until("\n")
        return self.until("\n> ") + "\n"

    def left(self) -> str:
        """The rest of what is shown, by a program that ends as it should."""
        out, errors = self.process.communicate(timeout=30)
        assert (self.process.returncode, errors) == (0, b"")
        return self.shown + out.decode().replace("\r\n", "\n")


@pytest.fixture(name="terminals")
def where_there_are_terminals() -> None:
    pytest.importorskip("termios")
    pytest.importorskip("readline")


@pytest.mark.usefixtures("terminals")
def test_a_session_in_a_terminal(home: Path, saved: Checkpoint, tmp_path: Path) -> None:
    session = session_of(saved)
    with Terminal(home, "--max-tokens", "12", home=tmp_path) as terminal:
        greeting = terminal.until("> ")
        assert greeting == f"{saved.pretrained().title}\n{session.settings}\nWrite a prompt; :help tells more.\n"
        for line in ("ANNA:", "", ":temp 0.5", "::", ":", ":help"):
            assert [terminal.enter(line)] == said(session, line)
        assert terminal.enter(":temp -1") == "error: temperature=-1.0 must be finite and not negative\n"
        assert terminal.enter("ANNA: 7").startswith("error: character '7' (U+0037) at position 6 is not in")
        terminal.type("ANNA:\\\n")
        terminal.until(". ")
        assert [terminal.enter("My lantern")] == said(session, "ANNA:\nMy lantern")
        terminal.type(":see\t")
        terminal.until(":seed ")
        assert terminal.enter("7") == "seed 7\n"

        terminal.type("BERT:")
        terminal.until("BERT:")
        terminal.interrupt()
        terminal.until("\n> ")
        terminal.type("ZOË:\\\n")
        terminal.until(". ")
        terminal.interrupt()
        terminal.until("\n> ")
        said(session, ":seed 7")
        assert [terminal.enter("ANNA:")] == said(session, "ANNA:")

        terminal.enter(":max 1000000000")
        terminal.type("ANNA:\n")
        terminal.until("ANNA:\nANNA:")
        terminal.interrupt()
        terminal.until("\n> ")
        assert terminal.enter(":max 0") == "max_tokens 0\n"
        assert terminal.enter("BERT:") == "BERT:\n"
        terminal.type("\x04")
        assert terminal.left() == "\n"


@pytest.mark.usefixtures("terminals")
def test_many_interruptions_at_once_clear_a_line_and_nothing_else(home: Path, tmp_path: Path) -> None:
    with Terminal(home, "--max-tokens", "0", home=tmp_path) as terminal:
        terminal.until("> ")
        for pause in range(400):
            terminal.type("\x03")
            time.sleep(pause % 20 * 5e-5)
        time.sleep(0.5)  # for the last of them to arrive
        terminal.type("ANNA:\n")
        terminal.until("ANNA:\nANNA:\n> ")
        terminal.type("\x04")
        assert terminal.left() == "\n"


@pytest.mark.usefixtures("terminals")
def test_lines_are_remembered_between_programs_beside_those_of_others(home: Path, tmp_path: Path) -> None:
    path = tmp_path / ".minigpt_history"
    path.write_bytes(b"".join(b"before %d\n" % i for i in range(KEPT + 5)) + b"not text \xff\n")
    with (
        Terminal(home, "--max-tokens", "0", home=tmp_path) as one,
        Terminal(home, "--max-tokens", "0", home=tmp_path) as two,
    ):
        for terminal in (one, two):
            terminal.until("> ")
        one.enter("ANNA:")
        two.enter("BERT:")
        one.enter("")
        two.type(":quit\n")
        assert two.left() == ":quit\n"
        one.process.kill()
    kept = [b"before %d" % i for i in range(6, KEPT + 5)]
    assert path.read_bytes().split(b"\n") == [*kept, b"not text \xff", b"ANNA:", b"BERT:", b":quit", b""]
    with Terminal(home, "--max-tokens", "0", home=tmp_path) as terminal:
        terminal.until("> ")
        terminal.type(UP * 3)
        terminal.until("ANNA:")
        assert terminal.enter("!") == "ANNA:!\n"
        terminal.type("\x04")
        terminal.left()
    assert path.read_bytes().endswith(b":quit\nANNA:!\n")


@pytest.mark.usefixtures("terminals")
def test_without_a_place_for_history_nothing_is_said_of_it(home: Path, tmp_path: Path) -> None:
    with Terminal(home, "--max-tokens", "0", "--prompt", "My\nlantern", home=tmp_path / "none") as terminal:
        assert terminal.until("> ").endswith("tells more.\nMy\nlantern\n")
        assert terminal.enter("ANNA:") == "ANNA:\n"
        terminal.type(UP)
        terminal.until("ANNA:")
        terminal.type("\n:quit\n")
        terminal.left()
    assert not list(tmp_path.iterdir())


def test_a_pipe_holds_what_was_said_and_nothing_else(home: Path, saved: Checkpoint, tmp_path: Path) -> None:
    session = session_of(saved, max_tokens=8)
    lines = ["", "ANNA:", ":temp 1", "", "::", "BERT:\\"]
    expected = ["".join(session.continued(":help")), *said(session, *lines[:-1], "BERT:\n")]
    done = subprocess.run(
        command("generate.py", "--interactive", "--max-tokens", "8", "--prompt", ":help"),
        cwd=home,
        env=environment(HOME=str(tmp_path), TERM="xterm"),
        input="\n".join([*lines[:2], ":warmth 3", "a \xe9", *lines[2:]]).encode("latin-1"),
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.decode()) == (0, "".join(expected))
    wrong, foreign, rest = done.stderr.decode().split("\n")
    assert wrong.startswith("error: :warmth is none of temperature, ")
    assert foreign.startswith("error: character '\ufffd' (U+FFFD) at position 2 is not in")
    assert rest == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--explain", "page.html"], "--explain shows one continuation, --interactive writes many; leave out one of them"),
        (["--num-samples", "2"], "--interactive writes one sample a line, not num_samples=2; leave out one of them"),
        (["--prompt", "-"], "--interactive reads its lines from standard input; leave out --prompt -"),
        (["--max-tokens=-1"], "max_tokens=-1 must not be negative"),
    ],
)
def test_what_does_not_go_together_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(home)
    assert refused(monkeypatch, "generate.py", "--interactive", *args).startswith(f"error: {message}")


def test_a_signal_is_a_stop_but_where_a_line_is_read(session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = iter(["goes on\\", "", "two"])

    def asked(_: str) -> str:
        answer = next(answers)
        if not answer:
            signal.raise_signal(signal.SIGINT)
        return answer

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = signal.getsignal(signal.SIGINT)
    with Keyboard(session) as keyboard:
        assert keyboard.read() == "two"
        assert not session.stopped
        signal.raise_signal(signal.SIGINT)
        assert session.stopped
    assert signal.getsignal(signal.SIGINT) is before
