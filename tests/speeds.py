"""Which tests ``make test`` leaves out: those that only run more of the same, most of them on the emulator.

Compiling a kernel's instances for the CPU is what takes long on a fresh clone. So of an op's cases on the emulator the
fast ones are the smallest that together launch every kernel, and of other tests that run kernels the first of each
function. ``make test-all`` runs everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

from cuplama.dtypes import DTYPES
from cuplama.ops.abstract import attributes, described_inputs
from cuplama.ops.launch import Device
from cuplama.ops.op import Op

__all__ = ["FIRST_ALONE", "fast_cases", "launched", "mark_slow"]

# Tests whose cases compile kernels of their own, or take all models to the ends of their contexts: files, or functions
# of a file. The first case of a function is fast.
FIRST_ALONE = (
    "engine/test_deterministic.py",
    "lab/test_check.py::test_a_kernel_that_is_too_large_everywhere_is_refused",
    "lab/test_inventory.py::test_small_files_compile_cleanly_from_the_oldest_to_the_newest_arch",
    "models/test_golden.py::test_cache_for_one_sequence_runs_a_batch_in_waves",
    "models/test_routing.py::test_tokens_near_a_tie",
    "ops/test_attention.py",
    "ops/test_deterministic.py",
    "ops/test_e4m3.py",
    "ops/test_experts.py",
    "ops/test_experts_packed.py",
    "ops/test_gated_delta.py",
    "ops/test_linear_packed.py",
    "ops/test_linear_packed_many.py",
    "ops/test_ops.py::test_a_row_of_a_product_does_not_depend_on_the_others",
    "ops/test_ops.py::test_unaligned_arrays",
    "ops/test_sampling_statistics.py",
    "ops/test_self_attention.py",
    "ops/test_small_gpu.py",
    "quant/test_formats_cuh.py",
    "simt/test_adapters.py",
    "simt/test_models.py",
    "simt/test_quantised_experts.py",
)
_EMULATOR = "test_emulator"  # its parameters are an op, a case and a dtype
_RUNS = 2  # a kernel is launched by this many fast cases, of different dtypes where it can be

OpCase = tuple[Op, Mapping[str, Any], str]


def launched(op: Op, case: Mapping[str, Any], T: str) -> tuple[frozenset[str], int]:
    """The kernels that a case launches, as ``file.cu:name``, and how much work it is: threads, and elements read."""
    arrays = described_inputs(op, case, DTYPES[T])
    call = op.bind(arrays, attributes(op, case, DTYPES[T]))
    launches = op.kernels(call, Device()).launches if op.kernels is not None else ()
    work = sum(math.prod(launch.grid) * math.prod(launch.block) for launch in launches)
    return frozenset(launch.kernel for launch in launches), work + sum(a.nbytes for a in arrays if a is not None)


def fast_cases(cases: Sequence[OpCase]) -> set[int]:
    """The numbers of the smallest cases that together launch every kernel twice, where two cases do.

    The second is of another dtype than the first if there is one.
    """
    facts = [launched(*case) for case in cases]
    order = sorted(range(len(cases)), key=lambda i: facts[i][1])
    chosen: set[int] = set()
    for kernel in sorted(frozenset[str]().union(*(kernels for kernels, _ in facts))):
        able = [i for i in order if kernel in facts[i][0]]
        dtypes: list[str] = []
        for i in sorted(able, key=lambda i: i not in chosen):  # what runs anyway comes first
            if len(dtypes) < _RUNS and cases[i][2] not in dtypes:
                dtypes.append(cases[i][2])
                chosen.add(i)
    return chosen


def mark_slow(items: Iterable[pytest.Item]) -> None:
    """Give the marker ``slow`` to collected tests that ``make test`` can do without."""
    emulated: list[pytest.Function] = []
    met: set[Any] = set()
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if item.originalname == _EMULATOR:
            emulated.append(item)
        elif _where(item).endswith(FIRST_ALONE) or item.path.as_posix().endswith(FIRST_ALONE):
            if item.obj in met:
                item.add_marker(pytest.mark.slow)
            met.add(item.obj)
    fast = fast_cases([_op_case(item) for item in emulated]) if emulated else set()
    for i, item in enumerate(emulated):
        if i not in fast:
            item.add_marker(pytest.mark.slow)


def _where(item: pytest.Function) -> str:
    """The file and function of a test, without its parameters."""
    return f"{item.path.as_posix()}::{item.originalname}"


def _op_case(item: pytest.Function) -> OpCase:
    """Raises UsageError for a test that should be one of an op, a case and a dtype, and is not."""
    try:
        parameters: dict[str, Any] = item.callspec.params
        return parameters["op"], parameters["case"], parameters["T"]
    except (AttributeError, KeyError):
        raise pytest.UsageError(f"{item.nodeid}: {_EMULATOR} takes an op, a case and a dtype T") from None
