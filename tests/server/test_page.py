"""The web page as it is served: its headers, its caching, and what its files may not hold."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from cuplama.server.app import create_app
from cuplama.server.service import Service
from tests.paths import ROOT

pytestmark = pytest.mark.anyio
FOLDER = ROOT / "cuplama" / "server" / "page"
FILES = sorted(FOLDER.iterdir())
SCRIPTS = [p for p in FILES if p.suffix == ".js"]
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
MAX_BYTES = 90_000  # of all files together
HTML_SINKS = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|setHTML|DOMParser|srcdoc"


def name(path: Path) -> str:
    return path.name


def address(path: Path) -> str:
    return "/" if path.name == "index.html" else f"/page/{path.name}"


@pytest.mark.parametrize("path", FILES, ids=name)
async def test_every_file_is_served_shut(client: httpx.AsyncClient, path: Path) -> None:
    response = await client.get(address(path))
    assert response.status_code == 200
    assert response.content == path.read_bytes()
    assert response.headers["content-type"].split(";")[0] == TYPES[path.suffix]
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert (policy["trusted-types"], policy["require-trusted-types-for"]) == ("'none'", "'script'")
    assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect", "img")} == {"'self'"}
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


async def test_an_unchanged_file_is_not_sent_again(client: httpx.AsyncClient) -> None:
    first = await client.get("/")
    assert first.headers["cache-control"] == "no-cache"
    etag = first.headers["etag"]
    for asked in (etag, f'"other", W/{etag}'):
        again = await client.get("/", headers={"If-None-Match": asked})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert (await client.get("/", headers={"If-None-Match": '"other"'})).status_code == 200


async def test_the_page_needs_no_key_and_no_model() -> None:
    transport = httpx.ASGITransport(create_app(Service(["m"], keys=["secret"])))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/")).status_code == (await client.get("/page/app.js")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401


async def test_the_page_learns_whether_the_model_can_chat(client: httpx.AsyncClient) -> None:
    (described,) = (await client.get("/v1/models")).json()["data"]
    assert described["chat_template"] is True
    transport = httpx.ASGITransport(create_app(Service(["loading"])))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as other:
        assert (await other.get("/v1/models/loading")).json()["chat_template"] is None


@pytest.mark.parametrize("path", ["/page/", "/page/nothing.js", "/page/..%2fapp.py", "/page/../app.py", "/page/%2e%2e"])
async def test_nothing_else_is_served(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["message"]


def test_the_page_is_small() -> None:
    assert sum(p.stat().st_size for p in FILES) < MAX_BYTES
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 450
        assert max(map(len, lines)) <= 120 or path.suffix == ".svg", path.name


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_asks_another_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+|@import|url\(", text)


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_no_script_makes_elements_of_text(path: Path) -> None:
    assert not re.findall(HTML_SINKS, path.read_text(encoding="utf-8"))


def test_the_html_has_no_script_or_style_of_its_own() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"\son\w+\s*=|\sstyle\s*=|<style|javascript:", html)
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.S)
    assert len(scripts) == 2
    assert all("src=" in attributes and not inside for attributes, inside in scripts)


def test_what_the_files_name_exists() -> None:
    names = {p.name for p in FILES}
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert set(re.findall(r'(?:src|href)="page/([^"]+)"', html)) <= names
    ids = set(re.findall(r'\sid="([\w-]+)"', html))
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= names, path.name
        assert set(re.findall(r'byId\("([\w-]+)"\)', text)) <= ids, path.name
    assert set(re.findall(r'\s(?:for|aria-controls|aria-describedby|aria-labelledby)="([\w-]+)"', html)) <= ids


def test_every_field_and_button_has_a_name() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    labelled = set(re.findall(r'<label[^>]* for="([\w-]+)"', html))
    for tag, attributes in re.findall(r"<(input|textarea|select)\b([^>]*)>", html):
        found = re.search(r'\sid="([\w-]+)"', attributes)
        assert found
        assert found[1] in labelled or "aria-label=" in attributes, (tag, attributes)
    for attributes, inside in re.findall(r"<button\b([^>]*)>(.*?)</button>", html, re.S):
        assert "aria-label=" in attributes or re.sub(r"<[^>]*>", "", inside).strip(), attributes
