"""``cuplama kernels``: see, check, compile, time and compare single kernels. All but the times work without a GPU."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..backends.cuda.nvrtc import Resources, compile_program, nvrtc_library
from ..backends.cuda.toolkit import options, parse_archs, shared_limit, source, target
from ..dtypes import DTYPES, dtype_name
from ..errors import CompileError, DeviceError, ParameterError
from ..folders import source_folder
from ..lab import inventory as compiler
from ..lab.check import WrongResultError, check_launches, planned
from ..lab.dummy import dummy_model
from ..lab.emulation import Emulator, emulator_missing
from ..lab.report import check_picture, counted
from ..lab.trials import cache_tokens
from ..ops import OPS
from ..ops import launch as kernel
from ..ops.abstract import abstract
from ..ops.linear import LIBRARY, STREAMED_ROWS
from ..ops.op import Op
from ..ops.prototypes import prototypes

if TYPE_CHECKING:
    from ..lab.cases import Case


__all__ = [
    "DEBUG",
    "bench_kernels",
    "compare_kernels",
    "compile_kernels",
    "find_ops",
    "kernels",
    "list_kernels",
    "parse_shape",
    "show",
    "show_kernel",
    "stamps",
    "watch",
    "watch_kernel",
]


@click.group()
def kernels() -> None:
    """See, check, compile, time and compare the CUDA kernels. Only times need a GPU."""


DEBUG = click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback when something fails.")


@kernels.command("list", short_help="Name, file, ops, dtypes, architectures and meaning of every kernel.")
@DEBUG
def list_kernels() -> None:
    """Name, file, ops, dtypes, architectures and meaning of every kernel."""
    by_arch = {arch: _users(arch) for arch in _GENERATIONS}
    rows = []
    for path in sorted(source_folder().glob("*.cu")):
        for name in prototypes(path.name):
            found = {arch: users[path.name, name] for arch, users in by_arch.items() if (path.name, name) in users}
            ops = frozenset(op for who, _ in found.values() for op in who)
            dtypes = {d for who, given in found.values() for op in who for d in _dtypes(OPS[op], given)}
            alone = sum(ops <= who for who, _ in by_arch[90].values()) == 1
            cells = (" ".join(sorted(ops)), " ".join(d for d in DTYPES if d in dtypes), _archs(list(found)))
            rows.append((name, path.name, *(cell or "-" for cell in cells), _meaning(name, path.name, ops, alone)))
    show(("kernel", "file", "ops", "dtypes", "archs", "computes"), rows)


_GENERATIONS = (75, 80, 90, 100)  # ops choose their kernels by these, and by nothing between them


def _dtypes(op: Op, given: frozenset[str]) -> frozenset[str]:
    """Of the model's dtypes an op was given, those that it sees: all, or what its signature names."""
    own = {s.dtype for s in (*op.signature.ins, *op.signature.outs)}
    return given if "T" in own else given & own


def _archs(found: Sequence[int]) -> str:
    """ "sm_80+" for all from there on, else each by name."""
    if found and found == list(_GENERATIONS[-len(found) :]):
        return f"sm_{found[0]}+"
    return " ".join(f"sm_{arch}" for arch in found)


@kernels.command("compile", short_help="Compile kernels for any architecture; print what they use.")
@click.option("--arch", default="all", show_default=True, metavar="LIST", help="Architectures, such as sm_80,sm_90.")
@click.option(
    "-j", "--jobs", type=click.IntRange(1), help="Compilations at a time. [default: the CPU cores, at most 8]"
)
@click.option("-v", "--verbose", is_flag=True, help="A row per instance, not only the largest of each kernel.")
@DEBUG
@click.argument("names", nargs=-1, metavar="[NAME]...")
def compile_kernels(arch: str, jobs: int | None, verbose: bool, names: tuple[str, ...]) -> None:
    """Compile the kernels of the given ops, kernels or files (all by default) and print what they use.

    Fails on an error, a warning, or a register spill that is not declared with a reason.
    """
    began = time.perf_counter()
    supported = tuple(nvrtc_library().getSupportedArchs())
    archs = parse_archs(arch, supported)

    def done(file: str, arch: int, seconds: float) -> None:
        click.echo(f"{file} for sm_{arch}: {seconds:.1f} s", err=True)

    results = compiler.compile_kernels(archs, names or None, workers=jobs, done=done)
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
        f"{counted(good, 'kernel instance')} for {', '.join(f'sm_{a}' for a in archs)}"
        f" in {time.perf_counter() - began:.0f} s; {counted(len(bad), 'problem')}"
    )
    if bad:
        sys.exit(1)


