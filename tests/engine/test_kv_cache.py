"""The paged cache: what pages are given, reserved and taken back."""

from __future__ import annotations

import pytest

from cuplama.backends.numpy import NumPyBackend
from cuplama.engine.kv_cache import PAGE, PagedCache, page_table, pages_for
from cuplama.errors import ContextError
from cuplama.models.config import load_config
from tests.paths import GOLDEN


def _cache(pages: int) -> PagedCache:
    return PagedCache(NumPyBackend(), load_config(GOLDEN / "llama3-gqa"), pages)


def test_pages_are_whole() -> None:
    assert [pages_for(n) for n in (0, 1, PAGE, PAGE + 1, 2 * PAGE)] == [0, 1, 1, 2, 2]


def test_every_layer_has_keys_and_values_of_all_pages_and_of_padding() -> None:
    config, cache = load_config(GOLDEN / "llama3-gqa"), _cache(5)
    assert len(cache.arrays) == 2 * config.num_layers
    assert {a.shape for a in cache.arrays.values()} == {(6, config.num_kv_heads, PAGE, config.head_dim)}
    assert cache.padding_page == 5


def test_a_sequence_owns_the_pages_of_its_tokens() -> None:
    cache = _cache(4)
    one, two = list[int](), list[int]()
    cache.extend(one, PAGE)
    cache.extend(two, 2 * PAGE)
    cache.extend(one, PAGE + 1)
    assert (one, two, cache.free) == ([0, 3], [1, 2], 0)
    cache.extend(one, 3)
    assert one == [0, 3]
    cache.release(two)
    assert (two, cache.free) == ([], 2)
    cache.extend(two, 1)
    assert two == [1]


def test_a_run_reserves_what_it_may_need() -> None:
    cache = _cache(4)
    with cache.reserve(3):
        assert (cache.unreserved, cache.free) == (1, 4)
        with cache.reserve(1):
            assert cache.unreserved == 0
        message = f"the KV cache has room for {PAGE} more tokens, {2 * PAGE} are needed: end the streams"
        with pytest.raises(ContextError, match=message), cache.reserve(2):
            pass
        assert cache.unreserved == 1
    assert cache.unreserved == 4


def test_a_reservation_ends_with_an_error_too() -> None:
    cache = _cache(4)
    with pytest.raises(ZeroDivisionError), cache.reserve(3):
        raise ZeroDivisionError
    assert cache.unreserved == 4


def test_a_page_table_is_as_wide_as_the_longest_sequence() -> None:
    table = page_table([[3], [1, 2], []], 9)
    assert table.tolist() == [[3, 9], [1, 2], [9, 9]]
    assert table.dtype == "int32"
