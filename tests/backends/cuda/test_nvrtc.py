"""NVRTC without a GPU: options, the resource report, and the errors."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cuplama.backends.cuda import nvrtc, toolkit
from cuplama.backends.cuda.nvrtc import Resources, compile_error, compile_options, compile_program, parse_resources
from cuplama.backends.cuda.toolkit import ARCHS, options, parse_archs, source_hash, toolkit_folders
from cuplama.errors import CompileError, DeviceError
from cuplama.folders import source_folder

# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toolkit whose headers are in two folders."""
    monkeypatch.setattr(toolkit, "toolkit_folders", lambda major: (Path(f"/cuda{major}"), Path("/cccl")))


@pytest.mark.usefixtures("headers")
def test_the_options_of_the_backend() -> None:
    """CuPy appends -arch=sm_90, which knows no wgmma; ours stands before it, and NVRTC takes the first."""
    shared = ("-std=c++17", f"-I{source_folder()}", "-I/cuda12", "-I/cccl", f"-DCUPLAMA_SOURCE_HASH={source_hash()}")
    assert options(12, 90) == (*shared, "-arch=sm_90a")
    for arch in {*ARCHS, 0} - {90}:
        assert options(12, arch) == shared


@pytest.mark.usefixtures("headers")
@pytest.mark.parametrize(("arch", "target"), [(75, "sm_75"), (80, "sm_80"), (90, "sm_90a"), (120, "sm_120")])
def test_without_a_gpu_a_source_is_compiled_as_cupy_compiles_it(
    arch: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    report = (
        "Function properties for mangled\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers\n"
    )
    library = SimpleNamespace(
        NVRTCError=RuntimeError,
        getVersion=lambda: (12, 9),
        createProgram=lambda text, name, *_: given.append((text, name)),
        addNameExpression=lambda program, name: given.append(name),
        compileProgram=lambda program, flags: given.append(flags),
        getProgramLog=lambda program: report,
        getLoweredName=lambda program, name: "mangled",
        getCUBIN=lambda program: b"cubin",
        destroyProgram=lambda program: given.append("destroyed"),
    )
    monkeypatch.setattr(nvrtc, "nvrtc_library", lambda: library)
    program = compile_program("residual.cu", ["add"], arch)
    (text, file), name, flags, end = given
    assert text == toolkit.source("residual.cu")
    assert (file, name, end) == ("residual.cu", "add", "destroyed")
    assert flags == compile_options(12, arch)
    assert flags[: len(options(12))] == options(12)
    assert flags[len(options(12)) :] == (
        "-ftz=true", "--device-as-default-execution-space", f"-arch={target}", "--ptxas-options=-v"
    )  # fmt: skip
    assert (program.cubin, program.names, program.resources["add"].registers) == (b"cubin", {"add": "mangled"}, 8)


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


def test_the_hash_covers_headers(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text("a")
    (tmp_path / "b.cuh").write_text("b")
    first = source_hash(tmp_path)
    source_hash.cache_clear()
    (tmp_path / "b.cuh").write_text("c")
    assert source_hash(tmp_path) != first


def test_headers_of_another_cuda_version_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    include = tmp_path / "include"
    include.mkdir()
    (include / "cuda_fp16.h").write_text("")
    (include / "cuda_runtime_api.h").write_text("#define CUDART_VERSION  12090\n")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    toolkit_folders.cache_clear()
    assert toolkit_folders(12) == (include,)
    assert include not in toolkit_folders(13)
    with pytest.raises(CompileError, match=r"CUDA 11 headers .* are not installed; pip install"):
        options(11)
    toolkit_folders.cache_clear()


@pytest.mark.parametrize(
    ("text", "archs"), [("sm_80,sm_90", (80, 90)), ("80, 120", (80, 120)), ("all", ARCHS), ("90,sm_90", (90,))]
)
def test_archs_are_read(text: str, archs: tuple[int, ...]) -> None:
    assert parse_archs(text) == archs


@pytest.mark.parametrize("text", ["sm_70", "ninety", "", "sm_9000"])
def test_an_unknown_arch_is_refused_by_name(text: str) -> None:
    with pytest.raises(DeviceError, match=text or "no architecture"):
        parse_archs(text, (70, 80, 90))


def test_resources_of_a_report() -> None:
    log = (
        "ptxas info    : Compiling entry function '_Z1f' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1f\n"
        "ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 36 registers, used 1 barriers, 8 bytes cumulative stack size, 512 bytes smem\n"
    )
    assert parse_resources(log) == {"_Z1f": Resources(36, 512, 8, 28)}
