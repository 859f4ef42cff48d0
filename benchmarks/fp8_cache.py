"""Decoding with an fp8 cache beside one of 16 bits: ``python -m benchmarks.fp8_cache [--out FILE]``.

The heads of Llama 3.1 8B (or --model), bf16. First ``append_attention``, a decode step's attention: for one sequence of
1,024, 8,192 and 32,768 keys, and for 8 and 64 of 8,192, microseconds of a launch in a replayed graph of many, on caches
that exceed the L2 cache together, and its bytes per second relative to the measured read bandwidth. Before that both
are judged against the op's reference, on sequences of 300 keys. Then whole models of random weights: tokens per second
of one sequence with 32,768 tokens in the cache, and of a prompt of 2,048 tokens (--no-models leaves them out).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES
from cuplama.lab import bench, peaks
from cuplama.lab.check import backend_checker
from cuplama.lab.dummy import Source
from cuplama.lab.peaks import Peaks
from cuplama.lab.timing import cache_bytes, rotation, time_workload
from cuplama.lab.trials import Trial
from cuplama.lab.workloads import Workload, shape_workload
from cuplama.models.config import ModelConfig
from cuplama.models.presets import find_shape
from cuplama.ops import OPS
from cuplama.ops.abstract import abstract, attributes

SIZES = ((1, 1024), (1, 8192), (1, 32768), (8, 8192), (64, 8192))  # sequences, keys of each
DEPTH, PROMPT, REPEATS = 32768, 2048, 3
KINDS = {"auto": "T", "fp8": "e4m3"}  # kv_cache_dtype -> what the op's letter C is
_OP = OPS["append_attention"]


def workload(config: ModelConfig, sequences: int, keys: int, C: str) -> Workload:
    """The op at those sizes; its caches are descriptions, which random values fill without an array of float64."""
    heads = {"num_heads": config.num_heads, "H": config.num_kv_heads, "D": config.head_dim}
    asked = {**_OP.shape, **heads, "b": sequences, "length": keys, "C": C}
    assert _OP.complete is not None
    case = {**_OP.complete(asked), "q_norm": False, "k_norm": False}
    T, few = DTYPES["bf16"], {**case, "H": 1, "D": 8, "num_heads": 1, "h": 4}
    ins: dict[str, Any] = _OP.random_inputs(np.random.default_rng(0), few, T)
    pages = abstract((case["P"], case["H"], case["S"], case["D"]), DTYPES.get(C, T))
    rotation_table = np.full((case["R"], case["h"]), 0.5**0.5, np.float32)
    ins |= {"x": abstract((sequences, (case["num_heads"] + 2 * case["H"]) * case["D"]), T), "k": pages, "v": pages}
    ins |= {"cos": rotation_table, "sin": rotation_table}
    return Workload(_OP, tuple(ins[s.name] for s in _OP.signature.ins), attributes(_OP, case, T), "bf16")


def ops(backend: CudaBackend, config: ModelConfig, machine: Peaks) -> list[dict[str, Any]]:
    """A row for each size and kind. Raises WrongResultError if one computes something else than the reference."""
    heads = {"num_heads": config.num_heads, "H": config.num_kv_heads, "D": config.head_dim}
    checker, rows = backend_checker(backend), []
    for C in KINDS.values():
        checker.check(shape_workload(_OP, {**heads, "length": 300, "b": 2, "C": C}, "bf16"))
    for sequences, keys in SIZES:
        for kind, C in KINDS.items():
            one = workload(config, sequences, keys, C)
            ins = rotation(backend, one, one.arrays(), cache_bytes(backend))
            seconds, moved = time_workload(backend, one, ins).median, one.call.nbytes()
            row = {"sequences": sequences, "keys": keys, "kv_cache_dtype": kind, "microseconds": 1e6 * seconds}
            row |= {"bytes": moved, "percent_of_read_bandwidth": machine.percent_read(moved / seconds)}
            rows.append(row)
            print(
                f"append_attention, {sequences:2} x {keys:5} keys, {kind:4}: {row['microseconds']:7.1f} µs, "
                f"{row['percent_of_read_bandwidth']:.0f}% of the read bandwidth",
                flush=True,
            )
            del ins
    return rows


def models(name: str, machine: Peaks) -> list[dict[str, Any]]:
    """A row for each kind and trial of a whole model."""
    trials, rows = (Trial(0, 64, DEPTH, 1), Trial(PROMPT, 0, 0, 1)), []
    for kind in KINDS:
        room = max(t.tokens for t in trials)
        with Source(name, dummy=True, device="cuda", kv_cache_dtype=kind).open(room, room) as model:
            for trial in trials:
                row = {"kv_cache_dtype": kind, **bench.measure(model, trial, REPEATS, machine)}
                rows.append(row)
                print(f"{name}, {row['test']}, {kind}: {row['tokens_per_second']:.1f} tokens/s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--no-models", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    backend = CudaBackend("bf16")
    machine = peaks.measure(backend)
    try:
        rows = ops(backend, find_shape(args.model)[1], machine)
    finally:
        backend.close()
    if not args.no_models:
        rows += models(args.model, machine)
    record([{"peaks": machine.fields()}, *rows], args.out)


if __name__ == "__main__":
    main()
