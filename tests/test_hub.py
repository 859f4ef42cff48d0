"""From a name to a folder: local folders, hub ids, and the files that are fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils._paths import filter_repo_objects

import cuplama
from cuplama import Model
from cuplama.errors import ConfigError
from cuplama.hub import BUNDLED, HUB_FILES, find_model
from tests.tiny import CHARS


def test_folders_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for model, words in (
        (tmp_path / "nowhere", "nowhere' does not exist, and is not a hub id of the form org/name"),
        ("nowhere", "'nowhere' does not exist, and is not a hub id"),
        ("a/b/c", "does not exist, and is not a hub id"),
        (file, "is a file; give the folder"),
        (tmp_path, r"config\.json does not exist"),
        ("", "'' does not exist"),
        ("x" * 5000, "cannot open x+: File name too long"),
        ("~no-such-user-1/x", "cannot open"),
        ("a\0b", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            cuplama.load(model, device="numpy")
        assert len(str(caught.value)) < 300

    def denied(self: Path, **options: Any) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", denied)
    with pytest.raises(ConfigError, match="cannot open /root/x: Permission denied"):
        find_model("/root/x")


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(CHARS)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", download)
        with load_hub("org/model-1.0") as model:
            assert model.folder == CHARS
        find_model("org/model", offline=True)
    assert [(name, o["local_files_only"]) for name, o in asked] == [("org/model-1.0", False), ("org/model", True)]
    assert asked[0][1]["allow_patterns"] == list(HUB_FILES)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"not in the local cache, and the hub is off limits \(offline\)"):
        find_model("cuplama-test/nothing", offline=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="off limits") as caught:
        find_model("cuplama-test/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no such folder"):
        find_model("org/bad--name..git")


def load_hub(name: str) -> Model:
    return cuplama.load(name, device="numpy", offline=False)


# What repositories hold -> whether it is fetched.
FILES = {
    "config.json": True,
    "generation_config.json": True,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "special_tokens_map.json": True,
    "chat_template.jinja": True,
    "chat_template.json": True,
    "model.safetensors": True,
    "model-00001-of-00004.safetensors": True,
    "model.safetensors.index.json": True,
    "consolidated.safetensors": False,  # Mistral's own layout of the same weights
    "pytorch_model.bin": False,
    "pytorch_model-00001-of-00002.bin": False,
    "original/consolidated.00.pth": False,
    "tf_model.h5": False,
    "flax_model.msgpack": False,
    "onnx/model.onnx": False,
    "model-q4.gguf": False,
    "tokenizer.model": False,
    "README.md": False,
}


@pytest.mark.parametrize("name", FILES)
def test_which_files_of_a_repository_are_fetched(name: str) -> None:
    """By the hub's own filter, so that a pattern means here what it means there."""
    found = list(filter_repo_objects([name], allow_patterns=list(HUB_FILES)))
    assert found == ([name] if FILES[name] else [])


def test_the_bundled_model_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name comes before it, as before a hub id."""
    monkeypatch.chdir(tmp_path)
    assert find_model(BUNDLED) == find_model(None)
    (tmp_path / BUNDLED).mkdir()
    assert find_model(BUNDLED) == Path(BUNDLED)
