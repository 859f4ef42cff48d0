"""Attention of decode steps of many sequences: ``python -m benchmarks.attention_batches [--blocks W,K,S,P ...]``.

``append_attention`` in bf16 with the heads of Llama 3.1 8B and 3.2 1B, microseconds of a launch in a replayed graph of
many, on caches that exceed the L2 cache together, and GB/s. A row for what ``cuplama/ops/decode_blocks.py`` chooses,
and one for each of --blocks: warps of a block, keys of a split, stages of a ring, blocks of a multiprocessor. Each is
judged against the op's reference first. ``--out FILE`` writes the rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.fp8_cache import workload
from benchmarks.record import record
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.lab.check import backend_checker
from cuplama.lab.timing import cache_bytes, rotation, time_workload
from cuplama.lab.workloads import shape_workload
from cuplama.models.presets import find_shape
from cuplama.ops import OPS, decode_blocks

# shape, sequences, keys of each, what the cache holds
SIZES = (
    ("llama-3.1-8b", 512, 576, "T"), ("llama-3.1-8b", 64, 512, "T"), ("llama-3.1-8b", 64, 2048, "T"),
    ("llama-3.1-8b", 16, 512, "T"), ("llama-3.1-8b", 512, 16, "T"), ("llama-3.1-8b", 512, 576, "e4m3"),
    ("llama-3.2-1b", 512, 576, "T"), ("llama-3.2-1b", 64, 512, "T"),
)  # fmt: skip
_OP = OPS["append_attention"]


def measure(blocks: tuple[int, ...] | None) -> dict[str, Any]:
    """A row. Raises WrongResultError if a kernel computes something else than the reference."""
    chosen = decode_blocks.BLOCKS
    if blocks is not None:
        decode_blocks.BLOCKS = ((0, decode_blocks.DecodeBlocks(*blocks)),)
    backend = CudaBackend("bf16")
    row: dict[str, Any] = {"blocks": blocks or "chosen"}
    try:
        checker = backend_checker(backend)
        for D, b in ((128, 2), (64, 70)):
            for C in ("T", "e4m3"):
                checker.check(
                    shape_workload(_OP, {"num_heads": 32, "H": 8, "D": D, "length": 300, "b": b, "C": C}, "bf16")
                )
        for shape, sequences, keys, C in SIZES:
            one = workload(find_shape(shape)[1], sequences, keys, C)
            ins = rotation(backend, one, one.arrays(), cache_bytes(backend))
            seconds = time_workload(backend, one, ins).median
            name = f"{shape} {sequences} x {keys}" + (" e4m3" if C == "e4m3" else "")
            row[name] = {"microseconds": 1e6 * seconds, "gb_per_s": one.call.nbytes() / seconds / 1e9}
            del ins
    finally:
        backend.close()
        decode_blocks.BLOCKS = chosen
    print(row["blocks"], *(f"{v['microseconds']:.1f}" for v in row.values() if isinstance(v, dict)), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="*", default=[], metavar="W,K,S,P")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    asked = [None, *(tuple(map(int, blocks.split(","))) for blocks in args.blocks)]
    record([measure(blocks) for blocks in asked], args.out)


if __name__ == "__main__":
    main()
