"""Another version of a kernel against the one in the tree: the same cases and inputs, right first, then in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import compiler, kernel
from .cases import Case, registry_cases
from .ceilings import Spread
from .compiler import stand_in
from .errors import ParameterError
from .kernel import BoundLaunch, Device
from .lab import Body, Replay, _rotation, _uploaded, cache_bytes, check, planned
from .op import Array, Op
from .report import Column

__all__ = ["COMPARE_COLUMNS", "Comparison", "Contender", "compare", "compare_row", "load_contender", "ratio_interval"]


@dataclass(frozen=True)
class Contender:
    """Another version of a file of ``cuda_src/``. file: the one it stands in for."""

    path: Path
    file: str
    text: str


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


def load_contender(path: Path, op: Op, dtype: str, device: Device) -> Contender:
    """Read a contender's file and find which one of the tree it stands in for.

    It must have every kernel of that file which the op launches, with the same template and run-time parameters: grid,
    block and arguments are those of the op. Raises ParameterError saying what differs.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ParameterError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    theirs = kernel.parse_prototypes(text)
    wanted: dict[str, set[str]] = {}
    for case in registry_cases(op, dtype):
        for launch in planned(case, case.ins, device, stand_in)[0]:
            wanted.setdefault(launch.file, set()).add(launch.expression.split("<")[0])
    files = [f for f in wanted if wanted[f] & theirs.keys()] or list(wanted)
    file = path.name if path.name in wanted else files[0]
    ours = kernel.prototypes(file)
    for name in sorted(wanted[file]):
        if name not in theirs:
            raise ParameterError(f"{path} has no kernel {name}, which {op.name} launches from {file}")
        for what in ("template", "parameters"):
            a, b = (tuple((p.type, p.name, p.pointer) for p in getattr(side[name], what)) for side in (ours, theirs))
            if a != b:
                raise ParameterError(
                    f"{path}: {name} has other {'template ' if what == 'template' else ''}parameters than in {file}:"
                    f" {_parameters(b)} instead of {_parameters(a)}"
                )
    return Contender(path, file, text)


def _parameters(found: Sequence[tuple[str, str, bool]]) -> str:
    return "(" + ", ".join(f"{type_}{'*' if pointer else ''} {name}" for type_, name, pointer in found) + ")"


def _functions(backend: Any, contender: Contender | None) -> Callable[[BoundLaunch], Callable[..., None]]:
    """A compiler of launches: of the tree's sources, or with the contender's file in their place."""
    gpu = backend.gpu

    def of_tree(launch: BoundLaunch) -> Callable[..., None]:
        found: Callable[..., None] = gpu.function(launch.file, launch.expression, launch.shared)
        return found

    if contender is None:
        return of_tree
    import cupy

    compiled: dict[str, Any] = {}

    def of_contender(launch: BoundLaunch) -> Callable[..., None]:
        if launch.file != contender.file:
            return of_tree(launch)
        raw = compiled.get(launch.expression)
        if raw is None:
            module = cupy.RawModule(
                code=f'#line 1 "{contender.path.name}"\n{contender.text}',
                options=compiler.options(cupy.cuda.nvrtc.getVersion()[0]),
                name_expressions=(launch.expression,),
            )
            try:
                raw = compiled[launch.expression] = module.get_function(launch.expression)
            except cupy.cuda.compiler.CompileException as e:
                raise compiler.compile_error(contender.path.name, str(e), gpu.limits.arch) from None
        if launch.shared + raw.shared_size_bytes > 48 * 1024:
            raw.max_dynamic_shared_size_bytes = launch.shared
        function: Callable[..., None] = raw.kernel
        return function

    return of_contender


def _direct(
    backend: Any, case: Case, ins: Sequence[Array | None], functions: Callable[[BoundLaunch], Callable[..., None]]
) -> tuple[Body, list[Array]]:
    """The op's own launches on these inputs, ready to repeat, and its outputs (poisoned)."""
    gpu = backend.gpu

    def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        array = gpu.empty(shape, dtype)
        gpu.fill(array, 0xFF)
        return array

    with gpu:
        launches, outs = planned(case, ins, gpu.limits, empty)
        ready = [(functions(launch), launch) for launch in launches]

    def body() -> None:
        with gpu:
            for function, launch in ready:
                function(launch.grid, launch.block, launch.args, launch.shared)

    return body, outs


def compare(
    backend: Any, contender: Contender, cases: Sequence[Case], checks: Sequence[Case], repeats: int = 40
) -> list[Comparison]:
    """Judge a contender: right on ``checks`` and ``cases`` first, then timed in turn with the tree.

    Both run on the same inputs; replays of the one and the other alternate, so that what disturbs both cancels.
    Raises WrongResultError for a contender that is wrong, CompileError for one that does not compile.
    """
    ours, theirs = _functions(backend, None), _functions(backend, contender)
    cache = cache_bytes(backend)
    for case in (*checks, *cases):
        arrays = case.arrays()
        body, outs = _direct(backend, case, _uploaded(backend, arrays), theirs)
        body()
        check(case, arrays, [backend.download(a) for a in outs])
    found = []
    for case in cases:
        ins = _rotation(backend, case, case.arrays(), cache)
        sides = [Replay(backend, [_direct(backend, case, x, side)[0] for x in ins]) for side in (ours, theirs)]
        taken: tuple[list[float], list[float]] = ([], [])
        for i in range(repeats):
            for side in (0, 1) if i % 2 else (1, 0):
                taken[side] += sides[side].seconds(1).values
        tree, other = Spread(tuple(taken[0])), Spread(tuple(taken[1]))
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
