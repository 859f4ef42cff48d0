"""One browser and one scripted server for all tests of the web page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.server.page.scripted import Script, scripted

if TYPE_CHECKING:
    from tests.server.page.browser import Page


@pytest.fixture(scope="session")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="session")
def scripted_server() -> Iterator[Script]:
    with scripted() as script:
        yield script


@pytest.fixture(scope="session")
def browser_page(scripted_server: Script, downloads: Path) -> Iterator[Page]:
    from tests.server.page.browser import Page, chromium  # here, because selenium may be missing

    with chromium(downloads) as driver:
        yield Page(driver, scripted_server.url)


@pytest.fixture
def script(scripted_server: Script) -> Script:
    scripted_server.reset()
    return scripted_server


@pytest.fixture
def page(browser_page: Page, script: Script) -> Iterator[Page]:
    """The page as a new visitor sees it. A test fails where the browser had to complain."""
    browser_page.url = script.url
    browser_page.size()
    browser_page.colours("light")
    browser_page.load(fresh=True).ready()
    browser_page.complaints()
    yield browser_page
    assert not browser_page.complaints()