_SHAPE = click.option(
    "--shape", "shapes", multiple=True, metavar="n=1,d=4096", help="Dims and attributes; the option may be repeated."
)
_DTYPE = click.option("--dtype", type=click.Choice(["f32", "f16", "bf16"]), default="bf16", show_default=True)
_FORM = click.option("-o", "form", type=click.Choice(["md", "json", "csv"]), default="md", show_default=True)


@kernels.command("show", short_help="Documentation, signature, launches and resources of kernels.")
@click.argument("name")
@_SHAPE
@_DTYPE
@click.option("--arch", default="sm_90", show_default=True, metavar="LIST", help="Architectures to compile for.")
@click.option("--ptx", is_flag=True, help="Print the PTX of the first architecture.")
@click.option("--sass", is_flag=True, help="Print the machine code of the first architecture.")
@DEBUG
def show_kernel(name: str, shapes: tuple[str, ...], dtype: str, arch: str, ptx: bool, sass: bool) -> None:
    """Documentation, signature, launches and resources of an op, a kernel or a file. Needs no GPU."""
    from ..lab import cases

    archs = parse_archs(arch, tuple(nvrtc_library().getSupportedArchs()))
    launches = _without_op(name)
    ops = [] if launches else find_ops(name)
    device = kernel.Device(arch=archs[0], shared=shared_limit(archs[0]))
    for op in ops:
        chosen = _asked(op, shapes, dtype, device) or cases.default_cases(op.name, dtype)
        click.echo(f"{op.name}: {op.doc}\n  {op.text}\n")
        for case in chosen[: 4 if not shapes else None]:
            click.echo(f"  {' '.join(filter(None, (case.graph, '/'.join(case.weights), case.dtype, case.shape)))}")
            if op.name in LIBRARY and case.call["n"] > STREAMED_ROWS:
                click.echo("    cuBLAS; without it:")
            described = []
            for launch in planned(case, case.ins, device, abstract)[0]:
                instances = launches.setdefault(launch.file, [])
                if launch.expression not in instances:
                    instances.append(launch.expression)
                shared = f", {launch.shared} bytes of dynamic shared memory" if launch.shared else ""
                described.append(f"{launch.expression}: grid {launch.grid}, block {launch.block}{shared}")
            for text, same in itertools.groupby(described):
                times = len(list(same))
                click.echo(f"    {f'{times} x ' if times > 1 else ''}{text}")
        click.echo()
    for file, instances in launches.items():
        click.echo(f"cuda_src/{file}:\n{_documentation(file)}\n")
        rows = []
        for one in archs:
            program = compile_program(file, instances, one)
            rows += [(e, f"sm_{one}", *map(str, _numbers(program.resources[e]))) for e in instances]
        show(("kernel", "arch", "registers", "shared", "stack", "spills"), rows)
        click.echo()
        if ptx:
            click.echo(_ptx(file, instances, archs[0]))
        if sass:
            click.echo(_sass(compile_program(file, instances, archs[0]).cubin))


@kernels.command("bench", short_help="Check ops against their references, and time them on a GPU.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@_SHAPE
@click.option(
    "-m", "--model", metavar="MODEL", help="All ops at the shapes of a folder's config.json or a known model."
)
@_DTYPE
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="With --model: sequences decoded.")
@click.option("--depth", type=click.IntRange(2), default=512, show_default=True, help="With --model: tokens cached.")
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, help="With --model: tokens read.")
@_FORM
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Draw the roofline.")
@click.option("--arch", default="sm_90", show_default=True, metavar="LIST", help="Without a GPU: compile for these.")
@DEBUG
def bench_kernels(
    names: tuple[str, ...],
    shapes: tuple[str, ...],
    model: str | None,
    dtype: str,
    batch: int,
    depth: int,
    prompt: int,
    form: str,
    plot: Path | None,
    arch: str,
) -> None:
    """Check ops (all by default) against their references and time them, alone, against the machine's ceilings.

    A wrong kernel is refused: its case is printed, and the exit status is 1. With --model the ops of a decode step and
    of a prompt are counted, added up, and held against what the whole step takes. Without a GPU the kernels are run by
    the emulator, on the ops' own small cases or on --shape, and compiled; nothing is timed.
    """
    from ..backends.cuda.driver import cuda_available

    works, reason = cuda_available()
    if plot is not None:
        check_picture(plot)
        if not works:
            raise DeviceError(f"--plot draws times, and nothing can be timed: {reason}")
    ops = [op for name in names for op in find_ops(name)] or list(OPS.values())
    if shapes and (model or len(ops) != 1):
        raise ParameterError("--shape needs the NAME of one op, and no --model")
    with _refusing():
        if works:
            _bench_on_gpu(ops, names, shapes, model, dtype, (batch, depth, prompt), form, plot)
        else:
            _bench_without(ops, names, shapes, model, dtype, batch, form, arch, reason)


