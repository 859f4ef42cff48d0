"""``cuplama kernels show``: what an op, a kernel or a file computes, launches and uses; its PTX and machine code."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...errors import DeviceError
from ...ops.abstract import abstract
from ...ops.binding import BoundLaunch
from ...ops.launch import Device
from ...ops.linear import MAX_STREAMED_ROWS
from ...ops.op import Op
from ..options import DEBUG
from ..streams import print_table
from .compile import resource_cells
from .names import find_ops, opening_comment, unlaunched_kernels
from .options import DTYPE, SHAPE, arch_option, shape_workloads, supported_archs

if TYPE_CHECKING:
    from ...lab.workloads import Workload

__all__ = ["show_kernel"]

_MAX_WORKLOADS = 4  # of an op's own; more repeat what the first have shown


@click.command("show", short_help="Documentation, signature, launches and resources of kernels.")
@click.argument("name")
@SHAPE
@DTYPE
@arch_option("sm_90", "Architectures to compile for.")
@click.option("--ptx", is_flag=True, help="Print the PTX of the first architecture, the rest on stderr.")
@click.option("--sass", is_flag=True, help="Print the machine code of the first architecture, the rest on stderr.")
@DEBUG
def show_kernel(name: str, shapes: tuple[str, ...], dtype: str, arch: str, ptx: bool, sass: bool) -> None:
    """Documentation, signature, launches and resources of an op, a kernel or a file. Needs no GPU.

    NAME may be that of a file of your own, my_op.py or my_op.py:NAME.
    """
    from ...backends.cuda.nvrtc import compile_program, compile_ptx
    from ...backends.cuda.toolkit import shared_limit

    archs = supported_archs(arch)
    instances = unlaunched_kernels(name)
    ops = [] if instances else find_ops(name)
    device = Device(arch=archs[0], shared=shared_limit(archs[0]))
    # Code that is asked for is all of standard output, so that a program can read it; the rest is for people.
    with redirect_stdout(sys.stderr) if ptx or sass else nullcontext():
        for op in ops:
            for launch in _show_op(op, shapes, dtype, device):
                of_file = instances.setdefault(launch.file, [])
                if launch.expression not in of_file:
                    of_file.append(launch.expression)
        for file, expressions in instances.items():
            _show_file(file, expressions, archs)
    for file, expressions in instances.items():
        if ptx:
            click.echo(compile_ptx(file, expressions, archs[0]))
        if sass:
            click.echo(_sass(compile_program(file, expressions, archs[0]).cubin))


def _show_op(op: Op, shapes: Sequence[str], dtype: str, device: Device) -> Iterator[BoundLaunch]:
    """Print documentation, signature, workloads and their launches; yields the launches."""
    from ...lab.check import planned
    from ...lab.workloads import default_workloads

    workloads = shape_workloads(op, shapes, dtype, device) or default_workloads(op, dtype)[:_MAX_WORKLOADS]
    click.echo(f"{op.name}: {op.doc}\n  {op.text}\n")
    for workload in workloads:
        click.echo(f"  {_workload_line(workload)}")
        if op.matmul and (not op.matmul.streamed or workload.call["n"] > MAX_STREAMED_ROWS):
            click.echo("    cuBLAS; without it:")
        launches = planned(workload, workload.ins, device, abstract)[0]
        for text, same in itertools.groupby(map(_launch_line, launches)):
            times = len(list(same))
            click.echo(f"    {f'{times} x ' if times > 1 else ''}{text}")
        yield from launches
    click.echo()


def _workload_line(workload: Workload) -> str:
    return " ".join(filter(None, (workload.graph, "/".join(workload.weights), workload.dtype, workload.shape)))


def _launch_line(launch: BoundLaunch) -> str:
    shared = f", {launch.shared} bytes of dynamic shared memory" if launch.shared else ""
    return f"{launch.expression}: grid {launch.grid}, block {launch.block}{shared}"


def _show_file(file: str, expressions: Sequence[str], archs: Sequence[int]) -> None:
    """Print a source's opening comment, and what its instances use on each architecture."""
    from ...backends.cuda.nvrtc import compile_program

    click.echo(f"{file if Path(file).is_absolute() else f'cuda_src/{file}'}:\n{opening_comment(file)}\n")
    rows = []
    for arch in archs:
        program = compile_program(file, expressions, arch)
        rows += [(e, f"sm_{arch}", *resource_cells(program.resources[e])) for e in expressions]
    print_table(("kernel", "arch", "registers", "shared", "stack", "spills"), rows)
    click.echo()


def _sass(cubin: bytes) -> str:
    """The disassembly, if the CUDA toolkit's tools are here. Raises DeviceError where the tool fails."""
    places = [os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{p}/bin" for p in places if p)])
    for tool, flags in (("nvdisasm", ["-c"]), ("cuobjdump", ["-sass"])):
        found = shutil.which(tool, path=path)
        if found:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(cubin)
                file.flush()
                done = subprocess.run([found, *flags, file.name], capture_output=True, text=True, check=False)
            if done.returncode:
                raise DeviceError(f"{tool} fails: {done.stderr.strip()[:200]}")
            return done.stdout
    return "no SASS: neither nvdisasm nor cuobjdump (of the CUDA toolkit) is in PATH or CUDA_PATH/bin"
