"""From a name to a folder: local folders, hub ids, and the files that are fetched."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils._paths import filter_repo_objects

import cuplama
from cuplama import Model
from cuplama.errors import ConfigError
from cuplama.hub import BUNDLED, HUB_FILES, cached_models, find_model, pull, weight_files
from cuplama.models.checkpoint import INDEX
from tests.adapters import write_adapter
from tests.fake_hub import FakeHub, commit_of, fake_hub
from tests.tiny import CHARS


def test_folders_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    file = tmp_path / "model.bin"
    file.write_bytes(b"GGML")
    for model, words in (
        (tmp_path / "nowhere", "nowhere' does not exist, and is not a hub id of the form org/name"),
        ("nowhere", "'nowhere' does not exist, and is not a hub id"),
        ("a/b/c", "does not exist, and is not a hub id"),
        (file, "model.bin is a file; give the folder that holds config.json and the weights, or a GGUF file"),
        ("models/small.gguf", "'models/small.gguf' does not exist"),
        (tmp_path / "folder", r"config\.json does not exist"),
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


# What repositories hold -> whether it is fetched beside the weights.
FILES = {
    "config.json": True,
    "generation_config.json": True,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "special_tokens_map.json": True,
    "added_tokens.json": True,
    "chat_template.jinja": True,
    "chat_template.json": True,
    "additional_chat_templates/tool_use.jinja": True,
    "model.safetensors.index.json": True,
    "adapter_config.json": True,
    "params.json": False,
    "consolidated.safetensors": False,  # Mistral's own layout of the same weights
    "pytorch_model.bin": False,
    "pytorch_model.bin.index.json": False,
    "original/consolidated.00.pth": False,
    "original/config.json": False,
    "tf_model.h5": False,
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


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def index(*shards: Any) -> dict[str, Any]:
    return {"weight_map": {f"tensor {i}": shard for i, shard in enumerate(shards)}}


@pytest.mark.parametrize(
    ("names", "listed", "wanted"),
    [
        (["model.safetensors", "consolidated.safetensors"], None, ["model.safetensors"]),
        (["model.safetensors", *SHARDS], index(*SHARDS), ["model.safetensors"]),  # as transformers reads it
        ([*SHARDS, "model-00003-of-00003.safetensors"], index(SHARDS[1], *SHARDS), SHARDS),  # left over from others
        (["weights/a.safetensors", "b.safetensors"], index("weights/a.safetensors"), ["weights/a.safetensors"]),
        (SHARDS[:1], index(*SHARDS), SHARDS[:1]),  # loading will name the other
        (["odd.safetensors", "onnx/x.safetensors", "pytorch_model.bin"], None, ["odd.safetensors"]),
        (["adapter_model.safetensors", "optimizer.safetensors"], None, ["adapter_model.safetensors"]),
        (["adapter_model.safetensors", "model.safetensors"], None, ["model.safetensors"]),
        (SHARDS, None, []),
        (SHARDS, {"weight_map": None}, []),
        (SHARDS, index(5, [1]), []),
        ([], None, []),
    ],
)
def test_the_weights_are_those_that_will_be_read(
    names: list[str], listed: dict[str, Any] | None, wanted: list[str]
) -> None:
    assert weight_files(names, listed) == wanted


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache", monkeypatch) as found:
        yield found


OTHER = {"README.md": b"#", "pytorch_model.bin": b"x", "consolidated.safetensors": b"x", "params.json": b"{}"}


def test_a_download_from_a_hub(hub: FakeHub) -> None:
    template = "additional_chat_templates/tool_use.jinja"
    hub.add("org/model", CHARS, OTHER, {template: b"{{ messages }}"})
    seen: list[tuple[int, int]] = []
    folder = find_model("org/model", progress=lambda done, total: seen.append((done, total)))
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", template}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(hub.fetched) == names
    total = sum((folder / name).stat().st_size for name in names)
    assert seen == sorted(seen)
    assert seen[0] == (total - (CHARS / "model.safetensors").stat().st_size, total)
    assert seen[-1] == (total, total)
    hub.fetched.clear()
    with load_hub("org/model") as model:
        assert model.folder == folder
        assert model.generate("The", max_tokens=1).tokens
    assert find_model("org/model", offline=True) == folder
    assert hub.fetched == []


def test_an_adapter_from_a_hub(hub: FakeHub, tmp_path: Path) -> None:
    """With the checkpoints that a trainer left beside it."""
    folder = write_adapter(tmp_path, CHARS, ["c_attn"])
    hub.add("org/adapter", folder, {"optimizer.safetensors": b"x", "adapter_model.bin": b"x"})
    found, wanted = (cuplama.load(CHARS, device="numpy", adapter=a) for a in ("org/adapter", folder))
    with found, wanted:
        assert set(hub.fetched) == {"adapter_config.json", "adapter_model.safetensors"}
        assert found.adapter == "org/adapter"
        assert np.array_equal(found.logits([1, 2]), wanted.logits([1, 2]))


def test_shards_by_the_index_and_one_commit(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch may move on between configs and weights: the rest is asked for by the commit that came first."""
    content = dict.fromkeys((*SHARDS, "old.safetensors"), b"weights")
    hub.add("org/sharded", content, {"config.json": b"{}", INDEX: json.dumps(index(*SHARDS)).encode()})
    asked: list[str | None] = []
    for name in ("snapshot_download", "list_repo_tree"):
        real = getattr(huggingface_hub, name)

        def noted(*args: Any, real: Any = real, **options: Any) -> Any:
            asked.append(options["revision"])
            return real(*args, **options)

        monkeypatch.setattr(huggingface_hub, name, noted)
    folder = pull("org/sharded")
    assert {p.name for p in folder.glob("*.safetensors")} == set(SHARDS)
    assert asked == [None, folder.name, folder.name] == [None, *[commit_of("main")] * 2]
    assert hub.commits == {folder.name}


