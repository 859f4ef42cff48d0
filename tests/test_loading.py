"""Loading: options, what does not fit, and what a folder's generation_config.json sets."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
import cuplama.loading as load_module
from cuplama.errors import ConfigError, DeviceError, ParameterError
from cuplama.models.config import load_config
from tests.tiny import CHARS, LLAMA, copy, load


def test_a_context_beyond_the_trained_one_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    trained = load_config(LLAMA).context
    with caplog.at_level(logging.WARNING, "cuplama"):
        load(LLAMA, context=np.int64(trained)).close()
        assert "made for" not in caplog.text
        load(LLAMA, context=trained + 1).close()
    assert f"a context of {trained + 1} tokens is more than the {trained} that the model was made for" in caplog.text


def test_load_options() -> None:
    with pytest.raises(ParameterError, match="dtype = 'int8' is not supported; supported: auto, float32"):
        load(CHARS, dtype="int8")
    with pytest.raises(ParameterError, match="device = 'tpu' is not supported"):
        cuplama.load(CHARS, device="tpu")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"dtype": ["float32"]}, r"dtype = \['float32'\] is a list; it must be one of auto, float32"),
        ({"device": None}, "device = None is None; it must be one of auto, cuda, numpy"),
        ({"activations": "int8"}, "activations = 'int8' is not supported; supported: auto, fp8"),
        ({"activations": None}, "activations = None is None; it must be one of auto, fp8"),
        ({"offline": "no"}, "offline = 'no' is a str; it must be True or False"),
        ({"model": 3}, "model = 3 is an int; it must be a folder, a hub id, or None"),
        ({"model": b"x"}, "model = b'x' is a bytes"),
    )
    for options, words in wrong:
        with pytest.raises(ParameterError, match=f"^{words}"):
            cuplama.load(**{"model": CHARS, **options})
    for tokens, words in (
        (0, "0 is out of range"),
        (-1, "-1 is out of range"),
        (2**40, "1099511627776 is out of range"),
        (2.5, "2.5 is a float"),
        (True, "True is a bool"),
        ("5", "'5' is a str"),
    ):
        for name in ("context", "cache_tokens"):
            with pytest.raises(ParameterError, match=f"{name} = {words}; it must be a number from 1 to 1073741824"):
                load(LLAMA, **{name: tokens})
    with pytest.raises(ConfigError, match="context 81 is more than the 80 positions that the model learned"):
        load(CHARS, context=81)
    with pytest.raises(DeviceError, match=r"a cache of 1000000000 tokens takes [\d.]+ GB and [\d.]+ GB are free"):
        load(LLAMA, context=10**9)
    with load(CHARS, dtype="bf16") as model:
        assert model.backend.dtype.name == "bfloat16"


def test_weights_that_stay_in_the_file(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where memory is short, weights are converted at every use: the same text, slowly."""
    with load(CHARS) as model:
        wanted = model.generate("First", max_tokens=10).text
    monkeypatch.setattr("cuplama.device._free_memory", lambda: 10_000.0)
    monkeypatch.setattr("cuplama.device.memory.cache_bytes", lambda *args: 0)
    with load(CHARS) as model:
        assert model.generate("First", max_tokens=10).text == wanted
    assert "do not fit; they stay in the file" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ({"temperature": "hot"}, r"temperature = 'hot' is a str; it must be a number >= 0"),
        ({"do_sample": True, "top_p": 2}, "top_p = 2 is out of range"),
        ({"do_sample": "no"}, "do_sample = 'no'"),
        ({"max_new_tokens": 1.5}, "max_tokens = 1.5"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
    ],
)
def test_broken_generation_config(content: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "load_weights", lambda *_: pytest.fail("loaded before the settings were read"))
    with pytest.raises(ConfigError, match=words) as caught:
        load(copy(LLAMA, tmp_path, generation_config=content))
    assert str(tmp_path / "generation_config.json") in str(caught.value)


def test_generation_config_that_is_a_folder(tmp_path: Path) -> None:
    copy(LLAMA, tmp_path, generation_config=None)
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)


def test_generation_config_sets_defaults_that_arguments_override(tmp_path: Path) -> None:
    settings = {"do_sample": True, "temperature": 1.3, "top_k": 30, "max_new_tokens": 9, "top_p": None}
    with load(copy(CHARS, tmp_path, generation_config=settings)) as model, load(CHARS) as plain:
        params: dict[str, Any] = {"temperature": 1.3, "top_k": 30, "max_tokens": 9, "seed": 5}
        assert model.generate("The", seed=5).tokens == plain.generate("The", **params).tokens
        assert model.generate("The", temperature=0, max_tokens=20).tokens == plain.generate("The", max_tokens=20).tokens
        assert model.generate("The", seed=5, max_tokens=None).finish_reason == "length"
