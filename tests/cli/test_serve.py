"""``cuplama serve``: what it refuses before anything is loaded, and what it starts."""

from __future__ import annotations

import builtins
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cuplama.model import Model
from cuplama.server import lifecycle
from cuplama.server.limits import Limits
from cuplama.server.service import Service
from tests.cli.conftest import CHARS, NUMPY, Fails, Run


class Started:
    """What ``lifecycle.serve`` was called with."""

    def __init__(self, service: Service, load: Callable[[], Model], sock: socket.socket, drain_seconds: float) -> None:
        self.service, self.load, self.drain_seconds = service, load, drain_seconds
        self.port = sock.getsockname()[1]
        sock.close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    """The servers that would have been started."""
    found: list[Started] = []
    monkeypatch.setattr(lifecycle, "serve", lambda *args, **options: found.append(Started(*args, **options)))
    return found


def test_it_says_where_it_is(run: Run, started: list[Started]) -> None:
    status, out, err = run("serve", "--port", "0")
    port = started[0].port
    assert (status, err) == (0, "")
    assert out == f"page: http://127.0.0.1:{port}/\nAPI:  http://127.0.0.1:{port}/v1\n"
    assert started[0].service.names == ("stories-7m",)
    assert not started[0].service.keys
    assert started[0].drain_seconds == 30


def test_its_options_reach_the_service(run: Run, started: list[Started], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPLAMA_API_KEY", "one two")
    options = ["--served-model-name", "a", "--served-model-name", "b", "--cors", "https://x.example", "--log-prompts"]
    options += ["--limit", "prompts=3", "--limit", "body_bytes=1000", "--drain-seconds", "1.5"]
    assert run("serve", "--port", "0", *options)[0] == 0
    service = started[0].service
    assert service.names == ("a", "b")
    assert service.origins == ("https://x.example",)
    assert service.limits == Limits(prompts=3, body_bytes=1000)
    assert service.log.prompts
    assert len(service.keys._digests) == 2
    assert started[0].drain_seconds == 1.5


@pytest.mark.parametrize(
    ("model", "name"),
    [(CHARS, "gpt2-char"), (f"{CHARS}/", "gpt2-char"), ("org/model", "org/model"), ("org/m:Q4_K_M", "org/m:Q4_K_M")],
)
def test_a_model_is_served_under_its_name(run: Run, started: list[Started], model: str, name: str) -> None:
    assert run("serve", "-m", model, "--port", "0")[0] == 0
    assert started[0].service.name == name


def test_a_gguf_file_is_served_under_its_name(run: Run, started: list[Started], tmp_path: Path) -> None:
    (tmp_path / "small.Q8_0.gguf").touch()
    assert run("serve", "-m", str(tmp_path / "small.Q8_0.gguf"), "--port", "0")[0] == 0
    assert started[0].service.name == "small.Q8_0"


@pytest.mark.parametrize(("quiet", "notes"), [((), 1), (("-q",), 0)])
def test_the_model_is_loaded_in_a_thread(
    run: Run, monkeypatch: pytest.MonkeyPatch, quiet: tuple[str, ...], notes: int
) -> None:
    found: list[Model] = []

    def serve(service: Service, load: Callable[[], Model], sock: socket.socket, **_: Any) -> None:
        sock.close()
        thread = threading.Thread(target=lambda: found.append(load()))
        thread.start()
        thread.join()

    monkeypatch.setattr(lifecycle, "serve", serve)
    status, _, err = run("serve", "-m", CHARS, *NUMPY, "--context", "64", "--port", "0", *quiet)
    assert status == 0
    assert found[0].context == 64
    assert err.count("cuplama: ready: <Model gpt2-char") == notes
    found[0].close()


@pytest.mark.parametrize(("keys", "warned"), [((), True), (("--api-key", "k"), False)])
def test_a_server_that_is_open_to_all_is_named(
    run: Run, started: list[Started], keys: tuple[str, ...], warned: bool
) -> None:
    _, out, err = run("serve", "--host", "0.0.0.0", "--port", "0", *keys)
    assert ("everybody there may use the model" in err) == warned
    assert out.startswith("page: http://127.0.0.1:")  # a browser cannot open 0.0.0.0 everywhere


def test_a_port_that_is_taken(fails: Fails) -> None:
    with lifecycle.listen("127.0.0.1", 0) as sock:
        port = str(sock.getsockname()[1])
        assert fails("serve", "--port", port) == (
            f"cuplama: cannot listen on 127.0.0.1, port {port}: Address already in use\n"
        )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--api-key", " "), "Invalid value for '--api-key' (env var: 'CUPLAMA_API_KEY'): the text is empty"),
        (("--served-model-name", ""), "Invalid value for '--served-model-name': the text is empty"),
        (("--limit", "nothing=3"), "--limit nothing=3: known are body_bytes, header_bytes, "),
        (("--limit", "prompts"), "--limit prompts: it must be a whole number, as in prompts=100"),
        (("--limit", "prompts=-1"), "--limit prompts=-1: it must be a whole number"),
        (("--port", "70000"), "Invalid value for '--port': 70000 is not in the range 0<=x<=65535."),
    ],
)
def test_wrong_options_are_named(fails: Fails, args: tuple[str, ...], said: str) -> None:
    assert said in fails("serve", *args)


def test_a_variable_that_is_set_to_nothing_does_not_open_the_server(
    fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("", " "):
        monkeypatch.setenv("CUPLAMA_API_KEY", value)
        assert "(env var: 'CUPLAMA_API_KEY'): the text is empty" in fails("serve", "--port", "0")


def test_without_its_extra(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    import_, missing = builtins.__import__, "uvicorn"

    def imported(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if level and globals["__package__"] == "cuplama.cli" and name == "server":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return import_(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", imported)
    assert fails("serve") == "cuplama: there is no module uvicorn; serve needs an extra: pip install 'cuplama[serve]'\n"


def test_formats_of_answers_are_chosen_by_name(run: Run, fails: Fails, started: list[Started]) -> None:
    assert "tool_format = 'x' is not supported; supported: none, " in fails("serve", "--tool-format", "x")
    options = ["--reasoning-format", "think", "--tool-format", "none", "-m", str(CHARS), *NUMPY]
    assert run("serve", "--port", "0", *options)[0] == 0
    with started[0].load() as model:
        form = model.tokenizer.answer_form
        assert form.reasoning is not None
        assert (form.reasoning.name, form.tools) == ("think", None)
