"""A client of /v1/completions that costs little, so that what is measured is the server: HTTP/1.1 on asyncio's streams.

It knows what the benchmark needs and no more: answers with a length or in chunks, and server-sent events. A connection
is used again when its answer has been read.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from benchmarks.serving.lengths import Ask

__all__ = ["Answer", "Client"]

_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Answer:
    """What came of a request; times by ``time.perf_counter``.

    due: when it was to be sent; sent: when it was; texts: when each piece of text came; ended: when the answer was
    whole; tokens: that were generated, by the server's own count; cached: of the prompt, found in a prefix cache;
    error: what went wrong, or "".
    """

    due: float
    sent: float = 0.0
    texts: list[float] = field(default_factory=list)
    ended: float = 0.0
    tokens: int = 0
    cached: int = 0
    error: str = ""


class Client:
    """Sends requests to one server. url: http://host:port; seconds: that one answer may take."""

    def __init__(self, url: str, key: str | None = None, seconds: float = 600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"url = {url!r}; it must be http://HOST:PORT")
        self._host, self._port, self._base = parts.hostname, parts.port or 80, parts.path.rstrip("/")
        self._key, self._seconds = key, seconds
        self._idle: list[_Connection] = []
        self.in_flight = self.most_in_flight = 0

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        async with asyncio.timeout(self._seconds), self._connected() as (reader, writer):
            status, pieces = await self._send(reader, writer, "GET", path, b"")
            return status, b"".join([piece async for piece in pieces])

    async def complete(self, model: str, ask: Ask, due: float, stream: bool = True) -> Answer:
        """Ask for exactly ``ask.new`` tokens, greedily, and read the answer to its end."""
        body: dict[str, Any] = {"model": model, "prompt": ask.prompt, "max_tokens": ask.new, "ignore_eos": True}
        body |= {"temperature": 0, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        answer = Answer(due)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            async with asyncio.timeout(self._seconds):
                async with self._connected() as (reader, writer):
                    await self._complete(reader, writer, json.dumps(body).encode(), answer, stream)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError, KeyError) as e:
            answer.error = f"{type(e).__name__}: {e}"
        finally:
            self.in_flight -= 1
        if not answer.error and answer.tokens != ask.new:
            answer.error = f"{answer.tokens} tokens came, and not {ask.new}"
        return answer

    async def _complete(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes, answer: Answer, stream: bool
    ) -> None:
        answer.sent = time.perf_counter()
        status, pieces = await self._send(reader, writer, "POST", "/v1/completions", body)
        if status != 200 or not stream:
            whole = b"".join([piece async for piece in pieces])
            answer.ended = time.perf_counter()
            if status != 200:
                answer.error = f"status {status}: {whole[:300].decode(errors='replace')}"
            else:
                answer.texts.append(answer.ended)
                _count(json.loads(whole), answer)
        else:
            async for text in _events(pieces):
                now = time.perf_counter()
                data = json.loads(text)
                if "error" in data:
                    answer.error = f"error: {data['error']}"[:300]
                if any(choice["text"] for choice in data.get("choices", ())):
                    answer.texts.append(now)
                _count(data, answer)
            answer.ended = time.perf_counter()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[_Connection]:
        """A connection, which is kept for the next request unless this one fails."""
        while self._idle and self._idle[-1][0].at_eof():  # the server has closed it: it was idle for too long
            self._idle.pop()[1].close()
        connection = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        try:
            yield connection
        except BaseException:
            connection[1].close()
            raise
        self._idle.append(connection)

    async def _send(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str, body: bytes
    ) -> tuple[int, AsyncIterator[bytes]]:
        """The status, and the pieces of the body, which must be read to their end."""
        head = f"{method} {self._base}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        if self._key is not None:
            head += f"Authorization: Bearer {self._key}\r\n"
        writer.write(f"{head}\r\n".encode() + body)
        await writer.drain()
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(first.split()[1]), _pieces(reader, headers)

    async def close(self) -> None:
        """Close the connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


def _count(data: dict[str, Any], answer: Answer) -> None:
    if (usage := data.get("usage")) is not None:
        answer.tokens = usage["completion_tokens"]
        answer.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    while (await reader.readline()).strip():
        pass


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each event but the last, ``[DONE]``; comments are left out."""
    rest = b""
    async for piece in pieces:
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
            if data and data != b"[DONE]":
                yield data
