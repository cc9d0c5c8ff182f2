"""The proofs that need a GPU: every op and kernel, from memory full of NaN, against float64.

What they hold the library to is in the op registry of the tests, so they run from a checkout.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

import tinytensor as tt
from minigpt import facts
from minigpt.config import TrainConfig
from minigpt.program import HOME
from tinytensor import backend, optim, random
from tinytensor.backend.launcher import Source

PRECISIONS: tuple[Any, ...] = ("fp32", "tf32", "bf16")
LIMITS = {"fp32": 1e-5, "tf32": 2e-3, "bf16": 2e-2}  # of ‖x − exact‖/‖exact‖, of an op


class Check(NamedTuple):
    """One thing that has to be so: what it is, what was found, what is wanted."""

    what: str
    found: str
    wanted: str
    passed: bool


def attempt(what: str, wanted: str, find: Callable[[], tuple[str, bool]]) -> Check:
    """What `find` says was found, and whether that passes; an exception does not."""
    try:
        found, passed = find()
    except Exception as error:
        found, passed = one_line(error), False
    return Check(what, found, wanted, passed)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def below(limit: float, error: float) -> tuple[str, bool]:
    """An error as it is printed, and whether it passes; NaN never does."""
    return f"{error:.1e}", bool(error < limit)


@dataclass(frozen=True)
class Sizes:
    """What the checks run on; tests take less."""

    training: TrainConfig  # its model, and its batches for whole training steps
    rows: int = 16  # sequences whose activations the kernels are checked on
    steps: int = 10  # optimiser steps that have to give the same bits
    vocabulary: int = 50257  # of a large cross-entropy
    queries: int = 65  # of attention at odd shapes, with twice as many keys


@contextmanager
def observed(see: Callable[[str, tuple[Any, ...], Callable[[], Any]], Any]) -> Iterator[None]:
    """Within this block see(name, arguments, run) takes the place of each launch and each matrix product, which run() does."""
    launch, gemm = Source.launch, backend.cuda.gemm

    def launched(self: Source, name: str, grid: Any, block: int, *arguments: Any) -> None:
        see(name, arguments, lambda: launch(self, name, grid, block, *arguments))

    def multiplied(a: Any, b: Any, out: Any, **options: Any) -> Any:
        return see("gemm", (a, b, out), lambda: gemm(a, b, out, **options))

    with mock.patch.object(Source, "launch", launched), mock.patch.object(backend.cuda, "gemm", multiplied):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Within this block memory on the device comes full of NaN, so that an element that nobody writes is noticed."""
    import cupy

    class Pool(cupy.cuda.MemoryPool):
        def malloc(self, size: int) -> Any:
            memory = super().malloc(size)
            memory.memset_async(0xFF, size)
            return memory

    with cupy.cuda.using_allocator(Pool().malloc):
        yield


class NoRegistry(RuntimeError):
    """The tests are not beside the packages, as in an installed wheel."""


def registry() -> Any:
    """The tests' table of ops, by its path: another package may be called `tests`. NoRegistry where there is none."""
    if "op_registry" not in sys.modules:
        path = HOME / "tests/tinytensor/registry.py"
        if not path.exists():
            raise NoRegistry(f"{path} does not exist; run `python scripts/benchmark.py gpu` in a checkout, which has it")
        spec = importlib.util.spec_from_file_location("op_registry", path)
        assert spec and spec.loader
        sys.modules["op_registry"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["op_registry"])
    return sys.modules["op_registry"]


def distance(ours: Any, exact: Any) -> float:
    """‖ours − exact‖/‖exact‖, or ‖ours‖ where exact is 0; NaN where one of ours is."""
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    if ours.shape != exact.shape:
        raise ValueError(f"a result has shape {ours.shape}, expected {exact.shape}")
    return float(np.linalg.norm(ours - exact) / (np.linalg.norm(exact) or 1.0))


