"""Breaks the kernels on purpose and counts how many of the breaks the op tests find on the emulator.

    .venv/bin/python -m tools.mutate_kernels [-k TEXT] [--report build-mutations.md]

Each mutation is one edit of one file in ``cuda_src/``: every ``__syncthreads();`` is deleted in turn, as is every other
barrier and wait (``WAITS``), and the edits in ``kernel_edits.py`` are made. The ops whose launches use that file then
run their test cases on a copy with the edit, until one fails. A mutation that no case notices has survived, unless
``EQUIVALENT`` explains why none can. The report is a table in Markdown, a row per mutation. Exit status 1 if fewer than
95% are killed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cuplama.dtypes import Array
from cuplama.lab.check import WrongResultError, check, planned, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload
from cuplama.ops import OPS
from cuplama.ops.abstract import abstract
from cuplama.ops.binding import BoundLaunch
from cuplama.ops.launch import Device
from cuplama.ops.weights import segments_of
from cuplama.simt.emulator import CUDA_SRC, KernelFault, precompile, run
from tests.backends.cuda import test_loading, test_unpacking
from tests.ops import (
    harness,
    test_attention,
    test_bias,
    test_experts_combine,
    test_ops,
    test_optimizer,
    test_self_attention_hopper,
    test_small_gpu,
)
from tools.kernel_edits import EDITS, EQUIVALENT

__all__ = ["Mutation", "main", "mutations", "report"]

WANTED = 0.95
PROCESSES = 2
WAITS = re.compile(
    r"(__syncthreads|__syncwarp|cp_async_wait<\d+>|bar_sync|mbarrier_wait|mbarrier_arrive)\((?:[^;{()]|\([^()]*\))*\);"
)


@dataclass(frozen=True)
class Mutation:
    """One edit of one file of kernels."""

    file: str
    line: int
    old: str
    new: str
    text: str  # of the whole file
    equivalent: str | None = None  # why it cannot be noticed

    @property
    def name(self) -> str:
        """Where it is and what it does, on one line."""
        old, new = (" ".join(s.split()) or "(nothing)" for s in (self.old, self.new))
        return f"{self.file}:{self.line}: {old} -> {new}"


def mutations() -> Iterator[Mutation]:
    """Every mutation of the kernels. Raises SystemExit if the text of an edit is not where it was."""
    for path in sorted(CUDA_SRC.glob("*.cu*")):
        if path.name in ("ptx.cuh", "ptx_wgmma.cuh"):
            continue  # the emulator has its own; here these are definitions
        text = path.read_text()
        for match in WAITS.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            mutated = text[: match.start()] + ";" + text[match.end() :]
            yield Mutation(path.name, line, match[0], "", mutated, _reason(path.name, text, match.start()))
    for file, old, new in EDITS:
        text = (CUDA_SRC / file).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{file} has the text {old!r} {text.count(old)} times, not once: bring EDITS up to date")
        at = text.index(old)
        mutated = text[:at] + new + text[at + len(old) :]
        yield Mutation(file, text.count("\n", 0, at) + 1, old, new, mutated, _reason(file, text, at))


def _reason(file: str, text: str, at: int) -> str | None:
    """The reason in EQUIVALENT whose text covers position `at` of the file."""
    for name, around, reason in EQUIVALENT:
        if name == file:
            if around not in text:
                continue  # its mutation, if there still is one, counts again
            if text.index(around) <= at < text.index(around) + len(around):
                return reason
    return None


class _Mutated(EmulatedDevice):
    """The emulator, with some files from a copy of the sources. seed: of the order of threads."""

    def __init__(self, folder: Path, files: set[str], device: Device | None = None, seed: int = 0) -> None:
        super().__init__(device)
        self.folder, self.files, self.seed = folder, files, seed

    def launch(self, bound: BoundLaunch) -> None:
        folder = self.folder if bound.file in self.files else None
        run(bound, folder=folder, timeout=20, seed=self.seed, arch=self.device.arch)


class _MutatedAndShifted(_Mutated):
    """The same with arrays that begin where 16-byte accesses are not allowed."""

    def upload(self, array: Array) -> Any:
        return test_ops.shifted(array) if segments_of(array) is None else super().upload(array)


@dataclass(frozen=True)
class Job:
    """A workload for a device. kernels: (file, expression) of its launches; unaligned: arrays at odd addresses."""

    workload: Workload
    device: Device
    kernels: tuple[tuple[str, str], ...]
    unaligned: bool = False

    def run(self, folder: Path, files: set[str], seed: int) -> None:
        """Run it with the mutated files of ``folder`` and judge the result."""
        executor = (_MutatedAndShifted if self.unaligned else _Mutated)(folder, files, self.device, seed)
        arrays = self.workload.arrays()
        check(self.workload, arrays, run_guarded(self.workload, arrays, executor))


def _read_sum(folder: Path) -> None:
    """The kernel that measures the bandwidth: no op of the registry has it."""
    x = np.random.default_rng(1).integers(0, 1000, (2500, 4)).astype(np.uint32)
    y = np.zeros(1, np.uint32)
    args = (x, y, len(x))
    launch: Any = SimpleNamespace(
        file="peaks.cu", expression="read_sum", grid=(1, 1, 1), block=(256, 1, 1), shared=0, args=args
    )
    run(launch, folder=folder, timeout=20)
    assert y[0] == x.sum(dtype=np.uint32), f"read_sum: {y[0]}, not {x.sum(dtype=np.uint32)}"


def _bias(folder: Path) -> None:
    """The kernels that prepare a bias for cuBLAS: no op of the registry has them."""
    for case in test_bias.CASES:
        test_bias.check_biases(_Mutated(folder, {"bias.cu"}), *case)


def _pack(folder: Path) -> None:
    """The kernels that pack a quantised weight when it is loaded."""
    for name in test_loading.LAYOUTS:
        test_loading.check_layout(name, folder)
    for layout, k in test_loading.STACKED:
        test_loading.check_stack(layout, k, folder)


def _unpack(folder: Path) -> None:
    """The kernel that prepares a packed weight for cuBLAS."""
    for case in test_unpacking.CASES:
        test_unpacking.check_unpacked(_Mutated(folder, {"unpack.cu"}), *case)


def _parts(folder: Path) -> None:
    """The kernels of the optimizer on parts of flat arrays."""
    for T in ("f32", "bf16"):
        test_optimizer.check_parts(_Mutated(folder, {"optimizer.cu"}), T)


def _rounds(folder: Path) -> None:
    """Hopper's backward of attention with many tiles of keys."""
    for D, sms, lengths, window in test_self_attention_hopper.ROUNDS:
        device = Device(90, sms=sms)
        executor = _Mutated(folder, {"attention_backward_wgmma.cu"}, device, seed=1)
        test_self_attention_hopper.check_rounds(executor, D, lengths, window)


