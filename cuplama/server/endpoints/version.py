"""``/version``: which cuplama this is."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ... import __version__
from ..endpoint import Endpoint
from ..service import Service

__all__ = ["ENDPOINTS"]


async def _version(_: Service, __: Request) -> Response:
    return JSONResponse({"version": __version__})


_VERSION = {"type": "object", "required": ["version"], "properties": {"version": {"type": "string"}}}

ENDPOINTS = (Endpoint("GET", "/version", _version, "The server's version.", response_schema=_VERSION),)
