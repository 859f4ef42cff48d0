"""Requests made up from /openapi.json: none makes the server fail, and every answer is what the document says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import cuplama
from cuplama.server.endpoints import ENDPOINTS
from cuplama.server.limits import Limits
from tests.server.live import Live, serving

# Small, so that whatever a request asks for is done soon.
LIMITS = Limits(prompts=2, choices=2, body_bytes=200_000)
CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# Schemas cannot say what a conversation is, so most that are made of them are refused: here are some that are not.
CONVERSATIONS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant")), "content": st.text(max_size=20)}),
    min_size=1,
    max_size=3,
)
OPERATIONS = [(e.method, e.path.replace(":path}", "}")) for e in ENDPOINTS]


@pytest.fixture(scope="module")
def live(model_folder: Path) -> Iterator[Live]:
    with cuplama.load(model_folder, device="numpy", context=64) as model, serving(model, limits=LIMITS) as live:
        yield live


def with_messages(case: schemathesis.Case[Any], messages: Any) -> schemathesis.Case[Any]:
    """The request with other messages, if it has any."""
    if messages is not None and isinstance(case.body, dict) and "messages" in case.body:
        case.body["messages"] = messages
        case.body.pop("model", None)
    return case


def check(live: Live, operation: tuple[str, str], examples: int) -> None:
    schema = schemathesis.openapi.from_dict(httpx.get(f"{live.url}/openapi.json").json())
    found = schema[operation[1]][operation[0]]
    cases = [found.as_strategy(mode) for mode in (schemathesis.GenerationMode.POSITIVE,)]
    if found.body:
        cases.append(found.as_strategy(schemathesis.GenerationMode.NEGATIVE))

    @given(case=st.builds(with_messages, st.one_of(cases), st.none() | CONVERSATIONS))
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(base_url=live.url, checks=CHECKS, timeout=60)

    run()
    live.wait_idle()
    assert httpx.get(f"{live.url}/health").status_code == 200


@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
def test_no_request_makes_the_server_fail(live: Live, operation: tuple[str, str]) -> None:
    check(live, operation, 4)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
def test_nor_does_any_of_many(live: Live, operation: tuple[str, str]) -> None:
    check(live, operation, 400)


def test_the_document_is_complete(live: Live) -> None:
    document: dict[str, Any] = httpx.get(f"{live.url}/openapi.json").json()
    json.dumps(document)
    assert document["openapi"].startswith("3.1")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            assert "200" in operation["responses"]
            assert "default" in operation["responses"]
