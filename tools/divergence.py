"""How far two runs of a model are apart in nats, with NumPy alone: by this the golden files are made and held to.

A router chooses the experts whose scores are largest. Where two scores are nearly equal a rounding decides, and then
the token has other experts. The same is true of the sparse mixer of Phi, which leaves an expert out of a softmax where
its score is below a limit: there a weight jumps. Either way the logits of the token are of another function, and so are
those of the tokens that see it. That says nothing of the arithmetic, and is a hundred times what the arithmetic does.
So the rows from the first such token on are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["JUMP", "Rows", "alike", "compared", "divergence", "kl", "rows_of", "stacked", "summary"]

Array = np.ndarray[Any, Any]

JUMP = 0.1
"""The change of a weight, in shares of the largest of its token, that is a jump. In bfloat16 the golden models' weights
move by up to 0.05; an expert that drops out of a softmax over c nearly equal scores moves them by 1 / c."""


@dataclass(frozen=True)
class Rows:
    """What a run gives for n tokens.

    logits: float32 [n, vocab]; experts: int32 [layers with experts, n, k], in ascending order; weights: float32, of
    each of these. Both have no layers for a model that has no experts.
    """

    logits: Array
    experts: Array
    weights: Array

    def first(self, count: int) -> Rows:
        """Those of the first tokens."""
        return Rows(self.logits[:count], self.experts[:, :count], self.weights[:, :count])

    def arrays(self, j: int) -> dict[str, Array]:
        """Those of a golden file that say this of prompt j."""
        routed = {f"experts_{j}": self.experts, f"weights_{j}": self.weights}
        return {f"logits_{j}": self.logits, **(routed if len(self.experts) else {})}


def stacked(logits: Array, layers: Sequence[tuple[Array, Array]]) -> Rows:
    """The rows of a run whose routers gave (experts, weights) [n or more, k] in any order, layer by layer."""
    if not layers:
        none = np.empty((0, len(logits), 0))
        return Rows(logits, none.astype(np.int32), none.astype(np.float32))
    experts, weights = (np.stack([layer[i][: len(logits)] for layer in layers]) for i in (0, 1))
    order = experts.argsort(-1)
    experts, weights = (np.take_along_axis(x, order, -1) for x in (experts, weights))
    return Rows(logits, experts.astype(np.int32), weights.astype(np.float32))


def rows_of(golden: Mapping[str, Array]) -> tuple[list[list[int]], list[Rows]]:
    """The prompts of a golden file, and what transformers gave for each in float32."""
    prompts = [golden[f"prompt_{j}"].tolist() for j in range(sum(name.startswith("prompt_") for name in golden))]
    rows = []
    for j in range(len(prompts)):
        layers = zip(golden.get(f"experts_{j}", ()), golden.get(f"weights_{j}", ()), strict=True)
        rows.append(stacked(golden[f"logits_{j}"], list(layers)))
    return prompts, rows


def kl(truth: Array, logits: Array) -> Array:
    """KL(truth || logits) per row, in nats, in float64."""

    def log_softmax(z: Array) -> Array:
        z = z.astype(np.float64)
        z = z - z.max(-1, keepdims=True)
        out: Array = z - np.log(np.exp(z).sum(-1, keepdims=True))
        return out

    p, q = log_softmax(truth), log_softmax(logits)
    rows: Array = (np.exp(p) * (p - q)).sum(-1)
    return rows


def alike(truth: Rows, found: Rows) -> int:
    """How many tokens come before the first that has another expert in some layer, or whose weight jumps there."""
    assert truth.logits.shape == found.logits.shape, f"logits {found.logits.shape}, not {truth.logits.shape}"
    assert truth.experts.shape == found.experts.shape, f"experts {found.experts.shape}, not {truth.experts.shape}"
    jumps = np.abs(found.weights - truth.weights) > JUMP * truth.weights.max(-1, keepdims=True, initial=0)
    other = np.flatnonzero(((truth.experts != found.experts) | jumps).any((0, 2)))
    return int(other[0]) if len(other) else len(truth.logits)


def divergence(truth: Rows, found: Rows) -> Array:
    """KL(truth || found) in nats of each row that ``alike`` counts."""
    assert np.isfinite(found.logits).all(), "logits that are no finite numbers"  # such rows have other experts, too
    count = alike(truth, found)
    return kl(truth.logits[:count], found.logits[:count])


def summary(runs: Mapping[str, Sequence[Array]], lengths: Sequence[int]) -> dict[str, Any]:
    """What the meta.json of a golden model says of runs by their dtypes, each given as the divergences of its prompts.

    kl: their means; compared: of how many tokens of each prompt, of the dtypes where that is not all of ``lengths``.
    """
    counts = {dtype: list(map(len, parts)) for dtype, parts in runs.items()}
    compared = {dtype: count for dtype, count in counts.items() if count != list(lengths)}
    means = {dtype: float(np.concatenate(list(parts)).mean()) for dtype, parts in runs.items()}
    return {"kl": means, **({"compared": compared} if compared else {})}


def compared(meta: Mapping[str, Any], dtype: str, prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens of each prompt the ``kl`` in a meta.json is a mean of."""
    counts: list[int] = meta.get("compared", {}).get(dtype, list(map(len, prompts)))
    return counts
