"""The application: routes from the endpoints, errors as JSON, the document, ids of requests."""

from __future__ import annotations

import httpx
import pytest

pytestmark = pytest.mark.anyio


async def test_an_unknown_path_is_a_json_error(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/nothing")
    assert response.status_code == 404
    assert response.json() == {
        "error": {"message": "Not Found", "type": "not_found_error", "param": None, "code": None}
    }


async def test_an_unknown_method_is_a_json_error(client: httpx.AsyncClient) -> None:
    response = await client.delete("/v1/models")
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, HEAD"
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_the_model_is_listed(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [m["id"] for m in listed["data"]] == ["stories-7m"]
    assert listed["data"][0]["max_model_len"] == 1024
    assert (await client.get("/v1/models/stories-7m")).json() == listed["data"][0]
    assert (await client.get("/v1/models/other/one")).json()["error"]["code"] == "model_not_found"