def _bench_on_gpu(
    ops: Sequence[Op],
    names: Sequence[str],
    shapes: Sequence[str],
    model: str | None,
    dtype: str,
    sizes: tuple[int, int, int],
    form: str,
    plot: Path | None,
) -> None:
    from ..backends.cuda.backend import CudaBackend
    from ..lab import bench, cases, report, roofline
    from ..lab import kernel_bench as lab
    from ..lab import peaks as ceilings

    batch, depth, prompt = sizes
    whole: list[lab.Step] = []
    if model is not None:
        context = max(depth + 64, prompt + 1)
        tokens = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
        loaded = dummy_model(model, "cuda", tokens[dtype], context, cache_tokens(batch, context))
        with loaded:
            dtype = dtype_name(loaded.backend.dtype)  # an old GPU runs bf16 models in f16
            nodes = loaded.engine.decode_nodes(batch)
            chosen = cases.decode_cases(loaded.config, dtype, batch, depth, context, nodes)
            chosen += cases.prompt_cases(loaded.config, dtype, prompt, loaded.backend.prefill_chunk)
            _check_used(names, chosen, model)
            wanted = [c for c in chosen if not names or c.op in ops]
            limits = ceilings.measure(loaded.backend)
            rows = lab.bench(loaded.backend, wanted, limits, _say)
            if not names:
                whole = lab.steps(loaded, rows, batch, depth, prompt)
            found = lab.result(loaded.backend, rows, limits, whole)
        found["environment"] = {"model": model, **found["environment"]}
    else:
        backend = CudaBackend(dtype)
        dtype = dtype_name(backend.dtype)
        try:
            chosen = _asked(ops[0], shapes, dtype, backend.gpu.limits)
            chosen = chosen or [c for op in ops for c in cases.default_cases(op.name, dtype)]
            limits = ceilings.measure(backend)
            found = lab.result(backend, lab.bench(backend, chosen, limits, _say), limits, [])
        finally:
            backend.close()
    found = {"command": report.command(), **found}
    extra = {k: v for k, v in found.items() if k != "rows"}
    if form == "md":
        click.echo("\n".join(bench.header(found)) + "\n")
    click.echo(report.render(lab.COLUMNS, found["rows"], form, extra), nl=False)
    if form == "md":
        for step in whole:
            click.echo(f"\n{step}")
    if plot is not None:
        roofline.plot_roofline(found, plot)


