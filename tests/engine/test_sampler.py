"""The sampler against a plain implementation of what the sampling parameters mean."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cuplama.backends.numpy import NumPyBackend
from cuplama.engine.sampler import Needs, Sampler, drawn_tokens
from cuplama.engine.sequence import SequenceState, Token
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
    assert sampler.needs == Needs(penalised=True, biased=True, top_n=3)
    token, chosen, ids, best = run(sampler, logits[None], np.array([1], np.int32))
    wanted = logits - np.log(np.exp(logits).sum())
    assert token.tolist() == [7]
    assert chosen[0] == pytest.approx(wanted[7], abs=1e-5)
    assert ids[0].tolist() == np.argsort(-logits)[:3].tolist()
    assert best[0] == pytest.approx(np.sort(wanted)[::-1][:3], abs=1e-5)


def _sequence(prompt: list[int], made: list[int], stops: set[int] | None = None, **settings: Any) -> SequenceState:
    s = SequenceState(prompt, SamplingParams(**settings), frozenset(stops or ()))
    s.tokens += made
    return s


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.1},
        {"repetition_penalty": 0.9},
        {"presence_penalty": 0.1},
        {"presence_penalty": -0.1},
        {"frequency_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias": {0: 1.0}},
        {"min_tokens": 1},
    ],
    ids=str,
)
def test_any_one_setting_changes_logits_before_the_draw(settings: dict[str, Any]) -> None:
    plain = _sequence([1], [])
    assert [n.op for n in Sampler(VOCAB, [plain]).nodes] == ["sample"]
    for batch in ([_sequence([1], [], **settings)], [plain, _sequence([1], [], **settings)]):
        sampler = Sampler(VOCAB, batch)
        assert [n.op for n in sampler.nodes] == ["penalize", "sample", "count_token"]
        assert ("bias" in sampler.inputs) == ("logit_bias" in settings)


def test_tokens_are_counted_twice_and_those_of_the_prompt_are_marked() -> None:
    """As the op ``penalize`` reads it: twice the count of drawn tokens, and 1 for a token of the prompt."""
    sampler = Sampler(8, [_sequence([1, 2, 2], [2, 5, 5], presence_penalty=1.0), _sequence([0], [])])
    assert sampler.inputs["seen"].tolist() == [[0, 1, 3, 0, 0, 4, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert sampler.inputs["presence"].tolist() == [1, 0]
    assert sampler.inputs["repetition"].tolist() == [1, 1]


def test_stop_tokens_are_padded_with_no_token() -> None:
    sampler = Sampler(8, [_sequence([1], [], {7, 3}, min_tokens=2), _sequence([1, 2], [], {4}), _sequence([1], [])])
    # Without min_tokens none is held back, so the second may draw its own.
    assert sampler.inputs["stop_ids"].tolist() == [[3, 7], [-1, -1], [-1, -1]]
    assert sampler.inputs["min_positions"].tolist() == [3, 2, 1]
    none = Sampler(8, [_sequence([1], [], min_tokens=2)])
    assert none.inputs["stop_ids"].tolist() == [[-1]]


def test_numbers_that_int32_does_not_hold_are_cut() -> None:
    sampler = Sampler(8, [_sequence([1], [], max_tokens=None, min_tokens=2**40, top_k=2**40)])
    assert sampler.inputs["min_positions"].tolist() == sampler.inputs["top_k"].tolist() == [2**31 - 1]


def test_rows_of_no_sequence_change_nothing() -> None:
    """Zero in every input but the repetition penalty, which divides."""
    sampler = Sampler(8, [_sequence([1], [3], {2}, temperature=0.5, frequency_penalty=0.5, logit_bias={4: 1.0})])
    host = {name: np.full_like(a, 9) for name, a in sampler.empty_inputs(3).items()}
    sampler.pad_into(host)
    assert host.keys() == sampler.inputs.keys()
    for name, array in host.items():
        assert array.shape == (3, *sampler.inputs[name].shape[1:])
        assert np.array_equal(array[:1], sampler.inputs[name])
        assert (array[1:] == (1 if name == "repetition" else 0)).all()
    assert not any(a.any() for a in sampler.empty_inputs(3).values())


def test_as_many_best_tokens_as_the_most_that_one_sequence_asks_for() -> None:
    def top_n(*asked: int | None) -> int | None:
        return Sampler(4, [_sequence([1], [], logprobs=n) for n in asked]).needs.top_n

    assert [top_n(None), top_n(0), top_n(2, None, 3, 1), top_n(4), top_n(5)] == [None, 0, 3, 4, 4]


def test_samplers_with_the_same_needs_share_a_captured_step() -> None:
    one = Sampler(VOCAB, [_sequence([1], [2], {5, 6}, min_tokens=3)])
    two = Sampler(VOCAB, [_sequence([3], [], {7, 8}, min_tokens=1), _sequence([4], [], frequency_penalty=1.0)])
    assert one.needs == two.needs
    assert one.nodes is two.nodes
    others: list[dict[str, Any]] = [{"logprobs": 0}, {"logit_bias": {1: 1.0}}, {"stops": {5}}, {"min_tokens": 0}]
    keys = [Sampler(VOCAB, [_sequence([1], [], **{"stops": {5, 6}, "min_tokens": 3, **o})]).needs for o in others]
    assert one.needs not in keys
    assert len(set(keys)) == len(keys)


def test_every_sequence_gets_the_log_probabilities_that_it_asked_for() -> None:
    active = [_sequence([1], [], logprobs=n) for n in (None, 0, 2)]
    ids, best = np.array([4, 5, 6, 0]), np.array([[7, 8, 9]] * 4)
    scores = np.array([[-1.0, -2.0, -3.0]] * 4)
    outs = [ids, np.array([-0.5, -0.25, -0.125, 0.0]), best, scores]
    rows = list(enumerate(active))
    assert drawn_tokens(rows, outs) == [Token(4), Token(5, -0.25), Token(6, -0.125, ((7, -1.0), (8, -2.0)))]
    assert drawn_tokens(rows[:2], outs[:1]) == [Token(4), Token(5)]
    assert drawn_tokens([(3, active[1]), (0, active[0])], outs) == [Token(0, 0.0), Token(4)]  # any rows, in any order


def test_a_sampler_that_can_do_more_draws_the_same() -> None:
    """A sequence that joins a decode loop gets the sampler that is there."""
    logits = np.random.default_rng(0).standard_normal((1, VOCAB)).astype(np.float32)
    s, at = _sequence([1, 2], [3], temperature=1.0, seed=4), np.array([3], np.int32)
    (wanted,) = run(Sampler(VOCAB, [s]), logits, at)
    for needs in (Needs(True), Needs(True, True), Needs(True, False, 4), Needs(masked=True), Needs(top_n=2)):
        assert run(Sampler(VOCAB, [s], needs), logits, at)[0] == wanted
    held = _sequence([1], [], {int(np.argmax(logits))}, temperature=0, min_tokens=1)
    (wanted,) = run(Sampler(VOCAB, [held]), logits, np.array([1], np.int32))
    wider = Sampler(VOCAB, [held], Needs(True, True, 8, True, 3))
    assert run(wider, logits, np.array([1], np.int32))[0] == wanted != np.argmax(logits)


NEEDS = [
    Needs(),
    Needs(True),
    Needs(True, True),
    Needs(True, False, 2),
    Needs(True, True, 4),
    Needs(masked=True),
    Needs(top_n=0),
    Needs(top_n=3),
    Needs(True, True, 4, True, 3),
]


@pytest.mark.parametrize("one", NEEDS, ids=str)
def test_one_sampler_covers_another_where_every_single_need_is_covered(one: Needs) -> None:
    def words(needs: Needs) -> set[Any]:
        """What a sampler can do, one thing at a time."""
        can: set[Any] = {name for name in ("penalised", "biased", "masked") if getattr(needs, name)}
        can |= {("stops", n) for n in range(needs.stops + 1) if needs.penalised}
        return can | {("top", n) for n in range(-1 if needs.top_n is None else needs.top_n + 1)}

    for other in NEEDS:
        assert one.cover(other) == (words(one) >= words(other))
