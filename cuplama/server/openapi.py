"""The OpenAPI document of the endpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from .endpoint import Endpoint

__all__ = ["openapi"]

# Errors of Anthropic's form have no param and no code.
_ERROR: Mapping[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}


def openapi(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The document as of OpenAPI 3.1, whose schemas are JSON schemas as they are."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "cuplama", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint, path: str) -> dict[str, Any]:
    answer = {} if endpoint.response_schema is None else {"schema": endpoint.response_schema}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    told: dict[str, Any] = {
        "summary": endpoint.summary,
        "responses": {
            "200": {
                "description": "The answer.",
                "content": {kind: answer if kind == "application/json" else {} for kind in endpoint.response_types},
            },
            "default": {"description": "An error.", "content": error},
        },
        "security": [] if endpoint.open else [{"bearer": []}, {}],
    }
    if endpoint.request_schema is not None:
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": endpoint.request_schema}}}
    if names := re.findall(r"\{(\w+)\}", path):
        told["parameters"] = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
    return told
