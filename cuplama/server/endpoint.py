"""One endpoint of the server, as data: where it is, who answers, and what OpenAPI says of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .errors import ApiError, error_body
from .service import Service

__all__ = ["Endpoint", "Handler"]

Handler = Callable[[Service, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """A method and a path, and the function that answers.

    path: as starlette writes it, "/v1/models/{id:path}"; handler: may raise ApiError or a CuplamaError, and is
    cancelled when the client leaves, also while its response is sent; summary: one line for OpenAPI; request_schema,
    response_schema: JSON schemas of the bodies, or None; response_types: media types of a good answer; open: needs no
    key; quiet: a good answer leaves no line in the log, for it is asked every few seconds; error_body: what an error is
    in the answer.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    request_schema: Mapping[str, Any] | None = None
    response_schema: Mapping[str, Any] | None = None
    response_types: tuple[str, ...] = ("application/json",)
    open: bool = False
    quiet: bool = False
    error_body: Callable[[ApiError], dict[str, Any]] = error_body
