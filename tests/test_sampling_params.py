"""Sampling parameters and their checks, and the sampler against a plain implementation of what they mean."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from cuplama.backends.numpy import NumPyBackend
from cuplama.engine.sampler import Sampler
from cuplama.engine.sequence import SequenceState
from cuplama.errors import ParameterError
from cuplama.sampling_params import PARAMETERS, SamplingParams, sampling_defaults, unsupported_settings

Array = np.ndarray[Any, Any]

INF, NAN = math.inf, math.nan
BAD: dict[str, list[Any]] = {
    "max_tokens": [-1, 1.0, True, "5", NAN, [5]],
    "min_tokens": [-1, None, 0.5],
    "temperature": [-0.1, NAN, INF, None, "hot", True, 1j, 10**400],
    "top_k": [-1, 2.5, None, "1"],
    "top_p": [-0.01, 1.01, NAN, None, 10**400],
    "min_p": [-0.01, 1.01, NAN, True],
    "repetition_penalty": [0, -1, NAN, INF, 1e7, 1e-7],
    "presence_penalty": [INF, -INF, NAN, "x", 1e31],
    "frequency_penalty": [INF, NAN, None],
    "logit_bias": [[1], {"1": 2.0}, {1: NAN}, {1: INF}, {-1: 0.0}, {1.5: 0.0}, {1: "x"}, {True: 1.0}],
    "seed": [-1, 2**64, 1.5, True, "1"],
    "stop": [5, [""], "", [b"x"], ["a", None]],
    "stop_token_ids": [5, [-1], ["1"], [1.0], [True]],
    "ignore_eos": [1, None, "yes"],
    "logprobs": [-1, 65, True, 2.0],
}
GOOD: dict[str, list[tuple[Any, Any]]] = {  # given -> as it is kept
    "max_tokens": [(None, None), (0, 0), (10**30, 10**30), (np.int64(5), 5)],
    "min_tokens": [(np.uint8(3), 3)],
    "temperature": [(0, 0.0), (np.float32(0.5), 0.5), (Fraction(1, 2), 0.5), (1e30, 1e30), (1e-7, 0.0)],
    "top_k": [(0, 0), (10**30, 10**30)],
    "top_p": [(0, 0.0), (1, 1.0)],
    "min_p": [(1, 1.0)],
    "repetition_penalty": [(1e-6, 1e-6), (1e6, 1e6)],
    "presence_penalty": [(-2, -2.0)],
    "frequency_penalty": [(-2, -2.0)],
    "logit_bias": [({}, {}), (None, {}), ({np.int64(3): np.float32(1)}, {3: 1.0}), ({0: -INF}, {0: -INF})],
    "seed": [(None, None), (0, 0), (2**64 - 1, 2**64 - 1), (np.uint64(2**64 - 1), 2**64 - 1)],
    "stop": [("x", ("x",)), (["x", "yy"], ("x", "yy")), ([], ()), (None, ()), (iter(["a"]), ("a",))],
    "stop_token_ids": [([], ()), (None, ()), ({3}, (3,)), (np.array([3, 4]), (3, 4)), (range(2), (0, 1))],
    "ignore_eos": [(True, True)],
    "logprobs": [(None, None), (0, 0), (64, 64)],
}


def test_every_parameter_is_covered() -> None:
    assert set(BAD) == set(GOOD) == set(PARAMETERS)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values], ids=str)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} = ")
    assert "it must be " in message
    assert len(message) < 250
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value", "kept"), [(n, *pair) for n, pairs in GOOD.items() for pair in pairs], ids=str
)
def test_values_are_kept_as_plain_python(name: str, value: Any, kept: Any) -> None:
    found = getattr(SamplingParams(**{name: value}), name)
    assert found == kept
    assert type(found) is type(kept)


def test_seeds_are_drawn_where_none_is_given() -> None:
    assert SamplingParams(seed=0).with_seed() == 0
    drawn = {SamplingParams().with_seed() for _ in range(4)}
    assert len(drawn) == 4
    assert all(0 <= seed < 2**64 for seed in drawn)


def test_defaults_from_generation_config() -> None:
    assert sampling_defaults({}) == {}
    assert sampling_defaults({"bos_token_id": 1, "eos_token_id": [2], "top_k": 50}) == {}  # nothing says to sample
    assert sampling_defaults({"do_sample": True}) == {"temperature": 1.0}
    assert sampling_defaults({"do_sample": True, "temperature": 0.6, "top_p": 0.9}) == {
        "temperature": 0.6,
        "top_p": 0.9,
    }
    assert sampling_defaults({"temperature": 0.6}) == {"temperature": 0.6}
    # Without sampling, what shapes the draw is dropped; penalties and lengths stay.
    greedy = {"do_sample": False, "temperature": 0.6, "top_k": 9, "top_p": 0.9, "min_p": 0.1}
    stay = {"repetition_penalty": 1.1, "max_new_tokens": 7, "min_new_tokens": 2}
    assert sampling_defaults({**greedy, **stay}) == {"repetition_penalty": 1.1, "max_tokens": 7, "min_tokens": 2}
    assert sampling_defaults({"do_sample": True, "top_k": None, "max_new_tokens": None}) == {"temperature": 1.0}
    for wrong in ({"repetition_penalty": 0}, {"do_sample": 1.5}, {"temperature": "x"}, {"max_new_tokens": -3}):
        with pytest.raises(ParameterError):
            sampling_defaults(wrong)


# --- The sampler ----------------------------------------------------------------------------------

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


def draw(logits: Array, params: list[SamplingParams], prompt: list[int], made: list[int], stops: set[int]) -> list[int]:
    """One token for each of the params, as one batch through the engine's sampler and the ops."""
    backend = NumPyBackend()
    batch = []
    for p in params:
        s = SequenceState(prompt, p, frozenset(stops))
        s.tokens += made
        batch.append(s)
    sampler = Sampler(VOCAB, batch)
    rows = np.repeat(logits[None].astype(np.float32), len(batch), 0)
    pos = np.full(len(batch), len(prompt) + len(made), np.int32)
    tokens: list[int] = sampler.draw(backend, sampler.inputs, rows, pos)[0].tolist()
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
    token, chosen, ids, best = sampler.draw(NumPyBackend(), sampler.inputs, logits[None], np.array([1], np.int32))
    wanted = logits - np.log(np.exp(logits).sum())
    assert token.tolist() == [7]
    assert chosen[0] == pytest.approx(wanted[7], abs=1e-5)
    assert ids[0].tolist() == np.argsort(-logits)[:3].tolist()
    assert best[0] == pytest.approx(np.sort(wanted)[::-1][:3], abs=1e-5)


def test_unsupported_generation_settings_are_named() -> None:
    asked = {"num_beams": 4, "no_repeat_ngram_size": 0, "suppress_tokens": [1, 2], "temperature": 0.7}
    assert unsupported_settings(asked) == ["num_beams = 4", "suppress_tokens = [1, 2]"]
