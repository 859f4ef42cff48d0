"""Another version of a kernel against the one in the tree: the same cases and inputs, right first, then in turn.

A contender is an op like the tree's whose launches name another file. So both go the same way through the backend, and
what differs is the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..backends import Backend
from ..errors import ParameterError
from ..ops import OPS
from ..ops.abstract import abstract
from ..ops.launch import Device, Launch, Plan
from ..ops.op import Call, Op
from ..ops.prototypes import prototypes
from ..ops.signature import OpError
from .cases import Case, registry_cases
from .check import check_on, planned
from .peaks import Spread
from .report import Column
from .timing import Replay, bodies, cache_bytes, rotation

__all__ = ["COMPARE_COLUMNS", "Comparison", "candidate_op", "compare", "compare_row", "ratio_interval"]


@dataclass(frozen=True)
class Comparison:
    """tree and contender: seconds per call; ratio: how many times as fast the contender is; low, high: its interval."""

    case: Case
    tree: Spread
    contender: Spread
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
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
    tree = op.kernels
    if tree is None:
        raise ParameterError(f"{op.name} has no kernel of its own; it runs as its parts")

    def swapped(launch: Launch) -> Launch:
        name = launch.kernel.split(":")[1]
        return replace(launch, kernel=f"{path}:{name}") if name in theirs else launch

    def kernels(call: Call, device: Device) -> Plan:
        plan = tree(replace(call, op=op), device)  # a plan may go by the op's name
        return replace(plan, launches=tuple(map(swapped, plan.launches)))

    found = replace(op, name=f"{op.name} of {path.name}", kernels=kernels)
    launched: set[tuple[str, str]] = set()
    for case in registry_cases(op, dtype):
        try:
            bound = planned(replace(case, op=found), case.ins, device, abstract)[0]
        except OpError as e:
            raise ParameterError(f"{path.name} does not fit the launches of {op.name}: {e}") from None
        launched |= {(launch.file, launch.expression.split("<")[0]) for launch in bound}
    if not any(file == str(path) for file, _ in launched):
        names = ", ".join(sorted(name for _, name in launched))
        raise ParameterError(f"{path.name} has none of the kernels that {op.name} launches: {names}")
    return found


@contextmanager
def _registered(op: Op) -> Iterator[None]:
    """Let backends find the op by its name for a while."""
    ops = cast("dict[str, Op]", OPS)
    ops[op.name] = op
    try:
        yield
    finally:
        del ops[op.name]


def compare(
    backend: Backend, contender: Op, cases: Sequence[Case], checks: Sequence[Case], repeats: int = 40
) -> list[Comparison]:
    """Judge a contender: right on ``checks`` and ``cases`` first, then timed in turn with the tree.

    Both run on the same inputs; replays of the one and the other alternate, so that what disturbs both cancels.
    Raises WrongResultError for a contender that is wrong, CompileError for one that does not compile.
    """
    cache = cache_bytes(backend)
    found = []
    with _registered(contender):
        for case in (*checks, *cases):
            check_on(backend, replace(case, op=contender), case.arrays())
        for case in cases:
            ins = rotation(backend, case, case.arrays(), cache)
            sides = [Replay(backend, bodies(backend, replace(case, op=op), ins)) for op in (case.op, contender)]
            taken: list[list[float]] = [[], []]
            for i in range(repeats):
                for side in (0, 1) if i % 2 else (1, 0):
                    taken[side] += sides[side].seconds(1).values
            tree, other = (Spread(tuple(values)) for values in taken)
            found.append(Comparison(case, tree, other, *ratio_interval(taken[0], taken[1])))
    return found


def ratio_interval(tree: Sequence[float], contender: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The median of tree / contender over pairs of repeats, and its 95% interval by the bootstrap (2,000 resamples).

    Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7(1), 1979.
    """
    ratios = np.asarray(tree) / np.asarray(contender)
    draws = np.random.default_rng(seed).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high)


COMPARE_COLUMNS = (
    Column("graph", "graph"),
    Column("op", "op"),
    Column("shape", "shape"),
    Column("tree_microseconds", "tree µs", 4, "tree_spread"),
    Column("contender_microseconds", "contender µs", 4, "contender_spread"),
    Column("speedup", "times as fast", 4),
    Column("interval", "95%"),
    Column("verdict", "verdict"),
)


def compare_row(c: Comparison) -> dict[str, Any]:
    """A comparison by stable names."""
    return {
        "graph": c.case.graph,
        "op": c.case.op.name,
        "shape": c.case.shape,
        "dtype": c.case.dtype,
        "tree_microseconds": 1e6 * c.tree.median,
        "tree_spread": 1e6 * c.tree.half_range,
        "contender_microseconds": 1e6 * c.contender.median,
        "contender_spread": 1e6 * c.contender.half_range,
        "speedup": c.ratio,
        "interval": f"{c.low:.4f} to {c.high:.4f}",
        "verdict": c.verdict,
    }
