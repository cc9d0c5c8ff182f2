"""Where the files of a model come from: a folder, or a hub, which here is a server on this machine."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minigpt import gpt2, hub
from minigpt.config import GPTConfig
from minigpt.model import GPT
from minigpt.tokenizer import CharTokenizer
from tests.minigpt.program import printed
from tests.minigpt.small import verse

COMMIT = "0123456789" * 4
FILES = {"/someone/small/resolve/main/config.json": b'{"n_layer": 1}', "/small/resolve/main/config.json": b"{}"}
REFUSED = {"closed": (403, "GatedRepo"), "nobody": (401, "RepoNotFound"), "broken": (500, "")}
ASK = """
import json, sys, time
from minigpt import hub
time.sleep = lambda seconds: None  # or the package would wait before it tries again
for source, name in json.loads(sys.argv[1]):
    try:
        path = hub.find(source, name)
        print(json.dumps(path and path.read_text()))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""
LOAD = """
from minigpt import gpt2
found = gpt2.load("someone/whole")
print(found.tokenizer.encode("ANNA:").tolist())
print(float(found.weights["wpe.weight"].sum()))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's manners as a download needs."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        owner = self.path.split("/")[1]
        content = FILES.get(self.path, b"")
        status, code = REFUSED.get(owner, (200, "") if content else (404, "EntryNotFound"))
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Error-Code", code)
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(name="server")
def hub_on_this_machine() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(home: Path, port: int, *wanted: tuple[str, str]) -> list[str | None]:
    """What find() gives."""
    return told(home, port, ASK, json.dumps(wanted))


def told(home: Path, port: int, code: str, *args: str) -> list[Any]:
    """What code prints in a process of its own, for the package reads its environment once."""
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    return [json.loads(line) for line in printed(code, *args, **hub).splitlines()]


def test_a_file_comes_from_the_hub_once_and_then_from_the_cache(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    wanted = [("someone/small", "config.json"), ("small", "config.json"), ("someone/small", "vocab.json")]
    expected = ['{"n_layer": 1}', "{}", None]
    assert ask(tmp_path, server.server_port, *wanted) == expected
    server.shutdown()
    server.server_close()
    unknown = ("someone/small", "merges.txt")
    *known, last = ask(tmp_path, server.server_port, *wanted, unknown)
    assert known == expected
    assert last is not None
    assert last.startswith("OSError: someone/small is no folder, the hub's cache does not have its merges.txt, and http://127")
    assert last.endswith("; connect to the network, or name a folder")
    assert "\n" not in last


def test_a_whole_model_comes_from_the_hub_and_then_from_the_cache(
    tmp_path: Path, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = CharTokenizer.from_text(verse())
    model = GPT(GPTConfig(words.vocab_size, 8, 1, 1, 8))
    (tmp_path / "model").mkdir()
    gpt2.dump(gpt2.Pretrained(model.config, model.state_dict(), words), tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        monkeypatch.setitem(FILES, f"/someone/whole/resolve/main/{path.name}", path.read_bytes())
    expected = [words.encode("ANNA:").tolist(), float(model.wpe.weight.data.sum())]
    assert told(tmp_path, server.server_port, LOAD) == expected
    server.shutdown()
    server.server_close()
    assert told(tmp_path, server.server_port, LOAD) == expected


def test_what_the_hub_refuses_is_one_sentence(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    names = ("closed/model", "nobody/model", "broken/model", "a--b")
    closed, absent, broken, impossible = ask(tmp_path, server.server_port, *((name, "config.json") for name in names))
    assert closed == (
        "ValueError: the hub's repository closed/model is gated; accept its conditions on its page, "
        "then log in with: hf auth login"
    )
    for name, told in (("nobody/model", absent), ("a--b", impossible)):
        assert told == (
            f"ValueError: there is no folder {name}, and no repository of that name on the hub that is open to you; "
            "correct the name, or log in with: hf auth login"
        )
    assert broken is not None
    assert broken.startswith("OSError: broken/model is no folder")
    assert "500" in broken


def test_a_folder_is_looked_into_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").mkdir()
    assert hub.find(str(tmp_path), "config.json") == tmp_path / "config.json"
    assert hub.find(str(tmp_path), "vocab.json") is None
    assert hub.find(str(tmp_path), "model.safetensors") is None
    with pytest.raises(ValueError, match=r"config\.json is a file; name the folder that it is in, .*"):
        hub.find(str(tmp_path / "config.json"), "config.json")


@pytest.mark.parametrize("source", ["/no/such", "./no", "no/such/folder", "no\\such", "~/such", "-x", "a/"])
def test_what_can_be_no_repository_is_no_folder(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder .*; name one, or a repository of the .* hub such as gpt2"):
        hub.find(source, "config.json")


def test_without_the_package_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=r'there is no folder gpt2, and .*; pip install -e "\.\[hf\]"$'):
        hub.find("gpt2", "config.json")
