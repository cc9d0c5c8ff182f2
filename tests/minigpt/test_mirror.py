"""The mirror at Weights & Biases: what it holds, and that nothing wandb may do holds up or ends a training."""

import importlib.util
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from minigpt import mirror
from tests.minigpt.program import ROOT, command, environment, execute

protobuf = pytest.importorskip("wandb.proto.wandb_internal_pb2")  # wandb's own reading of its files

KEY = "k" * 40
TRAINING = """
import sys, threading
from pathlib import Path
from minigpt import mirror

def say(line):
    print(line, flush=True)
    said.set()

said, mirror.LIMIT, patience = threading.Event(), float(sys.argv[1]), float(sys.argv[2])
made = mirror.Mirror("run1", "quick", {"lr": 4e-3, "data": Path("my.txt")}, Path("out"), say)
for step in (1, 2, 3):
    made.log(step, {"train_loss": 4.0 / step, "val_loss": None if step < 3 else 1.75})
made.sample(3, "ROMEO: <O> & Ünd\\n")
made.log(2, {"train_loss": 99.0})
said.wait(patience)
made.close(0, {"best_val_loss": 1.75})
"""
REAL = """
import sys
sys.path.remove(__file__.rpartition("/")[0])
del sys.modules["wandb"]
import wandb
"""  # the beginning of a stub that changes the installed package


def train(home: Path, stub: str = "", limit: float = 20, patience: float = 0, **more: str) -> tuple[list[str], float]:
    """Run a training that only logs, and closes at the first line or after `patience` seconds. It may print nothing else but
    the lines of its mirror, which come back, with its seconds. With `stub`, `import wandb` runs that text."""
    (home / "out").mkdir(exist_ok=True)
    if stub:
        (home / "stub").mkdir()
        (home / "stub" / "wandb.py").write_text(stub)
        more["PYTHONPATH"] = f"{home / 'stub'}{os.pathsep}{ROOT}"
    begin = time.monotonic()
    done = execute(home, "-c", TRAINING, str(limit), str(patience), HOME=str(home), NO_PROXY="127.0.0.1", **more)
    seconds = time.monotonic() - begin
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert all(line.startswith("W&B: ") for line in lines)
    return [line.removeprefix("W&B: ") for line in lines], seconds


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, after 7 bytes of wandb's."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield protobuf.Record.FromString(record)
            record = b""


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_offline_runs_hold_config_numbers_verse_and_end(tmp_path: Path) -> None:
    for _ in range(2):  # the second is the first one resumed
        (line,), _ = train(tmp_path, WANDB_MODE="offline")
        folder = Path(line.removeprefix("offline; `wandb sync ").removesuffix("` sends the run later"))
        found = list(records(folder / "run-run1.wandb"))
        run = next(r.run for r in found if r.HasField("run"))
        assert (run.run_id, run.display_name, run.project) == ("run1", "quick", "minigpt-shakespeare")
        assert {"lr": 4e-3, "data": "my.txt"}.items() <= values(run.config.update).items()
        rows = [values(r.history.item) for r in found if r.HasField("history")]
        numbers = [(row["_step"], row["train_loss"], row.get("val_loss")) for row in rows]
        assert numbers == [(1, 4, None), (2, 2, None), (3, 4 / 3, 1.75)]
        verse = folder / "files" / rows[-1]["sample/path"]
        assert verse.read_text("utf-8") == "<pre>ROMEO: &lt;O&gt; &amp; Ünd\n</pre>"
        assert any(values(r.summary.update).get("best_val_loss") == 1.75 for r in found if r.HasField("summary"))
        assert [r.exit.exit_code for r in found if r.HasField("exit")] == [0]
    assert len(list((tmp_path / "out/wandb").glob("offline-run-*-run1*"))) == 2