def computed(info: Any, call: Any, arrays: list[np.ndarray], device: str) -> tuple[list[Any], list[Any]]:
    """Results and gradients of a call of the registry, for random gradients of the results; and those, as float64."""
    leaves = [tt.Tensor(backend.to_device(a, device)) for a in arrays]
    for leaf in leaves:
        leaf.requires_grad = True
    args, kwargs = call.bind(leaves, lambda ids: tt.tensor(ids, device=device))
    outs = info.function(*args, **kwargs)
    outs = list(outs) if isinstance(outs, (list, tuple)) else [outs]
    graded, rng = [y for y in outs if y.requires_grad], np.random.default_rng(0)
    seeds = [rng.standard_normal(y.shape).astype(backend.bfloat16()).astype(y.dtype) for y in graded]  # exact in any dtype
    given = [tt.Tensor(backend.to_device(s, device)) for s in seeds]
    grads = tt.grad(graded, leaves, grad_outputs=given, allow_unused=True) if graded else [None] * len(leaves)
    found = [np.zeros(a.shape) if g is None else g.numpy() for a, g in zip(arrays, grads, strict=True)]
    return [y.numpy() for y in outs] + found, seeds


def exactly(info: Any, call: Any, arrays: list[np.ndarray], seeds: list[np.ndarray]) -> list[Any]:
    """The same by PyTorch, in float64 on the CPU."""
    import torch

    leaves = [torch.from_numpy(a.astype(np.float64)).requires_grad_(info.differentiable) for a in arrays]
    args, kwargs = call.bind(leaves, torch.from_numpy)
    outs = info.reference(*args, **kwargs)
    outs = list(outs) if isinstance(outs, (list, tuple)) else [outs]
    graded = [y for y in outs if y.requires_grad]
    given = [torch.from_numpy(s.astype(np.float64)).to(y.dtype) for s, y in zip(seeds, graded, strict=True)]
    grads = torch.autograd.grad(graded, leaves, given, allow_unused=True) if graded else [None] * len(leaves)
    found = [np.zeros(a.shape) if g is None else g.numpy() for a, g in zip(arrays, grads, strict=True)]
    return [y.detach().numpy() for y in outs] + found


def worst(ours: list[Any], exact: list[Any]) -> float:
    """The largest distance of any result or gradient; NaN if one is."""
    return float(np.max([distance(a, e) for a, e in zip(ours, exact, strict=True)]))


def each_call() -> list[tuple[Any, Any, list[np.ndarray]]]:
    """Every op of the registry with each of its calls and random float32 arrays for it."""
    return [
        (info, call, [a.astype(np.float32) for a in call.arrays(info.domain)])
        for info in registry().OPS
        for call in [*info.calls, *info.large]
    ]


def compilation(sizes: Sizes) -> list[Check]:
    """The kernels of the library, and then CuPy's own, on all cores: one after another they would take minutes."""

    def built(source: Source) -> Check:
        start = time.perf_counter()
        source._module.get_function(next(iter(source.kernels)))
        return Check(f"{source.path.name}: {len(source.kernels)} kernels", f"{time.perf_counter() - start:.1f} s", "", True)

    def tried(case: tuple[Any, Any, list[np.ndarray]]) -> None:
        info, call, arrays = case
        with suppress(Exception):  # which `ops` will tell of
            computed(info, call, arrays, "cuda")

    with ThreadPoolExecutor(facts.cores()) as threads:
        checks = list(threads.map(built, (backend.cuda._kernels, backend.cuda._flash)))
        start, cases = time.perf_counter(), each_call()
        list(threads.map(tried, cases))
    return [*checks, Check(f"CuPy's, for {len(cases)} calls of ops", f"{time.perf_counter() - start:.1f} s", "", True)]


