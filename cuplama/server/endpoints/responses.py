"""``POST /v1/responses``: OpenAI's newer API, in text form. Nothing is stored: a request has its whole conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...model import Model
from ..blocks import Blocks, answer_in_blocks
from ..chat_messages import Conversation, text_of, wanted
from ..chat_request import ChatRequest, read_chat_request
from ..endpoint import Endpoint
from ..errors import ApiError
from ..fields import Fields, Read, harmless, own, refused, sampling
from ..fields import chat as chat_option
from ..generating import prepare_chat
from ..generation_fields import COMMON
from ..kinds import ANY_OBJECT, FLAG, either, integer, json_shown, listed, record, string, table
from ..limits import read_object
from ..responses_form import ResponsesWriter
from ..service import Service
from ..split_text import SplitText
from ..tool_choice import read_choice

__all__ = ["ENDPOINTS", "FIELDS"]

_TEXTS = ("input_text", "output_text", "text")


FIELDS = Fields(
    (
        own(
            "input",
            either(string(), listed(ANY_OBJECT, "items")),
            "A message of the user, or the items of the conversation.",
            required=True,
        ),
        *COMMON,
        own("instructions", string(), "What the system says first."),
        sampling("max_output_tokens", integer(0), "Tokens to generate at most, reasoning included.", to="max_tokens"),
        own("tools", listed(ANY_OBJECT, "functions"), "Functions that the model may call."),
        own("tool_choice", either(string(), ANY_OBJECT), "none, auto, required, or one function."),
        own("parallel_tool_calls", FLAG, "Whether an answer may have several calls.", True),
        own("reasoning", ANY_OBJECT, "effort: how long to think, if the model's template knows of it."),
        own("text", record({"format": ANY_OBJECT, "verbosity": string()}), "format: text, json_object or json_schema."),
        own("metadata", table(string(), str, ".*", "an object of strings"), "Given back."),
        chat_option("chat_template_kwargs", ANY_OBJECT, "Variables of the template.", "template_args"),
        harmless("store", FLAG, "Nothing is stored."),
        harmless("include", listed(string(), "strings"), "There is nothing that could be included."),
        refused("previous_response_id", "nothing is stored; send the whole conversation as input"),
        refused("conversation", "nothing is stored; send the whole conversation as input"),
        refused("background", "wait for the answer, or stream it", False),
        refused("prompt", "there are no stored prompts; use instructions"),
        refused("truncation", "shorten the input", "disabled"),
        refused("top_logprobs", "use /v1/chat/completions", 0),
        refused("max_tool_calls", "the server calls no tools"),
        refused("n", "send several requests", 1),
        refused("context_management", "shorten the input", []),
    )
)


async def _responses(service: Service, request: Request) -> Response:
    read = FIELDS.read(await read_object(request, service.limits))
    given = read.own
    service.check_name(given["model"])
    choice, tools = read_choice(given["tool_choice"]), _tools(given["tools"])
    messages = _messages(given["input"], given["instructions"])
    if (form := _response_format(given["text"])) is not None:
        read.sampling["response_format"] = form
    effort, parallel = (given["reasoning"] or {}).get("effort"), given["parallel_tool_calls"]

    def encode(model: Model) -> ChatRequest:
        return read_chat_request(model, messages, read.chat, tools if choice.tools else None, effort)

    asked, chat = await prepare_chat(service, request, read, encode, choice, parallel)
    blocks = Blocks(SplitText(chat.splitter(), several_calls=parallel))
    writer = ResponsesWriter(blocks, request.state.id, service.name, _echoed(read, asked.params.max_tokens))
    return await answer_in_blocks(service, request, read, asked, writer)


def _echoed(read: Read, most: int | None) -> dict[str, Any]:
    """Fields of the request that the response has as well, with their defaults."""
    given = read.own
    form = (given["text"] or {}).get("format") or {"type": "text"}
    return {
        "background": False,
        "instructions": given["instructions"],
        "max_output_tokens": most,
        "metadata": given["metadata"] or {},
        "parallel_tool_calls": given["parallel_tool_calls"],
        "previous_response_id": None,
        "reasoning": {"effort": (given["reasoning"] or {}).get("effort"), "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": read.sampling.get("temperature", 1.0),
        "text": {"format": form},
        "tool_choice": given["tool_choice"] or "auto",
        "tools": given["tools"] or [],
        "top_logprobs": 0,
        "top_p": read.sampling.get("top_p", 1.0),
        "truncation": "disabled",
    }


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The functions as chat templates read them. Here name and parameters stand beside the type."""
    found = []
    for i, tool in enumerate(tools or ()):
        if tool.get("type") != "function":
            said = (
                f"tools[{i}] is of type {json_shown(tool.get('type'))}; the server calls no tools, so only functions go"
            )
            raise ApiError(400, said, param="tools")
        function = {name: value for name, value in tool.items() if name != "type" and value is not None}
        found.append({"type": "function", "function": function.get("function", function)})
    return found or None


def _response_format(text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """OpenAI's older field of the same meaning; there the schema is one level deeper."""
    form = (text or {}).get("format")
    if form is None:
        return None
    if form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}
    return dict(form)


def _messages(given: str | list[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    chat = Conversation()
    for i, item in enumerate([{"role": "user", "content": given}] if isinstance(given, str) else given):
        kind = item.get("type") or "message"
        if kind not in _ITEMS:
            said = f"input[{i}] is of type {json_shown(kind, 40)}; supported: {', '.join(_ITEMS)}"
            raise ApiError(400, said, param="input")
        _ITEMS[kind](chat, item, f"input[{i}]")
    if instructions:
        chat.instruct(instructions)
    return chat.messages


def _message(chat: Conversation, item: Mapping[str, Any], where: str) -> None:
    role = wanted(item.get("role"), str, f"{where}.role", "a string", "input")
    content = item.get("content")
    if isinstance(content, list):  # what the model refused is text that it wrote
        content = [{"type": "text", "text": p.get("refusal")} if _is(p, "refusal") else p for p in content]
    chat.say(role, text_of(content, f"{where}.content", "input", _TEXTS))


def _function_call(chat: Conversation, item: Mapping[str, Any], where: str) -> None:
    id, name, arguments = (
        wanted(item.get(key), str, f"{where}.{key}", "a string", "input") for key in ("call_id", "name", "arguments")
    )
    chat.call(id, name, arguments)


def _function_result(chat: Conversation, item: Mapping[str, Any], where: str) -> None:
    id = wanted(item.get("call_id"), str, f"{where}.call_id", "a string", "input")
    chat.result(id, text_of(item.get("output"), f"{where}.output", "input", _TEXTS))


def _reasoning(chat: Conversation, item: Mapping[str, Any], where: str) -> None:
    """The reasoning itself, or a summary, where there is only that. What is encrypted cannot be read."""
    text = text_of(item.get("content"), f"{where}.content", "input", ("reasoning_text", "text"))
    text = text or text_of(item.get("summary"), f"{where}.summary", "input", ("summary_text",))
    if text:
        chat.think(text)


def _is(part: Any, kind: str) -> bool:
    return isinstance(part, Mapping) and part.get("type") == kind


_ITEMS: Mapping[str, Callable[[Conversation, Mapping[str, Any], str], None]] = {
    "message": _message,
    "function_call": _function_call,
    "function_call_output": _function_result,
    "reasoning": _reasoning,
}
ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/responses",
        _responses,
        "The answer to a conversation, as items.",
        request_schema=FIELDS.schema,
        response_schema={"type": "object"},
        response_types=("application/json", "text/event-stream"),
    ),
)