def _bench_without(
    ops: Sequence[Op],
    names: Sequence[str],
    shapes: Sequence[str],
    model: str | None,
    dtype: str,
    batch: int,
    form: str,
    arch: str,
    reason: str,
) -> None:
    """Check and compile; say what is missing."""
    from ..lab import cases

    if model is not None:
        from ..models.presets import find_shape

        config = find_shape(model)[1]
        both = [*cases.decode_cases(config, dtype, batch), *cases.prompt_cases(config, dtype)]
        _check_used(names, both, model)
        used = {c.op.name for c in both}
        ops = [op for op in ops if op.name in used]
    archs = parse_archs(arch, tuple(nvrtc_library().getSupportedArchs()))
    device = kernel.Device(arch=archs[0], shared=shared_limit(archs[0]))
    kernelled = [op for op in ops if op.kernels is not None]
    rows = []
    missing = emulator_missing()
    for op in kernelled:
        chosen = _asked(op, shapes, dtype, device) or cases.registry_cases(op, dtype)
        if missing:
            rows.append(_checked(op, dtype, None, "not run"))
            continue
        emulator = Emulator(arch=archs[0])
        _say(f"{op.name}: {counted(len(chosen), 'case')}")
        try:
            emulator.prepare(chosen)
            for case in chosen:
                emulator.check(case)
        except DeviceError as e:  # nothing is wrong with the kernel: it cannot be run here
            rows.append(_checked(op, dtype, len(chosen), f"not run: {e}"))
        else:
            rows.append(_checked(op, dtype, len(chosen), "right"))
    if form == "md":
        cells = [["-" if value is None else str(value) for value in row.values()] for row in rows]
        show(("op", "dtype", "cases", "on the emulator"), cells)
        click.echo()
    else:
        _render_checked(rows, form)
    results = compiler.compile_kernels(archs, [op.name for op in kernelled])
    for problem in (r for r in results if r.problem is not None):
        raise WrongResultError(f"{problem.file} for sm_{problem.arch}: {problem.expression} {problem.problem}")
    good = sum(r.resources is not None for r in results)
    shown = ", ".join(f"sm_{a}" for a in archs)
    told = form != "md"  # the sentences would spoil what a program reads
    click.echo(f"{counted(good, 'kernel instance')} compile{'s' if good == 1 else ''} for {shown}", err=told)
    click.echo(f"nothing is timed: {reason}" + (f"; {missing}" if missing else ""), err=told)


def _checked(op: Op, dtype: str, cases: int | None, result: str) -> dict[str, Any]:
    """What was checked without a GPU, by stable names."""
    return {"op": op.name, "dtype": dtype, "cases": cases, "emulator": result}


def _render_checked(rows: Sequence[Mapping[str, Any]], form: str) -> None:
    from ..lab import report

    click.echo(report.render((), rows, form, {"command": report.command()}), nl=False)


def _check_used(names: Sequence[str], cases: Sequence[Case], model: str) -> None:
    """Raises ParameterError for a name of which a model's cases have no op."""
    used = {c.op.name for c in cases}
    for name in names:
        if used.isdisjoint(op.name for op in find_ops(name)):
            raise ParameterError(f"{model} does not use {name}; it uses: {', '.join(sorted(used))}")


@kernels.command("compare", short_help="Judge another version of a file's kernels against the tree's.")
@click.argument("other", type=click.Path(path_type=Path))
@click.option("--op", "name", required=True, metavar="NAME", help="The op whose kernels OTHER has.")
@_SHAPE
@_DTYPE
@_FORM
@click.option("--arch", default="sm_90", show_default=True, metavar="LIST", help="Without a GPU: compile for these.")
@DEBUG
def compare_kernels(other: Path, name: str, shapes: tuple[str, ...], dtype: str, form: str, arch: str) -> None:
    """Judge the kernels of the file OTHER against those of the tree: same cases, same inputs, right first.

    The ratio is that of times measured in turn, with its 95% interval; above 1 OTHER is faster. A wrong OTHER is
    refused with its case and exit status 1. Without a GPU it is checked on the emulator and compiled, not timed.
    """
    from ..backends.cuda.backend import CudaBackend
    from ..backends.cuda.driver import cuda_available
    from ..lab import cases, report
    from ..lab import compare as contender
    from ..lab import peaks as ceilings

    if name not in OPS:
        raise ParameterError(f"no op is named {name!r}; ops: {', '.join(OPS)}")
    op = OPS[name]
    works, reason = cuda_available()
    with _refusing():
        if not works:
            _compare_without(other, op, shapes, dtype, form, arch, reason)
            return
        backend = CudaBackend(dtype)
        dtype = dtype_name(backend.dtype)  # an old GPU has no bf16
        try:
            against = contender.candidate_op(other, op, dtype, backend.gpu.limits)
            chosen = _asked(op, shapes, dtype, backend.gpu.limits) or cases.default_cases(name, dtype)
            found = contender.compare(backend, against, chosen, cases.registry_cases(op, dtype))
            facts = ceilings.environment(backend)
        finally:
            backend.close()
    rows = [contender.compare_row(c) for c in found]
    if form == "md":
        click.echo(f"$ {report.command()}\n\n{ceilings.header(facts)}\n")
    extra = {"command": report.command(), "environment": facts}
    click.echo(report.render(contender.COMPARE_COLUMNS, rows, form, extra), nl=False)


