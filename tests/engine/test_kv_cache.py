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


def test_a_sequence_gives_back_the_pages_that_so_many_tokens_do_not_need() -> None:
    cache, owned = _cache(4), list[int]()
    cache.extend(owned, 4 * PAGE)
    cache.shrink(owned, PAGE + 1)
    assert (owned, cache.free) == ([0, 1], 2)
    cache.shrink(owned, 3 * PAGE)
    assert owned == [0, 1]
    cache.extend(owned, 3 * PAGE)
    assert owned == [0, 1, 2]
    cache.shrink(owned, 0)
    assert (owned, cache.free) == ([], 4)


def test_all_pages_but_some_become_free() -> None:
    cache, owned = _cache(5), [3]
    cache.free_all_but([owned, []])
    assert cache.free == 4
    cache.extend(owned, 3 * PAGE)
    assert owned == [3, 0, 1]
    cache.free_all_but([])
    assert cache.free == 5


def test_a_page_table_is_as_wide_as_the_longest_sequence() -> None:
    table = page_table([[3], [1, 2], []], 9)
    assert table.tolist() == [[3, 9], [1, 2], [9, 9]]
    assert table.dtype == "int32"
