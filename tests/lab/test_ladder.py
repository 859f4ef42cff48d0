"""The ladder of attention kernels: every rung against the one reference, and how the ladder is climbed and shown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import attention_ladder
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.driver import cuda_available
from cuplama.backends.cuda.toolkit import ARCHS, shared_limit
from cuplama.errors import DeviceError, ParameterError
from cuplama.folders import source_folder
from cuplama.lab.check import BackendExecutor, WrongResultError, check, model_dtypes, run_guarded
from cuplama.lab.dummy import dummy_model
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.ladder import climb as climbing
from cuplama.lab.ladder import peer
from cuplama.lab.ladder.climb import case_workloads, check_compiled, climb, columns, judged, sizes_of
from cuplama.lab.ladder.picture import plot_ladder
from cuplama.lab.ladder.rungs import LADDERS, Inputs, Rung
from cuplama.lab.ladder.whole import LadderPass, time_pass
from cuplama.ops import OPS
from cuplama.ops.attention import attention
from cuplama.ops.launch import Device, Plan
from cuplama.ops.op import Call, Op
from cuplama.ops.prototypes import prototypes
from cuplama.ops.signature import OpError
from tests.lab.common import PEAKS, TINY, invoke, needs_matplotlib
from tests.needs import needs_nvrtc
from tests.ops import harness
from tests.paths import ROOT

_OPS = [rung.op for ladder in LADDERS.values() for rung in ladder if rung.op is not attention]
_ALL = [(op, case, T) for op in _OPS for case in harness.cases(op) for T in model_dtypes(op)]
_NAMES = [harness.name_of(*c) for c in _ALL]
_DEVICES = [Device(75, 40, 65536), Device(80), Device()]
_SMALL = dict(num_heads=4, H=2, D=64)


# ---- every rung is right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "case", "T"), _ALL, ids=_NAMES)
def test_emulator(op: Op, case: Mapping[str, Any], T: str) -> None:
    """The kernels' own text, executed on the CPU."""
    workload = harness.workload(op, case, T)
    arrays = workload.arrays()
    check(workload, arrays, run_guarded(workload, arrays, EmulatedDevice()))


@pytest.mark.parametrize("op", _OPS, ids=lambda op: op.name)
def test_odd_sizes(op: Op) -> None:
    """More than a tile of queries and of keys, neither of them a whole number of tiles, and a shared key head."""
    workload = harness.workload(op, op.cases[2 if op.rules[-1] == "n == 1" else 3], "f16")
    arrays = workload.arrays()
    check(workload, arrays, run_guarded(workload, arrays, EmulatedDevice()))


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case", "T"), _ALL, ids=_NAMES)
def test_gpu(op: Op, case: Mapping[str, Any], T: str) -> None:
    works, reason = cuda_available()
    if not works:
        pytest.skip(reason)
    workload = harness.workload(op, case, T)
    arrays = workload.arrays()
    check(workload, arrays, run_guarded(workload, arrays, BackendExecutor(CudaBackend("f32"))))


