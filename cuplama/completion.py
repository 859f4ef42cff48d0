"""What a generation gives: text as it comes or as a whole, why it ended, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn

from .engine.sequence import Token
from .errors import CopyError, ParameterError
from .prompts import PlainPrompt
from .sampling_params import SamplingParams

__all__ = ["Clock", "Completion", "Delta", "Stream", "Timings", "only"]

_SHOWN = 60  # characters of a text that a repr shows


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens of a call, all its sequences together.

    The prompt's time ends with the first token drawn, and decode is of the tokens after it: a rate that is not blurred
    by the prompt's length. In a batch that the cache cannot hold at once, the prompts read later count as prompts too.
    generated_tokens: all that were drawn, those included that came with the prompts. queue_seconds: the part of the
    prompt's time that passed before the first sequence was admitted.
    """

    prompt_tokens: int
    prompt_seconds: float
    decode_tokens: int
    decode_seconds: float
    generated_tokens: int = 0
    queue_seconds: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Clock:
    """Measures where the time of a call goes; the fields are those of ``Timings``. last: when the last step ended.

    In a batch that the cache cannot hold at once, the prompts that had to wait are read between tokens of the others,
    and tokens that are computed again, because their pages were taken, count as decode.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    generated_tokens: int = 0
    last: float = 0.0
    began: float = 0.0
    queue_seconds: float = 0.0

    def begin(self, prompt_tokens: int) -> None:
        """The run starts now, with prompts of that many tokens in all."""
        self.prompt_tokens = prompt_tokens
        self.began = self.last = time.perf_counter()

    def step(self, tokens: int, first: bool) -> None:
        """A step has ended that drew that many tokens. first: whether it read prompts, and so drew first tokens."""
        now = time.perf_counter()
        self.generated_tokens += tokens
        if first:
            self.prompt_seconds += now - self.last
        else:
            self.decode_tokens += tokens
            self.decode_seconds += now - self.last
        self.last = now

    def timings(self) -> Timings:
        """What has been measured so far."""
        return Timings(**{f.name: getattr(self, f.name) for f in fields(Timings)})


@dataclass(frozen=True, repr=False)
class Completion:
    """What was generated for one prompt, and all that it takes to generate it again. ``print`` shows its text.

    text: without the prompt, and without the stop token or stop string that ended it; tokens: ids, a stop token that
    ended the text included.
    finish_reason: "stop" (stop token or stop string), "length" (max_tokens, or the context is full), or None if the
    generation has not come to its end.
    logprobs: one Token per generated token if they were asked for.
    timings: of the whole call, which may have had several prompts.
    prompt: as it was given, text or token ids; prompt_tokens: its ids as the model read them.
    seed: the one that was used, also where none was given; params: every parameter, with that seed.
    model: the folder or hub id as it was given to ``load``; device: "numpy" or "cuda"; dtype: "float32", ...
    index: the place among all completions of the call: with n choices, prompt * n + choice.
    context: tokens that the sequence could have, which ends it where max_tokens is None.
    adapter: as it was given to ``load``, or None.
    cached_tokens: of the prompt, those whose keys and values were in the prefix cache.
    prompt_logprobs: where they were asked for, a Token for each of the prompt, and None for the first.

    ``cuplama.load(c.model, device=c.device, dtype=c.dtype, context=c.context, adapter=c.adapter)`` is a model whose
    ``generate(c.prompt, c.params)`` gives the same again.
    """

    text: str
    tokens: list[int]
    finish_reason: str | None
    logprobs: list[Token] | None
    timings: Timings
    prompt: PlainPrompt = ""
    prompt_tokens: list[int] = field(default_factory=list)
    seed: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)
    model: str = ""
    device: str = ""
    dtype: str = ""
    index: int = 0
    context: int = 0
    adapter: str | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[Token | None] | None = None

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        why = self.finish_reason or "not finished"
        return f"<Completion {_shortened(self.text)!r}: {_counted(len(self.tokens), 'token')}, {why}, seed {self.seed}>"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """What IPython and notebooks show instead of the repr: the text with its line breaks."""
        return {"text/plain": self.text}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON: lists, dicts, strings and finite numbers, none of them rounded.

        params is as ``SamplingParams.to_dict`` writes it, and ``SamplingParams.from_dict`` reads it.
        """
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "logprobs": None if self.logprobs is None else _scores(self.logprobs),
            "timings": asdict(self.timings),
            "prompt": self.prompt if isinstance(self.prompt, str) else list(self.prompt),
            "prompt_tokens": list(self.prompt_tokens),
            "seed": self.seed,
            "params": self.params.to_dict(),
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "index": self.index,
            "context": self.context,
            "adapter": self.adapter,
            "cached_tokens": self.cached_tokens,
            "prompt_logprobs": None if self.prompt_logprobs is None else _scores(self.prompt_logprobs),
        }


@dataclass(frozen=True)
class Delta:
    """What one token adds to a stream. text may be empty while a character or a stop string is incomplete.

    finish_reason is set on a sequence's last delta. index is that of its Completion: with n choices of each prompt,
    prompt * n + choice.
    """

    text: str
    token: Token
    finish_reason: str | None = None
    index: int = 0


class Stream:
    """An iterator over the deltas of a generation. close(), or leaving a ``with`` block, stops it.

    The generation begins with the first delta that is read; a stream that has ended or was closed yields nothing more.
    completions: makes a Completion of what each sequence has so far.
    """

    def __init__(self, deltas: Generator[Delta], clock: Clock, completions: Callable[[], list[Completion]]) -> None:
        self._deltas, self._clock, self._completions = deltas, clock, completions

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Delta:
        return next(self._deltas)

    def close(self) -> None:
        """Stop generating and give the cache pages back. Closing twice is fine."""
        self._deltas.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        done = self.completions
        ended = ", ended" if all(c.finish_reason is not None for c in done) else " so far"
        tokens = _counted(sum(len(c.tokens) for c in done), "token")
        return f"<Stream of {_counted(len(done), 'sequence')}: {tokens}{ended}>"

    def __reduce__(self) -> NoReturn:
        raise CopyError("a stream can be neither pickled nor copied; its completions can, once it was read")

    @property
    def completions(self) -> list[Completion]:
        """One Completion per sequence, in the order of ``Delta.index``: complete after the end.

        Before the end, and of a stream that was closed before it, they have what came so far and finish_reason None.
        Text that is held back, because a character or a stop string may still be completed, is not in them.
        """
        return self._completions()

    @property
    def completion(self) -> Completion:
        """The Completion of a stream of one sequence; see ``completions``. Raises ParameterError for several."""
        return only(self.completions)

    @property
    def timings(self) -> Timings:
        """Where the time went until now; right at any moment."""
        return self._clock.timings()


def only(completions: list[Completion]) -> Completion:
    """The Completion of a stream of one sequence. Raises ParameterError for several."""
    if len(completions) != 1:
        raise ParameterError(f"the stream has {_counted(len(completions), 'sequence')}: use its completions")
    return completions[0]


def _scores(tokens: Sequence[Token | None]) -> list[dict[str, Any] | None]:
    """Tokens with their log-probabilities as plain data."""
    return [
        None if t is None else {"id": t.id, "logprob": t.logprob, "top": [list(pair) for pair in t.top]} for t in tokens
    ]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
