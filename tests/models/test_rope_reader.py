"""Rotations by layer: which settings of a config.json each layer gets, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from cuplama.errors import ConfigError
from cuplama.models.config import ModelConfig, parse_config
from cuplama.models.families import FAMILIES
from cuplama.models.family import Family, Number, Rotations, Windows
from cuplama.models.rope import Rope

TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
CONFIG: dict[str, Any] = {
    "architectures": ["MixedForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 4, "sliding_window": 8, "layer_types": TYPES,
}  # fmt: skip


def by_type(raw: Mapping[str, Any], layers: int) -> list[int]:
    return [raw["sliding_window"] if kind == "sliding_attention" else 0 for kind in raw["layer_types"]]


BY_TYPE = Rotations(("layer_types",), lambda raw, windows: list(raw["layer_types"]))
MIXED = replace(
    FAMILIES["LlamaForCausalLM"],
    architecture="MixedForCausalLM",
    model_type="mixed",
    windows=Windows(("sliding_window",), by_type),
    rotations=BY_TYPE,
    neutral={},
)


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Any:
    def read(family: Family = MIXED, **changes: Any) -> ModelConfig:
        monkeypatch.setitem(FAMILIES, family.architecture, family)
        return parse_config({**CONFIG, **changes})

    return read


def test_every_layer_type_has_its_own_rotation(parse: Any) -> None:
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    config = parse(rope_parameters={"full_attention": linear, "sliding_attention": {"rope_type": "default"}})
    local, whole = Rope("default", 10000.0, 8, 2048, 2048, {}), Rope("linear", 1e6, 8, 2048, 2048, {"factor": 4.0})
    assert [layer.rope for layer in config.layers] == [local, local, whole, local]
    assert config.ropes == {"rope": local, "rope1": whole}


def test_what_settings_leave_out_is_at_the_top_or_a_default(parse: Any) -> None:
    family = replace(MIXED, rotations=replace(BY_TYPE, defaults={"rope_theta": 5e5}), partial_rotary=True)
    settings = {"full_attention": {"rope_theta": 7.0, "partial_rotary_factor": 0.25}, "sliding_attention": None}
    ropes = parse(family, rope_parameters=settings).ropes
    assert [(r.theta, r.dim) for r in ropes.values()] == [(5e5, 8), (7.0, 2)]
    ropes = parse(family, rope_parameters=settings, rope_theta=9.0, partial_rotary_factor=0.5).ropes
    assert [(r.theta, r.dim) for r in ropes.values()] == [(9.0, 4), (7.0, 2)]


def test_equal_settings_are_one_rotation(parse: Any) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    ropes = parse(
        rope_parameters={"full_attention": yarn, "sliding_attention": yarn}, max_position_embeddings=512
    ).ropes
    assert ropes == {"rope": Rope("yarn", 10000.0, 8, 512, 64, {"factor": 4.0})}
    both = {key: {"rope_type": "dynamic", "factor": 2.0} for key in TYPES}
    assert parse(rope_parameters=both).ropes.keys() == {"rope"}


def test_one_of_several_reads_its_own_context(parse: Any) -> None:
    """As in transformers: a context at the top is for settings that are one object."""
    yarn = {"rope_type": "yarn", "factor": 4.0}
    settings = {"full_attention": {**yarn, "original_max_position_embeddings": 64}, "sliding_attention": yarn}
    ropes = parse(rope_parameters=settings, original_max_position_embeddings=32).ropes
    assert [r.original for r in ropes.values()] == [2048, 64]


def test_layers_without_rotation(parse: Any, caplog: pytest.LogCaptureFixture) -> None:
    rule = Rotations(("no_rope_layers",), lambda raw, windows: ["" if on else None for on in raw["no_rope_layers"]])
    config = parse(replace(MIXED, rotations=rule), no_rope_layers=[0, 1, 1, 0], rope_theta=7.0)
    assert [layer.rope and layer.rope.theta for layer in config.layers] == [None, 7.0, 7.0, None]
    assert parse(replace(MIXED, rotations=rule), no_rope_layers=[0] * 4).ropes == {}
    assert caplog.messages == []


def test_a_rule_that_does_not_fit_names_what_it_reads(parse: Any) -> None:
    def refused(family: Family, **changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            parse(family, **changes)
        return str(caught.value)

    rule = Rotations(("no_rope_layers",), lambda raw, windows: ["" if on else None for on in raw["no_rope_layers"]])
    short = refused(replace(MIXED, rotations=rule), no_rope_layers=[0, 1])
    assert short.startswith("config.json: no_rope_layers = [0, 1] is not supported")
    odd = refused(replace(MIXED, rotations=rule), no_rope_layers=4)
    assert odd.startswith("config.json: no_rope_layers = 4 is not supported")
    own = replace(BY_TYPE, settings=lambda raw: {key: {**value} for key, value in raw["rope_parameters"].items()})
    odd = refused(replace(MIXED, rotations=own), rope_parameters={"full_attention": 3})
    assert odd.startswith('config.json: rope_parameters = {"full_attention": 3} is not supported')


def test_older_names_are_the_familys(parse: Any) -> None:
    def settings(raw: Mapping[str, Any]) -> dict[str, Any]:
        return {"full_attention": raw.get("rope_scaling") or {}, "sliding_attention": {"rope_theta": raw["local"]}}

    family = replace(MIXED, rotations=replace(BY_TYPE, reads=("layer_types", "local"), settings=settings))
    ropes = parse(family, rope_theta=1e6, local=77.0, rope_scaling={"type": "linear", "factor": 2.0}).ropes
    assert [(r.type, r.theta) for r in ropes.values()] == [("default", 77.0), ("linear", 1e6)]


def test_proportional_keeps_the_whole_head(parse: Any) -> None:
    family = replace(MIXED, rope_types=("default", "proportional"))
    whole = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    ropes = parse(family, rope_parameters={"full_attention": whole, "sliding_attention": {}}).ropes
    assert ropes["rope1"] == Rope("proportional", 10000.0, 8, 2048, 2048, {"partial_rotary_factor": 0.25})


def test_numbers_may_be_among_the_settings(parse: Any) -> None:
    one = Rotations((), lambda raw, windows: [""] * len(windows))
    numbers = {
        "query_temperature": Number("rope_parameters.llama_4_scaling_beta", None),
        "query_context": Number("rope_parameters.original_max_position_embeddings", None),
    }
    yarn = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}
    family = replace(MIXED, rotations=one, numbers=numbers)
    config = parse(family, rope_parameters={**yarn, "llama_4_scaling_beta": 0.1, "max_position_embeddings": 1024})
    assert (config.query_temperature, config.query_context) == (0.1, 64.0)
    assert config.ropes["rope"].settings == {"factor": 16.0}
    config = parse(family, rope_parameters=yarn)
    assert (config.query_temperature, config.query_context) == (0.0, 64.0)


PLAIN = {"full_attention": {}, "sliding_attention": {"rope_theta": 7.0}}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "rope_parameters = null is not supported; supported: settings for sliding_attention in it"),
        ({"rope_parameters": {"sliding_attention": {}}},
         'rope_parameters = {"sliding_attention": {}} is not supported; supported: settings for full_attention in it'),
        ({"rope_parameters": {**PLAIN, "rope_theta": 9.0}},
         'rope_parameters = {"full_attention": {}, "sliding_attention": {"rope_theta": 7.0}, "rope_theta"... is not'
         " supported; supported: one object of settings, or one per layer type, but not both"),
        ({"rope_parameters": {**PLAIN, "full_attention": {"rope_type": "dynamic", "factor": 2.0}}},
         'rope_parameters.full_attention.rope_type = "dynamic" is not supported; supported: default, linear, llama3, '
         "yarn beside another rotation"),
        ({"rope_parameters": {**PLAIN, "full_attention": LONG}},
         'rope_parameters.full_attention.rope_type = "longrope" is not supported; supported: default, linear, llama3, '
         "yarn beside another rotation"),
        ({"rope_parameters": {**PLAIN, "full_attention": {"rope_type": "linear", "factor": 0.5}}},
         "rope_parameters.full_attention.factor = 0.5 is not supported; supported: a number >= 1"),
        ({"rope_parameters": {**PLAIN, "full_attention": {"rope_type": "yarn"}}},
         "rope_parameters.full_attention.factor is missing; rope type yarn needs it"),
        ({"rope_parameters": {**PLAIN, "sliding_attention": {"odd": 1}}},
         "rope_parameters.sliding_attention.odd = 1 is not supported; supported: no setting for default"),
        ({"rope_parameters": {**PLAIN, "full_attention": {"rope_type": "proportional"}}},
         'rope_parameters.full_attention.rope_type = "proportional" is not supported; supported: default, linear, '
         "dynamic, llama3, yarn, longrope"),
        ({"rope_parameters": PLAIN, "layer_types": None},
         "sliding_window = 8 is not supported; supported: what goes together with the other fields"),
        ({"rope_parameters": PLAIN, "layer_types": ["full_attention", *TYPES[:2], "chunked_attention"]},
         'layer_types[3] = "chunked_attention" is not supported; supported: full_attention, sliding_attention'),
    ],
    ids=str,
)  # fmt: skip
def test_refusals(parse: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**changes)
    assert str(caught.value) == f"config.json: {message}"


# --- Numbers -------------------------------------------------------------------------------------

SCALED = replace(
    MIXED,
    rotations=Rotations((), lambda raw, windows: [""] * len(windows)),
    numbers={
        "embedding_scale": Number("hidden_size", make=lambda d: d**0.5),
        "attention_scale": Number("query_pre_attn_scalar", 64, lambda s: s**-0.5),
        "logits_scale": Number("logits_scaling", make=lambda s: 1 / s),
        "logits_cap": Number("final_logit_softcapping", 30.0),
        "residual_scale": Number(None, 0.5),
    },
)


def test_numbers_are_read(parse: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = parse(SCALED, logits_scaling=4)
    assert (config.embedding_scale, config.attention_scale, config.residual_scale) == (32**0.5, 0.125, 0.5)
    assert (config.logits_scale, config.logits_cap, config.attention_cap) == (0.25, 30.0, 0.0)
    config = parse(SCALED, logits_scaling=None, query_pre_attn_scalar=16, final_logit_softcapping=None)
    assert (config.logits_scale, config.attention_scale, config.logits_cap) == (1.0, 0.25, 0.0)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "logits_scaling is missing"),
        ({"logits_scaling": 0}, "logits_scaling = 0 is not supported; supported: a positive number"),
        ({"logits_scaling": "8"}, 'logits_scaling = "8" is not'),
        ({"logits_scaling": True}, "logits_scaling = true is not"),
        ({"logits_scaling": 1, "query_pre_attn_scalar": -1}, "query_pre_attn_scalar = -1 is not"),
        ({"logits_scaling": 1, "final_logit_softcapping": float("inf")}, "final_logit_softcapping = Infinity is not"),
        ({"logits_scaling": 1, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not"),
    ],
    ids=str,
)
def test_numbers_that_are_none(parse: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.json: {words}"):
        parse(SCALED, **changes)
