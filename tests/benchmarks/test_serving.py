"""The load on a server: what is sent, what is measured, and a small run of all of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import serve, throughput
from benchmarks.serving import load, picture
from benchmarks.serving.client import Answer, Client
from benchmarks.serving.lengths import ANSWERS, PROMPTS, Ask, Lengths, arrivals, draw
from benchmarks.serving.server import Library, Settings
from cuplama.errors import ParameterError
from cuplama.lab.dummy import dummy_tokenizer
from tests.lab.common import needs_matplotlib
from tests.tiny import LLAMA

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# ---- what is sent ----------------------------------------------------------------------------------------------------


def test_lengths_have_the_means_that_were_measured() -> None:
    rng = np.random.default_rng(0)
    for lengths, mean in ((PROMPTS, 230), (ANSWERS, 203)):
        drawn = lengths.draw(rng, 50_000)
        assert np.mean(drawn) == pytest.approx(mean, rel=0.02)
        assert np.median(drawn) == pytest.approx(lengths.median, rel=0.02)
        assert (min(drawn), max(drawn)) == (4, 1024)
    assert set(Lengths(130, 1.2, longest=2).draw(rng, 100)) == {2}


def test_the_same_seed_draws_the_same_requests() -> None:
    first, again, other = (draw(np.random.default_rng(s), 20, PROMPTS, ANSWERS, 50) for s in (3, 3, 4))
    assert first == again != other
    assert all(0 <= token < 50 for ask in first for token in ask.prompt)


def test_requests_come_at_the_rate() -> None:
    due = arrivals(np.random.default_rng(0), 20_000, 40.0)
    gaps = np.diff([0.0, *due])
    assert due[-1] == pytest.approx(500, rel=0.03)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.05)  # as of an exponential distribution


# ---- the client ------------------------------------------------------------------------------------------------------


def sse(*data: Any) -> bytes:
    return b"".join(b"data: " + (d if isinstance(d, bytes) else json.dumps(d).encode()) + b"\n\n" for d in data)


TEXT, EMPTY = {"choices": [{"text": "a"}]}, {"choices": [{"text": ""}]}
USAGE = {"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 64}}}


@asynccontextmanager
async def serving(
    *bodies: bytes | Sequence[bytes], status: int = 200, keeps: bool = True
) -> AsyncIterator[tuple[Client, list[Any]]]:
    """A client of a server that answers each request with the next body, a list of them in chunks; and what it got.

    keeps: whether it takes another request on a connection.
    """
    got: list[Any] = []
    left = list(bodies)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = object()
        while (keeps or connection not in [other for other, *_ in got]) and (head := await reader.readline()):
            lines = [head.decode().strip()]
            while line := (await reader.readline()).decode().strip():
                lines.append(line)
            length = next(int(line.split()[1]) for line in lines if line.startswith("Content-Length"))
            got.append((connection, lines, json.loads(await reader.readexactly(length) or b"null")))
            body = left.pop(0)
            writer.write(f"HTTP/1.1 {status} said\r\nX-Other: a:b\r\n".encode())
            if isinstance(body, bytes):
                writer.write(f"content-length: {len(body)}\r\n\r\n".encode() + body)
                continue
            writer.write(b"transfer-encoding: chunked\r\n\r\n")
            for chunk in body:
                writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
            writer.write(b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/base", "secret", seconds=5)
    try:
        yield client, got
    finally:
        await client.close()
        server.close()


async def test_a_stream_is_read_however_it_is_cut() -> None:
    whole = b": a comment\n\n" + sse(EMPTY, TEXT, TEXT, USAGE, b"[DONE]")
    for cut in (1, 40, len(whole)):
        pieces = [whole[i : i + cut] for i in range(0, len(whole), cut)][-40:]
        if cut == 1:
            pieces.insert(0, whole[: len(whole) - 40])
        async with serving(pieces) as (client, got):
            answer = await client.complete("m", Ask([1, 2], 3), time.perf_counter())
        assert (answer.error, answer.tokens, answer.cached, len(answer.texts)) == ("", 3, 64, 2)
        assert answer.due <= answer.sent <= answer.texts[0] <= answer.texts[1] <= answer.ended
        ((_, head, body),) = got
        assert head[0] == "POST /base/v1/completions HTTP/1.1"
        assert "Authorization: Bearer secret" in head
        assert body == {
            "model": "m", "prompt": [1, 2], "max_tokens": 3, "ignore_eos": True, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip


async def test_whole_answers_and_connections_that_are_used_again() -> None:
    whole = json.dumps({"choices": [{"text": "abc"}], "usage": {"completion_tokens": 3}}).encode()
    async with serving(whole, whole, b"{}") as (client, got):
        for _ in range(2):
            answer = await client.complete("m", Ask([1], 3), 0.0, stream=False)
            assert (answer.error, answer.tokens, answer.texts) == ("", 3, [answer.ended])
        assert await client.get("/v1/models") == (200, b"{}")
    assert len({connection for connection, *_ in got}) == 1


async def test_a_connection_that_the_server_has_closed_is_not_used_again() -> None:
    whole = json.dumps({"choices": [{"text": "abc"}], "usage": {"completion_tokens": 3}}).encode()
    async with serving(whole, whole, keeps=False) as (client, got):
        for _ in range(2):
            answer = await client.complete("m", Ask([1], 3), 0.0, stream=False)
            assert answer.error == ""
            await asyncio.sleep(0.05)  # the end of the connection comes, as it does when a server has waited for long
    assert len({connection for connection, *_ in got}) == 2


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"error": {"message": "busy"}}', 429, 'status 429: {"error": {"message": "busy"}}'),
        ([sse(TEXT, {"error": {"message": "broken"}})], 200, "error: {'message': 'broken'}"),
        ([sse(TEXT, USAGE, b"[DONE]")], 200, "3 tokens came, and not 5"),
        ([sse(TEXT, b"{")], 200, "JSONDecodeError"),
    ],
)
async def test_what_goes_wrong_is_kept(body: bytes | Sequence[bytes], status: int, words: str) -> None:
    async with serving(body, status=status) as (client, _):
        answer = await client.complete("m", Ask([1], 5), 0.0)
    assert words in answer.error


async def test_a_server_that_is_not_there_or_no_address() -> None:
    answer = await Client("http://127.0.0.1:9").complete("m", Ask([1], 5), 0.0)
    assert "refused" in answer.error or "OSError" in answer.error or "Connect" in answer.error
    for url in ("https://host", "127.0.0.1:8000"):
        with pytest.raises(ValueError, match="it must be http://HOST:PORT"):
            Client(url)


# ---- what is measured ------------------------------------------------------------------------------------------------


class FakeClient(Client):
    """Answers each request after so many seconds, a token at a time."""

    def __init__(self, seconds: float = 0.0, error: str = "") -> None:
        super().__init__("http://nowhere")
        self.seconds, self.error, self.asked = seconds, error, list[Ask]()

    async def complete(self, model: str, ask: Ask, due: float, stream: bool = True) -> Answer:
        self.asked.append(ask)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        sent = time.perf_counter()
        await asyncio.sleep(self.seconds)
        self.in_flight -= 1
        return Answer(
            due, sent, [sent + self.seconds / 2, sent + self.seconds], sent + self.seconds, ask.new, 0, self.error
        )


async def test_the_capacity_is_that_of_the_middle() -> None:
    client, asks = FakeClient(0.05), [Ask([1], 7)] * 40
    found = await load.capacity(client, "m", asks, 4)
    assert (client.most_in_flight, len(client.asked)) == (4, 40)
    assert 20 < found["requests_per_second"] < 82  # 4 at a time, 50 ms each
    assert found["output_tokens_per_second"] == pytest.approx(7 * found["requests_per_second"], rel=1e-3)


async def test_an_open_loop_waits_for_nobody() -> None:
    client = FakeClient(0.3)
    found = await load.open_loop(client, "m", [Ask([1], 2)] * 40, 400.0, np.random.default_rng(0))
    assert client.most_in_flight == found["most_in_flight"] == 40
    assert 300 <= found["whole_ms"]["p50"] < 900
    assert found["sent_late_ms"]["p50"] < 100
    assert found["requests_per_second"] == 400.0


async def test_failed_requests_and_too_many_end_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(load.FailedError, match="3 requests failed, the first with: status 500"):
        await load.at_once(FakeClient(error="status 500"), "m", [Ask([1], 1)] * 3, 2)
    monkeypatch.setattr(load, "MOST_IN_FLIGHT", 5)
    with pytest.raises(load.FailedError, match=r"5 requests run at a time: 1000\.00 a second are too many"):
        await load.open_loop(FakeClient(1.0), "m", [Ask([1], 1)] * 20, 1000.0, np.random.default_rng(0))


def test_percentiles_of_a_load_by_hand() -> None:
    slow = Answer(1.0, 1.5, [3.0, 3.2, 3.6], 4.0, 6)
    quick = Answer(2.0, 2.0, [2.1], 2.2, 1)
    found = load.summary([slow, quick])
    assert found["requests"] == 2
    assert found["output_tokens_per_second"] == round(7 / 3, 1)
    assert found["first_token_ms"]["p50"] == pytest.approx((2000 + 100) / 2)
    assert found["between_tokens_ms"]["p50"] == pytest.approx(300)
    assert found["token_of_request_ms"] == {"p50": 200.0, "p95": 200.0, "p99": 200.0}
    assert found["whole_ms"]["p99"] == pytest.approx(200 + 0.99 * 2800)
    assert found["sent_late_ms"]["p50"] == pytest.approx(250)


async def test_a_conversation_grows_by_its_second_turn() -> None:
    client = FakeClient(0.01)
    found = await load.conversation(client, "m", lambda tokens: [7] * tokens, 100, 5, 2)
    assert [len(ask.prompt) for ask in client.asked] == [100, 105] * 3
    assert (found["prompt_tokens"], found["second_turn_tokens"], found["repeats"]) == (100, 5, 2)
    assert found["sooner"] == pytest.approx(1, rel=0.01)


def result() -> dict[str, Any]:
    times = {"p50": 1.0, "p95": 20.0, "p99": 300.0}
    level = {
        "requests_per_second": 2.5, "output_tokens_per_second": 500.0, "first_token_ms": times,
        "between_tokens_ms": times, "whole_ms": times,
    }  # fmt: skip
    whole = {"requests_per_second": 10.0, "output_tokens_per_second": 2000.0}
    levels = [{"share": share, **level} for share in (0.25, 0.9)]
    return {"model": "m", "environment": {"device": "a GPU"}, "capacity": whole, "levels": levels}


def test_a_table_of_loads() -> None:
    lines = picture.table(result()).splitlines()
    assert lines[2] == "| 25% | 2.500 | 500.0 | 1.00 / 20.0 / 300 | 1.00 / 20.0 / 300 | 1.00 / 20.0 / 300 |"
    assert lines[-1] == "ms at p50 / p95 / p99. The whole is 10.00 requests/s, 2000 output tokens/s."


@needs_matplotlib
def test_a_picture_of_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "found.json").write_text(json.dumps(result()))
    assert serve.main(["--plot", str(tmp_path / "x.png"), str(tmp_path / "found.json")]) == 0
    assert (tmp_path / "x.png").stat().st_size > 10_000
    with pytest.raises(ParameterError, match="the name must end in one of"):
        picture.draw(result(), tmp_path / "x.doc")
    assert serve.main(["--plot", str(tmp_path / "x.doc"), str(tmp_path / "found.json")]) == 1
    assert "must end in one of" in capsys.readouterr().err


# ---- the server ------------------------------------------------------------------------------------------------------


def test_settings_survive_the_way_to_the_server() -> None:
    for library in (None, Library(64, 128, 256, 3)):
        settings = Settings({"model": "m", "dummy": True}, 100, "auto", library)
        assert Settings.read(settings.to_json()) == settings


def test_a_tokenizer_that_is_made_up_spells_every_token() -> None:
    tokenizer = dummy_tokenizer(3000)
    assert tokenizer.vocab_size == 3000
    assert all(tokenizer.decode([id]) for id in range(256, 3000))
    assert tokenizer.decode(tokenizer.encode("Grüße, world")) == "Grüße, world"
    assert dummy_tokenizer(65).vocab_size == 65


def test_a_server_that_does_not_start_says_why() -> None:
    with (
        pytest.raises(load.FailedError, match="neither a folder"),
        serve.running(Settings({"model": "nowhere", "dummy": True})),
    ):
        pass


def test_a_small_run_on_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    small = ["--device", "numpy", "--clients", "3", "--requests", "12", "--levels", "0.9", "--seconds", "0.5"]
    assert serve.main([*small, "--longest", "6", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["model"] == "bundled"
    assert found["capacity"]["requests"] == 12
    (level,) = found["levels"]
    assert level["requests"] >= 20
    assert level["requests_per_second"] == pytest.approx(0.9 * found["capacity"]["requests_per_second"], rel=1e-3)
    assert 0 < level["first_token_ms"]["p50"] <= level["whole_ms"]["p50"] <= level["whole_ms"]["p99"]
    assert "| 90% |" in capsys.readouterr().out


def test_overhead_and_prefix_of_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--shape", str(LLAMA), "--device", "numpy", "--repeats", "1"]
    assert serve.main([*model, "--overhead", "--sequences", "2", "--tokens", "8", "--new", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == LLAMA.name
    assert set(found["overhead"]["over_library"]) == {"streamed", "whole"}
    assert str(LLAMA.parent) not in json.dumps(found)  # results are kept, so they name no machine's folders
    assert serve.main([*model, "--prefix", "--turn", "64"]) == 0
    found = json.loads(capsys.readouterr().out)["prefix"]
    assert (found["prompt_tokens"], found["second_turn_tokens"]) == (64, 2)
    assert found["sooner"] > 0


# ---- the library -----------------------------------------------------------------------------------------------------


def test_throughput_of_a_small_model(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--requests", "3", "--in", "8", "--new", "4", "--repeats", "1"]
    assert throughput.main([str(LLAMA), "--device", "numpy", *sizes]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["shape"], row["requests"], row["prompt_tokens"], row["new_tokens"]) == (LLAMA.name, 3, 8, 4)
    assert row["output_tokens_per_second"] == pytest.approx(12 / row["seconds"], rel=0.5)