def _compare_without(other: Path, op: Op, shapes: Sequence[str], dtype: str, form: str, arch: str, reason: str) -> None:
    """Check a contender on the emulator, which wants it beside the headers, and compile it."""
    from ..lab import cases
    from ..lab import compare as contender

    archs = parse_archs(arch, tuple(nvrtc_library().getSupportedArchs()))
    missing = emulator_missing()
    device = kernel.Device(arch=archs[0], shared=shared_limit(archs[0]))
    chosen = _asked(op, shapes, dtype, device) or cases.registry_cases(op, dtype)
    against = [replace(c, op=contender.candidate_op(other, op, dtype, device)) for c in chosen]
    wanted: dict[str, list[str]] = {}
    for case in against:
        for launch in planned(case, case.ins, device, abstract)[0]:
            wanted.setdefault(launch.file, []).append(launch.expression)
    for file, expressions in wanted.items():
        for one in archs:
            compile_program(file, list(dict.fromkeys(expressions)), one)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for path in (*source_folder().glob("*.cuh"), other):
            shutil.copy(path, folder / path.name)
        if not missing:
            emulator = Emulator(archs[0])
            copy = contender.candidate_op(folder / other.name, op, dtype, device)
            try:
                for case in chosen:
                    emulator.check(replace(case, op=copy))
            except WrongResultError as e:  # a fault is at a line of what was given, not of its copy
                text = str(e).replace(str(folder / other.name), str(other)).replace(f"{folder}/", "cuda_src/")
                raise WrongResultError(text) from None
    if form != "md":
        row = _checked(op, dtype, None, "not run") if missing else _checked(op, dtype, len(chosen), "right")
        _render_checked([row], form)
    shown = "compiles; not run" if missing else f"compiles, and is right on {counted(len(chosen), 'case')}"
    click.echo(f"{other}: {shown}; not timed: {reason}" + (f"; {missing}" if missing else ""), err=form != "md")


@kernels.command("watch", short_help="Check and time a kernel whenever a source of it is saved.")
@click.argument("name")
@_SHAPE
@_DTYPE
@DEBUG
def watch_kernel(name: str, shapes: tuple[str, ...], dtype: str) -> None:
    """Check and time NAME whenever a source of it is saved. Ctrl-C ends it."""
    from ..lab import cases

    ops = find_ops(name)
    if shapes and len(ops) != 1:
        raise ParameterError("--shape needs the NAME of one op")
    for shape in shapes:  # refused once, not after every change
        cases.shape_case(ops[0], parse_shape(shape), dtype)
    arguments = ["kernels", "bench", *[op.name for op in ops], "--dtype", dtype]
    for shape in shapes:
        arguments += ["--shape", shape]
    folders = (source_folder(), Path(__file__).resolve().parent / "ops")

    def again() -> None:
        # A process of its own: it sees every change, and a crashed GPU context ends with it.
        command = [sys.executable, "-c", "from cuplama.cli import main; main()", *arguments]
        here = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
        click.echo(f"watching {' and '.join(map(str, folders))}; Ctrl-C ends", err=True)

    watch(lambda: stamps(folders), again)


def stamps(folders: Sequence[Path]) -> dict[str, int]:
    """When each source was saved."""
    files = [f for folder in folders for pattern in ("*.cu", "*.cuh", "*.py") for f in folder.glob(pattern)]
    found = {}
    for file in files:
        try:
            found[str(file)] = file.stat().st_mtime_ns
        except OSError:  # an editor is replacing it
            continue
    return found


def watch(look: Callable[[], Mapping[str, int]], again: Callable[[], object], pause: float = 0.3) -> None:
    """Call ``again`` now and after every change that ``look`` sees, until the user interrupts."""
    try:
        seen = look()
        again()
        while True:
            time.sleep(pause)
            now = look()
            if now != seen:
                seen = now
                again()
    except KeyboardInterrupt:
        return


@contextmanager
def _refusing() -> Iterator[None]:
    """A wrong kernel ends with its case on stderr and exit status 1, where other errors have status 2.

    Arrays that do not fit into memory are such an error: the shape's, or the model's.
    """
    from ..lab.check import WrongResultError

    try:
        yield
    except (WrongResultError, CompileError) as e:
        click.echo(f"refused: {e}", err=True)
        sys.exit(1)
    except MemoryError as e:
        raise ParameterError(f"the shape is too large for the memory here: {e}") from e


def _say(text: str) -> None:
    click.echo(text, err=True)