def _reads_ahead(folder: Path) -> None:
    """Products with experts that are read before x is there, which only a backend grants."""
    executor = _Mutated(folder, {"experts_packed.cu"}, test_experts_combine.SHORT_OF_MEMORY, seed=1)
    for n, m, k in test_experts_combine.AHEAD:
        test_experts_combine.check_reading_ahead(executor, n, m, k)


def _rows_without_keys(folder: Path) -> None:
    """A decode step that is not full, by the kernels of prompts: only a deterministic device takes these for it."""
    for T, D, arch in test_attention.BLIND:
        files = {f"attention_prefill_{way}.cu" for way in ("fma", "mma", "wgmma")}
        test_attention.check_rows_without_keys(_Mutated(folder, files, Device(arch, deterministic=True)), T, D, 0)


BESIDE_THE_OPS: dict[str, Callable[[Path], None]] = {
    "bias.cu": _bias, "pack.cu": _pack, "optimizer.cu": _parts, "peaks.cu": _read_sum,
    "unpack.cu": _unpack, "attention_backward_wgmma.cu": _rounds, "attention_backward_wgmma.cuh": _rounds,
    "attention_backward_keys.cuh": _rounds,
    "experts_packed.cu": _reads_ahead, "attention.cuh": _rows_without_keys,
}  # fmt: skip


def _job(workload: Workload, device: Device, unaligned: bool = False) -> Job:
    bound = planned(workload, workload.ins, device, abstract)[0]
    return Job(workload, device, tuple((b.file, b.expression) for b in bound), unaligned)


def jobs() -> list[Job]:
    """Every case of every op with kernels, bf16 first: it is what most models use. Then those of small GPUs, which are
    quick, before the other cases, and the unaligned arrays last."""
    found = [_job(harness.workload(*case), Device()) for case in harness.all_cases(lambda op: op.kernels is not None)]
    small = [
        _job(harness.workload(OPS[name], case, T), device)
        for name, case, device in test_small_gpu.CASES
        for T in ("bf16", "f32")
    ]
    unaligned = [_job(workload, Device(), unaligned=True) for workload in test_ops.unaligned_workloads()]
    return small + sorted(found, key=lambda j: ("bf16", "f32", "f16").index(j.workload.dtype)) + unaligned


def files_of(mutation: Mutation) -> set[str]:
    """The kernel files that an edit can change: of a header, those that include it and, by themselves or through
    another header of theirs, name the edited function; all that include it if none does."""
    if mutation.file.endswith(".cu"):
        return {mutation.file}
    before = "\n".join(mutation.text.splitlines()[: mutation.line])
    function = re.findall(r"__device__[^;{=]*?\b(\w+)\(", before)[-1]
    texts = {p.name: p.read_text() for p in CUDA_SRC.glob("*.cu*")}

    def included(file: str) -> set[str]:
        near = set(re.findall(r'#include "(\w+\.cuh)"', texts[file]))
        return near.union(*(included(f) for f in near))

    users = {f: included(f) for f in texts if f.endswith(".cu") and mutation.file in included(f)}
    naming = {
        file
        for file, headers in users.items()
        if any(re.search(rf"\b{function}\b", texts[f]) for f in {file, *headers} - {mutation.file})
    }
    return naming or set(users)


