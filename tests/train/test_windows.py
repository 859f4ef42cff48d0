"""Which rows the steps get, and what their batches say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.errors import PromptError
from cuplama.train.batch import Batch
from cuplama.train.data import TokenData
from cuplama.train.documents import BEGINS, LEARNED
from cuplama.train.windows import Windows, evaluation_batches


def made(count: int, begins: tuple[int, ...] = (0,), learned: Any = True) -> TokenData:
    """Tokens 0, 1, ... with documents that begin at some places."""
    flags = np.zeros(count, np.uint8)
    flags[list(begins)] |= BEGINS
    flags[np.zeros(count, bool) | np.asarray(learned)] |= LEARNED
    total = int(np.count_nonzero(flags & LEARNED))
    return TokenData(np.arange(count, dtype=np.uint16), flags, {"fingerprint": "", "learned": total})


def same(a: list[Batch], b: list[Batch]) -> bool:
    names = ("input_ids", "positions", "targets", "weights", "bounds")
    return all(np.array_equal(getattr(x, n), getattr(y, n)) for x, y in zip(a, b, strict=True) for n in names)


def test_documents_together_are_one_text_in_each_row() -> None:
    data = made(9, begins=(0, 2, 3))
    batch = next(evaluation_batches(replace(data, apart=False), 4, 2))
    assert batch.bounds.tolist() == [0, 4, 8]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_batch_of_two_rows_with_documents() -> None:
    data = made(9, begins=(0, 2, 3), learned=[True, True, False, True, True, True, True, True, True])
    batch = next(evaluation_batches(data, 4, 2))
    assert batch.input_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batch.targets.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.positions.tolist() == [0, 1, 0, 0, 0, 1, 2, 3]
    assert (batch.weights * 7).tolist() == pytest.approx([1, 0, 1, 1, 1, 1, 1, 1])
    assert batch.bounds.tolist() == [0, 2, 3, 4, 8]
    assert {array.dtype.str for array in (batch.input_ids, batch.positions, batch.targets, batch.bounds)} == {"<i4"}
    assert batch.weights.dtype == np.float32


def test_one_row_and_its_next_token_is_enough() -> None:
    windows = Windows(made(5), 4, 3, 2, 0)
    for step in (1, 2, 50):
        batches = windows.step(step)
        assert [b.input_ids.tolist() for b in batches] == [[0, 1, 2, 3] * 3] * 2
    with pytest.raises(PromptError, match=r"the data has 4 tokens, and a row of 4 needs 5"):
        Windows(made(4), 4, 1, 1, 0)
    with pytest.raises(PromptError, match="no token that is learned"):
        Windows(made(9, learned=[True] + [False] * 8), 4, 1, 1, 0)


def starts(windows: Windows, steps: range) -> list[int]:
    return [int(batch.input_ids[0]) for step in steps for batch in windows.step(step)]


@pytest.mark.parametrize("count", [33, 34, 37, 40, 101])
def test_an_epoch_covers_every_token_in_an_order_of_its_own(count: int) -> None:
    windows = Windows(made(count), 4, 1, 1, 7)
    epochs = []
    for epoch in range(4):
        steps = range(1 + epoch * windows.count, 1 + (epoch + 1) * windows.count)
        found = starts(windows, steps)
        assert set().union(*(range(s, s + 5) for s in found)) == set(range(count))
        assert max(found) + 5 <= count
        epochs.append(found)
    assert len({tuple(found) for found in epochs}) == 4
    assert len({tuple(sorted(found)) for found in epochs}) > 1  # and it is cut at other places


def test_the_choice_depends_on_seed_and_step_alone() -> None:
    data = made(1000, begins=(0, 300, 301, 777))
    one, other = Windows(data, 16, 4, 2, 3), Windows(data, 16, 4, 2, 3)
    for step in range(1, 90):
        one.step(step)
    assert same(one.step(61), other.step(61))
    assert not same(one.step(61), Windows(data, 16, 4, 2, 4).step(61))
    assert not same(one.step(61), one.step(62))
    halves = Windows(data, 16, 8, 1, 3).step(61)
    assert np.array_equal(np.concatenate([b.input_ids for b in one.step(61)]), halves[0].input_ids)


def test_the_weights_of_a_step_add_up_to_one_over_all_its_batches() -> None:
    learned = np.random.default_rng(0).random(500) < 0.3
    windows = Windows(made(500, learned=learned), 8, 2, 3, 0)
    for step in range(1, 60):
        batches = windows.step(step)
        weights = np.concatenate([b.weights for b in batches])
        assert len(set(weights[weights > 0].tolist())) == 1
        assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("place", [1, 2, 5, 47, 97])
def test_rows_without_anything_to_learn_give_way(place: int) -> None:
    windows = Windows(made(98, learned=np.arange(98) == place), 8, 4, 1, 0)
    for step in range(1, 30):
        (batch,) = windows.step(step)
        assert batch.targets[batch.weights > 0].tolist() == [place] * 4


@pytest.mark.parametrize("count", [2, 5, 8, 9, 10, 17, 40])
def test_an_evaluation_has_every_target_once(count: int) -> None:
    data = made(count, begins=(0, 1))
    batches = list(evaluation_batches(data, 4, 2))
    assert all(b.rows == 8 for b in batches)
    counted = np.concatenate([b.targets[b.weights > 0] for b in batches])
    assert counted.tolist() == list(range(1, count))
    assert sum(float(b.weights.sum()) for b in batches) == pytest.approx(1)
    with pytest.raises(PromptError, match="no token whose prediction could be judged"):
        next(evaluation_batches(made(1), 4, 2))


def test_documents_are_padded_to_few_sizes() -> None:
    data = made(4000, begins=tuple(range(0, 4000, 7)))
    sizes = {len(b.bounds) for k in range(1, 40) for b in Windows(data, 32, 4, 1, 0).step(k)}
    assert sizes <= {17, 33}
