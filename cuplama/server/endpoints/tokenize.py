"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``: in vLLM's form, and in llama.cpp's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...arguments import checked, flag, need_type
from ...model import Model
from ...text.tokenizer import Tokenizer
from ..endpoint import Endpoint
from ..errors import ApiError
from ..limits import read_object
from ..service import Service

__all__ = ["ENDPOINTS"]


async def _tokenize(service: Service, request: Request) -> Response:
    model = service.loaded
    fields = await read_object(request, service.limits)
    service.check_name(_field(fields, "model", None, _text))
    given = [name for name in _FORMS if fields.get(name) is not None]
    if len(given) != 1:
        raise ApiError(400, f"one of {', '.join(_FORMS)} must be given", param="prompt")
    # Beside the event loop: a long text takes a second.
    return await asyncio.to_thread(lambda: JSONResponse(_FORMS[given[0]](model, fields)))


def _of_prompt(model: Model, fields: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's form for a text."""
    bos = _field(fields, "add_special_tokens", True, flag)
    return _vllm(model, fields, model.tokenizer.encode(_field(fields, "prompt", "", _text), bos=bos))


def _of_messages(model: Model, fields: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's form for a chat."""
    going_on = _field(fields, "continue_final_message", False, flag)
    begin = _field(fields, "add_generation_prompt", None if going_on else True, flag)
    ids = model.encode_chat(
        fields["messages"],
        tools=fields.get("tools"),
        add_generation_prompt=begin,
        continue_final_message=going_on,
        template_args=fields.get("chat_template_kwargs"),
    )
    return _vllm(model, fields, ids)


def _vllm(model: Model, fields: Mapping[str, Any], ids: list[int]) -> dict[str, Any]:
    texts = [model.tokenizer.piece(id) for id in ids] if _field(fields, "return_token_strs", False, flag) else None
    return {"count": len(ids), "max_model_len": model.context, "tokens": ids, "token_strs": texts}


def _of_content(model: Model, fields: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's form."""
    if not _field(fields, "parse_special", True, flag):
        raise ApiError(400, "parse_special = false is not supported; it must be true", param="parse_special")
    bos = _field(fields, "add_special", False, flag)
    ids = model.tokenizer.encode(_field(fields, "content", "", _text), bos=bos)
    if _field(fields, "with_pieces", False, flag):
        return {"tokens": [{"id": id, "piece": model.tokenizer.token_text(id)} for id in ids]}
    return {"tokens": ids}


_FORMS: Mapping[str, Callable[[Model, Mapping[str, Any]], dict[str, Any]]] = {
    "prompt": _of_prompt,
    "messages": _of_messages,
    "content": _of_content,
}


async def _detokenize(service: Service, request: Request) -> Response:
    model = service.loaded
    fields = await read_object(request, service.limits)
    service.check_name(_field(fields, "model", None, _text))
    if "tokens" not in fields:
        raise ApiError(400, "tokens is missing; it must be a list of token ids", param="tokens")
    text = await asyncio.to_thread(model.decode, fields["tokens"], False)
    return JSONResponse({"prompt": text, "content": text})  # as vLLM and as llama.cpp call it


async def _info(service: Service, _: Request) -> Response:
    tokenizer: Tokenizer = service.loaded.tokenizer
    return JSONResponse(
        {
            "tokenizer_class": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": service.loaded.context,
            "bos_token_id": tokenizer.bos,
            "eos_token_id": tokenizer.eos,
            **{name: tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token")},
            **tokenizer.special_tokens,
            "chat_template": tokenizer.chat_template,
        }
    )


def _field(fields: Mapping[str, Any], name: str, default: Any, read: Callable[[Any], Any]) -> Any:
    """A field of a request; null is the default. Raises ParameterError."""
    value = fields.get(name)
    return default if value is None else checked(name, value, read, _WANTED[read])


def _text(value: Any) -> str:
    need_type(isinstance(value, str), value)
    return str(value)


_WANTED: Mapping[Callable[[Any], Any], str] = {flag: "true or false", _text: "a text"}

_TEXT, _FLAG = {"type": "string"}, {"type": "boolean"}
_IDS = {"type": "array", "items": {"type": "integer"}}
_REQUEST: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "model": _TEXT,
        "prompt": _TEXT,
        "messages": {"type": "array", "items": {"type": "object"}},
        "content": _TEXT,
        "add_special_tokens": _FLAG,
        "add_generation_prompt": _FLAG,
        "continue_final_message": _FLAG,
        "return_token_strs": _FLAG,
        "tools": {"type": "array", "items": {"type": "object"}},
        "chat_template_kwargs": {"type": "object"},
        "add_special": _FLAG,
        "parse_special": {"const": True},
        "with_pieces": _FLAG,
    },
    "oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}, {"required": ["content"]}],
}
_TOKENS: Mapping[str, Any] = {"type": "object", "required": ["tokens"], "properties": {"tokens": {"type": "array"}}}
_BACK: Mapping[str, Any] = {
    "type": "object",
    "required": ["tokens"],
    "properties": {"model": _TEXT, "tokens": _IDS},
}
_TOLD: Mapping[str, Any] = {"type": "object", "required": ["prompt", "content"]}
_INFO: Mapping[str, Any] = {"type": "object", "required": ["tokenizer_class", "eos_token", "chat_template"]}

ENDPOINTS = (
    Endpoint("POST", "/tokenize", _tokenize, "The tokens of a text or a chat.", _REQUEST, _TOKENS),
    Endpoint("POST", "/detokenize", _detokenize, "The text of tokens.", _BACK, _TOLD),
    Endpoint("GET", "/tokenizer_info", _info, "Special tokens and chat template.", response_schema=_INFO),
)
