"""The harness of the benchmarks, far from a checkout and with few of the peers."""

import os
from pathlib import Path

import pytest

from minigpt.benchmarks import suite
from minigpt.benchmarks.harness import Peer, compare


@pytest.fixture(name="alone")
def no_peer_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the working directory a good place to import from."""
    peers = tmp_path / "peers"
    peers.mkdir()
    for name in ("torch", "mygrad", "autograd", "jax"):
        (peers / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    monkeypatch.setenv("PYTHONPATH", str(peers), prepend=os.pathsep)
    (tmp_path / "tinytensor.py").write_text("raise ImportError")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("alone")
def test_absent_peers_are_named_and_ours_is_measured() -> None:
    ours, *theirs = compare(
        [
            Peer("tinytensor", "ours:small_ops", {"n": 2}),
            Peer("torch", "theirs:torch_small_ops"),
            Peer("JAX", "theirs:jax_step", {"model": suite.MODELS["nanogpt-cpu"], "rows": 1}),
        ],
        rounds=2,
    )
    assert (ours.failed, len(ours.seconds)) == ("", 2)
    assert [peer.failed for peer in theirs] == ["torch is not installed", "jax is not installed"]


@pytest.mark.usefixtures("alone")
def test_the_tables_are_made_without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "SHAPES", {"gelu": suite.SHAPES["gelu"]})
    report = suite.Report()
    suite.ops(report, 1)
    small, fused = (table["rows"] for table in report.tables)
    assert [row[1] for row in small[1:]] == [f"{name} is not installed" for name in ("torch", "mygrad", "autograd")]
    assert float(small[0][1]) > 0
    assert float(fused[0][2]) > 0
    assert fused[0][3] == "torch is not installed"


def test_a_peer_that_breaks_says_how() -> None:
    broken, _ = compare([Peer("broken", "ours:small_ops", {"m": 1}), Peer("whole", "ours:small_ops", {"n": 2})], rounds=1)
    assert broken.failed.startswith("TypeError: small_ops() got an unexpected keyword argument 'm'")
