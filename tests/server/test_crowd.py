"""Many requests at once: each text is what it is alone, all of them end, and nothing piles up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import cuplama
from cuplama.model import Model
from tests.server.live import Live, serving

NAMES = ("dog", "cat", "girl", "boy", "dragon")


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """The text of a completion, streamed or not."""
    if not body.get("stream"):
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])
    text = ""
    async with client.stream("POST", "/v1/completions", json=body) as stream:
        assert stream.status_code == 200
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                text += "".join(choice["text"] for choice in chunk["choices"])
    return text


def ask_all(url: str, bodies: list[dict[str, Any]]) -> list[str]:
    """All at once, each on a connection of its own."""

    async def run() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            return list(await asyncio.gather(*(ask(client, {"model": "stories-7m", **body}) for body in bodies)))

    return asyncio.run(run())


def alone(model: Model, body: dict[str, Any]) -> str:
    options = {name: value for name, value in body.items() if name not in ("prompt", "stream")}
    return str(model.generate(body["prompt"], **options))


def request(i: int, tokens: int) -> dict[str, Any]:
    """The i-th of many requests: greedy and seeded, streamed and not, of other lengths."""
    body = {"prompt": f"Once the {NAMES[i % 5]} had {i % 7} apples", "max_tokens": tokens + i % 3, "ignore_eos": True}
    drawn = {"temperature": 0.9, "seed": i % 10, "top_p": 0.95} if i % 2 else {"temperature": 0.0}
    return {**body, **drawn, "stream": i % 4 < 2}


def test_two_hundred_at_once(live: Live) -> None:
    bodies = [request(i, 2) for i in range(20)]
    wanted = [alone(live.model, body) for body in bodies]
    before = live.model.engine.stats.preemptions
    assert ask_all(live.url, bodies * 10) == wanted * 10
    assert live.model.engine.stats.preemptions - before < 200  # all that wait were admitted, once, at every step
    live.wait_idle()


@pytest.fixture(scope="module")
def narrow(model_folder: Path) -> Iterator[Live]:
    """A cache that holds one sequence of the longest length."""
    with cuplama.load(model_folder, device="numpy", context=256, cache_tokens=256) as model, serving(model) as live:
        yield live


def test_a_cache_that_is_too_small_for_all_at_once(narrow: Live) -> None:
    """Nothing that fits alone is refused: sequences wait, or are preempted and go on."""
    bodies = [{**request(i, 20), "prompt": [i + 1] * 70} for i in range(7)]
    wanted = [alone(narrow.model, body) for body in bodies]
    assert ask_all(narrow.url, bodies) == wanted
    narrow.wait_idle()


@pytest.mark.slow
def test_several_choices_that_do_not_fit_at_once(narrow: Live) -> None:
    how: Any = {"max_tokens": 50, "temperature": 1.0, "seed": 3, "ignore_eos": True, "n": 4}
    wanted = [c.text for c in narrow.model.generate("Once upon a time", **how)]
    body = {"model": "stories-7m", "prompt": "Once upon a time", **how}
    answer = httpx.post(f"{narrow.url}/v1/completions", json=body, timeout=120)
    assert [choice["text"] for choice in answer.json()["choices"]] == wanted
    narrow.wait_idle()


def test_a_long_request_does_not_shut_out_a_short_one(live: Live) -> None:
    """Requests join the batch at any token, so a short one need not wait for the end of a long one."""

    async def run() -> tuple[bool, str]:
        async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
            long = asyncio.create_task(ask(client, {**request(0, 900), "stream": False}))
            await asyncio.sleep(0.2)
            short = await ask(client, request(1, 3))
            ended = long.done()
            long.cancel()
            return ended, short

    ended, text = asyncio.run(run())
    assert not ended
    assert text == alone(live.model, request(1, 3))
    live.wait_idle()


@pytest.mark.slow
def test_memory_stays_flat_over_a_thousand_requests(run_server: Any) -> None:
    """Streams, chats, errors and clients that leave, again and again."""
    server = run_server("--context", "256").ready()

    def resident() -> float:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024  # MiB

    def requests(count: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for i in range(count):
                body = {"model": "stories-7m", **request(i, 2)}
                if i % 5 == 4:
                    assert client.post("/v1/completions", json={**body, "temperature": -1}).status_code == 400
                elif i % 5 == 3:
                    with client.stream("POST", "/v1/completions", json={**body, "max_tokens": 200, "stream": True}):
                        pass  # leaves at once
                elif i % 5 == 2:
                    chat = {"messages": [{"role": "user", "content": f"Hi {i}"}], "max_tokens": 3}
                    assert client.post("/v1/chat/completions", json={"model": "stories-7m", **chat}).status_code == 200
                else:
                    assert client.post("/v1/completions", json=body).status_code == 200
                assert client.get("/metrics").status_code == 200

    requests(200)  # caches fill, the allocator takes what it will need
    before = resident()
    requests(1000)
    assert resident() - before < 12
    assert server.process.poll() is None
