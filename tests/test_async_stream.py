"""Generation for asyncio: many tasks in one batch, cancelled in every phase, forgotten, and in two event loops."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from cuplama import Model
from cuplama.async_stream import _Mailbox, _mailboxes
from cuplama.engine.calls import Call
from cuplama.engine.kv_cache import PAGE
from cuplama.errors import BusyError, ClosedError, ContextError, CopyError
from tests.tiny import CHARS, assert_all_pages_free, in_threads, load

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 20}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 20}
PROMPTS = ["First", "The", "To be"]


@pytest.fixture
def model(either_device: str) -> Iterator[Model]:
    """The characters' model with a cache of five pages, where its context takes two."""
    with load(CHARS, cache_tokens=5 * PAGE) as model:
        yield model
        gc.collect()
        with model.engine._turn:
            model.engine._settle()
        assert_all_pages_free(model)
        assert model.engine._calls == {}


def _run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(work(), 60)

    return asyncio.run(limited())


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError


def test_fifty_tasks_get_their_own_texts(model: Model, chars: Model) -> None:
    prompts = [f"{'ab' * (i % 9)}{chr(65 + i // 2)}{'cd'[i % 2]}" for i in range(50)]
    wanted = [chars.generate(p, **SAMPLED).text for p in prompts]

    async def work() -> list[Any]:
        return await asyncio.gather(*(model.agenerate(p, **SAMPLED) for p in prompts))

    assert [c.text for c in _run(work)] == wanted
    assert model.engine.stats.steps < 50 * 20 / 2  # they share steps


def test_a_stream_gives_what_generate_gives(model: Model, chars: Model) -> None:
    wanted = chars.generate(PROMPTS, **SAMPLED, n=2, logprobs=1)

    async def work() -> Any:
        stream, texts = model.astream(PROMPTS, **SAMPLED, n=2, logprobs=1), [""] * 6
        async for delta in stream:
            texts[delta.index] += delta.text
        assert texts == [c.text for c in stream.completions]
        return stream.result

    for done, other in zip(_run(work), wanted, strict=True):
        assert (done.text, done.tokens, done.finish_reason, done.index, done.seed) == (
            other.text, other.tokens, other.finish_reason, other.index, other.seed)  # fmt: skip
        assert [t.id for t in done.logprobs] == [t.id for t in other.logprobs or ()]


def test_ready_gives_what_is_there_and_waits_for_nothing(model: Model, chars: Model) -> None:
    async def work() -> str:
        async with model.astream("First", **GREEDY) as stream:
            first = await anext(stream)
            await _until(lambda: not model.engine.scheduler.running)
            rest = stream.ready()
            assert len(rest) == 19
            assert stream.ready() == []
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            return first.text + "".join(d.text for d in rest)

    assert _run(work) == chars.generate("First", **GREEDY).text


