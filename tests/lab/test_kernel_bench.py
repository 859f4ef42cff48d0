"""``kernels bench`` on a stand-in GPU whose kernels the emulator runs: what is checked, counted, timed and shown."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.errors import ParameterError
from cuplama.lab import kernel_bench, report
from cuplama.lab.check import WrongResultError
from cuplama.lab.dummy import dummy_model
from cuplama.lab.timing import Spread
from cuplama.lab.trials import UNTIL_REPLAYED, Runs
from cuplama.lab.workloads import decode_workloads, prompt_workloads, shape_workload
from cuplama.models.config import parse_config
from cuplama.ops import OPS
from tests.lab.common import EXPERTS, PEAKS, TINY, invoke, needs_matplotlib


def test_a_row_is_arithmetic_on_the_median() -> None:
    case = replace(shape_workload(OPS["linear"], {"n": 1, "m": 1000, "k": 1000}, "bf16"), count=7, weights=("o",))
    bytes_, operations = case.call.nbytes(), 2 * 1000 * 1000
    other = ("cuBLAS", Spread((3e-6,)))
    found = kernel_bench.row(case, Spread((1e-6, 2e-6, 9e-6)), other, PEAKS)
    assert found["microseconds"] == pytest.approx(2)
    assert found["total_microseconds"] == pytest.approx(14)
    assert found["gigabytes_per_second"] == pytest.approx(bytes_ / 2e-6 / 1e9)
    assert found["percent_of_read_bandwidth"] == pytest.approx(100 * bytes_ / 2e-6 / 4e12)
    assert found["teraflops"] == pytest.approx(operations / 2e-6 / 1e12)
    assert found["alternative_microseconds"] == pytest.approx(3)
    assert kernel_bench.row(case, Spread((1e-6,)), None, PEAKS)["alternative"] is None
    assert "| decode" not in report.render(kernel_bench.COLUMNS, [found], "md")
    assert "| linear | o " in report.render(kernel_bench.COLUMNS, [found], "md")


def test_a_pass_says_how_much_the_ops_explain() -> None:
    step = kernel_bench.PassTime("decode", "a step of 1 at 512 tokens", 0.0009, 0.001)
    assert str(step) == (
        "decode: a step of 1 at 512 tokens: the ops add up to 0.9 ms; measured 1 ms (90%)"
    )  # fmt: skip


def test_a_whole_model_is_checked_and_timed(gpu: CudaBackend) -> None:
    config = parse_config(TINY)
    chosen = decode_workloads(config, "f32", depth=70) + prompt_workloads(config, "f32", 12)
    said: list[str] = []
    rows = kernel_bench.bench(gpu, chosen, PEAKS, said.append)
    assert len(rows) == len(chosen) == len(said)
    assert {r["op"] for r in rows} == {c.op.name for c in chosen}
    assert all(r["microseconds"] > 0 for r in rows)
    assert {r["alternative"] for r in rows if r["weights"] == "down_proj"} == {"cuBLAS"}
    assert [list(r) for r in rows] == [list(rows[0])] * len(rows)
    found = kernel_bench.result(gpu, rows, PEAKS, [kernel_bench.PassTime("decode", "x", 1.0, 2.0)])
    again = json.loads(
        report.render(kernel_bench.COLUMNS, rows, "json", {k: v for k, v in found.items() if k != "rows"})
    )
    assert again["passes"] == [{"graph": "decode", "what": "x", "summed_ms": 1000.0, "measured_ms": 2000.0}]
    assert again["rows"] == rows


def test_experts_are_timed_without_a_library_beside_them(gpu: CudaBackend) -> None:
    chosen = [w for w in decode_workloads(parse_config(EXPERTS), "f32", depth=3) if w.op.name.startswith("expert")]
    rows = kernel_bench.bench(gpu, chosen, PEAKS)
    assert {r["weights"] for r in rows} == {"experts.gate_up_proj", "experts.down_proj"}
    assert {r["alternative"] for r in rows} == {None}


def test_a_kernel_that_writes_nothing_is_refused(gpu: CudaBackend) -> None:
    gpu.gpu.emulate = False  # type: ignore[attr-defined]
    case = shape_workload(OPS["add"], {"n": 1, "d": 100}, "f32")
    with pytest.raises(WrongResultError, match="100 of 100 elements of y are wrong"):
        kernel_bench.bench(gpu, [case], PEAKS)
    assert gpu.checking is False


def test_bench_on_a_gpu(command_gpu: CudaBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke("bench", "rms_norm", "--shape", "n=2,d=64", "--shape", "n=3,d=8", "--dtype", "f32", "-o", "json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found.keys() == {"command", "environment", "peaks", "passes", "rows"}
    assert [r["shape"] for r in found["rows"]] == ["n=2 d=64", "n=3 d=8"]
    assert found["rows"][0]["microseconds"] == pytest.approx(10)  # a replay of four launches
    monkeypatch.setattr(Runs, "generation", lambda self, trial: (1.0, 1e-3 * trial.generated))
    monkeypatch.setattr(Runs, "prompt", lambda self, trial: 2e-3)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    args = ["--model", str(tmp_path), "--dtype", "f32", "--depth", "70", "--prompt", "12"]
    done = invoke("bench", *args)
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    assert re.search(r"^\| decode +\| linear_add +\| down_proj ", done.stdout, re.M)
    assert re.search(r"^decode: a step of 1 at 70 tokens: the ops add up to .* measured 1 ms", done.stdout, re.M)
    assert re.search(r"^prefill: a prompt of 12 tokens: the ops add up to .* measured 2 ms", done.stdout, re.M)
    unused = invoke("bench", "add", *args)
    assert isinstance(unused.exception, ParameterError)
    assert re.search(r" does not use add; it uses: advance, append_attention, ", str(unused.exception))
    large = invoke("bench", "rms_norm", "--shape", "d=100000", "--dtype", "f32")
    assert str(large.exception) == "rms_norm: d is 100000; the kernel takes at most 16384"


def test_cupyx_times_stand_beside_the_replayed_one(command_gpu: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cupyx.profiler is given: the op itself, on the arrays of the GPU, as CuPy's documentation has it."""
    asked: list[Any] = []

    def benchmark(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **_: Any) -> Any:
        asked.append((func, [a.shape for a in args], kwargs))
        return SimpleNamespace(cpu_times=np.array([9e-6, 3e-6, 4e-6]), gpu_times=np.array([[7e-6, 6e-6, 8e-6]]))

    monkeypatch.setitem(sys.modules, "cupyx.profiler", SimpleNamespace(benchmark=benchmark))
    args = ["bench", "rms_norm", "--shape", "n=2,d=64", "--dtype", "f32"]
    done = invoke(*args, "--timer", "cupyx", "-o", "json")
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    (row,) = json.loads(done.stdout)["rows"]
    assert row["cupyx_cpu_microseconds"] == pytest.approx(4)
    assert row["cupyx_gpu_microseconds"] == pytest.approx(7)
    assert row["microseconds"] == pytest.approx(10)
    assert asked == [(OPS["rms_norm"], [(2, 64), (64,)], {"eps": 1e-5, "offset": 0})]
    table = invoke(*args, "--timer", "cupyx").stdout
    assert re.search(r"\| +µs \| cupyx CPU µs \| cupyx GPU µs \| +GB/s \|", table)
    assert "cupyx" not in invoke(*args).stdout
    assert len(asked) == 2


