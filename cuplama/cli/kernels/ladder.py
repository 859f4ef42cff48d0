"""``cuplama kernels ladder``: attention from its formula to the product's kernels, rung by rung."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...dtypes import dtype_name
from ...errors import DeviceError
from ...lab.report import counted
from ...ops.launch import Device
from ..options import DEBUG, picture_option
from ..streams import print_table, say
from .judged import checked_row, print_checked, refusing
from .options import DTYPE, FORM, SHAPE, arch_option, parse_shape, supported_archs

if TYPE_CHECKING:
    from ...lab.ladder.rungs import Rung

__all__ = ["climb_ladder"]


@click.command("ladder", short_help="Attention from its formula to the product's kernels, rung by rung.")
@click.argument("ladder", type=click.Choice(["attention", "decode"]))
@SHAPE
@DTYPE
@FORM
@picture_option("Draw the times over the number of tokens.")
@arch_option("sm_90", "Without a GPU: compile for these.")
@DEBUG
def climb_ladder(ladder: str, shapes: tuple[str, ...], dtype: str, form: str, plot: Path | None, arch: str) -> None:
    """Check every rung of a ladder and time it: attention of a prompt, or of a decode step.

    A shape has n (new tokens), s (all tokens), num_heads, H (key heads) and D (64 or 128); --shape may be repeated, for
    several lengths. PyTorch's attention stands beside the rungs where PyTorch is installed. Without a GPU the rungs are
    run by the emulator on small cases, and compiled; nothing is timed. A wrong rung has no time, and the exit status is
    1. docs/attention.md explains the rungs.
    """
    from ...backends.cuda.driver import cuda_available
    from ...lab.ladder.climb import sizes_of

    works, reason = cuda_available()
    if plot is not None and not works:
        raise DeviceError(f"--plot draws times, and nothing can be timed: {reason}")
    sizes = [sizes_of(ladder, parse_shape(shape)) for shape in shapes or ("",)]
    with refusing():
        if works:
            _time(ladder, sizes, dtype, form, plot)
        else:
            _check(ladder, sizes if shapes else [], dtype, form, supported_archs(arch), reason)


def _time(ladder: str, sizes: Sequence[Mapping[str, int]], dtype: str, form: str, plot: Path | None) -> None:
    """Check, time, and print a table for each shape."""
    from ...backends.cuda.backend import CudaBackend
    from ...lab import bench, peaks, report
    from ...lab.environment import environment
    from ...lab.ladder.climb import climb, columns
    from ...lab.ladder.picture import plot_ladder
    from ...lab.ladder.rungs import LADDERS

    backend = CudaBackend(dtype)
    try:
        machine = peaks.measure(backend)
        facts = {"environment": environment(backend), "peaks": machine.fields()}
        found = {"command": report.command(), **facts}
        if form == "md":
            click.echo("\n".join(bench.header(found)))
        rows: list[dict[str, Any]] = []
        for one in sizes:
            rows += (climbed := climb(backend, ladder, one, dtype_name(backend.dtype), machine, say))
            if form == "md":
                click.echo(f"\n{', '.join(f'{name}={size}' for name, size in one.items())}\n")
                click.echo(report.render(columns(ladder, climbed), climbed, form), nl=False)
    finally:
        backend.close()
    if form != "md":
        click.echo(report.render((), rows, form, found), nl=False)
    else:
        click.echo("\n" + "\n".join(f"{r.name}: {r.title}\n    should gain: {r.gain}" for r in LADDERS[ladder]))
    if any(row["wrong"] for row in rows):
        sys.exit(1)
    if plot is not None:
        plot_ladder(rows, f"{ladder}, {dtype}: {facts['environment']['device']}", plot)


def _check(
    ladder: str, sizes: Sequence[Mapping[str, int]], dtype: str, form: str, archs: Sequence[int], reason: str
) -> None:
    """Check on the emulator and compile; say what is missing. Where nothing can be checked, the exit status is 1."""
    from ...backends.cuda.toolkit import shared_limit
    from ...lab.check import WrongResultError
    from ...lab.emulation import emulator_missing
    from ...lab.ladder.climb import check_compiled
    from ...lab.ladder.rungs import LADDERS

    devices = [Device(arch=a, shared=shared_limit(a)) for a in archs]
    missing = emulator_missing()
    rows = [_emulated(rung, ladder, sizes, dtype, devices[0], missing) for rung in LADDERS[ladder]]
    if form == "md":
        titles = [rung.title for rung in LADDERS[ladder]]
        cells = [["-" if value is None else str(value) for value in row.values()] for row in rows]
        table = [[*row, title] for row, title in zip(cells, titles, strict=True)]
        print_table(("rung", "dtype", "cases", "on the emulator", "what it is"), table)
        click.echo()
    else:
        print_checked(rows, form)
    count = 0
    for device in devices:
        for name, problem in check_compiled(ladder, dtype, device):
            if problem:
                raise WrongResultError(f"{name} for sm_{device.arch}: {problem}")
            count += 1
    told = form != "md"  # the sentences would spoil what a program reads
    shown = ", ".join(f"sm_{a}" for a in archs)
    click.echo(f"{counted(count, 'kernel instance')} compile{'s' if count == 1 else ''} for {shown}", err=told)
    click.echo(f"nothing is timed: {reason}" + (f"; {missing}" if missing else ""), err=told)
    if missing:
        sys.exit(1)


def _emulated(
    rung: Rung, ladder: str, sizes: Sequence[Mapping[str, int]], dtype: str, device: Device, missing: str
) -> dict[str, Any]:
    """Run a rung on the emulator, at the sizes or at the ladder's small cases. missing: why there is none."""
    from ...lab.ladder.climb import case_workloads, check_emulated
    from ...lab.ladder.rungs import Inputs

    if missing:
        return checked_row(rung.name, dtype, None, "not run")
    own = [rung.workload(Inputs.random(one, dtype), dtype) for one in sizes]
    workloads = own or case_workloads(rung, ladder, dtype)
    say(f"{rung.name}: {counted(len(workloads), 'case')}")
    try:
        check_emulated(workloads, device)
    except DeviceError as e:  # nothing is wrong with the kernel: it cannot be run here
        return checked_row(rung.name, dtype, len(workloads), f"not run: {e}")
    return checked_row(rung.name, dtype, len(workloads), "right")
