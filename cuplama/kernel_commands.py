"""``cuplama kernels``: what kernels there are, and whether they compile. Needs no GPU and no driver."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence

import click

from . import compiler, kernel
from .op import DTYPES
from .ops import OPS

__all__ = ["kernels"]


@click.group()
def kernels() -> None:
    """List and compile the CUDA kernels; needs no GPU."""


@kernels.command("list")
def list_kernels() -> None:
    """Name, file, ops, dtypes and meaning of every kernel."""
    rows = []
    users = _users()
    for path in sorted(kernel.source_folder().glob("*.cu")):
        for name in kernel.prototypes(path.name):
            ops, dtypes = users.get((path.name, name), (frozenset[str](), frozenset[str]()))
            shown = " ".join(d for d in DTYPES if d in dtypes)
            rows.append((name, path.name, " ".join(sorted(ops)) or "-", shown or "-", _meaning(path.name, ops)))
    show(("kernel", "file", "ops", "dtypes", "computes"), rows)


@kernels.command("compile")
@click.option("--arch", default="all", show_default=True, metavar="LIST", help="Architectures, such as sm_80,sm_90.")
@click.option(
    "-j", "--jobs", type=click.IntRange(1), help="Compilations at a time. [default: the CPU cores, at most 8]"
)
@click.option("-v", "--verbose", is_flag=True, help="A row per instance, not only the largest of each kernel.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
def compile_kernels(arch: str, jobs: int | None, verbose: bool, names: tuple[str, ...]) -> None:
    """Compile the kernels of the given ops, kernels or files (all by default) and print what they use.

    Fails on an error, a warning, or a register spill that is not declared with a reason.
    """
    began = time.perf_counter()
    supported = tuple(compiler.nvrtc_library().getSupportedArchs())
    archs = compiler.parse_archs(arch, supported)

    def done(file: str, arch: int, seconds: float) -> None:
        click.echo(f"{file} for sm_{arch}: {seconds:.1f} s", err=True)

    results = compiler.compile_kernels(archs, names, workers=jobs, done=done)
    rows = [
        (r.expression, r.file, f"sm_{r.arch}", *map(str, _numbers(r.resources)), r.admitted or "")
        for r in (results if verbose else _largest(results))
        if r.resources is not None
    ]
    show(("kernel", "file", "arch", "registers", "shared", "stack", "spills", "admitted because"), rows)
    bad = [r for r in results if r.problem is not None]
    for r in bad:
        click.echo(f"{r.file} sm_{r.arch}: {r.expression or 'the file'}: {r.problem}", err=True)
    good = sum(r.resources is not None for r in results)
    click.echo(
        f"{good} kernel instances for {', '.join(f'sm_{a}' for a in archs)} in {time.perf_counter() - began:.0f} s;"
        f" {len(bad)} problem{'' if len(bad) == 1 else 's'}"
    )
    if bad:
        sys.exit(1)


def _numbers(used: compiler.Resources) -> tuple[int, int, int, int]:
    return used.registers, used.shared, used.stack, used.spills


def _largest(results: Sequence[compiler.Result]) -> list[compiler.Result]:
    """Of each kernel and architecture, the instance with the most spills, then registers."""
    best: dict[tuple[str, str, int], compiler.Result] = {}
    for r in results:
        if r.resources is not None:
            key = (r.file, r.kernel, r.arch)
            if key not in best or _rank(r.resources) > _rank(best[key].resources):
                best[key] = r
    return list(best.values())


def _rank(used: compiler.Resources | None) -> tuple[int, int]:
    return (0, 0) if used is None else (used.spills, used.registers)


def _users() -> dict[tuple[str, str], tuple[frozenset[str], frozenset[str]]]:
    """(file, kernel) -> the ops and dtypes that need it."""
    users: dict[tuple[str, str], tuple[frozenset[str], frozenset[str]]] = {}
    for file, instances in compiler.needed(kernel.Device()).items():
        for expression, need in instances.items():
            ops, dtypes = users.get((file, expression.split("<")[0]), (frozenset(), frozenset()))
            users[file, expression.split("<")[0]] = (ops | need.ops, dtypes | need.dtypes)
    return users


def _meaning(file: str, ops: frozenset[str]) -> str:
    """The doc of the op if there is one, else the first line of the file."""
    if len(ops) == 1:
        return OPS[next(iter(ops))].doc.split(". ")[0]
    first = (kernel.source_folder() / file).read_text(encoding="utf-8").splitlines()[0]
    return re.sub(r"^/[/*]+\s*", "", first)


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: with rules and colours on a terminal, in plain columns elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
