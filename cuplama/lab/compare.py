"""A candidate for a kernel against the baseline in ``cuda_src/``: same shapes and inputs, right first, then in turn.

A candidate is an op like the baseline whose launches name another file. So both go the same way through the backend,
and what differs is the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..backends import Backend
from ..errors import ParameterError
from ..ops.abstract import abstract
from ..ops.launch import Device, Launch, Plan
from ..ops.op import Call, Op
from ..ops.prototypes import prototypes
from ..ops.signature import OpError
from .check import backend_checker, planned
from .report import Column
from .timing import Replay, Spread, bodies, cache_bytes, rotation
from .workloads import Workload, case_workloads

__all__ = ["COMPARE_COLUMNS", "Comparison", "candidate_op", "compare", "compare_row", "ratio_interval"]


@dataclass(frozen=True)
class Comparison:
    """Times of both on one workload.

    baseline, candidate: seconds per call; ratio: how many times as fast the candidate is; low, high: its 95% interval.
    """

    workload: Workload
    baseline: Spread
    candidate: Spread
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" where the whole interval says so, else "no difference"."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference"


def candidate_op(path: Path, op: Op, dtype: str, device: Device) -> Op:
    """The op with the kernels of the file at ``path`` wherever it has one of the same name.

    Grid, block and constants are those of the op; the parameters get their values by name, as always. Raises
    ParameterError if the file cannot be read, has none of the op's kernels, or wants a parameter that has no value.
    """
    path = path.resolve()
    try:
        theirs = prototypes(str(path))  # an absolute path wins over the folder of the sources
    except (OSError, UnicodeDecodeError) as e:
        raise ParameterError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    baseline = op.kernels
    if baseline is None:
        raise ParameterError(f"{op.name} has no kernel of its own; it runs as its parts")

    def swapped(launch: Launch) -> Launch:
        name = launch.kernel.rpartition(":")[2]
        return replace(launch, kernel=f"{path}:{name}") if name in theirs else launch

    def kernels(call: Call, device: Device) -> Plan:
        plan = baseline(replace(call, op=op), device)  # a plan may go by the op's name
        return replace(plan, launches=tuple(map(swapped, plan.launches)))

    found = replace(op, name=f"{op.name} of {path.name}", kernels=kernels)
    launched: set[tuple[str, str]] = set()
    for workload in case_workloads(op, dtype):
        try:
            bound = planned(replace(workload, op=found), workload.ins, device, abstract)[0]
        except OpError as e:
            raise ParameterError(f"{path.name} does not fit the launches of {op.name}: {e}") from None
        launched |= {(launch.file, launch.expression.split("<")[0]) for launch in bound}
    if not any(file == str(path) for file, _ in launched):
        names = ", ".join(sorted(name for _, name in launched))
        raise ParameterError(f"{path.name} has none of the kernels that {op.name} launches: {names}")
    return found


def compare(
    backend: Backend, candidate: Op, workloads: Sequence[Workload], checks: Sequence[Workload], repeats: int = 40
) -> list[Comparison]:
    """Judge a candidate: right on ``checks`` and ``workloads`` first, then timed in turn with the baseline.

    Both run on the same inputs; replays of the one and the other alternate, so that what disturbs both cancels.
    Raises WrongResultError for a candidate that is wrong, CompileError for one that does not compile.
    """
    checker = backend_checker(backend)
    for workload in (*checks, *workloads):
        checker.check(replace(workload, op=candidate), workload.arrays())
    cache = cache_bytes(backend)
    return [_in_turn(backend, workload, candidate, cache, repeats) for workload in workloads]


def _in_turn(backend: Backend, workload: Workload, candidate: Op, cache: int, repeats: int) -> Comparison:
    """Time a workload with its own op and with the candidate, each going first every other time."""
    ins = rotation(backend, workload, workload.arrays(), cache)
    sides = [Replay(backend, bodies(backend, replace(workload, op=op), ins)) for op in (workload.op, candidate)]
    taken: list[list[float]] = [[], []]
    for i in range(repeats):
        for side in (0, 1) if i % 2 else (1, 0):
            taken[side] += sides[side].seconds(1).values
    baseline, other = (Spread(tuple(values)) for values in taken)
    return Comparison(workload, baseline, other, *ratio_interval(taken[0], taken[1]))


def ratio_interval(baseline: Sequence[float], candidate: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(median, low, high) of baseline / candidate over pairs of repeats: the 95% interval is the bootstrap's, of 2,000
    resamples.

    Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7(1), 1979.
    """
    ratios = np.asarray(baseline) / np.asarray(candidate)
    draws = np.random.default_rng(seed).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high)


COMPARE_COLUMNS = (
    Column("graph", "graph"),
    Column("op", "op"),
    Column("shape", "shape"),
    Column("baseline_microseconds", "baseline µs", 4, "baseline_spread"),
    Column("candidate_microseconds", "candidate µs", 4, "candidate_spread"),
    Column("speedup", "times as fast", 4),
    Column("interval", "95%"),
    Column("verdict", "verdict"),
)


def compare_row(c: Comparison) -> dict[str, Any]:
    """A comparison by stable names."""
    return {
        "graph": c.workload.graph,
        "op": c.workload.op.name,
        "shape": c.workload.shape,
        "dtype": c.workload.dtype,
        "baseline_microseconds": 1e6 * c.baseline.median,
        "baseline_spread": 1e6 * c.baseline.half_range,
        "candidate_microseconds": 1e6 * c.candidate.median,
        "candidate_spread": 1e6 * c.candidate.half_range,
        "speedup": c.ratio,
        "interval": f"{c.low:.4f} to {c.high:.4f}",
        "verdict": c.verdict,
    }