def masks(sizes: Sizes) -> list[Check]:
    """Which elements are kept, told by ones: the kernels' masks are NumPy's."""
    key, p, square = random.Key(2**63 + 5, "dropout", 2**40, 3, 1), 0.2, (2, 3, 64, 64)
    n = sizes.rows * sizes.training.block_size * sizes.training.n_embd + 3
    kept = random.keep_mask(key, (n,), p)

    def dropout(dtype: str) -> tuple[tt.Tensor, np.ndarray]:
        return tt.dropout(_device(np.ones(n), dtype), p, key=key), kept

    def dropout_add(dtype: str) -> tuple[tt.Tensor, np.ndarray]:
        return tt.dropout_add(_device(np.ones(n), dtype), _device(np.zeros(n), "float32"), p, key=key), kept

    def causal_attention(dtype: str) -> tuple[tt.Tensor, np.ndarray]:
        nothing, rows = (_device(np.broadcast_to(a, square), dtype) for a in (np.zeros(1), np.eye(64)))
        weights = tt.causal_attention(nothing, nothing, rows, p, key=key)
        return weights, np.tril(random.keep_mask(key, square, p))

    def found(op: Callable[[str], tuple[tt.Tensor, np.ndarray]], dtype: str) -> tuple[str, bool]:
        ours, theirs = op(dtype)
        wrong = int(np.sum((ours.numpy() != 0) != theirs))
        return f"{wrong} of {theirs.size:,} differ", not wrong

    return [
        attempt(f"{op.__name__}, {dtype}", "none differs", functools.partial(found, op, dtype))
        for op in (dropout, dropout_add, causal_attention)
        for dtype in ("float32", "bfloat16")
    ]


def _device(array: np.ndarray, dtype: str) -> tt.Tensor:
    wanted = backend.bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
    return tt.Tensor(backend.to_device(np.ascontiguousarray(array.astype(wanted)), "cuda"))


