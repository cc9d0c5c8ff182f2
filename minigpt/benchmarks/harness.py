"""Peers in turn: each in a process of its own, woken for one measurement at a time, A B C A B C …

A peer is a function that builds something and returns a callable that does one piece of work. Its process builds it, says so,
and then does as many pieces as each line it reads says, answering with their mean seconds. While one works the others sleep on
their standard input, so thread pools, allocators and caches do not meddle, and a slow minute falls on all alike.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minigpt.facts import peak_memory
from minigpt.program import child


@dataclass
class Peer:
    """One contender: `minigpt.benchmarks.MODULE:FUNCTION` called with `arguments`."""

    name: str
    target: str
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """A peer's times in seconds, in the order of the rounds, its peak memory in bytes, or why there is none."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_memory: int = 0
    failed: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def compare(
    peers: list[Peer], rounds: int, warmup: int = 2, repeat: int = 1, progress: Callable[[str], None] = lambda _: None
) -> list[Result]:
    """Measure all peers in turn, `rounds` times after `warmup` uncounted ones. A peer that cannot run says why.

    A turn is the mean of `repeat` pieces of work: one alone, after the others' turns, would measure cold caches.
    """
    results, alive = [Result(p.name) for p in peers], []
    processes = []
    try:
        for peer, result in zip(peers, results, strict=True):
            progress(f"starting {peer.name}")
            process = _start(peer)
            processes.append(process)
            answer = _ask(process, None)
            if "error" in answer:
                result.failed = answer["error"]
            else:
                alive.append((process, result))
        for turn in range(warmup + rounds):
            progress(f"round {turn + 1 - warmup} of {rounds}" if turn >= warmup else "warming up")
            for process, result in [pair for pair in alive if not pair[1].failed]:
                answer = _ask(process, str(repeat))
                if "error" in answer:
                    result.failed = answer["error"]
                elif turn >= warmup:
                    result.seconds.append(answer["seconds"])
                    result.peak_memory = answer["peak_memory"]
    finally:
        for process in processes:
            if process.stdin:
                process.stdin.close()
            process.wait()
    return results


def ratios(ours: Result, theirs: Result) -> list[float]:
    """How many times faster ours was, round by round."""
    return [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]


def _start(peer: Peer) -> subprocess.Popen[str]:
    process = child("-m", "minigpt.benchmarks.harness", peer.target, json.dumps(peer.arguments))
    process["env"] |= peer.environment
    return subprocess.Popen(**process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _ask(process: subprocess.Popen[str], line: str | None) -> dict[str, Any]:
    assert process.stdin and process.stdout
    try:
        if line is not None:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    return json.loads(answer) if answer else {"error": f"its process ended with status {process.wait()}"}


def _work() -> None:
    """The life of a peer's process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    module, function = sys.argv[1].split(":")

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        piece = getattr(importlib.import_module(f"minigpt.benchmarks.{module}"), function)(**json.loads(sys.argv[2]))
        say(ready=True)
        for line in sys.stdin:
            times = []
            for _ in range(int(line)):
                start = time.perf_counter()
                own = piece()  # a piece that times itself returns seconds
                times.append(time.perf_counter() - start if own is None else own)
            say(seconds=sum(times) / len(times), peak_memory=peak_memory())
    except ModuleNotFoundError as error:
        say(error=f"{error.name} is not installed")
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}".splitlines()[0])


if __name__ == "__main__":
    _work()
