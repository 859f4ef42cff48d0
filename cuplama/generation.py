"""One call of generate or stream: its prompts, the sequences that go through the engine, and what they gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .completion import Clock, Completion, Delta
from .engine.calls import Drawn
from .engine.sequence import SequenceState
from .output_text import OutputText
from .prompts import PlainPrompt

__all__ = ["Generation"]


@dataclass
class Generation:
    """The prompts of a call and the sequences made of them, the same number for each prompt, prompt by prompt.

    single: whether the caller gets one Completion, and not a list; model, device, dtype, context, adapter: as a
    Completion has them.
    """

    prompts: Sequence[PlainPrompt]
    outputs: Sequence[OutputText]
    single: bool
    model: str
    device: str
    dtype: str
    context: int
    adapter: str | None = None
    clock: Clock = field(default_factory=Clock)
    _first_open: int = 0  # no sequence before this one is open
    _output_of: dict[int, OutputText] = field(default_factory=dict, repr=False)

    def begin(self) -> list[SequenceState]:
        """The sequences; the clock runs from now on."""
        sequences = [output.sequence for output in self.outputs]
        self.clock.begin(sum(len(s.prompt) for s in sequences))
        self._output_of = {id(output.sequence): output for output in self.outputs}
        return sequences

    def push(self, drawn: Drawn) -> list[Delta]:
        """What the tokens of a step add, in their order; none for a sequence that a stop string has ended."""
        pairs = [(output, token) for s, token in drawn if (output := self._output_of[id(s)]).finish_reason is None]
        first = any(not output.tokens for output, _ in pairs)
        if not self.clock.generated_tokens and drawn:
            self.clock.queue_seconds = drawn[0][0].admitted - self.clock.began
        self.clock.step(len(pairs), first)
        return [output.push(token) for output, token in pairs]

    @property
    def ended(self) -> bool:
        """Whether every sequence has a finish_reason."""
        while self._first_open < len(self.outputs) and self.outputs[self._first_open].finish_reason is not None:
            self._first_open += 1  # what has ended stays so
        return self._first_open == len(self.outputs)

    def completions(self) -> list[Completion]:
        """What each sequence has so far; without a finish_reason if it has not ended."""
        choices = len(self.outputs) // max(1, len(self.prompts))
        return [self._completion(self.prompts[i // choices], output) for i, output in enumerate(self.outputs)]

    def _completion(self, prompt: PlainPrompt, output: OutputText) -> Completion:
        sequence = output.sequence
        return Completion(
            text=output.text,
            tokens=[token.id for token in output.tokens],
            finish_reason=output.finish_reason,
            logprobs=list(output.tokens) if sequence.params.logprobs is not None else None,
            timings=self.clock.timings(),
            prompt=prompt,
            prompt_tokens=list(sequence.prompt),
            seed=sequence.seed,
            params=sequence.params,
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            index=output.index,
            context=self.context,
            adapter=self.adapter,
            cached_tokens=sequence.found,
            prompt_logprobs=[None, *sequence.prompt_scores] if sequence.params.prompt_logprobs is not None else None,
        )
