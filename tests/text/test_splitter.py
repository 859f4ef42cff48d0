"""An answer is split the same however it is cut, nothing of it is lost, and a call as its model writes it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuplama.text.answer import Answer, collect
from cuplama.text.answer_form import AnswerForm, find_form
from cuplama.text.reasoning import REASONING_FORMATS
from cuplama.text.splitter import ArgumentsDelta, CallBegins, CallEnds, ContentDelta, Event, Skipped, Splitter
from cuplama.text.tool_calls.formats import TOOL_FORMATS
from cuplama.text.tool_calls.tools import Tool, read_tools

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "sizes": {"type": "array", "items": {"type": "number"}},
    "more": {"type": ["object", "null"]},
}
TOOLS = read_tools([{"type": "function", "function": {"name": "weather", "parameters": {"properties": PROPERTIES}}}])
REASONING = {"gemma": "gemma", "harmony": "harmony", "seed": "seed", "mistral": "mistral", "mistral-args": "mistral"}
Call = tuple[str, dict[str, Any]]


def form_of(tools: str) -> AnswerForm:
    return find_form(None, (), tools=tools, reasoning=REASONING.get(tools, "think"))


def split(form: AnswerForm, pieces: Sequence[str], *, reasoning: bool = False, tools: Any = TOOLS) -> list[Event]:
    splitter = Splitter(form, tools, reasoning=reasoning)
    return [*(event for piece in pieces for event in splitter.push(piece)), *splitter.flush()]


def cut(text: str, places: Sequence[int]) -> list[str]:
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(ends)]


def parts(answer: Answer) -> tuple[str, str, list[tuple[str, str]]]:
    """All of an answer but the ids, which are drawn."""
    return answer.content, answer.reasoning, [(call.name, call.arguments) for call in answer.tool_calls]


def objects(calls: Sequence[Call], key: str = "arguments") -> list[str]:
    return [json.dumps({"name": name, key: arguments}) for name, arguments in calls]


def python(calls: Sequence[Call]) -> list[str]:
    return [f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})" for name, arguments in calls]


def gemma(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{gemma(v)}" for k, v in value.items()) + "}"
    return f"[{','.join(map(gemma, value))}]" if isinstance(value, list) else json.dumps(value)


def xml(calls: Sequence[Call]) -> list[str]:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    return [
        f"<function={name}>\n"
        + "".join(f"<parameter={k}>\n{text(v)}\n</parameter>\n" for k, v in arguments.items())
        + "</function>"
        for name, arguments in calls
    ]


# How the template of a model with this form writes calls into a conversation.
WRITTEN: dict[str, Callable[[Sequence[Call]], str]] = {
    "seed": lambda calls: "".join(f"\n<seed:tool_call>\n{call}\n</seed:tool_call>" for call in xml(calls)),
    "qwen-xml": lambda calls: "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in xml(calls)),
    "hermes": lambda calls: "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in objects(calls)),
    "gemma": lambda calls: "".join(f"<|tool_call>call:{name}{gemma(given)}<tool_call|>" for name, given in calls),
    "lfm": lambda calls: f"<|tool_call_start|>[{', '.join(python(calls))}]<|tool_call_end|>",
    "olmo": lambda calls: "<function_calls>\n" + "\n".join(python(calls)) + "\n</function_calls>",
    "harmony": lambda calls: "".join(
        f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{json.dumps(given)}"
        "<|call|>"
        for name, given in calls
    ),
    "mistral-args": lambda calls: "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(given)}" for name, given in calls),
    "mistral": lambda calls: f"[TOOL_CALLS] [{', '.join(objects(calls))}]",
    "tool-call-token": lambda calls: f"<|tool_call|>[{', '.join(objects(calls))}]",
    "functools": lambda calls: f"functools[{', '.join(objects(calls))}]",
    "pythonic": lambda calls: f"<|python_start|>[{', '.join(python(calls))}]<|python_end|>",
    "llama-json": lambda calls: "<|python_tag|>" + "; ".join(objects(calls, "parameters")),
}
LETTERS = st.text(st.sampled_from("ab \n<>[]{}'\"\\,:=|é🦙"), max_size=8)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": LETTERS.filter(lambda text: text == text.strip("\n") and '<|"|>' not in text),
        "days": st.integers(-9, 99),
        "sizes": st.lists(st.integers(0, 9) | st.floats(-9, 9), max_size=3),
        "more": st.none() | st.dictionaries(st.sampled_from(["x", "y"]), st.booleans() | st.integers(0, 9)),
    },
)
CALLS = st.lists(st.tuples(st.just("weather"), ARGUMENTS), min_size=1, max_size=3)
CUTS = st.lists(st.integers(0, 10**6), max_size=6)


def test_every_form_is_written_here() -> None:
    assert set(WRITTEN) == set(TOOL_FORMATS)


@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=25, deadline=None)
@given(
    calls=CALLS, cuts=CUTS, content=st.sampled_from(["", "Let me look."]), thought=st.sampled_from(["", "Hm.\n\nOh"])
)
def test_calls_are_read_as_they_were_written(
    name: str, calls: list[Call], cuts: list[int], content: str, thought: str
) -> None:
    form = form_of(name)
    assert form.reasoning is not None
    thinking = f"{form.reasoning.start}\n{thought}\n{form.reasoning.end}\n\n" if thought else ""
    text = thinking + content + WRITTEN[name](calls)
    answer = collect(split(form, cut(text, cuts)))
    assert (answer.content, answer.reasoning) == (content, thought)
    assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == calls
    assert len({call.id for call in answer.tool_calls}) == len(calls)


def pieces_of(name: str) -> st.SearchStrategy[str]:
    form = form_of(name)
    call = WRITTEN[name]([("weather", {"city": "Rome", "days": 2})])
    bits = [*form.texts, call, call.strip()[:-3], "weather", '{"name": "weather", ', "{", "}", "[", "]", "x", " ", "\n"]
    bits += [" to=functions.", '"arguments": {"a": "<tool_call>"}', "<function=", "</function>", "weather(a=1)", '"']
    return st.lists(st.sampled_from(bits) | LETTERS, max_size=8).map("".join)


@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nothing_is_lost_and_cuts_make_no_difference(name: str, data: st.DataObject) -> None:
    form = form_of(name)
    text, cuts, reasoning = data.draw(pieces_of(name)), data.draw(CUTS), data.draw(st.booleans())
    whole, pieces = split(form, [text], reasoning=reasoning), split(form, cut(text, cuts), reasoning=reasoning)
    letters = split(form, list(text), reasoning=reasoning)
    for events in (whole, pieces, letters):
        assert "".join(event.source for event in events) == text
        assert parts(collect(events)) == parts(collect(whole))
        shown = [event for event in events if isinstance(event, ContentDelta)]
        assert all(event.text.removeprefix("\n") == event.source.removeprefix("\n") for event in shown)
        tags = [event.source.strip() for event in events if isinstance(event, Skipped)]
        assert all(tag in (*form.texts, "]", "") for tag in tags)
    for source, call in calls_in(whole):
        answer = collect(split(form, [source]))
        assert not answer.content.strip()
        assert call in parts(answer)[2]


def calls_in(events: Sequence[Event]) -> list[tuple[str, tuple[str, str]]]:
    """For each call what the model wrote for it, and its name and arguments. A list of calls has them all in one."""
    found: list[list[Any]] = []
    for event in events:
        if isinstance(event, CallBegins):
            same = found and not isinstance(event, Skipped) and event.source.lstrip().startswith((",", ";", "{"))
            found.append(["" if not same else found[-1][0], event.name, ""])
        elif isinstance(event, ArgumentsDelta):
            found[-1][2] += event.text
        if isinstance(event, (CallBegins, ArgumentsDelta, CallEnds)):
            found[-1][0] += event.source
    return [(source, (name, arguments)) for source, name, arguments in found if source]


@pytest.mark.parametrize("name", WRITTEN)
def test_without_tools_a_call_is_content(name: str) -> None:
    text = WRITTEN[name]([("weather", {"days": 1})])
    form = AnswerForm(None, TOOL_FORMATS[name])
    assert parts(collect(split(form, list(text), tools={}))) == (text, "", [])


@pytest.mark.parametrize("name", REASONING_FORMATS)
def test_reasoning_that_the_prompt_began(name: str) -> None:
    form = find_form(None, (), reasoning=name)
    assert form.reasoning is not None
    assert form.is_reasoning(f"user: x\nassistant\n{form.reasoning.start}\n")
    assert not form.is_reasoning(f"user: x\nassistant\n{form.reasoning.start}\n{form.reasoning.end}\n")
    text = f"\nSo 1 < 2.\n{form.reasoning.end}\n\n Yes."
    assert parts(collect(split(form, list(text), reasoning=True))) == ("Yes.", "So 1 < 2.", [])
    assert parts(collect(split(form, ["So"], reasoning=True))) == ("", "So", [])


HEAD = '<tool_call>{"name": "weather", "arguments": '
THOUGHT = "<|channel|>analysis<|message|>a<|end|><|start|>assistant"
TO_WEATHER = "<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{}"
TWELVE = xml([("weather", {"city": "12", "days": 12})])[0]
CASES: list[tuple[str, str, tuple[str, str, list[tuple[str, str]]]]] = [
    # What is no call is content, with its tags.
    ("hermes", "<tool_call>oops</tool_call> x", ("<tool_call>oops</tool_call> x", "", [])),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', ('<tool_call>{"name": 5}</tool_call>', "", [])),
    ("hermes", "a <tool_call> <tool_call>", ("a <tool_call> <tool_call>", "", [])),
    ("llama-json", '{"name": "other", "parameters": {}}', ('{"name": "other", "parameters": {}}', "", [])),
    ("llama-json", 'x {"name": "weather", "parameters": {}}', ('x {"name": "weather", "parameters": {}}', "", [])),
    ("pythonic", "[1, 2]", ("[1, 2]", "", [])),
    ("pythonic", "[other(a=1)]", ("[other(a=1)]", "", [])),
    ("functools", "import functools, re", ("import functools, re", "", [])),
    ("gemma", "<|tool_call>call:weather<tool_call|>", ("<|tool_call>call:weather<tool_call|>", "", [])),
    # Reasoning comes first; later its tags are text.
    ("hermes", "Use <think> tags.</think>", ("Use <think> tags.</think>", "", [])),
    ("hermes", "<think>a</think><think>b", ("", "a\nb", [])),
    # Errors that models make.
    ("hermes", HEAD + '{"days": 1}</tool_call>', ("", "", [("weather", '{"days": 1}')])),
    ("hermes", '<tool_call>{"arguments": {"days": 1}, "name": "weather"}', ("", "", [("weather", '{"days": 1}')])),
    ("hermes", HEAD + '"{}"}</tool_call>', ("", "", [("weather", "{}")])),
    ("hermes", '<tool_call>{"name": "weather"}</tool_call>', ("", "", [("weather", "{}")])),
    ("qwen-xml", "So\n<function=weather>\n</function>\n</tool_call>", ("So", "", [("weather", "{}")])),
    # A text that ends inside the arguments leaves them incomplete.
    ("hermes", HEAD + '{"city": "Ro', ("", "", [("weather", '{"city": "Ro')])),
    ("hermes", HEAD + '{"city": "a\nb"}}', ("", "", [("weather", '{"city": "a\\nb"}')])),
    # Tags inside strings are text.
    ("hermes", HEAD + '{"city": "</tool_call>"}}</tool_call>', ("", "", [("weather", '{"city": "</tool_call>"}')])),
    # Typed through the schema.
    ("qwen-xml", f"<tool_call>{TWELVE}</tool_call>", ("", "", [("weather", '{"city": "12", "days": 12}')])),
    # Calls of tools that nobody offered, where tags say that it is a call.
    ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', ("", "", [("other", "{}")])),
    # Without tags.
    ("llama-json", '\n{"name": "weather", "parameters": {}}', ("", "", [("weather", "{}")])),
    ("pythonic", '[weather(city="a]"), weather()]', ("", "", [("weather", '{"city": "a]"}'), ("weather", "{}")])),
    ("mistral-args", "[TOOL_CALLS]weather[CALL_ID]x1[ARGS]{}", ("", "", [("weather", "{}")])),
    ("harmony", THOUGHT + "<|channel|>commentary<|message|>b<|end|>" + TO_WEATHER, ("b", "a", [("weather", "{}")])),
    ("harmony", "<|channel|>final<|message|>Yes.<|return|>", ("Yes.", "", [])),
    # Content around calls does not run together.
    ("hermes", 'a\n<tool_call>{"name": "weather"}</tool_call>\nb', ("a\nb", "", [("weather", "{}")])),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "wanted"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_answers_that_matter(name: str, text: str, wanted: Any) -> None:
    assert parts(collect(split(form_of(name), [text]))) == wanted
    assert parts(collect(split(form_of(name), list(text)))) == wanted


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    splitter = Splitter(form_of("hermes"), TOOLS)
    given = [collect(splitter.push(piece)).content for piece in ["Hi", " <", "b> x", "\n<tool", "x"]]
    assert given == ["Hi", "", " <b> x", "", "\n<toolx"]
    given = []
    for piece in ["<tool_call>", '{"name": "weather", "arguments": {"city": ', '"R', 'ome"}', "}"]:
        given += [type(event).__name__ for event in splitter.push(piece)]
    assert given == ["CallBegins", "ArgumentsDelta", "ArgumentsDelta", "ArgumentsDelta", "CallEnds"]
    plain = Splitter(AnswerForm(), TOOLS)
    assert collect(plain.push("a \n")).content == "a \n"


def test_ids_of_calls() -> None:
    for name, length in (("mistral", 9), ("mistral-args", 9), ("hermes", 29)):
        answer = collect(split(form_of(name), [WRITTEN[name]([("weather", {})])]))
        assert len(answer.tool_calls[0].id) == length
        assert answer.tool_calls[0].id.replace("_", "").isalnum()


@pytest.mark.parametrize("unit", ["<tool_call>", "<tool_call>\n<function=", '<tool_call>{"a": ['])
@pytest.mark.parametrize("name", ["hermes", "qwen-xml"])
def test_a_text_full_of_broken_calls_is_content(name: str, unit: str) -> None:
    text = unit * 4000  # takes minutes where every one is looked at up to the end of the text
    assert collect(split(form_of(name), [text])).content == text


def test_tools_without_schemas() -> None:
    text = "<tool_call><function=f><parameter=a>1</parameter></function></tool_call>"
    answer = collect(split(form_of("qwen-xml"), [text], tools={"f": Tool("f")}))
    assert answer.tool_calls[0].arguments == '{"a": "1"}'
