"""Which contenders meet over which work, and the tables that come of it."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minigpt import facts
from minigpt.benchmarks.fused import SHAPES
from minigpt.benchmarks.harness import Peer, Result, compare, ratios
from minigpt.config import PRESETS
from minigpt.program import child, command, install

MODELS = {name: vars(PRESETS[name].model(65)) for name in ("nanogpt-cpu", "shakespeare")}
CHOSEN = {"OPENBLAS_CORETYPE": ""}  # an empty value lets OpenBLAS choose, as if the variable were not there


class Report:
    """Collects tables for the terminal, a JSON file and a Markdown document."""

    def __init__(self) -> None:
        self.console = Console(width=None if sys.stdout.isatty() else 160)
        self.tables: list[dict[str, Any]] = []

    def progress(self, text: str) -> None:
        if self.console.is_terminal:
            self.console.print(f"[dim]{text:<60}[/dim]", end="\r", soft_wrap=True)

    def add(self, title: str, columns: list[str], rows: list[list[str]], data: Any) -> None:
        self.tables.append({"title": title, "columns": columns, "rows": rows, "data": data})
        table = Table(title=escape(title), title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print(table)

    def write(self, json_path: Path | None, markdown_path: Path | None) -> None:
        called, here = f"{command('benchmark')} {shlex.join(sys.argv[1:])}", machine()
        if json_path:
            json_path.write_text(json.dumps({"command": called, "machine": here, "tables": self.tables}, indent=1) + "\n")
        if markdown_path:
            text = f"`{called}` on {time.strftime('%Y-%m-%d')}\n\n" + "".join(f"- {k}: {v}\n" for k, v in here.items())
            for t in self.tables:
                lines = [t["columns"], ["---"] * len(t["columns"]), *t["rows"]]
                text += f"\n### {t['title']}\n\n" + "".join("| " + " | ".join(row) + " |\n" for row in lines)
            markdown_path.write_text(text)


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    versions = facts.versions("numpy", "torch", "jax", "mygrad", "autograd")
    return {
        "CPU": f"{facts.processor()}, {facts.cores()} cores",
        "BLAS of NumPy": facts.blas(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _ratio_cell(result: Result, ours: Result) -> str:
    r = ratios(ours, result)
    return f"{statistics.median(r):.2f}× ({min(r):.2f} to {max(r):.2f})"


def step(report: Report, rounds: int, compiled: bool, bf16: bool) -> None:
    """A training step of three sizes."""
    for preset, rows, count, repeat in (
        ("nanogpt-cpu", 12, rounds, 10),
        ("shakespeare", 8, rounds, 2),
        ("shakespeare", 64, max(3, rounds // 4), 1),
    ):
        model = MODELS[preset]
        work = {"model": model, "rows": rows}
        forced = "OPENBLAS_CORETYPE" in os.environ
        peers = [Peer("tinytensor", "ours:step", work, CHOSEN if forced else {})]
        if forced:
            peers.append(Peer("tinytensor, BLAS kernels as forced", "ours:step", work))
        peers.append(Peer("torch eager", "theirs:torch_step", work))
        if compiled:
            peers.append(Peer("torch.compile", "theirs:torch_step", {**work, "compiled": True}))
        if bf16:
            peers.append(Peer("torch eager, bf16 autocast", "theirs:torch_step", {**work, "bf16": True}))
        peers.append(Peer("JAX jit", "theirs:jax_step", work))
        peers.append(Peer("GEMM peak", "ours:gemm_peak", work, CHOSEN if forced else {}))
        *results, peak = compare(peers, count, 1, repeat, report.progress)
        gflop = PRESETS[preset].model(65).flops_per_token() * rows * model["block_size"] / 1e9
        peak_rate = 1 / min(peak.seconds)
        rows_out, ours = [], results[0]
        for r in results:
            if r.failed:
                rows_out.append([r.name, r.failed, "", "", "", "", ""])
                continue
            rows_out.append(
                [
                    r.name,
                    f"{r.median * 1e3:.1f} ({min(r.seconds) * 1e3:.1f} to {max(r.seconds) * 1e3:.1f})",
                    f"{rows * model['block_size'] / r.median:,.0f}",
                    f"{gflop / r.median:.0f}",
                    f"{gflop / r.median / peak_rate:.0%}",
                    f"{r.peak_memory / 1e6:,.0f}",
                    "" if r is ours else _ratio_cell(r, ours),
                ]
            )
        size = f"{rows} × {model['block_size']} tokens, dropout {model['dropout']}"
        report.add(
            f"step: {preset}, {size}; GEMM peak {peak_rate:.0f} GFLOP/s",
            ["", "ms (min to max)", "tokens/s", "GFLOP/s", "of peak", "peak MB", "its time / tinytensor's"],
            rows_out,
            {r.name: r.seconds for r in [*results, peak]},
        )


def ops(report: Report, rounds: int) -> None:
    """Overhead of small ops, and the fused ops at training shapes."""
    theirs = {"torch": "torch", "MyGrad": "mygrad", "HIPS autograd": "autograd"}
    peers = [Peer("tinytensor", "ours:small_ops"), *(Peer(n, f"theirs:{m}_small_ops") for n, m in theirs.items())]
    results = compare(peers, rounds, repeat=5, progress=report.progress)
    rows = [
        [r.name, r.failed or f"{r.median * 1e6:.2f}", "" if r is results[0] or r.failed else _ratio_cell(r, results[0])]
        for r in results
    ]
    title = "ops: one op on four elements, forward and backward"
    report.add(title, ["", "µs", "its time / tinytensor's"], rows, {r.name: r.seconds for r in results})
    rows, data = [], {}
    for op, shape in SHAPES.items():
        a, b = compare(
            [Peer("tinytensor", "fused:ours", {"op": op}), Peer("torch", "fused:torch", {"op": op})],
            rounds,
            repeat=5,
            progress=report.progress,
        )
        cells = [a.failed or f"{a.median * 1e3:.2f}", b.failed or f"{b.median * 1e3:.2f}"]
        rows.append([op, " × ".join(map(str, shape)), *cells, "" if a.failed or b.failed else _ratio_cell(b, a)])
        data[op] = {"tinytensor": a.seconds, "torch": b.seconds}
    columns = ["op, forward and backward", "shape", "tinytensor ms", "torch ms", "its time / tinytensor's"]
    report.add("ops: fused ops at training shapes, as a user calls it", columns, rows, data)


def generate(report: Report, rounds: int) -> None:
    """200 tokens from the `shakespeare` model, one sequence."""
    work = {"model": {**MODELS["shakespeare"]}, "tokens": 200}
    peers = [
        Peer("tinytensor", "ours:write", work),
        Peer("torch, KV cache", "theirs:torch_write", {**work, "cached": True}),
        Peer("torch, recomputing", "theirs:torch_write", {**work, "cached": False}),
    ]
    results = compare(peers, rounds, warmup=1, progress=report.progress)
    rows = [
        [r.name, r.failed or f"{200 / r.median:.0f}", "" if r is results[0] or r.failed else _ratio_cell(r, results[0])]
        for r in results
    ]
    report.add(
        "generate: 200 tokens, batch 1, 6/6/384",
        ["", "tokens/s", "its time / tinytensor's"],
        rows,
        {r.name: r.seconds for r in results},
    )


def scaling(report: Report, rounds: int, plot: Path | None) -> None:
    """What a step costs as the batch, the depth and the context grow, three points each, and how far that is from a line."""
    base = {**MODELS["nanogpt-cpu"], "n_embd": 192, "n_head": 6}
    series: list[tuple[str, str, list[tuple[int, dict[str, Any]]]]] = [
        ("sequences", "ms", [(n, {"model": base, "rows": n}) for n in (16, 32, 64)]),
        ("layers", "ms", [(n, {"model": {**base, "n_layer": n}, "rows": 16}) for n in (4, 8, 16)]),
        ("context", "MB", [(n, {"model": {**base, "block_size": n}, "rows": 2}) for n in (512, 1024, 2048)]),
    ]
    rows, lines = [], []
    for what, unit, points in series:
        results = compare([Peer(f"{what} {n}", "ours:step", work) for n, work in points], rounds, 1, 2, report.progress)
        sizes = [float(n) for n, _ in points]
        costs = [r.median * 1e3 if unit == "ms" else r.peak_memory / 1e6 for r in results]
        slope, start = np.polyfit(sizes, costs, 1)
        off = max(abs(c / (start + slope * n) - 1) for n, c in zip(sizes, costs, strict=True))
        measured = ", ".join(f"{n:.0f}: {c:,.0f} {unit}" for n, c in zip(sizes, costs, strict=True))
        rows.append([what, measured, f"{start:,.0f} + {slope:.3g} · {what}", f"{off:.1%}"])
        lines.append({"what": what, "unit": unit, "sizes": sizes, "costs": costs, "start": start, "slope": slope})
    title = "scaling: a step of 4 layers of 192, 16 × 64 tokens (context: peak memory, 2 sequences), one thing grown at a time"
    report.add(title, ["", "measured", "line", "furthest from it"], rows, lines)
    if plot:
        _plot_lines(lines, plot)


def _plot_lines(lines: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, line in zip(figure.subplots(1, len(lines)), lines, strict=True):
        sizes = np.array([0, *line["sizes"]])
        axes.plot(sizes, line["start"] + line["slope"] * sizes, color="0.7", label="straight line")
        axes.plot(line["sizes"], line["costs"], "o", color="tab:blue", label="measured")
        axes.set(xlabel=line["what"], ylabel="ms per step" if line["unit"] == "ms" else "peak memory, MB", xlim=0, ylim=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=120)


def memory(report: Report, rounds: int) -> None:
    """A step of GPT-2 124M at its context of 1,024, all activations kept, or the input of each block alone."""
    model = {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
    peers = [
        Peer(name, "ours:step", {"model": {**model, "checkpoint_activations": lean}, "rows": 4})
        for name, lean in (("all activations", False), ("the input of each block", True))
    ]
    results = compare(peers, max(2, rounds // 4), warmup=1, progress=report.progress)
    kept, rows = results[0], []
    for r in results:
        cells = [r.name, r.failed] if r.failed else [r.name, f"{r.peak_memory / 1e6:,.0f}", f"{r.median:.1f}"]
        if r is not kept and not r.failed and not kept.failed:
            cells += [f"{r.peak_memory / kept.peak_memory:.2f}×", _ratio_cell(r, kept)]
        rows.append(cells + [""] * (5 - len(cells)))
    columns = ["kept for backward", "peak MB", "s per step", "its memory / that of all", "its time / that of all"]
    data = {r.name: {"seconds": r.seconds, "peak_memory": r.peak_memory} for r in results}
    report.add("memory: GPT-2 124M, 4 × 1,024 tokens, forward, backward, clip, AdamW", columns, rows, data)


def ranks(report: Report, rounds: int) -> None:
    """The `shakespeare` model on 1, 2 and 4 MPI ranks of this machine: one batch shared, and one that grows with them."""
    launcher = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if launcher is None:
        report.console.print(f"ranks: no mpiexec found; {install('mpi')}", markup=False)
        return
    contenders = [  # name, ranks, threads of each, sequences of the step
        ("1 rank of 2 threads", 1, 2, 16),
        ("2 ranks of 1 thread", 2, 1, 16),
        ("1 rank of 1 thread", 1, 1, 16),
        ("4 ranks of 1 thread", 4, 1, 16),
        ("1 rank of 1 thread, a quarter of the batch", 1, 1, 4),
        ("2 ranks of 1 thread, half of the batch", 2, 1, 8),
    ]
    seconds: dict[str, list[float]] = {name: [] for name, *_ in contenders}
    with tempfile.TemporaryDirectory() as home:
        text = Path(home, "text.txt")
        text.write_text("".join(f"To be, or not to be: that is question {i * i}.\n" for i in range(1000)), encoding="utf-8")
        for turn in range(max(2, rounds // 3)):
            for name, count, threads, rows in contenders:
                report.progress(f"round {turn + 1}: {name}")
                out_dir = Path(home, f"{turn}-{count}-{threads}-{rows}")
                flags = f"shakespeare --accumulation 1 --micro-batch {rows} --shards {max(2, rows // 4)} --threads {threads} "
                flags += f"--max-steps 5 --sample-tokens 0 --no-wandb --data {text} --out-dir {out_dir}"
                rank = child("-m", "minigpt", "train", *flags.split())
                rank["args"][:0] = [launcher, "-n", str(count)]
                subprocess.run(**rank, check=True, stdout=subprocess.DEVNULL)
                ends = [json.loads(line)["seconds"] for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
                seconds[name].append(statistics.median(b - a for a, b in itertools.pairwise(ends)))
                shutil.rmtree(out_dir)
    first = seconds[contenders[0][0]]
    rows_out = []
    for name, _, _, rows in contenders:
        speeds = [rows * 256 / s for s in seconds[name]]
        against = [speed / (16 * 256 / s) for speed, s in zip(speeds, first, strict=True)]
        ratio = f"{statistics.median(against):.2f}× ({min(against):.2f} to {max(against):.2f})"
        times = f"{statistics.median(seconds[name]) * 1e3:,.0f}", f"{statistics.median(speeds):,.0f}"
        rows_out.append([name, *times, ratio])
    title = "ranks: shakespeare, 16 × 256 tokens a step unless said otherwise, on one machine"
    report.add(title, ["", "ms per step", "tokens/s", "its tokens/s / those of 1 rank of 2 threads"], rows_out, seconds)


def quick(report: Report, rounds: int) -> None:
    """The README's run, whole process, on the text in data/ (fetched before the clock starts)."""
    from minigpt.corpus import load_corpus
    from minigpt.start import DATA

    corpus = load_corpus("tiny", DATA)
    rows, seconds = [], []
    for _ in range(min(rounds, 3)):
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--data", str(corpus.path), "--out-dir", f"{folder}/quick"]
            start = time.perf_counter()
            subprocess.run(**child("-m", "minigpt", "train", "quick", *flags), check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
            last = json.loads(Path(folder, "quick", "metrics.jsonl").read_text().splitlines()[-1])
            rows.append([f"{seconds[-1]:.1f}", f"{last['val_loss']:.4f}", f"{last['tokens']:,}"])
    report.add(f"quick: whole process, {corpus.source}", ["seconds", "validation loss", "tokens"], rows, seconds)


def imports(report: Report, rounds: int) -> None:
    """What `import tinytensor` costs beyond `import numpy`."""
    seconds: dict[str, list[float]] = {"import numpy": [], "import numpy, tinytensor": []}
    for turn in range(rounds * 2 + 1):
        for line, times in seconds.items():
            process = child("-c", line)
            process["env"].pop("PYTHONDONTWRITEBYTECODE", None)  # as users run it: from bytecode
            start = time.perf_counter()
            subprocess.run(**process, check=True)
            if turn:
                times.append(time.perf_counter() - start)
    extra = statistics.median(b - a for a, b in zip(*seconds.values(), strict=True))
    rows = [[line, f"{statistics.median(t) * 1e3:.0f}"] for line, t in seconds.items()]
    rows += [["median difference of the pairs", f"{extra * 1e3:.0f}"]]
    report.add("import", ["", "ms, whole process"], rows, seconds)
