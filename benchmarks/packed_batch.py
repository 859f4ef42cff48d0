"""Products of packed weights for a batch: ``python -m benchmarks.packed_batch [--sweep] [--out FILE]``.

The four weight matrices of a layer of the 8B, 9 to 64 rows of x in bf16, packed formats beside cuBLAS on the plain
weight: microseconds, share of the read peak, TFLOP/s. Times are those of a replayed graph over copies of the weight
that are 200 MB or more together. A kernel is first checked on small products. --sweep times other ways to share the
work between the warps as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES
from cuplama.lab.check import BackendExecutor, WrongResultError, check, run_guarded
from cuplama.lab.peaks import Peaks, measure
from cuplama.lab.timing import Replay
from cuplama.lab.workloads import case_workload, normal_values
from cuplama.ops import OPS
from cuplama.ops.launch import Device, Plan
from cuplama.ops.linear_packed_many import Shape, many_rows_plan
from cuplama.ops.op import Call, Op
from cuplama.ops.signature import OpError
from cuplama.quant.catalog import CATALOG, random_stored
from cuplama.quant.packed import Packed, pack
from cuplama.quant.stored import Segment

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (16, 32, 64)
FORMATS = ("int4 g128", "fp8", "fp8 g128", "Q4_K")
SWEEP = [
    Shape(2, 2, 8), Shape(2, 1, 12, wgmma=True), Shape(2, 2, 12, wgmma=True),
    Shape(4, 1, 12, wgmma=True), Shape(4, 2, 12, wgmma=True),
    Shape(8, 1, 8, wgmma=True), Shape(8, 1, 12, wgmma=True), Shape(8, 1, 12, wgmma=True, depth=3),
    Shape(8, 2, 8, wgmma=True), Shape(8, 2, 12, wgmma=True),
]  # fmt: skip
ROTATED_BYTES = 200 << 20
REPEATS = 20


def op_for(name: str, shapes: Sequence[Shape] = ()) -> Op:
    """The op with the kernels for many rows alone, and no library."""

    def kernels(call: Call, device: Device) -> Plan:
        plan = many_rows_plan(name, call, device, shapes)
        if plan is None:
            raise OpError("no plan: too little shared memory")
        return plan

    return replace(OPS[name], kernels=kernels, matmul=None)


def check_small(backend: CudaBackend, form: str, n: int, shapes: Sequence[Shape]) -> None:
    """Raises WrongResultError if small products are wrong: with a bias into both dtypes, and with a residual."""
    executor = BackendExecutor(backend)
    for name, U, m in (("linear", "T", 300), ("linear", "f32", 1040), ("linear_add", "f32", 700)):
        case = {"n": n, "m": m, "k": 1416, "b": True, "W": form} | ({"U": U} if name == "linear" else {})
        workload = replace(case_workload(OPS[name], case, "bf16"), op=op_for(name, shapes))
        arrays = workload.arrays()
        check(workload, arrays, run_guarded(workload, arrays, executor))


def random_weight(form: str, m: int, k: int) -> Packed:
    """A packed weight in host memory; its rows repeat, so that it is made in no time."""
    packing = CATALOG[form].packing
    assert packing is not None
    some = pack(random_stored(CATALOG[form], 128, k, np.random.default_rng(0), deviation=0.02))
    scales = 0 if packing.group else 4 * 128
    blocks, rest = some[: some.size - scales], some[some.size - scales :]
    data = np.concatenate([np.tile(blocks, m // 128), np.tile(rest, m // 128)])
    return Packed((m, k), (Segment(m, CATALOG[form], data),))


def packed_rows(backend: CudaBackend, peaks: Peaks, form: str, name: str, sweep: bool) -> Iterator[dict[str, Any]]:
    """Times of one format and one matrix."""
    m, k = SHAPES[name]
    weight = random_weight(form, m, k)
    nbytes = weight.segments[0].data.nbytes
    copies = [backend.upload(weight) for _ in range(-(-ROTATED_BYTES // nbytes) + 1)]
    for n in ROWS:
        x = backend.upload(normal_values(np.random.default_rng(1), (n, k), DTYPES["bf16"], 1.0))
        groups = next(g for g in (2, 4, 6, 8) if 8 * g >= n)
        tried: list[Sequence[Shape]] = [()]
        tried += [(s,) for s in SWEEP if sweep and s.groups == groups]
        for shapes in tried:
            label = f"{form} {shapes[0]}" if shapes else form
            try:
                if name == "qkv":
                    check_small(backend, form, n, shapes)
                op = op_for("linear", shapes)
                calls = [partial(backend.call, op, (x, w, None), {"U": "bf16"}) for w in copies]
                seconds = Replay(backend, calls).seconds(REPEATS).median
            except (OpError, WrongResultError) as e:
                print(f"{label} {name} {n} rows: {e}", file=sys.stderr, flush=True)
                continue
            yield result(peaks, label, name, n, nbytes, seconds)


def cublas_rows(backend: CudaBackend, peaks: Peaks, name: str) -> Iterator[dict[str, Any]]:
    """Times of cuBLAS with the plain weight."""
    m, k = SHAPES[name]
    gpu: Any = backend.gpu
    host = np.tile(normal_values(np.random.default_rng(0), (128, k), DTYPES["bf16"], 0.02), (m // 128, 1))
    copies = [backend.upload(host) for _ in range(-(-ROTATED_BYTES // host.nbytes) + 1)]
    for n in ROWS:
        x = backend.upload(normal_values(np.random.default_rng(1), (n, k), DTYPES["bf16"], 1.0))
        y = backend.zeros((n, m), DTYPES["bf16"])
        product = gpu.cublas.product(n, m, k, "bf16", "bf16")
        if product is None:
            continue
        calls = [partial(product, gpu.address(x), gpu.address(w), gpu.address(y)) for w in copies]
        yield result(peaks, "cuBLAS bf16", name, n, host.nbytes, Replay(backend, calls).seconds(REPEATS).median)


def result(peaks: Peaks, label: str, name: str, n: int, nbytes: int, seconds: float) -> dict[str, Any]:
    m, k = SHAPES[name]
    return {
        "weight": name, "rows": n, "kernel": label, "microseconds": round(seconds * 1e6, 2),
        "percent_read": round(peaks.percent_read(nbytes / seconds), 1),
        "teraflops": round(2 * n * m * k / seconds / 1e12, 1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file as well")
    parser.add_argument("--sweep", action="store_true", help="other ways to share the work as well")
    parser.add_argument("--formats", default=",".join(FORMATS), help="names of quant/catalog.py, with commas")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    backend = CudaBackend("bf16")
    peaks = measure(backend)
    print(json.dumps(peaks.fields()), flush=True)
    for name in SHAPES:
        found = [cublas_rows(backend, peaks, name)]
        found += [packed_rows(backend, peaks, form, name, args.sweep) for form in args.formats.split(",")]
        for row in (row for part in found for row in part):
            rows.append(row)
            print(json.dumps(row), flush=True)
    for n in ROWS:
        for kernel in dict.fromkeys(row["kernel"] for row in rows):
            mine = [r["microseconds"] for r in rows if r["rows"] == n and r["kernel"] == kernel]
            if len(mine) == len(SHAPES):
                print(f"{n} rows, the four weights of a layer: {kernel} {sum(mine):.1f} us")
    backend.close()
    record(rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
