"""The sampler against a plain implementation of what the sampling parameters mean."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cuplama.backends.numpy import NumPyBackend
from cuplama.engine.sampler import Sampler
from cuplama.engine.sequence import SequenceState
from cuplama.models.graph import LOGITS
from cuplama.sampling_params import SamplingParams

Array = np.ndarray[Any, Any]
INF = math.inf
VOCAB = 50


def expected(logits: Array, p: SamplingParams, prompt: list[int], made: list[int], stops: set[int]) -> Array:
    """The distribution over the next token, in float64, one definition after the other."""
    z = [float(v) for v in logits]
    for t in {*prompt, *made}:
        z[t] = z[t] / p.repetition_penalty if z[t] > 0 else z[t] * p.repetition_penalty
    for t in set(made):
        z[t] -= p.presence_penalty + p.frequency_penalty * made.count(t)
    for t, bias in p.logit_bias.items():
        z[t] += bias
    if len(made) < p.min_tokens:
        for t in stops:
            z[t] = -INF
    if p.temperature == 0:
        certain: Array = np.eye(VOCAB)[int(np.argmax(z))]
        return certain
    z = [v / p.temperature for v in z]
    order = sorted(range(VOCAB), key=lambda t: -z[t])
    if p.top_k:
        order = order[: p.top_k]
    weight = {t: math.exp(z[t] - z[order[0]]) for t in order}
    if p.top_p < 1:
        total, mass, kept = sum(weight.values()), 0.0, []
        for t in order:  # the smallest set that reaches top_p
            kept.append(t)
            mass += weight[t]
            if mass >= p.top_p * total:
                break
        weight = {t: weight[t] for t in kept}
    if p.min_p:
        weight = {t: w for t, w in weight.items() if w >= p.min_p}
    found = np.zeros(VOCAB)
    for t, w in weight.items():
        found[t] = w / sum(weight.values())
    return found


def run(sampler: Sampler, logits: Array, seq_lens: Array) -> list[Array]:
    """What the sampler's nodes make of the logits, in the order of ``Sampler.outs``."""
    outs = NumPyBackend().run(sampler.nodes, {**sampler.inputs, "seq_lens": seq_lens, LOGITS: logits}, sampler.outs)
    return [outs[name] for name in sampler.outs]


def draw(logits: Array, params: list[SamplingParams], prompt: list[int], made: list[int], stops: set[int]) -> list[int]:
    """One token for each of the params, as one batch through the engine's sampler and the ops."""
    batch = []
    for p in params:
        s = SequenceState(prompt, p, frozenset(stops))
        s.tokens += made
        batch.append(s)
    sampler = Sampler(VOCAB, batch)
    rows = np.repeat(logits[None].astype(np.float32), len(batch), 0)
    pos = np.full(len(batch), len(prompt) + len(made), np.int32)
    tokens: list[int] = run(sampler, rows, pos)[0].tolist()
    return tokens


PENALTIES: dict[str, Any] = {"repetition_penalty": 1.4, "presence_penalty": 0.6, "frequency_penalty": 0.3}
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, **PENALTIES, "logit_bias": {4: 2.0, 9: -INF}},
    {"temperature": 1},
    {"temperature": 0.5},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 1, "top_p": 0.6},
    {"temperature": 1.3, "min_p": 0.2},
    {"temperature": 1, "top_k": 8, "top_p": 0.7},
    {"temperature": 1.7, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 2, "top_k": 12, "top_p": 0.8, "min_p": 0.15, "min_tokens": 9, **PENALTIES, "logit_bias": {4: 5.0}},
    {"temperature": 1, "repetition_penalty": 0.7, "presence_penalty": -1.0, "frequency_penalty": -0.5},
    {"temperature": 1, "min_tokens": 2},  # as many as were made: stop tokens may come
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_definition(settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(len(str(settings)))
    logits = 2 * rng.standard_normal(VOCAB)
    prompt, made = [1, 2, 3, 3], [5, 7] if settings.get("min_tokens") == 2 else [5, 5, 7, 3]
    stops = {int(np.argmax(logits)), 8}
    count = 1 if settings["temperature"] == 0 else 1500
    params = [SamplingParams(**settings, seed=seed) for seed in range(count)]
    wanted = expected(logits, params[0], prompt, made, stops)
    found = np.bincount(draw(logits, params, prompt, made, stops), minlength=VOCAB) / count
    assert not found[wanted == 0].any()
    # Five standard deviations of each token's count; the seeds are fixed, so this is the same on every run.
    assert (np.abs(found - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / count) + 1e-12).all()
    assert (wanted > 0).sum() > 1 or count == 1


def test_a_draw_does_not_depend_on_its_batch() -> None:
    logits = np.random.default_rng(0).standard_normal(VOCAB)
    params = [SamplingParams(**s, seed=i) for i, s in enumerate(SETTINGS)]
    alone = [draw(logits, [p], [1, 2], [3], {8})[0] for p in params]
    assert draw(logits, params, [1, 2], [3], {8}) == alone
    assert draw(logits, params[::-1], [1, 2], [3], {8}) == alone[::-1]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32)
    p = SamplingParams(temperature=2, top_k=1, logit_bias={7: 50.0}, logprobs=3)
    s = SequenceState([1], p, frozenset())
    sampler = Sampler(VOCAB, [s])
    assert sampler.top_n == 3
    token, chosen, ids, best = run(sampler, logits[None], np.array([1], np.int32))
    wanted = logits - np.log(np.exp(logits).sum())
    assert token.tolist() == [7]
    assert chosen[0] == pytest.approx(wanted[7], abs=1e-5)
    assert ids[0].tolist() == np.argsort(-logits)[:3].tolist()
    assert best[0] == pytest.approx(np.sort(wanted)[::-1][:3], abs=1e-5)