def test_a_revision(hub: FakeHub) -> None:
    hub.add("org/model", CHARS)
    hub.add("org/model", CHARS, {"tokenizer_config.json": b"{}"}, revision="v2")
    folders = [pull("org/model"), pull("org/model@v2"), find_model("org/model@v2"), pull("org/model", revision="v2")]
    assert folders[1] == folders[2] == folders[3] != folders[0]
    assert (folders[1] / "tokenizer_config.json").exists()
    assert find_model("org/model@v2", offline=True) == folders[1]
    assert find_model(f"org/model@{commit_of('main')}", offline=True) == folders[0]


def test_a_hub_that_is_out_of_reach(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache has will do; without it, one line."""
    hub.add("org/model", CHARS)
    hub.add("org/other", CHARS)
    folder = pull("org/model")

    def lost(*args: Any, **options: Any) -> Any:
        raise ConnectionError("the line is\ncut")

    monkeypatch.setattr(huggingface_hub, "list_repo_tree", lost)
    assert pull("org/model") == folder
    with pytest.raises(ConfigError, match=r"org/other: no such folder, and the hub cannot be reached: the line is$"):
        pull("org/other")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "org/gated",
            r"org/gated: access is restricted: ask for it at http.*/org/gated, then log in with `hf auth login`",
        ),
        (
            "org/nothing",
            "no such folder, and no such repository on the hub; if it is a private one, log in with `hf auth",
        ),
        ("org/model@v9", "org/model: the hub has no revision 'v9' of it"),
        ("org/broken", r"index\.json is not valid JSON"),
    ],
)
def test_what_a_hub_refuses(name: str, words: str, hub: FakeHub) -> None:
    hub.add("org/gated", CHARS)
    hub.gated.add("org/gated")
    hub.add("org/model", CHARS)
    hub.add("org/broken", {"config.json": b"{}", INDEX: b"{"})
    with pytest.raises(ConfigError, match=words) as caught:
        find_model(name)
    assert "\n" not in str(caught.value)


def test_a_copy_that_another_program_made_of_some_files(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the hub it is what there is; newer versions of the hub's library say that files are missing."""
    hub.add("org/model", CHARS)
    some = ["config.json", "tokenizer.json", "model.safetensors"]
    folder = Path(snapshot_download("org/model", allow_patterns=some))
    assert find_model("org/model", offline=True) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with cuplama.load("org/model", device="numpy") as model:
        assert model.generate("First", max_tokens=1).tokens
    assert all("the local copy lacks files that the hub has" in m for m in caplog.messages)
    with pytest.raises(ConfigError, match="it is not in the local cache"):
        find_model("org/other", offline=True)


def test_a_repository_without_weights_that_can_be_read(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("org/old", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    assert {p.name for p in pull("org/old").iterdir()} == {"config.json"}
    assert caplog.messages == ["org/old has no safetensors that say how they belong: pytorch_model.bin cannot be read"]


@pytest.mark.parametrize(
    ("files", "words"), [({"a.bin": b"x", "b.pt": b"x"}, ": a.bin, b.pt cannot be read"), ({}, "")]
)
def test_a_repository_in_another_layout(hub: FakeHub, files: dict[str, bytes], words: str) -> None:
    hub.add("org/other", {"README.md": b"#", **files})
    with pytest.raises(ConfigError) as caught:
        cuplama.load("org/other", device="numpy")
    assert str(caught.value) == f"org/other: it has no config.json, so it is no model in Hugging Face layout{words}"


def test_a_cache_that_cannot_be_written(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(
        ConfigError, match=r"org/model: the local cache .*cache cannot be written: No space left on device"
    ):
        pull("org/model")


def test_the_models_in_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    assert cached_models() == []
    for name in ("Org/b", "org/a"):
        hub.add(name, CHARS)
    hub.add("org/a", CHARS, {"tokenizer_config.json": b"{}"}, revision="v2")
    before = time.time() - 60
    folders = [pull("org/a"), pull("Org/b")]
    pull("org/a@v2")
    (tmp_path / "cache" / "datasets--org--x").mkdir()
    found = cached_models()
    assert [(m.repository, m.folder) for m in found] == [("org/a", folders[0]), ("Org/b", folders[1])]
    assert found[1].size == sum(p.stat().st_size for p in folders[1].iterdir())
    assert found[0].size == found[1].size + 2  # all revisions, and what they share once
    assert all(before < m.last_used < before + 120 for m in found)


def test_names_that_are_no_hub_ids() -> None:
    for name in ("gpt2", "a/b/c", "org/model@", "", "../x/y"):
        with pytest.raises(ConfigError, match=r"is not a hub id of the form org/name\[@revision\]"):
            pull(name)


def test_a_file_of_a_model_names_its_folder(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(ConfigError, match=f"{name} is a file; give the folder that holds .*weights: {tmp_path}$"):
            find_model(tmp_path / name)
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("link", "loop"):
        with pytest.raises(ConfigError, match=f"{name} is a link to .*, which leads nowhere"):
            find_model(tmp_path / name)
