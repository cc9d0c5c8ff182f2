"""A mirror of a run at Weights & Biases. The run's own files are the record; losing the mirror costs the run nothing.

wandb lives in a process of its own, which is this file run as a program. Within the training it would print, wrap sys.exit, and
register exit hooks that wait for its service and its server without a limit; a process can be left behind, or killed.
"""

from __future__ import annotations

import html
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

LIMIT = 20.0  # seconds that close() waits, and that the process outlives a training that was killed
ROOM = 10_000  # messages that may wait to be sent, some megabytes
SETTINGS = {  # wandb's, in seconds where they are times; the user's environment goes before them
    "WANDB_PROJECT": "minigpt-shakespeare",
    "WANDB_CONSOLE": "off",
    "WANDB_SILENT": "true",  # or it would first ask the server for the user's name, for 10 seconds
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "12",
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
}


class Mirror:
    """Sends a run to wandb's process. Nothing here raises or waits, except that `close` waits for LIMIT or a little more."""

    def __init__(self, run_id: str, name: str, config: dict[str, Any], out_dir: Path, say: Callable[[str], None]) -> None:
        """Begin the W&B run `run_id`, or go on with it if there is one. `say` gets single lines, also from another thread."""
        self._say, self._lost = say, 0
        self._waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._hearing: threading.Thread | None = None  # alive while the process is
        if os.environ.get("WANDB_MODE") == "disabled":
            return say("W&B: disabled by WANDB_MODE")
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # without an origin it is only a folder of that name
            return say("W&B: not installed; `pip install wandb` to mirror runs there, or leave it out with --no-wandb")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],  # -P: no module beside this one may stand in for another of its name
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,  # a buffer's lock, held by a thread, can abort the interpreter as it exits
                start_new_session=True,  # Ctrl-C is for the training, which then says how it ended
                env=SETTINGS | {"WANDB_PROGRAM": sys.argv[0], "WANDB_X_STATS_PID": str(os.getpid())} | dict(os.environ),
            )
        except OSError as error:
            return say(f"W&B: its process does not start ({error}); the run goes on without it")
        self._hearing = threading.Thread(target=self._hear, daemon=True)
        self._hearing.start()
        start = {"id": run_id, "name": name, "config": config, "dir": str(out_dir.resolve())}
        self._put(start | {"training": os.getpid(), "argv": sys.argv})
        threading.Thread(target=self._send, daemon=True).start()

    def log(self, step: int, row: dict[str, Any]) -> None:
        """The numbers of a step, None left out. W&B ignores steps below its newest, such as those a resumed run makes again."""
        self._put({"step": step, "row": {k: v for k, v in row.items() if v is not None}})

    def sample(self, step: int, text: str) -> None:
        """Verse written at an evaluation."""
        self._put({"step": step, "sample": text})

    def close(self, exit_code: int, summary: dict[str, Any]) -> None:
        """End the W&B run, as failed unless `exit_code` is 0. Without a close it ends as failed, when the training does."""
        if self._hearing is None:
            return
        self._put({"exit_code": exit_code, "summary": summary}, last=True)
        self._waiting.put(b"")
        code: int | None = None
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(LIMIT)
        if code is None:
            self._say(f"W&B: not done after {LIMIT:.0f} s and left; `wandb sync` may send what is in the run's folder wandb")
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        self._hearing.join(1)  # it may be about to say why
        if code:
            self._say(f"W&B: its process died (exit code {code}); the run went on without it")
        elif self._lost and code == 0:
            self._say(f"W&B: too slow for {self._lost} steps and samples, which are only in the run's own files")
        self._hearing = None

    def _put(self, message: dict[str, Any], last: bool = False) -> None:
        if self._hearing is None or not self._hearing.is_alive():
            return
        if last or self._waiting.qsize() < ROOM:
            self._waiting.put(json.dumps(message, default=str).encode() + b"\n")
        else:
            self._lost += 1

    def _send(self) -> None:
        with suppress(OSError), self._process.stdin as pipe:  # type: ignore[union-attr]
            for line in iter(self._waiting.get, b""):
                while line:
                    line = line[pipe.write(line) :]  # a signal can cut a write short

    def _hear(self) -> None:
        with self._process.stdout as pipe:  # type: ignore[union-attr]
            for line in pipe:
                self._say("W&B: " + line.decode().strip())


def _mirror(start: dict[str, Any], messages: Iterable[dict[str, Any]], tell: Callable[[str], object]) -> None:
    """In wandb's process: a W&B run from its beginning to its end."""
    if not os.access(start["dir"], os.R_OK | os.W_OK):  # wandb would go to a temporary folder, and say so to nobody
        raise PermissionError(f"cannot write to {start['dir']}")
    sys.argv = start["argv"]  # W&B shows them as the run's command
    import wandb

    run = wandb.init(id=start["id"], name=start["name"], config=start["config"], dir=start["dir"], resume="allow")
    if run.disabled:
        tell("disabled by `wandb disabled`; `wandb enabled` mirrors runs again")
        return
    sync = f"`wandb sync {Path(run.dir).parent}`"
    tell(f"offline; {sync} sends the run later" if run.offline else f"{run.url}")
    end: dict[str, Any] = {"exit_code": 1, "summary": {}}
    for message in messages:
        if "row" in message:
            run.log(message["row"], step=message["step"])
        elif "sample" in message:
            page = f"<pre>{html.escape(message['sample'])}</pre>"
            run.log({"sample": wandb.Html(page, inject=False)}, step=message["step"])
        else:
            end = message
    run.summary.update(end["summary"])
    try:
        run.finish(exit_code=end["exit_code"])
    except TimeoutError:
        tell(f"not all was uploaded in time; {sync} sends the rest")


def _explain(error: Exception) -> str:
    text = str(error).partition("\n")[0].rstrip(".") or repr(error)
    if "No API key" in text:
        return "not logged in; run `wandb login`, or leave it out with --no-wandb"
    if type(error).__name__ == "CommError":
        return f"its server did not take the run ({text}); WANDB_MODE=offline would keep it for `wandb sync`"
    return f"{text}; the run goes on without it"


def _watch(training: int, over: threading.Event) -> None:
    """End this process soon after the training or the mirroring has ended, whatever wandb and its exit hooks wait for."""
    while os.getppid() == training and not over.wait(1):
        pass
    time.sleep(3 if over.is_set() else LIMIT)
    os._exit(0)


def main() -> None:
    """Read messages from stdin and tell lines on stdout, and keep both from wandb, which would ask and chat there."""
    messages, told = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    nothing, over = os.open(os.devnull, os.O_RDWR), threading.Event()
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    for number in (signal.SIGINT, signal.SIGTERM):  # for the training too, whose end is what ends this process
        signal.signal(number, signal.SIG_IGN)
    with suppress(AttributeError):  # not on Windows
        os.nice(10)  # the cores are the training's
    start = json.loads(messages.readline())
    threading.Thread(target=_watch, args=(start["training"], over), daemon=True).start()
    try:
        _mirror(start, map(json.loads, messages), lambda line: told.write(line + "\n"))
    except Exception as error:
        told.write(_explain(error) + "\n")
    over.set()


if __name__ == "__main__":
    main()
