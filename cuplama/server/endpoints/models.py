"""``/v1/models``: under which names the model is served."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...errors import TokenizerError
from ...model import Model
from ..endpoint import Endpoint
from ..service import Service

__all__ = ["ENDPOINTS"]


def _described(service: Service, name: str) -> dict[str, Any]:
    model = service.model
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "cuplama",
        "root": None if model is None else model.name,
        "max_model_len": None if model is None else model.context,
        "chat_template": None if model is None else _can_chat(model),
    }


def _can_chat(model: Model) -> bool:
    with suppress(TokenizerError):
        return model.tokenizer.chat_template is not None
    return False


async def _models(service: Service, _: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(service, name) for name in service.names]})


async def _model(service: Service, request: Request) -> Response:
    name = request.path_params["id"]
    service.check_name(name or "/")  # no name is none of a model
    return JSONResponse(_described(service, name))


_MODEL: Mapping[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "root": {"type": ["string", "null"]},
        "max_model_len": {"type": ["integer", "null"]},
        "chat_template": {"type": ["boolean", "null"]},  # whether there is one: without it only completions work
    },
}
_LIST: Mapping[str, Any] = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
}

ENDPOINTS = (
    Endpoint("GET", "/v1/models", _models, "The names under which the model is served.", response_schema=_LIST),
    Endpoint("GET", "/v1/models/{id:path}", _model, "The model of one name.", response_schema=_MODEL),
)
