"""Steps of training on a CPU, beside torch: ``python -m benchmarks.train_cpu [--rows 8] [--context 256] [--out FILE]``.

The bundled model's shape from random weights, float32, two threads: our NumPy backend and torch as it is, on the same
random tokens. Tokens per second are the median of the timed steps; a speed counts only if first loss and norm of the
gradients are torch's.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.training import Job, agree, run_job, write_checkpoint, write_results
from cuplama.folders import data_folder
from cuplama.models.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each program")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.train_cpu", *sys.argv[1:]]),
        "environment": {"machine": platform.machine(), "python": platform.python_version(), "threads": args.threads},
        "results": [],
    }
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(load_config(data_folder("weights")), Path(name), "float32")
        for peer in ("torch eager", "ours"):
            job = Job(peer, name, "cpu", "float32", args.rows, args.context, args.warm, args.steps, args.threads)
            result = {"rows": job.rows, "context": job.context, **run_job(job, args.timeout)}
            torch = [r for r in found["results"] if "error" not in r]
            if peer == "ours" and torch and "error" not in result and not agree(result, torch[0]):
                result["error"] = f"loss {result['losses'][0]:.4f}, norm {result['grad_norm']:.4f}: not torch's"
            found["results"].append(result)
            write_results(found, args.out)
            print(f"{peer:<12} {result.get('error') or format(result['tokens_per_second'], '.0f') + ' tokens/s'}")


if __name__ == "__main__":
    main()
