"""``/health``: whether requests can be answered now. Open to all, for who watches the server has no key."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..endpoint import Endpoint
from ..service import Service

__all__ = ["ENDPOINTS"]


async def _health(service: Service, _: Request) -> Response:
    service.check_ready()
    return JSONResponse({"status": "ok"})


_STATUS = {"type": "object", "required": ["status"], "properties": {"status": {"const": "ok"}}}
_SUMMARY = "Whether requests can be answered: 200, or 503 while the model is loaded, or when the engine failed."

ENDPOINTS = tuple(
    Endpoint("GET", path, _health, _SUMMARY, response_schema=_STATUS, open=True, quiet=True)
    for path in ("/health", "/v1/health", "/ping")
)
