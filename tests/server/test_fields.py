"""The tables of fields: what is read, what is refused and how, and that schema, reader and engine agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuplama.arguments import WrongTypeError
from cuplama.errors import ParameterError
from cuplama.sampling_params import read_parameter
from cuplama.server.endpoints import chat, completions
from cuplama.server.errors import ApiError
from cuplama.server.fields import Field, Fields, own, refused, sampling
from cuplama.server.generation_fields import COMMON, constraint
from cuplama.server.kinds import FLAG, either, integer, listed, number, record, string, table, word

ALL = [*COMMON, *chat.FIELDS.fields, *completions.FIELDS.fields]
BODIES: Mapping[str, tuple[Fields, dict[str, Any]]] = {
    "chat": (chat.FIELDS, {"messages": [{"role": "user", "content": "Hi"}]}),
    "completions": (completions.FIELDS, {"prompt": "Hi"}),
}
KEYS = ("0", "7", "42", "a", "name", "json")
SCALARS = st.none() | st.booleans() | st.integers(-3, 70) | st.integers() | st.floats(-5, 5) | st.text(max_size=3)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=2),
    max_leaves=4,
)
_TYPES: Mapping[str, Any] = {
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and v == int(v),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "string": lambda v: isinstance(v, str),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
    "null": lambda v: v is None,
}


def fits(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether a value is of a JSON schema, as far as the tables use that language. An unknown word raises."""
    rules: Mapping[str, Callable[[Any], bool]] = {
        "description": lambda _: True,
        "default": lambda _: True,
        "type": lambda s: any(_TYPES[t](value) for t in ([s] if isinstance(s, str) else s)),
        "enum": lambda s: any(type(value) is type(e) and value == e for e in s),
        "anyOf": lambda s: any(fits(one, value) for one in s),
        "minimum": lambda s: not _TYPES["number"](value) or value >= s,
        "maximum": lambda s: not _TYPES["number"](value) or value <= s,
        "minLength": lambda s: not isinstance(value, str) or len(value) >= s,
        "maxLength": lambda s: not isinstance(value, str) or len(value) <= s,
        "minItems": lambda s: not isinstance(value, list) or len(value) >= s,
        "maxItems": lambda s: not isinstance(value, list) or len(value) <= s,
        "items": lambda s: not isinstance(value, list) or all(fits(s, item) for item in value),
        "required": lambda s: not isinstance(value, dict) or all(name in value for name in s),
        "properties": lambda s: not isinstance(value, dict) or all(fits(s[k], v) for k, v in value.items() if k in s),
        "additionalProperties": lambda s: not isinstance(value, dict) or all(fits(s, v) for v in value.values()),
        "propertyNames": lambda s: not isinstance(value, dict) or all(name.isdigit() for name in value),
    }
    return all(rules[word](said) for word, said in schema.items())


def reads(field: Field, value: Any) -> bool:
    try:
        field.read(value)
    except ApiError:
        return False
    return True


@given(value=JSON)
@settings(max_examples=120)
def test_a_field_reads_what_its_schema_says(value: Any) -> None:
    for field in ALL:
        if field.name == "messages":
            continue  # they are looked into where the template's form is known
        taken = reads(field, value) or (value is None and not field.required)
        assert fits(field.schema, value) == taken, (field.name, field.schema, value)


@given(value=JSON)
@settings(max_examples=120)
def test_what_a_field_reads_is_a_sampling_parameter(value: Any) -> None:
    for field in ALL:
        if field.goes == "sampling" and field.to != "response_format" and reads(field, value):
            read_parameter(field.to, field.read(value))


@pytest.mark.parametrize("fields", [chat.FIELDS, completions.FIELDS], ids=["chat", "completions"])
def test_no_name_occurs_twice(fields: Fields) -> None:
    names = [f.name for f in fields.fields]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("endpoint", BODIES)
def test_null_counts_as_absent(endpoint: str) -> None:
    fields, body = BODIES[endpoint]
    nulls = {f.name: None for f in fields.fields if not f.required}
    assert fields.read({**nulls, **body}) == fields.read(body)


