"""``POST /v1/completions``: texts that go on from prompts, as OpenAI's older endpoint, vLLM and lm-eval have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...arguments import in_range, need_type
from ...completion import Completion, Delta
from ...engine.sequence import Token
from ...model import Model
from ...prompts import prompt_of_batch
from ..answers import RESPONSE_SCHEMA, Choice, answer
from ..endpoint import Endpoint
from ..fields import Fields, Read, own, refused
from ..generating import check_count, prepare
from ..generation_fields import COMMON
from ..kinds import FLAG, Kind, either, integer, listed, string
from ..limits import read_object
from ..logprobs import LegacyLogprobs, Spelling, prompt_logprobs
from ..service import Service

__all__ = ["ENDPOINTS", "FIELDS"]

_CONTEXT = 32  # tokens of a prompt that may hold the beginning of a character which the text completes
_MAX_TOKENS = 16  # as OpenAI has it, where the request does not say


_ID = integer(0, 2**31 - 1)
_IDS = listed(_ID, "token ids")


def _read_prompt(value: Any) -> list[str] | list[list[int]]:
    """The prompts as a list. It is quick with whole numbers: there may be a million of them."""
    if isinstance(value, str):
        return [value]
    need_type(isinstance(value, list), value)
    in_range(len(value) > 0)
    if isinstance(value[0], str):
        for text in value:
            need_type(isinstance(text, str), text)
        return list(value)
    if not isinstance(value[0], list):
        return [_ids(value)]
    for ids in value:
        need_type(isinstance(ids, list), ids)
    return [_ids(ids) for ids in value]


def _ids(value: list[Any]) -> list[int]:
    found = [id if type(id) is int else _ID.read(id) for id in value]
    in_range(not found or (min(found) >= 0 and max(found) < 2**31))
    return found


_PROMPT = Kind(
    either(string(), listed(string(), "strings", 1), listed(_ID, "", 1), listed(_IDS, "", 1)).schema,
    _read_prompt,
    "a string, a list of strings, a list of token ids, or a list of such lists",
)
FIELDS = Fields(
    (
        own("prompt", _PROMPT, "Text, or token ids; or several of either.", required=True),
        *COMMON,
        own("logprobs", integer(0, 64), "Log-probabilities of each token, and of so many of the best."),
        own("echo", FLAG, "Return the prompt before the text, and with logprobs also its log-probabilities.", False),
        own("add_special_tokens", FLAG, "Put the tokenizer's BOS before a prompt that is text.", True),
        refused("suffix", "the model writes from left to right", ""),
    )
)


async def _completions(service: Service, request: Request) -> Response:
    read = FIELDS.read(await read_object(request, service.limits))
    service.check_name(read.own["model"])
    check_count("prompt", len(read.own["prompt"]), service.limits.prompts, "prompts")
    form = _Form(read)
    read.sampling.setdefault("max_tokens", _MAX_TOKENS)
    if (logprobs := read.own["logprobs"]) is not None:
        read.sampling["logprobs"] = logprobs
        if read.own["echo"]:
            read.sampling["prompt_logprobs"] = max(logprobs, read.sampling.get("prompt_logprobs", 0))
    asked = await prepare(service, request, read, lambda model: _encoded(model, read))
    form.spell(asked.model)
    return await answer(service, request, read, asked, form)


def _encoded(model: Model, read: Read) -> list[list[int]]:
    prompts = read.own["prompt"]
    found = []
    for number, prompt in enumerate(prompts):
        with prompt_of_batch(number if len(prompts) > 1 else None):
            plain = isinstance(prompt, str) and not read.own["add_special_tokens"]
            found.append(model.encode(model.tokenizer.encode(prompt, bos=False) if plain else prompt))
    return found


class _Form:
    """Choices of completions. With ``echo`` the prompt is a part of the first piece of a text."""

    id_prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"
    reasoning_tokens = 0

    def __init__(self, read: Read) -> None:
        self._own = read.own
        self._skip_special = not read.sampling.get("show_special", False)
        self._prompt_logprobs: int | None = read.sampling.get("prompt_logprobs")  # those that the client asks for
        self._plain = self._own["logprobs"] is None and not self._own["return_token_ids"]
        self._begun: set[int] = set()  # indices of texts
        self._logprobs: dict[int, LegacyLogprobs] = {}

    def spell(self, model: Model) -> None:
        """Take the model's tokenizer."""
        self._spelling = Spelling(model.tokenizer, self._own["return_tokens_as_token_ids"])

    def head(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """See ``Form``: all is in the choices."""
        return {}

    def watch(self, delta: Delta) -> None:
        """See ``Form``: a completion has all that is needed."""

    def choice(self, completion: Completion) -> Choice:
        """See ``Form``: the one piece that is the whole text."""
        tokens = completion.logprobs or [Token(id) for id in completion.tokens]
        return self._piece(completion.text, tokens, completion.finish_reason, completion)

    def pieces(self, deltas: Sequence[Delta], end: str | None, so_far: Completion) -> list[Choice | str]:
        """See ``Form``. Nothing where a piece would be empty: text is held back until a character is complete."""
        if end is None and self._plain and so_far.index in self._begun:
            text = "".join([d.text for d in deltas])
            return [text] if text else []
        piece = self._piece("".join(d.text for d in deltas), [d.token for d in deltas], end, so_far)
        return [piece] if piece["text"] or piece["logprobs"] or end is not None or self._own["return_token_ids"] else []

    def more(self, index: int, text: str) -> Choice:
        """See ``Form``."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def _piece(self, text: str, tokens: Sequence[Token], end: str | None, so_far: Completion) -> Choice:
        own, index = self._own, so_far.index
        more: dict[str, Any] = {"token_ids": [token.id for token in tokens]} if own["return_token_ids"] else {}
        if index not in self._begun:
            self._begun.add(index)
            more |= self._of_prompt(so_far)
            if own["echo"]:
                text, tokens = self._prompt_text(so_far) + text, [*self._prompt_tokens(so_far), *tokens]
        logprobs = None if own["logprobs"] is None else self._legacy(so_far).push(tokens)
        return {**self.more(index, text), "logprobs": logprobs, "finish_reason": end, **more}

    def _legacy(self, so_far: Completion) -> LegacyLogprobs:
        if so_far.index not in self._logprobs:
            before = () if self._own["echo"] else so_far.prompt_tokens[-_CONTEXT:]
            self._logprobs[so_far.index] = LegacyLogprobs(self._spelling, before, self._skip_special)
        return self._logprobs[so_far.index]

    def _of_prompt(self, so_far: Completion) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self._own["return_token_ids"]:
            more["prompt_token_ids"] = so_far.prompt_tokens
        if self._prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs(self._spelling, so_far.prompt_logprobs, self._prompt_logprobs)
        return more

    def _prompt_text(self, so_far: Completion) -> str:
        given = self._own["prompt"][so_far.index // self._own["n"]]
        if isinstance(given, str):
            return given
        return self._spelling.tokenizer.decode(so_far.prompt_tokens, skip_special=self._skip_special)

    def _prompt_tokens(self, so_far: Completion) -> list[Token]:
        """The prompt's tokens, with as many of the best as ``logprobs`` asks for. Nothing comes before the first."""
        most = self._own["logprobs"]
        if so_far.prompt_logprobs is None or most is None:
            return [Token(id) for id in so_far.prompt_tokens]
        pairs = zip(so_far.prompt_tokens, so_far.prompt_logprobs, strict=True)
        return [Token(id) if t is None else replace(t, top=t.top[:most]) for id, t in pairs]


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/completions",
        _completions,
        "Texts that go on from prompts.",
        request_schema=FIELDS.schema,
        response_schema=RESPONSE_SCHEMA,
        response_types=("application/json", "text/event-stream"),
    ),
)
