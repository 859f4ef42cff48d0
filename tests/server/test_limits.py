"""Bounds of a request: what is beyond them is refused before it costs anything."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message, Scope

from cuplama.server.errors import ApiError
from cuplama.server.limits import Limits, check_headers, read_body, read_object

pytestmark = pytest.mark.anyio
LIMITS = Limits(body_bytes=10_000_000, header_bytes=100, nesting=5)


def request(body: bytes, kind: str | None = "application/json") -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [] if kind is None else [(b"content-type", kind.encode())]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


async def refused(body: bytes, kind: str | None = "application/json") -> ApiError:
    with pytest.raises(ApiError) as caught:
        await read_object(request(body, kind), LIMITS)
    return caught.value


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b'{"a": 1', "the body is not JSON: "),
        (b'{"a": NaN}', "the body is not JSON: NaN is not a JSON value"),
        (b'{"a": "\xff"}', "the body is not JSON: 'utf-8' codec"),
        ('{"a": 1}'.encode("utf-16"), "the body is not JSON: 'utf-8' codec"),
        (b'{"a": ' + b"9" * 5000 + b"}", "the body is not JSON: Exceeds the limit"),
        (b"[1]", "the body is a JSON array; it must be an object"),
        (b"null", "the body is a JSON null; it must be an object"),
        (b'{"a": [[[[[1]]]]]}', "the body is nested 6 levels deep; at most 5 are allowed"),
        (b"[" * 3_000_000, "the body is nested 3000000 levels deep; at most 5 are allowed"),
    ],
)
async def test_what_is_no_json_object_is_refused(body: bytes, said: str) -> None:
    error = await refused(body)
    assert error.status == 400
    assert error.message.startswith(said)


async def test_brackets_in_strings_are_no_levels() -> None:
    value: Any = {"a": '[[[[[[[{{{{{{"\\', "b": [[[1]]], 'c\\"[[[[': [{}]}
    assert await read_object(request(json.dumps(value).encode()), LIMITS) == value


@pytest.mark.parametrize("part", [b'"', b'\\"', b"\\", b'"\\', b'"\\"', b"[]", b'[""'])
async def test_looking_for_levels_takes_little_time(part: bytes) -> None:
    """A pattern that starts again at every quote would take hours."""
    begin = time.perf_counter()
    await refused(b'"' + part * (500_000 // len(part)))
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_a_type_that_a_web_page_may_send_anywhere_is_refused(kind: str | None) -> None:
    error = await refused(b"{}", kind)
    assert (error.status, error.message) == (
        415,
        f"Content-Type is {kind or 'missing'}; it must be application/json",
    )


async def test_a_charset_is_no_other_type() -> None:
    assert await read_object(request(b"{}", "Application/JSON; charset=utf-8"), LIMITS) == {}


async def test_nothing_is_kept_of_a_body_that_is_too_long() -> None:
    count = 0

    async def receive() -> Message:
        nonlocal count
        count += 1
        return {"type": "http.request", "body": b"x" * 60, "more_body": count < 50}

    scope: Scope = {"type": "http", "headers": []}
    with pytest.raises(ApiError, match="more than 100 bytes") as caught:
        await read_body(scope, receive, Limits(body_bytes=100))
    assert (caught.value.status, caught.value.headers) == (413, {"Connection": "close"})
    assert count == 50
    assert await read_body(scope, receive, Limits(body_bytes=60)) == b"x" * 60


async def test_the_last_part_of_a_body_counts() -> None:
    """A body without a length may come in one part; a client that has sent all of it waits for no timeout."""
    parts = [{"type": "http.request", "body": b"x" * 101, "more_body": False}]

    async def receive() -> Message:
        return parts.pop()

    with pytest.raises(ApiError, match="more than 100 bytes") as caught:
        await read_body({"type": "http", "headers": []}, receive, Limits(body_bytes=100))
    assert caught.value.status == 413


def test_headers_are_bounded() -> None:
    check_headers({"headers": [(b"a" * 50, b"b" * 50)]}, LIMITS)
    with pytest.raises(ApiError, match="101 bytes; at most 100") as caught:
        check_headers({"headers": [(b"a" * 50, b"b" * 51)]}, LIMITS)
    assert caught.value.status == 431