def _run(now: list[Job], files: set[str], folder: Path) -> None:
    precompile([k for j in now for k in j.kernels if k[0] in files], folder=folder)
    for job in now:
        # Other orders of threads, as in tests/ops/test_attention.py: thread 0 need not come first.
        for seed in (0, 1, 2) if len(now) < 4 else (0,):
            job.run(folder, files, seed)


def _caught(test: Callable[[], None]) -> str | None:
    """What a test says when it fails."""
    try:
        test()
    except KernelFault as fault:
        return str(fault).splitlines()[0]
    except (AssertionError, WrongResultError) as error:
        return f"wrong result: {(str(error).splitlines() or ['an assertion without words'])[0]}"
    return None


def verdict(mutation: Mutation, all_jobs: list[Job]) -> str | None:
    """What found the mutation, one line, or None."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "cuda_src"  # as faults name it
        folder.mkdir()
        for path in CUDA_SRC.glob("*.cu*"):
            shutil.copy(path, folder)
        (folder / mutation.file).write_text(mutation.text)
        files = files_of(mutation)
        mine = [j for j in all_jobs if any(f in files for f, _ in j.kernels)]
        # The first cases find most, and many at once are cheaper to compile.
        cu_seqlens = [0, 1, 4, *range(12, len(mine), 24), len(mine)]
        batches = [mine[i:j] for i, j in itertools.pairwise(cu_seqlens) if i < j]
        tests: list[Callable[[], None]] = [partial(_run, now, files, folder) for now in batches]
        if mutation.file in BESIDE_THE_OPS:
            tests.append(partial(BESIDE_THE_OPS[mutation.file], folder))
        for test in tests:
            if found := _caught(test):
                return found.replace(str(folder), "cuda_src")
    return None


@cache
def _all_jobs() -> list[Job]:
    return jobs()


def _timed(mutation: Mutation) -> tuple[str | None, float]:
    start = time.monotonic()
    return verdict(mutation, _all_jobs()), time.monotonic() - start


def outcome(mutation: Mutation, found: str | None) -> str:
    """In a word. found: what ``verdict`` said."""
    if found and found.startswith("compile-error"):
        return "NO KERNEL"  # not to be counted as found by a test
    return "killed" if found else "equivalent" if mutation.equivalent else "SURVIVED"


def report(judged: Sequence[tuple[Mutation, str | None]]) -> tuple[str, float]:
    """The report in Markdown, and the share of mutations that are killed. Equivalent ones do not count."""
    outcomes = [outcome(*each) for each in judged]
    killed, counted = outcomes.count("killed"), len(outcomes) - outcomes.count("equivalent")
    rate = killed / max(1, counted)
    summary = f"{killed} of {counted} mutations killed ({rate:.0%})"
    if counted < len(judged):
        summary += f"; {len(judged) - counted} more change nothing that a test could notice"
    lines = ["# Mutations of the kernels and what finds them", "", f"{summary}.", ""]
    lines += ["| edit | outcome | by |", "|---|---|---|"]
    for (mutation, found), word in zip(judged, outcomes, strict=True):
        cells = (mutation.name, word, (found or mutation.equivalent or "")[:160])
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n", rate


def _judge(chosen: Sequence[Mutation]) -> Iterator[tuple[Mutation, str | None]]:
    """Each with its verdict, which is printed as soon as it is there."""
    with ProcessPoolExecutor(PROCESSES) as pool:  # the emulator runs one launch at a time in a process
        for mutation, (found, seconds) in zip(chosen, pool.map(_timed, chosen), strict=True):
            explained = found or mutation.equivalent or ""
            print(f"{outcome(mutation, found)}  {mutation.name}  [{seconds:.0f} s]\n    {explained[:200]}", flush=True)
            yield mutation, found


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the root of the checkout. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="only mutations whose description contains this text")
    parser.add_argument("--report", type=Path, default=Path("build-mutations.md"), help="the table, to write")
    options = parser.parse_args(argv)
    chosen = [m for m in mutations() if options.k in m.name]
    with tempfile.TemporaryDirectory() as folder:  # mutated objects are of no use later
        os.environ["XDG_CACHE_HOME"] = folder
        text, rate = report(list(_judge(chosen)))
    options.report.write_text(text, encoding="utf-8")
    print(f"{text.splitlines()[2]} {options.report} says which.")
    return 0 if rate >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
