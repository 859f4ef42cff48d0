"""Pairs of experts with packed weights, in all ways: ``python -m benchmarks.packed_experts [--out FILE]``.

The two products of a layer of gpt-oss-20b and of Qwen3-30B-A3B for prompts of several lengths, in bf16:

- "in tiles of ..." pairs codes become numbers inside the product (cuda_src/experts_many_*.cu): of up to 256 on
  Hopper, else 128, or less where experts have few;
- "scratch": unpacked first, for the kernels of plain weights (unpack.cu, experts_many_*.cu);
- "streamed", up to 64 pairs for each expert: for up to 8 or 16 pairs of an expert at a time (experts_packed.cu),
  or less where shared memory is short;
- "plain, in tiles of ...": experts_many_*.cu on plain weights, which is what "scratch" would take if unpacking were
  free.

Times are those of a replayed graph; a product is first checked on small cases. --skew: how unevenly experts are chosen;
0 is by chance alone.

``WAYS`` in cuplama/ops/experts_packed.py has the pairs for each expert at which "in tiles" begins to be faster than
"streamed", and "scratch" than "in tiles"; ``up_to`` there those at which taller tiles do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.packed_batch import random_weight
from benchmarks.record import record
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES, Array
from cuplama.lab.check import BackendExecutor, WrongResultError, check, run_guarded
from cuplama.lab.timing import Replay
from cuplama.lab.workloads import case_workload, normal_values
from cuplama.ops import OPS
from cuplama.ops.experts import packed_ways
from cuplama.ops.experts_packed import Ways
from cuplama.ops.op import Op
from cuplama.ops.route import sort_pairs
from cuplama.quant.packed import Packed

TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
REPEATS = 10
_ALWAYS = 1 << 30  # pairs for each expert
KNOBS = {"expert_linear_clamped_swiglu": {"alpha": 1.702, "limit": 7.0}}
_STREAMED = 64  # pairs for each expert up to which blocks are streamed
HEIGHTS = (256, 64)  # pairs of a tile, at most
WAYS = {
    **{f"in tiles of {rows}": Ways(0, rows=rows) for rows in HEIGHTS},
    "scratch": Ways(0, in_tiles=False),
    **{f"streamed, {rows} rows": Ways(_STREAMED, in_tiles=False, streamed_rows=rows) for rows in (8, 16)},
}


@dataclass(frozen=True)
class Shape:
    """A product of a layer: y[n*s,m] of x[n,k]. s: experts of a row; 1 where x has a row for each pair."""

    model: str
    op: str
    experts: int
    each: int
    m: int
    k: int
    formats: tuple[str, ...]

    @property
    def parts(self) -> int:
        """Rows of w for a column of y."""
        return 1 if self.op == "expert_linear" else 2


_QWEN = ("int4 g128", "fp8 g128", "fp8", "int8")
SHAPES = (
    Shape("gpt-oss-20b gate_up", "expert_linear_clamped_swiglu", 32, 4, 2880, 2880, ("mxfp4",)),
    Shape("gpt-oss-20b down", "expert_linear", 32, 4, 2880, 2880, ("mxfp4",)),
    Shape("qwen3-30b-a3b gate_up", "expert_linear_silu_mul", 128, 8, 768, 2048, _QWEN),
    Shape("qwen3-30b-a3b down", "expert_linear", 128, 8, 2048, 768, _QWEN),
)


def check_small(backend: CudaBackend, shape: Shape, form: str) -> None:
    """Raises WrongResultError if small products are wrong: of a few tall tiles, of many, and of streamed ones."""
    tiles = [Ways(0, rows=rows) for rows in HEIGHTS]
    streamed = [Ways(_ALWAYS, streamed_rows=rows) for rows in (8, 16)]
    for n, E, m, k, some in (
        (900, 3, 144, 712, tiles),
        (700, 9, 336, 1160, tiles),
        (90, 7, 144, 712, streamed),
        (40, 3, 336, 2880, streamed),
    ):
        case = {"n": n, "s": 2, "E": E, "m": m, "k": k, "b": True, "W": form, **KNOBS.get(shape.op, {})}
        workload = case_workload(OPS[shape.op], case, "bf16")
        arrays = workload.arrays()
        for way in some:
            workload = replace(workload, op=packed_ways(OPS[shape.op], way))
            check(workload, arrays, run_guarded(workload, arrays, BackendExecutor(backend)))


def pairs_of(shape: Shape, tokens: int, skew: float) -> tuple[Any, Any]:
    """The sorted pairs of that many tokens, and where those of each expert begin."""
    rng = np.random.default_rng(tokens)
    scores = skew * rng.standard_normal(shape.experts) + rng.gumbel(size=(tokens, shape.experts))
    chosen = np.argsort(-scores, axis=1)[:, : shape.each].astype(np.int32)
    if shape.op == "expert_linear":  # of what the product before gave, which has a row for each pair
        chosen = chosen.reshape(-1, 1)
    pairs, offsets = sort_pairs.reference(chosen, E=shape.experts)
    return pairs, offsets


def ways(backend: CudaBackend, shape: Shape, form: str) -> Iterator[tuple[str, Op, Array]]:
    """What is timed: its name, the op, and the weights on the device."""
    E, rows = shape.experts, shape.parts * shape.m
    op, packed = OPS[shape.op], random_weight(form, E * rows, shape.k)
    w = backend.upload(Packed((E, rows, shape.k), packed.segments))
    for name, way in WAYS.items():
        yield name, packed_ways(op, way), w
    del w
    some = normal_values(np.random.default_rng(0), (1, rows, shape.k), DTYPES["bf16"], 0.02)
    plain = backend.upload(np.tile(some, (E, 1, 1)))
    for rows in HEIGHTS:
        yield f"plain, in tiles of {rows}", packed_ways(op, Ways(rows=rows)), plain


def times(backend: CudaBackend, shape: Shape, form: str, skew: float) -> Iterator[dict[str, Any]]:
    """Times of one product in one format."""
    for way, op, w in ways(backend, shape, form):
        for tokens in TOKENS:
            if way.startswith("streamed") and tokens * shape.each > _STREAMED * shape.experts:
                continue
            pairs, offsets = map(backend.upload, pairs_of(shape, tokens, skew))
            rows = tokens * (shape.each if shape.op == "expert_linear" else 1)
            x = backend.upload(normal_values(np.random.default_rng(1), (rows, shape.k), DTYPES["bf16"], 1.0))
            body = partial(backend.call, op, (x, w, pairs, offsets, None), KNOBS.get(shape.op, {}))
            seconds = Replay(backend, [body]).seconds(REPEATS).median
            flops = 2 * tokens * shape.each * shape.parts * shape.m * shape.k
            yield {
                "product": shape.model, "format": form, "way": way, "tokens": tokens,
                "pairs of an expert": tokens * shape.each // shape.experts,
                "microseconds": round(seconds * 1e6, 1), "teraflops": round(flops / seconds / 1e12, 1),
            }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file as well")
    parser.add_argument("--skew", type=float, default=0.0, help="how unevenly experts are chosen")
    parser.add_argument("--only", default="", help="products whose names contain this")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    backend = CudaBackend("bf16")
    for shape in (s for s in SHAPES if args.only in s.model):
        for form in shape.formats:
            try:
                check_small(backend, shape, form)
            except WrongResultError as e:
                print(f"{shape.model} in {form}: {e}", file=sys.stderr, flush=True)
                continue
            for row in times(backend, shape, form, args.skew):
                rows.append(row)
                print(json.dumps(row), flush=True)
    backend.close()
    record(rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
