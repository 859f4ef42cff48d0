"""``cuplama models`` and ``cuplama pull``: what is in the cache, whether it runs, and how it comes there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cuplama import hub
from cuplama.cli.runnable import why_not
from cuplama.hub import CachedModel
from tests.fake_hub import fake_hub
from tests.tiny import CHARS as CHARS_FOLDER
from tests.tiny import LLAMA as LLAMA_FOLDER

Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]
Progress = Callable[[int, int], None]


def _with_config(folder: Path, **changes: object) -> Path:
    """A copy of the model of characters whose config.json says something else."""
    shutil.copytree(CHARS_FOLDER, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A model of an architecture that nobody has."""
    return _with_config(tmp_path / "strange", architectures=["BertModel"], model_type="bert")


def test_models(run: Run, strange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = [CachedModel("Me/chars", CHARS_FOLDER, 999, 0.0), CachedModel("org/strange", strange, 1_234_567, 0.0)]
    monkeypatch.setattr(hub, "cached_models", lambda: cached)
    status, out, err = run("models")
    assert (status, err) == (0, "")
    header, first, second = out.splitlines()
    assert header.split() == ["model", "size", "runs"]
    assert first.split() == ["Me/chars", "999", "B", "yes"]
    assert second.split()[:4] == ["org/strange", "1.2", "MB", "no:"]
    assert "BertModel" in second
    assert str(strange) not in second
    found = json.loads(run("models", "--json")[1])
    assert [m["model"] for m in found] == ["Me/chars", "org/strange"]
    assert [(m["runs"], m["bytes"], m["folder"]) for m in found] == [
        (True, 999, str(CHARS_FOLDER)),
        (False, 1_234_567, str(strange)),
    ]
    assert found[0]["reason"] is None
    assert "BertModel" in found[1]["reason"]


def test_an_empty_cache_says_what_fills_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "cached_models", list)
    assert run("models") == (0, "", "cuplama: no model was downloaded yet; cuplama pull ORG/NAME downloads one\n")
    assert run("models", "-q") == (0, "", "")
    assert run("models", "--json") == (0, "[]\n", "")


def test_reasons_are_a_few_words(tmp_path: Path) -> None:
    assert why_not(CHARS_FOLDER) is None
    assert why_not(tmp_path) == "config.json does not exist"
    assert why_not(LLAMA_FOLDER) == "tokenizer.json does not exist"
    (wrong := _with_config(tmp_path / "wrong")).joinpath("generation_config.json").write_text('{"top_p": 2}')
    assert str(why_not(wrong)).startswith("generation_config.json: top_p = 2 is out of range")
    (folder := _with_config(tmp_path / "model")).joinpath("model.safetensors").unlink()
    assert str(why_not(folder)).startswith("has no model.safetensors")


def test_pull(run: Run, strange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, *, revision: str | None, progress: Progress) -> Path:
        asked.append((repository, revision))
        progress(1, 2)
        progress(2, 2)
        return CHARS_FOLDER if repository == "me/chars" else strange

    monkeypatch.setattr(hub, "pull", download)
    assert run("pull", "me/chars") == (0, f"{CHARS_FOLDER}\n", "")
    assert run("pull", "me/chars", "--revision", "v2") == (0, f"{CHARS_FOLDER}\n", "")
    assert asked == [("me/chars", None), ("me/chars", "v2")]
    status, out, err = run("pull", "org/strange")
    assert (status, out) == (0, f"{strange}\n")
    assert err.startswith("cuplama: org/strange does not run here: ")
    assert err.count("\n") == 1
    assert run("pull", "org/strange", "--quiet") == (0, out, "")


def test_from_the_hub_to_a_text(run: Run, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was pulled is listed, completed by its name, and runs without the hub."""
    generate = ("generate", "First", "--device", "numpy", "-n", "5", "-q", "-m")
    with fake_hub(tmp_path, monkeypatch) as found:
        found.add("me/chars", CHARS_FOLDER)
        status, out, err = run("pull", "me/chars")
        assert (status, err) == (0, "")
        assert (Path(out.rstrip("\n")) / "config.json").exists()
        assert run("pull", "me/chars") == (0, out, "")
        assert [line.split()[0] for line in run("models")[1].splitlines()] == ["model", "me/chars"]
        assert run("models")[1].rstrip().endswith("yes")
        text = run(*generate, str(CHARS_FOLDER))
        assert text[0] == 0
        assert run(*generate, "me/chars") == text
        asked = len(found.fetched)
        assert run(*generate, "me/chars", "--offline") == text
        assert json.loads(run(*generate, "me/chars", "--offline", "--json")[1])["model"] == "me/chars"
        assert len(found.fetched) == asked
        assert "no such repository on the hub" in fails("pull", "me/nothing")


def test_what_is_no_hub_id_is_refused(fails: Fails) -> None:
    assert "is not a hub id of the form org/name" in fails("pull", "../there")
    assert "Missing argument 'ORG/NAME'" in fails("pull")
