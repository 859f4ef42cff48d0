"""cuplama's errors as clients read them."""

from __future__ import annotations

import json

import pytest
from starlette.exceptions import HTTPException

from cuplama.errors import (
    BusyError,
    CheckpointError,
    ClosedError,
    ContextError,
    CuplamaError,
    DeviceError,
    ParameterError,
    PromptError,
    TokenizerError,
)
from cuplama.server.errors import ApiError, api_error, error_body, error_response

INVALID = "invalid_request_error"


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (ParameterError("top_p = 3 is out of range; it must be ..."), 400, INVALID, "top_p", None),
        (ParameterError("logit_bias: token id 9 is out of range"), 400, INVALID, "logit_bias", None),
        (ParameterError("nothing is named here"), 400, INVALID, None, None),
        (PromptError("prompt 0: a token id is a whole number"), 400, INVALID, None, None),
        (ContextError("the prompt has 9 tokens"), 400, INVALID, None, "context_length_exceeded"),
        (TokenizerError("the template refuses"), 400, INVALID, None, None),
        (BusyError("too many"), 429, "rate_limit_exceeded", None, "rate_limit_exceeded"),
        (ClosedError("closed"), 503, "unavailable_error", None, None),
        (DeviceError("broken"), 500, "server_error", None, None),
        (CheckpointError("gone"), 500, "server_error", None, None),
        (HTTPException(404), 404, "not_found_error", None, None),
        (HTTPException(405, headers={"Allow": "GET"}), 405, INVALID, None, None),
        (ValueError("what others sent"), 500, "server_error", None, None),
    ],
)
def test_every_error_has_its_status(error: Exception, status: int, kind: str, param: str | None, code: str) -> None:
    told = api_error(error)
    assert (told.status, told.type, told.param, told.code) == (status, kind, param, code)
    if isinstance(error, CuplamaError):
        assert told.message == str(error)
    if isinstance(error, ValueError) and not isinstance(error, CuplamaError):
        assert "others" not in told.message


def test_an_api_error_stays_what_it_is() -> None:
    error = ApiError(418, "a teapot")
    assert api_error(error) is error
    assert error_body(error) == {"error": {"message": "a teapot", "type": INVALID, "param": None, "code": None}}


def test_a_message_may_quote_text_that_is_no_unicode() -> None:
    response = error_response(ApiError(400, "the model '\ud800' is not served"))
    assert json.loads(bytes(response.body))["error"]["message"] == "the model '\ud800' is not served"


def test_what_may_soon_be_mended_says_when_to_come_again() -> None:
    assert api_error(HTTPException(405, headers={"Allow": "GET"})).headers == {"Allow": "GET"}
    assert [ApiError(status, "").headers for status in (429, 503, 400)] == [{"Retry-After": "1"}] * 2 + [{}]
