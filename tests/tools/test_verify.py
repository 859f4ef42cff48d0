"""The verification script itself, on kernels run by the emulator."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.ops import OPS
from tests.fakes import FakeGpu, HostCublas
from tools import verify


def _backend() -> CudaBackend:
    backend = CudaBackend("f32", gpu=FakeGpu(emulate=True, cublas=HostCublas()))
    backend.checking = True
    return backend


def test_right_kernels_pass_and_their_errors_are_listed() -> None:
    table, problems = verify.verify(_backend(), ["rms_norm", "add"], compare=True)
    assert problems == []
    assert table["rms_norm"].keys() == {"f32", "f16", "bf16"}
    for T, entry in table["rms_norm"].items():
        assert 0 < entry["errors"][T] <= OPS["rms_norm"].allowed(T, T)
        assert entry["cases"] >= 10
    text = verify.report({"environment": {"gpu": "x"}, "speeds": {}, "ops": table, "problems": problems})
    assert re.search(r"^rms_norm +bf16 +bf16 +11 +[12]\.\d+e-03 +3\.9e-03$", text, re.M), text
    assert "0 problems" in text


def test_a_kernel_that_writes_nothing_is_caught() -> None:
    backend = CudaBackend("f32", gpu=FakeGpu())
    table, problems = verify.verify(backend, ["add"], compare=True)
    assert table["add"]["f32"]["wrong"] == table["add"]["f32"]["cases"] == len(problems)


def test_an_op_without_kernels_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(OPS, dict)
    monkeypatch.setitem(OPS, "add", replace(OPS["add"], kernels=None))
    assert verify.verify(_backend(), ["add"], compare=True) == ({}, ["add: no kernel"])
