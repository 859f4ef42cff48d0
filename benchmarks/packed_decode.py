"""Products of packed weights while decoding: ``python -m benchmarks.packed_decode [--sweep] [--out FILE]``.

The weight matrices of a layer of Llama-3.1-8B, Llama-3.2-1B and Qwen2.5-0.5B as a decode step multiplies them, with the
norm before and the activation or the residual behind, and a lone square; 1 to 8 rows of x in bf16. Times are those of
a replayed graph over copies of the weight that are 200 MB or more together. Each format is first checked on small
products. One line of JSON for each, with the share of the read peak. --sweep times
other ways to share the work between the warps as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES, Array
from cuplama.errors import CuplamaError
from cuplama.lab.check import BackendExecutor, WrongResultError, check, run_guarded
from cuplama.lab.peaks import Peaks, measure
from cuplama.lab.timing import Replay
from cuplama.lab.workloads import case_workload, normal_values
from cuplama.ops import OPS
from cuplama.ops.launch import Device, Plan
from cuplama.ops.linear_packed import TUNING, Tuning, plan_packed
from cuplama.ops.op import Call, Op
from cuplama.ops.weights import segments_of
from cuplama.quant.catalog import CATALOG, random_stored
from cuplama.quant.packed import Packed, pack
from cuplama.quant.stored import Segment

_QKV, _UP, _DOWN = "rms_norm_linear", "rms_norm_linear_silu_mul", "linear_add"
SHAPES: dict[str, dict[str, tuple[str, int, int]]] = {
    "8b": {"qkv": (_QKV, 6144, 4096), "o": (_DOWN, 4096, 4096), "gate_up": (_UP, 14336, 4096),
           "down": (_DOWN, 4096, 14336)},
    "1b": {"qkv": (_QKV, 3072, 2048), "o": (_DOWN, 2048, 2048), "gate_up": (_UP, 8192, 2048),
           "down": (_DOWN, 2048, 8192)},
    "0.5b": {"qkv": (_QKV, 1152, 896), "o": (_DOWN, 896, 896), "gate_up": (_UP, 4864, 896),
             "down": (_DOWN, 896, 4864)},
    "square": {"8192": ("linear", 8192, 8192)},
}  # fmt: skip
"""Model -> matrix -> op, columns of y, columns of x."""

ROWS = (1, 2, 4, 8)
FORMATS = ("int4 g128", "int8 g128", "fp8", "fp8 g128", "Q4_K", "Q6_K", "nf4")
ROTATED_BYTES = 200 << 20
MAX_COPIES = 512
SWEEP = {
    "as planned": TUNING,
    "24 warps": replace(TUNING, warps=(24, 24)),
    "2 blocks ahead, none behind x": replace(TUNING, behind=0),
    "3 blocks ahead": replace(TUNING, ahead=3),
    "8 steps, or 2": replace(TUNING, steps=(8, 2)),
    "k never split": replace(TUNING, part=1 << 30),
    "norm apart": replace(TUNING, norm_rows=0),
}
"""Ways to share the work, by what is said of them."""
REPEATS = 20


def check_small(backend: CudaBackend, form: str, n: int) -> None:
    """Raises WrongResultError if small products are wrong."""
    executor = BackendExecutor(backend)
    shapes = (("linear", 300, 1416), (_DOWN, 700, 5000), (_DOWN, 270, 12000), (_QKV, 530, 2048), (_UP, 304, 1416))
    for name, m, k in shapes:
        case = {"n": n, "m": m, "k": k, "b": True, "W": form, "eps": 1e-5, "U": "T"}
        workload = case_workload(OPS[name], case, "bf16")
        arrays = workload.arrays()
        check(workload, arrays, run_guarded(workload, arrays, executor))


def upload_weight(backend: CudaBackend, form: str, m: int, k: int) -> Packed:
    """A packed weight on the GPU; its rows repeat, so that it is made in no time."""
    packing = CATALOG[form].packing
    assert packing is not None
    some = pack(random_stored(CATALOG[form], 128, k, np.random.default_rng(0), deviation=0.02))
    scales = 0 if packing.group else 4 * 128
    parts = (some[: some.size - scales], some[some.size - scales :])
    data = np.concatenate([np.resize(part, part.size // 8 * (m // 16)) for part in parts])
    assert data.size == packing.nbytes(m, k)
    return Packed((m, k), (Segment(m, CATALOG[form], backend.upload(data)),))


def tuned(name: str, tuning: Tuning) -> Op:
    """The op with the kernels of linear_packed.cu, launched so, and no library."""

    def kernels(call: Call, device: Device) -> Plan:
        segments = segments_of(call.arrays["w"])
        assert segments is not None
        constants = {"U": "bf16", "ACT": "SILU_MUL" if name == _UP else "NO_ACT"}
        return plan_packed(name.removesuffix("_silu_mul"), call, device, segments, constants, tuning)

    return replace(OPS[name], kernels=kernels, matmul=None)


def times(
    backend: CudaBackend, peaks: Peaks, model: str, form: str, rows: Sequence[int], sweep: Mapping[str, Tuning]
) -> Iterator[dict[str, Any]]:
    """Times of one format and one model."""
    rng = np.random.default_rng(1)
    for matrix, (name, m, k) in SHAPES[model].items():
        op = OPS[name]
        height = 2 * m if name == _UP else m
        first = upload_weight(backend, form, height, k)
        nbytes = first.segments[0].data.nbytes
        count = min(MAX_COPIES, -(-ROTATED_BYTES // nbytes) + 1)
        weights = [first, *(_copied(backend, first) for _ in range(count - 1))]
        for n in rows:
            x = normal_values(rng, (n, k), DTYPES["f32" if "norm" in name else "bf16"], 1.0)
            host = {"x": x, "g": np.ones(k, DTYPES["bf16"]), "a": np.zeros((n, m), np.float32)}
            ins: dict[str, Array | None] = {key: backend.upload(value) for key, value in host.items()}
            attrs = {spec.name: 1e-5 for spec in op.signature.attrs} | ({} if name in (_UP, _DOWN) else {"U": "bf16"})
            given = [[weight if s.name == "w" else ins.get(s.name) for s in op.signature.ins] for weight in weights]
            for label, tuning in sweep.items():
                way = tuned(name, tuning)
                try:
                    calls = [partial(backend.call, way, one, attrs) for one in given]
                    seconds = Replay(backend, calls).seconds(REPEATS).median
                except CuplamaError as e:
                    print(f"{form} {model} {matrix} {n} rows, {label}: {e}", file=sys.stderr, flush=True)
                    continue
                yield {
                    "model": model, "matrix": matrix, "format": form, "rows": n, "megabytes": round(nbytes / 1e6, 2),
                    "way": label, "microseconds": round(seconds * 1e6, 2),
                    "percent_read": round(peaks.percent_read(nbytes / seconds), 1),
                }  # fmt: skip


def _copied(backend: CudaBackend, weight: Packed) -> Packed:
    """The same in memory of its own."""
    (segment,) = weight.segments
    with backend.gpu:
        data: Any = segment.data
        return replace(weight, segments=(replace(segment, data=data.copy()),))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file as well")
    parser.add_argument("--formats", default=",".join(FORMATS), help="names of quant/catalog.py, with commas")
    parser.add_argument("--models", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}, with commas")
    parser.add_argument("--sweep", action="store_true", help="other ways to share the work as well")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x, with commas")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    failed = False
    sweep = SWEEP if args.sweep else {"as planned": TUNING}
    rows = [int(n) for n in args.rows.split(",")]
    backend = CudaBackend("bf16")
    peaks = measure(backend)
    print(json.dumps(peaks.fields()), flush=True)
    for form in args.formats.split(","):
        try:
            for n in sorted({1, max(rows)}):
                check_small(backend, form, n)
        except WrongResultError as e:
            failed = True
            print(f"{form}: {e}", file=sys.stderr, flush=True)
            continue
        for model in args.models.split(","):
            for row in times(backend, peaks, model, form, rows, sweep):
                found.append(row)
                print(json.dumps(row), flush=True)
    backend.close()
    record(found, args.out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
