"""``cuplama kernels compare``: a candidate for a file's kernels against the baseline, the file in ``cuda_src/``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...dtypes import dtype_name
from ...errors import ParameterError
from ...lab.report import counted
from ...ops import OPS
from ...ops.abstract import abstract
from ...ops.launch import Device
from ...ops.op import Op
from ...ops.outside import is_outside, load
from ..options import DEBUG
from .judged import checked_row, print_checked, refusing
from .options import DTYPE, FORM, SHAPE, arch_option, shape_workloads, supported_archs

if TYPE_CHECKING:
    from ...lab.workloads import Workload

__all__ = ["compare_kernels"]


@click.command("compare", short_help="Judge another version of a file's kernels against the baseline.")
@click.argument("other", type=click.Path(path_type=Path))
@click.option("--op", "name", required=True, metavar="NAME", help="The op whose kernels OTHER has; or my_op.py:NAME.")
@SHAPE
@DTYPE
@FORM
@arch_option("sm_90", "Without a GPU: compile for these.")
@DEBUG
def compare_kernels(other: Path, name: str, shapes: tuple[str, ...], dtype: str, form: str, arch: str) -> None:
    """Judge the kernels of the file OTHER against those of cuda_src/: same cases, same inputs, right first.

    The ratio is that of times measured in turn, with its 95% interval; above 1 OTHER is faster. A wrong OTHER is
    refused with its case and exit status 1. Without a GPU it is checked on the emulator and compiled, not timed.
    """
    from ...backends.cuda.driver import cuda_available

    op = _baseline(name)
    works, reason = cuda_available()
    with refusing():
        if works:
            _compare_on_gpu(other, op, shapes, dtype, form)
        else:
            _compare_without_gpu(other, op, shapes, dtype, form, supported_archs(arch), reason)


def _baseline(name: str) -> Op:
    """The op of --op: one of the package, or one of a user's file. Raises ParameterError."""
    if is_outside(name):
        return load(name)
    if name not in OPS:
        raise ParameterError(f"no op is named {name!r}; ops: {', '.join(OPS)}")
    return OPS[name]


def _compare_on_gpu(other: Path, op: Op, shapes: Sequence[str], dtype: str, form: str) -> None:
    from ...backends.cuda.backend import CudaBackend
    from ...lab import compare, report, workloads
    from ...lab.environment import environment, one_line

    backend = CudaBackend(dtype)
    dtype = dtype_name(backend.dtype)  # an old GPU has no bf16
    try:
        candidate = compare.candidate_op(other, op, dtype, backend.gpu.limits)
        chosen = shape_workloads(op, shapes, dtype, backend.gpu.limits) or workloads.default_workloads(op, dtype)
        found = compare.compare(backend, candidate, chosen, workloads.case_workloads(op, dtype))
        facts = environment(backend)
    finally:
        backend.close()
    rows = [compare.compare_row(c) for c in found]
    if form == "md":
        click.echo(f"$ {report.command()}\n\n{one_line(facts)}\n")
    extra = {"command": report.command(), "environment": facts}
    click.echo(report.render(compare.COMPARE_COLUMNS, rows, form, extra), nl=False)


def _compare_without_gpu(
    other: Path, op: Op, shapes: Sequence[str], dtype: str, form: str, archs: Sequence[int], reason: str
) -> None:
    """Compile a candidate and check it on the emulator. Where that is missing, the exit status is 1."""
    from ...backends.cuda.toolkit import shared_limit
    from ...lab.emulation import emulator_missing
    from ...lab.workloads import case_workloads

    device = Device(arch=archs[0], shared=shared_limit(archs[0]))
    workloads = shape_workloads(op, shapes, dtype, device) or case_workloads(op, dtype)
    _compile(other, op, dtype, workloads, device, archs)
    missing = emulator_missing()
    if not missing:
        _emulate(other, op, dtype, workloads, device)
    if form != "md":
        row = (None, "not run") if missing else (len(workloads), "right")
        print_checked([checked_row(op.name, dtype, *row)], form)
    shown = "compiles; not run" if missing else f"compiles, and is right on {counted(len(workloads), 'case')}"
    click.echo(f"{other}: {shown}; not timed: {reason}" + (f"; {missing}" if missing else ""), err=form != "md")
    if missing:
        sys.exit(1)


def _compile(
    other: Path, op: Op, dtype: str, workloads: Sequence[Workload], device: Device, archs: Sequence[int]
) -> None:
    """Compile what the candidate launches for the workloads, for every architecture. Raises CompileError."""
    from ...backends.cuda.nvrtc import compile_program
    from ...lab.check import planned
    from ...lab.compare import candidate_op

    candidate = candidate_op(other, op, dtype, device)
    wanted: dict[str, list[str]] = {}
    for workload in workloads:
        for launch in planned(replace(workload, op=candidate), workload.ins, device, abstract)[0]:
            wanted.setdefault(launch.file, []).append(launch.expression)
    for file, expressions in wanted.items():
        for arch in archs:
            compile_program(file, list(dict.fromkeys(expressions)), arch)


def _emulate(other: Path, op: Op, dtype: str, workloads: Sequence[Workload], device: Device) -> None:
    """Check the candidate on the emulator. Raises WrongResultError."""
    from ...lab.compare import candidate_op
    from ...lab.emulation import Emulator

    emulator = Emulator(device.arch)
    candidate = candidate_op(other, op, dtype, device)
    for workload in workloads:
        emulator.check(replace(workload, op=candidate))
