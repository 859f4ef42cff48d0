"""Many requests in one call of the library: ``python -m benchmarks.throughput SHAPE [...]``. Weights are random.

- batch: N prompts of IN tokens and OUT new tokens of each, all given to one call of ``Model.generate``: output tokens
  per second by the wall clock, from the call to its return. Every completion is checked to have its tokens.
- step: what of that is lost beside the steps themselves. 64 prompts and 256 new tokens, once by the wall clock after
  the first token, and once with events before and behind every captured step in the GPU's queue: the same steps, at the
  same lengths of keys, without what lies between them. Not on NumPy, which captures nothing.

Prompts are random tokens, others in every repeat, so that no prefix cache helps. A run of each kind warms up. Prints a
JSON object for each measurement; ``--out FILE`` writes them, with the machine, as one file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.record import record
from benchmarks.replays import replay_events
from cuplama.completion import Completion
from cuplama.engine.kv_cache import KV_CACHE_DTYPES
from cuplama.lab.dummy import Source
from cuplama.lab.environment import environment
from cuplama.model import Model

__all__ = ["batch", "main", "random_prompts", "step"]

SEQUENCES, STEPS, SHORT = 64, 256, 32  # of ``step``: SHORT tokens in each prompt, so that they are read in one pass


def random_prompts(model: Model, rng: np.random.Generator, count: int, tokens: int) -> list[list[int]]:
    """So many prompts of so many random token ids."""
    found: list[list[int]] = rng.integers(0, model.config.vocab_size, (count, tokens)).tolist()
    return found


def _generate(model: Model, prompts: Sequence[list[int]], new: int) -> tuple[float, list[Completion]]:
    """Seconds of one call for all prompts, and what it gave. Raises AssertionError where a token is missing."""
    began = time.perf_counter()
    done = model.generate(list(prompts), temperature=0.0, max_tokens=new, ignore_eos=True)
    seconds = time.perf_counter() - began
    short = [len(c.tokens) for c in done if len(c.tokens) != new]
    if len(done) != len(prompts) or short:
        raise AssertionError(f"{len(done)} completions of {len(prompts)}, and {len(short)} without their {new} tokens")
    return seconds, done


def batch(model: Model, requests: int, tokens: int, new: int, repeats: int) -> dict[str, Any]:
    """``requests`` prompts of ``tokens`` tokens at once, ``new`` more of each."""
    rng = np.random.default_rng(0)
    runs = [_generate(model, random_prompts(model, rng, requests, tokens), new) for _ in range(repeats + 1)][1:]
    seconds = median(run[0] for run in runs)
    return {
        "requests": requests,
        "prompt_tokens": tokens,
        "new_tokens": new,
        "seconds": round(seconds, 3),
        "seconds_of_each": [round(run[0], 3) for run in runs],
        "output_tokens_per_second": round(requests * new / seconds, 1),
        "preemptions": model.engine.stats.preemptions,
    }


def step(model: Model, sequences: int, new: int, repeats: int) -> dict[str, Any]:
    """What ``generate`` gives after the first token, and what its steps give that are queued one behind the other."""
    rng, rates, alone, idle = np.random.default_rng(1), [], [], []
    for i in range(repeats + 1):
        seconds, done = _generate(model, random_prompts(model, rng, sequences, SHORT), new)
        if i:
            rates.append(sequences * (new - 1) / (seconds - done[0].timings.prompt_seconds))
        with _steps(model, new - 2) as found:
            _generate(model, random_prompts(model, rng, sequences, SHORT), new)
        alone.append(sequences * found["steps"] / found["busy_seconds"])
        idle.append(found["idle_share"])
    return {
        "sequences": sequences,
        "new_tokens": new,
        "generate_tokens_per_second": round(median(rates), 1),
        "steps_alone_tokens_per_second": round(median(alone[1:]), 1),
        "gpu_idle_share": round(median(idle[1:]), 4),
        "generate_over_steps": round(median(rates) / median(alone[1:]), 4),
    }


@contextmanager
def _steps(model: Model, last: int) -> Iterator[dict[str, float]]:
    """Inside, events stand around every replay. Afterwards the dict has what the last ``last`` of them took."""
    import cupy

    found = dict[str, float]()
    with replay_events(model) as events:
        yield found
    used = events[-last:]
    elapsed = cupy.cuda.get_elapsed_time  # milliseconds
    busy = sum(elapsed(*pair) for pair in used)
    between = sum(elapsed(a[1], b[0]) for a, b in itertools.pairwise(used))
    found |= {"steps": len(used), "busy_seconds": busy / 1e3, "idle_share": between / (busy + between)}


def measure(args: argparse.Namespace, shape: str) -> Iterator[dict[str, Any]]:
    """The rows of one shape."""
    how = {"kv_cache_dtype": args.kv_cache_dtype, "activations": args.activations}
    source = Source(shape, True, args.weight_format, args.device, args.dtype, **how, max_running=args.max_running)
    context = max(args.tokens + args.new, SHORT + STEPS) + 1
    room = max(args.requests * (args.tokens + args.new + 64), SEQUENCES * (SHORT + STEPS + 64))
    with source.open(context, "auto" if args.device != "numpy" else room) as model:
        facts = {"shape": model.folder.name, "weight_format": args.weight_format or model.backend.dtype.name, **how}
        facts |= {"max_running": model.engine.max_running, **environment(model.backend)}
        if "batch" not in args.without:
            yield {"measured": "batch", **facts, **batch(model, args.requests, args.tokens, args.new, args.repeats)}
        if "step" not in args.without and model.backend.captures:
            yield {"measured": "step", **facts, **step(model, SEQUENCES, STEPS, args.repeats)}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", metavar="SHAPE", help="such as llama-3.1-8b, or a folder with config.json")
    parser.add_argument("--weight-format", default="", help='such as "fp8" or "int4 g128"; by default the dtype')
    parser.add_argument("--activations", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--kv-cache-dtype", choices=tuple(KV_CACHE_DTYPES), default="auto")
    parser.add_argument("--device", choices=("auto", "cuda", "numpy"), default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--max-running", type=int, help="sequences that run at a time; by default as of load")
    parser.add_argument("--in", dest="tokens", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens generated for each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without", choices=("batch", "step"), nargs="*", default=())
    parser.add_argument("--out", type=Path, help="write the results to this file as well")
    args = parser.parse_args(given)
    rows = []
    for shape in args.shapes:
        for row in measure(args, shape):
            rows.append(row)
            print(json.dumps(row), flush=True)
    record(rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
