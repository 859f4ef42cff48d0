"""What a generation gives: text as it comes or as a whole, why it ended, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from .engine.sequence import Token

__all__ = ["Clock", "Completion", "Delta", "Stream", "Timings"]


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens. The prompt's time ends with the first token drawn; decode is of the tokens after it.

    In a batch that the cache cannot hold at once, the prompts read later count as prompts too.
    """

    prompt_tokens: int
    prompt_seconds: float
    decode_tokens: int
    decode_seconds: float

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
    """Measures where the time of a run goes; the fields are those of ``Timings``. last: when the last step ended.

    In a batch that the cache cannot hold at once, the prompts that had to wait are read between tokens of the others.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    last: float = 0.0

    def begin(self, prompt_tokens: int) -> None:
        """The run starts now, with prompts of that many tokens in all."""
        self.prompt_tokens, self.last = prompt_tokens, time.perf_counter()

    def step(self, tokens: int, first: bool) -> None:
        """A step has ended that drew that many tokens. first: whether it read prompts, and so drew first tokens."""
        now = time.perf_counter()
        if first:
            self.prompt_seconds += now - self.last
        else:
            self.decode_tokens += tokens
            self.decode_seconds += now - self.last
        self.last = now

    def timings(self) -> Timings:
        """What has been measured so far."""
        return Timings(self.prompt_tokens, self.prompt_seconds, self.decode_tokens, self.decode_seconds)


@dataclass(frozen=True)
class Completion:
    """What was generated. tokens: ids, a stop token that ended the text included; text: without it and the prompt.

    finish_reason: "stop" (stop token or stop string) or "length" (max_tokens, or the context is full).
    logprobs: one engine Token per generated token if they were asked for. In a batch, the timings are the batch's.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[Token] | None
    timings: Timings


@dataclass(frozen=True)
class Delta:
    """What one token adds to a stream. text may be empty while a character or a stop string is incomplete.

    finish_reason is set on a sequence's last delta. index is the prompt's place in a batch.
    """

    text: str
    token: Token
    finish_reason: str | None = None
    index: int = 0


class Stream:
    """An iterator over the deltas of a generation. close(), or leaving a ``with`` block, stops it."""

    def __init__(self, deltas: Generator[Delta], clock: Clock) -> None:
        self._deltas, self._clock = deltas, clock

    def __iter__(self) -> Iterator[Delta]:
        return self._deltas

    def __next__(self) -> Delta:
        return next(self._deltas)

    def close(self) -> None:
        """Stop generating and give the cache pages back."""
        self._deltas.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def timings(self) -> Timings:
        """Where the time went until now; right at any moment."""
        return self._clock.timings()
