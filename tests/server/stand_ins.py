"""Stand-ins for what a model does: streams that come as a test says, and scores of the prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cuplama.async_stream import AsyncStream
from cuplama.completion import Completion, Delta, Timings
from cuplama.engine.sequence import Token
from cuplama.model import Model
from cuplama.sampling_params import SamplingParams

__all__ = ["ScriptedStream", "Step", "log_softmax", "prompt_scores", "scoring", "scripted"]

Step = str | float | Exception  # a text that comes, seconds that pass, or an error that ends the stream


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of each row, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


class ScriptedStream:
    """A stream of one sequence that does what its steps say. closed: whether aclose() was called."""

    def __init__(self, steps: Sequence[Step], prompts: Sequence[list[int]], params: SamplingParams) -> None:
        self._steps, self._prompts, self._params = list(steps), prompts, params
        self._texts: list[str] = []
        self._end: str | None = None
        self.closed = False

    def __aiter__(self) -> ScriptedStream:
        return self

    async def __anext__(self) -> Delta:
        while self._steps:
            step = self._steps.pop(0)
            if isinstance(step, Exception):
                raise step
            if isinstance(step, str):
                self._texts.append(step)
                self._end = None if any(not isinstance(s, float) for s in self._steps) else "stop"
                return Delta(step, Token(len(self._texts)), self._end)
            await asyncio.sleep(step)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed = True

    @property
    def completions(self) -> list[Completion]:
        tokens = list(range(1, len(self._texts) + 1))
        text = "".join(self._texts)
        return [Completion(text, tokens, self._end, None, self.timings, prompt_tokens=list(self._prompts[0]))]

    @property
    def timings(self) -> Timings:
        return Timings(len(self._prompts[0]), 0.0, len(self._texts), 0.0)


def scripted(*steps: Step) -> tuple[Callable[..., ScriptedStream], list[ScriptedStream]]:
    """A stand-in for ``Model.astream``, and the streams that it has made."""
    made: list[ScriptedStream] = []

    def astream(prompts: Any, params: SamplingParams, **_: Any) -> ScriptedStream:
        made.append(ScriptedStream(steps, prompts, params))
        return made[-1]

    return astream, made


class ScoringStream(AsyncStream):
    """A stream whose completions also have the log-probabilities of the prompt, by NumPy from ``Model.logits``."""

    model: Model

    @property
    def completions(self) -> list[Completion]:
        return [self._scored(c) for c in super().completions]

    def _scored(self, c: Completion) -> Completion:
        most = c.params.prompt_logprobs
        return c if most is None else replace(c, prompt_logprobs=prompt_scores(self.model, c.prompt_tokens, most))


def prompt_scores(model: Model, ids: Sequence[int], most: int) -> list[Token | None]:
    """For each token of a prompt its log-probability and the best ones; none for the first."""
    scores = log_softmax(model.logits(ids))
    found: list[Token | None] = [None]
    for id, row in zip(ids[1:], scores, strict=False):
        best = np.argsort(-row, kind="stable")[:most]
        found.append(Token(id, float(row[id]), tuple((int(b), float(row[b])) for b in best)))
    return found


def scoring(model: Model) -> Callable[..., ScoringStream]:
    """A stand-in for ``astream`` of the model."""
    own = model.astream

    def astream(prompts: Any, params: SamplingParams, **options: Any) -> ScoringStream:
        stream = own(prompts, params, **options)
        stream.__class__ = ScoringStream
        assert isinstance(stream, ScoringStream)
        stream.model = model
        return stream

    return astream
