"""Sampling parameters: what they may be, how they are kept, and what a generation_config.json sets."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from cuplama.errors import ParameterError
from cuplama.sampling_params import PARAMETERS, SamplingParams, sampling_defaults, unsupported_settings

Array = np.ndarray[Any, Any]

INF, NAN = math.inf, math.nan
BAD: dict[str, list[Any]] = {
    "max_tokens": [-1, 1.0, True, "5", NAN, [5]],
    "min_tokens": [-1, None, 0.5],
    "temperature": [-0.1, NAN, INF, None, "hot", True, 1j, 10**400],
    "top_k": [-1, 2.5, None, "1"],
    "top_p": [-0.01, 1.01, NAN, None, 10**400],
    "min_p": [-0.01, 1.01, NAN, True],
    "repetition_penalty": [0, -1, NAN, INF, 1e7, 1e-7],
    "presence_penalty": [INF, -INF, NAN, "x", 1e31],
    "frequency_penalty": [INF, NAN, None],
    "logit_bias": [[1], {"1": 2.0}, {1: NAN}, {1: INF}, {-1: 0.0}, {1.5: 0.0}, {1: "x"}, {True: 1.0}],
    "seed": [-1, 2**64, 1.5, True, "1"],
    "stop": [5, [""], "", [b"x"], ["a", None]],
    "stop_token_ids": [5, [-1], ["1"], [1.0], [True]],
    "ignore_eos": [1, None, "yes"],
    "logprobs": [-1, 65, True, 2.0],
}
GOOD: dict[str, list[tuple[Any, Any]]] = {  # given -> as it is kept
    "max_tokens": [(None, None), (0, 0), (10**30, 10**30), (np.int64(5), 5)],
    "min_tokens": [(np.uint8(3), 3)],
    "temperature": [(0, 0.0), (np.float32(0.5), 0.5), (Fraction(1, 2), 0.5), (1e30, 1e30), (1e-7, 0.0)],
    "top_k": [(0, 0), (10**30, 10**30)],
    "top_p": [(0, 0.0), (1, 1.0)],
    "min_p": [(1, 1.0)],
    "repetition_penalty": [(1e-6, 1e-6), (1e6, 1e6)],
    "presence_penalty": [(-2, -2.0)],
    "frequency_penalty": [(-2, -2.0)],
    "logit_bias": [({}, {}), (None, {}), ({np.int64(3): np.float32(1)}, {3: 1.0}), ({0: -INF}, {0: -INF})],
    "seed": [(None, None), (0, 0), (2**64 - 1, 2**64 - 1), (np.uint64(2**64 - 1), 2**64 - 1)],
    "stop": [("x", ("x",)), (["x", "yy"], ("x", "yy")), ([], ()), (None, ()), (iter(["a"]), ("a",))],
    "stop_token_ids": [([], ()), (None, ()), ({3}, (3,)), (np.array([3, 4]), (3, 4)), (range(2), (0, 1))],
    "ignore_eos": [(True, True)],
    "logprobs": [(None, None), (0, 0), (64, 64)],
}


def test_every_parameter_is_covered() -> None:
    assert set(BAD) == set(GOOD) == set(PARAMETERS)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values], ids=str)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} = ")
    assert "it must be " in message
    assert len(message) < 250
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [(n, *pair) for n, pairs in GOOD.items() for pair in pairs],
    ids=lambda x: str(x).partition(" object at ")[0],  # an address differs between the processes of a run
)
def test_values_are_kept_as_plain_python(name: str, value: Any, kept: Any) -> None:
    found = getattr(SamplingParams(**{name: value}), name)
    assert found == kept
    assert type(found) is type(kept)


def test_seeds_are_drawn_where_none_is_given() -> None:
    assert SamplingParams(seed=0).with_seed() == 0
    drawn = {SamplingParams().with_seed() for _ in range(4)}
    assert len(drawn) == 4
    assert all(0 <= seed < 2**64 for seed in drawn)


def test_defaults_from_generation_config() -> None:
    assert sampling_defaults({}) == {}
    assert sampling_defaults({"bos_token_id": 1, "eos_token_id": [2], "top_k": 50}) == {}  # nothing says to sample
    assert sampling_defaults({"do_sample": True}) == {"temperature": 1.0}
    assert sampling_defaults({"do_sample": True, "temperature": 0.6, "top_p": 0.9}) == {
        "temperature": 0.6,
        "top_p": 0.9,
    }
    assert sampling_defaults({"temperature": 0.6}) == {"temperature": 0.6}
    # Without sampling, what shapes the draw is dropped; penalties and lengths stay.
    greedy = {"do_sample": False, "temperature": 0.6, "top_k": 9, "top_p": 0.9, "min_p": 0.1}
    stay = {"repetition_penalty": 1.1, "max_new_tokens": 7, "min_new_tokens": 2}
    assert sampling_defaults({**greedy, **stay}) == {"repetition_penalty": 1.1, "max_tokens": 7, "min_tokens": 2}
    assert sampling_defaults({"do_sample": True, "top_k": None, "max_new_tokens": None}) == {"temperature": 1.0}
    for wrong in ({"repetition_penalty": 0}, {"do_sample": 1.5}, {"temperature": "x"}, {"max_new_tokens": -3}):
        with pytest.raises(ParameterError):
            sampling_defaults(wrong)


def test_unsupported_generation_settings_are_named() -> None:
    asked = {"num_beams": 4, "no_repeat_ngram_size": 0, "suppress_tokens": [1, 2], "temperature": 0.7}
    assert unsupported_settings(asked) == ["num_beams = 4", "suppress_tokens = [1, 2]"]
