"""Two checkouts of cuplama on one GPU, in turn: ``python -m benchmarks.compare_trees OLD NEW [--out FILE]``.

For each shape, with random weights in bf16, each tree runs twice in processes of its own, in the order old, new, new,
old, so that what drifts in between touches both alike. Measured, as a caller of ``generate`` sees it, medians:

- decode: tokens/s of one sequence, 128 prompt and 256 new tokens;
- decode of 64 sequences (all together), 128 prompt and 64 new tokens each;
- prefill: prompt tokens/s of 2,048 tokens.

Prints a line per shape and measure, with the ratio new / old of the better run of each; ``--out FILE`` writes all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SHAPES = ("qwen2.5-0.5b", "llama-3.2-1b", "llama-3.1-8b")
_ORDER = ("old", "new", "new", "old")

# Runs inside a tree, old or new: what it imports must exist in both.
_MEASURE = """
import json, statistics, sys
import numpy as np
try:
    from cuplama.lab.dummy import dummy_model
except ImportError:
    from cuplama.bench import dummy_model
greedy = {"temperature": 0.0, "ignore_eos": True}
rng = np.random.default_rng(0)
with dummy_model(sys.argv[1], "cuda", "bfloat16", 4096, 64 * 512) as model:
    def prompt(n):
        return rng.integers(0, 32000, n).tolist()  # every shape's vocabulary is larger
    def rate(prompts, new, repeats, what):
        for _ in range(3):  # a size is run as it is, then captured, and from then on replayed
            model.generate(prompts(), max_tokens=new, **greedy)
        found = []
        for _ in range(repeats):
            done = model.generate(prompts(), max_tokens=new, **greedy)
            t = (done[0] if isinstance(done, list) else done).timings
            found.append(getattr(t, what))
        return statistics.median(found)
    print(json.dumps({
        "decode": rate(lambda: prompt(128), 256, 7, "decode_rate"),
        "decode_64": rate(lambda: [prompt(128) for _ in range(64)], 64, 5, "decode_rate"),
        "prefill_2048": rate(lambda: prompt(2048), 1, 15, "prompt_rate"),
    }))
"""


def run(tree: Path, shape: str) -> dict[str, float]:
    """One process of one tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", _MEASURE, shape]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tree}: {done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--shape", action="append", help="instead of all three; may be given several times")
    parser.add_argument("--out", type=Path, help="write every run to this file")
    args = parser.parse_args()
    trees = {"old": args.old.resolve(), "new": args.new.resolve()}
    rows: list[dict[str, Any]] = []
    for shape in args.shape or SHAPES:
        runs: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
        for which in _ORDER:
            runs[which].append(run(trees[which], shape))
        for what in runs["old"][0]:
            old, new = ([r[what] for r in runs[which]] for which in ("old", "new"))
            ratio = max(new) / max(old)
            rows.append({"shape": shape, "what": what, "old": old, "new": new, "ratio": round(ratio, 4)})
            print(f"{shape:14} {what:13} old {max(old):10.1f} new {max(new):10.1f} new/old {ratio:.4f}", flush=True)
        if args.out:
            args.out.write_text(json.dumps({"command": " ".join(sys.argv), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
