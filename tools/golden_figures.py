"""How far a golden model is, on any backend, from what transformers gave; and what is demanded.

Tests demand it, ``verify_models`` lists the figures. tests/golden/README.md says what is in a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import cuplama
from cuplama import Model

from .divergence import compared, divergence, kl, rows_of
from .runs import in_one_piece, step_by_step, stepwise

__all__ = [
    "ANYHOW",
    "FEWER",
    "LATER",
    "LIMIT",
    "MIN_COMPARED",
    "SCATTER",
    "Golden",
    "allowed",
    "figures_16_bit",
    "figures_float32",
    "met_16_bit",
    "met_float32",
]

LIMIT = 1e-3
"""The largest difference allowed of float32 logits on a GPU."""

SCATTER = 1.1
"""What a mean divergence may be of transformers' own in that dtype. The residual stream and all accumulators are
float32 here: it is 0.4 of that in the median, and 1.06 in the worst case on NumPy (gemma4-shared in float16, where one
token of 84 makes a third of it). Which way a value is rounded hangs on the order of a sum, so another BLAS moves it a
little."""

FEWER = 2.0
"""The same of a mean of less than half of the tokens, as that of decode steps is: fewer scatter more. (On the emulator
steps of gemma4-shared in float16 are at 1.42, because of the same token.)"""

LATER = 3.0
"""The same of all tokens that have transformers' experts, where its own mean ends at the first that has not: it grows
with the position."""

MIN_COMPARED = 0.25
"""The share of tokens that are compared, at least. About one of 50 has other experts in bfloat16, and those behind it
are not compared."""

ANYHOW = 0.5
"""What a mean divergence may be, in nats, where tokens with other experts count as well: on NumPy it is 0.06 at most,
and that of the logits of another token is 2 to 15."""

_CHUNKS = (1, 7, 16)  # tokens of a pass at most, where prompts are fed in pieces
_WITHIN = 32  # tokens: up to the original contexts a prompt is the same function in one piece and token by token
_GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}

_Array = np.ndarray[Any, Any]


class Golden:
    """A folder of tests/golden/cases. prompts: token ids; rows: what each gives; greedy, steps: the tokens that follow,
    and the logits of each of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        with np.load(folder / "golden.npz") as data:
            self.prompts, self.rows = rows_of(data)
            self.greedy = [data[f"greedy_{j}"].tolist() for j in range(len(self.prompts))]
            self.steps = [data[f"steps_{j}"] for j in range(len(self.prompts))]
        self.logits = [rows.logits for rows in self.rows]

    def load(self, device: str, dtype: str = "float32") -> Model:
        """The model, with a cache for all prompts at full length."""
        context = self.meta["context"]
        tokens = len(self.prompts) * context
        return cuplama.load(self.folder, device=device, dtype=dtype, context=context, cache_tokens=tokens)


def _apart(found: _Array, wanted: _Array) -> float:
    """The largest difference of two logits; NaN if one is not a number."""
    assert found.shape == wanted.shape, f"logits {found.shape}, not {wanted.shape}"
    return float(np.abs(found - wanted).max())


def _largest(numbers: Iterable[float]) -> float:
    """NaN if one of them is."""
    return float(np.max(list(numbers)))


def figures_float32(golden: Golden, model: Model) -> dict[str, Any]:
    """Largest differences of logits from transformers', and whether the greedy tokens are its own.

    logits: of prompts in one piece, three times each: launch by launch, captured, replayed; steps: token by token;
    chunks: of the longest prompt in pieces. alone, batch: the tokens of one prompt at a time and of all at once, three
    times, so that they are replayed; plain: without captured graphs; pieces: of all prompts in pieces.
    """
    prompts, wanted, options = golden.prompts, golden.greedy, {**_GREEDY, "max_tokens": len(golden.greedy[0])}

    def one_by_one() -> list[list[int]]:
        return [model.generate(p, **options).tokens for p in prompts]

    def at_once() -> list[list[int]]:
        return [c.tokens for c in model.generate(prompts, **options)]

    pairs = list(zip(prompts, golden.logits, strict=True))
    found: dict[str, Any] = {
        "logits": _largest(_apart(model.logits(p), logits) for p, logits in pairs for _ in range(3)),
        "steps": _largest(_apart(stepwise(model, p), logits) for p, logits in pairs if len(p) < _WITHIN),
        "alone": [one_by_one() for _ in range(3)] == [wanted] * 3,
        "batch": [at_once() for _ in range(3)] == [wanted] * 3,
    }
    with mock.patch.object(model.backend, "captures", False):
        found["plain"] = one_by_one() == wanted
    apart, equal = list[float](), list[bool]()
    for chunk in _CHUNKS:
        with mock.patch.object(model.backend, "prefill_chunk", chunk):
            apart.append(_apart(model.logits(prompts[-1]), golden.logits[-1]))
            equal.append(at_once() == wanted)
    return {**found, "chunks": _largest(apart), "pieces": all(equal)}


def met_float32(figures: Mapping[str, Any]) -> bool:
    """Whether logits are within ``LIMIT`` and all tokens equal."""
    near = all(figures[name] <= LIMIT for name in ("logits", "steps", "chunks"))
    return near and all(figures[name] for name in ("alone", "batch", "plain", "pieces"))


def allowed(counted: float, most: float = 1.0) -> float:
    """What a mean divergence may be of transformers' own: ``most``, or ``FEWER`` for less than half of the tokens."""
    return most if counted >= 0.5 else FEWER


def figures_16_bit(golden: Golden, model: Model, dtype: str) -> dict[str, float]:
    """Mean divergences in nats from transformers' float32 logits.

    transformers: of its own run in this dtype; whole: of prompts in one piece, of the tokens of which that is a mean;
    counted: which share of all these are; steps: of the short ones token by token, of the same; alike: of all tokens of
    both ahead of the first with other experts; any: of all tokens; compared: the share of them that is alike.
    """
    counts, short = compared(golden.meta, dtype, golden.prompts), [p for p in golden.prompts if len(p) < _WITHIN]
    whole = [(rows, in_one_piece(model, p)) for rows, p in zip(golden.rows, golden.prompts, strict=True)]
    steps = [(golden.rows[golden.prompts.index(p)], step_by_step(model, p)) for p in short]
    near_whole, near_steps = ([divergence(*pair) for pair in pairs] for pairs in (whole, steps))
    same = np.concatenate([rows[:n] for rows, n in zip(near_whole, counts, strict=True)])
    alike = np.concatenate(near_whole + near_steps)
    every = np.concatenate([kl(truth.logits, found.logits) for truth, found in whole + steps])
    return {
        "transformers": golden.meta["kl"][dtype],
        "whole": float(same.mean()),
        "counted": len(same) / sum(map(len, golden.prompts)),
        "steps": float(np.concatenate([rows[:n] for rows, n in zip(near_steps, counts, strict=False)]).mean()),
        "alike": float(alike.mean()),
        "any": float(every.mean()),
        "compared": len(alike) / len(every),
    }


def met_16_bit(figures: Mapping[str, float]) -> bool:
    """Whether enough tokens are compared, and their divergences are as small as those of transformers."""
    limit, counted = figures["transformers"], figures["counted"]
    factors = {"whole": allowed(counted, SCATTER), "steps": FEWER, "alike": LATER}
    near = all(0 < figures[name] <= factor * limit for name, factor in factors.items())
    return near and figures["any"] <= ANYHOW and figures["compared"] >= MIN_COMPARED
