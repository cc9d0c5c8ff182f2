"""The command line of the benchmarks: what `minigpt benchmark` does, and scripts/benchmark.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import tyro

from minigpt.benchmarks import suite
from minigpt.program import errors_as_sentences


@errors_as_sentences("interrupted; nothing was written")
def benchmark() -> None:
    """Measure tinytensor beside its peers: `minigpt benchmark [step | ops | generate | …] [--flags]`."""
    tyro.cli(_measure)


def _measure(
    what: tyro.conf.Positional[
        Literal["step", "ops", "generate", "scaling", "memory", "ranks", "quick", "imports", "gpu", "all"]
    ] = "all",
    rounds: int = 12,
    compiled: bool = True,
    bf16: bool = True,
    json: Path | None = None,
    markdown: Path | None = None,
    plot: Path | None = None,
    budget: float = 420.0,
    data: Path | None = None,
) -> None:
    """Interleaved measurements, each peer in its own process; medians, spread, and ratios round by round.

    Args:
        what: which work to measure; `gpu`, which is not among `all`, proves and measures what needs a GPU.
        rounds: counted rounds; small work takes more of them, large work fewer.
        compiled: also measure torch.compile, which takes minutes to compile.
        bf16: also measure torch with bfloat16 autocast.
        json: write all times there; `gpu` writes gpu.json unless told otherwise.
        markdown: write the tables there.
        plot: draw `scaling` there, a PNG.
        budget: seconds that `gpu` may take; a part that is due after that is skipped.
        data: the text that `gpu` trains on; by default data/tiny_shakespeare.txt.
    """
    report = suite.Report()
    for name, value in suite.machine().items():
        report.console.print(f"[bold]{name}[/bold]  {value}", highlight=False)
    if what == "gpu":
        from minigpt.benchmarks import gpu

        sys.exit(gpu.run(report, gpu.Plan(rounds=rounds), budget, data, json or Path("gpu.json"), markdown))
    parts = {
        "step": lambda: suite.step(report, rounds, compiled, bf16),
        "ops": lambda: suite.ops(report, rounds),
        "generate": lambda: suite.generate(report, rounds),
        "scaling": lambda: suite.scaling(report, rounds, plot),
        "memory": lambda: suite.memory(report, rounds),
        "ranks": lambda: suite.ranks(report, rounds),
        "imports": lambda: suite.imports(report, rounds),
        "quick": lambda: suite.quick(report, rounds),
    }
    for measure in parts.values() if what == "all" else [parts[what]]:
        measure()
    report.write(json, markdown)
