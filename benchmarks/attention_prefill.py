"""The prefill attention kernels alone, beside PyTorch's: ``python -m benchmarks.attention_prefill [--out FILE]``.

One causal prompt of 1,024, 4,096 and 16,384 tokens, 32 query and 8 key heads of 128 and of 64, bf16. For our kernel for
this GPU, our portable one (mma.sync) and torch's scaled_dot_product_attention: microseconds, TFLOP/s (4 n^2 heads D / 2
operations), and the error against float64 over the first and the last 128 tokens, relative to the norm of the result.
Needs PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from benchmarks.torch_time import torch_seconds
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES
from cuplama.engine.kv_cache import PAGE, pages_for
from cuplama.lab.timing import Replay
from cuplama.ops import OPS
from cuplama.ops.op import Op

PORTABLE = 89  # an architecture whose plan is the portable kernel
EDGE = 128  # tokens at each end that are held against float64


def planned_for(op: Op, arch: int) -> Op:
    """The op with the plan that it has on another architecture; its kernels are still compiled for this one."""
    plan = op.kernels
    assert plan is not None
    return replace(op, kernels=lambda call, device: plan(call, replace(device, arch=arch)))


def truth(torch: Any, q: Any, k: Any, v: Any, rows: Any) -> Any:
    """The attention of those rows in float64, [rows, heads, D]. q: [n, heads, D]; k, v: [n, H, D]."""
    out = []
    for head in range(q.shape[1]):
        kv = head * k.shape[1] // q.shape[1]
        scores = q[rows, head].double() @ k[:, kv].double().T * q.shape[2] ** -0.5
        seen = torch.arange(len(k), device=q.device)[None, :] <= rows[:, None]
        out.append(torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v[:, kv].double())
    return torch.stack(out, 1)


def measure(n: int, heads: int, H: int, D: int) -> list[dict[str, Any]]:
    """A row for each kernel: a prompt of n tokens, H key heads, heads of D."""
    import torch

    rng = np.random.default_rng(n + D)
    host = rng.standard_normal((n, (heads + 2 * H) * D), dtype=np.float32).astype(DTYPES["bf16"])
    x = torch.from_numpy(host.view(np.int16)).cuda().view(torch.bfloat16).reshape(n, heads + 2 * H, D)
    q, k, v = x[:, :heads], x[:, heads : heads + H], x[:, heads + H :]
    rows = torch.cat([torch.arange(EDGE), torch.arange(n - EDGE, n)]).cuda()
    exact = truth(torch, q, k, v, rows)
    operations = 2 * n * n * heads * D

    def row(name: str, y: Any, seconds: float) -> dict[str, Any]:
        error = float((y[rows].double() - exact).norm() / exact.norm())
        return {
            "kernel": name, "tokens": n, "head_dim": D, "microseconds": round(seconds * 1e6, 1),
            "teraflops": round(operations / seconds / 1e12, 1), "relative_error": float(f"{error:.3e}"),
        }  # fmt: skip

    found = []
    for name, op in (("for this GPU", OPS["attention"]), ("portable", planned_for(OPS["attention"], PORTABLE))):
        y, seconds = ours(op, host, heads, H, D)
        out = torch.from_numpy(y.view(np.int16)).cuda().view(torch.bfloat16)
        found.append(row(name, out.reshape(n, heads, D), seconds))
    heads_first = [a.transpose(0, 1)[None].contiguous() for a in (q, k, v)]

    def peer() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)

    found.append(row("torch", peer()[0].transpose(0, 1), torch_seconds(torch, peer, 5)))
    return found


def ours(op: Op, host: np.ndarray[Any, Any], heads: int, H: int, D: int) -> tuple[np.ndarray[Any, Any], float]:
    """(result, seconds) of an attention op over one prompt. host: queries, keys and values, [n, (heads + 2 H) D]."""
    n = len(host)
    pages = pages_for(n)
    backend = CudaBackend("bf16")
    given = backend.upload(host)
    slot_mapping = backend.upload(np.arange(n, dtype=np.int32))
    cache = [backend.zeros((pages, H, PAGE, D), DTYPES["bf16"]) for _ in range(2)]
    backend.call(OPS["kv_append"], (given, slot_mapping, *cache), {})
    i32 = [np.array([0, n]), np.array([n]), np.arange(pages)[None]]
    ins = (given, *cache, *[backend.upload(a.astype(np.int32)) for a in i32])
    attrs = {"num_heads": heads, "window": 0, "scale": D**-0.5}
    (y,) = backend.call(op, ins, attrs)
    out = backend.download(y)
    seconds = Replay(backend, [partial(backend.call, op, ins, attrs)]).seconds(5).median
    backend.close()
    return out, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file as well")
    args = parser.parse_args()
    rows = []
    for D in (128, 64):
        for n in (1024, 4096, 16384):
            for found in measure(n, 32, 8, D):
                rows.append(found)
                print(json.dumps(found), flush=True)
    record(rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
