"""A headless Chromium for the tests of the web page, and the few steps that they are made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.server.running import eventually

selenium = pytest.importorskip("selenium", reason="needs selenium, of the extra test")

from selenium import webdriver  # noqa: E402  (only where there is one)
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402

__all__ = ["Keys", "Page", "chromium", "needs_chromium"]

_BROWSER, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(not (_BROWSER and _DRIVER), reason="needs chromium and chromium-driver of Debian")


@contextmanager
def chromium(downloads: Path) -> Iterator[webdriver.Chrome]:
    """A browser without a window, whose downloads go into a folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = _BROWSER or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page in a browser, as somebody uses it. width, height: of the window, in CSS pixels."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url

    def size(self, width: int = 1280, height: int = 860) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def colours(self, scheme: str) -> None:
        """What the system says it prefers: light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def load(self, *, fresh: bool = False) -> Page:
        """Open the page and wait until it has asked for the model. fresh: as if it had never been here."""
        self.driver.get(self.url)
        if fresh:
            self.js("localStorage.clear(); sessionStorage.clear()")
            self.driver.get(self.url)
        return self

    def ready(self) -> Page:
        eventually(lambda: self["#model"].text)
        return self

    def __getitem__(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """The texts of elements, the hidden ones' too."""
        return self.js(f"return [...document.querySelectorAll({selector!r})].map((e) => e.textContent)")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def js_async(self, script: str, *arguments: Any) -> Any:
        """Run the body of an asynchronous function with ``args``, and give what it returns."""
        wrapped = (
            "const done = arguments[arguments.length - 1]; const args = [...arguments].slice(0, -1);"
            f"(async () => {{ {script} }})().then((value) => done([value, null]), (e) => done([null, String(e)]));"
        )
        value, error = self.driver.execute_async_script(wrapped, *arguments)
        assert error is None, error
        return value

    def keys(self, *keys: str) -> None:
        """Press keys wherever the focus is; the first ones are held."""
        *held, last = keys
        chain = webdriver.ActionChains(self.driver)
        for key in held:
            chain.key_down(key)
        chain.send_keys(last)
        for key in reversed(held):
            chain.key_up(key)
        chain.perform()

    def focus(self) -> str:
        """The id or the text of what has the focus."""
        return self.js("const e = document.activeElement; return e.id || e.textContent")

    def send(self, text: str) -> None:
        self["#prompt"].send_keys(text + Keys.ENTER)

    def press(self, label: str, within: str = "body") -> None:
        """Press the last button of that name."""
        buttons = [b for b in self.all(f"{within} button") if b.is_displayed() and b.text == label]
        assert buttons, f"no button {label}"
        buttons[-1].click()

    def answered(self, count: int = 1) -> str:
        """Wait until there are so many answers, the last complete; its text."""
        answers: Callable[[], list[WebElement]] = lambda: self.all(".message.assistant")  # noqa: E731
        eventually(lambda: len(answers()) == count and not self.all(".waiting") and not self["#stop"].is_displayed())
        return self.texts(".message.assistant .body")[-1]

    def stored(self) -> list[dict[str, Any]]:
        """The conversations that the browser keeps."""
        return self.js(
            "return Object.keys(localStorage).filter((k) => k.startsWith('cuplama.conversation.'))"
            ".map((k) => JSON.parse(localStorage[k]))"
        )

    def complaints(self) -> list[str]:
        """What the browser's console has: errors of scripts, and what the policy has stopped."""
        return [entry["message"] for entry in self.driver.get_log("browser") if "status of" not in entry["message"]]
