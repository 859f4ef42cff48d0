"""The paged cache: what pages are given and taken back."""

from __future__ import annotations

import pytest

from cuplama.backends.numpy import NumPyBackend
from cuplama.dtypes import DTYPES, dtype_name
from cuplama.engine.kv_cache import PAGE, PagedCache, page_table, pages_for
from cuplama.models.config import load_config
from tests.paths import GOLDEN


def _cache(pages: int, kv_cache_dtype: str = "auto", T: str = "f32") -> PagedCache:
    return PagedCache(NumPyBackend(T), load_config(GOLDEN / "llama3-gqa"), pages, kv_cache_dtype)


def test_pages_are_whole() -> None:
    assert [pages_for(n) for n in (0, 1, PAGE, PAGE + 1, 2 * PAGE)] == [0, 1, 1, 2, 2]


def test_every_layer_has_keys_and_values_of_all_pages_and_of_padding() -> None:
    config, cache = load_config(GOLDEN / "llama3-gqa"), _cache(5)
    assert len(cache.arrays) == 2 * config.num_layers
    assert {a.shape for a in cache.arrays.values()} == {(6, config.num_kv_heads, PAGE, config.head_dim)}
    assert cache.padding_page == 5


@pytest.mark.parametrize("T", ["f32", "f16", "bf16"])
def test_fp8_takes_a_byte_for_each_number(T: str) -> None:
    plain, fp8 = _cache(3, T=T), _cache(3, "fp8", T)
    assert (dtype_name(plain.dtype), dtype_name(fp8.dtype)) == (T, "e4m3")
    assert {dtype_name(a.dtype) for a in fp8.arrays.values()} == {"e4m3"}
    sizes = [sum(a.nbytes for a in cache.arrays.values()) for cache in (plain, fp8)]
    assert sizes[0] == DTYPES[T].itemsize * sizes[1]


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


def test_pages_are_given_all_or_none() -> None:
    cache, one, two = _cache(4), list[int](), list[int]()
    assert cache.extend(one, 2 * PAGE)
    assert not cache.extend(two, 3 * PAGE)
    assert (two, cache.free) == ([], 2)
    assert cache.extend(two, 2 * PAGE)
    assert not cache.extend(one, 2 * PAGE + 1)
    assert (one, cache.free) == ([0, 1], 0)


def test_a_page_of_several_is_free_when_the_last_has_left() -> None:
    cache, one = _cache(3), list[int]()
    cache.extend(one, 2 * PAGE)
    two = cache.share(one)
    assert (two, two is one, cache.free) == ([0, 1], False, 1)
    cache.release(one)
    assert cache.free == 1
    cache.release(two)
    assert cache.free == 3


def test_a_page_with_a_key_is_found_until_it_is_needed_the_first_that_was_left_first() -> None:
    cache = _cache(4)
    one, two, key = list[int](), list[int](), [bytes([i]) for i in range(4)]
    cache.extend(one, 2 * PAGE)
    cache.extend(two, 2 * PAGE)
    for page in range(4):
        cache.name(page, key[page])
    cache.release(two)  # its last page, 3, goes first
    cache.release(one)
    assert (cache.free, [cache.find(k) for k in key], cache.needs([0, 1])) == (4, [0, 1, 2, 3], 2)
    kept = cache.share([3])
    assert (cache.free, cache.needs([3, 0])) == (3, 1)
    new = list[int]()
    cache.extend(new, 2 * PAGE)
    assert new == [2, 1]
    assert [cache.find(k) for k in key] == [0, None, None, 3]
    cache.release(kept)
    cache.release(new)
    assert cache.free == 4
    cache.extend(new, 2 * PAGE)  # those without a key go first
    assert ([cache.find(k) for k in key], sorted(new)) == ([0, None, None, 3], [1, 2])


def test_a_key_has_one_page_and_a_page_one_key() -> None:
    cache, owned = _cache(3), list[int]()
    cache.extend(owned, 3 * PAGE)
    cache.name(0, b"a")
    cache.name(1, b"a")
    cache.name(0, b"b")
    assert (cache.find(b"a"), cache.find(b"b")) == (0, None)
    cache.release(owned)
    cache.extend(owned, 3 * PAGE)
    assert cache.find(b"a") is None
    assert sorted(owned) == [0, 1, 2]


def test_clearing_forgets_keys_and_owners() -> None:
    cache, owned = _cache(3), list[int]()
    cache.extend(owned, 2 * PAGE)
    cache.name(0, b"a")
    cache.clear()
    assert (cache.free, cache.find(b"a")) == (3, None)
    again = list[int]()
    assert cache.extend(again, 3 * PAGE)
    assert again == [0, 1, 2]


def test_a_page_table_is_as_wide_as_the_longest_sequence() -> None:
    table = page_table([[3], [1, 2], []], 9)
    assert table.tolist() == [[3, 9], [1, 2], [9, 9]]
    assert table.dtype == "int32"
