"""Errors as clients of OpenAI's interface read them, and the one place where cuplama's own errors become such."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..errors import (
    BusyError,
    ClosedError,
    ContextError,
    CuplamaError,
    DeviceError,
    ParameterError,
    PromptError,
    TokenizerError,
)

__all__ = ["ApiError", "ClientGoneError", "api_error", "error_body", "error_response", "unavailable"]

_INVALID = "invalid_request_error"
_RETRY_SECONDS = 1  # Retry-After of what a moment may mend
# Kind of error -> status, type, code. The first that fits counts, so narrower ones come first.
_KINDS: tuple[tuple[type[CuplamaError], int, str, str | None], ...] = (
    (ContextError, 400, _INVALID, "context_length_exceeded"),
    (ParameterError, 400, _INVALID, None),
    (PromptError, 400, _INVALID, None),
    (TokenizerError, 400, _INVALID, None),  # the chat template refuses the messages
    (BusyError, 429, "rate_limit_exceeded", "rate_limit_exceeded"),
    (ClosedError, 503, "unavailable_error", None),
    (DeviceError, 500, "server_error", None),
    (CuplamaError, 500, "server_error", None),
)
_TYPES: Mapping[int, str] = {404: "not_found_error", 405: _INVALID}  # of starlette's own errors


class ApiError(Exception):
    """What ends a request with an error. ``error_body`` is what the client gets.

    status: of HTTP; message: one line for people; type, param, code: as OpenAI has them, param names the field of the
    request that is wrong; headers: of the response, beside the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = _INVALID,
        param: str | None = None,
        code: str | int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", str(_RETRY_SECONDS))


def unavailable(said: str) -> ApiError:
    """The error of a server that cannot answer now; the code is llama.cpp's."""
    return ApiError(503, said, "unavailable_error", code=503)


class ClientGoneError(Exception):
    """The client has left: nobody reads an answer."""


def api_error(error: Exception) -> ApiError:
    """What a client is told of any error. A bug's own words stay in the log: they may hold what others sent."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # starlette's: no such path, or not with this method
        kind = _TYPES.get(error.status_code, _INVALID)
        return ApiError(error.status_code, error.detail, kind, headers=error.headers)
    for kind_of_error, status, type_, code in _KINDS:
        if isinstance(error, kind_of_error):
            return ApiError(status, " ".join(str(error).split()), type_, _param(error), code)
    return ApiError(500, "internal error; the server's log has more", "server_error")


def _param(error: CuplamaError) -> str | None:
    """The field that a ParameterError is about: its message begins with the name, as in "top_p = 3 is ..."."""
    found = re.match(r"(\w+)(?: = |: )", str(error)) if isinstance(error, ParameterError) else None
    return found[1] if found else None


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON object that says what went wrong; also what an event of a stream holds that fails after its start."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: ApiError, body: Callable[[ApiError], dict[str, Any]] = error_body) -> Response:
    """The response of a request that failed before anything was sent. body: what it says.

    It is ASCII: a message may quote half a surrogate pair, which UTF-8 does not have.
    """
    return Response(json.dumps(body(error)), error.status, error.headers, "application/json")
