"""The answer of ``/v1/responses``: a response object with items, and the events that build it up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..completion import Completion
from .blocks import Block, Blocks, Named, Step
from .errors import ApiError
from .generating import usage

__all__ = ["ResponsesWriter"]

_PREFIXES = {"reasoning": "rs_", "text": "msg_", "call": "fc_"}
_EMPTY = {"text": "", "annotations": [], "logprobs": []}


class ResponsesWriter:
    """Writes one response; see ``Writer``. id: of the request; echoed: fields of the request that are given back."""

    def __init__(self, blocks: Blocks, id: str, model: str, echoed: Mapping[str, Any]) -> None:
        self.blocks = blocks
        self._id, self._number = id, 0
        self._head = {
            "id": f"resp_{id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **echoed,
        }

    def begin(self, completion: Completion) -> list[Named]:
        """See ``Writer``."""
        return [
            self._event("created", response=self._response("in_progress")),
            self._event("in_progress", response=self._response("in_progress")),
        ]

    def step(self, step: Step) -> list[Named]:
        """See ``Writer``."""
        block = step.block
        if step.happening == "begins":
            added = self._event("output_item.added", output_index=block.index, item=self._item(block, "in_progress"))
            return (
                [added] if block.kind == "call" else [added, self._of(block, "content_part.added", part=_part(block))]
            )
        if step.happening == "goes on":
            return [self._of(block, f"{_WORDS[block.kind]}.delta", delta=step.text, **_logprobs(block))]
        what = "arguments" if block.kind == "call" else "text"
        done = [self._of(block, f"{_WORDS[block.kind]}.done", **{what: block.text}, **_logprobs(block))]
        if block.kind == "call":
            done[0]["name"] = block.name
        else:
            done.append(self._of(block, "content_part.done", part=_part(block)))
        return [*done, self._event("output_item.done", output_index=block.index, item=self._item(block, "completed"))]

    def end(self, completion: Completion) -> list[Named]:
        """See ``Writer``."""
        response = self.whole(completion)
        return [self._event(response["status"], response=response)]

    def whole(self, completion: Completion) -> dict[str, Any]:
        """See ``Writer``."""
        cut = completion.finish_reason == "length"
        response = self._response("incomplete" if cut else "completed")
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
            response["output"][-1]["status"] = "incomplete"
        return response | {"usage": self._usage(completion)}

    def failed(self, error: ApiError) -> list[Named]:
        """See ``Writer``."""
        response = self._response("failed") | {"error": {"code": "server_error", "message": error.message}}
        return [self._event("failed", response=response)]

    def _response(self, status: str) -> dict[str, Any]:
        output = [self._item(block, "completed") for block in self.blocks.blocks] if status != "in_progress" else []
        rest = {"status": status, "error": None, "incomplete_details": None, "output": output, "usage": None}
        return {**self._head, **rest}

    def _usage(self, completion: Completion) -> dict[str, Any]:
        counted = usage([completion], 1, self.blocks.split.reasoning_tokens)
        cached = counted["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self.blocks.split.reasoning_tokens},
            "total_tokens": counted["total_tokens"],
        }

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        """A block as an item; while it is in progress, there is nothing in it yet."""
        begun = status == "in_progress"
        item: dict[str, Any] = {"id": self._item_id(block), "type": _TYPES[block.kind], "status": status}
        if block.kind == "call":
            return item | {"call_id": block.call, "name": block.name, "arguments": "" if begun else block.text}
        more: dict[str, Any] = (
            {"summary": [], "encrypted_content": None} if block.kind == "reasoning" else {"role": "assistant"}
        )
        return {**item, **more, "content": [] if begun else [_part(block)]}

    def _item_id(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}{self._id}_{block.index}"

    def _of(self, block: Block, kind: str, **data: Any) -> Named:
        """An event of an item, and where it has parts, of its only one."""
        place = {} if block.kind == "call" else {"content_index": 0}
        return self._event(kind, item_id=self._item_id(block), output_index=block.index, **place, **data)

    def _event(self, kind: str, **data: Any) -> Named:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1, **data}


_TYPES = {"reasoning": "reasoning", "text": "message", "call": "function_call"}
_WORDS = {"reasoning": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", **_EMPTY, "text": block.text}


def _logprobs(block: Block) -> dict[str, Any]:
    return {"logprobs": []} if block.kind == "text" else {}
