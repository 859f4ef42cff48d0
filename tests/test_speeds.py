"""What the fast tests still cover."""

from __future__ import annotations

from collections import Counter

from cuplama.folders import source_folder
from tests import speeds
from tests.ops.test_ops import _WITH_KERNELS
from tests.paths import ROOT


def test_the_fast_cases_launch_every_kernel_once_or_twice() -> None:
    """Of those that the emulator's device, an sm_90, launches at all; and they are few."""
    fast = speeds.fast_cases(_WITH_KERNELS)
    everything = [speeds.launched(*case)[0] for case in _WITH_KERNELS]
    runs = Counter(kernel for i in fast for kernel in everything[i])
    assert runs.keys() == frozenset[str]().union(*everything)
    dtypes = {kernel: {_WITH_KERNELS[i][2] for i, k in enumerate(everything) if kernel in k} for kernel in runs}
    assert all(runs[kernel] >= min(2, len(dtypes[kernel])) for kernel in runs)
    assert len(fast) < len(_WITH_KERNELS) / 5
    assert {kernel.split(":")[0] for kernel in runs} <= {path.name for path in source_folder().glob("*.cu")}


def test_the_smallest_cases_are_chosen() -> None:
    cases = [case for case in _WITH_KERNELS if case[0].name == "rms_norm"]
    fast = speeds.fast_cases(cases)
    work = [speeds.launched(*case)[1] for case in cases]
    assert min(range(len(cases)), key=lambda i: work[i]) in fast


def test_the_files_and_functions_of_slow_tests_are_there() -> None:
    for name in speeds.FIRST_ALONE:
        file, _, function = name.partition("::")
        assert f"def {function or 'test_'}" in (ROOT / "tests" / file).read_text(encoding="utf-8")
