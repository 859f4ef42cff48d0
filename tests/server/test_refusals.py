"""Requests that nobody should send: each gets its status and an error in words, and never a 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cuplama.model import Model
from cuplama.server.endpoints import ENDPOINTS
from cuplama.server.limits import Limits
from tests.server.live import Live, serving
from tests.server.raw import connected, post

LIMITS = Limits(body_bytes=100_000, header_bytes=4096, nesting=20, prompts=4, choices=4, stops=4)
COMPLETION = {"model": "stories-7m", "prompt": "Once", "max_tokens": 1}
CHAT = {"model": "stories-7m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
GENERATING = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


@pytest.fixture(scope="module")
def live(model: Model) -> Iterator[Live]:
    with serving(model, limits=LIMITS) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=20) as client:
        yield client


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a response, whose form is checked."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in answer.text
    return error


BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"3",
    b'{"prompt": "a",}',
    b'{"prompt": "\xff"}',
    b'{"max_tokens": NaN}',
    b'{"temperature": Infinity}',
    b'{"prompt": "a"} {}',
    b"prompt=a",
    '{"prompt": "a"}'.encode("utf-16"),
    b'{"max_tokens": ' + b"9" * 5000 + b"}",
    b"[" * 10_000,
    b'{"a":' * 10_000,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:24]))
@pytest.mark.parametrize("path", GENERATING)
def test_what_is_no_json_object(client: httpx.Client, path: str, body: bytes) -> None:
    refused(client.post(path, content=body, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_types_of_content(client: httpx.Client, kind: str) -> None:
    refused(client.post("/v1/completions", content=json.dumps(COMPLETION), headers={"Content-Type": kind}), 415)


@pytest.mark.parametrize("field", ["messages", "metadata", "response_format", "tools"])
def test_nesting_is_bounded(client: httpx.Client, field: str) -> None:
    deep: Any = 1
    for _ in range(LIMITS.nesting + 1):
        deep = [deep]
    assert "nested" in refused(client.post("/v1/chat/completions", json={**CHAT, field: deep}))["message"]


def test_bodies_are_bounded(client: httpx.Client) -> None:
    long = {**COMPLETION, "prompt": "a" * LIMITS.body_bytes}
    assert str(LIMITS.body_bytes) in refused(client.post("/v1/completions", json=long), 413)["message"]


def test_a_body_without_a_length_is_bounded(live: Live) -> None:
    sock = connected(live.url)
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(LIMITS.body_bytes // 10_000 + 2):
        sock.sendall(b"2710\r\n" + b"a" * 10_000 + b"\r\n")
    sock.sendall(b"0\r\n\r\n")
    assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")
    sock.close()
    live.wait_idle()


@pytest.mark.parametrize("size", [LIMITS.header_bytes + 1, 1_000_000])
def test_headers_are_bounded(live: Live, size: int) -> None:
    sock = connected(live.url)
    request = post("/v1/completions", COMPLETION, headers=f"X-Long: {'a' * size}\r\n")
    try:
        sock.sendall(request)
        status = sock.recv(4096).split(b"\r\n")[0]
    except ConnectionError:
        status = b"HTTP/1.1 431 "  # the server closed while the client still sent
    sock.close()
    assert status.split()[1] in (b"431", b"400")
    live.wait_idle()


_POST = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
_BODY = json.dumps(COMPLETION).encode()
# Bytes of a request -> the status of the first answer.
ODD: dict[str, tuple[bytes, int]] = {
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 GET / \r\n\r\n", 400),
    "no version": (b"GET /health\r\n\r\n", 400),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", 200),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "a method of its own": (b"BREW /health HTTP/1.1\r\nHost: t\r\n\r\n", 405),
    "HEAD": (b"HEAD /health HTTP/1.1\r\nHost: t\r\n\r\n", 200),
    "a path out of the root": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: t\r\n\r\n", 404),
    "an encoded zero": (b"GET /v1/models/%00 HTTP/1.1\r\nHost: t\r\n\r\n", 404),
    "a path that is not UTF-8": (b"GET /v1/models/%ff%fe HTTP/1.1\r\nHost: t\r\n\r\n", 404),
    "a line break in a header": (b"GET /health HTTP/1.1\r\nHost: t\r\nX: a\nY: b\r\n\r\n", 200),
    "two lengths": (_POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n{}", 400),
    "a negative length": (_POST + b"Content-Length: -1\r\n\r\n", 400),
    "a huge length": (_POST + b"Expect: 100-continue\r\nContent-Length: 99999999999999999999\r\n\r\n", 413),
    "a length of no number": (_POST + b"Content-Length: 0x10\r\n\r\n", 400),
    "a bad chunk": (_POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "another encoding": (_POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    "chunks": (_POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY), 200),
    "two requests at once": (post("/v1/completions", COMPLETION) * 2, 200),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_requests(live: Live, odd: str) -> None:
    data, status = ODD[odd]
    sock = connected(live.url)
    sock.sendall(data)
    answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 "), answer
    assert int(answer.split()[1]) == status, answer
    sock.close()
    live.wait_idle()
    assert httpx.get(f"{live.url}/health").status_code == 200


COUNTS = [
    ("/v1/completions", {"prompt": ["a"] * 5}, "prompt"),
    ("/v1/completions", {"n": 5}, "n"),
    ("/v1/chat/completions", {"n": 5}, "n"),
    ("/v1/completions", {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ("/v1/chat/completions", {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
]


@pytest.mark.parametrize(("path", "more", "param"), COUNTS)
def test_counts_are_bounded(client: httpx.Client, path: str, more: dict[str, Any], param: str) -> None:
    error = refused(client.post(path, json={**GENERATING[path], **more}))
    assert error["param"] == param
    assert "4" in error["message"]


def test_another_path_and_another_method(client: httpx.Client) -> None:
    refused(client.get("/v1/nothing"), 404)
    refused(client.get("/v1/completions"), 405)
    refused(client.delete("/v1/models"), 405)
    refused(client.post("/v1/completions/", json=COMPLETION), 404)


@pytest.mark.parametrize("path", GENERATING)
def test_another_model(client: httpx.Client, path: str) -> None:
    error = refused(client.post(path, json={**GENERATING[path], "model": "gpt-5"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


# A value of each JSON type; a field that takes one of them as its own is left out below.
VALUES: dict[str, list[Any]] = {
    "boolean": [True],
    "integer": [-(10**30)],
    "number": [-0.5],
    "string": ["\x00 no such value", ""],
    "array": [[[]], [None], [{}]],
    "object": [{"no such key": []}],
}


def wrong_values(schema: dict[str, Any]) -> list[Any]:
    """Values of types that a field does not take, by its schema."""

    def types(part: dict[str, Any]) -> set[str]:
        found = part.get("type", [])
        own = {found} if isinstance(found, str) else set(found)
        if "enum" in part or "const" in part:
            own = own or {"string"}
        for key in ("anyOf", "oneOf", "allOf"):
            for below in part.get(key, ()):
                own |= types(below)
        return own

    taken = types(schema)
    if not taken:
        return []
    taken |= {"integer"} if "number" in taken else set()
    return [value for kind, values in VALUES.items() if kind not in taken for value in values]


FIELDS = [
    (endpoint.path, field, value)
    for endpoint in ENDPOINTS
    if endpoint.path in GENERATING and endpoint.request_schema
    for field, schema in endpoint.request_schema["properties"].items()
    for value in wrong_values(schema)
]


def test_every_field_is_described() -> None:
    fields = {(path, field) for path, field, _ in FIELDS}
    for path in GENERATING:
        described = {field for at, field in fields if at == path}
        assert {"temperature", "max_tokens", "n", "stop", "stream", "seed", "logit_bias", "top_p"} <= described, path


def test_wrong_types_of_every_field(client: httpx.Client) -> None:
    wrong = []
    for path, field, value in FIELDS:
        answer = client.post(path, json={**GENERATING[path], field: value})
        named = answer.status_code in (400, 404) and field in refused(answer, answer.status_code)["message"]
        if not named:
            wrong.append(f"{path} {field}={value!r}: {answer.status_code} {answer.text[:200]}")
    assert not wrong, "\n".join(wrong)


def test_fields_that_nobody_knows_are_ignored_or_named(client: httpx.Client) -> None:
    """Clients of other servers send more than one server knows; what it does must not depend on the value."""
    values: tuple[Any, ...] = (1, None, {}, "a")
    statuses = {client.post("/v1/completions", json={**COMPLETION, "xyzzy": v}).status_code for v in values}
    assert len(statuses) == 1
    assert statuses <= {200, 400}


@pytest.mark.parametrize("prompt", [[], [["a"]], [1, "a"], [-1], [10**9], [1.5], [None], {}, [[1], "a", None]])
def test_prompts_that_are_none(client: httpx.Client, prompt: Any) -> None:
    message = refused(client.post("/v1/completions", json={**COMPLETION, "prompt": prompt}))["message"]
    assert "prompt" in message or "token id" in message


MESSAGES: list[Any] = [
    None,
    "text",
    [],
    [3],
    [{}],
    [{"role": 3}],
    [{"role": "user"}],
    [{"role": "user", "content": 3}],
    [{"content": "hello"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "system", "content": "a"}, {}],
    [{"role": "assistant", "tool_calls": "all"}],
]


@pytest.mark.parametrize("messages", MESSAGES)
def test_messages_that_are_none(client: httpx.Client, messages: Any) -> None:
    error = refused(client.post("/v1/chat/completions", json={**CHAT, "messages": messages}))
    assert "message" in error["message"]


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
@pytest.mark.parametrize("path", GENERATING)
def test_text_that_is_not_unicode(client: httpx.Client, path: str, text: str) -> None:
    body = {**GENERATING[path], "stop": text}
    body |= {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    refused(client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"}))


def test_one_bad_request_does_not_hurt_another(live: Live, client: httpx.Client) -> None:
    body = {**COMPLETION, "max_tokens": 40, "ignore_eos": True, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        with httpx.Client(base_url=live.url) as other:
            for bad in ({"temperature": -1}, {"prompt": [10**9]}, {"logit_bias": {"9999999": 1}}, {"stop": [""]}):
                refused(other.post("/v1/completions", json={**COMPLETION, **bad}))
        data = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert not any("error" in chunk for chunk in data)
    assert data[-1]["choices"][0]["finish_reason"] == "length"
    live.wait_idle()
