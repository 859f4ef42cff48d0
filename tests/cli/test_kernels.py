"""``cuplama kernels`` on a machine without a GPU: what is shown, checked, compiled and refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cuplama.backends.cuda.nvrtc import Program, Resources
from cuplama.backends.cuda.toolkit import toolkit_folders
from cuplama.cli.kernels import list as list_module
from cuplama.cli.kernels.names import find_ops
from cuplama.cli.kernels.options import parse_shape
from cuplama.cli.kernels.watch import stamps, watch
from cuplama.errors import CuplamaError, DeviceError, ParameterError
from cuplama.folders import source_folder
from cuplama.lab import inventory
from cuplama.lab.emulation import Emulator, emulator_missing
from cuplama.lab.workloads import Workload
from cuplama.ops import OPS
from tests.lab.common import candidate, invoke, needs_matplotlib
from tests.paths import ROOT


def has_cupy() -> bool:
    try:
        import cupy_backends  # noqa: F401
    except ImportError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(
    not (shutil.which("g++") and toolkit_folders(12) and has_cupy()),
    reason="needs g++, the CUDA 12 headers, and cupy, which brings the binding of NVRTC",
)


@pytest.fixture(autouse=True)
def _no_gpu(walked_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.backends.cuda.driver.cuda_available", lambda device=0: (False, "no GPU in this test"))


@pytest.fixture
def archs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The architectures that NVRTC knows, where it need not be: what is refused comes to no compilation."""
    nvrtc = SimpleNamespace(getSupportedArchs=lambda: [75, 80, 90, 100])
    monkeypatch.setattr("cuplama.backends.cuda.nvrtc.nvrtc_library", lambda: nvrtc)


@pytest.mark.usefixtures("archs")
def test_memory_that_is_short_is_no_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(self: Workload, seed: int = 0) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(Workload, "arrays", short)
    monkeypatch.setattr(Emulator, "prepare", lambda self, cases: None)
    done = invoke("bench", "add", "--shape", "n=2,d=8")
    assert isinstance(done.exception, ParameterError)
    assert "the shape is too large for the memory here: Unable to allocate 9 TiB" in str(done.exception)


@needs_nvrtc
def test_show() -> None:
    done = invoke("show", "rms_norm", "--shape", "n=2,d=4096", "--arch", "sm_80,sm_90", "--ptx")
    assert done.exit_code == 0, done.output
    assert "y[n,d]:T = (x[n,d]:f32, w[d]:T, eps:f32, offset:f32=0)" in done.stderr
    assert "rms_norm<bf16, 1>: grid (2, 1, 1), block (512, 1, 1)" in done.stderr
    head = (source_folder() / "norm.cu").read_text(encoding="utf-8").splitlines()[0]
    assert head.removeprefix("// ") in done.stderr
    assert re.search(r"^rms_norm<bf16, 1>  sm_80 +\d+ +\d+ +0 +0$", done.stderr, re.M)
    lines = done.stdout.strip().splitlines()  # PTX and nothing else: an assembler can read it
    assert (lines[0], lines[-1]) == ("//", "}")
    assert ".target sm_80" in lines
    shown = invoke("show", "residual")
    assert "select_rows: y = x[rows]" in shown.stdout
    assert "bf16 n=512" in shown.stdout
    product = invoke("show", "linear_add").stdout  # a library's for many rows; ours in groups of 8
    assert "n=512 k=4096 m=4096\n    cuBLAS; without it:\n    64 x linear_add_mma<bf16" in product
    assert "n=1 k=4096 m=4096\n    linear_add<bf16" in product
    hopper = invoke("show", "rms_norm", "--shape", "n=2,d=64", "--ptx").stdout
    assert ".target sm_90a" in hopper  # as what is run is compiled
    reading = invoke("show", "read_sum")
    assert "Does nothing but read" in reading.stdout
    assert re.search(r"^read_sum  sm_90 +\d+", reading.stdout, re.M)


