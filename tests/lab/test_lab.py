"""The kernel lab without a GPU: its cases, its judgement, its arithmetic, its commands. What a GPU would do is stood in
for by a backend whose kernels the emulator runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cuplama.backends.cuda.backend import CudaBackend, runnable
from cuplama.backends.cuda.nvrtc import nvrtc_library
from cuplama.backends.cuda.toolkit import toolkit_folders
from cuplama.cli import kernels as kernel_commands
from cuplama.cli.main import cli
from cuplama.dtypes import DTYPES
from cuplama.engine.decode import decode_nodes
from cuplama.errors import CuplamaError, DeviceError, ParameterError
from cuplama.folders import source_folder
from cuplama.lab import bench, cases, report, roofline
from cuplama.lab import compare as contender
from cuplama.lab import kernel_bench as lab
from cuplama.lab import peaks as ceilings
from cuplama.lab.cases import Case
from cuplama.lab.check import WrongResultError, check, check_launches, expected, planned
from cuplama.lab.dummy import dummy_model
from cuplama.lab.emulation import Emulator, _brief, emulator_missing
from cuplama.lab.peaks import Peaks, Spread
from cuplama.lab.timing import copies, rotation, time_case
from cuplama.models.config import parse_config
from cuplama.models.fusion import PREFILL_RULES, fuse
from cuplama.models.graph import decoder
from cuplama.models.presets import SHAPES, find_shape
from cuplama.ops import OPS
from cuplama.ops.abstract import AbstractArray, abstract
from cuplama.ops.launch import Device
from cuplama.ops.op import Op
from tests.fakes import FakeGpu, HostCublas
from tests.lab.test_bench import TINY

LIMITS = Peaks(read=4e12, arithmetic=8e14, dtype="bf16")

needs_nvrtc = pytest.mark.skipif(
    not (shutil.which("g++") and toolkit_folders(12)), reason="needs g++ and the CUDA 12 headers"
)


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("batch", [1, 16])
def test_every_node_of_both_graphs_is_a_case(name: str, batch: int) -> None:
    config = find_shape(name)[1]
    nodes = decode_nodes(decoder(config), batch)
    found = cases.decode_cases(config, "bf16", batch, nodes=nodes)
    assert sum(c.count for c in found) == sum(len(runnable(n)) for n in nodes) + 2
    assert {c.op.name for c in found} == {p.op for n in nodes for p in runnable(n)} | {"sample", "advance"}
    prompt = cases.prompt_cases(config, "bf16", 512)
    assert sum(c.count for c in prompt) == len(fuse(decoder(config), PREFILL_RULES)) + 1
    assert {c.graph for c in (*found, *prompt)} == {"decode", "prefill"}


def test_the_matrices_of_a_decode_step_are_the_weights_of_the_model() -> None:
    config = find_shape("llama-3.2-1b")[1]
    found = cases.decode_cases(config, "bf16")
    read = sum(c.call.nbytes() * c.count for c in found if c.weights and c.op.name != "embedding")
    weights = sum(2 * int(np.prod(s)) for n, s in config.weight_shapes().items() if n != "embed")
    assert weights < read < 1.001 * weights  # and some activations
    by_weight = {c.weights: c.count for c in found if c.weights}
    assert by_weight == {("embed",): 1, ("qkv",): 16, ("o",): 16, ("up",): 16, ("down",): 16, ("head",): 1}


def test_a_long_prompt_is_cut_as_the_engine_cuts_it() -> None:
    config = find_shape("llama-3.2-1b")[1]
    found = [c for c in cases.prompt_cases(config, "bf16", 5000, 2048) if c.op.name == "attention"]
    assert [(c.call["n"], int(c.call.arrays["lengths"][0]), c.count) for c in found] == [  # type: ignore[index]
        (2048, 2048, 16), (2048, 4096, 16), (904, 5000, 16)
    ]  # fmt: skip
    heads = [c for c in cases.prompt_cases(config, "bf16", 5000, 2048) if "head" in c.weights]
    assert [(c.call["n"], c.count) for c in heads] == [(1, 1)]


def test_windows_that_differ_are_different_cases() -> None:
    config = replace(parse_config(TINY), windows=(0, 16))
    found = [c for c in cases.decode_cases(config, "f32", depth=100) if "attention" in c.op.name]
    assert [(c.attrs["window"], c.count) for c in found] == [(0, 1), (16, 1)]


@pytest.mark.parametrize("name", list(OPS))
def test_every_op_has_default_cases(name: str) -> None:
    found = cases.default_cases(name, "bf16")
    assert found
    assert {c.op.name for c in found} == {name} or OPS[name].kernels is None
    for case in found:
        assert case.call.nbytes() > 0
        assert name in case.label


def test_shapes_of_ones_own() -> None:
    case = cases.shape_case(OPS["rms_norm"], {"n": 3, "d": 4096}, "f16")
    assert case.shape == "n=3 d=4096"
    assert case.label == "rms_norm f16 n=3 d=4096"
    assert case.attrs == {"eps": 1e-5}
    assert case.ins[1].dtype == np.float16
    long = cases.shape_case(OPS["attention"], {"b": 2, "length": 300, "heads": 4, "H": 2, "D": 64}, "f32")
    assert long.call.env["b"] == 2
    assert long.call.arrays["lengths"].tolist() == [300, 300]  # type: ignore[union-attr]
    assert "length=300" in long.shape
    for op, shape, message in (
        ("add", {"q": 1}, "add has no 'q'; it has d, n"),
        ("attention", {"n": 1}, "attention has no 'n'"),
    ):
        with pytest.raises(ParameterError, match=message):
            cases.shape_case(OPS[op], shape, "f32")


@pytest.mark.parametrize(
    ("op", "shape", "message"),
    [
        ("linear", "n=-1", "linear: n is -1, not a whole number of at least 1"),
        ("rms_norm", "n=0,d=64", "rms_norm: n is 0, not a whole number"),
        ("rms_norm", "n=1.5,d=64", "rms_norm: n is 1.5, not a whole number"),
        ("rms_norm", "n=true", "rms_norm: n is true, not a whole number"),
        ("rms_norm", "eps=true", "rms_norm: eps is true, not a finite number"),
        ("rms_norm", "eps=nan", "rms_norm: eps is nan, not a finite number"),
        ("linear", "b=3", "linear: b is 3, not true or false"),
        ("linear", "U=i32", "linear: U is i32, not T or f32 or bf16"),
        ("attention", "length=0", "attention: length is 0, not a whole number of at least 1"),
        ("attention", "window=-1", "attention: window is -1, not a whole number of at least 0"),
        ("attention", "heads=3,H=2", "attention needs heads % H == 0, not H=2, heads=3"),
        ("attention", "new=2,length=1", "attention needs new <= length, not length=1, new=2"),
        ("append_attention", "new=2", "append_attention needs new == 1, not new=2"),
        ("rope", "n=1,D=7", "rope needs 2 * h <= D, not D=7, h=32"),
        ("kv_append", "n=49", "kv_append needs n <= P * S, not P=3, S=16, n=49"),
        ("logprobs", "N=8", "logprobs needs N <= V, not N=8, V=7"),
        ("embedding", "n=1,d=99999999999", "embedding: d is 99999999999: too large"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_one_line(op: str, shape: str, message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        cases.shape_case(OPS[op], kernel_commands.parse_shape(shape), "bf16")
    assert message in str(caught.value)
    assert "Error" not in str(caught.value)


def test_a_shape_that_memory_cannot_hold_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any) -> None:  # where memory is promised freely, really asking for so much ends the process
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(Op, "random_inputs", short)
    with pytest.raises(ParameterError, match="add: the shape n=9,d=8 is too large: Unable to allocate 9 TiB"):
        cases.shape_case(OPS["add"], {"n": 9, "d": 8}, "f32")


def test_sizes_that_an_op_has_as_zero_may_be_zero() -> None:
    assert cases.shape_case(OPS["logprobs"], {"N": 0}, "f32").call["N"] == 0
    assert cases.shape_case(OPS["attention"], {"window": 0, "length": 3}, "f32").call["window"] == 0


def test_launches_are_checked_before_they_are_made() -> None:
    with pytest.raises(ParameterError, match="rms_norm: d is 100000; the kernel takes at most 16384"):
        check_launches(cases.shape_case(OPS["rms_norm"], {"d": 100000}, "bf16"), Device())
    many = cases.shape_case(OPS["logprobs"], {"b": 65536, "V": 8}, "f32")
    with pytest.raises(ParameterError, match=r"the shape is too large: logprobs_chunk.* needs grid \(1, 65536, 1\)"):
        check_launches(many, Device())
    check_launches(cases.shape_case(OPS["logprobs"], {"b": 65535, "V": 8}, "f32"), Device())


def test_random_inputs_keep_products_in_range() -> None:
    op = OPS["linear"]
    f16 = DTYPES["f16"]
    case = Case(op, (AbstractArray((2, 4096), f16), AbstractArray((3000, 4096), f16), None), {"U": "T"}, "f16")
    x, w, b = case.arrays()
    assert b is None
    assert x is not None and w is not None  # noqa: PT018
    assert float(np.std(x.astype(np.float32) @ w.astype(np.float32).T)) == pytest.approx(1, abs=0.1)
    assert len({row.tobytes() for row in w}) == 3000
    other = case.arrays(seed=1)[0]
    assert other is not None
    assert not np.array_equal(x, other)


# ---- right or wrong --------------------------------------------------------------------------------------------------


def _checked(name: str, dtype: str = "f32", **shape: Any) -> tuple[Case, list[Any], list[np.ndarray[Any, Any]]]:
    case = cases.shape_case(OPS[name], shape, dtype)
    arrays = case.arrays()
    return case, arrays, [np.array(o).astype(case.call.dtype(s)) for s, o in
                          zip(case.op.signature.outs, expected(case, arrays), strict=True)]  # fmt: skip


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", list(OPS))
def test_the_reference_is_right(name: str, dtype: str) -> None:
    """The judge accepts the reference's own result in the signature's dtypes, for every op."""
    case = cases.registry_cases(OPS[name], dtype)[0]
    arrays = case.arrays()
    before = [None if a is None else a.copy() for a in arrays]
    outs = [np.array(o).astype(case.call.dtype(s)) for s, o in
            zip(case.op.signature.outs, expected(case, arrays), strict=True)]  # fmt: skip
    check(case, arrays, outs)
    for a, b in zip(arrays, before, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or np.array_equal(a, b), "the check changed its inputs"


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e-3])
def test_one_wrong_float_is_found(value: float) -> None:
    case, arrays, (out,) = _checked("rms_norm", n=3, d=8)
    out[2, 7] += value
    with pytest.raises(WrongResultError, match=r"rms_norm f32 n=3 d=8: 1 of 24 elements of y are wrong.* \[2, 7\]"):
        check(case, arrays, [out])


def test_many_small_errors_are_found() -> None:
    case, arrays, (out,) = _checked("add", n=9, d=999)
    out += 2.5e-5 * np.sign(np.random.default_rng(0).standard_normal(out.shape)).astype(np.float32)
    with pytest.raises(WrongResultError, match="of the result's norm; 1e-05 is allowed"):
        check(case, arrays, [out])


def test_the_outliers_of_an_allowed_error_are_allowed() -> None:
    """Of a million normal errors some lie five deviations out; a sum over 14,336 products was refused for that."""
    case, arrays, (out,) = _checked("add", n=999, d=1001)
    size = float(np.sqrt(np.mean(out.astype(np.float64) ** 2)))
    errors = np.random.default_rng(7).standard_normal(out.shape) * 0.9e-5 * size
    assert (np.abs(errors) > 3e-5 * (np.abs(out) + size)).any()
    check(case, arrays, [(out + errors).astype(np.float32)])


def test_a_wrong_integer_and_a_wrong_shape_are_found() -> None:
    case, arrays, (out,) = _checked("sample", b=3, V=512)
    with pytest.raises(WrongResultError, match="token has shape"):
        check(case, arrays, [out[:1]])
    out[1] += 1
    with pytest.raises(WrongResultError, match=r"1 of 3 elements of token are wrong, the first at \[1\]"):
        check(case, arrays, [out])


def test_large_inputs_stay_narrow_and_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.shape_case(OPS["linear"], {"n": 2, "m": 9, "k": 64}, "bf16")
    wide = expected(case, case.arrays())[0]
    monkeypatch.setattr(lab, "_WIDEN", 2 * 64)
    assert np.allclose(expected(case, case.arrays())[0], wide, rtol=1e-12)


# ---- time ------------------------------------------------------------------------------------------------------------


def test_copies_exceed_the_cache_but_not_the_memory() -> None:
    cache = 50 << 20
    assert copies(64 << 20, 64 << 20, cache) == 3
    assert copies(1 << 20, 1 << 20, cache) == 64
    assert copies(4096, 4096, cache) == 64
    assert copies(4096, 1 << 30, cache) == 2
    assert copies(4 << 30, 4 << 30, cache) == 1
    assert copies(1 << 30, 1 << 30, 0) == 1


def test_a_row_is_arithmetic_on_the_median() -> None:
    case = replace(cases.shape_case(OPS["linear"], {"n": 1, "m": 1000, "k": 1000}, "bf16"), count=7, weights=("o",))
    bytes_, operations = case.call.nbytes(), 2 * 1000 * 1000
    other = ("cuBLAS", Spread((3e-6,)))
    found = lab.row(case, Spread((1e-6, 2e-6, 9e-6)), other, LIMITS)
    assert found["microseconds"] == pytest.approx(2)
    assert found["total_microseconds"] == pytest.approx(14)
    assert found["gigabytes_per_second"] == pytest.approx(bytes_ / 2e-6 / 1e9)
    assert found["percent_of_read_bandwidth"] == pytest.approx(100 * bytes_ / 2e-6 / 4e12)
    assert found["teraflops"] == pytest.approx(operations / 2e-6 / 1e12)
    assert found["alternative_microseconds"] == pytest.approx(3)
    assert lab.row(case, Spread((1e-6,)), None, LIMITS)["alternative"] is None
    assert "| decode" not in report.render(lab.COLUMNS, [found], "md")
    assert "| linear | o " in report.render(lab.COLUMNS, [found], "md")


def test_a_step_says_how_much_the_ops_explain() -> None:
    step = lab.Step("decode", "a step of 1 at 512 tokens", 0.0009, 0.001)
    assert str(step) == (
        "decode: a step of 1 at 512 tokens: the ops add up to 0.9 ms; measured 1 ms (90%)"
    )  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaBackend]:
    """A backend whose kernels the emulator runs; every replay takes 40 microseconds."""

    def timed(backend: Any, body: Any, repeats: int) -> Spread:
        body()
        return Spread((40e-6,) * repeats)

    monkeypatch.setattr(ceilings, "seconds", timed)
    monkeypatch.setattr(lab, "cache_bytes", lambda backend: 1000)
    monkeypatch.setattr(lab, "_LAUNCHES", 2)
    backend = CudaBackend("f32", gpu=FakeGpu(emulate=True, cublas=HostCublas()))
    backend.gpu.limits = Device(sms=2)
    function = backend.gpu.function
    monkeypatch.setattr(backend.gpu, "function", lambda file, name, shared, *_: function(file, name, shared))
    monkeypatch.setattr(backend.gpu, "describe", lambda: "a stand-in")
    monkeypatch.setattr(backend.gpu, "mark", lambda: SimpleNamespace(synchronize=lambda: None))
    yield backend
    backend._plans.clear()


def test_a_whole_model_is_checked_and_timed(gpu: CudaBackend) -> None:
    config = parse_config(TINY)
    chosen = cases.decode_cases(config, "f32", depth=70) + cases.prompt_cases(config, "f32", 12)
    said: list[str] = []
    rows = lab.bench(gpu, chosen, LIMITS, said.append)
    assert len(rows) == len(chosen) == len(said)
    assert {r["op"] for r in rows} == {c.op.name for c in chosen}
    assert all(r["microseconds"] > 0 for r in rows)
    assert {r["alternative"] for r in rows if r["weights"] == "down"} == {"cuBLAS"}
    assert [list(r) for r in rows] == [list(rows[0])] * len(rows)
    found = lab.result(gpu, rows, LIMITS, [lab.Step("decode", "x", 1.0, 2.0)])
    again = json.loads(report.render(lab.COLUMNS, rows, "json", {k: v for k, v in found.items() if k != "rows"}))
    assert again["steps"] == [{"graph": "decode", "what": "x", "summed_ms": 1000.0, "measured_ms": 2000.0}]
    assert again["rows"] == rows


def test_inputs_rotate(gpu: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(gpu, "call", lambda op, ins, attrs: seen.append(id(ins[0])))
    case = cases.shape_case(OPS["add"], {"n": 1, "d": 100}, "f32")  # 800 bytes; the cache holds 1,000
    time_case(gpu, case, rotation(gpu, case, case.arrays(), 1000))
    assert len(set(seen)) == 4
    assert seen[:4] == seen[4:8]


def test_a_kernel_that_writes_nothing_is_refused(gpu: CudaBackend) -> None:
    gpu.gpu.emulate = False  # type: ignore[attr-defined]
    case = cases.shape_case(OPS["add"], {"n": 1, "d": 100}, "f32")
    with pytest.raises(WrongResultError, match="100 of 100 elements of y are wrong"):
        lab.bench(gpu, [case], LIMITS)
    assert gpu._check is False


def test_memory_that_is_short_is_no_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(self: Case, seed: int = 0) -> None:
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(Case, "arrays", short)
    monkeypatch.setattr(Emulator, "prepare", lambda self, cases: None)
    done = _invoke("bench", "add", "--shape", "n=2,d=8")
    assert isinstance(done.exception, ParameterError)
    assert "the shape is too large for the memory here: Unable to allocate 9 TiB" in str(done.exception)


@pytest.fixture
def command_gpu(gpu: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """The commands find the stand-in as the machine's GPU."""

    def opened(*_: Any) -> CudaBackend:
        return gpu

    monkeypatch.setattr("cuplama.backends.cuda.driver.cuda_available", lambda device=0: (True, ""))
    monkeypatch.setattr("cuplama.backends.cuda.backend.CudaBackend", opened)
    opened.open = opened  # type: ignore[attr-defined]
    monkeypatch.setattr(gpu, "close", lambda: None)
    monkeypatch.setattr(ceilings, "measure", lambda backend: LIMITS)
    monkeypatch.setattr(contender, "cache_bytes", lambda backend: 1000)
    return gpu


