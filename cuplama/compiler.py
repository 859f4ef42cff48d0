"""NVRTC without a GPU: every kernel of ``cuda_src/`` to machine code for any architecture, and what the code uses.

The CUDA backend compiles through CuPy, which needs a GPU. This module makes the same programs with the same options on
a machine that has none, so that an error, a warning or a register spill on any architecture is found there. What ptxas
says of each kernel (registers, shared memory, stack, spills) is read from its report.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from . import kernel
from .errors import DeviceError
from .op import DTYPES, Call, Op, dtype_name
from .ops import OPS
from .ops.linear import LIBRARY

__all__ = [
    "ADMITTED_SPILLS",
    "ARCHS",
    "CompileError",
    "Program",
    "Resources",
    "Result",
    "StandIn",
    "compile_error",
    "compile_kernels",
    "compile_program",
    "model_cases",
    "needed",
    "nvrtc_library",
    "options",
    "parse_archs",
    "source_hash",
    "stand_in",
    "target",
    "toolkit_folders",
]

ARCHS = (75, 80, 86, 89, 90, 100, 120)

# "kernel@arch" -> bytes of registers that an instance may spill at most, and why.
ADMITTED_SPILLS: Mapping[str, tuple[int, str]] = {
    "append_attention@120": (
        8,
        "one instance (bf16, heads of 128, one query head a block), whose tiles of keys and values fill 255 registers;"
        " no other architecture spills there",
    ),
    "layer_norm_linear@75": (
        12,
        "one instance (f32, 8 rows, the exact GELU), beside the 128 registers that 512 threads can have;"
        " no other architecture spills there",
    ),
}


class CompileError(DeviceError):
    """A kernel does not compile: file and line of our source, and the compiler's first complaint."""


# ---- options ---------------------------------------------------------------------------------------------------------


