"""The text of a sequence and its stop strings, token by token; of a special token it shows nothing and sees all."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import tokenizers

from cuplama.engine.sequence import SequenceState, Token
from cuplama.output_text import OutputText
from cuplama.sampling_params import SamplingParams
from cuplama.text.tokenizer import Tokenizer
from tests.text.test_control_tokens import byte_level
from tests.text.test_tokenizer import byte, byte_fallback_json

BYTES = Tokenizer(byte_level())
LLAMA = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(byte_fallback_json())), {"eos_token": "</s>"})


def run(
    tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str], stop_ids: frozenset[int] = frozenset()
) -> tuple[str, str | None, int]:
    """(text, why it ended, tokens drawn) of a sequence that draws `ids`, if nothing stops it before."""
    sequence = SequenceState([], SamplingParams(stop=stop), stop_ids)
    output = OutputText(0, sequence, tokenizer)
    shown = ""
    for i, id in enumerate(ids):
        if id in stop_ids:
            sequence.finish_reason = "stop"
        elif i == len(ids) - 1:
            sequence.finish_reason = "length"
        shown += output.push(Token(id)).text
        if sequence.finish_reason is not None:
            break
    assert shown == output.text
    return output.text, sequence.finish_reason, len(output.tokens)


def encoded(text: str) -> list[int]:
    return BYTES.encode(text, bos=False)


STOPS = [
    ("foo<|im_end|>bar", ["<|im_end|>"], "foo", "stop", 4),
    ("foo\n<|im_end|>bar", ["\n<|im_end|>"], "foo", "stop", 5),
    ("foo<|im_end|>bar", ["\n<|im_end|>"], "foobar", "length", 7),
    ("foo<|im_end|>bar", ["foo<|im_end|>bar"], "", "stop", 7),
    ("foo<|im_end|>baz", ["foo<|im_end|>bar"], "foobaz", "length", 7),
    ("a<|im_end|><|im_end|>b", ["<|im_end|><|im_end|>"], "a", "stop", 3),
    ("a<|im_end|><|im_start|>b", ["<|im_end|><|im_end|>"], "ab", "length", 4),
    ("a<|im_start|>b<|im_end|>", ["<|im_end|>"], "ab", "stop", 4),
    ("a<|im_end|>b", ["b"], "a", "stop", 3),
    ("a<|im_end|>b", ["ab"], "", "stop", 3),  # no stop string spells a special token: they are not there
    ("a<|im_end|>b", ["<|im_end|>x", "ab"], "ab", "length", 3),
    ("a<|im_end|>b", ["<|im_"], "ab", "length", 3),
    ("a<think>b", ["<think>"], "a", "stop", 2),
    ("é<|im_end|>", ["é<|im_end|>"], "", "stop", 3),
]


@pytest.mark.parametrize(("drawn", "stop", "text", "reason", "tokens"), STOPS)
def test_stop_strings_with_special_tokens(drawn: str, stop: list[str], text: str, reason: str, tokens: int) -> None:
    assert run(BYTES, encoded(drawn), stop) == (text, reason, tokens)


def test_a_stop_token_that_is_in_a_stop_string() -> None:
    ids, end = encoded("foo<|im_end|>bar"), frozenset({258})
    assert run(BYTES, ids, [], end) == ("foo", "stop", 4)
    assert run(BYTES, ids, ["<|im_end|>"], end) == ("foo", "stop", 4)
    assert run(BYTES, ids, ["o<|im_end|>"], end) == ("fo", "stop", 4)
    assert run(BYTES, ids, ["x<|im_end|>"], end) == ("foo", "stop", 4)


def test_characters_that_are_held_back_come_before_the_special_token() -> None:
    llama = [byte(value) for value in "🦙".encode()]
    assert run(LLAMA, [260, *llama, 2], ["</s>"]) == ("a🦙", "stop", 6)
    assert run(LLAMA, [260, *llama, 2], ["🦙</s>"]) == ("a", "stop", 6)
    assert run(LLAMA, [260, *llama[:2], 2], ["</s>"]) == ("a\ufffd\ufffd", "stop", 4)
    assert run(LLAMA, [260, *llama, 1, 260], ["</s>"]) == ("a🦙a", "length", 7)
    half = BYTES.encode("é", bos=False)[:1]
    assert run(BYTES, [*half, 258], ["<|im_end|>"]) == ("\ufffd", "stop", 2)


def test_special_tokens_that_are_shown() -> None:
    ids = encoded("a<|im_start|>b<|im_end|>c")
    shown: list[tuple[bool | list[int], str]] = [
        (False, "abc"),
        (True, "a<|im_start|>b<|im_end|>c"),
        ([257], "a<|im_start|>bc"),
        ([5, 10**6], "abc"),
    ]
    for special, text in shown:
        sequence = SequenceState([], SamplingParams(show_special=special), frozenset())
        output = OutputText(0, sequence, BYTES)
        assert "".join(output.push(Token(id)).text for id in ids) == text
    params = SamplingParams(show_special=True, stop=["<|im_start|>b"])
    output = OutputText(0, SequenceState([], params, frozenset({258})), BYTES)
    assert [output.push(Token(id)).text for id in ids[:3]] == ["a", "", ""]
    assert output.sequence.finish_reason == "stop"
    output = OutputText(0, SequenceState([], SamplingParams(show_special=True), frozenset({258})), BYTES)
    assert [output.push(Token(id)).text for id in ids[2:4]] == ["b", ""]  # a token that ends the text is not shown
