"""``POST /v1/chat/completions``: the answer to a conversation, as OpenAI, vLLM and their clients have it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from ...model import Model
from ..answers import RESPONSE_SCHEMA, answer
from ..chat_form import ChatForm, Shown
from ..chat_request import ChatRequest, read_chat_request
from ..endpoint import Endpoint
from ..errors import ApiError
from ..fields import Fields, chat, harmless, own, refused
from ..generating import prepare_chat
from ..generation_fields import COMMON
from ..kinds import ANY_OBJECT, FLAG, either, integer, listed, messages, record, string, word
from ..limits import read_object
from ..logprobs import Spelling
from ..service import Service
from ..tool_choice import read_choice

__all__ = ["ENDPOINTS", "FIELDS"]


_PART = record({"type": word("text"), "text": string()}, ["type", "text"])
_MESSAGE = record({"role": string(1), "content": either(string(), listed(_PART, "parts"))}, ["role"])
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_FUNCTION = record({"type": word("function"), "function": record({"name": string(1)}, ["name"])}, ["function"])
FIELDS = Fields(
    (
        own(
            "messages",
            messages(_MESSAGE),
            "The conversation: dicts with a role and a content, text or a list of text parts.",
            required=True,
        ),
        *COMMON,
        own("logprobs", FLAG, "Return the log-probability of each token.", False),
        own("top_logprobs", integer(0, 64), "And those of so many of the most probable tokens.", 0),
        own("tools", listed(ANY_OBJECT, "functions"), "Functions that the model may call."),
        own("tool_choice", either(word("none", "auto", "required"), _FUNCTION), "Whether, or which."),
        own("parallel_tool_calls", FLAG, "Whether an answer may have several calls.", True),
        own("reasoning_effort", word(*_EFFORTS), "How long to think, if the model's template knows of it."),
        own("include_reasoning", FLAG, "Return the reasoning beside the content.", True),
        chat("documents", listed(ANY_OBJECT, "objects"), "What the template is given to quote from."),
        chat("chat_template", string(1), "The name of one of the model's own templates."),
        chat("chat_template_kwargs", ANY_OBJECT, "Variables of the template.", "template_args"),
        chat("add_generation_prompt", FLAG, "Begin the assistant's answer. Default: unless continue_final_message."),
        chat("continue_final_message", FLAG, "Go on from the end of the last message."),
        refused("add_special_tokens", "the template has them", False),
        refused("echo", "use continue_final_message", False),
        refused("functions", "use tools", []),
        refused("function_call", "use tool_choice", "none"),
        refused("modalities", "the model writes text", ["text"]),
        refused("audio", "the model writes text"),
        refused("web_search_options", "the server searches nothing"),
        refused("verbosity", "say it in a message", "medium"),
        refused("mm_processor_kwargs", "the model reads text", {}),
        refused("media_io_kwargs", "the model reads text", {}),
        harmless("prediction", ANY_OBJECT, "It would only be faster."),
        harmless("store", FLAG, "Nothing is stored."),
        harmless("metadata", ANY_OBJECT),
    )
)


async def _chat(service: Service, request: Request) -> Response:
    read = FIELDS.read(await read_object(request, service.limits))
    service.check_name(read.own["model"])
    if read.own["logprobs"]:
        read.sampling["logprobs"] = read.own["top_logprobs"]
    elif read.own["top_logprobs"]:
        said = f"top_logprobs = {read.own['top_logprobs']} needs logprobs = true"
        raise ApiError(400, said, param="top_logprobs")
    choice, parallel = read_choice(read.own["tool_choice"]), read.own["parallel_tool_calls"]
    tools = read.own["tools"] if choice.tools else None

    def encode(model: Model) -> ChatRequest:
        return read_chat_request(model, read.own["messages"], read.chat, tools, read.own["reasoning_effort"])

    asked, chat_request = await prepare_chat(service, request, read, encode, choice, parallel)
    shown = Shown(
        logprobs=read.own["logprobs"],
        prompt_logprobs=read.sampling.get("prompt_logprobs"),
        ids=read.own["return_token_ids"],
        reasoning=read.own["include_reasoning"],
        several_calls=parallel,
    )
    spelling = Spelling(asked.model.tokenizer, read.own["return_tokens_as_token_ids"])
    form = ChatForm(spelling, chat_request.splitter, asked.stop_ids, shown)
    return await answer(service, request, read, asked, form)


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        _chat,
        "The answer to a conversation.",
        request_schema=FIELDS.schema,
        response_schema=RESPONSE_SCHEMA,
        response_types=("application/json", "text/event-stream"),
    ),
)
