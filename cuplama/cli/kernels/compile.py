"""``cuplama kernels compile``: kernels for any architecture, without a GPU, and what they use of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ...lab.report import counted
from ...ops.outside import is_outside
from ..options import DEBUG
from ..streams import print_table, say
from .names import find_ops
from .options import arch_option, supported_archs

if TYPE_CHECKING:
    from ...backends.cuda.nvrtc import Resources
    from ...lab.inventory import Result

__all__ = ["compile_kernels", "resource_cells"]


@click.command("compile", short_help="Compile kernels for any architecture; print what they use.")
@arch_option("all", "Architectures, such as sm_80,sm_90.")
@click.option(
    "-j", "--jobs", type=click.IntRange(1), help="Compilations at a time. [default: the CPU cores, at most 8]"
)
@click.option("-v", "--verbose", is_flag=True, help="A row per instance, not only the largest of each kernel.")
@DEBUG
@click.argument("names", nargs=-1, metavar="[NAME]...")
def compile_kernels(arch: str, jobs: int | None, verbose: bool, names: tuple[str, ...]) -> None:
    """Compile the kernels of the given ops, kernels or files (all by default) and print what they use.

    A NAME may be that of a file of your own, my_op.py or my_op.py:NAME.
    Fails on an error, a warning, or a register spill that is not declared with a reason.
    """
    from ...lab import inventory
    from ...lab.steps import time_left

    began = time.perf_counter()
    archs = supported_archs(arch)

    def done(name: str, seconds: float, number: int, total: int) -> None:
        say(f"{number}/{total}: {name}: {seconds:.1f} s{time_left(began, number, total)}")

    outside = [op for name in names if is_outside(name) for op in find_ops(name)]
    ours = [name for name in names if not is_outside(name)]
    results = inventory.compile_kernels(archs, ours or None, outside=outside, workers=jobs, done=done)
    rows = [
        (r.expression, r.file, f"sm_{r.arch}", *resource_cells(r.resources), r.admitted or "")
        for r in (results if verbose else _largest(results))
        if r.resources is not None
    ]
    print_table(("kernel", "file", "arch", "registers", "shared", "stack", "spills", "admitted because"), rows)
    bad = [r for r in results if r.problem is not None]
    for r in bad:
        say(f"{r.file} sm_{r.arch}: {r.expression or 'the file'}: {r.problem}")
    good = sum(r.resources is not None for r in results)
    click.echo(
        f"{counted(good, 'kernel instance')} for {', '.join(f'sm_{a}' for a in archs)}"
        f" in {time.perf_counter() - began:.0f} s; {counted(len(bad), 'problem')}"
    )
    if bad:
        sys.exit(1)


def resource_cells(used: Resources) -> tuple[str, str, str, str]:
    """Registers, and bytes of shared memory, stack and spills, as cells of a table."""
    return str(used.registers), str(used.shared), str(used.stack), str(used.spills)


def _largest(results: Sequence[Result]) -> list[Result]:
    """Of each kernel and architecture, the instance with the most spills, then registers."""
    best: dict[tuple[str, str, int], Result] = {}
    for r in results:
        if r.resources is not None:
            key = (r.file, r.kernel, r.arch)
            if key not in best or _rank(r.resources) > _rank(best[key].resources):
                best[key] = r
    return list(best.values())


def _rank(used: Resources | None) -> tuple[int, int]:
    return (0, 0) if used is None else (used.spills, used.registers)
