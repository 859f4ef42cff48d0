"""``POST /v1/completions``: texts that go on from prompts, as OpenAI's older endpoint, vLLM and lm-eval have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...arguments import in_range, need_type
from ...completion import Completion
from ...engine.sequence import Token
from ...model import Model
from ...prompts import prompt_of_batch
from ..answers import Choice, answer, tokens_of
from ..endpoint import Endpoint
from ..errors import ApiError
from ..fields import Fields, Read, own, refused
from ..generating import Asked, prepare
from ..generation_fields import COMMON
from ..kinds import FLAG, Kind, either, integer, listed, string
from ..limits import read_object
from ..logprobs import LegacyLogprobs, Spelling, prompt_logprobs
from ..service import Service

__all__ = ["ENDPOINTS", "FIELDS"]

_MAX_TOKENS = 16  # as OpenAI has it, where the request does not say


def _read_prompt(value: Any) -> list[str] | list[list[int]]:
    """The prompts as a list. Of token ids only the type is looked at: there may be a million of them."""
    if isinstance(value, str):
        return [value]
    need_type(isinstance(value, list), value)
    in_range(len(value) > 0)
    if type(value[0]) is int:
        return [_whole(value)]
    wanted = list if isinstance(value[0], list) else str
    for item in value:
        need_type(isinstance(item, wanted), item)
    return [_whole(item) for item in value] if wanted is list else value


def _whole(ids: list[Any]) -> list[int]:
    for id in ids:
        need_type(type(id) is int, id)
    return ids


_IDS = listed(integer(0, 2**31 - 1), "token ids", 1)
_PROMPT = Kind(
    either(string(), listed(string(), "strings", 1), _IDS, listed(_IDS, "lists of token ids", 1)).schema,
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
        own("best_of", integer(1), "Must be n: nothing is generated to be thrown away."),
        refused("suffix", "the model writes from left to right", ""),
    )
)


async def _completions(service: Service, request: Request) -> Response:
    read = FIELDS.read(await read_object(request, service.limits))
    service.check_name(read.own["model"])
    if read.own["best_of"] not in (None, read.own["n"]):
        said = f"best_of = {read.own['best_of']} is not supported; it must be n = {read.own['n']}"
        raise ApiError(400, said, param="best_of")
    form = _Form(read)
    read.sampling.setdefault("max_tokens", _MAX_TOKENS)
    if (logprobs := read.own["logprobs"]) is not None:
        read.sampling["logprobs"] = logprobs
        if read.own["echo"]:
            read.sampling["prompt_logprobs"] = max(logprobs, read.sampling.get("prompt_logprobs", 0))
    asked = await prepare(service, read, lambda model: _encoded(model, read))
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
        self._prompt_logprobs: int | None = read.sampling.get("prompt_logprobs")  # those that the client asks for
        self._skip_special = read.sampling.get("skip_special_tokens", True)
        self._logprobs: dict[int, LegacyLogprobs] = {}  # of the texts that have begun

    def spell(self, model: Model) -> None:
        """Take the model's tokenizer."""
        self._spelling = Spelling(model.tokenizer, self._own["return_tokens_as_token_ids"])

    def head(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """See ``Form``: all is in the choices."""
        return {}

    def choice(self, completion: Completion) -> Choice:
        """See ``Form``: the one piece that is the whole text."""
        [piece] = self.pieces(completion.text, tokens_of(completion), completion.finish_reason, completion)
        return piece

    def pieces(self, text: str, tokens: Sequence[Token], end: str | None, so_far: Completion) -> list[Choice]:
        """See ``Form``. Nothing where a piece would be empty: the text is held back until a character is complete."""
        own, index = self._own, so_far.index
        more: dict[str, Any] = {"token_ids": [token.id for token in tokens]} if own["return_token_ids"] else {}
        if index not in self._logprobs:
            context = () if own["echo"] else so_far.prompt_tokens
            self._logprobs[index] = LegacyLogprobs(self._spelling, context, self._skip_special)
            more |= self._of_prompt(so_far)
            if own["echo"]:
                text, tokens = self._prompt_text(so_far) + text, [*self._prompt_tokens(so_far), *tokens]
        logprobs = None if own["logprobs"] is None else self._logprobs[index].push(tokens)
        if not text and end is None and not more and logprobs is None:
            return []
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": end, **more}]

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
        response_schema={"type": "object"},
        response_types=("application/json", "text/event-stream"),
    ),
)
