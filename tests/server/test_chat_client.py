"""``cuplama chat --server`` with our own server: the same text as from the library."""

from __future__ import annotations

import json

import pytest

from cuplama.cli.conversation import Conversation
from cuplama.cli.openai_server import OpenAIServer, ServerError
from cuplama.cli.remote_chat import RemoteSession, find_name
from cuplama.model import Model
from cuplama.server.keys import Keys
from cuplama.server.service import Service

GREEDY = {"max_tokens": 12, "temperature": 0.0}


def test_a_conversation_with_our_server(model: Model, url: str, capfd: pytest.CaptureFixture[str]) -> None:
    server = OpenAIServer(url)
    session = RemoteSession(server, find_name(server), GREEDY, {}, Conversation("Tell a story."), stats=True)
    assert session.name == "stories-7m"
    for question in ("Of a cat", "And of a dog"):
        wanted = model.chat(session.conversation.messages(question), max_tokens=12, temperature=0.0)
        answer = session.ask(question)
        assert (answer.text, answer.finish_reason) == (wanted.text, wanted.finish_reason)
        assert answer.usage["completion_tokens"] == len(wanted.tokens) == answer.timings().generated_tokens
        out, err = capfd.readouterr()
        assert out.removesuffix("\n") == wanted.text
        assert err.splitlines()[-1].startswith(f"prompt: {len(wanted.prompt_tokens)} tokens in ")
    assert len(session.conversation.messages()) == 5


def test_what_our_server_refuses_is_said(service: Service, url: str) -> None:
    service.keys = Keys(["secret"])
    with pytest.raises(ServerError, match=r"/v1 answers 401: .*; --api-key gives a key"):
        OpenAIServer(url).models()
    server = OpenAIServer(url, "secret")
    assert server.models() == ["stories-7m"]
    with pytest.raises(ServerError, match=r"/v1 answers 400: .*temperature"):
        RemoteSession(server, "stories-7m", {"temperature": -1}, {}, Conversation()).ask("Hi", show=False)
    with pytest.raises(ServerError, match=r"/v1 answers 404: .*nobody"):
        RemoteSession(server, "nobody", {}, {}, Conversation()).ask("Hi", show=False)


def test_the_oldest_turns_are_left_out(model: Model, url: str, capfd: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation()
    for _ in range(4):
        conversation.add("word " * (model.context // 3), "yes")
    session = RemoteSession(OpenAIServer(url), "stories-7m", GREEDY, {}, conversation)
    answer = session.ask("and?", show=False)
    left = conversation.messages()[:-2]
    assert 0 < len(left) < 8
    assert "oldest messages: the conversation no longer fits the server's context" in capfd.readouterr().err
    asked = [*left, {"role": "user", "content": "and?"}]
    assert answer.text == model.chat(asked, max_tokens=12, temperature=0.0).text
    assert json.dumps(answer.to_dict())
