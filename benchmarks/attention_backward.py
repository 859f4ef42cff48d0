"""The backward of self-attention, beside PyTorch's: ``python -m benchmarks.attention_backward [--out FILE]``.

Causal sequences of one length in bf16: the whole backward (delta, the products, conversion of dq) in microseconds and
in TFLOP/s, which count five products of 2 D operations for each pair of query and key that sees it. Beside it torch's
scaled_dot_product_attention by its flash and cuDNN backends: the call of autograd alone, without the forward. Errors
are relative to the norm: on small ragged batches against float64, on the shapes against torch's gradients. Needs
PyTorch.
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
from benchmarks.torch_time import torch_seconds
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES
from cuplama.lab.check import relative_error
from cuplama.lab.timing import Replay
from cuplama.lab.workloads import case_workload
from cuplama.ops import OPS
from cuplama.ops.launch import Device, Plan
from cuplama.ops.op import Call, Op
from cuplama.ops.self_attention import self_attention_case
from cuplama.ops.self_attention_hopper import hopper_plan

# sequences, tokens of each, query heads, key heads, head size
SHAPES = ((1, 4096, 32, 8, 128), (1, 16384, 32, 8, 128), (8, 1024, 32, 8, 128), (16, 1024, 12, 12, 64),
          (4, 1024, 32, 8, 64))  # fmt: skip
# of small batches held to float64: query heads, key heads, head size, lengths, window
SMALL = ((4, 2, 128, [700, 0, 300, 129, 1], 0), (4, 2, 64, [700, 0, 300, 129, 1], 0), (2, 2, 128, [1300, 64], 200),
         (3, 1, 64, [1300, 64], 300))  # fmt: skip
PARTS = ("prepare", "products", "convert")


def backward(launches: slice | None = None) -> Op:
    """The op with Hopper's plan. launches: those of the plan that are launched, None: all of them."""

    def kernels(call: Call, device: Device) -> Plan:
        plan = hopper_plan(call, device)
        assert plan is not None, "this benchmark is of Hopper's kernels"
        return plan if launches is None else replace(plan, launches=plan.launches[launches])

    return replace(OPS["self_attention_backward"], kernels=kernels)


