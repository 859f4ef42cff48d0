"""One request for text: made ready beside the event loop, run, and given up when its client leaves."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from ..completion import Completion, Delta
from ..model import Model
from ..sampling_params import SamplingParams
from .chat_request import ChatRequest
from .errors import ApiError
from .fields import Read
from .generation_fields import constraint
from .metrics import Meter
from .service import Service
from .tool_choice import ToolChoice, tool_constraint

__all__ = ["Asked", "Running", "check_count", "prepare", "prepare_chat", "usage"]

_SHORT = 8192  # bytes of a request's body: its text is tokens in a millisecond, which is what a thread may cost as well
_REST = 0.02  # seconds: at 64 sequences of a 1B model a task that slept so long has 15 tokens to take in, and not one
# Where neither the request nor the model's generation_config.json says: as OpenAI, and not as the library.
_DEFAULTS = {"temperature": 1.0, "max_tokens": None}


@dataclass(frozen=True)
class Asked:
    """What is to be generated: token ids of each prompt, how, choices of each, and the priority among requests."""

    model: Model
    prompts: Sequence[list[int]]
    params: SamplingParams
    n: int = 1
    priority: int = 0

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a text, and are not part of it."""
        return frozenset(self.params.stop_token_ids) | (frozenset() if self.params.ignore_eos else self.model.stop_ids)


async def prepare(service: Service, request: Request, read: Read, encode: Callable[[Model], list[list[int]]]) -> Asked:
    """A request's prompts and sampling parameters. A long prompt or a grammar is read in a thread: that must not hold
    up other requests. For most prompts another thread would take longer than what it has to do.

    encode: makes the prompts' ids. Raises ApiError for what is beyond the limits, and what ``encode`` and
    ``Model.params`` raise.
    """
    model, limits = service.loaded, service.limits
    n, best_of = read.own["n"], read.own["best_of"]
    if best_of not in (None, n):
        raise ApiError(400, f"best_of = {best_of} is not supported; it must be n = {n}", param="best_of")
    stop = read.sampling.get("stop", ())
    if n > limits.choices:
        raise ApiError(400, f"n = {n} is out of range; at most {limits.choices} are allowed", param="n")
    check_count("stop", len([stop] if isinstance(stop, str) else stop), limits.stops, "stop strings")

    def make() -> Asked:
        prompts = encode(model)
        params = _params(model, read)
        for ids in prompts:
            if limits.prompt_tokens is not None and len(ids) > limits.prompt_tokens:
                said = f"the prompt has {len(ids)} tokens; at most {limits.prompt_tokens} are allowed"
                raise ApiError(400, said, code="context_length_exceeded")
        return Asked(model, prompts, params, n, read.own["priority"])

    is_short = len(await request.body()) <= _SHORT and not _is_formed(read) and not read.own.get("tools")
    return make() if is_short else await asyncio.to_thread(make)


async def prepare_chat(
    service: Service,
    request: Request,
    read: Read,
    encode: Callable[[Model], ChatRequest],
    choice: ToolChoice,
    parallel: bool = True,
) -> tuple[Asked, ChatRequest]:
    """The same for a chat. encode: makes its prompt; choice: of its tools, of which ``parallel`` allows several calls.

    Raises ApiError 400 also for a choice that cannot be enforced.
    """
    found: list[ChatRequest] = []

    def make(model: Model) -> list[list[int]]:
        chat = encode(model)
        held = _held(model, chat, read, choice, parallel)
        read.sampling = {"show_special": model.tokenizer.special_in(chat.form.texts), **read.sampling, **held}
        found.append(chat)
        return [chat.ids]

    return await prepare(service, request, read, make), found[0]


def _held(model: Model, chat: ChatRequest, read: Read, choice: ToolChoice, parallel: bool) -> dict[str, str]:
    """What holds the answer to its tools. Where another form is asked for, that one counts, unless a call must come."""
    held = tool_constraint(model, chat, choice, parallel)
    formed = _is_formed(read)
    if choice.required and formed:
        raise ApiError(400, "tool_choice asks for a call; that excludes another form of the text", param="tool_choice")
    if choice.required and not held:
        raise ApiError(400, "tool_choice: calls in this model's form cannot be enforced", param="tool_choice")
    return {} if formed else held