@needs_nvrtc
def test_sass_needs_a_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    assert "no SASS: neither nvdisasm nor cuobjdump" in invoke("show", "add", "--sass").stdout
    (tmp_path / "nvdisasm").write_text(
        '#!/bin/sh\n/bin/echo "code of $1 $(/usr/bin/head -c 4 "$2" | /usr/bin/tail -c 3)"\n'
    )
    (tmp_path / "nvdisasm").chmod(0o755)
    assert "code of -c ELF" in invoke("show", "add", "--sass").stdout


@needs_nvrtc
def test_bench_without_a_gpu_checks_and_compiles() -> None:
    done = invoke("bench", "add", "select_rows", "--dtype", "f32", "--arch", "sm_75")
    assert done.exit_code == 0, done.output
    assert re.search(r"^add +f32 +4 +right$", done.stdout, re.M)
    assert "3 kernel instances compile for sm_75" in done.stdout  # select_rows for f16, too
    assert "nothing is timed: no GPU in this test" in done.stdout


@needs_nvrtc
def test_without_a_gpu_programs_can_read_what_was_checked(tmp_path: Path) -> None:
    done = invoke("bench", "add", "--shape", "n=2,d=8", "--dtype", "f32", "-o", "json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["rows"] == [{"op": "add", "dtype": "f32", "cases": 1, "emulator": "right"}]
    assert found["command"].startswith("cuplama")
    assert re.search(r"^add: 1 case$", done.stderr, re.M)
    assert re.search(r"^1 kernel instance compiles for sm_90\nnothing is timed: no GPU", done.stderr, re.M)
    args = ["--op", "add", "--dtype", "f32", "--shape", "n=2,d=8"]
    done = invoke("compare", str(candidate(tmp_path)), *args, "-o", "csv")
    assert done.exit_code == 0, done.output
    assert done.stdout == "op,dtype,cases,emulator\nadd,f32,1,right\n"
    assert "mine.cu: compiles, and is right on 1 case; not timed: no GPU" in done.stderr


@pytest.mark.usefixtures("archs")
def test_an_op_that_a_model_lacks_is_refused() -> None:
    done = invoke("bench", "layer_norm", "add", "-m", "gpt2")
    assert isinstance(done.exception, ParameterError)
    assert re.match(r"gpt2 does not use add; it uses: advance, .*layer_norm, ", str(done.exception))


def test_watch_refuses_a_shape_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.cli.kernels.watch.watch", lambda look, again: pytest.fail("watches"))
    for args, message in (
        (["rms_norm", "--shape", "n=-1"], "rms_norm: n is -1"),
        (["norm", "--shape", "n=1"], "--shape needs the NAME of one op"),
    ):
        done = invoke("watch", *args)
        assert isinstance(done.exception, ParameterError)
        assert message in str(done.exception)


def test_help_is_not_cut() -> None:
    text = invoke("--help").stdout
    assert "watch" in text
    assert "..." not in text.split("Commands:")[1]


@pytest.mark.parametrize("command", ["list", "compile", "show", "bench", "compare", "watch"])
def test_every_command_has_debug(command: str) -> None:
    assert "--debug" in invoke(command, "--help").stdout


@needs_nvrtc
def test_what_cannot_be_emulated_is_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuplama.simt import emulator

    monkeypatch.setattr(emulator, "NOT_EMULATED", frozenset({"aligned"}))
    done = invoke("bench", "add", "--dtype", "f32")
    assert done.exit_code == 0, done.output
    assert "not run: add: its kernels use instructions that are not emulated" in done.stdout


@needs_nvrtc
def test_a_wrong_kernel_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    op = replace(OPS["add"], reference=lambda a, b: a - b)
    assert isinstance(OPS, dict)
    monkeypatch.setitem(OPS, "add", op)
    done = invoke("bench", "add", "--shape", "n=2,d=8", "--dtype", "f32")
    assert done.exit_code == 1
    assert re.search(r"refused: add f32 n=2 d=8: \d+ of 16 elements of y are wrong, the first at \[0, 0\]", done.stderr)
    assert "compile" not in done.stdout


@needs_nvrtc
def test_compare_without_a_gpu_checks(tmp_path: Path) -> None:
    right = invoke("compare", str(candidate(tmp_path)), "--op", "add", "--dtype", "f32")
    assert right.exit_code == 0, right.output
    assert "compiles, and is right on 4 cases; not timed: no GPU in this test" in right.stdout
    wrong = invoke("compare", str(candidate(tmp_path, "+= other", "-= other")), "--op", "add", "--dtype", "f32")
    assert wrong.exit_code == 1
    assert "refused: add of mine.cu f32 n=1 d=64" in wrong.stderr
    broken = invoke("compare", str(candidate(tmp_path, "+= other", "+= another")), "--op", "add", "--dtype", "f32")
    assert broken.exit_code == 1
    assert re.search(rf"refused: {re.escape(str(tmp_path))}/mine\.cu:\d+: .*another", broken.stderr)
    fault = invoke(
        "compare", str(candidate(tmp_path, "+= other.v[j]", "+= b[i + j + 4096]")), "--op", "add", "--dtype", "f32"
    )
    assert fault.exit_code == 1
    assert f"{tmp_path}/mine.cu:" in fault.stderr


@pytest.mark.usefixtures("archs")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench", "nonsense"], "no op, kernel or file is named 'nonsense'"),
        (["bench", "add", "rope", "--shape", "n=1"], "--shape needs the NAME of one op"),
        (["bench", "norm", "--shape", "n=1"], "--shape needs the NAME of one op"),
        (["bench", "add", "--shape", "n"], "name=value pairs"),
        (["bench", "add", "--shape", "n=x"], "'x' is neither a number"),
        (["bench", "rms_norm", "--shape", "n=1,d=100000"], "rms_norm: d is 100000; the kernel takes at most"),
        (["bench", "rms_norm", "--shape", "n=0,d=64"], "n is 0, not a whole number"),
        (["show", "attention", "--shape", "num_heads=3,H=2"], "attention needs num_heads % H == 0"),
        (["show", "attention", "--shape", "D=7"], "attention: D = 7 is neither a multiple of 8"),
        (["bench", "--model", "llama-9"], "known shapes"),
        (["show", "nonsense"], "known: "),
        (["compare", "x.cu", "--op", "norm"], "no op is named 'norm'"),
    ],
)
def test_refusals(args: list[str], message: str) -> None:
    done = invoke(*args)
    assert isinstance(done.exception, CuplamaError)
    assert message in f"{done.output} {done.exception}"


