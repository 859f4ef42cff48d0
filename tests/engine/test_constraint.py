"""What a constraint allows, on its way to the draw."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cuplama.backends.numpy import NumPyBackend
from cuplama.engine.constraint import MaskWords
from cuplama.engine.sampler import MASK, Needs, Sampler, fill_masks
from cuplama.engine.sequence import SequenceState
from cuplama.models.graph import LOGITS
from cuplama.sampling_params import SamplingParams

Array = np.ndarray[Any, Any]
VOCAB = 50


def run(sampler: Sampler, logits: Array, seq_lens: Array) -> list[Array]:
    """What the sampler's nodes make of the logits, in the order of ``Sampler.outs``."""
    outs = NumPyBackend().run(sampler.nodes, {**sampler.inputs, "seq_lens": seq_lens, LOGITS: logits}, sampler.outs)
    return [outs[name] for name in sampler.outs]


def _sequence(prompt: list[int], made: list[int], **settings: Any) -> SequenceState:
    s = SequenceState(prompt, SamplingParams(**settings), frozenset())
    s.tokens += made
    return s


class Only:
    """Allows some tokens; counts how often it was asked."""

    finished, error = False, None

    def __init__(self, *allowed: int) -> None:
        self.allowed, self.asked = allowed, 0

    def fill_mask(self, row: MaskWords) -> None:
        self.asked += 1
        row[:] = 0
        for t in self.allowed:
            row[t // 32] |= np.int32(1 << t % 32)

    def accept(self, token: int) -> None:
        raise AssertionError("the sampler does not draw")


def _constrained(*allowed: int, **settings: Any) -> SequenceState:
    s = _sequence([1], [], **settings)
    s.constraint = Only(*allowed)
    return s


def test_only_allowed_tokens_are_drawn_and_other_rows_are_as_they_are_alone() -> None:
    logits = np.random.default_rng(3).standard_normal((4, VOCAB)).astype(np.float32)
    free = [_sequence([1], [], temperature=1.0, seed=i) for i in range(2)]
    batch = [_constrained(7), free[0], _constrained(3, 40, 49, temperature=2.0, seed=5), free[1]]
    sampler = Sampler(VOCAB, batch)
    assert [n.op for n in sampler.nodes] == ["token_mask", "sample"]
    assert sampler.inputs[MASK].shape == (4, 2)
    drawn = run(sampler, logits, np.ones(4, np.int32))[0].tolist()
    alone = run(Sampler(VOCAB, free), logits[[1, 3]], np.ones(2, np.int32))[0].tolist()
    assert [drawn[1], drawn[3]] == alone
    assert drawn[0] == 7
    assert drawn[2] in (3, 40, 49)


def test_a_mask_comes_after_penalties_and_bias_and_changes_no_log_probability() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 9] = 5
    s = _constrained(4, 5, logit_bias={5: 1.0, 9: 50.0}, logprobs=1)
    sampler = Sampler(VOCAB, [s])
    assert [n.op for n in sampler.nodes] == ["penalize", "token_mask", "sample", "count_token", "logprobs"]
    token, chosen, ids, _ = run(sampler, logits, np.array([1], np.int32))
    assert token.tolist() == [5]
    assert ids[0].tolist() == [9]
    assert chosen[0] == pytest.approx(-math.log(math.exp(5) + VOCAB - 1), abs=1e-5)


def test_masks_are_filled_again_after_each_token() -> None:
    batch = [_constrained(7), _sequence([1], []), _constrained(8)]
    sampler = Sampler(VOCAB, batch)
    rows = np.full((3, 2), -1, np.int32)
    batch[2].finish_reason = "stop"
    fill_masks(rows, batch)
    assert [s.constraint.asked for s in batch if isinstance(s.constraint, Only)] == [2, 1]
    assert rows.tolist() == [[1 << 7, 0], [-1, -1], [-1, -1]]
    assert sampler.inputs[MASK].tolist() == [[1 << 7, 0], [-1, -1], [1 << 8, 0]]


def test_rows_of_no_sequence_may_draw_anything() -> None:
    sampler = Sampler(VOCAB, [_constrained(7)])
    host = sampler.empty_inputs(3)
    sampler.pad_into(host)
    assert host[MASK].tolist() == [[1 << 7, 0], [-1, -1], [-1, -1]]


def test_a_sampler_with_masks_serves_sequences_without_a_constraint() -> None:
    free, bound = [_sequence([1], [])], [_constrained(1), _sequence([1], [])]
    needs = Needs.of(bound, VOCAB)
    assert needs.cover(Needs.of(free, VOCAB))
    assert not Needs.of(free, VOCAB).cover(needs)
    assert Sampler(VOCAB, free, needs).inputs[MASK].tolist() == [[-1, -1]]


def test_a_constraint_holds_stop_tokens_back_by_itself() -> None:
    """The sampler would leave nothing to draw where the grammar allows nothing but the end."""
    free = _sequence([1], [], min_tokens=5)
    free.stop_ids = frozenset({4})
    bound = _constrained(4, min_tokens=5)
    bound.stop_ids = frozenset({4})
    assert Sampler(VOCAB, [free, bound]).inputs["min_positions"].tolist() == [6, 1]
