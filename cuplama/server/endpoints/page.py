"""The web page at ``/`` and its parts under ``/page/``: files of the package, with headers that keep it shut.

What a model writes cannot run in the page: the policy allows no script, style or picture but the files that lie here,
and no address but this server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import Response

from ..endpoint import Endpoint
from ..errors import ApiError
from ..service import Service

__all__ = ["ENDPOINTS"]

_FOLDER = Path(__file__).parents[1] / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self'",  # the icon
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # with no type that may be made: no text becomes HTML or a script
    "trusted-types": "'none'",
}
_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A browser asks each time whether its copy is still good: a new version is there at once, and costs one 304 a file.
    "Cache-Control": "no-cache",
}


@cache
def _files() -> Mapping[str, tuple[bytes, str, str]]:
    """Of each file of the page, by name: its bytes, its media type, and its ETag. They are read once."""
    found = {}
    for path in _FOLDER.iterdir():
        if path.suffix in _TYPES:
            data = path.read_bytes()
            found[path.name] = data, _TYPES[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    return MappingProxyType(found)


def _respond(name: str, request: Request) -> Response:
    if name not in _files():
        raise ApiError(404, f"the page has no file {name!r:.200}", "not_found_error")
    data, media_type, etag = _files()[name]
    headers = {**_HEADERS, "ETag": etag}
    asked = request.headers.get("if-none-match", "")
    if etag in (tag.strip().removeprefix("W/") for tag in asked.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type=media_type)


async def _page(_: Service, request: Request) -> Response:
    return _respond("index.html", request)


async def _part(_: Service, request: Request) -> Response:
    return _respond(request.path_params["name"], request)


# Open to all: the page holds nothing, and asks for the key itself.
ENDPOINTS = (
    Endpoint("GET", "/", _page, "The web page.", response_types=("text/html",), open=True),
    Endpoint("GET", "/page/{name}", _part, "A part of the web page.", response_types=tuple(_TYPES.values()), open=True),
)
