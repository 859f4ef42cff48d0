"""Ops from a user's own folder: found, located, seen anew after a change, and refused in one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cuplama import ops
from cuplama.errors import CuplamaError, ParameterError
from cuplama.lab.cases import check_op
from cuplama.lab.check import WrongResultError
from cuplama.ops.op import Op
from cuplama.ops.outside import is_outside, load_all
from cuplama.ops.prototypes import prototypes
from tests.paths import ROOT

_OP = """
import numpy as np
from dataclasses import dataclass
from cuplama.ops import Op
from cuplama.ops.launch import Launch, Plan
from cuplama.ops.norm import rms_norm

@dataclass
class Unrelated:
    size: int = 1

twice = Op(
    "twice",
    "y[n]:f32 = (x[n]:f32)",
    doc="y = 2 x",
    reference=lambda x: 2 * x,
    kernels=lambda call, device: Plan((Launch("twice.cu:twice", (-(-call["n"] // 128),), (128,)),)),
    cases=[dict(n=5), dict(n=300)],
)
"""
_SOURCE = """
#include "factor.cuh"
#include "common.cuh"
__global__ void twice(const float* x, float* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = FACTOR * x[i];
}
"""
needs_emulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An op, its kernel and a header, all in a folder of the user's."""
    (tmp_path / "twice.cu").write_text(_SOURCE)
    (tmp_path / "factor.cuh").write_text("#define FACTOR 2.0f\n")
    (tmp_path / "mine.py").write_text(_OP)
    return tmp_path / "mine.py"


def test_an_op_is_loaded_with_its_kernels_beside_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = ops.load(file)
    assert isinstance(twice, Op)
    assert twice.name not in ops.OPS
    assert np.array_equal(twice(np.arange(3, dtype=np.float32)), [0, 2, 4])
    monkeypatch.chdir(file.parent)
    for name in ("mine.py", "mine.py:twice", str(file)):
        found = ops.load(name)
        assert found.kernels is not None
        (launch,) = found.kernels(found.bind([np.ones(5, np.float32)], {}), None).launches  # type: ignore[arg-type]
        assert launch.kernel == f"{file.parent}/twice.cu:twice"


@needs_emulator
def test_a_loaded_op_is_judged_and_a_change_is_seen(file: Path) -> None:
    assert check_op(ops.load(file)) == "right on 2 cases, on the emulator"
    (file.parent / "factor.cuh").write_text("#define FACTOR 3.0f\n")
    with pytest.raises(WrongResultError, match=r"^twice f32 n=5: 5 of 5 elements of y are wrong"):
        check_op(ops.load(file))
    file.write_text(_OP.replace("2 * x", "3 * x"))
    assert check_op(ops.load(file)) == "right on 2 cases, on the emulator"


def test_a_source_whose_parameters_change_is_read_again(file: Path) -> None:
    source = file.parent / "twice.cu"
    assert [p.name for p in prototypes(str(source))["twice"].parameters] == ["x", "y", "n"]
    source.write_text(_SOURCE.replace("int n)", "int n, float extra)"))
    os.utime(source, ns=(1, 1))
    assert [p.name for p in prototypes(str(source))["twice"].parameters] == ["x", "y", "n", "extra"]


def test_several_ops_are_told_apart_by_name(file: Path) -> None:
    file.write_text(_OP + _OP.partition("twice = ")[2].replace("Op(", "thrice = Op(", 1).replace('"twice"', '"thrice"'))
    assert list(load_all(file)) == ["twice", "thrice"]
    assert ops.load(f"{file}:thrice").name == "thrice"
    with pytest.raises(ParameterError, match=r"has several ops, twice, thrice: name one, as in .*mine\.py:twice$"):
        ops.load(file)
    with pytest.raises(ParameterError, match=r"mine\.py has no op 'once'; it has twice, thrice$"):
        ops.load(f"{file}:once")


def test_what_cannot_be_loaded_is_refused_in_one_line(file: Path) -> None:
    for text, message in (
        ("x = 1", "declares no op: it has no object of the class cuplama.ops.Op"),
        ("from cuplama.ops.norm import rms_norm", "declares no op"),
        ("raise KeyError('k')", "cannot be loaded: KeyError: 'k'"),
        ("def f(:", "cannot be loaded: SyntaxError: "),
        (_OP.replace("y[n]:f32 =", "y[n]:f31 ="), "cannot be loaded: ValueError: y has the dtype f31; it may be f64, "),
    ):
        file.write_text(text)
        with pytest.raises(ParameterError, match=message) as caught:
            ops.load(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(ParameterError, match=r"there is no file /absent/op\.py$"):
        ops.load("/absent/op.py")


@needs_emulator
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("twice.cu:twice", "absent.cu:twice", r"^a launch names absent\.cu:twice, and there is no file /.*absent\.cu$"),
        ("twice.cu:twice", "twice.cu:thrice", r"^/.*/twice\.cu has no kernel 'thrice'; it has twice$"),
        ("twice.cu:twice", "twice", r"^a launch names 'twice'; a kernel is named as in file\.cu:kernel$"),
        ('call["n"]', 'call["m"]', "^twice has no size or attribute 'm'; it has n$"),
        ("int n)", "short n)", r"^/.*twice\.cu: twice: n is of type short; a number may be int, unsigned, float, "),
        ("int n)", "int count)", r"^/.*twice\.cu: twice: no value for parameter count$"),
        ("float* y", "int* y", r"^/.*twice\.cu: twice: y is float32, the kernel takes i32\*$"),
        ("[dict(n=5), dict(n=300)]", "[]", r"^twice declares no cases to check it on: cases=\[dict\(n=5\), \.\.\.\]$"),
    ],
)
def test_what_does_not_fit_together_is_said_in_one_line(file: Path, before: str, after: str, message: str) -> None:
    file.write_text(_OP.replace(before, after))
    (file.parent / "twice.cu").write_text(_SOURCE.replace(before, after))
    with pytest.raises(CuplamaError, match=message):
        check_op(ops.load(file))


def test_which_names_are_files() -> None:
    assert is_outside("my_op.py")
    assert is_outside("folder/my_op.py:NAME")
    assert not is_outside("rms_norm")
    assert not is_outside("norm.cu")


def test_the_example_is_one() -> None:
    hard_tanh = ops.load(ROOT / "examples" / "own_op" / "hard_tanh.py")
    assert hard_tanh.name == "hard_tanh"
    assert hard_tanh.name not in ops.OPS  # its texts say that it is not part of cuplama
