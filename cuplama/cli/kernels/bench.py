"""``cuplama kernels bench``: ops checked against their references and, on a GPU, timed alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...dtypes import DTYPES, dtype_name
from ...errors import DeviceError, ParameterError
from ...lab.report import counted
from ...ops import OPS
from ...ops.launch import Device
from ...ops.op import Op
from ..options import DEBUG, picture_option, weight_format_option
from ..streams import print_table, say
from .judged import checked_row, print_checked, refusing
from .names import find_ops, split_outside
from .options import DTYPE, FORM, SHAPE, arch_option, nvrtc_missing, shape_workloads, supported_archs

if TYPE_CHECKING:
    from ...lab.kernel_bench import PassTime
    from ...lab.workloads import Workload

__all__ = ["bench_kernels"]


@dataclass(frozen=True)
class _Request:
    """The options of the command, and the ops that the names stand for."""

    ops: Sequence[Op]
    names: tuple[str, ...]
    shapes: tuple[str, ...]
    model: str | None
    dtype: str
    batch: int
    depth: int
    prompt: int
    form: str
    timer: str
    weight_format: str


@click.command("bench", short_help="Check ops against their references, and time them on a GPU.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@SHAPE
@click.option(
    "-m", "--model", metavar="MODEL", help="All ops at the shapes of a folder's config.json or a known model."
)
@DTYPE
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="With --model: sequences decoded.")
@click.option("--depth", type=click.IntRange(2), default=512, show_default=True, help="With --model: tokens cached.")
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, help="With --model: tokens read.")
@click.option(
    "--timer",
    type=click.Choice(["graph", "cupyx"]),
    default="graph",
    show_default=True,
    help="cupyx: beside the replayed graph also single calls, by cupyx.profiler.",
)
@weight_format_option("--model")
@FORM
@picture_option("Draw the roofline.")
@arch_option("sm_90", "Without a GPU: compile for these.")
@DEBUG
def bench_kernels(
    names: tuple[str, ...], shapes: tuple[str, ...], model: str | None, plot: Path | None, arch: str, **sizes: Any
) -> None:
    """Check ops (all by default) against their references and time them, alone, against the machine's peaks.

    A wrong kernel is refused: its case is printed, and the exit status is 1. With --model the ops of a decode step and
    of a prompt are counted, added up, and held against what the whole pass takes. Without a GPU the kernels are run by
    the emulator, on the ops' own small cases or on --shape, and compiled; nothing is timed.

    NAME is an op, a kernel or a file; or a file of your own that declares ops, my_op.py or my_op.py:NAME.
    """
    from ...backends.cuda.driver import cuda_available

    works, reason = cuda_available()
    if plot is not None and not works:
        raise DeviceError(f"--plot draws times, and nothing can be timed: {reason}")
    ops = [op for name in names for op in find_ops(name)] or list(OPS.values())
    if sizes["weight_format"] and not model:
        raise ParameterError("--weight-format needs --model; a shape has W: --shape n=1,m=64,k=128,W=fp8")
    if shapes and (model or len(ops) != 1):
        raise ParameterError("--shape needs the NAME of one op, and no --model")
    request = _Request(ops, names, shapes, model, **sizes)
    with refusing():
        if works:
            _bench_on_gpu(request, plot)
        else:
            _bench_without_gpu(request, arch, reason)


def _bench_on_gpu(request: _Request, plot: Path | None) -> None:
    """Check, time, and print the table; with a model also the sums beside what the whole passes take."""
    from ...lab import bench, kernel_bench, report, roofline

    found, passes = _time_ops(request) if request.model is None else _time_model(request, request.model)
    found = {"command": report.command(), **found}
    extra = {k: v for k, v in found.items() if k != "rows"}
    if request.form == "md":
        click.echo("\n".join(bench.header(found)) + "\n")
    click.echo(report.render(kernel_bench.columns(found["rows"]), found["rows"], request.form, extra), nl=False)
    if request.form == "md":
        for one in passes:
            click.echo(f"\n{one}")
    if plot is not None:
        roofline.plot_roofline(found, plot)


def _time_ops(request: _Request) -> tuple[dict[str, Any], Sequence[PassTime]]:
    """The ops alone, at the shapes asked for or at their default ones."""
    from ...backends.cuda.backend import CudaBackend
    from ...lab import kernel_bench, peaks, workloads

    backend = CudaBackend(request.dtype)
    dtype = dtype_name(backend.dtype)  # an old GPU runs bf16 models in f16
    try:
        chosen = shape_workloads(request.ops[0], request.shapes, dtype, backend.gpu.limits)
        chosen = chosen or [w for op in request.ops for w in workloads.default_workloads(op, dtype)]
        machine = peaks.measure(backend)
        rows = kernel_bench.bench(backend, chosen, machine, say, request.timer == "cupyx")
        return kernel_bench.result(backend, rows, machine, []), []
    finally:
        backend.close()


def _time_model(request: _Request, model: str) -> tuple[dict[str, Any], Sequence[PassTime]]:
    """The ops of a decode step and of a prompt; with all of them also the whole passes."""
    from ...lab import kernel_bench, peaks, workloads
    from ...lab.dummy import dummy_model
    from ...lab.trials import cache_tokens

    batch, depth, prompt = request.batch, request.depth, request.prompt
    context = max(depth + 64, prompt + 1)
    passes: Sequence[PassTime] = []
    form, tokens = request.weight_format, cache_tokens(batch, context)
    with dummy_model(model, "cuda", DTYPES[request.dtype].name, context, tokens, form) as loaded:
        dtype = dtype_name(loaded.backend.dtype)  # an old GPU runs bf16 models in f16
        chosen = workloads.decode_workloads(loaded.config, dtype, batch, depth, context, form)
        chosen += workloads.prompt_workloads(loaded.config, dtype, prompt, loaded.backend.prefill_chunk, form)
        _check_used(request.names, chosen, model)
        wanted = [w for w in chosen if not request.names or w.op in request.ops]
        machine = peaks.measure(loaded.backend)
        rows = kernel_bench.bench(loaded.backend, wanted, machine, say, request.timer == "cupyx")
        if not request.names:
            passes = kernel_bench.pass_times(loaded, rows, batch, depth, prompt)
        found = kernel_bench.result(loaded.backend, rows, machine, passes)
    found["environment"] = {"model": model, **found["environment"]}
    return found, passes


def _bench_without_gpu(request: _Request, arch: str, reason: str) -> None:
    """Check on the emulator and compile; say what is missing. Where nothing can be checked, the exit status is 1."""
    from ...backends.cuda.toolkit import parse_archs, shared_limit
    from ...lab.emulation import emulator_missing

    no_compiler = nvrtc_missing()
    archs = list(parse_archs(arch)) if no_compiler else supported_archs(arch)
    ops = [op for op in _ops_of_model(request) if op.kernels is not None]
    missing = emulator_missing()
    device = Device(arch=archs[0], shared=shared_limit(archs[0]))
    rows = [_emulated(op, request, device, missing) for op in ops]
    if request.form == "md":
        cells = [["-" if value is None else str(value) for value in row.values()] for row in rows]
        print_table(("op", "dtype", "cases", "on the emulator"), cells)
        click.echo()
    else:
        print_checked(rows, request.form)
    told = request.form != "md"  # the sentences would spoil what a program reads
    compiled = f"nothing is compiled: {no_compiler}" if no_compiler else _compiled(ops, archs)
    click.echo(compiled, err=told)
    click.echo(f"nothing is timed: {reason}" + (f"; {missing}" if missing else ""), err=told)
    if missing:
        sys.exit(1)


def _compiled(ops: Sequence[Op], archs: Sequence[int]) -> str:
    """Compile what the ops launch; says of how much that is. Raises WrongResultError for what does not compile."""
    from ...lab.check import WrongResultError
    from ...lab.inventory import compile_kernels

    names, outside = split_outside(ops)
    results = compile_kernels(archs, names, outside=outside)
    for problem in (r for r in results if r.problem is not None):
        raise WrongResultError(f"{problem.file} for sm_{problem.arch}: {problem.expression} {problem.problem}")
    good = sum(r.resources is not None for r in results)
    shown = ", ".join(f"sm_{a}" for a in archs)
    return f"{counted(good, 'kernel instance')} compile{'s' if good == 1 else ''} for {shown}"


def _emulated(op: Op, request: _Request, device: Device, missing: str) -> dict[str, Any]:
    """Run an op's kernels on the emulator. missing: why there is none. Raises WrongResultError."""
    from ...lab.emulation import Emulator
    from ...lab.workloads import case_workloads

    chosen = shape_workloads(op, request.shapes, request.dtype, device) or case_workloads(op, request.dtype)
    if missing:
        return checked_row(op.name, request.dtype, None, "not run")
    emulator = Emulator(arch=device.arch)
    say(f"{op.name}: {counted(len(chosen), 'case')}")
    try:
        emulator.prepare(chosen)
        for workload in chosen:
            emulator.check(workload)
    except DeviceError as e:  # nothing is wrong with the kernel: it cannot be run here
        return checked_row(op.name, request.dtype, len(chosen), f"not run: {e}")
    return checked_row(op.name, request.dtype, len(chosen), "right")


def _ops_of_model(request: _Request) -> Sequence[Op]:
    """The ops asked for; of those, with a model, the ones that it uses."""
    from ...lab import workloads
    from ...models.presets import find_shape

    if request.model is None:
        return request.ops
    config = find_shape(request.model)[1]
    both = [
        *workloads.decode_workloads(config, request.dtype, request.batch),
        *workloads.prompt_workloads(config, request.dtype),
    ]
    _check_used(request.names, both, request.model)
    used = {w.op.name for w in both}
    return [op for op in request.ops if op.name in used]


def _check_used(names: Sequence[str], workloads: Sequence[Workload], model: str) -> None:
    """Raises ParameterError for a name of which a model's workloads have no op."""
    used = {w.op.name for w in workloads}
    for name in names:
        if used.isdisjoint(op.name for op in find_ops(name)):
            raise ParameterError(f"{model} does not use {name}; it uses: {', '.join(sorted(used))}")
