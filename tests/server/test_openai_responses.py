"""OpenAI's newer interface, ``client.responses``, as its own client uses it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.server.live import Live

CHAT: list[Any] = [{"role": "system", "content": "Tell a story."}, {"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def test_a_response(client: OpenAI, live: Live) -> None:
    wanted = live.model.chat(CHAT, temperature=0, max_tokens=10)
    done = client.responses.create(model=live.name, input=CHAT, max_output_tokens=10, temperature=0)
    assert done.output_text == wanted.text
    assert done.id.startswith("resp_")
    assert (done.output[0].id or "").startswith("msg_")
    assert done.status == "incomplete"
    assert done.incomplete_details is not None
    assert done.incomplete_details.reason == "max_output_tokens"
    assert done.usage is not None
    assert (done.usage.input_tokens, done.usage.output_tokens) == (len(wanted.prompt_tokens), 10)


def test_a_response_as_a_stream(client: OpenAI, live: Live) -> None:
    wanted = live.model.chat(CHAT, temperature=0, max_tokens=10).text
    events: list[Any] = list(
        client.responses.create(model=live.name, input=CHAT, max_output_tokens=10, temperature=0, stream=True)
    )
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.incomplete", "response.completed")
    for earlier, later in pairwise(
        ("response.output_item.added", "response.content_part.added", "response.output_text.delta",
         "response.output_text.done", "response.content_part.done", "response.output_item.done")
    ):  # fmt: skip
        assert kinds.index(earlier) < kinds.index(later)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == wanted
    assert events[-1].response.output_text == wanted
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1


def test_a_response_of_a_form(client: OpenAI, live: Live) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "test", "schema": {"const": "foooooo"}}}
    done = client.responses.create(model=live.name, input="Hi", text=form, max_output_tokens=30, temperature=0)
    assert done.output_text == '"foooooo"'
    without: Any = {"format": {"type": "json_schema", "name": "test"}}
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model=live.name, input="Hi", text=without)
