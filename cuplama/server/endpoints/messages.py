"""``POST /v1/messages``: Anthropic's API in text form, and the count of a request's tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...model import Model
from ..blocks import Blocks, answer_in_blocks
from ..chat_messages import Conversation, text_of, wanted
from ..chat_request import ChatRequest, read_chat_request
from ..endpoint import Endpoint
from ..errors import ApiError
from ..fields import Field, Fields, Read, harmless, own, refused, sampling
from ..fields import chat as chat_option
from ..generating import prepare, prepare_chat
from ..generation_fields import COMMON
from ..kinds import ANY_OBJECT, either, integer, json_shown, listed, messages, record, string, word
from ..limits import read_object
from ..messages_form import MessagesWriter, message_error
from ..service import Service
from ..split_text import SplitText
from ..tool_choice import AUTO, NONE, ToolChoice

__all__ = ["COUNT_FIELDS", "ENDPOINTS", "FIELDS"]

_CHOICES = word("auto", "any", "tool", "none")
_ROLES = ("user", "assistant", "system")


_MESSAGE = record({"role": word("user", "assistant"), "content": either(string(), listed(ANY_OBJECT, "blocks"))})
_FIELDS: tuple[Field, ...] = (
    own(
        "messages",
        messages(_MESSAGE),
        "The conversation. If the last message is the assistant's, the answer goes on from its end.",
        required=True,
    ),
    *COMMON,
    sampling("stop_sequences", listed(string(1), "non-empty strings"), "Strings that end the text.", to="stop"),
    own("system", either(string(), listed(ANY_OBJECT, "text blocks")), "What the system says first."),
    own("tools", listed(ANY_OBJECT, "tools"), "Tools that the model may call."),
    own(
        "tool_choice", record({"type": _CHOICES, "name": string(1)}, ["type"]), "auto, any, tool with a name, or none."
    ),
    own("thinking", record({"type": string()}), "enabled or disabled, if the model's template knows of it."),
    own("output_format", ANY_OBJECT, "A JSON schema that the text follows."),
    own("output_config", ANY_OBJECT, "format: the same."),
    chat_option("chat_template_kwargs", ANY_OBJECT, "Variables of the template.", "template_args"),
    harmless("metadata", ANY_OBJECT),
    harmless("cache_control", ANY_OBJECT, "The prefix cache needs no marks."),
    refused("container", "the server runs no code"),
    refused("mcp_servers", "the server calls no tools", []),
    refused("n", "send several requests", 1),
)
FIELDS = Fields((*_FIELDS, sampling("max_tokens", integer(0), "Tokens to generate at most.", default=None)))
COUNT_FIELDS = Fields(_FIELDS)


async def _messages(service: Service, request: Request) -> Response:
    body = await read_object(request, service.limits)
    read = FIELDS.read(body)
    if "max_tokens" not in read.sampling:
        raise ApiError(400, "max_tokens is missing; it must be a whole number >= 0", param="max_tokens")
    choice, parallel = _choice(read.own["tool_choice"])
    if (form := _output_format(read)) is not None:
        read.sampling["response_format"] = form
    service.check_name(read.own["model"])
    asked, chat = await prepare_chat(
        service, request, read, lambda model: _read_chat(model, read, choice), choice, parallel
    )
    silent = (read.own["thinking"] or {}).get("type") == "disabled"
    blocks = Blocks(SplitText(chat.splitter(), reasoning=not silent, several_calls=parallel))
    writer = MessagesWriter(blocks, request.state.id, service.name, asked)
    return await answer_in_blocks(service, request, read, asked, writer)


async def _count(service: Service, request: Request) -> Response:
    read = COUNT_FIELDS.read(await read_object(request, service.limits))
    service.check_name(read.own["model"])
    choice, _ = _choice(read.own["tool_choice"])
    asked = await prepare(service, request, read, lambda model: [_read_chat(model, read, choice).ids])
    return JSONResponse({"input_tokens": len(asked.prompts[0])})


def _read_chat(model: Model, read: Read, choice: ToolChoice) -> ChatRequest:
    given = read.own
    conversation = _conversation(given["messages"], given["system"])
    options = dict(read.chat)
    if conversation[-1]["role"] == "assistant" and "tool_calls" not in conversation[-1]:
        options["continue_final_message"] = True
    if (thinking := (given["thinking"] or {}).get("type")) is not None:
        options["enable_thinking"] = thinking != "disabled"
    return read_chat_request(model, conversation, options, _tools(given["tools"]) if choice.tools else None)


def _choice(given: Mapping[str, Any] | None) -> tuple[ToolChoice, bool]:
    """Whether, or which, and whether there may be several calls."""
    if given is None:
        return AUTO, True
    parallel = given.get("disable_parallel_tool_use") is not True
    if given["type"] == "tool":
        if "name" not in given:
            raise ApiError(400, "tool_choice of type tool has no name", param="tool_choice")
        return ToolChoice(required=True, name=given["name"]), parallel
    return {"auto": AUTO, "any": ToolChoice(required=True), "none": NONE}[given["type"]], parallel


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools as chat templates read them."""
    found = []
    for i, tool in enumerate(tools or ()):
        if tool.get("type", "custom") not in ("custom", None):
            said = f"tools[{i}] is of type {json_shown(tool['type'])}; the server runs no tools, so only custom ones go"
            raise ApiError(400, said, param="tools")
        function = {name: tool[name] for name in ("name", "description", "strict") if tool.get(name) is not None}
        found.append({"type": "function", "function": {**function, "parameters": tool.get("input_schema") or {}}})
    return found or None