@pytest.mark.parametrize("endpoint", BODIES)
def test_a_request_of_nothing_but_the_prompt_asks_for_nothing(endpoint: str) -> None:
    fields, body = BODIES[endpoint]
    read = fields.read(body)
    assert (read.sampling, read.chat, read.unknown) == ({}, {}, [])
    assert constraint(read.own) == {}


# What the clients of our day send beside the standard fields; none of it may be taken for a misspelling.
STRANGERS = (
    "chat_id id features variables tool_ids params filter_ids files model_item background_tasks title options"
    " keep_alive format think provider transforms route plugins extra_body api_base custom_llm_provider cache_prompt"
    " id_slot samplers dynatemp_range xtc_probability dry_multiplier t_max_predict_ms timings_per_token"
    " return_progress n_keep n_probs min_keep ttl preset thinking extra_headers timeout num_retries"
)


@pytest.mark.parametrize("endpoint", BODIES)
def test_unknown_fields_are_left_out_and_named(endpoint: str) -> None:
    fields, body = BODIES[endpoint]
    read = fields.read({**body, **dict.fromkeys(STRANGERS.split(), 1)})
    assert read.unknown == STRANGERS.split()
    assert {**read.__dict__, "unknown": []} == fields.read(body).__dict__


MESSAGES: Mapping[str, tuple[dict[str, Any], str, str]] = {  # more of a completion -> param, message
    "type": ({"temperature": "hot"}, "temperature", 'temperature = "hot" is a string; it must be a number >= 0'),
    "range": ({"top_p": 7}, "top_p", "top_p = 7 is out of range; it must be a number from 0 to 1"),
    "flag": ({"stream": 1}, "stream", "stream = 1 is a number; it must be true or false"),
    "item": (
        {"stop_token_ids": [1, "x"]},
        "stop_token_ids",
        'stop_token_ids = [1, "x"]: "x" is a string; it must be a list of token ids',
    ),
    "stop": (
        {"stop": {}},
        "stop",
        "stop = {} is an object; it must be a non-empty string or a list of non-empty strings",
    ),
    "prompt": (
        {"prompt": None},
        "prompt",
        "prompt = null is null; it must be a string, a list of strings, a list of token ids, or a list of such lists",
    ),
    "mixed": (
        {"prompt": [1, "x"]},
        "prompt",
        'prompt = [1, "x"]: "x" is a string; it must be a string, a list of strings, a list of token ids, or a list of'
        " such lists",
    ),
    "refused": ({"suffix": "x"}, "suffix", 'suffix = "x" is not supported; the model writes from left to right'),
    "misspelt": (
        {"temprature": 1},
        "temprature",
        '"temprature" is no field of this request; did you mean temperature?',
    ),
    "capitals": ({"Top_P": 1}, "Top_P", '"Top_P" is no field of this request; did you mean top_p?'),
    "long": ({"user": 10**5000}, "user", "user = ... is a number; it must be a string"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(case: str) -> None:
    more, param, message = MESSAGES[case]
    with pytest.raises(ApiError) as error:
        completions.FIELDS.read({"prompt": "x", **more})
    assert (error.value.status, error.value.param, error.value.message) == (400, param, message)


def test_a_missing_prompt_is_named() -> None:
    with pytest.raises(ApiError, match=r"^messages is missing; it must be a non-empty list of messages$"):
        chat.FIELDS.read({})


def test_the_newer_name_of_the_limit_counts() -> None:
    assert chat.FIELDS.read({"messages": [{}], "max_completion_tokens": 5, "max_tokens": 9}).sampling == {
        "max_tokens": 5
    }


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("max_tokens", -1, None),
        ("seed", -1, None),
        ("seed", -2, 2**64 - 2),
        ("seed", 2**64 - 1, 2**64 - 1),
        ("top_k", 40.0, 40),
        ("logit_bias", {"7": -100, "50256": 1.5}, {7: -100.0, 50256: 1.5}),
        ("skip_special_tokens", False, True),
    ],
)
def test_values_become_sampling_parameters(name: str, given: Any, kept: Any) -> None:
    field = next(f for f in COMMON if f.name == name)
    assert completions.FIELDS.read({"prompt": "x", name: given}).sampling == {field.to: kept}