@cache
def source_hash(folder: Path | None = None) -> str:
    """A hash over every source of ``cuda_src/``: CuPy's cache key does not see the headers that a source includes."""
    digest = hashlib.sha256()
    for path in sorted((folder or kernel.source_folder()).glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def toolkit_folders(major: int) -> tuple[Path, ...]:
    """The include folders of the CUDA toolkit of that major version: fp16/bf16 headers, then libcu++ (``nv/target``).

    Looks into the nvidia wheels, then CUDA_PATH, then /usr/local/cuda; CuPy brings a libcu++ of its own. Headers of
    another major version are skipped: a machine may have the wheels of two. Empty if there are none.
    """
    wheels = [f for root in _package("nvidia") for f in sorted(root.glob("*/include"))]
    systems = [Path(p) / "include" for p in (os.environ.get("CUDA_PATH"), "/usr/local/cuda") if p]
    bundled = [root / "_core/include/cupy/_cccl/libcudacxx" for root in _package("cupy")]
    for folder in (*wheels, *systems):
        header = folder / "cuda_runtime_api.h"
        if (folder / "cuda_fp16.h").is_file() and header.is_file():
            version = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
            if version and int(version[1]) // 1000 == major:
                nearby = wheels if folder in wheels and folder.parent.name != f"cu{major}" else []
                cccl = [f for f in (folder / "cccl", *nearby, *bundled) if (f / "nv" / "target").is_file()]
                return (folder, *cccl[:1])
    return ()


def _package(name: str) -> list[Path]:
    """The folders of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return [Path(p) for p in spec.submodule_search_locations or ()] if spec else []


def target(arch: int) -> str:
    """What follows ``sm_`` or ``compute_`` in the compiler's -arch.

    Hopper's warpgroup instructions (wgmma) are no part of sm_90, which later GPUs understand as well, but of sm_90a.
    """
    return "90a" if arch == 90 else str(arch)


def options(major: int, arch: int = 0) -> tuple[str, ...]:
    """The compiler options that CUDA backend and GPU-free compilation share. major: of the NVRTC version.

    arch: for RawModule, which appends an -arch of its own; NVRTC takes the first of two.

    Raises CompileError if the toolkit's headers are not installed.
    """
    folders = toolkit_folders(major)
    if not folders:
        raise CompileError(
            f"the CUDA {major} headers (cuda_fp16.h) are not installed; "
            f"pip install 'cuda-toolkit[cudart,cccl]=={major}.*'"
        )
    return (
        "-std=c++17",
        f"-I{kernel.source_folder()}",
        *(f"-I{f}" for f in folders),
        f"-DCUPLAMA_SOURCE_HASH={source_hash()}",
        *((f"-arch=sm_{target(arch)}",) if target(arch) != str(arch) else ()),
    )


_CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")  # CuPy adds these by itself


def source(file: str) -> str:
    """The text of ``cuda_src/<file>``, with its name in place, so that the compiler reports lines of our file."""
    return f'#line 1 "{file}"\n' + (kernel.source_folder() / file).read_text(encoding="utf-8")


def parse_archs(text: str, supported: Sequence[int] = ()) -> tuple[int, ...]:
    """``"sm_80,sm_90"`` or ``"80,90"`` or ``"all"`` -> (80, 90). Raises DeviceError naming the piece it cannot read."""
    if text.strip() == "all":
        return ARCHS
    archs = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        m = re.fullmatch(r"(?:sm_)?(\d{2,3})", piece)
        if m is None or (supported and int(m[1]) not in supported) or int(m[1]) < ARCHS[0]:
            known = ", ".join(f"sm_{a}" for a in supported or ARCHS if a >= ARCHS[0])
            raise DeviceError(f"architecture {piece!r} is not supported; supported: {known}")
        archs.append(int(m[1]))
    if not archs:
        raise DeviceError("no architecture given; for example: sm_80,sm_90")
    return tuple(dict.fromkeys(archs))


# ---- which kernels ---------------------------------------------------------------------------------------------------


class _Flags:
    c_contiguous = True


@dataclass(frozen=True)
class StandIn:
    """An array's description without the array: enough to bind an op and to plan its launches."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    flags: type[_Flags] = _Flags

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stand_in(shape: Sequence[int], dtype: np.dtype[Any]) -> StandIn:
    return StandIn(tuple(shape), np.dtype(dtype))


def attributes(op: Op, case: Mapping[str, Any], T: np.dtype[Any]) -> dict[str, Any]:
    """A case's attributes of the op; a dtype letter given as "T" means the model's dtype."""
    letters = {s.dtype for s in (*op.signature.outs, *op.signature.ins)} - set(DTYPES)
    names = {s.name for s in op.signature.attrs} | letters
    return {k: dtype_name(T) if k in letters and v == "T" else v for k, v in case.items() if k in names}


def expressions(op: Op, call: Call, device: kernel.Device) -> Iterator[tuple[str, str]]:
    """(file, C++ name) of every kernel that computes the call. Its outputs and scratch need no memory."""
    assert op.kernels is not None
    plan = op.kernels(call, device)
    for spec in op.signature.outs:
        if spec.name not in op.signature.in_place:
            call.arrays[spec.name] = stand_in(call.shape(spec), call.dtype(spec))
    scratch = {name: stand_in(shape, DTYPES[dtype]) for name, (shape, dtype) in plan.scratch.items()}
    for launch in plan.launches:
        bound = kernel.bind(launch, call, scratch)
        yield bound.file, bound.expression


def beside(call: Call) -> Iterator[tuple[str, str]]:
    """The kernels that go with a library call: what a cuBLAS product with a bias may need before it."""
    if call.op.name in LIBRARY and call.arrays["b"] is not None:
        T, U = dtype_name(call.dtypes["T"]), dtype_name(call.dtype(call.op.signature.outs[0]))
        yield "bias.cu", f"fill_rows<{T}, {U}>"
        if T != U:
            yield "bias.cu", f"cast_bias<{T}, {U}>"


@dataclass(frozen=True)
class Need:
    """Who needs a kernel instance: op names and dtypes."""

    ops: frozenset[str]
    dtypes: frozenset[str]


# Kernels that belong to no op: the one that measures the read bandwidth.
TOOLS = (("ceilings.cu", "read_sum"),)


def needed(device: kernel.Device, ops: Iterable[str] | None = None) -> dict[str, dict[str, Need]]:
    """file -> C++ name -> Need: every kernel that the ops' cases and the shapes of real models use on that device.

    The cases come in every dtype, the models in the one that they are run in. bf16 is left out below sm_80, where the
    backend runs fp16 instead.
    """
    widely_run = "bf16" if device.arch >= 80 else "f16"
    found: dict[str, dict[str, Need]] = {}
    for name in OPS if ops is None else ops:
        op = OPS[name]
        if op.kernels is None:
            continue
        for dtype in ("f32", "f16", "bf16")[: 3 if device.arch >= 80 else 2]:
            for call in _calls(op, DTYPES[dtype], dtype == widely_run):
                for file, expression in (*expressions(op, call, device), *beside(call)):
                    old = found.setdefault(file, {}).get(expression, Need(frozenset(), frozenset()))
                    found[file][expression] = Need(old.ops | {name}, old.dtypes | {dtype})
    for file, name in TOOLS if ops is None else ():
        found.setdefault(file, {})[name] = Need(frozenset(), frozenset())
    return {file: dict(sorted(found[file].items())) for file in sorted(found)}


def _calls(op: Op, T: np.dtype[Any], models: bool) -> Iterator[Call]:
    rng = np.random.default_rng(0)
    for case in op.cases:
        inputs = op.random_inputs(rng, case, T)
        yield op.bind([inputs[s.name] for s in op.signature.ins], attributes(op, case, T))
    for ins, attrs in model_cases(op.name, T) if models else ():
        yield op.bind(ins, attrs)


# Shapes of models that people run: hidden, heads, kv_heads, head_dim, ffn.
_MODELS = (
    (896, 14, 2, 64, 4864),  # Qwen2.5-0.5B
    (576, 9, 3, 64, 1536),  # SmolLM2-135M
    (2048, 32, 8, 64, 8192),  # Llama-3.2-1B
    (1024, 16, 8, 128, 3072),  # Qwen3-0.6B
    (4096, 32, 8, 128, 14336),  # Llama-3.1-8B, Mistral-7B
    (3072, 32, 32, 96, 8192),  # Phi-3-mini
    (768, 12, 12, 64, 3072),  # GPT-2
    (288, 6, 6, 48, 768),  # stories15M
    (64, 8, 4, 8, 172),  # stories260K
)


def model_cases(name: str, T: np.dtype[Any]) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Inputs (stand-ins) and attributes of an op in a decode step and in a prefill of real models."""
    f32, i32 = DTYPES["f32"], DTYPES["i32"]
    for n in (1, 8, 512):
        for d, heads, kv, D, f in _MODELS:
            q, w = heads * D, (heads + 2 * kv) * D
            shape = dict(heads=heads, kv_heads=kv)
            x, residual = stand_in((n, w), T), stand_in((n, d), f32)
            norm, head = stand_in((d,), T), stand_in((D,), T)
            cache = stand_in((64, kv, 64, D), T)
            rows, table = stand_in((n,), i32), stand_in((4096, D // 2), f32)
            if name == "linear":
                for m, k, u in ((w, d, T), (d, q, f32), (2 * f, d, T), (d, f, f32), (32000, d, f32)):
                    yield [stand_in((n, k), T), stand_in((m, k), T)], {"U": dtype_name(np.dtype(u))}
            elif name == "linear_add":
                for k in (q, f):
                    yield [stand_in((n, k), T), stand_in((d, k), T), residual], {}
            elif name == "rms_norm_linear":
                for m, u in ((w, T), (32000, f32)):
                    yield [residual, norm, stand_in((m, d), T)], {"eps": 1e-5, "U": dtype_name(np.dtype(u))}
            elif name == "rms_norm_linear_silu_mul":
                yield [residual, norm, stand_in((2 * f, d), T)], {"eps": 1e-5}
            elif name == "append_attention" and n <= 8:
                starts, lengths, blocks = (stand_in(s, i32) for s in ((n + 1,), (n,), (n, 64)))
                attrs = {"heads": heads, "window": 0, "scale": 0.125, "eps": 1e-6}
                new = [x, rows, cache, cache, starts, lengths, blocks, rows, table, table]
                yield [*new, head, head], attrs
            elif name == "rms_norm":
                yield [residual, norm], {"eps": 1e-5}
            elif name == "layer_norm":
                yield [residual, norm, norm], {"eps": 1e-5}
            elif name == "head_norm":
                yield [x, head, head], {**shape, "eps": 1e-6}
            elif name == "rope":
                yield [x, rows, table, table], {**shape, "D": D}
            elif name == "kv_append":
                yield [x, rows, cache, cache], {}
            elif name == "attention":
                b = n if n <= 8 else 1
                starts, lengths, blocks = (stand_in(s, i32) for s in ((b + 1,), (b,), (b, 64)))
                attrs = {"heads": heads, "window": 0, "scale": 0.125}
                for tokens in (n,) if n <= 8 else (n, 32 * n):  # long prompts have larger tiles
                    yield [stand_in((tokens, w), T), cache, cache, starts, lengths, blocks], attrs
            elif name == "silu_mul":
                yield [stand_in((n, 2 * f), T)], {}
            elif name.startswith("gelu"):
                yield [stand_in((n, f), T)], {}


# ---- compiling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """What one kernel instance uses: registers a thread, bytes of static shared memory a block, bytes of stack and of
    spilled registers (stores + loads) a thread."""

    registers: int
    shared: int
    stack: int
    spills: int


@dataclass(frozen=True)
class Program:
    """One source file compiled for one architecture. names: C++ name -> name in the cubin; warnings: the log's."""

    file: str
    arch: int
    cubin: bytes
    names: Mapping[str, str]
    resources: Mapping[str, Resources]
    warnings: tuple[str, ...]
    seconds: float


_PROPERTIES = re.compile(
    r"Function properties for (\S+)\s*\n"
    r"[^\n]*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r"\s*\n[^\n]*Used (\d+) registers([^\n]*)"
)
_COMPLAINT = re.compile(
    r"^(?P<file>[^\s(][^(\n]*)\((?P<line>\d+)\): (?:catastrophic |fatal )?error(?: #\S+)?: (?P<text>.*)",
    re.M,
)
_WARNING = re.compile(r"^.*\bwarning\s*[#:].*$", re.M)  # of the compiler ("warning #177-D:") or of ptxas ("warning :")


def parse_resources(log: str) -> dict[str, Resources]:
    """Mangled kernel name -> Resources, from the report of ``ptxas -v``."""
    found = {}
    for name, stack, stores, loads, registers, rest in _PROPERTIES.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = Resources(int(registers), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads))
    return found


