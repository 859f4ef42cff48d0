"""What a request may have at most, and the reading of its body within these bounds."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope

from .errors import ApiError, ClientGoneError

__all__ = ["Limits", "check_headers", "read_body", "read_object"]

_LARGE = 64 * 1024  # bytes of a body from which on it is parsed beside the event loop
# What opens or closes a level of JSON. Strings, which may hold brackets, are skipped as a whole, also one that does not
# end: without the ? each later quote would be tried as its beginning, in a time that grows with the square.
_LEVELS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


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
    """The body of a request. Raises ApiError 413 as soon as it is too long, and 408 where it does not come.

    Of a body whose length is announced nothing is read if it is too long. Raises ClientGoneError.
    """
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    if announced.isdigit() and int(announced[:20]) > limits.body_bytes:
        raise _too_long(limits)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limits.body_bytes:
                    raise _too_long(limits)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {limits.body_seconds:g} seconds") from None


def _too_long(limits: Limits) -> ApiError:
    # The rest of the body is not read, so the connection cannot be used for another request.
    return ApiError(413, f"the body has more than {limits.body_bytes} bytes", headers={"Connection": "close"})


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
    depth = deepest = 0
    for found in _LEVELS.finditer(body):
        sign = found[0]
        if sign in b"[{":
            depth += 1
            deepest = max(depth, deepest)
        elif sign in b"]}":
            depth -= 1
    if deepest > limits.nesting:
        raise ApiError(400, f"the body is nested {deepest} levels deep; at most {limits.nesting} are allowed")
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:  # not UTF-8 is a ValueError, too
        raise ApiError(400, f"the body is not JSON: {' '.join(str(e).split())}") from None


def _no_constant(word: str) -> None:
    """JSON has no NaN and no infinities, which Python's reader takes."""
    raise ValueError(f"{word} is not a JSON value")


_KINDS: Mapping[type, str] = {list: "array", str: "string", int: "number", float: "number", bool: "boolean"}


def _json_kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")
