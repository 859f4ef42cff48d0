"""Attention of decode steps of many sequences: ``python -m benchmarks.attention_batches [--blocks W,K,S,P[,A] ...]``.

``append_attention`` in bf16 with the heads of Llama 3.1 8B and 3.2 1B, and of Gemma 3 4B, whose 256 dims are a table
of their own: microseconds of a launch in a replayed graph of many, on caches that exceed the L2 cache together, and
GB/s. A row for what ``cuplama/ops/decode_blocks.py`` chooses, and one for each of --blocks: warps of a block, keys of
a split, stages of a ring (at least 1 where heads have 256 dims), blocks of a multiprocessor and, if given, keys that
are one split; with --multiply-adds a row without tensor cores for wide heads. Each is judged against the op's
reference first. ``--out FILE`` writes the rows.
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
    ("gemma-3-4b", 1, 160, "T"), ("gemma-3-4b", 1, 1024, "T"), ("gemma-3-4b", 64, 160, "T"),
    ("gemma-3-4b", 64, 1024, "T"), ("gemma-3-4b", 256, 576, "T"), ("gemma-3-4b", 64, 160, "e4m3"),
)  # fmt: skip
_OP = OPS["append_attention"]


def measure(blocks: tuple[int, ...] | None, largest: int) -> dict[str, Any]:
    """A row. largest: dims of the largest heads on tensor cores. Raises WrongResultError if a kernel computes something
    else than the reference."""
    chosen = {name: getattr(decode_blocks, name) for name in ("BLOCKS", "WIDE_BLOCKS", "MAX_TENSOR_HEAD")}
    if blocks is not None:
        decode_blocks.BLOCKS = ((0, decode_blocks.DecodeBlocks(*blocks)),)
        wide = decode_blocks.DecodeBlocks(*blocks)
        decode_blocks.WIDE_BLOCKS = ((0, wide._replace(stages=max(1, wide.stages))),)
    decode_blocks.MAX_TENSOR_HEAD = largest
    backend = CudaBackend("bf16")
    row: dict[str, Any] = {"blocks": blocks or "chosen", "largest head": largest}
    try:
        checker = backend_checker(backend)
        for D, b in ((128, 2), (64, 70), (256, 2), (256, 70)):
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
        for name, value in chosen.items():
            setattr(decode_blocks, name, value)
    print(
        row["blocks"], largest, *(f"{v['microseconds']:.1f}" for v in row.values() if isinstance(v, dict)), flush=True
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="*", default=[], metavar="W,K,S,P[,A]")
    parser.add_argument("--multiply-adds", action="store_true", help="a row without tensor cores for wide heads")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    most = decode_blocks.MAX_TENSOR_HEAD
    asked = [(None, most), *((tuple(map(int, blocks.split(","))), most) for blocks in args.blocks)]
    if args.multiply_adds:
        asked.append((None, 128))
    record([measure(*way) for way in asked], args.out)


if __name__ == "__main__":
    main()