@needs_matplotlib
@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("x.png", "nothing can be timed: no GPU in this test"),
        ("absent/x.png", "cannot write absent/x.png: there is no folder absent"),
        ("x.xyz", "cannot write x.xyz: the name must end in one of"),
    ],
)
def test_refusals_of_pictures(picture: str, message: str) -> None:
    done = invoke("bench", "add", "--plot", picture)
    assert isinstance(done.exception, CuplamaError)
    assert message in str(done.exception)


def test_values_of_a_shape() -> None:
    wanted = {"n": 1, "eps": 1e-6, "b": True, "U": "f32", "scale": 0.5}
    assert parse_shape("n=1, eps=1e-6,b=true,U=f32,scale=.5") == wanted


def test_names_find_ops() -> None:
    in_residual = ["add", "cast", "cast_backward", "place_rows", "scale", "select_rows", "slice_rows"]
    in_residual.insert(4, "rms_norm_add_linear")  # which launches a cast where its weight is packed
    assert sorted(op.name for op in find_ops("residual")) == in_residual
    assert sorted(op.name for op in find_ops("residual.cu")) == in_residual
    assert [op.name for op in find_ops("sample_draw")] == ["sample"]


def test_watch_runs_at_once_and_after_every_change(tmp_path: Path) -> None:
    file = tmp_path / "a.cu"
    file.write_text("1")
    looks, runs = 0, []

    def look() -> dict[str, int]:
        nonlocal looks
        looks += 1
        if looks == 3:
            file.write_text("2")
            import os

            os.utime(file, ns=(1, 1))
        if looks == 5:
            (tmp_path / "b.cuh").write_text("new")
        if looks == 7:
            raise KeyboardInterrupt
        return stamps([tmp_path])

    watch(look, lambda: runs.append(looks), pause=0)
    assert runs == [1, 3, 5]


