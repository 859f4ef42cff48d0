"""NVRTC without a GPU: a source compiled to machine code for any architecture, and what the code uses.

Options are those with which CuPy compiles the same source on a GPU. Registers, shared memory, stack and spills are read
from the report of ptxas.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CompileError, DeviceError
from ...folders import source_folder
from .toolkit import options, source, target

__all__ = [
    "Program",
    "Resources",
    "compile_error",
    "compile_options",
    "compile_program",
    "compile_ptx",
    "nvrtc_library",
    "parse_resources",
]

_CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")  # CuPy adds these by itself


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
    """One source file compiled for one architecture.

    names: C++ name -> name in the cubin; resources: by C++ name; warnings: the log's; seconds: that compiling took.
    """

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
    """A source as messages name it: ours by its folder's name; one from elsewhere, such as a candidate's, by its path.

    The compiler names headers of ours with their folder.
    """
    if path.is_relative_to(source_folder()):
        path = path.relative_to(source_folder())
    return str(path) if path.is_absolute() else f"cuda_src/{path}"


def compile_options(major: int, arch: int, file: str = "") -> tuple[str, ...]:
    """The options for machine code of that architecture, as CuPy gives them on a GPU, and for a report of ptxas.

    major: of the NVRTC version; file: what is compiled. Raises CompileError if the toolkit's headers are not installed.
    """
    return (*options(major, file=file), *_CUPY_OPTIONS, f"-arch=sm_{target(arch)}", "--ptxas-options=-v")


def compile_program(file: str, names: Sequence[str], arch: int) -> Program:
    """Compile instances of a file's kernels with NVRTC. Needs no GPU. Raises CompileError."""
    nvrtc = nvrtc_library()
    began = time.perf_counter()
    with _compiled(file, names, arch, compile_options(nvrtc.getVersion()[0], arch, file)) as program:
        log = nvrtc.getProgramLog(program)
        mangled = {name: nvrtc.getLoweredName(program, name) for name in names}
        cubin = nvrtc.getCUBIN(program) + b"\0"  # CuPy takes the last byte, which is 0, for the end of a string
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


def compile_ptx(file: str, names: Sequence[str], arch: int) -> str:
    """The PTX of instances of a file's kernels. Needs no GPU. Raises CompileError."""
    nvrtc = nvrtc_library()
    flags = (*options(nvrtc.getVersion()[0], file=file), "-ftz=true", f"-arch=compute_{target(arch)}")
    with _compiled(file, names, arch, flags) as program:
        text: str = nvrtc.getPTX(program).decode().rstrip("\0")
    return text


@contextmanager
def _compiled(file: str, names: Sequence[str], arch: int, flags: Sequence[str]) -> Iterator[Any]:
    """NVRTC's program of a file, compiled with these flags; it is destroyed at the end. Raises CompileError."""
    nvrtc = nvrtc_library()
    program = nvrtc.createProgram(source(file), file, (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError:
            raise compile_error(file, nvrtc.getProgramLog(program), arch) from None
        yield program
    finally:
        nvrtc.destroyProgram(program)


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
