"""Write the golden models: tiny random checkpoints and what transformers computes with them in float32.

    python -m tools.make_goldens [case ...]

Needs the `golden` extra (torch, transformers). tests/golden/README.md says what each file holds, tools/goldens/cases.py
which cases there are. Everything follows from the seeds, so a second run writes the same numbers (on the same versions
and kind of CPU).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from tools.divergence import Rows, divergence, rows_of, summary
from tools.goldens.case import Case
from tools.goldens.cases import CASES
from tools.goldens.model import NEW_TOKENS, greedy, load, logits_of, randomize, run
from tools.goldens.removals import removals
from tools.goldens.spellings import write_char_tokenizer, write_configs, write_json

__all__ = ["main", "make"]

CASES_DIR = Path(__file__).resolve().parents[1] / "tests" / "golden" / "cases"
MIN_GAP = 1e-2  # between the best two logits at every greedy step
MIN_DISTINCT = 5  # tokens in a greedy continuation: a constant one would prove little
MIN_SENSITIVITY = 1e-2  # 50 times the tolerance of the tests
MIN_GELU_SENSITIVITY = 1e-3  # the exact and the tanh GELU are themselves within 5e-4
PROMPTS = (1, 9, 29, 45)  # in tokens: 29 + 24 cross the original context of 32, 45 begins beyond it
MAX_SEEDS = 400

Arrays = dict[str, np.ndarray]


class UnfairError(Exception):
    """This seed does not give a fair golden."""


def run_prompts(folder: Path, vocab: int, seed: int) -> tuple[Arrays, float]:
    """The arrays of golden.npz and the smallest gap; UnfairError as soon as a gap or a continuation is unfair."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    min_gap = float("inf")
    for j, n in enumerate(PROMPTS):
        ids = rng.integers(3, vocab, n).astype(np.int32)
        tokens, steps = greedy(load(folder), ids)
        best = np.sort(steps, axis=-1)
        min_gap = min(min_gap, float((best[:, -1] - best[:, -2]).min()))
        if min_gap <= MIN_GAP:
            raise UnfairError(f"gap {min_gap:.4f}")
        if len(set(tokens.tolist())) < MIN_DISTINCT:
            raise UnfairError("constant continuation")
        arrays |= {f"prompt_{j}": ids, f"greedy_{j}": tokens, f"steps_{j}": steps}
        arrays |= fair_rows(folder, ids).arrays(j)
    return arrays, min_gap


def fair_rows(folder: Path, ids: np.ndarray) -> Rows:
    """What the model gives for ids [n] in float32. UnfairError if it chooses other experts in 16 bits: then few tokens
    would be left to compare."""
    rows = run(load(folder), ids)
    for dtype in (torch.bfloat16, torch.float16) if len(rows.experts) else ():
        if not np.array_equal(rows.experts, run(load(folder, dtype), ids).experts):
            raise UnfairError(f"other experts in {dtype}")
    return rows


def cache_difference(folder: Path, arrays: Arrays) -> float:
    """Max |logit difference| between decoding with the cache and one pass over the sequence so far."""
    model = load(folder)
    worst = 0.0
    for j in range(len(PROMPTS)):
        for t in range(NEW_TOKENS):
            logits_of(model, arrays["prompt_0"])  # one token: dynamic RoPE forgets the longer passes
            ids = np.concatenate([arrays[f"prompt_{j}"], arrays[f"greedy_{j}"][:t]])
            worst = max(worst, float(np.abs(logits_of(model, ids)[-1] - arrays[f"steps_{j}"][t]).max()))
    return worst


