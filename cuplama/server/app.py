"""The server as an ASGI application: routes from the endpoints, errors as JSON, cross-origin access where asked for."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .endpoint import Endpoint
from .endpoints import ENDPOINTS
from .errors import error_response
from .frame import Answering, Frame
from .openapi import openapi
from .service import Service

__all__ = ["create_app"]


def create_app(service: Service, endpoints: Sequence[Endpoint] = ENDPOINTS) -> Starlette:
    """The application that serves the service's model, at all endpoints."""
    document = openapi(endpoints)

    async def described(_: Service, __: Request) -> Response:
        return JSONResponse(document)

    own = Endpoint("GET", "/openapi.json", described, "This document.", open=True)
    routes = [Route(e.path, Answering(service, e), methods=[e.method]) for e in (*endpoints, own)]
    middleware = [Middleware(Frame, service=service)]
    if service.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=service.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
        middleware.insert(0, cors)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _as_json})
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def _as_json(request: Request, error: Exception) -> Response:
    """What starlette refuses: a path that there is not, or not with this method. Its own words name neither."""
    assert isinstance(error, HTTPException)
    path, allowed = request.scope["path"], (error.headers or {}).get("Allow")
    if error.status_code == 404:
        error.detail = f"there is no {path!r:.200}; /openapi.json lists what there is"
    elif allowed is not None:
        error.detail = f"{path} does not take {request.method}; allowed: {allowed}"
    service: Service = request.app.state.service
    return error_response(service.told(error, request.scope))
