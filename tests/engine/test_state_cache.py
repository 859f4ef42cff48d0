"""Slots of states: who has one, which are found again, and that no text changes by any of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama import Model
from cuplama.backends.numpy import NumPyBackend
from cuplama.engine.kv_cache import PAGE
from cuplama.engine.state_cache import PADDING_SLOT, StateCache
from cuplama.models.config import load_config
from tests.engine.test_pages import spoil_new_pages
from tests.fakes import LateNumPyBackend
from tests.tiny import DELTA, LLAMA, assert_all_pages_free, load

TWO = [1 + (i * i) % 9 for i in range(2 * PAGE)]  # two pages


def _states(slots: int) -> StateCache:
    return StateCache(NumPyBackend(), load_config(DELTA), slots)


def _write(states: StateCache, slot: int, value: float) -> None:
    for array in states.arrays.values():
        array[slot] = value


def _held(states: StateCache, slot: int) -> set[float]:
    return {float(x) for array in states.arrays.values() for x in np.unique(array[slot])}


def test_arrays_are_those_of_the_layers_without_attention() -> None:
    states = _states(3)
    assert {name: (a.shape, a.dtype.name) for name, a in states.arrays.items()} == {
        **{f"{i}.cache.conv": ((4, 3, 2 * 2 * 16 + 6 * 24), "float32") for i in range(3)},
        **{f"{i}.cache.state": ((4, 6, 16, 24), "float32") for i in range(3)},
    }
    assert StateCache(NumPyBackend("bf16"), load_config(DELTA), 1).arrays["0.cache.state"].dtype == np.float32
    assert StateCache(NumPyBackend("bf16"), load_config(DELTA), 1).arrays["0.cache.conv"].dtype.name == "bfloat16"


def test_a_slot_has_one_owner() -> None:
    states = _states(2)
    one, other = states.begin(), states.begin()
    assert sorted((one, other)) == [1, 2]
    assert states.free == 0
    assert states.release(one) == PADDING_SLOT
    assert (states.free, states.begin()) == (1, one)
    states.release(PADDING_SLOT)  # of a sequence that has none
    assert states.free == 0
    states.clear()
    assert states.free == 2


def test_a_model_without_states_has_no_slots_to_give() -> None:
    states = StateCache(NumPyBackend(), load_config(LLAMA), 1)
    assert [states.begin() for _ in range(3)] == [PADDING_SLOT] * 3
    assert states.arrays == {}


def test_a_state_is_kept_as_it_was() -> None:
    states = _states(3)
    slot = states.begin()
    _write(states, slot, 5.0)
    states.keep(b"a", slot)
    _write(states, slot, 6.0)
    states.keep(b"a", slot)  # it has one
    assert (states.kept([b"a"]), states.kept([b"b"]), states.kept([b"b", b"a", b"c"])) == (1, 0, 2)
    found = states.begin(b"a")
    assert _held(states, found) == {5.0}
    assert found != slot
    assert states.kept([b"a"]) == 1


def test_the_state_that_was_not_used_for_longest_goes_first() -> None:
    states = _states(3)
    slot = states.begin()
    for key in (b"a", b"b"):
        states.keep(key, slot)
    states.release(states.begin(b"a"))  # takes b's place
    assert (states.kept([b"a"]), states.kept([b"b"])) == (1, 0)
    states.keep(b"c", slot)
    assert (states.kept([b"a"]), states.kept([b"c"])) == (1, 1)
    states.keep(b"d", slot)
    assert (states.kept([b"a"]), states.kept([b"d"])) == (0, 1)


def test_the_last_free_slot_is_taken_over_with_its_state() -> None:
    states = _states(2)
    slot = states.begin()
    _write(states, slot, 5.0)
    states.keep(b"a", slot)
    found = states.begin(b"a")
    assert (_held(states, found), states.kept([b"a"]), states.free) == ({5.0}, 0, 0)
    states.keep(b"b", found)  # no room: it is not kept
    assert states.kept([b"b"]) == 0


# ---- through an engine -----------------------------------------------------------------------------------------------


def _load(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Model:
    model = load(DELTA, context=256, **{"cache_tokens": 20 * PAGE, **options})
    spoil_new_pages(model.engine.cache, monkeypatch)
    return model


def _generate(model: Model, prompt: list[int], **options: Any) -> Any:
    return model.generate(prompt, temperature=0, ignore_eos=True, **{"max_tokens": 8, **options})


@pytest.fixture(params=[False, True], ids=["passes", "captured"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr("cuplama.backends.numpy.NumPyBackend", LateNumPyBackend)


@pytest.mark.usefixtures("device")
def test_a_prompt_goes_on_from_the_last_page_of_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with load(DELTA, context=256, prefix_cache=False) as plain, _load(monkeypatch) as model:
        for rest, cached in (([3, 4], 0), ([3, 4], 128), ([3, 4, 5, 6], 128), ([7], 128)):
            done = _generate(model, [*TWO, *rest])
            assert done.cached_tokens == cached
            assert done.tokens == _generate(plain, [*TWO, *rest]).tokens
        assert_all_pages_free(model)


@pytest.mark.usefixtures("device")
def test_pages_without_a_state_behind_them_are_no_hit_until_a_state_is_left_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second prompt shares one page with the first, whose state is of two: it leaves one where they part."""
    others = [[*TWO[:PAGE], *[n] * PAGE, 2] for n in (3, 4, 5)]
    with load(DELTA, context=256, prefix_cache=False) as plain, _load(monkeypatch) as model:
        _generate(model, [*TWO, 1])
        for prompt, cached in zip(others, (0, PAGE, PAGE), strict=True):
            done = _generate(model, prompt)
            assert done.cached_tokens == cached
            assert done.tokens == _generate(plain, prompt).tokens