def compile_error(file: str, log: str, arch: int | None = None) -> CompileError:
    """A CompileError with the first complaint of a compiler log, at a line of our source."""
    where = f" for sm_{arch}" if arch else ""
    if m := _COMPLAINT.search(log):
        at = _shown(Path(m["file"].strip()))
        return CompileError(f"{at}:{m['line']}: {m['text'].strip()} (compiling {file}{where})")
    lines = [line.strip() for line in log.replace("\0", "").splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
    return CompileError(f"{_shown(Path(file))}: {first}{where}")


def _shown(path: Path) -> str:
    """A source as messages name it: ours by its folder's name; one from elsewhere, such as a contender's, by its path.

    The compiler names headers of ours with their folder.
    """
    return str(path) if path.is_absolute() and path.parent != kernel.source_folder() else f"cuda_src/{path.name}"


def compile_program(file: str, names: Sequence[str], arch: int) -> Program:
    """Compile instances of a file's kernels with NVRTC. Needs no GPU. Raises CompileError."""
    nvrtc = nvrtc_library()
    began = time.perf_counter()
    flags = (*options(nvrtc.getVersion()[0]), *_CUPY_OPTIONS, f"-arch=sm_{target(arch)}", "--ptxas-options=-v")
    program = nvrtc.createProgram(source(file), file, (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError:
            raise compile_error(file, nvrtc.getProgramLog(program), arch) from None
        log = nvrtc.getProgramLog(program)
        mangled = {name: nvrtc.getLoweredName(program, name) for name in names}
        cubin = nvrtc.getCUBIN(program)
    finally:
        nvrtc.destroyProgram(program)
    resources = parse_resources(log)
    return Program(
        file,
        arch,
        cubin,
        mangled,
        {name: resources[mangled[name]] for name in names},
        tuple(line.strip() for line in _WARNING.findall(log)),
        time.perf_counter() - began,
    )


def nvrtc_library() -> Any:
    """CuPy's binding of NVRTC. Raises DeviceError saying what to install."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception as e:  # CuPy raises several kinds, by what is missing
        raise DeviceError(
            f"NVRTC is not available ({e}); pip install cupy-cuda12x 'cuda-toolkit[nvrtc,cudart]==12.*'"
        ) from None
    return nvrtc


@dataclass(frozen=True)
class Result:
    """One kernel instance on one architecture: what it uses, and the complaint if that is not allowed."""

    file: str
    expression: str
    arch: int
    resources: Resources | None
    problem: str | None
    admitted: str | None = None

    @property
    def kernel(self) -> str:
        return self.expression.split("<")[0]


def judge(program: Program, admitted: Mapping[str, tuple[int, str]] = ADMITTED_SPILLS) -> list[Result]:
    """A Result per instance; a warning counts against the whole file."""
    results = []
    for name, used in program.resources.items():
        most, reason = admitted.get(f"{name.split('<')[0]}@{program.arch}", (0, None))
        problem = f"spills {used.spills} bytes of registers" if used.spills > most else None
        results.append(Result(program.file, name, program.arch, used, problem, reason if used.spills else None))
    for warning in program.warnings:
        results.append(Result(program.file, "", program.arch, None, warning))
    return results


def compile_kernels(
    archs: Sequence[int],
    names: Sequence[str] | None = None,
    *,
    workers: int | None = None,
    done: Callable[[str, int, float], None] | None = None,
) -> list[Result]:
    """Compile every kernel instance that any op needs, for each arch; one program a file and arch.

    names: op or kernel names, or file stems; None for all. done(file, arch, seconds) is told of each finished program.
    Errors come back as results, so that one broken file does not hide another. Raises DeviceError for an unknown name.
    """
    jobs = []
    known: set[str] = set()
    for arch in archs:
        for file, instances in needed(kernel.Device(arch=arch, shared=shared_limit(arch))).items():
            known |= {Path(file).stem, *(e.split("<")[0] for e in instances)}
            known |= {op for need in instances.values() for op in need.ops}
            chosen = [e for e, need in instances.items() if names is None or _matches(file, e, need, names)]
            if chosen:
                jobs.append((file, chosen, arch))
    if unknown := [n for n in names or () if n not in known]:
        raise DeviceError(f"no op, kernel or file is named {unknown[0]!r}; known: {', '.join(sorted(known))}")
    nvrtc_library()

    def work(job: tuple[str, list[str], int]) -> list[Result]:
        file, chosen, arch = job
        began = time.perf_counter()
        try:
            results = judge(compile_program(file, chosen, arch))
        except CompileError as e:
            results = [Result(file, "", arch, None, str(e))]
        if done is not None:
            done(file, arch, time.perf_counter() - began)
        return results

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        return [result for results in pool.map(work, jobs) for result in results]


def _matches(file: str, expression: str, need: Need, names: Sequence[str]) -> bool:
    return bool({Path(file).stem, expression.split("<")[0], *need.ops} & set(names))


# Largest shared memory of a block that opts in, in bytes (CUDA C++ programming guide, technical specifications).
_SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


def shared_limit(arch: int) -> int:
    """Bytes of shared memory a block can have on an architecture; of unknown ones, the smallest since sm_80."""
    return _SHARED.get(arch, 101376)
