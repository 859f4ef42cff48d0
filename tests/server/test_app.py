"""The application: routes from the endpoints, errors as JSON, the document, ids of requests."""

from __future__ import annotations

import io

import httpx
import pytest

from cuplama.model import Model
from cuplama.server.app import create_app
from cuplama.server.endpoints import ENDPOINTS
from cuplama.server.log import RequestLog
from cuplama.server.service import Service
from tests.server.conftest import Log

pytestmark = pytest.mark.anyio


async def test_what_is_asked_every_few_seconds_is_logged_where_it_fails(
    client: httpx.AsyncClient, service: Service, log: Log
) -> None:
    for path in ("/health", "/metrics"):
        assert (await client.get(path)).status_code == 200
    assert log() == []
    service.model, model = None, service.model
    assert (await client.get("/health")).status_code == 503
    service.model = model
    assert [line["path"] for line in log()] == ["/health"]


async def test_an_unknown_path_is_a_json_error(client: httpx.AsyncClient, log: Log) -> None:
    response = await client.get("/v1/nothing")
    assert response.status_code == 404
    said = "there is no '/v1/nothing'; /openapi.json lists what there is"
    assert response.json() == {"error": {"message": said, "type": "not_found_error", "param": None, "code": None}}

    assert (log()[0]["status"], log()[0]["error"]) == (404, "not_found_error")


async def test_an_unknown_method_is_a_json_error(client: httpx.AsyncClient) -> None:
    response = await client.delete("/v1/models")
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"] in [f"/v1/models does not take DELETE; allowed: {a}" for a in ("GET, HEAD", "HEAD, GET")]


async def test_the_model_is_listed(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [m["id"] for m in listed["data"]] == ["stories-7m"]
    assert listed["data"][0]["max_model_len"] == 1024
    assert (await client.get("/v1/models/stories-7m")).json() == listed["data"][0]
    assert (await client.get("/v1/models/other/one")).json()["error"]["code"] == "model_not_found"


async def test_a_path_with_a_slash_too_many_is_another(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models/")).status_code == 404
    assert (await client.get("/health/")).status_code == 404


async def test_the_document_names_every_endpoint(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    operations = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert {(e.method, e.path.replace("{id:path}", "{id}")) for e in ENDPOINTS} <= operations
    model = document["paths"]["/v1/models/{id}"]["get"]
    assert [(p["name"], p["in"]) for p in model["parameters"]] == [("id", "path")]
    assert document["paths"]["/health"]["get"]["security"] == []
    assert {"bearer": []} in model["security"]


def test_no_two_endpoints_have_one_address() -> None:
    addresses = [(e.method, e.path) for e in ENDPOINTS]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("origins", [(), ("https://page.example",), ("*",)])
async def test_pages_of_other_origins_may_ask_only_where_that_is_wanted(model: Model, origins: tuple[str, ...]) -> None:
    service = Service(["m"], model, keys=["key"], origins=origins, log=RequestLog(io.StringIO()))
    transport = httpx.ASGITransport(create_app(service))
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        allowed = await client.options("/tokenize", headers=asked | {"Access-Control-Request-Headers": "authorization"})
        refused = await client.get("/v1/models", headers={"Origin": "https://page.example"})
        other = await client.get("/v1/models", headers={"Origin": "https://other.example"})
    assert refused.status_code == 401
    if not origins:
        assert allowed.status_code == 405
        assert "access-control-allow-origin" not in refused.headers
    else:
        assert allowed.status_code == 200  # a browser asks without a key
        assert refused.headers["access-control-allow-origin"] == origins[0]
        assert ("access-control-allow-origin" in other.headers) == (origins == ("*",))
