"""Fixtures for the tests of the server: its application in this process, on a port, and as a process.

Tests that await are marked with ``pytestmark = pytest.mark.anyio``.
"""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import cuplama
from cuplama.hub import find_model
from cuplama.model import Model
from cuplama.server.app import create_app
from cuplama.server.log import RequestLog
from cuplama.server.service import Service
from tests.server.live import Live, serving
from tests.server.running import ServerProcess, in_thread

# It says who speaks, as in "user: Hi\nassistant:"; enough for a model that only tells stories.
CHAT_TEMPLATE = """\
{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
Log = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a chat template, which it does not have itself."""
    folder, bundled = tmp_path_factory.mktemp("stories-7m"), find_model(None, True)
    for file in bundled.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def model(model_folder: Path) -> Iterator[Model]:
    """The bundled model on NumPy; it can chat."""
    with cuplama.load(model_folder, device="numpy") as model:
        yield model


@pytest.fixture
def log_stream() -> io.StringIO:
    """What the service of the test has logged."""
    return io.StringIO()


@pytest.fixture
def log(log_stream: io.StringIO) -> Log:
    """A function that reads the lines of the log."""
    return lambda: [json.loads(line) for line in log_stream.getvalue().splitlines()]


@pytest.fixture
def service(model: Model, log_stream: io.StringIO) -> Service:
    """The model as "stories-7m", without keys."""
    return Service(["stories-7m"], model, log=RequestLog(log_stream))


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """Asks the application in this process. A response comes as a whole, and clients cannot leave: see ``url``."""
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    """The address of the application on a port: streams come piece by piece, clients can leave."""
    with in_thread(service) as address:
        yield address


@pytest.fixture
def run_server(model_folder: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts ``cuplama serve`` with further options; every process ends with the test."""
    started: list[ServerProcess] = []

    def start(*args: str, **env: str) -> ServerProcess:
        started.append(ServerProcess("-m", str(model_folder), "--served-model-name", "stories-7m", *args, **env))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def live(model: Model) -> Iterator[Live]:
    """The model on a port, for all tests of a file."""
    with serving(model) as live:
        yield live