def test_a_killed_training_leaves_a_failed_run(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    args = command("-c", TRAINING.replace("made.close", "import time; time.sleep(60)  # "), "0", "60")
    env = environment(HOME=str(tmp_path), WANDB_MODE="offline")
    with subprocess.Popen(args, cwd=tmp_path, env=env, stdout=subprocess.PIPE) as training:
        assert training.stdout and b"offline" in training.stdout.readline()
        training.send_signal(signal.SIGKILL)
    (file,) = (tmp_path / "out/wandb").glob("offline-run-*-run1/run-run1.wandb")
    deadline = time.monotonic() + 30
    while not (ends := [r.exit.exit_code for r in records(file) if r.HasField("exit")]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ends == [1]


RAISING = REAL + "def log(*_, step, **__):\n    if step == 2:\n        raise RuntimeError('boom')\nwandb.Run.log = log"
HANGING = "import time\n{}\ndef hang(*_, **__):\n    time.sleep(1000)\n{} = hang"
BAD_DAYS = {
    "not logged in": ({}, ["not logged in; run `wandb login`, or leave it out with --no-wandb"]),
    "no such key": ({"WANDB_API_KEY": "short"}, ["WANDB_API_KEY invalid: .*; the run goes on without it"]),
    "disabled": ({"WANDB_MODE": "disabled"}, ["disabled by WANDB_MODE"]),
    "broken package": ({"stub": "raise ImportError('No module named x')"}, ["No module named x; the run goes on without it"]),
    "dying process": ({"stub": "import os\nos._exit(7)"}, [r"its process died \(exit code 7\); the run went on without it"]),
    "init raises": ({"stub": "def init(**_): raise OSError('no\\nway')"}, ["no; the run goes on without it"]),
    "log raises": ({"stub": RAISING, "WANDB_MODE": "offline"}, ["offline; .*", "boom; the run goes on without it"]),
    "init hangs": ({"stub": HANGING.format("", "init"), "limit": 1}, ["not done after 1 s and left; .*"]),
    "log hangs": (
        {"stub": HANGING.format(REAL, "wandb.Run.log"), "WANDB_MODE": "offline", "limit": 1, "patience": 20},
        ["offline; .*", "not done after 1 s and left; .*"],
    ),
    "finish hangs": (
        {"stub": HANGING.format(REAL, "wandb.Run.finish"), "WANDB_MODE": "offline", "limit": 1, "patience": 20},
        ["offline; .*", "not done after 1 s and left; .*"],
    ),
    "nobody there": (
        {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "1"},
        [r"its server did not take the run \(.*\); WANDB_MODE=offline would keep it for `wandb sync`"],
    ),
}


@pytest.mark.parametrize("day", BAD_DAYS)
def test_on_a_bad_day_one_line_says_so_and_the_training_ends_well(tmp_path: Path, day: str) -> None:
    settings, patterns = BAD_DAYS[day]
    lines, seconds = train(tmp_path, **settings)
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    assert seconds < 30


class Answer(BaseHTTPRequestHandler):
    """As much of W&B's server as one run asks for. From the first request that contains `silent_at`, it answers none."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.heard.append(body)
        if server.silent_at in body:
            server.silent.set()
        if server.silent.is_set():
            server.over.wait()
            self.close_connection = True
            return
        answer: dict[str, Any] = {}
        if b"mutation UpsertBucket" in body:
            project = {"id": "p", "name": "shakespeare", "entity": {"id": "e", "name": "me"}}
            answer = {"upsertBucket": {"bucket": {"id": "b", "name": "run1", "project": project}, "inserted": True}}
        elif b"mutation CreateRunFiles" in body:
            url = f"http://127.0.0.1:{server.server_port}/"
            files = [{"name": name, "uploadUrl": url + name} for name in json.loads(body)["variables"]["files"]]
            answer = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        text = json.dumps({"data": answer} if self.path == "/graphql" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self, silent_at: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.silent_at, self.silent, self.over = silent_at, threading.Event(), threading.Event()
        self.heard: list[bytes] = []
        self.settings = {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        pass  # a client that went away


def test_an_online_run_arrives(tmp_path: Path) -> None:
    with Server(silent_at=b"not in any request") as server:
        lines, _ = train(tmp_path, **server.settings)
    assert lines == [f"{server.settings['WANDB_BASE_URL']}/me/shakespeare/runs/run1"]
    heard = b"".join(server.heard)
    assert re.search(rb'\\"train_loss\\":2[,}]', heard) and rb"\"val_loss\":1.75" in heard
    assert "<pre>ROMEO: &lt;O&gt; &amp; Ünd\n</pre>".encode() in server.heard


def test_a_server_that_never_answers(tmp_path: Path) -> None:
    with Server(silent_at=b"") as server:
        (line,), seconds = train(tmp_path, **server.settings, WANDB_INIT_TIMEOUT="1")
    assert line.startswith("its server did not take the run (")
    assert server.heard and seconds < 30


def test_a_network_that_dies_half_way(tmp_path: Path) -> None:
    with Server(silent_at=b"wandb-history") as server:
        lines, seconds = train(tmp_path, **server.settings, WANDB_FINISH_TIMEOUT="1")
    (folder,) = (tmp_path / "out/wandb").glob("run-*-run1")
    assert lines[1:] == [f"not all was uploaded in time; `wandb sync {folder}` sends the rest"]
    assert seconds < 30
    assert sum(r.HasField("history") for r in records(folder / "run-run1.wandb")) == 3


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None)])  # no package, or a folder of its name
def test_without_wandb_there_is_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: ModuleSpec | None) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    said: list[str] = []
    made = mirror.Mirror("run1", "quick", {}, tmp_path, said.append)
    made.log(1, {"train_loss": 4.0})
    made.sample(1, "verse")
    made.close(0, {})
    assert said == ["W&B: not installed; `pip install wandb` to mirror runs there, or leave it out with --no-wandb"]


def test_a_process_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    said: list[str] = []
    mirror.Mirror("run1", "quick", {}, tmp_path, said.append).close(0, {})
    assert len(said) == 1 and said[0].startswith("W&B: its process does not start (")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    mirror.Mirror("run1", "quick", {}, tmp_path / "gone", said.append).close(0, {})
    assert said == [f"W&B: cannot write to {tmp_path / 'gone'}; the run goes on without it"]


def test_what_does_not_fit_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    made = mirror.Mirror("run1", "quick", {}, tmp_path, said.append)
    monkeypatch.setattr(mirror, "ROOM", 0)
    for step in (1, 2, 3):
        made.log(step, {"train_loss": 4.0})
    made.close(0, {})
    made.close(0, {})
    assert said[1:] == ["W&B: too slow for 3 steps and samples, which are only in the run's own files"]
