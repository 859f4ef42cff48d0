"""A candidate against the baseline: what is accepted, that both take turns, and the interval of the ratio."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.errors import ParameterError
from cuplama.folders import source_folder
from cuplama.lab import compare, report
from cuplama.lab.check import WrongResultError, planned
from cuplama.lab.timing import Spread
from cuplama.lab.workloads import shape_workload
from cuplama.ops import OPS
from cuplama.ops.abstract import abstract
from cuplama.ops.launch import Device
from tests.lab.common import candidate, invoke


def test_the_interval_of_a_ratio() -> None:
    rng = np.random.default_rng(1)
    tree, other = 2e-6 * (1 + 0.05 * rng.random(40)), 1e-6 * (1 + 0.05 * rng.random(40))
    ratio, low, high = compare.ratio_interval(list(tree), list(other))
    assert low < ratio < high
    assert ratio == pytest.approx(2, rel=0.02)
    assert high - low < 0.1
    same = compare.ratio_interval([1.0, 2.0, 1.0, 2.0] * 5, [2.0, 1.0, 2.0, 1.0] * 5)
    assert same[1] < 1 < same[2]
    case = shape_workload(OPS["add"], {}, "f32")
    for bounds, verdict in (((1.01, 1.2), "faster"), ((0.8, 0.99), "slower"), ((0.9, 1.1), "no difference")):
        assert compare.Comparison(case, Spread((1.0,)), Spread((1.0,)), 1.0, *bounds).verdict == verdict


def test_a_candidate_has_kernels_of_the_op_with_parameters_that_have_values(tmp_path: Path) -> None:
    found = compare.candidate_op(candidate(tmp_path), OPS["add"], "f32", Device())
    assert found.name == "add of mine.cu"
    case = replace(shape_workload(OPS["add"], {"n": 2, "d": 30}, "f32"), op=found)
    (launch,) = planned(case, case.ins, Device(), abstract)[0]
    assert launch.file == str(tmp_path / "mine.cu")
    assert launch.expression == "add"
    with pytest.raises(ParameterError, match=r"mine\.cu has none of the kernels that rms_norm launches: rms_norm"):
        compare.candidate_op(tmp_path / "mine.cu", OPS["rms_norm"], "f32", Device())
    (tmp_path / "new.cu").write_text((tmp_path / "mine.cu").read_text().replace("int n, int d)", "int d, int rows)"))
    with pytest.raises(ParameterError, match=r"new\.cu does not fit .* add: .*no value for parameter rows"):
        compare.candidate_op(tmp_path / "new.cu", OPS["add"], "f32", Device())
    with pytest.raises(ParameterError, match=r"cannot read .*absent\.cu"):
        compare.candidate_op(tmp_path / "absent.cu", OPS["add"], "f32", Device())


def test_candidate_and_baseline_take_turns(gpu: CudaBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for header in source_folder().glob("*.cuh"):
        shutil.copy(header, tmp_path)
    monkeypatch.setattr(compare, "cache_bytes", lambda backend: 1000)
    chosen = [shape_workload(OPS["add"], {"n": 2, "d": 30}, "f32")]
    right = compare.candidate_op(candidate(tmp_path), OPS["add"], "f32", Device())
    (found,) = compare.compare(gpu, right, chosen, chosen, repeats=6)
    assert len(found.baseline.values) == len(found.candidate.values) == 6
    assert (found.ratio, found.verdict) == (1.0, "no difference")
    shown = report.render(compare.COMPARE_COLUMNS, [compare.compare_row(found)], "md")
    assert "| no difference |" in shown
    (tmp_path / "wrong.cu").write_text((tmp_path / "mine.cu").read_text().replace("+= other", "-= other"))
    wrong = compare.candidate_op(tmp_path / "wrong.cu", OPS["add"], "f32", Device())
    with pytest.raises(WrongResultError, match=r"add of wrong\.cu f32 n=2 d=30: \d+ of 60 elements of y are wrong"):
        compare.compare(gpu, wrong, chosen, chosen, repeats=6)
    assert "add of wrong.cu" not in OPS


def test_compare_on_a_gpu(command_gpu: CudaBackend, tmp_path: Path) -> None:
    for header in source_folder().glob("*.cuh"):
        shutil.copy(header, tmp_path)
    args = ["--op", "add", "--dtype", "f32", "--shape", "n=2,d=8"]
    done = invoke("compare", str(candidate(tmp_path)), *args)
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    assert re.search(r"^\|  +\| add +\| n=2 d=8 .*\| 1.0000 to 1.0000 \| no difference \|$", done.stdout, re.M)
    done = invoke("compare", str(candidate(tmp_path, "+= other", "-= other")), *args)
    assert done.exit_code == 1
    assert "refused: add of mine.cu f32" in done.stderr
