"""Fixtures that every test may use, and which tests are slow."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cuplama.model import Model
from tests import speeds
from tests.tiny import CHARS, LLAMA, assert_all_pages_free, load

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    speeds.mark_slow(items)


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """The garbage collector leaves alone what is there before the first test, and again behind a server that has ended,
    which thaws everything.

    Tests, their parameters and the modules that they import are 650,000 objects, and dozens of tests collect garbage.
    """
    if gc.get_freeze_count() == 0:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public checkpoints, tokenizers and corpora beside the checkout; not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED}")
    return SHARED


@pytest.fixture(scope="module")
def chars() -> Iterator[Model]:
    """The golden character GPT."""
    with load(CHARS, cache_tokens=640) as model:
        yield model


@pytest.fixture(scope="module")
def llama() -> Iterator[Model]:
    """The golden Llama with grouped queries."""
    with load(LLAMA, context=128, cache_tokens=1024) as model:
        yield model


@pytest.fixture(params=["plain", "late"])
def either_device(request: pytest.FixtureRequest) -> str:
    """Models that the test loads run on NumPy, or on NumPy that captures and is late: see ``LateNumPyBackend``."""
    if request.param == "late":
        request.getfixturevalue("late_device")
    return str(request.param)


@pytest.fixture
def late_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that the test loads run on NumPy that captures and is late."""
    from tests.fakes import LateNumPyBackend

    monkeypatch.setattr("cuplama.backends.numpy.NumPyBackend", LateNumPyBackend)


@pytest.fixture
def walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lab walks over all models once for each GPU that it asks about, however often it asks."""
    from tests.lab.common import needed_once

    monkeypatch.setattr("cuplama.lab.inventory.needed", needed_once)


@pytest.fixture
def all_pages_come_back(chars: Model, llama: Model) -> Iterator[None]:
    """After the test, no page of the two models is in use."""
    yield
    assert_all_pages_free(chars, llama)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C works, here and in child processes, also where the shell has it ignored: under nohup or behind ``&``.

    A signal that a process ignores is ignored by its children too, unless they say otherwise.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