def check_small() -> list[dict[str, Any]]:
    """Errors on small ragged batches against float64; a second run must give the same bits."""
    found = []
    for heads, H, D, lengths, window in SMALL:
        case = self_attention_case(heads, H, D, lengths, window)
        workload = case_workload(backward(), case, "bf16", 3)
        want = workload.op.reference(*workload.arrays(), **workload.attrs)
        backend = CudaBackend("bf16")
        ins = [backend.upload(a) for a in workload.arrays()]
        first, second = (backend.download(backend.call(workload.op, ins, workload.attrs)[0]) for _ in range(2))
        backend.close()
        row = {
            "heads": heads, "kv_heads": H, "head_dim": D, "lengths": lengths, "window": window,
            "relative_error": float(f"{relative_error(first, want):.3e}"),
            "repeats": bool(np.array_equal(first.view(np.uint16), second.view(np.uint16))),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


def log_sums(torch: Any, q: Any, k: Any) -> Any:
    """log(sum(exp(scores))) of causal attention in float32, [b, heads, n]. q: [b, heads, n, D]; k: [b, H, n, D]."""
    b, heads, n, D = q.shape
    out = torch.empty(b, heads, n, device=q.device)
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    for i in range(b):
        for head in range(heads):
            scores = q[i, head].float() @ k[i, head * k.shape[1] // heads].float().T * D**-0.5
            out[i, head] = torch.logsumexp(scores.masked_fill_(hidden, -torch.inf), -1)
    return out


def peers(torch: Any, q: Any, k: Any, v: Any, dy: Any) -> dict[str, tuple[float, Any, Any]]:
    """backend -> seconds of its backward, its output and its gradients."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found = {}
    group = q.shape[1] // k.shape[1]
    for name, which in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        leaves = [a.detach().clone().requires_grad_() for a in (q, k, v)]
        try:
            with sdpa_kernel([which]):
                y = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=group > 1)
                run = partial(torch.autograd.grad, y, leaves, dy, retain_graph=True)
                found[name] = (torch_seconds(torch, run), y.detach(), run())
        except RuntimeError as error:  # this backend does not serve the shape
            print(f"torch's {name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def rows_of(a: Any) -> Any:
    """[b, heads, n, D] -> [b * n, heads * D]."""
    return a.transpose(1, 2).reshape(a.shape[0] * a.shape[2], -1)


def ours(x: Any, y: Any, lse: Any, dy: Any, b: int, attrs: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """The gradient, and seconds of all and of each launch."""

    def host(a: Any) -> Any:
        import torch

        if a.dtype != torch.bfloat16:
            return a.contiguous().cpu().numpy()
        return a.contiguous().view(torch.int16).cpu().numpy().view(DTYPES["bf16"])

    backend = CudaBackend("bf16")
    bounds = np.arange(b + 1, dtype=np.int32) * (x.shape[0] // b)
    ins = [backend.upload(a) for a in (host(x), host(y), host(lse), host(dy), bounds)]
    op = backward()
    (dx,) = backend.call(op, ins, attrs)
    out, seconds = backend.download(dx), {}
    seconds["all"] = Replay(backend, [partial(backend.call, op, ins, attrs)]).seconds(7).median
    backend.close()
    for i, part in enumerate(PARTS):
        if part == "products":  # cannot run alone: others leave the counters as it wants them
            continue
        backend, op = CudaBackend("bf16"), backward(slice(i, i + 1))
        ins = [backend.upload(a) for a in (host(x), host(y), host(lse), host(dy), bounds)]
        seconds[part] = Replay(backend, [partial(backend.call, op, ins, attrs)]).seconds(7).median
        backend.close()
    return out, seconds


def measure(b: int, n: int, heads: int, H: int, D: int) -> dict[str, Any]:
    """A shape's row: times, TFLOP/s, and how far torch's gradients and ours are apart."""
    import torch

    torch.manual_seed(n + D)
    q, k, v, dy = (torch.randn(b, h, n, D, device="cuda", dtype=torch.bfloat16) for h in (heads, H, H, heads))
    operations = 5 * 2 * D * heads * b * (n * (n + 1) / 2)
    found = peers(torch, q, k, v, dy)
    _, y, gradients = next(iter(found.values()))
    x = torch.cat([rows_of(a) for a in (q, k, v)], 1)
    attrs = {"num_heads": heads, "H": H, "D": D, "window": 0, "scale": D**-0.5}
    lse = rows_of(log_sums(torch, q, k)[..., None])
    dx, seconds = ours(x, rows_of(y), lse, rows_of(dy), b, attrs)
    mine = torch.from_numpy(dx.view(np.int16)).view(torch.bfloat16).float()
    theirs = torch.cat([rows_of(g) for g in gradients], 1).float().cpu()
    row: dict[str, Any] = {"sequences": b, "tokens": n, "heads": heads, "kv_heads": H, "head_dim": D}
    first = 0
    for name, width in (("dq", heads * D), ("dk", H * D), ("dv", H * D)):
        part = slice(first, first + width)
        error = (mine[:, part] - theirs[:, part]).norm() / theirs[:, part].norm()
        row[f"{name}_apart"] = float(f"{float(error):.3e}")
        first += width
    times = {"cuplama": seconds["all"], **{name: t for name, (t, _, _) in found.items()}}
    for name, t in times.items():
        row[f"{name}_us"], row[f"{name}_tflops"] = round(t * 1e6, 1), round(operations / t / 1e12, 1)
    return row | {f"cuplama_{part}_us": round(t * 1e6, 1) for part, t in seconds.items() if part != "all"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The shapes' rows for people: TFLOP/s."""
    lines = [f"{'shape':28}{'cuplama':>9}{'flash':>9}{'cudnn':>9}   TFLOP/s"]
    for r in rows:
        shape = f"{r['sequences']} x {r['tokens']}, {r['heads']}/{r['kv_heads']} heads of {r['head_dim']}"
        rates = [f"{r.get(f'{name}_tflops', float('nan')):9.0f}" for name in ("cuplama", "flash", "cudnn")]
        lines.append(f"{shape:28}{''.join(rates)}   {r['cuplama_us']:.0f} us")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file as well")
    args = parser.parse_args()
    small = check_small()
    rows = []
    for shape in SHAPES:
        rows.append(measure(*shape))
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    record([*small, *rows], args.out)
    return 0 if all(r["repeats"] and r["relative_error"] < 5e-3 for r in small) else 1


if __name__ == "__main__":
    sys.exit(main())
