"""The first weights of a new model."""

from __future__ import annotations

import numpy as np
import pytest

from cuplama.errors import ConfigError
from cuplama.models.config import parse_config
from cuplama.models.presets import SHAPES
from cuplama.train.initial import initial_weights
from tests.train.made import config


def test_shapes_are_those_of_the_model_and_a_tied_head_is_the_embedding() -> None:
    for tied in (True, False):
        found, shapes = initial_weights(c := config(tie_word_embeddings=tied), 0), c.weight_shapes()
        assert {name: w.shape for name, w in found.items()} == shapes
        assert (found["lm_head"].source == found["embed_tokens"].source) == tied
        assert all(w.dtype == np.float32 for w in found.values())
    assert len(initial_weights(config(), 0)["0.qkv_proj"].parts) == 3


def test_the_spread_of_each_kind() -> None:
    c = config(hidden_size=128, intermediate_size=256, attention_bias=True, num_hidden_layers=8)
    found = {name: w.array() for name, w in initial_weights(c, 1).items()}
    for name in ("embed_tokens", "3.qkv_proj", "3.gate_up_proj"):
        assert found[name].std() == pytest.approx(0.02, rel=0.03)
        assert abs(found[name].mean()) < 0.001
    for name in ("3.o_proj", "7.down_proj"):
        assert found[name].std() == pytest.approx(0.02 / 4, rel=0.03)
    assert (found["3.attn_norm"] == 1).all()
    assert (found["norm"] == 1).all()
    assert (found["3.qkv_proj.bias"] == 0).all()
    wide = initial_weights(config(initializer_range=0.5), 1)["embed_tokens"].array()
    assert wide.std() == pytest.approx(0.5, rel=0.1)


def test_the_seed_decides_and_tensors_differ() -> None:
    one, same, other = (initial_weights(config(), seed) for seed in (5, 5, 6))
    for name, weight in one.items():
        assert np.array_equal(weight.array(), same[name].array())
    assert not np.array_equal(one["0.o_proj"].array(), other["0.o_proj"].array())
    assert not np.array_equal(one["0.o_proj"].array(), one["1.o_proj"].array())


def test_a_transposed_family_has_canonical_shapes() -> None:
    c = parse_config({**SHAPES["gpt2"], "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 20})
    assert {name: w.shape for name, w in initial_weights(c, 0).items()} == c.weight_shapes()


def test_what_a_config_leaves_open_is_its_familys() -> None:
    assert not config(tie_word_embeddings=None).head_is_tied
    raw = {**SHAPES["gpt2"]}
    del raw["tie_word_embeddings"]
    assert parse_config(raw).head_is_tied
    with pytest.raises(ConfigError, match=r"initializer_range = -1 is not supported"):
        initial_weights(config(initializer_range=-1), 0)
