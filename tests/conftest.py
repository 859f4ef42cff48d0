"""Fixtures that every test may use, and which tests are slow."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import speeds

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    speeds.mark_slow(items)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public checkpoints, tokenizers and corpora beside the checkout; not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED}")
    return SHARED


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
