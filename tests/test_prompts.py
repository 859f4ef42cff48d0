"""What is a prompt and what is not: the same for every function that takes one, and named by its number in a list."""

from __future__ import annotations

from array import array
from collections import deque
from typing import Any

import numpy as np
import pytest

from cuplama import Model
from cuplama.errors import ContextError, PromptError
from cuplama.prompts import plain_prompts

pytestmark = pytest.mark.usefixtures("all_pages_come_back")

ONE: list[Any] = [  # the ids 1, 2, 3
    [1, 2, 3],
    (1, 2, 3),
    range(1, 4),
    deque([1, 2, 3]),
    array("i", [1, 2, 3]),
    np.array([1, 2, 3]),
    np.array([1, 2, 3], np.uint8),
    np.array([1, 2, 3], object),
    [np.int32(1), np.int64(2), 3],
]
SEVERAL: list[Any] = [
    [[1, 2], [3, 4]],
    ([1, 2], (3, 4)),
    np.array([[1, 2], [3, 4]]),
    [np.array([1, 2]), range(3, 5)],
]
NONE: list[tuple[Any, str]] = [  # no prompt at all, and what is said of it
    (5, "text or a list of token ids, and not an int"),
    (np.int64(5), "and not a numpy.int64"),
    (2.5, "and not a float"),
    (True, "and not a bool"),
    (None, "and not None"),
    (b"First", "and not a bytes"),
    (bytearray(b"First"), "and not a bytearray"),
    (memoryview(b"First"), "and not a memoryview"),
    ({1, 2}, "and not a set"),
    (frozenset({1}), "and not a frozenset"),
    ({1: 2}, "and not a dict"),
    ({1: 2}.keys(), "and not a dict_keys"),
    (iter([1, 2]), "and not a list_iterator"),
    ((i for i in (1, 2)), "and not a generator"),
    (map(int, "12"), "and not a map"),
    (object(), "and not an object"),
    (np.array(5), "and not an array without dimensions"),
    (np.array("First"), "and not an array without dimensions"),
]
NO_IDS: list[tuple[Any, str]] = [  # lists that are one prompt, of what are no ids
    ([True, False], "a token id is a whole number; True is a bool"),
    ([1, True], "True is a bool"),
    ([np.True_], "is a numpy.bool"),
    (np.array([True, False]), "True is a bool"),
    ([1.0, 2.0], "1.0 is a float"),
    (np.array([1.0, 2.0]), "1.0 is a float"),
    ([np.float32(1)], " is a numpy.float32"),
    ([None], "None is None"),
    ([1, {2}], "{2} is a set"),
    ([1j], "1j is a complex"),
]
OUT_OF_RANGE: list[tuple[Any, str]] = [
    ([1, 65], "token id 65 is out of range; the vocabulary has 65 tokens"),
    ([1, -1], "-1 is out of range"),
    ([2**70], "out of range"),
    (np.array([2**64 - 1], np.uint64), "18446744073709551615 is out of range"),
    ("\ud800", "not valid Unicode"),
]


@pytest.mark.parametrize("prompt", ONE, ids=lambda p: type(p).__name__)
def test_one_prompt(prompt: Any, chars: Model) -> None:
    assert plain_prompts(prompt) == ([[1, 2, 3]], True)
    assert all(type(id) is int for id in plain_prompts(prompt)[0][0])
    assert chars.encode(prompt) == [1, 2, 3]


def test_text_is_one_prompt() -> None:
    assert plain_prompts("") == ([""], True)
    assert plain_prompts(np.str_("ab")) == (["ab"], True)


@pytest.mark.parametrize("prompts", SEVERAL, ids=lambda p: type(p).__name__)
def test_several_prompts(prompts: Any) -> None:
    assert plain_prompts(prompts) == ([[1, 2], [3, 4]], False)


def test_lists_of_texts_and_of_both() -> None:
    given: Any
    for given in (["a", "b"], ("a", "b"), np.array(["a", "b"])):
        assert plain_prompts(given) == (["a", "b"], False)
    given = ["a", [1], np.array([2])]
    assert plain_prompts(given) == (["a", [1], [2]], False)
    for given in ([], (), np.array([])):
        assert plain_prompts(given) == ([], False)
    given = [[], ""]
    assert plain_prompts(given) == ([[], ""], False)


def refusals(chars: Model, prompt: Any) -> list[str]:
    """What every function that takes a prompt says of one that it refuses."""
    said = []
    for call in (chars.generate, chars.stream, chars.logits, chars.encode):
        with pytest.raises(PromptError) as caught:
            call(prompt)
        assert "\n" not in str(caught.value)
        said.append(str(caught.value))
    return said


@pytest.mark.parametrize(("prompt", "words"), NONE + NO_IDS + OUT_OF_RANGE, ids=str)
def test_what_is_refused_is_refused_alike(chars: Model, prompt: Any, words: str) -> None:
    said = set(refusals(chars, prompt))
    assert len(said) == 1
    assert words in said.pop()


@pytest.mark.parametrize(
    ("prompt", "words"), [p for p in NONE + OUT_OF_RANGE if not isinstance(p[0], (int, np.integer))], ids=str
)
def test_the_bad_prompt_of_a_list_is_named(chars: Model, prompt: Any, words: str) -> None:
    for call in (chars.generate, chars.stream):
        for place in (0, 7):
            batch = ["ok"] * 9
            batch[place] = prompt
            with pytest.raises(PromptError) as caught:
                call(batch)
            message = str(caught.value)
            assert message.startswith(f"prompt {place}: ")
            assert words in message


@pytest.mark.parametrize("n", [None, 2])
def test_errors_of_one_prompt_among_several_keep_their_kind(chars: Model, n: int | None) -> None:
    calls: list[Any] = [chars.generate, chars.stream]
    for call in calls:
        with pytest.raises(ContextError, match=r"^prompt 1: the prompt has 81 tokens; the context has room for 79$"):
            call(["ok", "x" * 81], n=n)
        with pytest.raises(PromptError, match=r"^prompt 2: the prompt is empty and the model has no BOS"):
            call(["ok", "ok", ""], n=n)
        with pytest.raises(PromptError, match=r"^prompt 0: "):
            call([[]], n=n)
        with pytest.raises(PromptError, match=r"^prompt 1: a token id is a whole number; 'a' is a str"):
            call([[1], ["a"]], n=n)
        with pytest.raises(ContextError, match=r"^the prompt has 81 tokens"):
            call("x" * 81, n=n)


def test_a_list_is_not_one_prompt_for_what_takes_one(chars: Model) -> None:
    several: Any
    for call in (chars.logits, chars.encode):
        for several in (["ab"], [[1, 2]], np.array([[1, 2]])):
            with pytest.raises(PromptError, match="a token id is a whole number; "):
                call(several)
