"""Breaks the kernels on purpose and counts how many of the breaks the op tests find on the emulator.

    .venv/bin/python -m tests.simt.mutate [-k TEXT] [--report tests/simt/mutations.md]

Each mutation is one edit of one file in ``cuda_src/``: every ``__syncthreads();`` is deleted in turn, and the edits in
``EDITS`` are made. The ops whose launches use that file then run their test cases on a copy with the edit, until one
fails. A mutation that no case notices has survived, unless ``EQUIVALENT`` explains why none can. Exit status 1 if fewer
than 95% are killed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cuplama.kernel import BoundLaunch, Device, bind
from cuplama.op import DTYPES, Op
from tests.ops import harness
from tests.ops.harness import Case

from .emulator import CUDA_SRC, KernelFault, precompile, run

WANTED = 0.95

# (file, text that occurs once, replacement). The text may span lines; `...` in a report is cut.
EDITS: tuple[tuple[str, str, str], ...] = (
    # `<` to `<=` in bounds checks, and limits that are one too large or too small
    ("common.cuh", "if (at + i < size) row[at + i] = x.v[i];", "if (at + i <= size) row[at + i] = x.v[i];"),
    ("common.cuh", "x.v[i] = at + i < size ? row", "x.v[i] = at + i <= size ? row"),
    ("common.cuh", "wide && at + W <= size) return load", "wide && at <= size) return load"),
    ("common.cuh", "wide && at + W <= size) return store", "wide && at <= size) return store"),
    ("common.cuh", "lanes = WARP / 2; lanes > 0; lanes /= 2) x +=", "lanes = WARP / 4; lanes > 0; lanes /= 2) x +="),
    ("common.cuh", "x = warp_sum(lane < warps ?", "x = warp_sum(lane <= warps ?"),
    ("activation.cu", "* 8; i < f;", "* 8; i <= f;"),
    ("activation.cu", "* 8; i < size;", "* 8; i <= size;"),
    ("activation.cu", "const bool wide = f % 8 == 0 && aligned(x, y);", "const bool wide = aligned(x, y);"),
    ("attention.cu", "if (threadIdx.x < here) {", "if (threadIdx.x <= here) {"),
    ("embedding.cu", "const bool wide = d % 8 == 0 && aligned(table, x);", "const bool wide = aligned(table, x);"),
    ("embedding.cu", "positions + i64(pos[blockIdx.x]) * d", "positions + i64(pos[blockIdx.x] + 1) * d"),
    ("residual.cu", "x + i64(rows[blockIdx.x]) * d", "x + i64(rows[blockIdx.x] + 1) * d"),
    ("linear.cu", "if (r < ROWS && i < m)", "if (r < ROWS && i <= m)"),
    ("linear.cu", "if (r < ROWS && i < m)", "if (r <= ROWS && i < m)"),
    ("linear.cu", "for (; at + (DEPTH - 1) * STEP < k;", "for (; at + (DEPTH - 1) * STEP <= k;"),
    ("linear.cu", "if (at + i * STEP < k) last", "if (at + i * STEP <= k) last"),
    ("linear.cu", "min(column + o, m - 1)", "min(column + o, m)"),
    ("linear.cu", "for (int p = 1; p < SPLIT; p++)", "for (int p = 1; p <= SPLIT; p++)"),
    ("kv_cache.cu", "at < 2 * H * D; at", "at <= 2 * H * D; at"),
    ("rope.cu", "at < columns; at", "at <= columns; at"),
    ("rope.cu", "at < turned && i < 2 * h", "at < turned && i <= 2 * h"),
    ("norm.cu", "if (index >= i64(n)", "if (index > i64(n)"),
    ("norm.cu", "squares += at + j < d ?", "squares += at + j <= d ?"),
    ("decode.cu", "i < b; i += blockDim.x", "i <= b; i += blockDim.x"),
    ("attention.cu", "h < here && c < D ?", "h <= here && c < D ?"),
    ("attention.cu", "for (int tile = begin; tile < end;", "for (int tile = begin; tile <= end;"),
    ("attention.cu", "min(tile + u * ROWS + row, end - 1)", "min(tile + u * ROWS + row, end)"),
    ("attention.cu", "const float p = tile + j < end ?", "const float p = tile + j <= end ?"),
    ("attention.cu", "const bool there = token < fresh;", "const bool there = token <= fresh;"),
    ("attention.cu", "high - 1);\n                held[u]", "high);\n                held[u]"),
    ("attention.cu", "if (distance < 0 ||", "if (distance <= 0 ||"),
    ("attention.cu", "distance >= window)", "distance > window)"),
    ("attention.cu", "for (int s = row; s < count; s += ROWS)", "for (int s = row; s <= count; s += ROWS)"),
    ("attention.cu", "length > window ? length - window : 0", "length > window ? length - window + 1 : 0"),
    # the page table
    ("kv_cache.cu", "slots[blockIdx.x] / S, place", "slots[blockIdx.x] / S + 1, place"),
    ("kv_cache.cu", "page * H + head % H", "page * H + head % H + 1"),
    ("decode.cu", "min(at / S, M - 1)] * S", "min(at / S + 1, M - 1)] * S"),
    # factors, operands, lanes
    ("kv_cache.cu", "head < H ? k : v", "head < H ? v : k"),
    ("rope.cu", "low ? -to_float(partner.v[j])", "low ? to_float(partner.v[j])"),
    ("rope.cu", "low ? at + h : at - h", "low ? at + h : at + h"),
    ("norm.cu", "inverse * to_float(scale[c].v[j])", "to_float(scale[c].v[j])"),
    ("linear.cu", "if (lane == r * OUTS + o) mine", "if (lane == r + OUTS * o) mine"),
    ("attention.cu", "to_float(query[h * D + c]) * (scale * LOG2_E)", "to_float(query[h * D + c]) * LOG2_E"),
    ("attention.cu", "acc[h][i] *= shrink[h];", "acc[h][i] *= 1.f;"),
    ("attention.cu", "shrink[h] = exp2f(before - most);", "shrink[h] = exp2f(most - before);"),
    ("attention.cu", "if (lane % SAME == 0 && first + i < Q)", "if (lane % SAME == 1 && first + i < Q)"),
    ("attention.cu", "distance >= LANES; distance /= 2)", "distance > LANES; distance /= 2)"),
    ("activation.cu", "const T* up = gate + f;", "const T* up = gate + f + 1;"),
)  # fmt: skip


# (file, text around the edit, why no test can notice it). These do not count.
EQUIVALENT: tuple[tuple[str, str, str], ...] = (
    ("activation.cu", "* 8; i < f;", "load_row and store_row do nothing at i == f"),
    ("activation.cu", "* 8; i < size;", "load_row and store_row do nothing at i == size"),
    (
        "attention.cu",
        "h < here && c < D ?",
        "row `here` of q is read from x within bounds, and its sums are not written",
    ),
    ("attention.cu", "for (int tile = begin; tile < end;", "one more tile whose p are all zero"),
    (
        "attention.cu",
        "__syncthreads();  // score and shrink may be written again",
        "a row of score is read and written again by one warp alone, ordered by reduce_scatter's shuffles; shrink is"
        " written behind the next barrier",
    ),
    (
        "common.cuh",
        "x = warp_max(partial[lane < warps ? lane : 0]);\n    __syncthreads();",
        "no kernel calls block_max twice; the barrier is for one that does",
    ),
    (
        "sampling.cu",
        "x += partial[i];\n    __syncthreads();",
        "block_sum of integers is called once; the barrier is for a kernel that calls it twice",
    ),
    (
        "sampling.cu",
        "above = found_above;\n    __syncthreads();",
        "every path from here to the next write of found passes another barrier, in descend or gather",
    ),
    (
        "sampling.cu",
        "__shared__ int count;\n    __syncthreads();",
        "between the read of count and the next gather lie the barriers of find_bin",
    ),
)


@dataclass(frozen=True)
class Mutation:
    file: str
    line: int
    old: str
    new: str
    text: str  # of the whole file
    equivalent: str | None = None  # why it cannot be noticed

    @property
    def name(self) -> str:
        old, new = (" ".join(s.split()) or "(nothing)" for s in (self.old, self.new))
        return f"{self.file}:{self.line}: {old} -> {new}"


def mutations() -> Iterator[Mutation]:
    for path in sorted(CUDA_SRC.glob("*.cu*")):
        text = path.read_text()
        for match in re.finditer(r"__syncthreads\(\);", text):
            line = text.count("\n", 0, match.start()) + 1
            mutated = text[: match.start()] + ";" + text[match.end() :]
            yield Mutation(path.name, line, match[0], "", mutated, _reason(path.name, text, match.start()))
    for file, old, new in EDITS:
        text = (CUDA_SRC / file).read_text()
        if text.count(old) == 0:
            print(f"STALE  {file} no longer has the text {old!r}: bring EDITS up to date", flush=True)
            continue
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


class _Recorder:
    """An executor that only notes what would be launched."""

    def __init__(self) -> None:
        self.device = Device()
        self.bound: list[BoundLaunch] = []

    def upload(self, array: np.ndarray[Any, Any]) -> Any:
        return array

    def download(self, array: Any) -> np.ndarray[Any, Any]:
        return np.asarray(array)

    def launch(self, bound: BoundLaunch) -> None:
        self.bound.append(bound)


class _Mutated(_Recorder):
    """The emulator, with some files from a copy of the sources."""

    def __init__(self, folder: Path, files: set[str]) -> None:
        super().__init__()
        self.folder, self.files = folder, files

    def launch(self, bound: BoundLaunch) -> None:
        run(bound, folder=self.folder if bound.file in self.files else None, timeout=20)


@dataclass(frozen=True)
class Job:
    op: Op
    case: Case
    T: str
    kernels: tuple[tuple[str, str], ...]  # (file, expression)


def jobs() -> list[Job]:
    """Every case of every op with kernels, bf16 first: it is what most models use."""
    found = []
    for op, case, T in harness.all_cases(lambda op: op.kernels is not None):
        ins = harness.random_inputs(op, case, T)
        recorder = _Recorder()
        assert op.kernels is not None
        call = harness.bind_inputs(op, case, ins)
        plan = op.kernels(call, recorder.device)
        for spec in op.signature.outs:
            if spec.name not in op.signature.in_place:
                call.arrays[spec.name] = np.empty(call.shape(spec), call.dtype(spec))
        scratch = {name: np.empty(shape, DTYPES[dtype]) for name, (shape, dtype) in plan.scratch.items()}
        bound = [bind(launch, call, scratch) for launch in plan.launches]
        found.append(Job(op, case, T, tuple((b.file, b.expression) for b in bound)))
    return sorted(found, key=lambda j: ("bf16", "f32", "f16").index(j.T))


def files_of(mutation: Mutation) -> set[str]:
    """The kernel files that an edit can change: of a header, those that name the edited function."""
    if mutation.file.endswith(".cu"):
        return {mutation.file}
    before = "\n".join(mutation.text.splitlines()[: mutation.line])
    function = re.findall(r"__device__[^;{=]*?\b(\w+)\(", before)[-1]
    return {p.name for p in CUDA_SRC.glob("*.cu") if re.search(rf"\b{function}\b", p.read_text())}


def verdict(mutation: Mutation, all_jobs: list[Job]) -> str | None:
    """What found the mutation, one line, or None."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in CUDA_SRC.glob("*.cu*"):
            shutil.copy(path, folder)
        (folder / mutation.file).write_text(mutation.text)
        files = files_of(mutation)
        mine = [j for j in all_jobs if any(f in files for f, _ in j.kernels)]
        executor = _Mutated(folder, files)
        # The first cases find most; only the rest is worth one big compilation.
        for now in (mine[:1], mine[1:4], *([j for j in mine[4:] if j.T == T] for T in ("bf16", "f32", "f16"))):
            try:
                precompile([k for j in now for k in j.kernels if k[0] in files], folder=folder)
                for job in now:
                    ins = harness.random_inputs(job.op, job.case, job.T)
                    outs = harness.run_kernels(job.op, job.case, ins, executor)
                    harness.check(job.op, job.case, job.T, ins, outs)
            except KernelFault as fault:
                return str(fault).splitlines()[0].replace(str(folder), "cuda_src")
            except AssertionError as error:
                return f"wrong result: {str(error).splitlines()[0]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="only mutations whose description contains this text")
    parser.add_argument("--report", type=Path, help="also write a Markdown table")
    options = parser.parse_args()
    chosen = [m for m in mutations() if options.k in m.name]
    with tempfile.TemporaryDirectory() as cache:  # mutated objects are of no use later
        os.environ["XDG_CACHE_HOME"] = cache
        return _report(chosen, options.report)


def _report(chosen: list[Mutation], path: Path | None) -> int:
    all_jobs = jobs()
    rows, killed, counted = [], 0, 0
    for mutation in chosen:
        start = time.monotonic()
        found = verdict(mutation, all_jobs)
        outcome = "killed" if found else "equivalent" if mutation.equivalent else "SURVIVED"
        killed += outcome == "killed"
        counted += outcome != "equivalent"
        explained = found or mutation.equivalent or ""
        print(f"{outcome}  {mutation.name}  [{time.monotonic() - start:.0f} s]\n    {explained[:200]}", flush=True)
        cells = (mutation.name, outcome, explained[:160])
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    rate = killed / max(1, counted)
    summary = f"{killed} of {counted} mutations killed ({rate:.0%})"
    if counted < len(chosen):
        summary += f"; {len(chosen) - counted} more change nothing that a test could notice"
    print(summary)
    if path is not None:
        head = [
            "# Mutations of the kernels and what finds them",
            "",
            summary + ".",
            "",
            "| edit | outcome | by |",
            "|---|---|---|",
        ]
        path.write_text("\n".join([*head, *rows]) + "\n")
    return 0 if rate >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
