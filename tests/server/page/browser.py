"""A headless Chromium for the tests of the web page, and the few steps that they are made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.server.running import eventually

pytest.importorskip("selenium", reason="needs selenium, of the extra test")  # skips whoever imports this module

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

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
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        found: list[str] = self.js(script, selector)
        return found

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

    def choose(self, selector: str, label: str) -> None:
        """Choose from a list."""
        Select(self[selector]).select_by_visible_text(label)

    def focus(self) -> str:
        """The id or the text of what has the focus."""
        return str(self.js("const e = document.activeElement; return e.id || e.textContent"))

    def send(self, text: str) -> None:
        self["#prompt"].send_keys(text + Keys.ENTER)

    def paste(self, text: str) -> None:
        """Send a text of any characters at all."""
        self.js("document.getElementById('prompt').value = arguments[0]", text)
        self["#send"].click()

    def press(self, label: str, within: str = "body") -> None:
        """Press the last button of that name."""
        shown = "return arguments[0].checkVisibility() && arguments[0].textContent === arguments[1]"
        buttons = [b for b in self.all(f"{within} button") if self.js(shown, b, label)]
        assert buttons, f"no button {label}"
        webdriver.ActionChains(self.driver).move_to_element(buttons[-1]).click().perform()

    def answered(self, count: int = 1) -> str:
        """Wait until there are so many answers, the last complete; its text."""
        answers: Callable[[], list[WebElement]] = lambda: self.all(".message.assistant")  # noqa: E731
        eventually(lambda: len(answers()) == count and not self.all(".waiting") and not self["#stop"].is_displayed())
        return self.texts(".message.assistant .body")[-1]

    def stored(self) -> list[dict[str, Any]]:
        """The conversations that the browser keeps."""
        found: list[dict[str, Any]] = self.js(
            "return Object.keys(localStorage).filter((k) => k.startsWith('cuplama.conversation.'))"
            ".map((k) => JSON.parse(localStorage[k]))"
        )
        return found

    def complaints(self) -> list[str]:
        """What the browser's console has: errors of scripts, and what the policy has stopped."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries if "status of" not in entry["message"]]