def write_fair_model(name: str, case: Case, folder: Path) -> tuple[int, Arrays, float]:
    """Write the model of the first seed that gives a fair golden: (seed, arrays of golden.npz, smallest gap)."""
    config = AutoConfig.for_model(case.family, **{**case.base, **json.loads(json.dumps(case.config))})
    for seed in range(1, MAX_SEEDS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomize(model, seed, config.tie_word_embeddings)
        model.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
        write_configs(case, folder)
        try:
            return seed, *run_prompts(folder, config.vocab_size, seed)
        except UnfairError:
            continue
    raise SystemExit(f"{name}: no seed below {MAX_SEEDS} gives a fair golden")


def low_precision_kl(folder: Path, prompts: list[np.ndarray], truth: list[Rows]) -> dict[str, Any]:
    """The ``summary`` of transformers' own bfloat16 and float16 runs."""
    runs: dict[str, list[np.ndarray]] = {}
    for dtype in (torch.bfloat16, torch.float16):
        found = [run(load(folder, dtype), ids) for ids in prompts]
        runs[str(dtype).removeprefix("torch.")] = list(map(divergence, truth, found))
    return summary(runs, PROMPTS)


def sensitivity_of(name: str, case: Case, folder: Path, ids: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Removed part -> max |logit difference| on one prompt; AssertionError if one hardly shows."""
    sensitivity: dict[str, float] = {}
    for part, mutate, overrides in removals(case, load(folder)):
        changed = load(folder, **overrides)
        mutate(changed)
        sensitivity[part] = float(np.abs(logits_of(changed, ids) - truth).max())
    floor = {"other_gelu": MIN_GELU_SENSITIVITY}
    dull = {k: v for k, v in sensitivity.items() if v < floor.get(k, MIN_SENSITIVITY)}
    assert not dull, f"{name}: the logits do not show {dull}"
    return sensitivity


def make(name: str, case: Case) -> str:
    """Write the folder of a case. Returns a line about it."""
    folder = CASES_DIR / name
    seed, arrays, min_gap = write_fair_model(name, case, folder)
    if case.chars:
        write_char_tokenizer(folder)
    difference = cache_difference(folder, arrays)
    assert case.sequential == (difference > 1e-3), f"{name}: cache and single pass differ by {difference}"
    rows = [arrays[f"logits_{j}"] for j in range(len(PROMPTS))]
    prompts = [arrays[f"prompt_{j}"] for j in range(len(PROMPTS))]
    for twin in sorted(folder.glob("config.v?.json")):
        for ids, row in zip(prompts, rows, strict=True):
            np.testing.assert_array_equal(logits_of(load(folder, config=twin), ids), row, err_msg=str(twin))
    apart = low_precision_kl(folder, prompts, rows_of(arrays)[1])
    sensitivity = sensitivity_of(name, case, folder, prompts[-1], rows[-1])

    columns: dict[str, Any] = {**arrays}
    np.savez_compressed(folder / "golden.npz", **columns)
    logits = np.concatenate(rows)
    meta = {
        "case": name,
        "family": case.family,
        "spelling": case.spelling,
        "seed": seed,
        "versions": {
            "transformers": transformers.__version__,
            "torch": torch.__version__.split("+")[0],
        },
        "context": case.context,
        "prompt_lengths": list(PROMPTS),
        "min_gap": round(min_gap, 5),
        "logit_std": round(float(logits.std()), 3),
        **apart,
        "cached_equals_one_pass": not case.sequential,
        "cache_difference": difference,
        "sensitivity": {k: round(v, 4) for k, v in sensitivity.items()},
    }
    write_json(folder / "meta.json", meta)
    size = sum(f.stat().st_size for f in folder.iterdir())
    low_kl = " ".join(f"{k} {v:.1e}" for k, v in apart["kl"].items())
    weakest = min(sensitivity.items(), key=lambda kv: kv[1])
    return (
        f"{name:22} seed {seed:3} gap {min_gap:.3f} std {logits.std():.2f} kl {low_kl} "
        f"cache {difference:.1e} weakest {weakest[0]} {weakest[1]:.3f} {size / 1000:.0f} kB"
    )


def main(names: list[str]) -> None:
    """Write the cases of these names; all if there are none."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if unknown := set(names) - set(CASES):
        raise SystemExit(f"unknown case {sorted(unknown)}; the cases are {' '.join(CASES)}")
    for name in names or CASES:
        print(make(name, CASES[name]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
