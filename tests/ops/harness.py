"""Every op, every case, every dtype: what the tests of ops, and the tools that repeat them elsewhere, go through.

The judge is the lab's (``cuplama/lab/check.py``). Here is what only tests want: random cases beside the ops' own, and
what a launch must satisfy on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np

from cuplama.dtypes import Array
from cuplama.lab.check import model_dtypes, planned
from cuplama.lab.workloads import Workload, case_workload, described_workload
from cuplama.ops import OPS
from cuplama.ops.abstract import abstract
from cuplama.ops.binding import BoundLaunch, bind_plan
from cuplama.ops.launch import Device
from cuplama.ops.op import Op
from cuplama.ops.signature import Spec
from cuplama.ops.weights import segments_of
from cuplama.simt import emulator

Case = Mapping[str, Any]

RANDOM_CASES = 4  # of each op, beside its own


def cases(op: Op) -> list[Case]:
    """The op's own cases and a few random ones, the same in every run."""
    return [*op.cases, *op.random_cases(RANDOM_CASES)]


def all_cases(only: Callable[[Op], bool] = lambda op: True) -> Iterator[tuple[Op, Case, str]]:
    for op in OPS.values():
        if only(op):
            for case in cases(op):
                for T in model_dtypes(op):
                    yield op, case, T


def name_of(op: Op, case: Case, T: str) -> str:
    return f"{op.name}-{T}-" + ",".join(f"{k}={v}" for k, v in case.items()).replace(" ", "")


def workload(op: Op, case: Case, T: str) -> Workload:
    """The case with random inputs, the same in every run."""
    return case_workload(op, case, T, len(case) + sum(name_of(op, case, T).encode()))


def run_reference(workload: Workload, arrays: list[Any]) -> list[np.ndarray[Any, Any]]:
    """The reference on inputs in T, its outputs in the dtypes of the signature."""
    op = workload.op
    ins = [x if x is None or segments_of(x) is not None else x.copy() for x in arrays]
    out = op.reference(*ins, **workload.attrs)
    outs = out if isinstance(out, tuple) else (out,)
    return [o.astype(workload.call.dtype(s), copy=False) for s, o in zip(op.signature.outs, outs, strict=True)]


def precompile(cases: Iterable[tuple[Op, Case, str]], share: Fraction) -> None:
    """Compile for the emulator what the cases launch, four kernels in one call of g++, which takes a third less time
    than one by one. What fails here is left to its own test.

    share: where in the list to begin, so that several processes which compile the same do not wait for each other.
    """
    kernels: dict[tuple[str, str], None] = {}
    for case in cases:
        with suppress(Exception):
            workload = described_workload(*case)
            for launch in planned(workload, workload.ins, Device(), abstract)[0]:
                kernels[launch.file, launch.expression] = None
    start = int(len(kernels) * share)
    with suppress(emulator.KernelFault):
        emulator.precompile([*list(kernels)[start:], *list(kernels)[:start]], jobs=1)


# ---- what a launch must satisfy on any device ------------------------------------------------------------------------

_FLOATS, _INTS = ("f32", "float"), ("i32", "int", "u32", "unsigned", "i64", "long long", "u64", "unsigned long long")


def check_launches(workload: Workload, device: Device) -> list[BoundLaunch]:
    """Bind every launch to NumPy arrays and compare it with the signature and the limits of CUDA."""
    op, call = workload.op, workload.bind()
    assert op.kernels is not None
    plan = op.kernels(call, device)

    def empty(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.empty(shape, dtype)

    bound = bind_plan(plan, call, empty, empty)
    written = {launch.names.get(p.name, p.name) for launch, b in zip(plan.launches, bound, strict=True)
               for p, array in zip(b.prototype.parameters, b.args, strict=True)
               if p.pointer and not p.const and hasattr(array, "shape") and array.shape}  # fmt: skip
    outs, ins = ({s.name: s for s in specs} for specs in (op.signature.outs, op.signature.ins))
    assert written == set(outs) | (written & set(plan.scratch)), f"{op.name} writes {sorted(written)}"
    for b in bound:
        for p in b.prototype.parameters:
            _check_parameter(op, b, p.name, p.type, p.pointer, p.const, {**ins, **outs})
        what = b.describe()
        assert min(b.grid) >= 1, what
        assert b.grid[0] < 2**31, what
        assert max(b.grid[1:]) < 2**16, what
        assert math.prod(b.block) <= 1024, what
        assert math.prod(b.block) % 32 == 0, what
        assert b.shared <= device.shared, what
    return bound


def _check_parameter(
    op: Op, b: BoundLaunch, name: str, type_: str, pointer: bool, const: bool, arrays: Mapping[str, Spec]
) -> None:
    what = f"{b.file}: {b.expression}: parameter {name}"
    if name in arrays:
        assert pointer, f"{what} is an array in the signature"
        assert const == (name not in {s.name for s in op.signature.outs}), f"{what}: const is for inputs alone"
    attrs = {s.name: s.dtype for s in op.signature.attrs}
    if name in attrs:
        assert not pointer, f"{what} is a scalar in the signature"
        wanted = _FLOATS if attrs[name] == "f32" else _INTS
        assert type_ in wanted, f"{what} is {type_}, the signature says {attrs[name]}"