@needs_matplotlib
def test_the_roofline_is_drawn(command_gpu: CudaBackend, tmp_path: Path) -> None:
    done = invoke("bench", "linear", "--shape", "n=1,m=8,k=8", "--dtype", "f32", "--plot", str(tmp_path / "roof.png"))
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_kernel_is_refused_on_a_gpu(command_gpu: CudaBackend) -> None:
    command_gpu.gpu.emulate = False  # type: ignore[attr-defined]
    done = invoke("bench", "add", "--shape", "n=2,d=8", "--dtype", "f32")
    assert done.exit_code == 1
    assert "refused: add f32 n=2 d=8: 16 of 16 elements of y are wrong, the first at [0, 0]: nan, not" in done.stderr
    assert "µs" not in done.stdout


def test_passes_are_measured_where_the_ops_were(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with dummy_model(str(tmp_path), "numpy", "auto", 200, 200) as model:
        rows = [{"graph": g, "total_microseconds": t} for g, t in (("decode", 5.0), ("decode", 6.0), ("prefill", 9.0))]
        decode, prompt = kernel_bench.pass_times(model, rows, 1, 70, 20, repeats=1)
    assert decode.summed == pytest.approx(11e-6)
    assert prompt.summed == pytest.approx(9e-6)
    assert decode.measured > 0
    assert prompt.measured > 0


def test_a_pass_counts_once_it_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The median is of the repeats alone: not of the plain runs and the capturing one before them."""
    prompts = iter([9.0] * UNTIL_REPLAYED + [0.2, 0.5, 0.3])
    steps = iter([9.0] * UNTIL_REPLAYED + [6.4, 12.8, 3.2])
    monkeypatch.setattr(Runs, "prompt", lambda self, trial: next(prompts))
    monkeypatch.setattr(Runs, "generation", lambda self, trial: (1.0, next(steps)))
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with dummy_model(str(tmp_path), "numpy", "auto", 200, 200) as model:
        decode, prompt = kernel_bench.pass_times(model, [], 1, 70, 20, repeats=3)
    assert prompt.measured == pytest.approx(0.3)
    assert decode.measured == pytest.approx(0.1)  # of 64 steps
    assert next(prompts, None) is next(steps, None) is None
