"""Repositories that hold GGUF files alone: which one is downloaded, and how it is found again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import cuplama
from cuplama.cli.runnable import why_not
from cuplama.errors import ConfigError
from cuplama.hub import cached_models, find_model, pull
from tests.fake_hub import FakeHub, fake_hub
from tests.gguf_models import write_chars
from tests.tiny import CHARS


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache", monkeypatch) as found:
        yield found


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return write_chars(tmp_path / "m.gguf").read_bytes()


def test_the_only_file_is_downloaded_and_runs(hub: FakeHub, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("org/one", {"README.md": b"#", "mmproj-F16.gguf": b"x", "one-Q8_0.gguf": content})
    seen: list[tuple[int, int]] = []
    path = find_model("org/one", progress=lambda done, total: seen.append((done, total)))
    assert (path.name, hub.fetched) == ("one-Q8_0.gguf", ["one-Q8_0.gguf"])
    assert (seen[0], seen[-1]) == ((0, len(content)), (len(content), len(content)))
    with cuplama.load("org/one", device="numpy") as model:
        assert model.generate("First", max_tokens=2).text
        assert model.folder == path
    assert find_model("org/one", offline=True) == path
    assert caplog.messages == []  # nothing of config files that are not there


def test_one_of_several(hub: FakeHub, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("big-Q4_K_M.gguf", "big-Q8_0.gguf", "big-F16.gguf")
    hub.add("org/big", {name: content + bytes(i) for i, name in enumerate(names)})
    assert pull("org/big").name == "big-Q4_K_M.gguf"
    assert pull("org/big:q8_0").name == "big-Q8_0.gguf"
    assert find_model("org/big@main:big-F16.gguf").name == "big-F16.gguf"
    assert sorted(hub.fetched) == sorted(names)
    with pytest.raises(ConfigError, match=r"^org/big: none of its GGUF files is Q2_K; name one of big-F16\.gguf, "):
        pull("org/big:Q2_K")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model("org/big:Q8_0").name == "big-Q8_0.gguf"


def test_several_and_none_is_usual(hub: FakeHub) -> None:
    hub.add("org/odd", {"a-Q2_K.gguf": b"x", "a-Q3_K_S.gguf": b"x"})
    with pytest.raises(ConfigError) as caught:
        pull("org/odd")
    assert str(caught.value) == (
        "org/odd: it has 2 GGUF files; name one of a-Q2_K.gguf, a-Q3_K_S.gguf, as in org/odd:Q2_K"
    )
    assert hub.fetched == []


def test_all_files_of_a_split_model(hub: FakeHub) -> None:
    names = [f"Q8_0/m-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    hub.add("org/split", {names[0]: b"1", names[1]: b"2", "m-Q2_K.gguf": b"3"})
    path = pull("org/split:Q8_0")
    assert path.as_posix().endswith(names[0])
    assert sorted(hub.fetched) == names


def test_safetensors_come_first_and_a_tag_asks_for_the_other(hub: FakeHub, content: bytes) -> None:
    hub.add("org/both", CHARS, {"m-Q8_0.gguf": content})
    assert pull("org/both").is_dir()
    assert "m-Q8_0.gguf" not in hub.fetched
    assert pull("org/both:Q8_0").name == "m-Q8_0.gguf"
    assert pull("org/both").is_dir()


def test_the_files_in_the_cache_by_names_that_find_them(hub: FakeHub, content: bytes) -> None:
    hub.add("org/big", {"big-Q4_K_M.gguf": content, "big-Q8_0.gguf": b"GGUF"})
    hub.add("org/chars", CHARS)
    paths = [pull(f"org/big:{tag}") for tag in ("Q4_K_M", "Q8_0")]
    pull("org/chars")
    found = {m.repository: m for m in cached_models()}
    assert list(found) == ["org/big:Q4_K_M", "org/big:Q8_0", "org/chars"]
    assert [found[f"org/big:{tag}"].folder for tag in ("Q4_K_M", "Q8_0")] == paths
    assert found["org/big:Q4_K_M"].size == len(content)
    assert [find_model(name, offline=True) for name in list(found)[:2]] == paths
    assert why_not(paths[0]) is None
    assert why_not(paths[1]) == "version has 4 bytes, but 0 are left"
