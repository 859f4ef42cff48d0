"""Steps of training on a GPU, beside torch: ``python -m benchmarks.train_step [--shapes gpt2 ...] [--out FILE]``.

GPT-2 124M (16 texts of 1,024 tokens) and Llama 3.2 1B (4), bf16, from random weights and on random tokens that all
programs share: tokens per second, the median of the timed steps, and memory. A step is forward pass, loss, backward
pass and AdamW. Beside us runs transformers' model with sdpa attention and torch.optim.AdamW(fused=True), as it is and
under torch.compile. Its parameters, gradients and moments are bf16 and nothing is clipped, which is its fastest; ours
are float32 masters, gradients and moments beside bf16 weights. A speed counts only if first loss and norm of the
gradients are torch's. Each program runs in a process of its own, one after the other.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.training import PEERS, Job, agree, run_job, write_checkpoint, write_results
from cuplama.models.presets import find_shape
from cuplama.train.backward import RECOMPUTE

ROWS = {"gpt2": 16, "llama-3.2-1b": 4}
CONTEXT = 1024


def measure_shape(shape: str, args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Run all programs on one shape; the results are added to ``found`` one by one."""
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(find_shape(shape)[1], Path(name), "bfloat16")
        known: list[dict[str, Any]] = []
        for peer in PEERS:
            if args.only and args.only not in peer:
                continue
            job = Job(
                peer,
                name,
                "cuda",
                "bfloat16",
                ROWS.get(shape, args.rows),
                CONTEXT,
                args.warm,
                args.steps,
                recompute=args.recompute,
            )
            result = {"shape": shape, "rows": job.rows, "context": CONTEXT, **run_job(job, args.timeout)}
            if peer == "ours" and known and "error" not in result and not agree(result, known[0]):
                result["error"] = f"loss {result['losses'][0]:.4f}, norm {result['grad_norm']:.4f}: not torch's"
            known += [] if peer == "ours" or "error" in result else [result]
            found["results"].append(result)
            print(line(result, known), flush=True)
            write_results(found, args.out)


def line(result: dict[str, Any], known: list[dict[str, Any]]) -> str:
    """A row of the table."""
    start = f"{result['shape']:<13} {result['peer']:<14}"
    if "error" in result:
        return f"{start} {result['error']}"
    compiled = [r["tokens_per_second"] for r in known if r["peer"] == "torch.compile"]
    ratio = f"{result['tokens_per_second'] / compiled[0]:6.2f}" if compiled else "     -"
    memory = f"{result['allocated_bytes'] / 1e9:6.1f} {result['device_bytes'] / 1e9:6.1f}"
    losses = " ".join(f"{loss:.4f}" for loss in result["losses"])
    checked = "" if known or result["peer"] != "ours" else "  not checked: no torch"
    return f"{start} {result['tokens_per_second']:9.0f} {ratio} {memory} {result['grad_norm']:8.4f}  {losses}{checked}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(ROWS))
    parser.add_argument("--rows", type=int, default=4, help="of a batch, for other shapes")
    parser.add_argument("--only", choices=["ours", "torch"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm", type=int, default=7)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each program")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="nothing", help="of our program")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(f"{'shape':<13} {'program':<14} {'tokens/s':>9} {'/comp.':>6} {'GB':>6} {'of card':>6} {'norm':>8}  losses")
    found = {"command": shlex.join(["python", "-m", "benchmarks.train_step", *sys.argv[1:]]), "results": []}
    for shape in args.shapes:
        measure_shape(shape, args, found)


if __name__ == "__main__":
    main()
