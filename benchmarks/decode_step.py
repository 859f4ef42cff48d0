"""What a caller of ``stream`` sees, and what the GPU does in between: ``python -m benchmarks.decode_step [SHAPE ...]``.

For each shape, with random weights, 128 prompt tokens and greedy decoding at batch 1:

- tokens/s over 256 tokens, the median of five generations;
- the time between tokens as the caller of ``stream`` sees it, over 2,000 tokens: median, p99, and their ratio;
- the share of a step in which the GPU idles: events stand before and behind every step in the GPU's queue, and the
  idle time is that between the end of a step and the beginning of the next.

Prints one JSON object per shape; ``--out FILE`` writes them as a list.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from benchmarks.replays import replay_events
from cuplama.lab.dummy import dummy_model
from cuplama.model import Model

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


def gaps(model: Model, prompt: list[int], tokens: int) -> np.ndarray[Any, Any]:
    """Seconds between the deltas of a stream, the first few left out: they plan and capture."""
    times = []
    for _ in model.stream(prompt, max_tokens=tokens + 8, **GREEDY):
        times.append(time.perf_counter())
    return np.diff(times)[8:]


def idle(model: Model, prompt: list[int], steps: int) -> float:
    """The share of time in which the GPU waits between replayed steps."""
    import cupy

    with replay_events(model) as events:
        model.generate(prompt, max_tokens=steps, **GREEDY)
    used = events[8:]
    between = [cupy.cuda.get_elapsed_time(a[1], b[0]) for a, b in itertools.pairwise(used)]
    total = cupy.cuda.get_elapsed_time(used[0][0], used[-1][1])
    return float(sum(between) / total)


def measure(shape: str) -> dict[str, Any]:
    """The figures of one shape."""
    with dummy_model(shape, "cuda", "bfloat16", 4096, 4096) as model:
        prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, 128).tolist()
        model.generate(prompt, max_tokens=16, **GREEDY)
        rates = [model.generate(prompt, max_tokens=256, **GREEDY).timings for _ in range(5)]
        between = gaps(model, prompt, 2000) * 1e3
        median, p99 = float(np.median(between)), float(np.percentile(between, 99))
        return {
            "shape": shape,
            "tokens_per_second": round(float(np.median([t.decode_rate for t in rates])), 1),
            "first_token_ms": round(float(np.median([t.prompt_seconds for t in rates])) * 1e3, 2),
            "between_tokens_ms": {"median": round(median, 4), "p99": round(p99, 4), "ratio": round(p99 / median, 3)},
            "gpu_idle_share": round(idle(model, prompt, 512), 4),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["qwen2.5-0.5b", "llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--out", type=Path, help="write the results to this file as well")
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        rows.append(measure(shape))
        print(json.dumps(rows[-1]), flush=True)
    record(rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
