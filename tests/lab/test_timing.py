"""Timing an op alone: copies of its inputs, and going through them."""

from __future__ import annotations

from typing import Any

import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.lab.timing import copies, rotation, time_workload
from cuplama.lab.workloads import shape_workload
from cuplama.ops import OPS


def test_copies_exceed_the_cache_but_not_the_memory() -> None:
    cache = 50 << 20
    assert copies(64 << 20, 64 << 20, cache) == 3
    assert copies(1 << 20, 1 << 20, cache) == 64
    assert copies(4096, 4096, cache) == 64
    assert copies(4096, 1 << 30, cache) == 2
    assert copies(4 << 30, 4 << 30, cache) == 1
    assert copies(1 << 30, 1 << 30, 0) == 1


def test_inputs_rotate(gpu: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(gpu, "call", lambda op, ins, attrs: seen.append(id(ins[0])))
    case = shape_workload(OPS["add"], {"n": 1, "d": 100}, "f32")  # 800 bytes; the cache holds 1,000
    time_workload(gpu, case, rotation(gpu, case, case.arrays(), 1000))
    assert len(set(seen)) == 4
    assert seen[:4] == seen[4:8]