def kernel_calls(sizes: Sizes) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """The ops that have kernels at shapes of training and at odd ones: name, call, and which arrays are bfloat16 in "bf16"."""
    A, Call, key = registry().A, registry().Call, {"key": registry().KEY}
    c, rng = sizes.training, np.random.default_rng(0)
    T, C, B, V = c.block_size, c.n_embd, sizes.rows, 65
    n, ids = B * T, rng.integers(0, V, B * T)
    for shape in ((n, 4 * C), (301, 223)):
        yield "gelu", Call(A(*shape)), (0,)
        yield "dropout", Call(A(*shape), 0.2, **key), ()
        yield "dropout_add", Call(A(*shape), A(*shape), 0.2, **key), (0,)
    for rows, width in ((n, C), (1025, 68)):
        yield "layer_norm", Call(A(rows, width), A(width), A(width)), ()
        yield "linear", Call(A(rows, width), A(4 * width, width), A(4 * width)), (0,)
        yield "linear", Call(A(rows, width), A(V, width)), ()
    yield "embedding", Call(A(V, C), ids.reshape(B, T)), ()
    yield "embedding", Call(A(5003, C), rng.integers(0, 5003, n)), ()
    yield "cross_entropy", Call(A(n, V), ids), (0,)
    yield "cross_entropy", Call(A(64, sizes.vocabulary), rng.integers(0, sizes.vocabulary, 64)), (0,)
    heads = [(B, c.n_head, T, T, C // c.n_head), *((2, 3, sizes.queries, 2 * sizes.queries, d) for d in (16, 32, 48, 64))]
    for B, H, T, S, d in heads:
        yield "causal_attention", Call(A(B, H, T, d), A(B, H, S, d), A(B, H, S, d)), (0, 1, 2)
        yield "causal_attention", Call(A(B, H, T, d), A(B, H, S, d), A(B, H, S, d), dropout_p=0.2, **key), (0, 1, 2)


def kernels(sizes: Sizes) -> list[Check]:
    """Results and gradients in each precision, from poisoned memory; a row for each op."""
    infos = {info.name: info for info in registry().OPS}
    by_op: dict[str, list[Any]] = {}
    for name, call, halves in kernel_calls(sizes):
        by_op.setdefault(name, []).append((call, halves))
    checks = []
    for name, calls in by_op.items():
        exact: dict[Any, list[Any]] = {}

        def found(precision: Any, info: Any, calls: Any, exact: Any) -> tuple[str, bool]:
            errors = []
            for place, (call, halves) in enumerate(calls):
                rounded = precision == "bf16" and bool(halves)
                dtypes = [backend.bfloat16() if rounded and i in halves else np.float32 for i in range(3)]
                arrays = [a.astype(d) for a, d in zip(call.arrays(info.domain), dtypes, strict=False)]
                with poisoned(), tt.precision(precision):
                    ours, seeds = computed(info, call, arrays, "cuda")
                if (place, rounded) not in exact:
                    exact[place, rounded] = exactly(info, call, arrays, seeds)
                errors.append(worst(ours, exact[place, rounded]))
            return below(LIMITS[precision], np.max(errors))

        for p in PRECISIONS:
            find = functools.partial(found, p, infos[name], calls, exact)
            checks.append(attempt(f"{name} in {p}, {len(calls)} calls", f"below {LIMITS[p]:.0e}", find))
    return checks


def ops(sizes: Sizes) -> list[Check]:
    """Every call of the registry in fp32; where float32 is not that exact, four times NumPy's error and at most 1e-4."""
    cases, errors = each_call(), {}

    def found(what: str, info: Any, call: Any, arrays: list[np.ndarray]) -> tuple[str, bool]:
        with poisoned():
            ours, seeds = computed(info, call, arrays, "cuda")
        exact = exactly(info, call, arrays, seeds)
        errors[what] = error = worst(ours, exact)
        if error < LIMITS["fp32"]:
            return below(LIMITS["fp32"], error)
        return below(min(1e-4, 4 * worst(computed(info, call, arrays, "cpu")[0], exact)), error)

    checks = []
    for case in cases:
        what, wanted = f"{case[0].name}({case[1]})", f"below {LIMITS['fp32']:.0e}, or 4 times NumPy's"
        checks.append(attempt(what, wanted, functools.partial(found, what, *case)))
    failed = [check for check in checks if not check.passed]
    total = f"{len(registry().OPS)} ops, {len(cases)} calls"
    most = max(errors, key=lambda what: errors[what], default="")
    best = f"{len(cases) - len(failed)} passed, at most {errors.get(most, 0):.1e}: {most}"
    return [*failed, Check(total, best, wanted, not failed)]


def optimiser(sizes: Sizes) -> list[Check]:
    """Three steps of clipping and AdamW on a flat buffer of several parameters, beside float64."""
    shapes, results = [(sizes.training.n_embd, 7), (3,), (40_000,)], {}
    for device, dtype in (("cuda", np.float32), ("cpu", np.float64)):
        rng = np.random.default_rng(0)
        given = [rng.standard_normal(s).astype(np.float32) for s in shapes]
        parameters = [tt.nn.Parameter(backend.to_device(a.astype(dtype), device)) for a in given]
        groups = [{"params": parameters[:2], "weight_decay": 0.3}, {"params": parameters[2:], "weight_decay": 0.0}]
        adamw, norms = optim.AdamW(groups, lr=0.1, betas=(0.9, 0.99)), []
        for _ in range(3):
            for p in parameters:
                g = rng.standard_normal(p.shape).astype(np.float32).astype(dtype)
                p.grad = tt.Tensor(backend.to_device(g, device))
            norms.append(optim.clip_grad_norm_(parameters, 1.0))
            adamw.step()
        state = adamw.state_dict()
        results[device] = [p.numpy() for p in parameters], state["exp_avg"], state["exp_avg_sq"], norms
    names, limit = ("weights", "first moments", "second moments", "norms"), LIMITS["fp32"]
    errors = [worst(ours, exact) for ours, exact in zip(results["cuda"], results["cpu"], strict=True)]
    return [attempt(n, f"below {limit:.0e}", functools.partial(below, limit, e)) for n, e in zip(names, errors, strict=True)]


def coverage(seen: set[str]) -> list[Check]:
    """Every kernel that is compiled has run in one of the checks before."""
    registry()  # without it some of them could not run
    names = [name for source in (backend.cuda._kernels, backend.cuda._flash) for name in source.kernels]
    missed = [name for name in (*names, "gemm") if name not in seen]
    return [Check(f"{len(names)} kernels and gemm", f"never run: {', '.join(missed) or 'none'}", "all run", not missed)]
