"""Who may use the server."""

from __future__ import annotations

import hmac
import io
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.datastructures import Headers

from cuplama.model import Model
from cuplama.server.app import create_app
from cuplama.server.errors import ApiError
from cuplama.server.keys import Keys
from cuplama.server.log import RequestLog
from cuplama.server.service import Service

pytestmark = pytest.mark.anyio
OPEN = {"/health", "/v1/health", "/ping"}


@pytest.fixture
async def client(model: Model) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Service(["m"], model, keys=["first", "zweiter ä"], log=RequestLog(io.StringIO())))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first"},
        {"Authorization": "bearer  first "},
        {"Authorization": "Bearer zweiter ä".encode()},
        {"x-api-key": "first"},
    ],
)
async def test_every_key_opens(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    raw = {name.encode(): value if isinstance(value, bytes) else value.encode() for name, value in headers.items()}
    assert (await client.get("/v1/models", headers=raw)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer firs"},
        {"Authorization": "Bearer first second"},
        {"Authorization": "Basic first"},
        {"Authorization": "first"},
        {"x-api-key": ""},
    ],
)
async def test_nothing_else_opens(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    response = await client.get("/v1/models", headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


async def test_what_needs_no_key(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    open_ = {path for path, methods in paths.items() if any(m["security"] == [] for m in methods.values())}
    assert open_ >= OPEN
    for path in (path for path in open_ if "{" not in path):
        assert (await client.get(path)).status_code == 200
    for path in ("/v1/models", "/metrics", "/version", "/tokenizer_info"):
        assert (await client.get(path)).status_code == 401


async def test_without_a_key_no_body_is_read(client: httpx.AsyncClient) -> None:
    response = await client.post("/tokenize", content=b"x" * 20_000_000)
    assert response.status_code == 401


def test_all_keys_are_compared_in_a_time_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    Keys(["a", "long key"]).check(Headers({"authorization": "Bearer a"}))
    with pytest.raises(ApiError):
        Keys(["a", "long key"]).check(Headers({"authorization": "Bearer b"}))
    assert compared == [(32, 32)] * 4
