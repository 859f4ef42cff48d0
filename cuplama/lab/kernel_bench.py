"""The kernel lab: an op at a shape, checked against its reference and timed alone. A wrong kernel has no time.

Timing replays a CUDA graph of many launches, as decoding does. The inputs rotate through copies that exceed the L2
cache together, but are at most 64: so weights come from memory, and a few kilobytes of activations from L2, as in a
model. cupyx.profiler would time each launch with the host's part of it, which a replayed step does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..backends import Backend
from ..model import Model
from . import peaks as ceilings
from .alternatives import alternative
from .bench import show_peaks
from .cases import Case
from .check import check_on
from .peaks import Peaks, Spread
from .report import Column
from .timing import cache_bytes, rotation, time_case
from .trials import Runs, Trial

__all__ = ["COLUMNS", "Step", "bench", "result", "row", "steps"]

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


def row(case: Case, taken: Spread, other: tuple[str, Spread] | None, limits: Peaks) -> dict[str, Any]:
    """One line of the table: medians, half the distance of the quartiles, and bytes and operations from the op."""
    call, median = case.call, taken.median
    moved, operations = call.nbytes(), call.flops()
    return {
        "graph": case.graph,
        "op": case.op.name,
        "weights": "/".join(case.weights),
        "shape": case.shape,
        "dtype": case.dtype,
        "count": case.count,
        "microseconds": 1e6 * median,
        "microseconds_spread": 1e6 * taken.half_range,
        "bytes": moved,
        "operations": operations,
        "gigabytes_per_second": moved / median / 1e9,
        "percent_of_read_bandwidth": limits.percent_read(moved / median),
        "teraflops": operations / median / 1e12 if operations else None,
        "percent_of_matrix_rate": limits.percent_arithmetic(operations / median) if operations else None,
        "alternative": other[0] if other else None,
        "alternative_microseconds": 1e6 * other[1].median if other else None,
        "total_microseconds": 1e6 * median * case.count,
    }


@dataclass(frozen=True)
class Step:
    """A whole pass: the sum of its ops, each timed alone, and what the engine took for it, in seconds."""

    graph: str
    what: str
    summed: float
    measured: float

    def __str__(self) -> str:
        return (
            f"{self.graph}: {self.what}: the ops add up to {1e3 * self.summed:.4g} ms; measured "
            f"{1e3 * self.measured:.4g} ms ({100 * self.summed / self.measured:.0f}%)"
        )


def bench(
    backend: Backend,
    cases: Sequence[Case],
    limits: Peaks,
    say: Callable[[str], object] = lambda text: None,
) -> list[dict[str, Any]]:
    """Check and time the cases, in order. Raises WrongResultError at the first wrong one."""
    cache = cache_bytes(backend)
    rows = []
    for i, case in enumerate(cases):
        say(f"{i + 1}/{len(cases)}: {case.label}")
        arrays = case.arrays()
        check_on(backend, case, arrays)
        ins = rotation(backend, case, arrays, cache)
        rows.append(row(case, time_case(backend, case, ins), alternative(backend, case, ins), limits))
    return rows


def steps(
    model: Model, rows: Sequence[Mapping[str, Any]], batch: int, depth: int, tokens: int, repeats: int = 5
) -> list[Step]:
    """What the engine takes for the passes whose ops the rows are: decode steps around ``depth``, and a prompt."""
    runs = Runs(model)
    total = {g: sum(r["total_microseconds"] for r in rows if r["graph"] == g) / 1e6 for g in ("decode", "prefill")}
    half = min(32, depth - 1)
    trial = Trial(0, 2 * half or 1, depth - half, batch)  # its steps see ``depth`` tokens on average
    runs.generation(trial)
    decode = Spread(tuple(runs.generation(trial)[1] / trial.generated for _ in range(repeats))).median
    runs.prompt(Trial(tokens, 0))
    prompt = Spread(tuple(runs.prompt(Trial(tokens, 0)) for _ in range(repeats))).median
    return [
        Step("decode", f"a step of {batch} at {depth} tokens", total["decode"], decode),
        Step("prefill", f"a prompt of {tokens} tokens", total["prefill"], prompt),
    ]


def result(backend: Backend, rows: Sequence[Mapping[str, Any]], limits: Peaks, whole: Sequence[Step]) -> dict[str, Any]:
    """Everything by stable names."""
    return {
        "environment": ceilings.environment(backend),
        "ceilings": show_peaks(limits),
        "steps": [
            {
                "graph": s.graph,
                "what": s.what,
                "summed_ms": 1e3 * s.summed,
                "measured_ms": 1e3 * s.measured,
            }
            for s in whole
        ],
        "rows": list(rows),
    }
