"""What is compared of two runs, and by what measure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tools.divergence import JUMP, Rows, alike, compared, divergence, kl, rows_of, stacked, summary

Array = np.ndarray[Any, Any]


def run(tokens: int, layers: int = 2) -> Rows:
    """Each token has other logits, and experts 1 and 4 with weights 0.25 and 0.75 in every layer."""
    experts, weights = np.tile([4, 1], (tokens, 1)), np.tile([0.75, 0.25], (tokens, 1))
    logits = np.random.default_rng(0).standard_normal((tokens, 5)).astype(np.float32)
    return stacked(logits, [(experts, weights)] * layers)


def test_kl_is_in_nats_and_of_the_truth_first() -> None:
    truth, found = np.zeros((1, 2), np.float32), np.log(np.array([[1, 3]], np.float32))
    assert kl(truth, found) == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert kl(truth + 100, truth - 7) == pytest.approx(0)


def test_experts_are_sorted_with_their_weights_and_padding_is_cut() -> None:
    experts = np.array([[3, 1, 2], [0, 2, 1], [9, 9, 9]])
    weights = experts / 10
    rows = stacked(np.zeros((2, 5), np.float32), [(experts, weights)])
    assert rows.experts.tolist() == [[[1, 2, 3], [0, 1, 2]]]
    np.testing.assert_allclose(rows.weights, [[[0.1, 0.2, 0.3], [0.0, 0.1, 0.2]]], rtol=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("token", [0, 3, 8])
def test_nothing_is_compared_from_the_first_token_with_another_expert_on(token: int, layer: int) -> None:
    truth, found = run(9), run(9)
    found.experts[layer, token, 1] = 3
    found.logits[token:] += np.arange(5)
    assert alike(truth, found) == token
    assert divergence(truth, found).tolist() == [0] * token
    assert len(divergence(truth, run(9))) == 9


def test_a_weight_that_jumps_is_another_function_and_one_that_is_rounded_is_not() -> None:
    truth, found = run(9), run(9)
    found.weights[1, 4] += 0.9 * JUMP * 0.75
    assert alike(truth, found) == 9
    found.weights[1, 4, 0] += 0.2 * JUMP * 0.75
    assert alike(truth, found) == 4


def test_a_model_without_experts_is_compared_as_a_whole() -> None:
    truth, found = run(9, layers=0), run(9, layers=0)
    found.logits[2, 1] += 1
    assert np.flatnonzero(divergence(truth, found)).tolist() == [2]
    assert truth.first(3).logits.shape == (3, 5)


def test_runs_of_other_shapes_are_not_compared() -> None:
    for other in (run(8), run(9, layers=1)):
        with pytest.raises(AssertionError):
            alike(run(9), other)


def test_logits_that_are_no_numbers_are_not_left_out() -> None:
    found = run(9)
    found.experts[0, 3], found.logits[4] = 7, np.nan
    with pytest.raises(AssertionError, match="no finite numbers"):
        divergence(run(9), found)


def test_a_golden_file_gives_back_what_was_written() -> None:
    truth = [run(1), run(9)]
    arrays: dict[str, Array] = {}
    for j, rows in enumerate(truth):
        arrays |= {f"prompt_{j}": np.arange(len(rows.logits))} | rows.arrays(j)
    prompts, found = rows_of(arrays)
    assert prompts == [[0], list(range(9))]
    for a, b in zip(truth, found, strict=True):
        assert alike(a, b) == len(a.logits)
        assert np.array_equal(a.logits, b.logits)
    assert run(3, layers=0).arrays(1).keys() == {"logits_1"}


def test_meta_json_says_of_how_many_tokens_a_mean_is_only_where_some_are_left_out() -> None:
    whole, cut = [np.ones(1), np.zeros(3)], [np.ones(1), np.ones(1)]
    meta = summary({"bfloat16": cut, "float16": whole}, (1, 3))
    assert meta == {"kl": {"bfloat16": 1.0, "float16": 0.25}, "compared": {"bfloat16": [1, 1]}}
    assert summary({"float16": whole}, (1, 3)) == {"kl": {"float16": 0.25}}
    assert compared(meta, "bfloat16", [[5], [5, 6, 7]]) == [1, 1]
    assert compared(meta, "float16", [[5], [5, 6, 7]]) == [1, 3]
