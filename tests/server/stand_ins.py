"""Stand-ins for what a model does: streams that come as a test says, and scores of the prompt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cuplama.completion import Completion, Delta, Timings
from cuplama.engine.sequence import Token
from cuplama.sampling_params import SamplingParams

__all__ = ["ScriptedStream", "Step", "log_softmax", "scripted"]

Step = str | float | Exception  # a text that comes, seconds that pass, or an error that ends the stream


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of each row, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


class ScriptedStream:
    """A stream of one sequence that does what its steps say, from the moment when it is made.

    prompts, params: what was asked for; closed: whether aclose() was called.
    """

    def __init__(self, steps: Sequence[Step], prompts: Sequence[Any], params: SamplingParams) -> None:
        self._steps, self.params = list(steps), params
        self.prompts = [prompts] if prompts and isinstance(prompts[0], int) else prompts
        self._texts: list[str] = []
        self._end: str | None = None
        self._due = time.monotonic()
        self.closed = False

    def __aiter__(self) -> ScriptedStream:
        return self

    async def __anext__(self) -> Delta:
        while self._steps:
            step = self._steps.pop(0)
            if isinstance(step, Exception):
                raise step
            if isinstance(step, str):
                return self._said(step)
            self._due += step
            await asyncio.sleep(self._due - time.monotonic())
        raise StopAsyncIteration

    @property
    def ended(self) -> bool:
        """Whether every step has been taken."""
        return not self._steps

    async def rest(self, seconds: float) -> None:
        """Wait; the end comes no sooner for it."""
        await asyncio.sleep(0 if self.ended else seconds)

    def ready(self) -> list[Delta]:
        """The texts that have come by now."""
        found = []
        while self._steps and not isinstance(step := self._steps[0], Exception):
            if isinstance(step, float) and self._due + step > time.monotonic():
                break
            self._steps.pop(0)
            if isinstance(step, str):
                found.append(self._said(step))
            else:
                self._due += step
        return found

    def _said(self, text: str) -> Delta:
        self._texts.append(text)
        self._end = None if any(not isinstance(step, float) for step in self._steps) else "stop"
        return Delta(text, Token(len(self._texts)), self._end)

    async def aclose(self) -> None:
        self.closed = True

    @property
    def completions(self) -> list[Completion]:
        tokens = list(range(1, len(self._texts) + 1))
        text = "".join(self._texts)
        return [Completion(text, tokens, self._end, None, self.timings, prompt_tokens=list(self.prompts[0]))]

    @property
    def timings(self) -> Timings:
        return Timings(len(self.prompts[0]), 0.0, len(self._texts), 0.0)


def scripted(*steps: Step) -> tuple[Callable[..., ScriptedStream], list[ScriptedStream]]:
    """A stand-in for ``Model.astream``, and the streams that it has made."""
    made: list[ScriptedStream] = []

    def astream(prompts: Any, params: SamplingParams, **_: Any) -> ScriptedStream:
        made.append(ScriptedStream(steps, prompts, params))
        return made[-1]

    return astream, made