@pytest.mark.parametrize("op", _OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("device", _DEVICES, ids=lambda d: f"sm_{d.arch}")
def test_launches_bind(op: Op, device: Device) -> None:
    for case in harness.cases(op):
        harness.check_launches(harness.workload(op, case, "f16"), device)


def test_the_reference_is_attention() -> None:
    """Written out for one head of one query at a time."""
    inputs = Inputs.random(dict(n=5, s=9, num_heads=4, H=2, D=64), "f32")
    y = LADDERS["attention"][0].op.reference(inputs.q, inputs.k, inputs.v, **inputs.attrs)
    for i, head in ((0, 0), (4, 3), (2, 1)):
        q = inputs.q[i, head * 64 : head * 64 + 64].astype(np.float64)
        k, v = (x[head // 2, : 9 - 5 + i + 1].astype(np.float64) for x in (inputs.k, inputs.v))
        p = np.exp(k @ q / 8)
        assert y[i, head * 64 : head * 64 + 64] == pytest.approx(p @ v / p.sum(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("ladder", LADDERS)
def test_the_products_op_computes_the_same(ladder: str) -> None:
    """Its inputs are arranged in another way: on pages, the queries in rows of a model."""
    rung = LADDERS[ladder][-1]
    for case in LADDERS[ladder][0].op.cases:
        inputs = Inputs.random(case, "f32")
        workload = rung.workload(inputs, "f32")
        assert judged(inputs, "f32", attention.reference(*workload.arrays(), **workload.attrs)) < 1e-5


def test_every_kernel_of_the_ladder_is_a_rungs_and_no_model_has_it() -> None:
    calls = [(op, harness.workload(op, op.cases[0], "f16").bind()) for op in _OPS]
    launched = {
        launch.kernel for op, call in calls if op.kernels for d in _DEVICES for launch in op.kernels(call, d).launches
    }
    files = sorted((source_folder() / "ladder").glob("*.cu"))
    assert launched == {f"ladder/{f.name}:{kernel}" for f in files for kernel in prototypes(f"ladder/{f.name}")}
    assert not {op.name for op in _OPS} & OPS.keys()


@pytest.mark.parametrize("path", sorted((source_folder() / "ladder").iterdir()), ids=lambda p: p.name)
def test_a_rung_is_read_in_five_minutes(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert lines[0].startswith("// ")
    head = "\n".join(line for line in lines if line.startswith("//"))
    if path.suffix == ".cu":
        assert re.search(r"^// (What changed|What is slow)", head, re.M)
        assert "Bytes" in head or "bytes" in head


@pytest.mark.parametrize(
    ("op", "sizes", "message"),
    [
        (0, dict(n=2, s=2, D=32), "D = 32 is neither 64 nor 128"),
        (1, dict(n=3, s=2, D=64), "needs num_heads % H == 0 and s >= n"),
        (2, dict(n=70000, s=70000, D=64), "n = 70000; 65535 at most"),
        (5, dict(n=2, s=4, D=64), "n = 2; a decode step has one query"),
    ],
)
def test_shapes_that_a_rung_does_not_take(op: int, sizes: dict[str, int], message: str) -> None:
    call = Call(_OPS[op], {**sizes, "num_heads": 1, "H": 1}, {"T": np.dtype(np.float16)}, {})
    assert _OPS[op].kernels is not None
    with pytest.raises(OpError, match=message):
        _OPS[op].kernels(call, Device())  # type: ignore[misc]


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("ladder", LADDERS)
def test_the_rungs_compile_without_spills(ladder: str, arch: int) -> None:
    for dtype in ("f16", "bf16") if arch >= 80 else ("f16",):
        assert [f for f in check_compiled(ladder, dtype, Device(arch, shared=shared_limit(arch))) if f[1]] == []


# ---- the climb -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(gpu: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """The ladder on the stand-in GPU, without its small cases, which the tests above have. A call takes 40 us."""
    from cuplama.lab import timing

    monkeypatch.setattr(climbing, "seconds", timing.seconds)
    monkeypatch.setattr(climbing, "cache_bytes", lambda backend: 1000)
    monkeypatch.setattr(climbing, "case_workloads", lambda rung, ladder, dtype: [])
    monkeypatch.setattr(climbing, "torch_missing", lambda: "PyTorch is not installed")
    return gpu


def _wrong(rung: Rung) -> Rung:
    """The rung with the last of its launches left out."""

    def kernels(call: Call, device: Device) -> Plan:
        plan = rung.op.kernels(call, device)  # type: ignore[misc]
        return replace(plan, launches=plan.launches[:-1])

    return replace(rung, op=replace(rung.op, kernels=kernels))


def _short(rung: Rung) -> Rung:
    def kernels(call: Call, device: Device) -> Plan:
        raise DeviceError("out of GPU memory: 34.36 GB asked for")

    return replace(rung, op=replace(rung.op, kernels=kernels))


def test_a_rung_without_a_time_says_why_and_the_others_go_on(
    stand_in: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    naive, tiled, online, *_ = LADDERS["attention"]
    monkeypatch.setitem(LADDERS, "attention", (naive, _wrong(tiled), _short(naive), online))
    sizes = sizes_of("attention", {"n": 20, **_SMALL})
    rows = climb(stand_in, "attention", sizes, "f32", PEAKS)
    assert [row["rung"] for row in rows] == ["naive", "tiled", "naive", "online", "torch"]
    assert [row["wrong"] for row in rows] == [False, True, False, False, False]
    assert [row["milliseconds"] is None for row in rows] == [False, True, True, False, True]
    assert "elements of y are wrong" in rows[1]["problem"]
    assert rows[2]["problem"] == "out of GPU memory: 34.36 GB asked for"
    assert rows[4]["problem"] == "PyTorch is not installed"
    assert rows[3]["times_below"] == rows[3]["times_lowest"] == pytest.approx(1)
    pairs = 20 * 21 / 2
    assert rows[0]["teraflops"] == pytest.approx(4 * 4 * 64 * pairs / (rows[0]["milliseconds"] * 1e-3) / 1e12)
    shown = [column.field for column in columns("attention", rows)]
    assert "foretold_milliseconds" not in shown
    assert "problem" in shown


def test_the_judge_sees_the_first_the_middle_and_the_last_rows() -> None:
    inputs = Inputs.random(dict(n=300, s=310, **_SMALL), "f16")
    y = LADDERS["attention"][0].op.reference(inputs.q, inputs.k, inputs.v, **inputs.attrs).astype(np.float16)
    assert 0 < judged(inputs, "f16", y) < 2.0**-11
    for row in (0, 150, 299):
        bad = y.copy()
        bad[row, 7] += 1
        with pytest.raises(WrongResultError):
            judged(inputs, "f16", bad)


def test_times_are_foretold_for_the_shape_they_were_foretold_for() -> None:
    naive = LADDERS["attention"][0]
    assert climbing._foretold(naive, "attention", sizes_of("attention", {"n": 512}), "bf16") == 5e3
    others = ({"n": 512, "D": 64}, "bf16"), ({"n": 512}, "f16"), ({"n": 500}, "bf16"), ({"n": 1, "s": 512}, "bf16")
    for given, dtype in others:
        assert climbing._foretold(naive, "attention", sizes_of("attention", given), dtype) is None
    for ladder in LADDERS.values():
        for rung in ladder:
            assert list(rung.foretold) == list(attention_ladder.LENGTHS)
            assert rung.gain
            assert rung.title


@pytest.mark.parametrize(
    ("ladder", "given", "message"),
    [
        ("attention", {"x": 1}, "the ladder has no 'x'; it has n, s, num_heads, H, D"),
        ("attention", {"n": 0}, "n is 0, not a whole number of at least 1"),
        ("attention", {"n": 8, "s": 4}, "n <= s, not n=8,s=4,"),
        ("attention", {"D": 96}, "D = 64 or 128"),
        ("attention", {"H": 5}, "num_heads % H == 0"),
        ("decode", {"n": 2}, "n = 1, not n=2"),
    ],
)
def test_shapes_that_the_ladder_does_not_have(ladder: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(message)):
        sizes_of(ladder, given)


def test_a_length_alone_is_a_whole_prompt() -> None:
    assert sizes_of("attention", {"n": 7})["s"] == 7
    assert sizes_of("attention", {"s": 7})["n"] == 7
    assert sizes_of("attention", {"n": 7, "s": 9})["s"] == 9
    assert sizes_of("decode", {"s": 9})["n"] == 1


def test_without_torch_there_is_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert peer.torch_missing() == "PyTorch is not installed"


# ---- a whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ladder", "new"), [("attention", 70), ("decode", 1)])
def test_a_model_computes_the_same_on_every_rung(
    tmp_path: Path, ladder: str, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cuplama.lab.ladder.whole._REPEATS", 1)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "head_dim": 64}))
    with dummy_model(str(tmp_path), "numpy", "float32", 128, 128) as model:
        passes = [LadderPass(model, rung, 70, new) for rung in LADDERS[ladder]]
        lowest, *others = [np.asarray(one.run()) for one in passes]
        assert lowest.shape == (1, 100)
        assert all(other == pytest.approx(lowest, rel=1e-4, abs=1e-6) for other in others)
        logits, taken = time_pass(model.backend, passes[0])
        assert np.array_equal(logits, lowest)
        assert taken.median > 0
        if ladder == "attention":  # and so does the engine
            ids = np.random.default_rng(0).integers(0, 100, 70).tolist()
            assert lowest[0] == pytest.approx(list(model.engine.logits(ids))[-1][-1], rel=1e-3, abs=1e-5)


# ---- what is shown ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.backends.cuda.driver.cuda_available", lambda device=0: (False, "no GPU in this test"))


@needs_nvrtc
@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_rungs_are_checked_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LADDERS, "decode", LADDERS["decode"][:1])
    done = invoke("ladder", "decode", "--shape", "s=70,num_heads=2,H=1,D=64", "--dtype", "f32")
    assert done.exit_code == 0, done.output
    assert re.search(r"^block +f32 +1 +right +a block for each query head$", done.stdout, re.M)
    assert "2 kernel instances compile for sm_90\nnothing is timed: no GPU in this test" in done.stdout
    done = invoke("ladder", "decode", "--shape", "s=70,num_heads=2,H=1,D=64", "--dtype", "f32", "-o", "json")
    assert json.loads(done.stdout)["rows"] == [{"op": "block", "dtype": "f32", "cases": 1, "emulator": "right"}]
    monkeypatch.setitem(LADDERS, "decode", [_wrong(LADDERS["decode"][0])])
    done = invoke("ladder", "decode", "--shape", "s=70,num_heads=2,H=1,D=64", "--dtype", "f32")
    assert done.exit_code == 1
    assert "refused: ladder_decode_block f32" in done.stderr


@pytest.mark.usefixtures("no_gpu")
def test_a_picture_needs_times(tmp_path: Path) -> None:
    done = invoke("ladder", "attention", "--plot", str(tmp_path / "x.png"))
    assert isinstance(done.exception, (DeviceError, ParameterError))  # the second where matplotlib is missing


@needs_matplotlib
def test_the_ladder_on_a_gpu(
    stand_in: CudaBackend, command_gpu: CudaBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LADDERS, "attention", [LADDERS["attention"][0], LADDERS["attention"][2]])
    shapes = [a for n in (3, 5) for a in ("--shape", f"n={n},num_heads=2,H=1,D=64")]
    picture = tmp_path / "ladder.png"
    done = invoke("ladder", "attention", *shapes, "--dtype", "f32", "--plot", str(picture))
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    assert re.search(r"^n=5, s=5, num_heads=2, H=1, D=64$", done.stdout, re.M)
    assert len(re.findall(r"^\| online +\| +0\.0", done.stdout, re.M)) == 2
    assert "\nonline: one kernel without a score matrix, by an online softmax\n    should gain: half the" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(LADDERS, "attention", [_wrong(LADDERS["attention"][0])])
    done = invoke("ladder", "attention", *shapes, "--dtype", "f32", "-o", "json")
    assert done.exit_code == 1
    assert [row["wrong"] for row in json.loads(done.stdout)["rows"]] == [True, False, True, False]


@needs_matplotlib
def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="no rung of this table has a time"):
        plot_ladder([{"rung": "naive", "s": 512, "milliseconds": None}], "", tmp_path / "x.png")


def test_the_tables_of_the_document_are_filled() -> None:
    rows: list[dict[str, Any]] = []
    for s, taken in ((512, 0.5), (16384, 2500.0)):
        rows.append(dict(ladder="attention", rung="naive", s=s, milliseconds=taken, foretold_milliseconds=taken / 2,
                         teraflops=1.0, times_lowest=1.0))  # fmt: skip
        rows.append(dict(ladder="attention", rung="torch", s=s, milliseconds=None, teraflops=None, times_lowest=None))
    rows.append(dict(model="m", what="first token", attention="naive", tokens=512, problem="out of GPU memory"))
    found = attention_ladder.tables(rows)
    assert "| naive | 500 µs (250 µs) | 2.50 s (1.25 s) |" in found["prefill"]
    assert "| torch | -               | -               |" in found["prefill"]
    assert "| first token | naive        | -          |" in found["model"]
    document = "".join(f"<!-- table: {name} -->\nold\n<!-- end -->\ntext\n" for name in found)
    filled = attention_ladder.fill(document, found)
    assert "old" not in filled
    assert filled.count("text") == len(found)
    assert attention_ladder.fill(filled, found) == filled
    with pytest.raises(ValueError, match="the document has 0 places for the table 'prefill'"):
        attention_ladder.fill("", found)


def test_the_tables_of_the_document_are_those_of_the_newest_results() -> None:
    document = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    newest = max((ROOT / "benchmarks" / "results").glob("*-attention-ladder.json"))
    rows = json.loads(newest.read_text(encoding="utf-8"))["results"]
    assert attention_ladder.fill(document, attention_ladder.tables(rows)) == document


def test_the_small_cases_are_checked_in_float32_too() -> None:
    for ladder, rungs in LADDERS.items():
        cases = rungs[0].op.cases
        found = [(w.dtype, w.call["n"]) for w in case_workloads(rungs[0], ladder, "bf16")]
        assert found == [(T, case["n"]) for T in ("bf16", "f32") for case in cases]
