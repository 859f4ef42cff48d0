"""What the files beside tokenizer.json change, what they do not, and that this is said.

The ids are those that AutoTokenizer of transformers 5.24 gives for the same folders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from cuplama.errors import TokenizerError
from cuplama.text.tokenizer import Tokenizer
from tests.text.test_tokenizer import byte_fallback_json, write


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
@pytest.mark.parametrize("token", ["", "<|no|>", {"content": "<|no|>", "__type": "AddedToken"}])
def test_a_name_that_tokenizer_json_lacks_counts_as_absent(
    name: str, token: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, {"bos_token": "<s>", "eos_token": "</s>", name: token}))
    assert (tokenizer.bos, tokenizer.eos) == (None if name == "bos_token" else 1, None if name == "eos_token" else 2)
    assert tokenizer.encode("a") == [1, 262]
    content = "<|no|>" if token else ""
    assert caplog.messages == [f"{tmp_path}: {name} = {content!r} is not in tokenizer.json and counts as absent"]


def test_a_model_without_the_named_tokens_has_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Tokenizer.load(write(tmp_path, {"bos_token": None, "pad_token": "[PAD]", "add_bos_token": True}))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("listed", "missing"),
    [
        ({"additional_special_tokens": ["</s>", "<x>", {"content": "<y>"}]}, "'<x>', '<y>'"),
        ({"extra_special_tokens": {"image_token": "<x>", "end_token": "</s>"}}, "'<x>'"),
        ({"additional_special_tokens": ["</s>"], "extra_special_tokens": {}}, None),
        ({"additional_special_tokens": 5, "extra_special_tokens": None}, None),
    ],
)
def test_further_special_tokens_that_tokenizer_json_lacks(
    listed: dict[str, Any], missing: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Tokenizer.load(write(tmp_path, listed)).vocab_size == 265
    path, key = tmp_path / "tokenizer_config.json", next(iter(listed))
    assert caplog.messages == ([f"{path}: {key} {missing} not in tokenizer.json, and left out"] if missing else [])


def test_added_tokens_json(tmp_path: Path) -> None:
    """They are special only if the config names them; the text around is encoded as around any added token."""
    files = {"added_tokens.json": json.dumps({"<y>": 266, "<x>": 265})}
    tokenizer = Tokenizer.load(write(tmp_path, {"eos_token": "<y>"}, **files))
    assert tokenizer.encode("a<y>b") == [1, 262, 266, 259, 261]
    assert (tokenizer.eos, tokenizer.vocab_size) == (266, 267)
    assert tokenizer.special_ids == {0, 1, 2, 266}
    assert tokenizer.decode([262, 266]) == "a"
    assert "<x>" in tokenizer.decode([262, 265])


def test_added_tokens_json_is_left_where_the_config_has_a_list(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"265": {"content": "<x>", "special": True}}}
    tokenizer = Tokenizer.load(write(tmp_path, config, **{"added_tokens.json": '{"<y>": 265}'}))
    assert (tokenizer.piece(265), tokenizer.vocab_size) == ("<x>", 266)


@pytest.mark.parametrize("content", ['{"<y>": 900}', '{"<y>": "x"}', '{"<y>": null}', "[]", "{"])
def test_broken_added_tokens_json(content: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"added_tokens\.json"):
        Tokenizer.load(write(tmp_path, **{"added_tokens.json": content}))


def test_the_flags_of_a_listed_token_count(tmp_path: Path) -> None:
    listed = {
        "2": {"content": "</s>", "special": False, "normalized": False},
        "264": {"content": "\ufffd", "special": True},
    }
    tokenizer = Tokenizer.load(write(tmp_path, {"added_tokens_decoder": listed}))
    assert tokenizer.encode("a</s>\ufffdb") == [1, 262, 2, 264, 259, 261]
    assert tokenizer.special_ids == {0, 1, 264}


def test_a_listed_id_that_tokenizer_json_gives_otherwise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {"added_tokens_decoder": {"7": {"content": "</s>", "special": True}}}
    assert Tokenizer.load(write(tmp_path, config)).encode("</s>", bos=False) == [2]
    assert "gives '</s>' id 7; in tokenizer.json it has 2, and keeps it" in caplog.text


@pytest.mark.parametrize("split", [True, False])
def test_split_special_tokens(split: bool, tmp_path: Path) -> None:
    ids = Tokenizer.load(write(tmp_path, {"split_special_tokens": split})).encode("a</s>b")
    assert ids == ([1, 262, 63, 50, 118, 65, 261] if split else [1, 262, 2, 259, 261])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"add_bos_token": False}, ["add_bos_token = false is not followed: tokenizer.json puts a token in front of"]),
        ({"add_eos_token": True}, ["add_eos_token = true is not followed: tokenizer.json puts no token after a text"]),
        ({"add_prefix_space": False}, ["add_prefix_space = false is not followed: tokenizer.json puts a space in"]),
        ({"add_bos_token": True, "add_eos_token": False, "add_prefix_space": True}, []),
        ({"add_bos_token": None, "add_prefix_space": None}, []),
    ],
)
def test_switches_that_the_post_processor_overrules_are_named(
    config: dict[str, Any], words: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Tokenizer.load(write(tmp_path, {"bos_token": "<s>", "eos_token": "</s>", **config})).encode("a") == [1, 262]
    assert len(caplog.messages) == len(words)
    assert all(word in message for word, message in zip(words, caplog.messages, strict=True))
    assert all("tokenizer_config.json: " in message for message in caplog.messages)


@pytest.mark.parametrize("asked", [True, False, None])
@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("kind", ["GPT2TokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_add_prefix_space_of_byte_level_tokenizers(
    kind: str, written: bool, asked: bool | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two classes follow the config, in a sequence of pre-tokenizers, too; others leave it to tokenizer.json."""
    backend = Backend(models.BPE({"Ġ": 0, "a": 1}, []))
    split = pre_tokenizers.Split(pattern="x", behavior="isolated")
    stage = pre_tokenizers.ByteLevel(add_prefix_space=written, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, stage]) if kind.startswith("Qwen") else stage
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": kind, "add_prefix_space": asked}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    follows = asked is not None and kind != "PreTrainedTokenizerFast"
    assert Tokenizer.load(tmp_path).encode("a") == ([0, 1] if (asked if follows else written) else [1])
    assert len(caplog.messages) == (asked is not None and not follows and asked != written)


@pytest.mark.parametrize("change", [{"version": "2.0"}, {"pre_tokenizer": {"type": "Newer"}}])
def test_a_file_of_a_newer_tokenizers(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({**byte_fallback_json(), **change}))
    with pytest.raises(TokenizerError, match=r"a newer tokenizers than [\d.]+ may read it: pip install -U tokenizers"):
        Tokenizer.load(tmp_path)
