"""The answer of ``/v1/messages``: Anthropic's message of content blocks, the events that build it, and its errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..completion import Completion
from .blocks import Block, Blocks, Named, Step
from .errors import ApiError
from .generating import Asked

__all__ = ["MessagesWriter", "message_error"]

_ERRORS: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_DELTAS = {"reasoning": ("thinking_delta", "thinking"), "text": ("text_delta", "text")}
_CALL_DELTA = ("input_json_delta", "partial_json")


def message_error(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic's clients read it."""
    kind = _ERRORS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


class MessagesWriter:
    """Writes one message; see ``Writer``. id: of the request."""

    def __init__(self, blocks: Blocks, id: str, model: str, asked: Asked) -> None:
        self.blocks, self._asked = blocks, asked
        self._head = {"id": f"msg_{id}", "type": "message", "role": "assistant", "model": model}

    def begin(self, completion: Completion) -> list[Named]:
        """See ``Writer``."""
        ends: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        return [{"type": "message_start", "message": {**self._head, **ends, "usage": _usage(completion)}}]

    def step(self, step: Step) -> list[Named]:
        """See ``Writer``."""
        block = step.block
        if step.happening == "begins":
            return [{"type": "content_block_start", "index": block.index, "content_block": _content(block, begun=True)}]
        if step.happening == "goes on":
            kind, name = _DELTAS.get(block.kind, _CALL_DELTA)
            return [_delta(block, {"type": kind, name: step.text})]
        signed = [_delta(block, {"type": "signature_delta", "signature": ""})] if block.kind == "reasoning" else []
        return [*signed, {"type": "content_block_stop", "index": block.index}]

    def end(self, completion: Completion) -> list[Named]:
        """See ``Writer``."""
        return [
            {"type": "message_delta", "delta": self._ends(completion), "usage": _usage(completion)},
            {"type": "message_stop"},
        ]

    def whole(self, completion: Completion) -> dict[str, Any]:
        """See ``Writer``."""
        content = [_content(block) for block in self.blocks.blocks]
        return {**self._head, "content": content, **self._ends(completion), "usage": _usage(completion)}

    def failed(self, error: ApiError) -> list[Named]:
        """See ``Writer``."""
        return [message_error(error)]

    def _ends(self, completion: Completion) -> dict[str, Any]:
        stop = self._stop_sequence(completion)
        reason = "end_turn"
        if completion.finish_reason == "length":
            reason = "max_tokens"
        elif stop is not None:
            reason = "stop_sequence"
        elif self.blocks.split.called:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": stop}

    def _stop_sequence(self, completion: Completion) -> str | None:
        """The stop string that ended the text, which is not in it: the first that follows there in the tokens' text."""
        tokens = completion.tokens
        if completion.finish_reason != "stop" or not tokens or tokens[-1] in self._asked.stop_ids:
            return None
        tokenizer = self._asked.model.tokenizer
        for count in range(1, len(tokens) + 1):  # a stop string is rarely longer than a few tokens
            end = tokenizer.decode(tokens[-count:], skip_special=False)
            if found := [stop for stop in self._asked.params.stop if stop in end]:
                return max(found, key=len)
        return None


def _content(block: Block, begun: bool = False) -> dict[str, Any]:
    """A block; begun: there is nothing in it yet."""
    text = "" if begun else block.text
    if block.kind == "call":
        return {"type": "tool_use", "id": block.call, "name": block.name, "input": {} if begun else _input(text)}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text, "citations": None}


def _input(arguments: str) -> Any:
    """What a call gives the tool. Arguments that are no object, because the text ended in them, are kept as text."""
    try:
        found = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": arguments}


def _delta(block: Block, delta: dict[str, Any]) -> Named:
    return {"type": "content_block_delta", "index": block.index, "delta": delta}


def _usage(completion: Completion) -> dict[str, int]:
    """Anthropic counts the tokens of the prompt that were in the cache apart from the others."""
    cached = completion.cached_tokens
    return {
        "input_tokens": len(completion.prompt_tokens) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": len(completion.tokens),
    }