@pytest.mark.usefixtures("archs")
def test_without_a_compiler_nothing_is_called_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """bench, compare and watch say that kernels cannot be checked here, and exit with 1."""
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **_: None if name == "g++" else real(name))
    assert "g++" in emulator_missing()
    monkeypatch.setattr("cuplama.lab.inventory.compile_kernels", lambda *_, **__: [])
    monkeypatch.setattr("cuplama.backends.cuda.nvrtc.compile_program", lambda *_: None)
    for args in (["bench", "add"], ["compare", str(candidate(tmp_path)), "--op", "add"], ["watch", "add"]):
        done = invoke(*args)
        assert done.exit_code == 1, done.output
        assert "needs the C++ compiler g++" in done.output
        assert "right" not in done.output


def test_list_shows_every_kernel() -> None:
    result = invoke("list")
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
    assert {"rms_norm", "linear_add", "fill_rows"} <= lines.keys()
    assert "norm.cu" in lines["rms_norm"]
    assert "f32 f16 bf16" in lines["rms_norm"]
    assert "sqrt(mean(x^2) + eps)" in lines["rms_norm"]
    assert re.search(r"embedding +f32 f16 bf16 +sm_75\+ +x = table\[input_ids\] of a plain table$", lines["embedding"])
    # one of an op's several kernels: what the op says of it
    assert "  y = act(layer_norm(x) w^T + b) for two to eight rows of x" in lines["layer_norm_linear_mma"]
    # a kernel of no op's own: what the head of its file says
    assert lines["fill_rows"].endswith("  y[i,j] = a[i,j] + b[j]")
    assert re.search(r"  f32 +sm_75\+ +The maximum of each chunk of the logits", lines["sample_max"])
    assert re.search(r"  f32 f16 bf16 +sm_75\+  ", lines["attention_prefill_fma"])  # bf16: heads of more than 256
    assert re.search(r"  f16 bf16 +sm_80\+  ", lines["attention_prefill_mma"])
    assert re.search(r"  f16 bf16 +sm_90 +", lines["attention_prefill_wgmma"])
    assert re.search(r"  - +sm_75\+  ", lines["advance"])  # integers only
    for line in lines.values():  # a formula, or a sentence
        text = re.split(r"  +", line)[-1]
        assert re.match(r"[a-z_]+(\[.*?\])? \+?= ", text) or re.fullmatch(r"[A-Z].*[^.]\.", text), text


def test_list_wraps_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_module, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setenv("COLUMNS", "80")
    lines = invoke("list").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    at = lines.index("  attention_prefill_fma")
    assert lines[at - 1] == "attention_prefill_fma.cu"
    assert lines[at + 1 : at + 4] == [
        "    Attention of many new tokens by multiply-adds: float32, before sm_80, heads",
        "      > 256.",
        "    ops attention self_attention; f32 f16 bf16; sm_75+",
    ]
    at = lines.index("  fill_rows")
    assert lines[at + 2 : at + 4] == [
        "    ops gelu_tanh_mul_linear_add linear linear_add rms_norm_linear",
        "      silu_mul_linear_add; f32 f16 bf16; sm_75+",
    ]


OUTSIDE = str(ROOT / "examples" / "own_op" / "hard_tanh.py")


def test_list_of_names() -> None:
    lines = invoke("list", "loss").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["kernel", "cross_entropy", "softmax_mixture", "add_sum"]
    (_, line) = invoke("list", OUTSIDE).stdout.splitlines()
    assert re.fullmatch(
        rf"hard_tanh +{OUTSIDE[:-3]}\.cu +hard_tanh +f32 +sm_75\+ +y = min\(max\(x, -cap\), cap\)", line
    )
    lines = invoke("list", OUTSIDE, "add").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["kernel", "add", "hard_tanh"]


