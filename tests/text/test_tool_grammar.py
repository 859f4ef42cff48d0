"""Grammars of tool calls, held against llguidance itself: right calls are accepted, wrong ones are not."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from cuplama.engine.constraint import mask_words
from cuplama.errors import ParameterError
from cuplama.sampling_params import SamplingParams
from cuplama.structured import Grammars
from cuplama.text.answer import collect
from cuplama.text.answer_form import AnswerForm
from cuplama.text.tokenizer import Tokenizer
from cuplama.text.tool_calls.tools import read_tools
from cuplama.text.tool_grammar import tool_grammar
from tests.text.test_control_tokens import byte_level
from tests.text.test_splitter import WRITTEN, form_of, split

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'cuplama[serve]'")

END = 258  # <|im_end|>
PROPERTIES: dict[str, Any] = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "unit": {"type": "string", "enum": ["C", "F"]},
    "sizes": {"type": "array", "items": {"$ref": "#/$defs/size"}},
    "dry": {"type": "boolean"},
}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": ["city"], "additionalProperties": False}
TOOLS = read_tools(
    [
        {"function": {"name": "weather", "parameters": {**SCHEMA, "$defs": {"size": {"type": "number"}}}}},
        {"function": {"name": "now"}},
    ]
)
# Of these forms the tags are special tokens in the models' vocabularies.
SPECIAL = ["gemma", "lfm", "harmony", "mistral-args", "mistral", "tool-call-token", "pythonic", "llama-json"]


def tokenizer_of(form: AnswerForm, special: bool) -> Tokenizer:
    """Bytes, and the form's tags, as special tokens or not; <|im_end|> ends a text."""
    backend = byte_level()
    tags = {part for text in form.texts for part in text.replace(">", ">\0").replace("]", "]\0").split("\0")}
    if special:
        backend.add_special_tokens([AddedToken(tag) for tag in sorted(tags) if tag[:1] in ("<", "[") and tag[1:]])
    return Tokenizer(backend)


class Judge:
    """Whether a grammar accepts a text, token by token, and up to its end."""

    def __init__(self, name: str, tools: Any = TOOLS, **options: Any) -> None:
        self.form, self.tools = form_of(name), tools
        self.tokenizer = tokenizer_of(self.form, special=name in SPECIAL)
        grammar = tool_grammar(self.form, list(tools.values()), self.tokenizer.special_texts, **options)
        assert grammar is not None
        self.grammar = grammar
        self.grammars = Grammars(lambda: self.tokenizer, self.tokenizer.vocab_size, [END])

    def accepts(self, text: str) -> bool:
        constraint = self.grammars.constraint(SamplingParams(grammar=self.grammar), [END])
        assert constraint is not None
        row = np.zeros(mask_words(self.tokenizer.vocab_size), np.int32)
        for token in [*self.tokenizer.encode(text, bos=False), END]:
            constraint.fill_mask(row)
            assert constraint.error is None, constraint.error
            if constraint.finished:
                return token == END
            if not row[token // 32] >> token % 32 & 1:
                return False
            constraint.accept(token)
        return True


RIGHT = [
    [("weather", {"city": "Rome"})],
    [("weather", {"city": "R\"o'm\\e", "days": 2, "unit": "C", "sizes": [1, 2.5], "dry": True})],
    [("now", {})],
]
WRONG = [
    [("weather", {})],  # city is missing
    [("weather", {"city": "Rome", "days": "two"})],
    [("weather", {"city": "Rome", "unit": "K"})],
    [("weather", {"city": "Rome", "dry": 1})],
    [("weather", {"city": "Rome", "more": 1})],
    [("other", {"city": "Rome"})],
]


def written(name: str, calls: Any) -> str:
    """As the model's template writes it, without the end that is a stop token."""
    text = WRITTEN[name](calls).removesuffix("<|call|>").removeprefix("<|start|>assistant")
    bare = {"llama-json": "<|python_tag|>", "pythonic": "<|python_start|>"}
    return text.removeprefix(bare.get(name, "")).removesuffix("<|python_end|>" if name in bare else "")


@pytest.mark.parametrize("name", WRITTEN)
def test_required_calls(name: str) -> None:
    judge = Judge(name)
    for calls in RIGHT:
        text = written(name, calls)
        assert judge.accepts(text), text
        answer = collect(split(judge.form, [text], tools=TOOLS))
        assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == calls
    for calls in WRONG:
        text = written(name, calls)
        assert not judge.accepts(text), text
    assert not judge.accepts("It is warm.")
    assert not judge.accepts("")
    thought = judge.form.reasoning
    assert thought is not None
    assert judge.accepts(f"{thought.start}Hm. 1 < 2{thought.end}\n{thought.after}{written(name, RIGHT[0])}")
    assert not judge.accepts(f"{thought.start}Hm.{thought.end}\nIt is warm.")


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "harmony"])
def test_several_calls_only_where_they_may_come(name: str) -> None:
    text = written(name, [("now", {}), ("weather", {"city": "Rome"})])
    assert Judge(name).accepts(text)
    assert not Judge(name, parallel=False).accepts(text)
    assert Judge(name, parallel=False).accepts(written(name, [("now", {})]))


@pytest.mark.parametrize("name", WRITTEN)
def test_reasoning_that_the_prompt_began_comes_first(name: str) -> None:
    judge = Judge(name, reasoning=True)
    thought = judge.form.reasoning
    assert thought is not None
    assert judge.accepts(f"Hm.{thought.end}\n{thought.after}{written(name, [('now', {})])}")
    assert not judge.accepts(written(name, [("now", {})]))


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "harmony"])
def test_free_answers_hold_right_calls_alone(name: str) -> None:
    judge = Judge(name, required=False)
    right, wrong = written(name, RIGHT[0]), written(name, WRONG[0])
    for text in ("It is [warm], {x}.", "", right):
        assert judge.accepts(text), text
    assert not judge.accepts(wrong), wrong
    if name not in ("llama-json", "pythonic"):  # whose calls are the whole answer
        assert judge.accepts(f"I look. {right}")
        assert not judge.accepts(f"I look. {wrong}")


def test_what_has_no_grammar() -> None:
    form = form_of("harmony")
    assert tool_grammar(form, list(TOOLS.values()), {}, required=False) is None
    assert tool_grammar(form, [], {}) is None
    assert tool_grammar(AnswerForm(), list(TOOLS.values()), {}) is None


def test_strict_tools_are_taken_at_their_word() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "not": {"const": "x"}}}, "required": ["a"]}
    strict, loose = (read_tools([{"name": "f", "parameters": schema, "strict": value}]) for value in (True, False))
    call = written("hermes", [("f", {"a": "y"})])
    assert Judge("hermes", loose).accepts(call)
    with pytest.raises(ParameterError, match="not"):
        Judge("hermes", strict).accepts(call)


def test_gemmas_values_of_every_kind() -> None:
    properties = {"a": {}, "b": {"type": "object", "properties": {"c": {"type": "string"}}}, "d": {"type": "null"}}
    judge = Judge("gemma", read_tools([{"name": "f", "parameters": {"properties": properties}}]))
    values: list[dict[str, Any]] = [
        {},
        {"a": 1},
        {"a": [1, "x"]},
        {"a": {"x": True}},
        {"b": {}},
        {"b": {"c": "x"}, "d": None},
    ]
    for given in values:
        assert judge.accepts(written("gemma", [("f", given)])), given
    assert not judge.accepts(written("gemma", [("f", {"b": {"c": 1}})]))
