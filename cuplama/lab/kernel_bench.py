"""``cuplama kernels bench``: ops at their shapes, each checked against its reference and timed alone.

A wrong kernel has no time. A row is an op at a shape, beside the machine's peaks and what else could be used there.
With a model the rows of a pass add up, and the sum stands beside what the engine takes for the whole pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..backends import Backend
from ..backends.cuda.backend import CudaBackend
from ..model import Model
from .alternatives import alternative
from .check import backend_checker
from .environment import environment
from .peaks import Peaks
from .report import Column
from .steps import announced
from .timing import Spread, cache_bytes, rotation, time_calls, time_workload
from .trials import UNTIL_REPLAYED, Runs, Trial
from .workloads import Workload

__all__ = ["COLUMNS", "PassTime", "bench", "columns", "pass_times", "result", "row"]

_MAX_HALF = 32  # decode steps on each side of the depth, at most

COLUMNS = (
    Column("graph", "graph"),
    Column("op", "op"),
    Column("weights", "weights"),
    Column("shape", "shape"),
    Column("count", "count", 1),
    Column("microseconds", "µs", 3, "microseconds_spread"),
    Column("gigabytes_per_second", "GB/s", 3),
    Column("percent_of_read_bandwidth", "% of read", 3),
    Column("teraflops", "TFLOP/s", 3),
    Column("percent_of_matrix_rate", "% of GEMM", 3),
    Column("alternative", "or"),
    Column("alternative_microseconds", "µs", 3),
    Column("total_microseconds", "count x µs", 3),
)


_CALL_COLUMNS = (
    Column("cupyx_cpu_microseconds", "cupyx CPU µs", 3),
    Column("cupyx_gpu_microseconds", "cupyx GPU µs", 3),
)


def columns(rows: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """What a table of the rows shows: with the times of single calls behind the others where they were taken."""
    if not any("cupyx_cpu_microseconds" in r for r in rows):
        return COLUMNS
    at = next(i for i, column in enumerate(COLUMNS) if column.field == "microseconds") + 1
    return (*COLUMNS[:at], *_CALL_COLUMNS, *COLUMNS[at:])


def row(workload: Workload, taken: Spread, other: tuple[str, Spread] | None, peaks: Peaks) -> dict[str, Any]:
    """One line of the table: medians, half the distance of the quartiles, and bytes and operations from the op."""
    call, median = workload.call, taken.median
    moved, operations = call.nbytes(), call.flops()
    return {
        "graph": workload.graph,
        "op": workload.op.name,
        "weights": "/".join(workload.weights),
        "shape": workload.shape,
        "dtype": workload.dtype,
        "count": workload.count,
        "microseconds": 1e6 * median,
        "microseconds_spread": 1e6 * taken.half_range,
        "bytes": moved,
        "operations": operations,
        "gigabytes_per_second": moved / median / 1e9,
        "percent_of_read_bandwidth": peaks.percent_read(moved / median),
        "teraflops": operations / median / 1e12 if operations else None,
        "percent_of_matrix_rate": peaks.percent_arithmetic(operations / median) if operations else None,
        "alternative": other[0] if other else None,
        "alternative_microseconds": 1e6 * other[1].median if other else None,
        "total_microseconds": 1e6 * median * workload.count,
    }


@dataclass(frozen=True)
class PassTime:
    """A whole pass, in seconds: the sum of its ops, each timed alone, and what the engine took for it.

    graph: "decode" or "prefill"; what: the pass in words.
    """

    graph: str
    what: str
    summed: float
    measured: float

    def __str__(self) -> str:
        return (
            f"{self.graph}: {self.what}: the ops add up to {1e3 * self.summed:.4g} ms; measured "
            f"{1e3 * self.measured:.4g} ms ({100 * self.summed / self.measured:.0f}%)"
        )

    def fields(self) -> dict[str, Any]:
        """The pass by stable names, in milliseconds."""
        return {
            "graph": self.graph,
            "what": self.what,
            "summed_ms": 1e3 * self.summed,
            "measured_ms": 1e3 * self.measured,
        }


def bench(
    backend: Backend,
    workloads: Sequence[Workload],
    peaks: Peaks,
    say: Callable[[str], object] = lambda text: None,
    calls: bool = False,
) -> list[dict[str, Any]]:
    """Check and time the workloads, in order: by replays of a captured graph, and with ``calls`` also call by call.

    Raises WrongResultError at the first wrong one.
    """
    cache = cache_bytes(backend)
    rows, checker = [], backend_checker(backend)
    for workload in announced(workloads, lambda workload: workload.label, say):
        arrays = workload.arrays()
        checker.check(workload, arrays)
        ins = rotation(backend, workload, arrays, cache)
        found = row(workload, time_workload(backend, workload, ins), alternative(backend, workload, ins), peaks)
        if calls and isinstance(backend, CudaBackend):
            found |= time_calls(backend, workload, ins[0]).fields()
        rows.append(found)
    return rows


def pass_times(
    model: Model, rows: Sequence[Mapping[str, Any]], batch: int, depth: int, tokens: int, repeats: int = 5
) -> list[PassTime]:
    """What the engine takes for the passes whose ops the rows are: a decode step around ``depth``, and a prompt.

    batch: sequences of the decode step; tokens: of the prompt. The median of the repeats counts, behind as many runs as
    it takes until every pass is replayed.
    """
    runs = Runs(model)
    total = {g: sum(r["total_microseconds"] for r in rows if r["graph"] == g) / 1e6 for g in ("decode", "prefill")}
    half = min(_MAX_HALF, depth - 1)
    generation = Trial(0, 2 * half or 1, depth - half, batch)  # its steps see ``depth`` tokens on average
    decode = _median(lambda: runs.generation(generation)[1] / generation.generated, repeats)
    prompt = _median(lambda: runs.prompt(Trial(tokens, 0)), repeats)
    return [
        PassTime("decode", f"a step of {batch} at {depth} tokens", total["decode"], decode),
        PassTime("prefill", f"a prompt of {tokens} tokens", total["prefill"], prompt),
    ]


def _median(seconds: Callable[[], float], repeats: int) -> float:
    """The median of the repeats, behind a warm-up."""
    for _ in range(UNTIL_REPLAYED):
        seconds()
    return Spread(tuple(seconds() for _ in range(repeats))).median


def result(
    backend: Backend, rows: Sequence[Mapping[str, Any]], peaks: Peaks, passes: Sequence[PassTime]
) -> dict[str, Any]:
    """Everything by stable names."""
    return {
        "environment": environment(backend),
        "peaks": peaks.fields(),
        "passes": [p.fields() for p in passes],
        "rows": list(rows),
    }
