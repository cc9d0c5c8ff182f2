"""Where a micro-step's time on a GPU goes: each launch between two events, and how many there are."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from minigpt.benchmarks.gpu_checks import observed, one_line
from minigpt.benchmarks.gpu_speed import Session, free, operands, whole
from minigpt.benchmarks.ours import DeviceStep
from tinytensor.backend.cublas import gemm
from tinytensor.backend.launcher import Strided

_FLASH_PRODUCTS = {"flash_forward": 2, "flash_backward_queries": 3, "flash_backward_keys": 4}


def graph_nodes(graph: Any) -> int:
    """How many operations a captured graph holds, which would be launched one by one without it; by CUDA's driver."""
    count = ctypes.c_size_t()
    status = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(ctypes.c_void_p(graph.graph), None, ctypes.byref(count))
    if status:
        raise RuntimeError(f"cuGraphGetNodes failed with status {status}")
    return count.value


def work_of(name: str, arguments: tuple[Any, ...]) -> tuple[str, int, int]:
    """A launch's name in the table, its bytes, each array counted once, and its FLOPs where it multiplies matrices."""
    arrays = [a.array if isinstance(a, Strided) else a for a in arguments if isinstance(a, Strided) or hasattr(a, "strides")]
    size = sum(a.size * a.itemsize for a in arrays)
    if name == "gemm":
        a, _, out = arrays
        *stack, m, k = a.shape
        label = f"gemm {' × '.join(map(str, [*stack, m, k, out.shape[-1]]))} in {a.dtype.name}"
        return label, size, 2 * a.size * out.shape[-1]
    products = _FLASH_PRODUCTS.get(name.partition("<")[0], 0)
    if not products:
        return name, size, 0
    (B, H, _, d), (T, S) = arrays[0].shape, arguments[-2:]
    return name, size, products * 2 * B * H * d * (T * S - T * (T - 1) // 2)


def launches(session: Session) -> None:
    """Every launch of a micro-step outside of a graph, between two events; what lies between launches is CuPy's own."""
    import cupy

    for precision in ("bf16", "tf32"):
        free()
        graph, eager = (DeviceStep(session.plan.model, session.plan.rows, precision, graph) for graph in (True, False))
        for step in (graph, graph, eager, eager):
            whole(step)
        _, delay, out = operands(session.plan.gemm)[0]
        noted: list[tuple[str, int, int, Any, Any]] = []

        def see(name: str, arguments: tuple[Any, ...], launch: Callable[[], Any], noted: Any = noted) -> Any:
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            result = launch()
            end.record()
            noted.append((*work_of(name, arguments), start, end))
            return result

        for _ in range(2):  # the device is busy until the host is ahead, so that it never waits for a launch
            gemm(delay, delay, out)
        with observed(see):
            eager.micro_step()
        cupy.cuda.Device().synchronize()
        total = cupy.cuda.get_elapsed_time(noted[0][3], noted[-1][4])
        try:
            nodes: Any = graph_nodes(graph.replayed._recorded[()].graph)
            session.found["launches", precision] = nodes
        except Exception as error:
            nodes = one_line(error)
        rows = _by_kernel(session, precision, noted, total)
        columns = ["kernel", "calls", "ms", "share", "GB/s, each array once (of the copy's)", "TFLOP/s (of the GEMM's)"]
        title = f"a micro-step in {precision}, launch by launch: {total:.2f} ms, {len(noted)} launches of ours"
        session.report.add(f"gpu: {title}; operations in its graph: {nodes}", columns, rows, rows)


def _by_kernel(session: Session, precision: str, noted: list[tuple[str, int, int, Any, Any]], total: float) -> list[list[str]]:
    """Rows of the table, the kernel that took longest first."""
    import cupy

    sums: dict[str, Any] = {}
    for name, size, flops, start, end in noted:
        sums[name] = sums.get(name, 0) + np.array([1, cupy.cuda.get_elapsed_time(start, end), size, flops])

    def share(rate: float, key: Any) -> str:
        return f" ({rate / session.found[key]:.0%})" if key in session.found else ""

    rows = []
    for name, (calls, ms, size, flops) in sorted(sums.items(), key=lambda item: -item[1][1]):
        moved, made = size / ms * 1e3, flops / ms * 1e3
        products = f"{made / 1e12:,.1f}{share(made, ('peak', precision))}" if flops else ""
        speed = f"{moved / 1e9:,.0f}{share(moved, 'bandwidth')}"
        rows.append([name, f"{calls:.0f}", f"{ms:.3f}", f"{ms / total:.1%}", speed, products])
    rest = total - sum(ms for _, ms, *_ in sums.values())
    return [*rows, ["CuPy's own, and gaps", "", f"{rest:.3f}", f"{rest / total:.1%}", "", ""]]
