"""Fixtures that every test may use."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public checkpoints, tokenizers and corpora beside the checkout; not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED}")
    return SHARED