def test_bench_on_a_gpu(command_gpu: CudaBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = _invoke("bench", "rms_norm", "--shape", "n=2,d=64", "--shape", "n=3,d=8", "--dtype", "f32", "-o", "json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found.keys() == {"command", "environment", "ceilings", "steps", "rows"}
    assert [r["shape"] for r in found["rows"]] == ["n=2 d=64", "n=3 d=8"]
    assert found["rows"][0]["microseconds"] == pytest.approx(10)  # a replay of four launches
    monkeypatch.setattr(bench.Runs, "generation", lambda self, trial: (1.0, 1e-3 * trial.generated))
    monkeypatch.setattr(bench.Runs, "prompt", lambda self, trial: 2e-3)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    picture = tmp_path / "roof.png"
    args = ["--model", str(tmp_path), "--dtype", "f32", "--depth", "70", "--prompt", "12", "--plot", str(picture)]
    done = _invoke("bench", *args)
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    assert re.search(r"^\| decode +\| linear_add +\| down ", done.stdout, re.M)
    assert re.search(r"^decode: a step of 1 at 70 tokens: the ops add up to .* measured 1 ms", done.stdout, re.M)
    assert re.search(r"^prefill: a prompt of 12 tokens: the ops add up to .* measured 2 ms", done.stdout, re.M)
    assert picture.read_bytes().startswith(b"\x89PNG")
    unused = _invoke("bench", "add", "-m", str(tmp_path), "--dtype", "f32", "--depth", "70", "--prompt", "12")
    assert isinstance(unused.exception, ParameterError)
    assert re.search(r" does not use add; it uses: advance, append_attention, ", str(unused.exception))
    large = _invoke("bench", "rms_norm", "--shape", "d=100000", "--dtype", "f32")
    assert str(large.exception) == "rms_norm: d is 100000; the kernel takes at most 16384"


def test_a_wrong_kernel_is_refused_on_a_gpu(command_gpu: CudaBackend) -> None:
    command_gpu.gpu.emulate = False  # type: ignore[attr-defined]
    done = _invoke("bench", "add", "--shape", "n=2,d=8", "--dtype", "f32")
    assert done.exit_code == 1
    assert "refused: add f32 n=2 d=8: 16 of 16 elements of y are wrong, the first at [0, 0]: nan, not" in done.stderr
    assert "µs" not in done.stdout


def test_compare_on_a_gpu(command_gpu: CudaBackend, tmp_path: Path) -> None:
    for header in source_folder().glob("*.cuh"):
        shutil.copy(header, tmp_path)
    args = ["--op", "add", "--dtype", "f32", "--shape", "n=2,d=8"]
    done = _invoke("compare", str(_other(tmp_path)), *args)
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    assert re.search(r"^\|  +\| add +\| n=2 d=8 .*\| 1.0000 to 1.0000 \| no difference \|$", done.stdout, re.M)
    done = _invoke("compare", str(_other(tmp_path, "+= other", "-= other")), *args)
    assert done.exit_code == 1
    assert "refused: add of mine.cu f32" in done.stderr


def test_steps_are_measured_where_the_ops_were(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with dummy_model(str(tmp_path), "numpy", "auto", 200, 200) as model:
        rows = [{"graph": g, "total_microseconds": t} for g, t in (("decode", 5.0), ("decode", 6.0), ("prefill", 9.0))]
        decode, prompt = lab.steps(model, rows, 1, 70, 20, repeats=1)
    assert decode.summed == pytest.approx(11e-6)
    assert prompt.summed == pytest.approx(9e-6)
    assert decode.measured > 0
    assert prompt.measured > 0


# ---- a contender -----------------------------------------------------------------------------------------------------


def test_the_interval_of_a_ratio() -> None:
    rng = np.random.default_rng(1)
    tree, other = 2e-6 * (1 + 0.05 * rng.random(40)), 1e-6 * (1 + 0.05 * rng.random(40))
    ratio, low, high = contender.ratio_interval(list(tree), list(other))
    assert low < ratio < high
    assert ratio == pytest.approx(2, rel=0.02)
    assert high - low < 0.1
    same = contender.ratio_interval([1.0, 2.0, 1.0, 2.0] * 5, [2.0, 1.0, 2.0, 1.0] * 5)
    assert same[1] < 1 < same[2]
    case = cases.shape_case(OPS["add"], {}, "f32")
    for bounds, verdict in (((1.01, 1.2), "faster"), ((0.8, 0.99), "slower"), ((0.9, 1.1), "no difference")):
        assert contender.Comparison(case, Spread((1.0,)), Spread((1.0,)), 1.0, *bounds).verdict == verdict


def _other(folder: Path, old: str = "", new: str = "") -> Path:
    text = (source_folder() / "residual.cu").read_text()
    assert old in text
    path = folder / "mine.cu"
    path.write_text(text.replace(old, new) if old else text)
    return path


def test_a_contender_has_kernels_of_the_op_with_parameters_that_have_values(tmp_path: Path) -> None:
    found = contender.candidate_op(_other(tmp_path), OPS["add"], "f32", Device())
    assert found.name == "add of mine.cu"
    case = replace(cases.shape_case(OPS["add"], {"n": 2, "d": 30}, "f32"), op=found)
    (launch,) = planned(case, case.ins, Device(), abstract)[0]
    assert launch.file == str(tmp_path / "mine.cu")
    assert launch.expression == "add"
    with pytest.raises(ParameterError, match=r"mine\.cu has none of the kernels that rms_norm launches: rms_norm"):
        contender.candidate_op(tmp_path / "mine.cu", OPS["rms_norm"], "f32", Device())
    (tmp_path / "new.cu").write_text((tmp_path / "mine.cu").read_text().replace("int n, int d)", "int d, int rows)"))
    with pytest.raises(ParameterError, match=r"new\.cu does not fit .* add: .*no value for parameter rows"):
        contender.candidate_op(tmp_path / "new.cu", OPS["add"], "f32", Device())
    with pytest.raises(ParameterError, match=r"cannot read .*absent\.cu"):
        contender.candidate_op(tmp_path / "absent.cu", OPS["add"], "f32", Device())


def test_contender_and_tree_take_turns(gpu: CudaBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for header in source_folder().glob("*.cuh"):
        shutil.copy(header, tmp_path)
    monkeypatch.setattr(contender, "cache_bytes", lambda backend: 1000)
    chosen = [cases.shape_case(OPS["add"], {"n": 2, "d": 30}, "f32")]
    right = contender.candidate_op(_other(tmp_path), OPS["add"], "f32", Device())
    (found,) = contender.compare(gpu, right, chosen, chosen, repeats=6)
    assert len(found.tree.values) == len(found.contender.values) == 6
    assert (found.ratio, found.verdict) == (1.0, "no difference")
    shown = report.render(contender.COMPARE_COLUMNS, [contender.compare_row(found)], "md")
    assert "| no difference |" in shown
    (tmp_path / "wrong.cu").write_text((tmp_path / "mine.cu").read_text().replace("+= other", "-= other"))
    wrong = contender.candidate_op(tmp_path / "wrong.cu", OPS["add"], "f32", Device())
    with pytest.raises(WrongResultError, match=r"add of wrong\.cu f32 n=2 d=30: \d+ of 60 elements of y are wrong"):
        contender.compare(gpu, wrong, chosen, chosen, repeats=6)
    assert "add of wrong.cu" not in OPS


# ---- the roofline ----------------------------------------------------------------------------------------------------


def _made_up() -> dict[str, Any]:
    config = find_shape("llama-3.2-1b")[1]
    rows = []
    for case in cases.decode_cases(config, "bf16") + cases.prompt_cases(config, "bf16"):
        floor = max(case.call.nbytes() / LIMITS.read, case.call.flops() / LIMITS.arithmetic)
        rows.append(lab.row(case, Spread((floor / 0.8,)), None, LIMITS))
    facts = {"model": "llama-3.2-1b", "device": "a GPU", "dtype": "bf16", "date": "2026-11-20"}
    return {"environment": facts, "ceilings": bench.show_peaks(LIMITS), "rows": rows}


def test_roofline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    made = report.new_figure

    def kept(width: float, height: float) -> Figure:
        figures.append(made(width, height))
        return figures[-1]

    monkeypatch.setattr(report, "new_figure", kept)
    found = _made_up()
    roofline.plot_roofline(found, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 10_000
    (ax,) = figures[0].axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    names = [t for t in ax.texts if re.search(r"\d%$", t.get_text())]
    computing = {(r["graph"], r["op"], r["weights"]) for r in found["rows"] if r["operations"]}
    assert len(names) == len(computing)
    assert {t.get_text().strip() for t in names} >= {"linear_add (down) 80%", "attention 80%", "append_attention 80%"}
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in names]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), "labels cover each other"
    page = ax.get_window_extent(renderer)
    assert all(b.x1 <= page.x1 and b.y0 >= page.y0 for b in boxes), "a label leaves the picture"


def test_nothing_to_draw(tmp_path: Path) -> None:
    found = _made_up()
    found["rows"] = [r for r in found["rows"] if not r["operations"]]
    with pytest.raises(ParameterError, match="nothing to draw"):
        roofline.plot_roofline(found, tmp_path / "x.png")


def test_a_picture_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for name in ("x.png", "x.SVG"):
        report.check_picture(tmp_path / name)
    ending = "the name must end in one of .*png"
    for name, message in (("no/x.png", "there is no folder"), ("x.xyz", ending), ("x", ending)):
        with pytest.raises(ParameterError, match=message):
            report.check_picture(tmp_path / name)


# ---- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.backends.cuda.driver.cuda_available", lambda device=0: (False, "no GPU in this test"))


def _invoke(*args: str) -> Any:
    return CliRunner().invoke(cli, ["kernels", *args])


@needs_nvrtc
def test_show() -> None:
    done = _invoke("show", "rms_norm", "--shape", "n=2,d=4096", "--arch", "sm_80,sm_90", "--ptx")
    assert done.exit_code == 0, done.output
    assert "y[n,d]:T = (x[n,d]:f32, w[d]:T, eps:f32)" in done.stdout
    assert "rms_norm<bf16, 1>: grid (2, 1, 1), block (512, 1, 1)" in done.stdout
    assert "A thread holds CHUNKS pieces" in done.stdout
    assert re.search(r"^rms_norm<bf16, 1>  sm_80 +\d+ +\d+ +0 +0$", done.stdout, re.M)
    assert ".target sm_80" in done.stdout
    shown = _invoke("show", "residual")
    assert "select_rows: y = x[rows]" in shown.stdout
    assert "bf16 n=512" in shown.stdout
    product = _invoke("show", "linear_add").stdout  # a library's for many rows; ours in groups of 8
    assert "n=512 k=4096 m=4096\n    cuBLAS; without it:\n    64 x linear_add_mma<bf16" in product
    assert "n=1 k=4096 m=4096\n    linear_add<bf16" in product
    hopper = _invoke("show", "rms_norm", "--shape", "n=2,d=64", "--ptx").stdout
    assert ".target sm_90a" in hopper  # as what is run is compiled
    reading = _invoke("show", "read_sum")
    assert "Does nothing but read" in reading.stdout
    assert re.search(r"^read_sum  sm_90 +\d+", reading.stdout, re.M)


@needs_nvrtc
def test_sass_needs_a_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    assert "no SASS: neither nvdisasm nor cuobjdump" in _invoke("show", "add", "--sass").stdout
    (tmp_path / "nvdisasm").write_text(
        '#!/bin/sh\n/bin/echo "code of $1 $(/usr/bin/head -c 4 "$2" | /usr/bin/tail -c 3)"\n'
    )
    (tmp_path / "nvdisasm").chmod(0o755)
    assert "code of -c ELF" in _invoke("show", "add", "--sass").stdout


@needs_nvrtc
def test_bench_without_a_gpu_checks_and_compiles() -> None:
    done = _invoke("bench", "add", "select_rows", "--dtype", "f32", "--arch", "sm_75")
    assert done.exit_code == 0, done.output
    assert re.search(r"^add +f32 +4 +right$", done.stdout, re.M)
    assert "2 kernel instances compile for sm_75" in done.stdout
    assert "nothing is timed: no GPU in this test" in done.stdout


@needs_nvrtc
def test_without_a_gpu_programs_can_read_what_was_checked(tmp_path: Path) -> None:
    done = _invoke("bench", "add", "--shape", "n=2,d=8", "--dtype", "f32", "-o", "json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["rows"] == [{"op": "add", "dtype": "f32", "cases": 1, "emulator": "right"}]
    assert found["command"].startswith("cuplama ")
    assert re.search(r"^add: 1 case$", done.stderr, re.M)
    assert re.search(r"^1 kernel instance compiles for sm_90\nnothing is timed: no GPU", done.stderr, re.M)
    args = ["--op", "add", "--dtype", "f32", "--shape", "n=2,d=8"]
    done = _invoke("compare", str(_other(tmp_path)), *args, "-o", "csv")
    assert done.exit_code == 0, done.output
    assert done.stdout == "op,dtype,cases,emulator\nadd,f32,1,right\n"
    assert "mine.cu: compiles, and is right on 1 case; not timed: no GPU" in done.stderr


def test_an_op_that_a_model_lacks_is_refused() -> None:
    done = _invoke("bench", "layer_norm", "add", "-m", "gpt2")
    assert isinstance(done.exception, ParameterError)
    assert re.match(r"gpt2 does not use add; it uses: advance, .*layer_norm, ", str(done.exception))


def test_watch_refuses_a_shape_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_commands, "watch", lambda look, again: pytest.fail("watches"))
    for args, message in (
        (["rms_norm", "--shape", "n=-1"], "rms_norm: n is -1"),
        (["norm", "--shape", "n=1"], "--shape needs the NAME of one op"),
    ):
        done = _invoke("watch", *args)
        assert isinstance(done.exception, ParameterError)
        assert message in str(done.exception)


def test_help_is_not_cut() -> None:
    text = _invoke("--help").stdout
    assert "watch" in text
    assert "..." not in text.split("Commands:")[1]


@pytest.mark.parametrize("command", ["list", "compile", "show", "bench", "compare", "watch"])
def test_every_command_has_debug(command: str) -> None:
    assert "--debug" in _invoke(command, "--help").stdout


@needs_nvrtc
def test_what_cannot_be_emulated_is_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuplama.simt import emulator

    monkeypatch.setattr(emulator, "NOT_EMULATED", frozenset({"aligned"}))
    done = _invoke("bench", "add", "--dtype", "f32")
    assert done.exit_code == 0, done.output
    assert "not run: add: its kernels use instructions that are not emulated" in done.stdout


def test_of_a_compilers_messages_the_first_is_shown() -> None:
    text = "compile-error: x.cu\nin file\nx.cu:3: error: no such name\n  3 | a\nx.cu:4: error: more"
    assert _brief(text) == "compile-error: x.cu x.cu:3: error: no such name"
    assert _brief("race: here\nthere") == "race: here\nthere"


@needs_nvrtc
def test_a_wrong_kernel_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    op = replace(OPS["add"], reference=lambda a, b: a - b)
    assert isinstance(OPS, dict)
    monkeypatch.setitem(OPS, "add", op)
    done = _invoke("bench", "add", "--shape", "n=2,d=8", "--dtype", "f32")
    assert done.exit_code == 1
    assert re.search(r"refused: add f32 n=2 d=8: \d+ of 16 elements of y are wrong, the first at \[0, 0\]", done.stderr)
    assert "compile" not in done.stdout


@needs_nvrtc
def test_compare_without_a_gpu_checks(tmp_path: Path) -> None:
    right = _invoke("compare", str(_other(tmp_path)), "--op", "add", "--dtype", "f32")
    assert right.exit_code == 0, right.output
    assert "compiles, and is right on 4 cases; not timed: no GPU in this test" in right.stdout
    wrong = _invoke("compare", str(_other(tmp_path, "+= other", "-= other")), "--op", "add", "--dtype", "f32")
    assert wrong.exit_code == 1
    assert "refused: add of mine.cu f32 n=1 d=64" in wrong.stderr
    broken = _invoke("compare", str(_other(tmp_path, "+= other", "+= another")), "--op", "add", "--dtype", "f32")
    assert broken.exit_code == 1
    assert re.search(rf"refused: {re.escape(str(tmp_path))}/mine\.cu:\d+: .*another", broken.stderr)
    fault = _invoke(
        "compare", str(_other(tmp_path, "+= other.v[j]", "+= b[i + j + 4096]")), "--op", "add", "--dtype", "f32"
    )
    assert fault.exit_code == 1
    assert f"{tmp_path}/mine.cu:" in fault.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench", "nonsense"], "no op, kernel or file is named 'nonsense'"),
        (["bench", "add", "rope", "--shape", "n=1"], "--shape needs the NAME of one op"),
        (["bench", "norm", "--shape", "n=1"], "--shape needs the NAME of one op"),
        (["bench", "add", "--shape", "n"], "name=value pairs"),
        (["bench", "add", "--shape", "n=x"], "'x' is neither a number"),
        (["bench", "add", "--plot", "x.png"], "nothing can be timed: no GPU in this test"),
        (["bench", "add", "--plot", "absent/x.png"], "cannot write absent/x.png: there is no folder absent"),
        (["bench", "add", "--plot", "x.xyz"], "cannot write x.xyz: the name must end in one of"),
        (["bench", "rms_norm", "--shape", "n=1,d=100000"], "rms_norm: d is 100000; the kernel takes at most"),
        (["bench", "rms_norm", "--shape", "n=0,d=64"], "n is 0, not a whole number"),
        (["show", "attention", "--shape", "heads=3,H=2"], "attention needs heads % H == 0"),
        (["show", "attention", "--shape", "D=7"], "attention: D = 7 is no multiple of 8"),
        (["bench", "--model", "llama-9"], "known shapes"),
        (["show", "nonsense"], "known: "),
        (["compare", "x.cu", "--op", "norm"], "no op is named 'norm'"),
    ],
)
def test_refusals(args: list[str], message: str) -> None:
    done = _invoke(*args)
    assert isinstance(done.exception, CuplamaError)
    assert message in f"{done.output} {done.exception}"


def test_values_of_a_shape() -> None:
    wanted = {"n": 1, "eps": 1e-6, "b": True, "U": "f32", "scale": 0.5}
    assert kernel_commands.parse_shape("n=1, eps=1e-6,b=true,U=f32,scale=.5") == wanted


def test_names_find_ops() -> None:
    assert [op.name for op in kernel_commands.find_ops("residual")] == ["add", "select_rows"]
    assert [op.name for op in kernel_commands.find_ops("residual.cu")] == ["add", "select_rows"]
    assert [op.name for op in kernel_commands.find_ops("sample_draw")] == ["sample"]


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
        return kernel_commands.stamps([tmp_path])

    kernel_commands.watch(look, lambda: runs.append(looks), pause=0)
    assert runs == [1, 3, 5]


def test_without_a_checkout_or_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs g++" in emulator_missing()
    monkeypatch.setattr(lab, "_checkout", lambda: tmp_path)
    assert "in a checkout only" in emulator_missing()
    with pytest.raises(DeviceError, match="checkout"):
        Emulator()
    nvrtc_library()
    done = _invoke("bench", "add", "--dtype", "f32")
    assert done.exit_code == 0, done.output
    assert re.search(r"^add +f32 +- +not run$", done.stdout, re.M)
    assert "1 kernel instance compiles" in done.stdout
    done = _invoke("bench", "add", "--dtype", "f32", "-o", "json")
    assert json.loads(done.stdout)["rows"] == [{"op": "add", "dtype": "f32", "cases": None, "emulator": "not run"}]
