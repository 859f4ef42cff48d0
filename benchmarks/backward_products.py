"""The products of a training step, one by one: ``python -m benchmarks.backward_products [--out FILE] [--dtype bf16]``.

Every product of GPT-2 124M (16,384 tokens) and of Llama-3.2-1B (4,096 tokens), the head 2,048 rows at a time, in its
three forms: y = x w^T, dx = dy w, dw += dy^T x (in float32). Each is checked with 64 rows first, then timed as the op
of the model: microseconds and TFLOP/s, beside torch.matmul's (which gives dy^T x in the dtype of dy, and adds it to
nothing), where PyTorch is there. GPT-2's head comes three times: with its 50,257 rows, so that 16 bytes do not divide a
row of logits; padded to 50,304; and at the end with dy in rows of 50,264 elements, of which 50,257 count. Inputs come
from memory: they rotate through copies that exceed the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES, Array, dtype_name
from cuplama.lab.check import backend_checker
from cuplama.lab.timing import Replay, cache_bytes, rotation, time_workload
from cuplama.lab.workloads import Workload, normal_values
from cuplama.ops import OPS
from cuplama.ops.abstract import abstract
from cuplama.ops.op import case_dtype
from cuplama.ops.signature import dim_value

CHECKED_ROWS, CHECKED_COLUMNS = 64, 50257  # of y, at most
HEAD_ROWS = 2048
REPEATS, CALLS = 7, 20  # of torch


@dataclass(frozen=True)
class Shape:
    """A product y[n,m] = x[n,k] w[m,k]^T of a model; U: the dtype of y."""

    model: str
    name: str
    n: int
    m: int
    k: int
    U: str = "T"


def shapes() -> Iterator[Shape]:
    layers = {
        ("gpt2", 16384): {"qkv": (2304, 768), "o": (768, 768), "up": (3072, 768), "down": (768, 3072)},
        ("llama-3.2-1b", 4096): {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048),
                                 "down": (2048, 8192)},
    }  # fmt: skip
    for (model, n), products in layers.items():
        for name, (m, k) in products.items():
            yield Shape(model, name, n, m, k)
    for model, name, m, k in (
        ("gpt2", "head", 50257, 768), ("gpt2", "head padded", 50304, 768), ("llama-3.2-1b", "head", 128256, 2048),
    ):  # fmt: skip
        yield Shape(model, name, HEAD_ROWS, m, k, "f32")


# Form -> the op, and what torch computes of its inputs.
FORMS: dict[str, tuple[str, Callable[..., Any]]] = {
    "y = x w^T": ("linear", lambda x, w: x @ w.T),
    "dx = dy w": ("linear_backward_x", lambda dy, w: dy @ w),
    "dw += dy^T x": ("linear_backward_w", lambda dw, dy, x: dy.T @ x),
}


def workload(op: str, shape: Shape, dtype: str, n: int, m: int) -> Workload:
    """The op with descriptions of its inputs, without those that may be left out."""
    case, T = {"n": n, "m": m, "k": shape.k, "U": shape.U}, DTYPES[dtype]
    ins: list[Any] = []
    for spec in OPS[op].signature.ins:
        sizes = tuple(dim_value(d, case) for d in spec.dims or ())
        ins.append(
            None if spec.optional else abstract(sizes, DTYPES.get(spec.dtype) or case_dtype(spec.letter, case, T))
        )
    return Workload(OPS[op], tuple(ins), {"U": shape.U} if op == "linear" else {}, dtype)


def torch_seconds(compute: Callable[..., Any], copies: Sequence[Sequence[np.ndarray[Any, Any]]]) -> float | None:
    """The median of the GPU time of a call, several in a row on one copy of the inputs after the other."""
    try:
        import torch
    except ImportError:
        return None
    ins = [[_tensor(torch, x) for x in given] for given in copies]
    times = []
    for _ in range(REPEATS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for i in range(CALLS):
            compute(*ins[i % len(ins)])
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / CALLS)
    del ins
    torch.cuda.empty_cache()
    return float(np.median(times[2:]))


def _tensor(torch: Any, x: np.ndarray[Any, Any]) -> Any:
    if x.dtype == DTYPES["bf16"]:
        return torch.from_numpy(x.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(x).cuda()


def measure(backend: CudaBackend, shape: Shape, dtype: str) -> Iterator[dict[str, Any]]:
    """A row for each form."""
    for form, (op, compute) in FORMS.items():
        small = workload(op, shape, dtype, CHECKED_ROWS, min(shape.m, CHECKED_COLUMNS))
        backend_checker(backend).check(small, small.arrays())
        full = workload(op, shape, dtype, shape.n, shape.m)
        arrays = full.arrays()
        ins: list[list[Array | None]] = rotation(backend, full, arrays, cache_bytes(backend))
        seconds, count = time_workload(backend, full, ins).median, len(ins)
        del ins
        operations = 2 * shape.n * shape.m * shape.k
        row: dict[str, Any] = {
            "model": shape.model, "product": shape.name, "form": form, "n": shape.n, "m": shape.m, "k": shape.k,
            "dtype": dtype, "microseconds": round(seconds * 1e6, 1),
            "teraflops": round(operations / seconds / 1e12, 1),
        }  # fmt: skip
        other = torch_seconds(compute, [[x for x in arrays if x is not None]] * count)
        if other is not None:
            row |= {"torch_microseconds": round(other * 1e6, 1), "torch_teraflops": round(operations / other / 1e12, 1)}
        yield row


def measure_strided(backend: CudaBackend, shape: Shape, dtype: str) -> Iterator[dict[str, Any]]:
    """The gradients of a head whose dy has rows of a multiple of 8 elements, of which the last ones do not count."""
    rng, n, m, k, line = np.random.default_rng(1), shape.n, shape.m, shape.k, -(-shape.m // 8) * 8
    T = DTYPES[dtype]
    dy = normal_values(rng, (n, m), T, 1.0)
    x, w = (normal_values(rng, size, T, k**-0.5) for size in ((n, k), (m, k)))
    dw = np.zeros((m, k), np.float32)
    wide = backend.upload(np.pad(dy, ((0, 0), (0, line - m)), constant_values=np.nan))
    for form, op, ins, (rows, columns, summed), kind, add in (
        ("dx = dy w", "linear_backward_x", (dy, w), (n, k, m), "nn", False),
        ("dw += dy^T x", "linear_backward_w", (dw, dy, x), (m, k, n), "tn", True),
    ):
        device = [backend.upload(a) for a in ins]
        other = device[1] if op == "linear_backward_x" else device[2]
        U = DTYPES["f32"] if add else T
        y = backend.zeros((rows, columns), U)
        assert backend.gpu.cublas is not None
        product = backend.gpu.cublas.product(
            rows, columns, summed, dtype, dtype_name(U), add=add, form=kind, line=line
        )  # fmt: skip
        if product is None:
            yield {"model": shape.model, "product": f"{shape.name} strided", "form": form, "refused": True}
            continue
        addresses = {name: backend.gpu.address(a) for name, a in (("x", wide), ("w", other), ("y", y))}
        addresses |= {"c": addresses["y"]} if add else {}

        def body(product: Any = product, addresses: dict[str, int] = addresses) -> None:
            with backend.gpu:
                product(**addresses)

        body()
        (want,) = (backend.download(a).astype(np.float32) for a in backend.call(OPS[op], device, {}))
        error = np.linalg.norm(backend.download(y).astype(np.float32) - want) / np.linalg.norm(want)
        seconds = Replay(backend, [body]).seconds(REPEATS).median
        yield {
            "model": shape.model, "product": f"{shape.name} strided", "form": form, "n": n, "m": m, "k": k,
            "dtype": dtype, "line": line, "error": float(f"{error:.1e}"), "microseconds": round(seconds * 1e6, 1),
            "teraflops": round(2 * n * m * k / seconds / 1e12, 1),
        }  # fmt: skip


def totals(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step's products that belong to one layer, and to all chunks of the head."""
    for model, tokens in dict.fromkeys((r["model"], r["n"]) for r in rows if not r["product"].startswith("head")):
        mine = [r for r in rows if r["model"] == model]
        for who in ("microseconds", "torch_microseconds"):
            if all(who in r for r in mine):
                layer = sum(r[who] for r in mine if not r["product"].startswith("head"))
                heads = {r["product"] for r in mine} - {r["product"] for r in mine if r["n"] == tokens}
                chunks = {h: sum(r[who] for r in mine if r["product"] == h) * tokens / HEAD_ROWS for h in sorted(heads)}
                head = {name: round(value / 1e3, 3) for name, value in chunks.items()}
                yield {"model": model, "of": who, "milliseconds_of_a_layer": round(layer / 1e3, 3), **head}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file as well")
    parser.add_argument("--dtype", default="bf16", choices=("f32", "f16", "bf16"), help="(default: %(default)s)")
    args = parser.parse_args()
    backend = CudaBackend(args.dtype)
    rows: list[dict[str, Any]] = []
    for shape in shapes():
        for row in measure(backend, shape, args.dtype):
            rows.append(row)
            print(json.dumps(row), flush=True)
    strided = next(shape for shape in shapes() if shape.m % 8)
    for row in [*totals(rows), *measure_strided(backend, strided, args.dtype)]:
        rows.append(row)
        print(json.dumps(row), flush=True)
    backend.close()
    record(rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
