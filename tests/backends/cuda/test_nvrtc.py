"""NVRTC without a GPU: options, the resource report, and the errors."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cuplama.backends.cuda import nvrtc, toolkit
from cuplama.backends.cuda.nvrtc import (
    Resources,
    compile_error,
    compile_options,
    compile_program,
    compile_ptx,
    nvrtc_library,
    parse_resources,
)
from cuplama.backends.cuda.toolkit import options
from cuplama.errors import CompileError, DeviceError
from cuplama.folders import source_folder

# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toolkit whose headers are in two folders."""
    monkeypatch.setattr(toolkit, "toolkit_folders", lambda major: (Path(f"/cuda{major}"), Path("/cccl")))


class _Nvrtc:
    """CuPy's binding of NVRTC, with one kernel in every program. done: what was asked of it, in order."""

    NVRTCError = RuntimeError
    report = (
        "Function properties for mangled\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers\n"
    )

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.done = fails, list[Any]()

    def getVersion(self) -> tuple[int, int]:  # noqa: N802
        return 12, 9

    def createProgram(self, text: str, name: str, *_: Any) -> str:  # noqa: N802
        self.done.append((text, name))
        return "program"

    def addNameExpression(self, program: str, name: str) -> None:  # noqa: N802
        self.done.append(name)

    def compileProgram(self, program: str, flags: tuple[str, ...]) -> None:  # noqa: N802
        self.done.append(flags)
        if self.fails:
            raise RuntimeError

    def getProgramLog(self, program: str) -> str:  # noqa: N802
        return "residual.cu(3): error: no such name" if self.fails else self.report

    def getLoweredName(self, program: str, name: str) -> str:  # noqa: N802
        return {("program", "add"): "mangled"}[program, name]

    def getCUBIN(self, program: str) -> bytes:  # noqa: N802
        return b"cubin"

    def getPTX(self, program: str) -> bytes:  # noqa: N802
        return b"// PTX\n\0"

    def destroyProgram(self, program: str) -> None:  # noqa: N802
        self.done.append("destroyed")


@pytest.fixture
def library(headers: None, monkeypatch: pytest.MonkeyPatch) -> _Nvrtc:
    made = _Nvrtc()
    monkeypatch.setattr(nvrtc, "nvrtc_library", lambda: made)
    return made


@pytest.mark.parametrize(("arch", "target"), [(75, "sm_75"), (80, "sm_80"), (90, "sm_90a"), (120, "sm_120")])
def test_without_a_gpu_a_source_is_compiled_as_cupy_compiles_it(library: _Nvrtc, arch: int, target: str) -> None:
    program = compile_program("residual.cu", ["add"], arch)
    (text, file), name, flags, end = library.done
    assert text == toolkit.source("residual.cu")
    assert (file, name, end) == ("residual.cu", "add", "destroyed")
    assert flags == compile_options(12, arch)
    assert flags[: len(options(12))] == options(12)
    assert flags[len(options(12)) :] == (
        "-ftz=true", "--device-as-default-execution-space", f"-arch={target}", "--ptxas-options=-v"
    )  # fmt: skip
    assert (program.file, program.arch, program.cubin) == ("residual.cu", arch, b"cubin\0")
    assert (program.names, program.resources["add"].registers) == ({"add": "mangled"}, 8)
    assert 0 <= program.seconds < 60


@pytest.mark.parametrize(("arch", "target"), [(80, "compute_80"), (90, "compute_90a")])
def test_ptx_is_compiled_from_the_same_source_with_the_same_options(library: _Nvrtc, arch: int, target: str) -> None:
    assert compile_ptx("residual.cu", ["add"], arch) == "// PTX\n"
    source, name, flags, end = library.done
    assert source == (toolkit.source("residual.cu"), "residual.cu")
    assert flags == (*options(12), "-ftz=true", f"-arch={target}")
    assert (name, end) == ("add", "destroyed")


@pytest.mark.parametrize("compiler", [compile_program, compile_ptx])
def test_a_program_that_does_not_compile_is_destroyed(library: _Nvrtc, compiler: Callable[..., Any]) -> None:
    library.fails = True
    with pytest.raises(CompileError, match=r"^cuda_src/residual.cu:3: no such name .* for sm_80\)"):
        compiler("residual.cu", ["add"], 80)
    assert library.done[-1] == "destroyed"


def test_the_library_is_cupys_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    working = _Nvrtc()
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", SimpleNamespace(nvrtc=working))
    assert nvrtc_library() is working


def test_a_library_that_cannot_be_loaded_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(_Nvrtc):
        def getVersion(self) -> tuple[int, int]:  # noqa: N802
            raise OSError("libnvrtc.so.12: cannot open shared object file")

    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", SimpleNamespace(nvrtc=Missing()))
    with pytest.raises(DeviceError, match=r"NVRTC is not available \(libnvrtc.so.12: .*\); pip install cupy-cuda12x"):
        nvrtc_library()