def _asked(op: Op, shapes: Sequence[str], dtype: str, device: kernel.Device) -> list[Case]:
    """The cases of --shape. Raises ParameterError for one that the op does not have or cannot launch."""
    from ..lab import cases

    found = [cases.shape_case(op, parse_shape(s), dtype) for s in shapes]
    for case in found:
        check_launches(case, device)
    return found


def find_ops(name: str) -> list[Op]:
    """The ops that a name stands for: an op, a kernel, or the stem of a file. Raises ParameterError."""
    if name in OPS:
        return [OPS[name]]
    stem = name.removesuffix(".cu")
    users = _users()
    ops = {op for (file, function), (who, _) in users.items() if stem in (function, Path(file).stem) for op in who}
    if not ops:
        known = sorted({*OPS, *(k for _, k in users), *(Path(f).stem for f, _ in users)})
        raise ParameterError(f"no op, kernel or file is named {name!r}; known: {', '.join(known)}")
    return [op for op in OPS.values() if op.name in ops]


def _without_op(name: str) -> dict[str, list[str]]:
    """file -> kernels that no op launches (those that measure the machine), if the name means them."""
    users = _users()
    stem = name.removesuffix(".cu")
    found: dict[str, list[str]] = {}
    for path in sorted(source_folder().glob("*.cu")):
        for function, prototype in prototypes(path.name).items():
            if (path.name, function) not in users and not prototype.template and stem in (function, path.stem):
                found.setdefault(path.name, []).append(function)
    return found


def parse_shape(text: str) -> dict[str, Any]:
    """ "n=1,d=4096,eps=1e-6,b=true,U=f32" by name. Raises ParameterError naming the piece."""
    found: dict[str, Any] = {}
    for piece in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = piece.partition("=")
        if not equals or not name or not value:
            raise ParameterError(f"--shape takes name=value pairs such as n=1,d=4096, not {piece!r}")
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if text == "T" or text in DTYPES:
        return text
    raise ParameterError(f"--shape: {text!r} is neither a number, true, false, nor a dtype")


def _documentation(file: str) -> str:
    """The comment that opens a source."""
    lines = (source_folder() / file).read_text(encoding="utf-8").splitlines()
    head = []
    for line in lines:
        if not line.startswith("//"):
            break
        head.append("  " + line.removeprefix("//").removeprefix(" "))
    return "\n".join(head)


def _ptx(file: str, names: Sequence[str], arch: int) -> str:
    nvrtc = nvrtc_library()
    flags = (*options(nvrtc.getVersion()[0]), "-ftz=true", f"-arch=compute_{target(arch)}")
    program = nvrtc.createProgram(source(file), file, (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        nvrtc.compileProgram(program, flags)
        text: str = nvrtc.getPTX(program).decode().rstrip("\0")
    finally:
        nvrtc.destroyProgram(program)
    return text


def _sass(cubin: bytes) -> str:
    """The disassembly, if the CUDA toolkit's tools are here."""
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


def _numbers(used: Resources) -> tuple[int, int, int, int]:
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


def _rank(used: Resources | None) -> tuple[int, int]:
    return (0, 0) if used is None else (used.spills, used.registers)


def _users(arch: int = 90) -> dict[tuple[str, str], tuple[frozenset[str], frozenset[str]]]:
    """(file, kernel) -> the ops and dtypes that need it, for the kernels that ops launch on that architecture."""
    users: dict[tuple[str, str], tuple[frozenset[str], frozenset[str]]] = {}
    for file, instances in compiler.needed(kernel.Device(arch=arch, shared=shared_limit(arch))).items():
        for expression, need in instances.items():
            ops, dtypes = users.get((file, expression.split("<")[0]), (frozenset(), frozenset()))
            if need.ops:
                users[file, expression.split("<")[0]] = (ops | need.ops, dtypes | need.dtypes)
    return users


def _meaning(name: str, file: str, ops: frozenset[str], alone: bool) -> str:
    """The doc of its op if the kernel is all of it; else what the head of the file says of the kernel, or the doc."""
    head = _documentation(file)
    found = None if alone else re.search(rf"^\s*{name}\s\s+(.*?)(?:\s\s|[,;]?$)", head, re.M)
    if found:
        return found[1]
    return OPS[next(iter(ops))].doc.split(". ")[0] if len(ops) == 1 else head.splitlines()[0].strip()


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
