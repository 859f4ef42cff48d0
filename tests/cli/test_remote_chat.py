"""``cuplama chat --server``: what is sent to a server, what is shown of its answers, and how its errors end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cuplama.cli.openai_server import OpenAIServer
from cuplama.errors import ParameterError
from tests.cli.processes import LAUNCHER, Terminal, environment

Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


class FakeServer:
    """A server of OpenAI's kind. answers: for each chat what is sent, chunks (dict) and raw lines (bytes), or a status
    with a body; got: the requests, as (path, headers, body); left: whether a client has gone before the end."""

    def __init__(self) -> None:
        self.names = ["some-model"]
        self.answers: list[Any] = []
        self.got: list[tuple[str, dict[str, str], Any]] = []
        self.left = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def body(self) -> Any:
        """The last chat that was asked for."""
        return self.got[-1][2]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                fake.got.append((self.path, dict(self.headers), None))
                self._whole(200, {"data": [{"id": name} for name in fake.names]})

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                fake.got.append((self.path, dict(self.headers), json.loads(self.rfile.read(length))))
                answer = fake.answers.pop(0)
                if isinstance(answer, tuple):
                    self._whole(*answer)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                try:
                    for part in answer:
                        fake_lines = part if isinstance(part, bytes) else b"data: " + json.dumps(part).encode()
                        self._chunk(fake_lines + b"\n\n")
                    self.wfile.write(b"0\r\n\r\n")
                except OSError:
                    fake.left.set()

            def _chunk(self, data: bytes) -> None:
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

            def _whole(self, status: int, body: Any) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.end_headers()
                self.wfile.write(data)

        return Handler


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


DONE = b"data: [DONE]"


def delta(reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": reason}]}


def says(*texts: str, reason: str = "stop") -> list[Any]:
    return [delta(role="assistant"), *(delta(content=text) for text in texts), delta(reason), DONE]


def test_a_question_is_answered_once(run: Run, server: FakeServer) -> None:
    server.answers = [says("Hel", "lo"), says("again\n"), says()]
    assert run("chat", "Hi", "--server", server.url) == (0, "Hello\n", "")
    (path, _, none), (chat, headers, body) = server.got
    assert (path, none, chat) == ("/v1/models", None, "/v1/chat/completions")
    assert body == {"model": "some-model", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    assert "Authorization" not in headers
    assert run("chat", "--server", f"{server.url}/v1/", stdin=b"Hi\n") == (0, "again\n", "")
    assert run("chat", "Hi", "--server", server.url.removeprefix("http://")) == (0, "\n", "")


def test_what_was_given_is_sent(run: Run, server: FakeServer, tmp_path: Any) -> None:
    server.answers = [says("x")]
    (tmp_path / "tools.json").write_text('[{"type": "function"}]')
    options = (
        "-m other --api-key secret --system nice -n 7 --temp 0.5 --top-k 9 --top-p 0.25 --min-p 0.125 --seed 11"
        " --repeat-penalty 1.5 --presence-penalty -0.5 --frequency-penalty 0.75 --logit-bias 5=1.5 --logit-bias 6=-inf"
        " --stop a --stop b --min-tokens 3 --ignore-eos --template-arg enable_thinking=false --stats"
    )
    assert run("chat", "Hi", "--server", server.url, *options.split(), "--tools", str(tmp_path / "tools.json"))[0] == 0
    ((_, headers, body),) = server.got  # the name was given, so nobody asked for it
    assert headers["Authorization"] == "Bearer secret"
    assert body == {
        "model": "other", "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "nice"}, {"role": "user", "content": "Hi"}],
        "max_tokens": 7, "temperature": 0.5, "top_k": 9, "top_p": 0.25, "min_p": 0.125, "seed": 11,
        "repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.75,
        "logit_bias": {"5": 1.5, "6": -100}, "stop": ["a", "b"], "min_tokens": 3, "ignore_eos": True,
        "chat_template_kwargs": {"enable_thinking": False}, "tools": [{"type": "function"}],
    }  # fmt: skip


def test_a_schema_is_sent_as_every_server_knows_it(run: Run, server: FakeServer, tmp_path: Any) -> None:
    server.answers = [says("null")]
    (tmp_path / "s.json").write_text('{"type": "null"}')
    assert run("chat", "Hi", "--server", server.url, "-m", "x", "--json-schema", str(tmp_path / "s.json"))[0] == 0
    form = {"name": "answer", "schema": {"type": "null"}}
    assert server.body["response_format"] == {"type": "json_schema", "json_schema": form}
    assert "json_schema" not in server.body


def test_the_key_may_come_from_the_environment(run: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPLAMA_API_KEY", "hidden")
    server.answers = [says("x")]
    assert run("chat", "Hi", "--server", server.url)[0] == 0
    assert {headers["Authorization"] for _, headers, _ in server.got} == {"Bearer hidden"}


def test_json_and_stats(run: Run, server: FakeServer) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    answer = [*says("Hel", "lo")[:-1], {"choices": [], "usage": usage}, DONE]
    server.answers = [answer, answer]
    status, out, err = run("chat", "Hi", "--server", server.url, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == {
        "text": "Hello", "reasoning": "", "tool_calls": [], "finish_reason": "stop", "model": "some-model",
        "usage": usage,
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    }  # fmt: skip
    assert server.body["stream_options"] == {"include_usage": True}
    err = run("chat", "Hi", "--server", server.url, "--stats")[2]
    assert err.startswith("prompt: 5 tokens in ")
    assert "then 3 tokens in " in err


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_shown_and_not_kept(name: str, run: Run, server: FakeServer) -> None:
    chunks = [delta(**{name: "Let me"}), delta(**{name: " see."}), *says("Yes.")]
    server.answers = [chunks, chunks]
    assert run("chat", "Hi", "--server", server.url)[1] == "<think>\nLet me see.\n</think>\n\nYes.\n"
    found = json.loads(run("chat", "Hi", "--server", server.url, "--json")[1])
    assert (found["reasoning"], found["text"]) == ("Let me see.", "Yes.")
    assert found["messages"][-1] == {"role": "assistant", "content": "Yes."}
    server.answers = [[delta(**{name: "only\n"}), delta("length"), DONE]]
    assert run("chat", "Hi", "--server", server.url)[1] == "<think>\nonly\n</think>\n\n"


def test_tool_calls_are_lines_of_json(run: Run, server: FakeServer) -> None:
    def piece(index: int, **function: str) -> dict[str, Any]:
        return delta(tool_calls=[{"index": index, "function": function}])

    calls = [piece(0, name="add", arguments=""), piece(0, arguments='{"a": '), piece(0, arguments='"é"}'),
             piece(1, name="now", arguments="{")]  # fmt: skip
    server.answers = [[delta(content="So:"), *calls, delta("tool_calls"), DONE]] * 2
    lines = '{"name": "add", "arguments": {"a": "é"}}\n{"name": "now", "arguments": "{"}\n'
    assert run("chat", "Hi", "--server", server.url)[1] == f"So:\n{lines}"
    found = json.loads(run("chat", "Hi", "--server", server.url, "--json")[1])
    assert found["tool_calls"] == [json.loads(line) for line in lines.splitlines()]


def test_an_answer_that_was_cut(run: Run, server: FakeServer) -> None:
    server.answers = [says("a", reason="length")] * 2
    assert run("chat", "Hi", "--server", server.url, "-n", "8")[2] == "cuplama: the answer was cut at 8 tokens (-n 8)\n"
    assert (
        run("chat", "Hi", "--server", server.url)[2] == "cuplama: the answer was cut (the server's limit is reached)\n"
    )


BROKEN: list[tuple[Any, str]] = [
    (
        (400, {"error": {"message": "max_tokens is\ntoo large", "code": "x"}}),
        "/v1 answers 400: max_tokens is too large",
    ),
    ((401, {"error": {"message": "no key"}}), "/v1 answers 401: no key; --api-key gives a key"),
    ((404, {"detail": "Not Found"}), "/v1 answers 404: Not Found"),
    ((404, b"<html>"), "/v1 answers 404: Not Found"),
    ((500, {"error": "bare text"}), "/v1 answers 500: bare text"),
    ((502, b""), "/v1 answers 502: Bad Gateway"),
    ((307, b""), "/v1 answers 307: Temporary Redirect"),
    ([delta(content="half"), {"error": {"message": "out of memory"}}], "the server says: out of memory"),
    ([delta(content="half")], "the server broke off before the answer had ended"),
    ([b"data: {"], "the server sends what is no JSON object: '{'"),
    ([b"data: []"], "the server sends what is no JSON object: '[]'"),
]


@pytest.mark.parametrize(("answer", "words"), BROKEN)
def test_what_the_server_refuses_is_an_error(answer: Any, words: str, run: Run, server: FakeServer) -> None:
    server.answers = [answer]
    status, out, err = run("chat", "Hi", "--server", server.url)
    assert (status, err.count("\n")) == (2, 1)
    assert out == ("half\n" if isinstance(answer, list) and isinstance(answer[0], dict) else "")
    assert words in err


def test_a_server_that_is_not_there(fails: Fails, server: FakeServer) -> None:
    server.server.shutdown()
    server.server.server_close()
    assert f"cannot reach {server.url}/v1: Connection refused" in fails("chat", "Hi", "--server", server.url)


def test_models_to_choose_from(fails: Fails, server: FakeServer) -> None:
    server.names = []
    assert f"{server.url}/v1 has no model" in fails("chat", "Hi", "--server", server.url)
    server.names = [f"m{i}" for i in range(12)]
    message = fails("chat", "Hi", "--server", server.url)
    assert f"has 12 models; name one with -m: {', '.join(server.names[:10])}, ..." in message


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("h:1/", "http://h:1/v1"),
        ("https://h/api/v1", "https://h/api/v1"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("localhost", "http://localhost/v1"),
        ("[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_addresses_as_people_write_them(url: str, base: str) -> None:
    assert OpenAIServer(url).base == base


@pytest.mark.parametrize("url", ["", "ftp://h", "http://", "http://h/?x=1", "/v1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ParameterError, match="is no address; it must look like http://127"):
        OpenAIServer(url)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--device numpy", "--device"),
        ("--dtype float16", "--dtype"),
        ("--quantize int4", "--quantize"),
        ("--kv-cache-dtype fp8", "--kv-cache-dtype"),
        ("--activations fp8", "--activations"),
        ("-c 100", "--context"),
        ("--adapter a", "--adapter"),
        ("--offline", "--offline"),
        ("--special-text", "--special-text"),
    ],
)
def test_options_of_a_model_that_runs_here_are_refused(
    option: str, name: str, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = fails("chat", "Hi", "--server", "http://127.0.0.1:9", *option.split())
    assert f"{name} does not go with --server: the server decides it (cuplama chat --help)" in message


def test_a_key_without_a_server(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--api-key needs --server (cuplama chat --help)" in fails("chat", "Hi", "--api-key", "k")


def test_a_proxy_is_not_asked_for_this_machine(run: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    server.answers = [says("x")]
    assert run("chat", "Hi", "--server", server.url)[0] == 0


def test_a_conversation_in_a_terminal(server: FakeServer) -> None:
    """Commands, a conversation that grows, an error that it survives, a context that is full, and Ctrl-C."""
    too_long = (400, {"error": {"message": "too long", "code": "context_length_exceeded"}})

    def forever() -> Iterator[Any]:
        yield delta(content="going ")
        while True:
            time.sleep(0.01)
            yield delta(content="on ")

    server.answers = [says("one"), (500, b""), says("two"), too_long, says("three"), forever()]
    args = [*LAUNCHER, "chat", "--server", server.url]
    terminal = Terminal(args, environment(TERM="dumb"))
    assert f"some-model at {server.url}/v1. /help lists the commands." in terminal.until("> ")
    terminal.send("Hi\n")
    assert "one" in terminal.until("\r\n> ")
    terminal.send("lost\n")
    assert "answers 500: Internal Server Error" in terminal.until("\r\n> ")
    terminal.send("Ho\n")
    terminal.until("\r\n> ")
    assert [m["content"] for m in server.body["messages"]] == ["Hi", "one", "Ho"]
    terminal.send("Hu\n")
    assert "left out the 2 oldest messages" in terminal.until("\r\n> ")
    assert [m["content"] for m in server.body["messages"]] == ["Ho", "two", "Hu"]
    terminal.send("more\n")
    terminal.until("going on ")
    terminal.send("\x03")
    assert terminal.until("\r\n> ").endswith("stopped; what was said so far stays in the conversation")
    assert server.left.wait(5)  # the server is told, by the connection's end
    terminal.send("/undo\n")
    assert "took back: more" in terminal.until("\r\n> ")
    terminal.send("\x04")
    assert terminal.status() == 0


def test_ctrl_c_before_the_answer(server: FakeServer) -> None:
    def late() -> Iterator[Any]:
        yield b": thinking"
        time.sleep(60)

    server.answers = [late()]
    terminal = Terminal([*LAUNCHER, "chat", "Hi", "--server", server.url], environment(TERM="dumb"))
    end = time.monotonic() + 20
    while len(server.got) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    terminal.send("\x03")
    assert terminal.status() == 130
