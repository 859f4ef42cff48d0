"""NVRTC without a GPU: options, what is compiled, the resource report, and the errors."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner

from cuplama.backends.cuda.nvrtc import Program, Resources, compile_error, compile_program, parse_resources
from cuplama.backends.cuda.toolkit import ARCHS, options, parse_archs, source_hash, toolkit_folders
from cuplama.cli.kernels import kernels
from cuplama.errors import CompileError, DeviceError
from cuplama.folders import source_folder
from cuplama.lab import inventory as compiler
from cuplama.ops import launch as kernel
from cuplama.ops.prototypes import prototypes


@pytest.fixture(scope="session", autouse=True)
def nvrtc() -> None:
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs cupy for NVRTC")


_TEST_KERNELS = """
#include "common.cuh"
template <typename T, int N> __global__ void plain(const T* x, T* y, int n) {
    __shared__ float tile[N];
    tile[threadIdx.x] = to_float(x[threadIdx.x]);
    __syncthreads();
    y[threadIdx.x] = from_float<T>(tile[N - 1 - threadIdx.x]);
}
template <int N> __global__ void __launch_bounds__(1024, 2) greedy(const float* x, float* y, int n) {
    float a[N];
#pragma unroll
    for (int i = 0; i < N; i++) a[i] = x[i * n + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) y[i * n + threadIdx.x] = a[i] * a[(i + 1) % N] * a[i * 7 % N];
}
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of kernels of our own in the place of cuda_src/."""
    for name in ("common.cuh",):
        (tmp_path / name).write_text((source_folder() / name).read_text())
    (tmp_path / "test.cu").write_text(_TEST_KERNELS)
    monkeypatch.setattr(kernel, "source_folder", lambda: tmp_path)
    return tmp_path


def test_every_kernel_that_is_declared_is_compiled() -> None:
    """The cases and the shapes of real models reach every kernel of every file."""
    needed = compiler.needed(kernel.Device())
    for path in source_folder().glob("*.cu"):
        found = {e.split("<")[0] for e in needed.get(path.name, {})}
        assert found == set(prototypes(path.name)), path.name


def test_bf16_is_not_compiled_below_sm_80() -> None:
    for arch, wanted in ((75, {"f16", "f32"}), (80, {"bf16", "f16", "f32"})):
        dtypes = {
            d for found in compiler.needed(kernel.Device(arch=arch)).values() for n in found.values() for d in n.dtypes
        }
        assert dtypes == wanted


@pytest.mark.parametrize("arch", [75, 120])
def test_small_files_compile_cleanly_from_the_oldest_to_the_newest_arch(arch: int) -> None:
    results = compiler.compile_kernels([arch], ["norm", "residual", "bias", "embedding", "kv_cache"], workers=2)
    assert [r.problem for r in results if r.problem] == []
    assert {r.kernel for r in results} >= {"rms_norm", "layer_norm", "qk_norm", "add", "fill_rows", "kv_append"}
    assert all(r.resources is not None and 0 < r.resources.registers <= 255 for r in results)


@pytest.mark.skipif("CUPLAMA_COMPILE_ALL" not in os.environ, reason="minutes long; set CUPLAMA_COMPILE_ALL=1")
@pytest.mark.parametrize("arch", ARCHS)
def test_all_kernels_compile_cleanly(arch: int) -> None:
    results = compiler.compile_kernels([arch])
    assert [f"{r.expression}: {r.problem}" for r in results if r.problem] == []


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


@pytest.mark.usefixtures("sources")
def test_a_spill_is_a_problem_unless_a_reason_is_given() -> None:
    program = compile_program("test.cu", ["greedy<64>"], 90)
    (result,) = compiler.judge(program, {})
    assert result.problem is not None
    assert result.problem.startswith("spills ")
    assert result.resources is not None
    spilled = result.resources.spills
    (result,) = compiler.judge(program, {"greedy@90": (spilled, "because")})
    assert (result.problem, result.admitted) == (None, "because")
    for less in ({"greedy@90": (spilled - 1, "because")}, {"greedy@80": (spilled, "because")}):
        (result,) = compiler.judge(program, less)
        assert result.problem is not None


def test_a_warning_is_a_problem(sources: Path) -> None:
    path = sources / "test.cu"
    path.write_text(path.read_text().replace("float a[N];", "float a[N]; int unused;"))
    program = compile_program("test.cu", ["greedy<2>"], 90)
    problems = [r.problem for r in compiler.judge(program) if r.problem]
    assert len(problems) == 1
    assert "unused" in str(problems[0])


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
    """A contender is no file of cuda_src/; what it includes from there is."""
    log = f"{tmp_path}/mine.cu(19): error: no such name\n"
    assert str(compile_error(f"{tmp_path}/mine.cu", log)).startswith(f"{tmp_path}/mine.cu:19: no such name")
    log = f"{source_folder()}/common.cuh(7): error: no such name\n"
    assert str(compile_error(f"{tmp_path}/mine.cu", log)).startswith("cuda_src/common.cuh:7: ")
    assert str(compile_error(f"{tmp_path}/mine.cu", "odd")) == f"{tmp_path}/mine.cu: odd"
    assert str(compile_error("norm.cu", "odd")) == "cuda_src/norm.cu: odd"


def test_no_name_is_not_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compile_program", lambda *_: pytest.fail("compiles"))
    assert compiler.compile_kernels([90], []) == []


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


# ---- the commands ----------------------------------------------------------------------------------------------------


def test_list_shows_every_kernel() -> None:
    result = CliRunner().invoke(kernels, ["list"])
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
    assert {"rms_norm", "linear_add", "fill_rows"} <= lines.keys()
    assert "norm.cu" in lines["rms_norm"]
    assert "f32 f16 bf16" in lines["rms_norm"]
    assert "sqrt(mean(x^2) + eps)" in lines["rms_norm"]
    # kernels of several ops: what the head of the file says of them
    assert lines["layer_norm_linear_mma"].endswith("  y[n,m] = act(layer_norm(x) w^T + b)")
    assert lines["fill_rows"].endswith("  y[i,j] = a[i,j] + b[j]")
    assert re.search(r"  f32 +sm_75\+  maximum of each chunk of 2048 logits", lines["sample_max"])
    assert re.search(r"  f32 f16 +sm_75\+  ", lines["attention_prefill"])  # where there are no tensor cores for it
    assert re.search(r"  f16 bf16 +sm_80\+  ", lines["attention_prefill_mma"])
    assert re.search(r"  f16 bf16 +sm_90  ", lines["attention_prefill_wgmma"])
    assert re.search(r"  - +sm_75\+  ", lines["advance"])  # integers only


def test_compile_prints_what_a_kernel_uses() -> None:
    result = CliRunner().invoke(kernels, ["compile", "--arch", "sm_80,sm_90", "add", "-v"])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[:3] for row in rows[1:3]] == [["add", "residual.cu", "sm_80"], ["add", "residual.cu", "sm_90"]]
    assert all(int(row[3]) > 0 for row in rows[1:3])
    assert "2 kernel instances for sm_80, sm_90" in result.stdout
    result = CliRunner().invoke(kernels, ["compile", "--arch", "sm_80", "add"])
    assert "1 kernel instance for sm_80 in" in result.stdout


def test_compile_fails_on_a_problem_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = Program("residual.cu", 90, b"", {"add": "add"}, {"add": Resources(255, 0, 8, 8)}, (), 0.1)
    monkeypatch.setattr(compiler, "compile_program", lambda file, names, arch: spilling)
    result = CliRunner().invoke(kernels, ["compile", "--arch", "sm_90", "add"])
    assert result.exit_code == 1
    assert "residual.cu sm_90: add: spills 8 bytes of registers" in result.output


def test_compile_refuses_an_unknown_name() -> None:
    result = CliRunner().invoke(kernels, ["compile", "--arch", "sm_90", "adder"])
    assert isinstance(result.exception, DeviceError)
    assert "'adder'; known: " in str(result.exception)
    assert "rms_norm" in str(result.exception)
