"""The prefix cache: what is found and what is not, in which order pages go, and that no text changes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuplama import Model
from cuplama.engine.kv_cache import PAGE, PagedCache
from cuplama.engine.prefix_cache import PrefixCache, extend_keys
from cuplama.engine.sequence import SequenceState
from cuplama.models.rope import Rope
from cuplama.sampling_params import SamplingParams
from tests.tiny import LLAMA, assert_all_pages_free, load

DEFAULT = Rope("default", 1e4, 4, 512, 512, {})
LONGROPE = Rope("longrope", 1e4, 4, 512, 100, {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]})
DYNAMIC = Rope("dynamic", 1e4, 4, 100, 100, {"factor": 2.0})


def _keys(tokens: list[int], salt: str = "") -> list[bytes]:
    keys = list[bytes]()
    extend_keys(keys, tokens, len(tokens) // PAGE, salt)
    return keys


def test_a_key_stands_for_all_tokens_up_to_it() -> None:
    tokens = list(range(4 * PAGE))
    keys = _keys(tokens)
    assert len({*keys}) == 4
    assert {len(key) for key in keys} == {16}
    other = _keys([*tokens[:PAGE], 9999, *tokens[PAGE + 1 :]])
    assert [a == b for a, b in zip(keys, other, strict=True)] == [True, False, False, False]
    assert not {*keys} & {*_keys(tokens, "0 1")}
    assert not {*keys} & {*_keys(tokens[PAGE:])}
    longer = keys[:1]
    extend_keys(longer, tokens, 3, "")
    assert longer == keys[:3]


def _sequence(tokens: list[int], drawn: int = 0, **params: Any) -> SequenceState:
    s = SequenceState(tokens, SamplingParams(seed=0, **params), frozenset())
    s.tokens += [7] * drawn
    return s


def _prefixes(rope: Rope = DEFAULT, pages: int = 16, enabled: bool = True) -> PrefixCache:
    backend: Any = SimpleNamespace(dtype=np.dtype(np.float32))
    config: Any = SimpleNamespace(caches={}, delta_layers=())
    return PrefixCache(PagedCache(backend, config, pages), [rope], enabled)


def _kept(prefixes: PrefixCache, s: SequenceState, cached: int | None = None) -> list[int]:
    """A sequence has run and left these pages behind."""
    prefixes.take(s, [])
    s.cached = len(s.tokens) - 1 if cached is None else cached
    prefixes.cache.extend(s.pages, len(s.tokens))
    pages = s.pages[:]
    prefixes.keep(s)
    prefixes.cache.release(s.pages)
    return pages


ONE = list(range(3 * PAGE))


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (ONE, 2),  # one token is left to be fed
        ([*ONE, 5], 2),  # the last page of the one before was not full of cached tokens
        (ONE[: 2 * PAGE + 1], 2),
        (ONE[: 2 * PAGE], 1),
        (ONE[:PAGE], 0),
        ([*ONE[: PAGE + 5], *ONE[:PAGE]], 1),
        (ONE[1:], 0),
    ],
)
def test_full_pages_are_found_and_at_least_one_token_is_left(tokens: list[int], found: int) -> None:
    prefixes = _prefixes()
    pages = _kept(prefixes, _sequence(ONE))
    s = _sequence(tokens)
    assert prefixes.find(s)[0] == pages[:found]
    prefixes.take(s, pages[:found])
    assert (s.cached, s.found, prefixes.hits) == (found * PAGE,) * 3
    assert prefixes.queries == len(ONE) + len(tokens)


def test_what_was_drawn_is_found_too() -> None:
    prefixes = _prefixes()
    pages = _kept(prefixes, _sequence(ONE, drawn=PAGE))
    assert prefixes.find(_sequence([*ONE, *[7] * PAGE]))[0] == pages[:3]
    assert prefixes.find(_sequence([*ONE, *[8] * PAGE]))[0] == pages[:3]
    assert prefixes.find(_sequence([*ONE, *[7] * PAGE, 1]))[0] == pages[:3]  # the last drawn token was never fed


def test_the_next_key_is_told() -> None:
    """Another may be about to write that page."""
    prefixes = _prefixes()
    _kept(prefixes, _sequence(ONE))
    s = _sequence([*ONE, *[9] * PAGE])
    pages, following = prefixes.find(s)
    assert (len(pages), following) == (2, _keys(ONE, DEFAULT.keys_depend_on(1, 1))[2:])
    assert prefixes.find(_sequence(ONE))[1] == []


def test_who_asks_for_the_logits_of_its_prompt_reads_it_all_and_off_is_off() -> None:
    prefixes = _prefixes()
    _kept(prefixes, _sequence(ONE))
    for s in (_sequence(ONE, prompt_logprobs=0), _sequence(ONE)):
        s.every_logit = s.params.prompt_logprobs is None
        assert prefixes.find(s) == ([], [])
    off = _prefixes(enabled=False)
    _kept(off, _sequence(ONE))
    assert off.find(_sequence(ONE)) == ([], [])
    assert len(off.cache._empty) == 16


def test_what_is_read_again_is_no_question_and_no_hit() -> None:
    prefixes = _prefixes()
    pages = _kept(prefixes, _sequence(ONE))
    s = _sequence(ONE)
    s.life = 1
    prefixes.take(s, pages[:2])
    assert (s.cached, s.found, prefixes.queries, prefixes.hits) == (2 * PAGE, 0, len(ONE), 0)


def test_longrope_has_pages_of_either_regime() -> None:
    """Short texts and long ones, by the length that a sequence has when it is read."""
    prefixes = _prefixes(LONGROPE)
    short = _kept(prefixes, _sequence(ONE[:90]))
    long = _kept(prefixes, _sequence(ONE))
    assert prefixes.find(_sequence(ONE[:80]))[0] == short[:1]
    assert prefixes.find(_sequence(ONE[:100]))[0] == short[:1]
    assert prefixes.find(_sequence(ONE[:101]))[0] == long[:1]
    crossed = _sequence([5] * 90, drawn=10)
    prefixes.take(crossed, [])
    prefixes.cache.extend(crossed.pages, 101)
    crossed.cached = 99
    crossed.tokens.append(7)  # its keys are those of a short text, and it has become a long one
    prefixes.keep(crossed)
    assert prefixes.find(_sequence([5] * 91))[0] == prefixes.find(_sequence([5] * 191))[0] == []


def test_dynamic_depends_on_the_prompt_where_that_is_longer_than_the_context() -> None:
    prefixes = _prefixes(DYNAMIC)
    short = _kept(prefixes, _sequence(ONE[:90], drawn=40))
    assert prefixes.find(_sequence(ONE[:70]))[0] == short[:1]
    long = _kept(prefixes, _sequence(ONE[:150]))
    assert prefixes.find(_sequence(ONE[:150]))[0] == long[:2]
    assert prefixes.find(_sequence(ONE[:151]))[0] == []
    assert prefixes.find(_sequence(ONE[:150], drawn=9))[0] == long[:2]
    assert prefixes.find(_sequence(ONE[:99]))[0] == short[:1]


def test_pages_go_that_were_not_used_for_longest() -> None:
    prefixes = _prefixes(pages=6)
    a, b, c = ([n] * (2 * PAGE + 1) for n in (1, 2, 3))
    _kept(prefixes, _sequence(a))
    _kept(prefixes, _sequence(b))
    s = _sequence(a)
    prefixes.take(s, prefixes.find(s)[0])  # it is used again
    prefixes.cache.release(s.pages)
    _kept(prefixes, _sequence(c))
    _kept(prefixes, _sequence([4] * (PAGE + 1)))
    assert [len(prefixes.find(_sequence(t))[0]) for t in (a, b, c)] == [2, 0, 2]


# ---- whole models ----------------------------------------------------------------------------------------------------

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "ignore_eos": True}
PROMPT = [1 + i * i % 90 for i in range(2 * PAGE + 20)]


@pytest.fixture
def model(either_device: str) -> Iterator[Model]:
    with load(LLAMA, context=256, cache_tokens=2048) as model:
        yield model
        assert_all_pages_free(model)


def test_the_second_time_the_beginning_is_not_read_and_the_text_is_the_same(model: Model) -> None:
    engine = model.engine
    with load(LLAMA, context=256, prefix_cache=False) as plain:
        for params in (GREEDY, SAMPLED):
            wanted = plain.generate(PROMPT, **params)
            first, again = model.generate(PROMPT, **params), model.generate(PROMPT, **params)
            assert first.tokens == again.tokens == wanted.tokens
            assert (again.cached_tokens, wanted.cached_tokens) == (2 * PAGE, 0)
        assert plain.engine.stats.prefix_hits == plain.engine.stats.prefix_queries * 0
    assert engine.stats.prefix_hits == 3 * 2 * PAGE
    assert engine.stats.prefix_queries == 4 * len(PROMPT)
    assert engine.stats.prompt_tokens == 4 * len(PROMPT) - 3 * 2 * PAGE


def test_n_choices_read_their_prompt_once(model: Model) -> None:
    """The others wait until the first has read it."""
    done = model.generate(PROMPT, **SAMPLED, n=5)
    assert [c.cached_tokens for c in done] == [0, *[2 * PAGE] * 4]
    assert model.engine.stats.prompt_tokens == 5 * len(PROMPT) - 4 * 2 * PAGE
    for i, c in enumerate(done):
        assert c.tokens == model.generate(PROMPT, **{**SAMPLED, "seed": 3 + i}).tokens
    assert len({tuple(c.tokens) for c in done}) > 1


def test_a_second_turn_reads_what_is_new(model: Model) -> None:
    """The answer of the first is a part of its prompt."""
    first = model.generate(PROMPT, **{**GREEDY, "max_tokens": 60})
    turn = [*PROMPT, *first.tokens, 5, 6, 7]
    second = model.generate(turn, **GREEDY)
    assert second.cached_tokens == (len(PROMPT) + 59) // PAGE * PAGE == 3 * PAGE
    with load(LLAMA, context=256, prefix_cache=False) as plain:
        assert second.tokens == plain.generate(turn, **GREEDY).tokens


def test_scores_of_a_prompt_are_complete_beside_sequences_that_share_it(model: Model) -> None:
    model.generate(PROMPT, **GREEDY)
    scored = model.generate(PROMPT, **GREEDY, prompt_logprobs=0)
    assert scored.prompt_logprobs is not None
    assert (scored.cached_tokens, len(scored.prompt_logprobs)) == (0, len(PROMPT))
    assert model.logits(PROMPT).shape[0] == len(PROMPT)


def test_sequences_that_share_pages_and_lose_them(either_device: str) -> None:
    """In a cache for one and a half of them."""
    prompts = [[*PROMPT[: PAGE + 30], i] for i in range(4)]
    params = {**SAMPLED, "max_tokens": 110}
    with load(LLAMA, context=256, cache_tokens=256) as model:
        with load(LLAMA, context=256, prefix_cache=False) as plain:
            wanted = [plain.generate(p, **params).tokens for p in prompts]
        for _ in range(2):
            assert [c.tokens for c in model.generate(prompts, **params)] == wanted
        assert model.engine.stats.preemptions > 0
        assert model.engine.stats.prefix_hits > 0
        assert_all_pages_free(model)