def _output_format(read: Read) -> dict[str, Any] | None:
    """The form of the text as OpenAI's API has it."""
    form = read.own["output_format"] or (read.own["output_config"] or {}).get("format")
    if form is None:
        return None
    if not isinstance(form, Mapping) or form.get("type") != "json_schema":
        said = f"output_format = {json_shown(form)} is not supported; supported: type json_schema, with a schema"
        raise ApiError(400, said, param="output_format")
    return {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}


def _conversation(given: list[dict[str, Any]], system: Any) -> list[dict[str, Any]]:
    chat = Conversation()
    for i, message in enumerate(given):
        where, role = f"messages[{i}]", message.get("role")
        if role not in _ROLES:
            said = f"{where}.role = {json_shown(role)} is not supported; supported: {', '.join(_ROLES)}"
            raise ApiError(400, said, param="messages")
        _say(chat, role, message.get("content"), f"{where}.content")
    if text := text_of(system, "system", "system", ("text",)):
        chat.instruct(text)
    return chat.messages


def _say(chat: Conversation, role: str, content: Any, where: str) -> None:
    """One message. The results of tools, which are the user's here, are messages of their own."""
    if isinstance(content, str):
        chat.say(role, content)
        return
    texts: list[str] = []
    for i, block in enumerate(wanted(content, list, where, "a string or a list of blocks", "messages")):
        place = f"{where}[{i}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_result":
            id = wanted(block.get("tool_use_id"), str, f"{place}.tool_use_id", "a string", "messages")
            chat.result(id, text_of(block.get("content"), f"{place}.content", "messages", ("text",)))
        elif kind == "tool_use":
            id, name = (wanted(block.get(k), str, f"{place}.{k}", "a string", "messages") for k in ("id", "name"))
            chat.say(role, "\n".join(texts))
            texts = []
            arguments = wanted(block.get("input", {}), dict, f"{place}.input", "an object", "messages")
            chat.call(id, name, json.dumps(arguments, ensure_ascii=False))
        elif kind == "thinking":
            chat.think(wanted(block.get("thinking"), str, f"{place}.thinking", "a string", "messages"))
        elif kind != "redacted_thinking":  # which nobody here can read
            texts.append(text_of([block], place, "messages", ("text",)))
    if texts or not content:
        chat.say(role, "\n".join(texts))


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/messages",
        _messages,
        "The answer to a conversation, as Anthropic's API has it.",
        request_schema={**FIELDS.schema, "required": ["messages", "max_tokens"]},
        response_schema={"type": "object"},
        response_types=("application/json", "text/event-stream"),
        error_body=message_error,
    ),
    Endpoint(
        "POST",
        "/v1/messages/count_tokens",
        _count,
        "The number of tokens that a request would have the model read.",
        request_schema=COUNT_FIELDS.schema,
        response_schema={"type": "object"},
        error_body=message_error,
    ),
)