@pytest.mark.parametrize("field", [f for f in ALL if f.neutral is not None], ids=lambda f: f.name)
def test_what_is_not_supported_is_refused_by_name(field: Field) -> None:
    assert field.doc
    for value in field.neutral or ():
        assert field.read(value) == value
    with pytest.raises(ApiError, match=f"^{field.name} = .* is not supported; "):
        field.read("something else")


CONSTRAINTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"structured_outputs": {"json": {"type": "object"}}}, {"json_schema": {"type": "object"}}),
    ({"structured_outputs": {"json_object": True, "regex": None}}, {"json_schema": True}),
    ({"structured_outputs": {"json_object": False}}, {}),
    ({"guided_json": '{"type": "string"}'}, {"json_schema": '{"type": "string"}'}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"regex": "a+"}, {"regex": "a+"}),
    ({"grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
    ({"guided_choice": ["yes", 'a "no"']}, {"grammar": 'start: "yes" | "a \\"no\\""'}),
]


@pytest.mark.parametrize(("more", "options"), CONSTRAINTS)
def test_the_forms_of_structured_output_become_one(more: dict[str, Any], options: dict[str, Any]) -> None:
    assert constraint(completions.FIELDS.read({"prompt": "x", **more}).own) == options


def test_only_one_form_of_structured_output_is_taken() -> None:
    read = completions.FIELDS.read({"prompt": "x", "guided_regex": "a", "structured_outputs": {"choice": ["a"]}})
    with pytest.raises(ApiError, match=r"^structured_outputs\.choice and guided_regex exclude each other$"):
        constraint(read.own)
    read = completions.FIELDS.read({"prompt": "x", "structured_outputs": {"whitespace": " "}})
    with pytest.raises(ApiError, match=r"^structured_outputs\.whitespace is not supported; supported: json, "):
        constraint(read.own)


KINDS: list[tuple[Any, Any, Any]] = [  # kind, value, what is read
    (integer(1), 3.0, 3),
    (number(0, 1), 1, 1.0),
    (string(), "", ""),
    (word("a", "b"), "b", "b"),
    (listed(FLAG, "flags", most=2), [True, False], [True, False]),
    (table(number(), int, "^[0-9]+$", "numbers"), {"3": 1}, {3: 1.0}),
    (record({"a": FLAG}), {"a": None, "b": 5}, {"b": 5}),
    (either(string(), listed(string(), "strings")), ["x"], ["x"]),
]


@pytest.mark.parametrize(("kind", "value", "read"), KINDS)
def test_kinds_read(kind: Any, value: Any, read: Any) -> None:
    assert kind.read(value) == read


@pytest.mark.parametrize(
    ("kind", "value"),
    [(integer(1), 2.5), (integer(1), True), (string(), None), (FLAG, 0), (record({"a": FLAG}), {"a": 1})],
)
def test_kinds_refuse_other_types(kind: Any, value: Any) -> None:
    with pytest.raises(WrongTypeError):
        kind.read(value)


def test_a_table_of_fields_reads_and_describes() -> None:
    fields = Fields(
        (own("a", FLAG, "Whether.", False), sampling("t", number(0, 2), to="temperature"), refused("b", "no"))
    )
    assert fields.schema["properties"]["a"] == {
        "type": ["boolean", "null"],
        "default": False,
        "description": "Whether.",
    }
    assert fields.schema["properties"]["t"] == {"type": ["number", "null"], "minimum": 0, "maximum": 2}
    assert fields.schema["properties"]["b"] == {"enum": [None], "description": "no"}
    read = fields.read({"t": 1})
    assert (read.sampling, read.own) == ({"temperature": 1.0}, {"a": False})


def test_out_of_range_for_the_engine_stays_a_parameter_error() -> None:
    """The bounds are said twice, here for the schema; the engine's own would still refuse."""
    with pytest.raises(ParameterError):
        read_parameter("top_p", 7)
