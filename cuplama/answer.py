"""What a model has answered in a chat: reasoning, content and tool calls, from its completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .completion import Completion
from .engine.sequence import SequenceState, Token
from .model import Model
from .output_text import OutputText
from .text.answer import Answer, split_answer

__all__ = ["read_answer"]

_END = 32  # tokens at the end of a prompt among which a start tag of reasoning is looked for


def read_answer(model: Model, completion: Completion, tools: Sequence[Mapping[str, Any]] | None = None) -> Answer:
    """The answer of a completion that ``model.chat`` gave, split as the model writes it; ``tools`` as given there.

    The completion's own text lacks the special tokens that many models write around reasoning and calls; they are read
    from its tokens. Without tools a call is content. Raises ParameterError for tools that are none.
    """
    tokenizer = model.tokenizer
    form = tokenizer.answer_form
    shown = tokenizer.special_in(form.texts)
    params = replace(completion.params, show_special=shown)
    stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else model.stop_ids)
    sequence = SequenceState(completion.prompt_tokens, params, stops)
    sequence.tokens += completion.tokens
    sequence.finish_reason = completion.finish_reason or "length"  # nothing more comes
    output = OutputText(0, sequence, tokenizer)
    for id in completion.tokens:
        output.push(Token(id))
    end = tokenizer.decode(completion.prompt_tokens[-_END:], skip_special=False)
    return split_answer(output.text, form, tools, reasoning=form.is_reasoning(end))
