"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``: in vLLM's form, and in llama.cpp's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...model import Model
from ...text.tokenizer import Tokenizer
from ..endpoint import Endpoint
from ..errors import ApiError
from ..fields import Fields, own, refused
from ..kinds import ANY_OBJECT, FLAG, integer, listed, string
from ..limits import read_object
from ..service import Service

__all__ = ["ENDPOINTS"]


_MODEL = own("model", string(), "The name of the served model, or none.")
_FIELDS = Fields(
    (
        _MODEL,
        own("prompt", string(), "A text, in vLLM's form."),
        own("messages", listed(ANY_OBJECT, "messages", 1), "A chat, in vLLM's form."),
        own("content", string(), "A text, in llama.cpp's form."),
        own("add_special_tokens", FLAG, "Put the tokenizer's BOS before a prompt.", True),
        own("add_generation_prompt", FLAG, "Begin the assistant's answer. Default: unless continue_final_message."),
        own("continue_final_message", FLAG, "Go on from the end of the last message.", False),
        own("tools", listed(ANY_OBJECT, "functions"), "Functions that the model may call."),
        own("chat_template_kwargs", ANY_OBJECT, "Variables of the template."),
        own("return_token_strs", FLAG, "Return the tokens' texts, too.", False),
        own("add_special", FLAG, "Put the tokenizer's BOS before a content.", False),
        own("with_pieces", FLAG, "Return the texts of a content's tokens, too.", False),
        refused("parse_special", "the texts of special tokens are always such", True),
    )
)
_BACK = Fields((_MODEL, own("tokens", listed(integer(0, 2**31 - 1), "token ids"), "Token ids.", required=True)))


async def _tokenize(service: Service, request: Request) -> Response:
    model = service.loaded
    fields = _FIELDS.read(await read_object(request, service.limits)).own
    service.check_name(fields["model"])
    given = [name for name in _FORMS if fields[name] is not None]
    if len(given) != 1:
        raise ApiError(400, f"exactly one of {', '.join(_FORMS)} must be given", param="prompt")
    # Beside the event loop: a long text takes a second.
    return await asyncio.to_thread(lambda: JSONResponse(_FORMS[given[0]](model, fields)))


def _of_prompt(model: Model, fields: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's form for a text."""
    return _vllm(model, fields, model.tokenizer.encode(fields["prompt"], bos=fields["add_special_tokens"]))


def _of_messages(model: Model, fields: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's form for a chat."""
    begin, going_on = fields["add_generation_prompt"], fields["continue_final_message"]
    ids = model.encode_chat(
        fields["messages"],
        tools=fields["tools"],
        add_generation_prompt=not going_on if begin is None else begin,
        continue_final_message=going_on,
        template_args=fields["chat_template_kwargs"],
    )
    return _vllm(model, fields, ids)


def _vllm(model: Model, fields: Mapping[str, Any], ids: list[int]) -> dict[str, Any]:
    texts = [model.tokenizer.piece(id) for id in ids] if fields["return_token_strs"] else None
    return {"count": len(ids), "max_model_len": model.context, "tokens": ids, "token_strs": texts}


def _of_content(model: Model, fields: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's form."""
    ids = model.tokenizer.encode(fields["content"], bos=fields["add_special"])
    if fields["with_pieces"]:
        return {"tokens": [{"id": id, "piece": model.tokenizer.token_text(id)} for id in ids]}
    return {"tokens": ids}


_FORMS: Mapping[str, Callable[[Model, Mapping[str, Any]], dict[str, Any]]] = {
    "prompt": _of_prompt,
    "messages": _of_messages,
    "content": _of_content,
}


async def _detokenize(service: Service, request: Request) -> Response:
    model = service.loaded
    fields = _BACK.read(await read_object(request, service.limits)).own
    service.check_name(fields["model"])
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


_REQUEST = {**_FIELDS.schema, "oneOf": [{"required": [name]} for name in _FORMS]}
_TOKENS: Mapping[str, Any] = {"type": "object", "required": ["tokens"], "properties": {"tokens": {"type": "array"}}}
_TOLD: Mapping[str, Any] = {"type": "object", "required": ["prompt", "content"]}
_INFO: Mapping[str, Any] = {"type": "object", "required": ["tokenizer_class", "eos_token", "chat_template"]}

ENDPOINTS = (
    Endpoint("POST", "/tokenize", _tokenize, "The tokens of a text or a chat.", _REQUEST, _TOKENS),
    Endpoint("POST", "/detokenize", _detokenize, "The text of tokens.", _BACK.schema, _TOLD),
    Endpoint("GET", "/tokenizer_info", _info, "Special tokens and chat template.", response_schema=_INFO),
)
