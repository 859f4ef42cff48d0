"""generation_config.json: the defaults that it sets, and what is said of the rest."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from cuplama.errors import ConfigError, ParameterError
from cuplama.generation_config import params_over, sampling_defaults, unsupported_settings
from tests.tiny import CHARS, LLAMA, copy, load


def test_defaults() -> None:
    assert sampling_defaults({}) == {}
    assert sampling_defaults({"bos_token_id": 1, "eos_token_id": [2]}) == {}
    assert sampling_defaults({"do_sample": True}) == {"temperature": 1.0, "top_k": 50}
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.1}
    assert sampling_defaults(sampled) == {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.1}
    assert sampling_defaults({"do_sample": True, "top_k": -1}) == {"temperature": 1.0, "top_k": 0}
    absent = {"do_sample": True, "top_k": None, "max_new_tokens": None, "temperature": 0.7}
    assert sampling_defaults(absent) == {"temperature": 0.7, "top_k": 50}
    assert sampling_defaults({"do_sample": True, "top_k": 0}) == {"temperature": 1.0, "top_k": 0}
    assert sampling_defaults({"min_new_tokens": 600}) == {"min_tokens": 600}
    for wrong in ({"repetition_penalty": 0}, {"do_sample": 1.5}, {"temperature": "x"}, {"max_new_tokens": -3}):
        with pytest.raises(ParameterError):
            sampling_defaults(wrong)


@pytest.mark.parametrize("greedy", [{"do_sample": False}, {"do_sample": None}, {}])
def test_without_do_sample_a_model_is_greedy(greedy: dict[str, Any]) -> None:
    """What shapes the draw is dropped; penalties and lengths stay."""
    draw = {"temperature": 0.6, "top_k": 9, "top_p": 0.9, "min_p": 0.1}
    stay = {"repetition_penalty": 1.1, "max_new_tokens": 7, "min_new_tokens": 2, "stop_strings": ["User:"]}
    wanted = {"repetition_penalty": 1.1, "max_tokens": 7, "min_tokens": 2, "stop": ("User:",)}
    assert sampling_defaults({**greedy, **draw, **stay}) == wanted


@pytest.mark.parametrize(
    ("defaults", "options", "most", "least"),
    [
        ({"min_tokens": 10}, {"max_tokens": 2}, 2, 2),
        ({"min_tokens": 600}, {}, 512, 512),
        ({"min_tokens": 600}, {"max_tokens": None}, None, 600),
        ({"min_tokens": 10, "max_tokens": 5}, {}, 5, 5),
        ({"min_tokens": 10}, {"min_tokens": 3, "max_tokens": 4}, 4, 3),
    ],
)
def test_a_models_least_length_never_makes_a_call_fail(
    defaults: dict[str, Any], options: dict[str, Any], most: int | None, least: int
) -> None:
    params = params_over(defaults, options)
    assert (params.max_tokens, params.min_tokens) == (most, least)


def test_two_lengths_of_a_call_that_contradict_each_other() -> None:
    for options in ({"max_tokens": 2, "min_tokens": 3}, {"max_tokens": -5}, {"max_tokens": "2"}):
        with pytest.raises(ParameterError, match="max_tokens"):
            params_over({"min_tokens": 10}, options)


UNSUPPORTED: dict[str, Any] = {
    "num_beams": 4,
    "num_beam_groups": 2,
    "num_return_sequences": 3,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 3,
    "encoder_repetition_penalty": 1.2,
    "typical_p": 0.9,
    "top_h": 0.4,
    "epsilon_cutoff": 1e-4,
    "eta_cutoff": 1e-4,
    "bad_words_ids": [[1]],
    "force_words_ids": [[1]],
    "constraints": [1],
    "sequence_bias": [[[1], 2.0]],
    "suppress_tokens": [1, 2],
    "begin_suppress_tokens": [0],
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 0,
    "forced_decoder_ids": [[1, 2]],
    "exponential_decay_length_penalty": [5, 1.1],
    "guidance_scale": 1.5,
    "token_healing": True,
    "watermarking_config": {"bias": 2.0},
    "assistant_ensemble_weight": 0.5,
    "min_length": 20,
    "max_length": 30,
    "max_time": 0,
    "of_another_program": "x",
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "typical_p"), (None, 1, 1.0)),
    **dict.fromkeys(("penalty_alpha", "no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), (None, 0, 0.0)),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "guidance_scale": (None, 1),
    "min_length": (None, 0),
    "max_length": (None, 80, 4096),
    "token_healing": (None, False),
    **{name: (None, [], {}) for name in ("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens")},
    "forced_bos_token_id": (None,),
    "of_another_program": (None, False, "", [], {}),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_named(name: str) -> None:
    value = UNSUPPORTED[name]
    assert unsupported_settings({name: value, "temperature": 0.7, "top_k": 5}, 80) == [f"{name} = {value!r}"]


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in NEUTRAL.items() for v in values], ids=str)
def test_what_does_nothing_is_not_named(name: str, value: Any) -> None:
    assert unsupported_settings({name: value}, 80) == []


def test_what_does_not_touch_the_text_is_not_named() -> None:
    harmless = {
        "_from_model_config": True,
        "transformers_version": "5.0.0",
        "pad_token_id": 0,
        "eos_token_id": [2],
        "do_sample": True,
        "use_cache": True,
        "cache_implementation": "static",
        "early_stopping": True,
        "length_penalty": 2.0,
        "num_assistant_tokens": 20,
        "output_attentions": True,
        "stop_strings": ["x"],
        "max_new_tokens": 5,
    }
    assert unsupported_settings(harmless, 80) == []


def warnings(settings: dict[str, Any], folder: Path, to: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cuplama"):
        load(copy(folder, to, generation_config=settings)).close()
    where = f"{to / 'generation_config.json'}: "
    assert all(m.startswith(where) for m in caplog.messages)
    return [m.removeprefix(where) for m in caplog.messages]


def test_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(**settings: Any) -> list[str]:
        return warnings(settings, CHARS, tmp_path, caplog)

    assert said(num_beams=4, wat=3) == [f"{x} is not supported and is left out" for x in ("num_beams = 4", "wat = 3")]
    assert said(temperature=0.6, top_k=5, eos_token_id=3) == [
        "without do_sample = true the default is greedy; left out: temperature = 0.6, top_k = 5"
    ]
    assert said(temperature=1.0, top_k=50, top_p=1, min_p=0.0) == said(temperature=None, top_k=-1) == []
    assert said(temperature=0.6, do_sample=False) == said(temperature=0.6, do_sample=True) == []
    assert said(stop_strings=["x"]) == []
    assert warnings({"stop_strings": ["x"]}, LLAMA, tmp_path / "b", caplog) == [
        "stop_strings need a tokenizer.json and are left out"
    ]


def test_stop_strings_stop(tmp_path: Path) -> None:
    with load(CHARS) as model:
        text = model.generate("First", max_tokens=30).text
    stop, at = text[12:14], text.index(text[12:14])
    for given in (stop, [stop, "never seen"]):
        with load(copy(CHARS, tmp_path, generation_config={"stop_strings": given})) as model:
            done = model.generate("First", max_tokens=30)
            assert (done.text, done.finish_reason) == (text[:at], "stop")
            assert model.generate("First", max_tokens=30, stop=()).text == text  # replaced by name
    with load(copy(LLAMA, tmp_path / "ids", generation_config={"stop_strings": ["x"]}), context=64) as model:
        assert len(model.generate([5], max_tokens=2, ignore_eos=True).tokens) == 2
    with pytest.raises(ConfigError, match=r"generation_config\.json: stop = \[1\]: 1 is an int"):
        load(copy(CHARS, tmp_path, generation_config={"stop_strings": [1]}))
