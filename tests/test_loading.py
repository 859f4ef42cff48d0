"""Loading: options, what does not fit, and what a folder's generation_config.json sets."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
import cuplama.loading as load_module
from cuplama import gguf
from cuplama.errors import ConfigError, DeviceError, ParameterError, TokenizerError
from cuplama.hub import find_model
from cuplama.models.config import load_config
from tests.gguf_files import vocabulary_of
from tests.gguf_models import write_chars, write_converted
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
    with pytest.raises(ParameterError, match=r"^kv_cache_dtype = 'int8' is not supported; supported: auto, fp8$"):
        load(CHARS, kv_cache_dtype="int8")
    with pytest.raises(ParameterError, match="device = 'tpu' is not supported"):
        cuplama.load(CHARS, device="tpu")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"dtype": ["float32"]}, r"dtype = \['float32'\] is a list; it must be one of auto, float32"),
        ({"device": None}, "device = None is None; it must be one of auto, cuda, numpy"),
        ({"activations": "int8"}, "activations = 'int8' is not supported; supported: auto, fp8"),
        ({"activations": None}, "activations = None is None; it must be one of auto, fp8"),
        ({"offline": "no"}, "offline = 'no' is a str; it must be True or False"),
        ({"model": 3}, "model = 3 is an int; it must be a folder, a GGUF file, a hub id, or None"),
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
    with pytest.raises(
        ParameterError, match=r"^cache_tokens = 'most' is a str; it must be .* 1073741824, or \"auto\"$"
    ):
        load(LLAMA, cache_tokens="most")
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


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    """By its path, or as the only one in a folder; the text is that of the folder it was made from."""
    path = write_chars(tmp_path / "chars.gguf", general__sampling__temp=0.0)
    with load(CHARS) as model:
        wanted = model.generate("First", max_tokens=20)
    for place in (path, str(path), tmp_path):
        with load(place) as model:  # type: ignore[arg-type]
            found = model.generate("First", max_tokens=20)
            assert (found.text, found.tokens) == (wanted.text, wanted.tokens)
            assert (model.folder, model.name) == (path, str(place))
            assert "GPT2LMHeadModel" in repr(model)


def test_the_bundled_model_as_a_gguf_file(tmp_path: Path) -> None:
    """All that a Llama has: permuted rows, a byte-level vocabulary with merges, BOS and the token that ends a story."""
    folder = find_model(None)
    vocabulary = vocabulary_of(folder, "gpt2", "gpt-2")
    keys: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "add_bos_token": True}
    metadata = {**vocabulary, **{f"tokenizer.ggml.{key}": value for key, value in keys.items()}}
    path = write_converted(folder, tmp_path / "story.gguf", "BF16", **metadata)
    with load(folder) as model:
        wanted = model.generate("Once upon a time", max_tokens=40, temperature=0)
    with load(path) as model:
        found = model.generate("Once upon a time", max_tokens=40, temperature=0)
        assert model.config.dtype == "bfloat16"
        assert (model.bos, set(model.stop_ids)) == (0, {0})
    assert (found.text, found.tokens, found.prompt_tokens) == (wanted.text, wanted.tokens, wanted.prompt_tokens)


def test_a_gguf_file_without_a_tokenizer(tmp_path: Path) -> None:
    path = write_converted(LLAMA, tmp_path / "m.gguf")
    with load(path) as model:
        assert model.generate([5, 6], max_tokens=2).tokens
        with pytest.raises(TokenizerError, match=r"m\.gguf has no tokenizer"):
            model.generate("text")


def test_the_stop_tokens_of_a_gguf_file(tmp_path: Path) -> None:
    path = write_chars(tmp_path / "m.gguf", tokenizer__ggml__eos_token_id=3, tokenizer__ggml__eot_token_id=7)
    with load(path) as model:
        assert model.stop_ids == {3, 7}


def test_several_models_in_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_chars(tmp_path / f"{name}.gguf")
    with pytest.raises(ConfigError, match=r"holds 2 models; name one of the files: a\.gguf, b\.gguf"):
        load(tmp_path)


def test_a_gguf_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads, read = write_chars(tmp_path / "model.gguf"), list[Path](), gguf._read

    def counted(part: Path) -> Any:
        reads.append(part)
        return read(part)

    monkeypatch.setattr(gguf, "_read", counted)
    with cuplama.load(path, device="numpy") as model:
        assert model.generate("a", max_tokens=1).tokens
    assert reads == [path]