@pytest.mark.usefixtures("device")
def test_choices_share_a_prompt_and_have_states_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 20, "ignore_eos": True, "n": 3}
    with load(DELTA, context=256, cache_tokens=20 * PAGE, prefix_cache=False) as plain, _load(monkeypatch) as model:
        found, wanted = (each.generate([*TWO, 9], **options) for each in (model, plain))
        assert [c.tokens for c in found] == [c.tokens for c in wanted]
        assert len({tuple(c.tokens) for c in found}) == 3
        assert model.engine.stats.prefix_hits == 2 * 128


@pytest.mark.usefixtures("device")
def test_states_that_were_taken_by_others_are_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages stay; of states there is room for few."""
    monkeypatch.setattr("cuplama.engine.memory.SPARE_SLOTS", 1)
    with load(DELTA, context=256, prefix_cache=False) as plain, _load(monkeypatch, max_running=1) as model:
        prompts = [[n, *TWO[1:], 5] for n in (1, 2)]
        for prompt, cached in ((0, 0), (0, 128), (1, 0), (1, 128), (0, 0)):
            done = _generate(model, prompts[prompt])
            assert done.cached_tokens == cached
            assert done.tokens == _generate(plain, prompts[prompt]).tokens


@pytest.mark.parametrize("prefix", [False, True])
def test_a_sequence_that_loses_its_pages_begins_again(prefix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[n, *TWO[1 : 60 + n]] for n in (1, 2, 3, 4)]
    with load(DELTA, context=256, prefix_cache=False) as plain:
        wanted = [_generate(plain, p, max_tokens=70).tokens for p in prompts]
    with _load(monkeypatch, cache_tokens=5 * PAGE, prefix_cache=prefix) as model:
        found = _generate(model, prompts, max_tokens=70)  # type: ignore[arg-type]
        assert [c.tokens for c in found] == wanted
        assert model.engine.stats.preemptions > 0
        assert_all_pages_free(model)


def test_fewer_run_where_there_is_no_room_for_the_states_of_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.device._free_memory", lambda: 3e6)
    with load(DELTA, context=256, cache_tokens=20 * PAGE) as model:
        running = model.engine.max_running
        assert 1 < running < 40
        assert model.engine.cache.states.slots - running == min(8, model.engine.cache.states.slots // 4)
        done = model.generate([[n] for n in range(1, 60)], max_tokens=3, temperature=0, ignore_eos=True)
        assert len(done) == 59