def _is_formed(read: Read) -> bool:
    """Whether the request asks for text of a form: JSON, or by a grammar."""
    return bool(constraint(read.own)) or read.sampling.get("response_format", {}).get("type", "text") != "text"


def check_count(name: str, count: int, most: int, nouns: str) -> None:
    """Raises ApiError 400 where a field of the request has too many elements."""
    if count > most:
        raise ApiError(400, f"{name} has {count} {nouns}; at most {most} are allowed", param=name)


def _params(model: Model, read: Read) -> SamplingParams:
    defaults = {name: value for name, value in _DEFAULTS.items() if name not in model.defaults}
    options = {**defaults, **read.sampling, **constraint(read.own)}
    if (allowed := read.own["allowed_token_ids"]) is not None:
        size, known = model.config.vocab_size, set(allowed)
        if beyond := [t for t in allowed if t >= size]:
            said = f"allowed_token_ids: token id {beyond[0]} is out of range; the vocabulary has {size}"
            raise ApiError(400, said, param="allowed_token_ids")
        banned = {t: -math.inf for t in range(size) if t not in known}
        options["logit_bias"] = {**options.get("logit_bias", {}), **banned}
    return model.params(**options)


class Running:
    """The generation of one request, from the call to the last token. It must be closed, in whatever way it ends.

    Iterating gives the deltas that have come since the last look, joined in a list: a client that is slow to take what
    was sent does not hold up the engine. Raises what the generation raises, and ApiError 503 where no token comes in
    time.
    """

    def __init__(self, service: Service, request: Request, asked: Asked) -> None:
        self.service, self.request, self.asked = service, request, asked
        self.meter: Meter = request.state.meter
        self._closed = False
        prompt = asked.prompts[0] if len(asked.prompts) == 1 else asked.prompts  # errors number those of a list
        self._stream = asked.model.astream(prompt, asked.params, n=asked.n, priority=asked.priority)

    @property
    def ended(self) -> bool:
        """Whether every delta has been given."""
        return self._stream.ended

    @property
    def completions(self) -> list[Completion]:
        """What each sequence has so far: prompt by prompt, and of each its choices."""
        return self._stream.completions

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        async for deltas in self._deltas(0):
            yield deltas

    async def seldom(self) -> AsyncIterator[list[Delta]]:
        """The same for a client that sees the whole alone: with rests in between, so that many tokens are taken in at
        once. The end wakes the reader; a stop string may be found _REST seconds late."""
        async for deltas in self._deltas(_REST):
            yield deltas

    async def _deltas(self, rest: float) -> AsyncIterator[list[Delta]]:
        delta = await self._first()
        while delta is not None:
            deltas = [delta, *self._stream.ready()]
            if len(deltas) == 1:  # which is most of the time
                self.meter.tokens(1, delta.index)
            else:
                for index, count in Counter(d.index for d in deltas).items():
                    self.meter.tokens(count, index)
            yield deltas
            if rest:
                await self._stream.rest(rest)
            delta = await anext(self._stream, None)

    async def _first(self) -> Delta | None:
        patience = self.service.limits.waiting_seconds
        try:
            async with asyncio.timeout(patience - self.meter.seconds):
                return await anext(self._stream, None)
        except TimeoutError:
            said = f"no token came within {patience:g} seconds: too much is going on"
            raise ApiError(503, said, "server_error") from None

    def failed(self, error: Exception) -> ApiError:
        """Note an error that comes when the response has begun. What the client is told of it."""
        return self.service.told(error, self.request.scope)

    async def close(self) -> None:
        """Stop what still runs: its pages of the cache are free then. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        await self._stream.aclose()
        self.meter.finished(self.completions, self._stream.timings)


def usage(completions: Sequence[Completion], n: int, reasoning_tokens: int = 0) -> dict[str, Any]:
    """OpenAI's count of tokens. n: choices of each prompt, whose tokens count once."""
    prompts = completions[::n]
    read = sum(len(c.prompt_tokens) for c in prompts)
    generated = sum(len(c.tokens) for c in completions)
    return {
        "prompt_tokens": read,
        "completion_tokens": generated,
        "total_tokens": read + generated,
        "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in prompts)},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }
