"""How models set their reasoning apart from the answer, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["REASONING_FORMATS", "ReasoningFormat"]


@dataclass(frozen=True)
class ReasoningFormat:
    """start, end: the tags around reasoning. anywhere: it may come more than once, and after content.

    markers: texts of which one, in the chat template or in a token, tells the form. skipped: further tags, which
    nobody is shown. after: what a model writes between the end tag and a tool call.
    """

    name: str
    markers: tuple[str, ...]
    start: str
    end: str
    anywhere: bool = False
    skipped: tuple[str, ...] = ()
    after: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts that must be seen to split reasoning off."""
        return (self.start, self.end, *self.skipped)

    def is_open(self, prompt: str) -> bool:
        """Whether a prompt ends inside the reasoning, so that the answer begins there and has no start tag."""
        return prompt.rstrip().endswith(self.start)


# In this order: a row stands before those whose markers it has as well.
REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    form.name: form
    for form in (
        ReasoningFormat("seed", ("<seed:think>",), "<seed:think>", "</seed:think>"),
        ReasoningFormat("gemma", ("<|channel>",), "<|channel>thought", "<channel|>", anywhere=True),
        ReasoningFormat(
            "harmony",
            ("<|channel|>",),
            "<|channel|>analysis<|message|>",
            "<|end|>",
            anywhere=True,
            skipped=(
                "<|start|>assistant",
                "<|channel|>final<|message|>",
                "<|channel|>commentary<|message|>",
                "<|end|>",
                "<|return|>",
            ),
            after="<|start|>assistant",
        ),
        ReasoningFormat("mistral", ("[THINK]",), "[THINK]", "[/THINK]"),
        ReasoningFormat("think", ("</think>",), "<think>", "</think>"),
    )
}
