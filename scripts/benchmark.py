"""Measure tinytensor beside its peers: `python scripts/benchmark.py step`, or `ops`, `generate`, …, or all of them."""

import sys
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import suite


def main(
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
        from benchmarks import gpu

        try:
            sys.exit(gpu.run(report, gpu.Plan(rounds=rounds), budget, data, json or Path("gpu.json"), markdown))
        except RuntimeError as error:
            sys.exit(str(error))
    if what in ("step", "all"):
        suite.step(report, rounds, compiled, bf16)
    if what in ("ops", "all"):
        suite.ops(report, rounds)
    if what in ("generate", "all"):
        suite.generate(report, rounds)
    if what in ("scaling", "all"):
        suite.scaling(report, rounds, plot)
    if what in ("memory", "all"):
        suite.memory(report, rounds)
    if what in ("ranks", "all"):
        suite.ranks(report, rounds)
    if what in ("imports", "all"):
        suite.imports(report, rounds)
    if what in ("quick", "all"):
        suite.quick(report, rounds)
    report.write("python " + " ".join(sys.argv), json, markdown)


if __name__ == "__main__":
    tyro.cli(main)
