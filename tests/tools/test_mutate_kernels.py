"""What is put into the kernels on purpose is where its table says, and what finds it is counted."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cuplama.simt.emulator import CUDA_SRC
from tools import mutate_kernels
from tools.kernel_edits import EDITS, EQUIVALENT
from tools.mutate_kernels import Mutation, mutations, report

ONE = Mutation("a.cu", 7, "i < n", "i <= n | 0", "")


@pytest.mark.parametrize(("file", "old", "new"), EDITS)
def test_an_edit_has_one_place_and_changes_it(file: str, old: str, new: str) -> None:
    assert (CUDA_SRC / file).read_text().count(old) == 1
    assert old != new


def test_every_barrier_and_every_edit_is_a_mutation() -> None:
    found = list(mutations())
    barriers = sum(p.read_text().count("__syncthreads();") for p in CUDA_SRC.glob("*.cu*"))
    assert sum(m.old == "__syncthreads();" for m in found) == barriers > 30
    assert [(m.file, m.old, m.new) for m in found[-len(EDITS) :]] == list(EDITS)
    for mutation in found:
        assert mutation.text != (CUDA_SRC / mutation.file).read_text()


def test_every_reason_is_that_of_a_mutation() -> None:
    explained = {(m.file, m.equivalent) for m in mutations() if m.equivalent}
    assert explained == {(file, reason) for file, _, reason in EQUIVALENT}
    for file, around, _ in EQUIVALENT:
        assert (CUDA_SRC / file).read_text().count(around) == 1


@pytest.mark.parametrize(("old", "times"), [("no such text", 0), ("__global__", 2)])
def test_an_edit_without_its_one_place_stops_the_run(monkeypatch: pytest.MonkeyPatch, old: str, times: int) -> None:
    monkeypatch.setattr(mutate_kernels, "EDITS", (("norm.cu", old, ";"),))
    message = f"norm.cu has the text '{old}' {(CUDA_SRC / 'norm.cu').read_text().count(old)} times, not once"
    assert (CUDA_SRC / "norm.cu").read_text().count(old) >= times
    with pytest.raises(SystemExit, match=re.escape(message)):
        list(mutations())


def test_survivors_count_against_and_what_cannot_be_noticed_does_not() -> None:
    unseen = replace(ONE, line=8, equivalent="nothing reads it")
    judged = [(ONE, "race: x"), (ONE, "wrong result: y"), (ONE, None), (ONE, "compile-error: z"), (unseen, None)]
    text, rate = report(judged)
    assert rate == 0.5
    assert text.splitlines()[2] == ("2 of 4 mutations killed (50%); 1 more change nothing that a test could notice.")
    assert text.splitlines()[6:] == [
        r"| a.cu:7: i < n -> i <= n \| 0 | killed | race: x |",
        r"| a.cu:7: i < n -> i <= n \| 0 | killed | wrong result: y |",
        r"| a.cu:7: i < n -> i <= n \| 0 | SURVIVED |  |",
        r"| a.cu:7: i < n -> i <= n \| 0 | NO KERNEL | compile-error: z |",
        r"| a.cu:8: i < n -> i <= n \| 0 | equivalent | nothing reads it |",
    ]