@needs_nvrtc
def test_commands_take_an_op_of_a_users_own_file() -> None:
    done = invoke("bench", OUTSIDE, "--dtype", "f32")
    assert done.exit_code == 0, done.output
    assert re.search(r"^hard_tanh +f32 +2 +right$", done.stdout, re.M)
    assert "1 kernel instance compiles for sm_90" in done.stdout
    shaped = invoke("bench", f"{OUTSIDE}:hard_tanh", "--shape", "n=2,d=9", "--dtype", "f32", "-o", "json")
    assert json.loads(shaped.stdout)["rows"] == [{"op": "hard_tanh", "dtype": "f32", "cases": 1, "emulator": "right"}]
    shown = invoke("show", OUTSIDE)
    assert f"{OUTSIDE[:-3]}.cu:\n  hard_tanh    y[n,d] = min(max(" in shown.stdout
    compiled = invoke("compile", OUTSIDE, "add", "--arch", "sm_80").stdout
    assert "2 kernel instances for sm_80" in compiled
    compared = invoke("compare", f"{OUTSIDE[:-3]}.cu", "--op", OUTSIDE)
    assert "hard_tanh.cu: compiles, and is right on 2 cases; not timed" in compared.stdout


@pytest.mark.parametrize("command", ["bench", "show", "watch", "compile", "list"])
@pytest.mark.usefixtures("archs")
def test_a_file_without_ops_is_refused(command: str, tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    done = invoke(command, str(tmp_path / "empty.py"))
    assert isinstance(done.exception, ParameterError)
    assert "empty.py declares no op" in str(done.exception)


def test_watch_looks_into_the_folder_of_a_users_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    if emulator_missing():
        pytest.skip("the emulator needs g++")
    seen: list[str] = []
    ran: list[list[str]] = []

    def once(look: Callable[[], dict[str, int]], again: Callable[[], object]) -> None:
        seen.extend(look())
        again()

    monkeypatch.setattr("cuplama.cli.kernels.watch.watch", once)
    monkeypatch.setattr("cuplama.cli.kernels.watch.subprocess.run", lambda command, **_: ran.append(command))
    assert invoke("watch", OUTSIDE).exit_code == 0
    assert {OUTSIDE, f"{OUTSIDE[:-3]}.cu", str(source_folder() / "norm.cu")} <= set(seen)
    assert ran[0][-5:] == ["kernels", "bench", OUTSIDE, "--dtype", "bf16"]


def test_bench_without_a_compiler_for_gpus_still_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    if emulator_missing():
        pytest.skip("the emulator needs g++")

    def missing() -> None:
        raise DeviceError("NVRTC is not available (no such module); pip install ...")

    monkeypatch.setattr("cuplama.backends.cuda.nvrtc.nvrtc_library", missing)
    done = invoke("bench", "add", "--shape", "n=2,d=8", "--dtype", "f32")
    assert done.exit_code == 0, done.output
    assert re.search(r"^add +f32 +1 +right$", done.stdout, re.M)
    assert "nothing is compiled: NVRTC is not available" in done.stdout
    assert "nothing is timed: no GPU in this test" in done.stdout


@needs_nvrtc
def test_compile_prints_what_a_kernel_uses() -> None:
    result = invoke("compile", "--arch", "sm_80,sm_90", "add", "-v")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[:3] for row in rows[1:3]] == [["add", "residual.cu", "sm_80"], ["add", "residual.cu", "sm_90"]]
    assert all(int(row[3]) > 0 for row in rows[1:3])
    assert "2 kernel instances for sm_80, sm_90" in result.stdout
    assert re.search(r"^1/2: residual.cu for sm_\d0: \d+\.\d s \(about \d+ s left\)$", result.stderr, re.M)
    assert re.search(r"^2/2: residual.cu for sm_\d0: \d+\.\d s$", result.stderr, re.M)
    result = invoke("compile", "--arch", "sm_80", "add")
    assert "1 kernel instance for sm_80 in" in result.stdout


@needs_nvrtc
def test_compile_fails_on_a_problem_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = Program("residual.cu", 90, b"", {"add": "add"}, {"add": Resources(255, 0, 8, 8)}, (), 0.1)
    monkeypatch.setattr(inventory, "compile_program", lambda file, names, arch: spilling)
    result = invoke("compile", "--arch", "sm_90", "add")
    assert result.exit_code == 1
    assert "residual.cu sm_90: add: spills 8 bytes of registers" in result.output


@needs_nvrtc
def test_compile_refuses_an_unknown_name() -> None:
    result = invoke("compile", "--arch", "sm_90", "adder")
    assert isinstance(result.exception, DeviceError)
    assert "'adder'; known: " in str(result.exception)
    assert "rms_norm" in str(result.exception)