# ---- reports, errors, headers ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("sources")
def test_the_report_agrees_with_the_machine_code() -> None:
    """Registers as the ELF's own .nv.info section states them, shared memory as its .nv.shared section is long."""
    names = ["plain<f32, 64>", "plain<f16, 128>", "greedy<64>"]
    program = compile_program("test.cu", names, 90)
    used = program.resources
    assert used["plain<f32, 64>"].shared == 256
    assert used["plain<f16, 128>"].shared == 512
    assert used["greedy<64>"].spills > 0
    assert used["plain<f32, 64>"].spills == used["plain<f32, 64>"].stack == 0
    registers, shared = _elf(program.cubin)
    table, size, count = struct.unpack_from("<Q", program.cubin, 32)[0], *struct.unpack_from("<2H", program.cubin, 54)
    assert table + size * count <= len(program.cubin)  # nvdisasm refuses a file that ends within the program headers
    for name in names:
        assert registers[program.names[name]] == used[name].registers
        assert shared.get(program.names[name], 0) in (used[name].shared, used[name].shared + 1024)  # reserved by sm_90


def _elf(cubin: bytes) -> tuple[dict[str, int], dict[str, int]]:
    """(kernel -> registers, kernel -> bytes of static shared memory) of a 64-bit ELF.

    ``.nv.info`` is a list of (format, attribute, size, value); EIATTR_REGCOUNT is 0x2f: symbol index, count.
    """
    at, size, count, names = struct.unpack_from("<Q", cubin, 40)[0], *struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, at + i * size) for i in range(count)]

    def text(table: int, offset: int) -> str:
        start = headers[table][4] + offset
        return cubin[start : cubin.index(b"\0", start)].decode()

    sections = {text(names, h[0]): h for h in headers}
    symbols = sections[".symtab"]
    registers, shared = {}, {}
    for name, h in sections.items():
        if name.startswith(".nv.shared."):
            shared[name.removeprefix(".nv.shared.")] = h[5]
    at, end = sections[".nv.info"][4], sections[".nv.info"][4] + sections[".nv.info"][5]
    while at < end:
        kind, attribute, length = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if kind == 4:  # EIFMT_SVAL: a value of `length` bytes follows
            if attribute == 0x2F:
                index, used = struct.unpack_from("<II", cubin, at)
                registers[text(symbols[6], struct.unpack_from("<I", cubin, symbols[4] + 24 * index)[0])] = used
            at += length
    return registers, shared


@pytest.mark.parametrize(
    ("file", "old", "new", "where"),
    [
        ("test.cu", "tile[threadIdx.x] =", "tile[theadIdx.x] =", r"cuda_src/test.cu:5: identifier \"theadIdx\""),
        ("common.cuh", "#include <cuda_fp16.h>", "#include <cuda_fp17.h>", r"cuda_src/common.cuh:\d+: .*cuda_fp17.h"),
    ],
)
def test_an_error_names_file_line_and_the_first_complaint(
    sources: Path, file: str, old: str, new: str, where: str
) -> None:
    path = sources / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CompileError, match=where):
        compile_program("test.cu", ["plain<f32, 64>"], 90)


def test_an_error_in_a_file_from_elsewhere_names_that_file(tmp_path: Path) -> None:
    """A candidate is no file of cuda_src/; what it includes from there is."""
    log = f"{tmp_path}/mine.cu(19): error: no such name\n"
    assert str(compile_error(f"{tmp_path}/mine.cu", log)).startswith(f"{tmp_path}/mine.cu:19: no such name")
    log = f"{source_folder()}/common.cuh(7): error: no such name\n"
    assert str(compile_error(f"{tmp_path}/mine.cu", log)).startswith("cuda_src/common.cuh:7: ")
    assert str(compile_error(f"{tmp_path}/mine.cu", "odd")) == f"{tmp_path}/mine.cu: odd"
    assert str(compile_error("norm.cu", "odd")) == "cuda_src/norm.cu: odd"
    assert str(compile_error("ladder/x.cu", "odd")) == "cuda_src/ladder/x.cu: odd"
    log = f"{source_folder()}/ladder/ladder.cuh(7): error: no such name\n"
    assert str(compile_error("ladder/x.cu", log)).startswith("cuda_src/ladder/ladder.cuh:7: ")


def test_resources_of_a_report() -> None:
    log = (
        "ptxas info    : Compiling entry function '_Z1f' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1f\n"
        "ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 36 registers, used 1 barriers, 8 bytes cumulative stack size, 512 bytes smem\n"
    )
    assert parse_resources(log) == {"_Z1f": Resources(36, 512, 8, 28)}


def test_a_kernel_without_shared_memory_has_none() -> None:
    log = (
        "ptxas info    : Function properties for _Z1f\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 36 registers, 380 bytes cmem[0]\n"
    )
    assert parse_resources(log) == {"_Z1f": Resources(36, 0, 0, 0)}


@pytest.mark.parametrize(
    ("log", "first"),
    [
        ("nvrtc: note\nnvrtc: an ERROR happened\nmore", "nvrtc: an ERROR happened"),
        ("\n  only this \0\n", "only this"),
        ("\0", "no message"),
    ],
)
def test_a_log_without_a_line_number_is_told_by_its_first_complaint(log: str, first: str) -> None:
    assert str(compile_error("norm.cu", log, 80)) == f"cuda_src/norm.cu: {first} for sm_80"
