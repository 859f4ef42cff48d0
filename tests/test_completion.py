"""Streams and their end, threads, interruptions, and where the time went."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from cuplama import Model
from cuplama.completion import Timings
from cuplama.errors import ClosedError, DeviceError, ParameterError, TokenizerError
from tests.tiny import CHARS, copy, load

pytestmark = pytest.mark.usefixtures("all_pages_come_back")


@pytest.fixture(scope="module")
def greedy(chars: Model) -> str:
    """The greedy continuation of "First", one token per character, up to the full context."""
    done = chars.generate("First", max_tokens=None, temperature=0)
    assert len(done.text) == len(done.tokens) == 75
    return done.text


def test_a_stream_that_is_closed_gives_its_pages_back(chars: Model, greedy: str) -> None:
    cache = chars.engine.cache
    for end in (lambda s: s.close(), lambda s: None):
        stream = chars.stream(["First", "First"], max_tokens=None)
        assert [next(stream).text for _ in range(6)] == [c for c in greedy[:3] for _ in "ab"]
        assert cache.free < cache.pages
        end(stream)
        del stream  # dropping it is enough
        assert cache.free == cache.pages
    stream = chars.stream("First", max_tokens=2)
    assert "".join(d.text for d in stream) == greedy[:2]
    assert list(stream) == []
    assert stream.timings.prompt_tokens == 5
    assert stream.timings.decode_tokens == 1


def test_a_stream_starts_when_it_is_read(chars: Model) -> None:
    stream = chars.stream("First", max_tokens=2)
    assert chars.engine.cache.free == chars.engine.cache.pages
    stream.close()
    assert list(stream) == []


def test_streams_can_interleave(chars: Model, greedy: str) -> None:
    one, two = chars.stream("First", max_tokens=None), chars.stream("First", max_tokens=None)
    pairs = list(zip(one, two, strict=True))
    assert "".join(a.text for a, _ in pairs) == "".join(b.text for _, b in pairs) == greedy
    assert chars.logits([1, 2]).shape == (2, 65)


def test_streams_that_fill_the_cache(greedy: str) -> None:
    with load(CHARS) as model:  # two pages: one full sequence
        stream = model.stream("First", max_tokens=None)
        assert next(stream).text == greedy[0]
        assert model.generate("First", max_tokens=None).text == greedy
        assert model.logits([1] * 80).shape == (80, 65)
        assert "".join(d.text for d in stream) == greedy[1:]
        assert model.generate("First", max_tokens=None).text == greedy


def test_a_stream_that_has_ended_holds_nothing(greedy: str) -> None:
    with load(CHARS) as model:  # two pages: one full sequence
        stream = model.stream("First", max_tokens=5)
        deltas = [next(stream) for _ in range(5)]
        assert deltas[-1].finish_reason == "length"
        assert model.engine.cache.free == model.engine.cache.pages
        assert model.generate("First", max_tokens=None).text == greedy
        assert list(stream) == []
        with model.stream("First", max_tokens=None) as other:
            assert next(other).text == greedy[0]
        assert model.engine.cache.free == model.engine.cache.pages


@pytest.mark.parametrize("records", [False, True])
def test_threads_take_turns(records: bool, greedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured graphs, plans and pools serve one thread at a time; and BLAS has the threads that it had before."""
    before = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    with load(CHARS, cache_tokens=640) as model:
        model.backend.captures = records
        inside: list[int] = []
        run = model.backend.run

        def alone(*args: Any) -> Any:
            inside.append(1)
            assert len(inside) == 1
            outs = run(*args)
            inside.pop()
            return outs

        monkeypatch.setattr(model.backend, "run", alone)
        with ThreadPoolExecutor(3) as pool:
            texts = list(pool.map(lambda _: model.generate("First", max_tokens=40).text, range(9)))
    assert texts == [greedy[:40]] * 9
    assert [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"] == before


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_are_refused(records: bool, temperature: float) -> None:
    with load(CHARS) as model:
        model.backend.captures = records
        model.generate("First", max_tokens=3)
        model.engine.runner.values["norm"][...] = np.nan
        with pytest.raises(DeviceError, match=r"logits after 5 tokens are not finite in f32; --dtype float32 may help"):
            model.generate("First", temperature=temperature, max_tokens=10)
        assert model.engine.cache.free == model.engine.cache.pages


def test_times_of_a_sequence_that_loses_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reads 64 tokens again when the first has ended: that is no prompt time."""
    now = [0.0]
    monkeypatch.setattr("cuplama.completion.time.perf_counter", lambda: now[0])
    with load(CHARS) as model:
        run = model.backend.run

        def slow(*args: Any) -> Any:
            now[0] += len(args[1].get("input_ids", ()))  # of the layers and of the head, but not of the sampling
            return run(*args)

        monkeypatch.setattr(model.backend, "run", slow)
        one, two = model.generate(["First", "Second"], max_tokens=70)
    assert one.timings == two.timings == Timings(11, 2 * 11.0, 2 * 69, 2 * (2 * 69.0 + 64), 2 * 70)


class Interrupter:
    """Runs the backend, and acts as Ctrl-C on a given call."""

    def __init__(self, run: Any, at: int) -> None:
        self.run, self.left = run, at

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.run(*args)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_ctrl_c_gives_the_pages_back(chars: Model, at: int, monkeypatch: pytest.MonkeyPatch, greedy: str) -> None:
    cache = chars.engine.cache
    monkeypatch.setattr(chars.backend, "run", Interrupter(chars.backend.run, at))
    with pytest.raises(KeyboardInterrupt):
        chars.generate(["First", "Second"], max_tokens=20)
    assert cache.free == cache.pages
    assert chars.generate("First", max_tokens=20).text == greedy[:20]


def test_closing(greedy: str) -> None:
    model = load(CHARS)
    stream = model.stream("First", max_tokens=None)
    assert next(stream).text == greedy[0]
    model.close()
    model.close()
    hello = [{"role": "user", "content": "Hi"}]
    calls: list[Callable[[], object]] = [
        lambda: model.generate("First"),
        lambda: model.generate([]),
        lambda: model.generate("First", n=2),
        lambda: model.stream("First"),
        lambda: model.stream([]),
        lambda: model.logits([1]),
        lambda: model.engine,
        lambda: next(stream),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match=r"^the model is closed; cuplama\.load opens it again$") as caught:
            call()
        assert isinstance(caught.value, RuntimeError)
    # What needs no device goes on.
    assert model.decode(model.encode("First")) == "First"
    assert model.params(top_k=3).top_k == 3
    with pytest.raises(TokenizerError, match="no chat template"):
        model.chat(hello)


def test_chat_of_a_closed_model(tmp_path: Path) -> None:
    folder = copy(CHARS, tmp_path)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}:{% endfor %}")
    model = load(folder)
    model.close()
    for call in (model.chat, model.stream_chat):
        with pytest.raises(ClosedError, match="the model is closed"):
            call([{"role": "user", "content": "Hi"}])


def test_a_stream_ends_with_its_completion(chars: Model, greedy: str) -> None:
    done = chars.generate("First", max_tokens=9, logprobs=1, seed=3)
    stream = chars.stream("First", max_tokens=9, logprobs=1, seed=3)
    seen = ""
    before = stream.completion
    assert (before.text, before.tokens, before.finish_reason, before.logprobs) == ("", [], None, [])
    for delta in stream:
        seen += delta.text
        now = stream.completion
        assert (now.text, now.finish_reason) == (seen, delta.finish_reason)
    assert replace(stream.completion, timings=done.timings) == done
    assert stream.completions == [stream.completion]
    assert stream.completion.timings == stream.timings
    assert before.tokens == []  # a completion does not grow


def test_a_stream_that_is_closed_has_what_came_so_far(chars: Model, greedy: str) -> None:
    with chars.stream("First", max_tokens=None) as stream:
        for _ in range(3):
            next(stream)
    for _ in range(2):
        assert (stream.completion.text, stream.completion.finish_reason) == (greedy[:3], None)
        assert list(stream) == []
        with pytest.raises(StopIteration):
            next(stream)
        stream.close()
    unread = chars.stream(["First", "F"], n=2)
    unread.close()
    assert [(c.text, c.finish_reason) for c in unread.completions] == [("", None)] * 4
    with chars.stream("First", max_tokens=2) as unread:
        pass
    assert list(unread) == []


def test_completion_is_that_of_one_sequence(chars: Model) -> None:
    for stream, count in ((chars.stream(["F", "F"]), 2), (chars.stream("F", n=3), 3), (chars.stream([]), 0)):
        with pytest.raises(ParameterError, match=f"^the stream has {count} sequences: use its completions$"):
            _ = stream.completion
    assert chars.stream(["F"]).completion.prompt == chars.stream("F", n=1).completion.prompt == "F"


def test_repr_of_a_stream(chars: Model) -> None:
    stream = chars.stream("First", max_tokens=2)
    assert repr(stream) == "<Stream of 1 sequence: 0 tokens so far>"
    next(stream)
    assert repr(stream) == "<Stream of 1 sequence: 1 token so far>"
    assert len(list(stream)) == 1
    assert repr(stream) == "<Stream of 1 sequence: 2 tokens, ended>"
    assert repr(chars.stream(["F", "F"], n=2)) == "<Stream of 4 sequences: 0 tokens so far>"


def test_a_stream_is_its_own_iterator(chars: Model) -> None:
    stream = chars.stream("First", max_tokens=3)
    assert iter(stream) is stream
    assert sum(1 for _ in stream) == 3


def test_two_models_at_once(chars: Model, llama: Model, greedy: str) -> None:
    ids = llama.generate([5, 6], max_tokens=10, ignore_eos=True).tokens
    texts = zip(chars.stream("First", max_tokens=10), llama.stream([5, 6], max_tokens=10, ignore_eos=True), strict=True)
    pairs = list(texts)
    assert "".join(a.text for a, _ in pairs) == greedy[:10]
    assert [b.token.id for _, b in pairs] == ids


def test_progress(chars: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chars.backend, "prefill_chunk", 4)
    seen: list[tuple[int, int]] = []
    chars.generate([1] * 10, max_tokens=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    loaded: list[tuple[int, int]] = []
    load(CHARS, progress=lambda done, total: loaded.append((done, total))).close()
    assert loaded[-1][0] == loaded[-1][1] > 0
    assert loaded == sorted(loaded)
