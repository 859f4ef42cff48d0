"""config.json of published models: they are read without a warning, and their weights are as many as was published.

tests/data/configs has them as the makers' files say it, some without what no program reads.
"""

from __future__ import annotations

import logging
import math

import pytest

from cuplama.errors import ConfigError
from cuplama.files import read_json
from cuplama.models.config import ModelConfig, parse_config
from cuplama.models.graph import decoder
from tests.paths import DATA

# Parameters as the hub counts them, or as the makers round them where that is a float.
PARAMETERS: dict[str, int | float] = {
    "afm-4.5b": 4.62e9,
    "apertus-70b": 70.6e9,
    "apertus-8b": 8.05e9,
    "command-a": 111_057_580_032,
    "command-r7b": 8_028_033_024,
    "deepseek-llm-7b": 6_910_365_696,
    "ernie-4.5-0.3b": 360_748_032,
    "exaone-4.0-1.2b": 1.28e9,
    "exaone-4.0-32b": 32.0e9,
    "falcon3-7b": 7_455_550_464,
    "helium-1-2b": 2.02e9,
    "helium-1-preview-2b": 2_172_643_840,
    "hunyuan-1.8b": 1.79e9,
    "hunyuan-7b": 7.50e9,
    "internlm2.5-1.8b": 1_889_110_016,
    "internlm2.5-7b": 7_737_708_544,
    "internlm3-8b": 8_804_241_408,
    "minitron-4b": 4.19e9,
    "minitron-8b": 8.27e9,
    "phi-1.5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "seed-oss-36b": 36_151_104_512,
    "stablelm-2-1.6b": 1_644_515_328,
    "stablelm-3b": 2_795_443_200,
    "yi-6b": 6_061_035_520,
}


def published(name: str) -> ModelConfig:
    return parse_config(read_json(DATA / "configs" / f"{name}.json"), name)


def test_every_file_has_a_count() -> None:
    assert sorted(p.stem for p in (DATA / "configs").glob("*.json")) == sorted(PARAMETERS)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameters(name: str, count: int | float, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = published(name)
    assert not caplog.messages
    shapes = config.weight_shapes()
    found = sum(math.prod(shape) for weight, shape in shapes.items() if weight != "lm_head" or not config.head_is_tied)
    assert found == count if isinstance(count, int) else abs(found / count - 1) < 0.004
    assert len(decoder(config).body) > 6 * config.num_layers


def test_layers_of_two_kinds() -> None:
    """Three of four have a window and rotate; EXAONE without windows and Hunyuan rotate everywhere."""
    for name, theta in (("command-r7b", 50000), ("exaone-4.0-32b", 1e6)):
        config = published(name)
        assert config.windows == (4096, 4096, 4096, 0) * (config.num_layers // 4)
        assert [layer.rope is None for layer in config.layers] == [window == 0 for window in config.windows]
        assert [rope.theta for rope in config.ropes.values()] == [theta]
    everywhere = published("exaone-4.0-1.2b")
    assert not any(everywhere.windows)
    assert all(layer.rope for layer in everywhere.layers)


PARTS = [("phi-2", 32), ("phi-1.5", 32), ("stablelm-3b", 20), ("minitron-4b", 64)]  # of 80, 64, 80 and 128


@pytest.mark.parametrize(("name", "rotated"), PARTS)
def test_a_part_of_a_head_rotates(name: str, rotated: int) -> None:
    assert [rope.dim for rope in published(name).ropes.values()] == [rotated]


# What these families may ask for and is not there: (model, field, value that is refused).
REFUSED = [
    ("stablelm-2-1.6b", "use_parallel_residual", True),
    ("stablelm-2-1.6b", "qk_layernorm", True),
    ("phi-2", "qk_layernorm", True),
    ("command-r7b", "use_parallel_block", False),
    ("command-r7b", "use_qk_norm", True),
    ("command-r7b", "position_embedding_type", "alibi"),
    ("hunyuan-7b", "use_cla", True),
    ("hunyuan-7b", "use_qk_norm", False),
    ("apertus-8b", "post_norm", True),
    ("exaone-4.0-32b", "sliding_window_pattern", 0),
]


@pytest.mark.parametrize(("name", "field", "value"), REFUSED)
def test_what_is_not_there_is_refused_by_name(name: str, field: str, value: object) -> None:
    raw = {**read_json(DATA / "configs" / f"{name}.json"), field: value}
    raw.pop("layer_types", None)
    with pytest.raises(ConfigError, match=f"^config.json: .*{field}"):
        parse_config(raw)


def test_hunyuan_stretches_its_base() -> None:
    (rope,) = published("hunyuan-7b").ropes.values()
    frequencies, factor = rope.frequencies(1)
    assert factor == 1
    assert frequencies[1] == pytest.approx((10000 * 1000 ** (128 / 126)) ** (-2 / 128), rel=1e-6)
