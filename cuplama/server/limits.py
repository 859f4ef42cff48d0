"""What a request may have at most, and the reading of its body within these bounds."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from .errors import ApiError, ClientGoneError

__all__ = ["Limits", "check_headers", "read_body", "read_object"]

_DISCARD_SECONDS = 2.0  # how long a body that is too long is read on: most clients look for an answer after sending
_LARGE = 64 * 1024  # bytes of a body from which on it is parsed beside the event loop
# A string of JSON, also one that does not end: without the last ? every later quote would be tried as its beginning, in
# a time that grows with the square.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


@dataclass(frozen=True)
class Limits:
    """Bounds of one request.

    body_bytes, header_bytes: of its body and of its headers together; nesting: levels of its JSON; prompt_tokens: of
    one prompt, or None for what the context has room for; prompts: in one request; choices: n; stops: stop strings;
    body_seconds: for the body to arrive; waiting_seconds: from the request to its first token.
    """

    body_bytes: int = 16 * 1024 * 1024
    header_bytes: int = 16 * 1024
    nesting: int = 100
    prompt_tokens: int | None = None
    prompts: int = 1024
    choices: int = 128
    stops: int = 16
    body_seconds: float = 60.0
    waiting_seconds: float = 600.0


def check_headers(scope: Scope, limits: Limits) -> None:
    """Raises ApiError 431 where the headers of a request are longer than allowed."""
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    if size > limits.header_bytes:
        raise ApiError(431, f"the headers have {size} bytes; at most {limits.header_bytes} are allowed")


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The body of a request. Raises ApiError 413 where it is too long, 408 where it does not come, ClientGoneError.

    Of what is too long nothing is kept.
    """
    headers = Headers(scope=scope)
    announced = headers.get("content-length", "")
    too_long = announced.isdigit() and int(announced[:20]) > limits.body_bytes
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(limits.body_seconds):
            while more and not too_long:
                message = await _received(receive)
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                too_long, more = size > limits.body_bytes, message.get("more_body", False)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not come within {limits.body_seconds:g} seconds", headers={"Connection": "close"}
        ) from None
    if not too_long:
        return b"".join(parts)
    del parts
    if more and "expect" not in headers:  # with it, the client waits for a word before it sends the body
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while (await _received(receive)).get("more_body", False):
                    pass
    raise ApiError(413, f"the body has more than {limits.body_bytes} bytes", headers={"Connection": "close"})


async def _received(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    return message


async def read_object(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object in the body of a request.

    Raises ApiError 415 for another content type, and 400 for what is no JSON, no object, or nested too deeply. A web
    page of another origin can send other types without asking first: a browser's user would not know.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"Content-Type is {kind or 'missing'}; it must be application/json")
    body = await request.body()
    parsed = await asyncio.to_thread(_parsed, body, limits) if len(body) > _LARGE else _parsed(body, limits)
    if not isinstance(parsed, dict):
        raise ApiError(400, f"the body is a JSON {_json_kind(parsed)}; it must be an object")
    return parsed


def _parsed(body: bytes, limits: Limits) -> Any:
    opening = body.count(b"[") + body.count(b"{")  # of most bodies that is enough to know
    if opening > limits.nesting and (found := _levels(body)) > limits.nesting:
        raise ApiError(400, f"the body is nested {found} levels deep; at most {limits.nesting} are allowed")
    try:
        return json.loads(body.decode(), parse_constant=_no_constant)  # of bytes it would take UTF-16 as well
    except (ValueError, RecursionError) as e:  # not UTF-8 is a ValueError, too
        raise ApiError(400, f"the body is not JSON: {' '.join(str(e).split())}") from None


def _levels(body: bytes) -> int:
    """How deep the arrays and objects of a JSON text are nested. Found without a loop: there may be millions."""
    brackets = np.frombuffer(_STRINGS.sub(b"", body).translate(None, _NO_BRACKETS), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    return int(np.cumsum(np.where(opening, 1, -1)).max(initial=0))


def _no_constant(word: str) -> None:
    """JSON has no NaN and no infinities, which Python's reader takes."""
    raise ValueError(f"{word} is not a JSON value")


_KINDS: Mapping[type, str] = {list: "array", str: "string", int: "number", float: "number", bool: "boolean"}


def _json_kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")