def test_an_error_comes_after_what_was_drawn_before(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        stream = model.astream("First", temperature=0, max_tokens=None)
        await anext(stream)
        run, left = model.backend.run, [9]

        def failing(*args: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise ZeroDivisionError("a fault")
            return run(*args)

        monkeypatch.setattr(model.backend, "run", failing)
        await _until(lambda: model.engine.failure is not None)
        assert len(stream.ready()) > 0
        assert stream.ready() == []
        with pytest.raises(ZeroDivisionError, match="a fault"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert len((await model.agenerate("The", **GREEDY)).tokens) == 20  # type: ignore[union-attr]

    _run(work)


def test_errors_of_the_call_come_at_the_call(model: Model) -> None:
    async def work() -> None:
        with pytest.raises(ContextError):
            model.astream("x" * 100)
        with pytest.raises(ContextError):
            await model.agenerate("x" * 100)

    _run(work)
    with pytest.raises(RuntimeError, match="no running event loop"):
        model.astream("First")


def test_too_many_that_wait_are_refused_at_the_call(either_device: str) -> None:
    with load(CHARS, max_running=1, max_waiting=1) as model:

        async def work() -> None:
            tasks = [asyncio.create_task(model.agenerate(p, **GREEDY)) for p in "ab"]
            await asyncio.sleep(0)
            with pytest.raises(BusyError):
                model.astream("c", **GREEDY)
            await asyncio.gather(*tasks)
            await model.agenerate("c", **GREEDY)

        _run(work)


@pytest.mark.parametrize("phase", ["before", "waiting", "prompt", "text", "read", "end"])
def test_a_task_that_is_cancelled_frees_its_pages(
    model: Model, chars: Model, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """In whatever it does, and the others go on."""
    monkeypatch.setattr(model.backend, "prefill_chunk", 8)
    model.engine.scheduler.max_running = 1 if phase == "waiting" else 99
    prompt = "a" * 50

    async def reads(stream: Any) -> None:
        async for _ in stream:
            if phase == "read":
                await asyncio.sleep(60)

    async def work() -> str:
        other = asyncio.create_task(model.agenerate("The", **GREEDY))
        if phase == "waiting":
            await asyncio.sleep(0)  # it comes first
        if phase == "before":
            victim = asyncio.create_task(model.agenerate(prompt, **GREEDY))
        else:
            stream = model.astream(prompt, **GREEDY)
            victim = asyncio.create_task(reads(stream))  # type: ignore[arg-type]
            sequence = stream._generation.outputs[0].sequence
            reached = {
                "waiting": lambda: True,
                "prompt": lambda: sequence.cached > 0,
                "text": lambda: sequence.generated > 1,
                "read": lambda: sequence.generated > 1,
                "end": lambda: sequence.finish_reason is not None,
            }[phase]
            await asyncio.sleep(0)
            await _until(reached)
        victim.cancel()
        await asyncio.wait([victim])
        assert victim.cancelled() or phase == "end"
        if phase != "before":
            await _until(lambda: not sequence.pages)
        return (await other).text  # type: ignore[union-attr]

    assert _run(work) == chars.generate("The", **GREEDY).text


def test_a_stream_that_is_closed_or_forgotten_frees_its_pages(model: Model, chars: Model) -> None:
    wanted = chars.generate("The", **GREEDY).text

    async def work() -> None:
        for leave in ("aclose", "forget", "with", "twice"):
            stream = model.astream("First", temperature=0, max_tokens=None)
            await anext(stream)
            if leave == "with":
                async with stream:
                    pass
            elif leave != "forget":
                await stream.aclose()
                await stream.aclose()
                assert [d async for d in stream] == []
            del stream
            gc.collect()
            await _until(lambda: model.engine.cache.free == model.engine.cache.pages)
            assert (await model.agenerate("The", **GREEDY)).text == wanted  # type: ignore[union-attr]

    _run(work)


def test_threads_and_tasks_share_a_batch(model: Model, chars: Model) -> None:
    wanted = [chars.generate(p, **SAMPLED).text for p in PROMPTS]

    async def work() -> list[str]:
        done = await asyncio.gather(*(model.agenerate(p, **SAMPLED) for p in PROMPTS * 3))
        return [c.text for c in done]  # type: ignore[union-attr]

    def thread() -> list[str]:
        return [model.generate(p, **SAMPLED).text for p in PROMPTS]

    found = in_threads(lambda: _run(work), thread, lambda: _run(work), thread)
    assert found == [wanted * 3, wanted, wanted * 3, wanted]


def test_who_wants_the_end_alone_gets_it(model: Model, chars: Model) -> None:
    async def work() -> Any:
        streams = [model.astream(p, **SAMPLED) for p in PROMPTS]
        await asyncio.gather(*(s.finish() for s in streams))
        return [s.completion for s in streams]

    for found, p in zip(_run(work), PROMPTS, strict=True):
        wanted = chars.generate(p, **SAMPLED)
        assert (found.text, found.tokens, found.finish_reason) == (wanted.text, wanted.tokens, wanted.finish_reason)


def test_a_rest_ends_with_the_generation_or_by_the_clock(model: Model, chars: Model) -> None:
    async def work() -> Any:
        async with model.astream(PROMPTS[0], **SAMPLED) as stream:
            first = [await anext(stream)]
            await stream.rest(1e-3)
            began = time.monotonic()
            await stream.rest(60)
            await stream.rest(60)
            assert time.monotonic() - began < 30
            deltas = first + stream.ready()
            return deltas, stream.ended, stream.completion

    deltas, ended, found = _run(work)
    wanted = chars.generate(PROMPTS[0], **SAMPLED)
    assert ended
    assert "".join(d.text for d in deltas) == found.text == wanted.text
    assert [d.token.id for d in deltas] == wanted.tokens


def test_a_loop_that_ends_in_the_middle_leaves_the_others_alone(model: Model, chars: Model) -> None:
    async def leaves() -> None:
        stream = model.astream("First", temperature=0, max_tokens=None)
        await anext(stream)
        kept.append(stream)  # it outlives its loop

    kept: list[Any] = []
    for _ in range(3):
        _run(leaves)
        assert model.generate("The", **GREEDY).text == chars.generate("The", **GREEDY).text
    kept.clear()

    async def works() -> Any:
        return await model.agenerate("The", **GREEDY)

    assert _run(works).text == chars.generate("The", **GREEDY).text


class _Told:
    """In place of a stream: what it does when it is told that there is something new."""

    def __init__(self, come: Callable[[], None]) -> None:
        self._come = come


def test_a_message_to_a_loop_that_has_just_been_closed_is_dropped() -> None:
    loop = asyncio.new_event_loop()
    mailbox = _Mailbox(loop)
    loop.close()
    stream: Any = _Told(lambda: None)
    mailbox.post(weakref.ref(stream))


def test_what_a_step_brings_for_many_streams_wakes_their_loop_once() -> None:
    async def work() -> int:
        loop, woken = asyncio.get_running_loop(), [0]
        mailbox = _Mailbox(loop)
        call_soon = loop.call_soon_threadsafe

        def counted(*args: Any) -> Any:
            woken[0] += 1
            return call_soon(*args)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
        events = [asyncio.Event() for _ in range(9)]
        streams: list[Any] = [_Told(event.set) for event in events]
        for stream in streams:
            mailbox.post(weakref.ref(stream))
        await asyncio.gather(*(event.wait() for event in events))
        loop.call_soon_threadsafe = call_soon  # type: ignore[method-assign]
        return woken[0]

    assert asyncio.run(work()) == 1


def test_a_loop_is_not_kept_alive(model: Model) -> None:
    async def work() -> Any:
        await model.agenerate("First", **GREEDY)
        assert asyncio.get_running_loop() in _mailboxes
        return weakref.ref(asyncio.get_running_loop())

    loop = _run(work)
    _assert_collected(loop)


def test_a_message_that_is_never_delivered_keeps_no_loop_alive(model: Model) -> None:
    streams: list[Any] = []

    async def work() -> Any:
        streams.append(model.astream("First", **GREEDY))
        await streams[0].finish()
        return weakref.ref(asyncio.get_running_loop())

    loop = _run(work)
    _mailboxes[loop()].post(weakref.ref(streams[0]))
    streams.clear()
    _assert_collected(loop)


def _assert_collected(loop: Any) -> None:
    """Soon: the engine's thread may still be telling the loop of the last token."""
    deadline = time.monotonic() + 10
    while loop() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.001)
    assert loop() is None


def test_closing_the_model_ends_its_streams(either_device: str) -> None:
    model = load(CHARS, max_running=1)

    async def work() -> None:
        streams = [model.astream(p, temperature=0, max_tokens=None) for p in "ab"]
        await anext(streams[0])
        tasks = [asyncio.create_task(_read(s)) for s in streams]
        await asyncio.sleep(0)
        await asyncio.to_thread(model.close)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, ClosedError)
        with pytest.raises(ClosedError):
            await model.agenerate("c")

    _run(work)
    assert model._engine is None


async def _read(stream: Any) -> int:
    return len([d async for d in stream])


def test_no_delta_is_lost_that_comes_while_a_stream_looks_in_vain(
    model: Model, chars: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, read, late = chars.generate("First", **GREEDY).text, Call.read, [0]

    def looks(call: Call) -> Any:
        found = read(call)
        if found is None and not call.ended:  # the engine's thread makes all steps now
            late[0] += 1
            while not call.ended:
                pass
        return found

    monkeypatch.setattr(Call, "read", looks)

    async def work() -> str:
        return "".join([d.text async for d in model.astream("First", **GREEDY)])

    assert _run(work) == wanted
    assert late[0] > 0


def test_a_lower_priority_is_first(either_device: str) -> None:
    with load(CHARS, max_running=1) as model:

        async def work() -> list[int]:
            order: list[int] = []

            async def one(priority: int) -> None:
                await model.agenerate("a", **GREEDY, priority=priority)
                order.append(priority)

            first = model.astream("b", **GREEDY)
            await anext(first)
            tasks = [asyncio.create_task(one(p)) for p in (3, 1, 2)]
            await asyncio.gather(_read(first), *tasks)
            return order

        assert _run(work) == [1, 2, 3]


def test_a_stream_is_not_copied(model: Model) -> None:
    import copy
    import pickle

    async def work() -> None:
        async with model.astream("First", **GREEDY) as stream:
            for copied in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(CopyError):
                    copied(stream)

    _run(work)
