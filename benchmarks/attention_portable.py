"""Self-attention and its backward pass by mma.sync, on any GPU from sm_80: ``python -m benchmarks.attention_portable
[--out FILE]``.

Causal sequences of one length in bf16, with the launches that a GPU before Hopper takes: microseconds, and TFLOP/s as
papers count them, two products forward and five backward (the kernels compute seven). ``share`` is the backward's rate
over the forward's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES
from cuplama.lab.timing import Replay
from cuplama.ops import OPS
from cuplama.ops.launch import Device, Plan
from cuplama.ops.op import Call, Op

# sequences, tokens of each, query heads, key heads, head size
SHAPES = ((1, 4096, 32, 8, 128), (1, 16384, 32, 8, 128), (8, 1024, 32, 8, 128), (1, 4096, 32, 8, 96),
          (1, 4096, 32, 8, 64), (16, 1024, 12, 12, 64), (1, 4096, 16, 8, 256))  # fmt: skip


def portable(name: str, launch: int | None = None) -> Op:
    """The op as GPUs of sm_80 take it. launch: the number of the one that is made, None: all."""
    op = OPS[name]

    def kernels(call: Call, device: Device) -> Plan:
        assert op.kernels is not None
        plan = op.kernels(call, replace(device, arch=80))
        return plan if launch is None else replace(plan, launches=plan.launches[launch : launch + 1])

    return replace(op, kernels=kernels)


def measure(b: int, n: int, heads: int, H: int, D: int) -> dict[str, Any]:
    """A shape's row."""
    rng, backend = np.random.default_rng(0), CudaBackend("bf16")
    attrs = {"num_heads": heads, "H": H, "D": D, "window": 0, "scale": D**-0.5}
    x, dy = (
        backend.upload(rng.standard_normal((b * n, width * D), np.float32).astype(DTYPES["bf16"]))
        for width in (heads + 2 * H, heads)
    )
    bounds = backend.upload(np.arange(b + 1, dtype=np.int32) * n)
    y, lse = backend.call(portable("self_attention"), [x, bounds], attrs)

    def seconds(op: Op, ins: Sequence[Any]) -> float:
        return Replay(backend, [partial(backend.call, op, list(ins), attrs)]).seconds(7).median

    backward = (x, y, lse, dy, bounds)
    times = {"forward": seconds(portable("self_attention"), (x, bounds)),
             "backward": seconds(portable("self_attention_backward"), backward)}  # fmt: skip
    for i, part in enumerate(("delta", "keys", "queries")):
        times[part] = seconds(portable("self_attention_backward", i), backward)
    backend.close()
    pairs = heads * b * n * (n + 1) / 2
    rates = {"forward": 4 * D * pairs / times["forward"], "backward": 10 * D * pairs / times["backward"]}
    return {
        "sequences": b, "tokens": n, "heads": heads, "kv_heads": H, "head_dim": D,
        **{f"{name}_us": round(t * 1e6, 1) for name, t in times.items()},
        **{f"{name}_tflops": round(rate / 1e12, 1) for name, rate in rates.items()},
        "share": round(rates["backward"] / rates["forward"], 2),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file as well")
    args = parser.parse_args()
    rows = []
    for shape in SHAPES:
        rows.append(measure(*shape))
        print(json.dumps(rows[-1]), flush=True)
    record(rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
