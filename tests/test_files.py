"""What is said of files that are not what their name says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cuplama.errors import CheckpointError, ConfigError, CuplamaError, TokenizerError
from cuplama.files import is_missing, read_json, read_optional_json
from cuplama.models.checkpoint import open_tensors
from cuplama.models.config import load_config
from cuplama.text.tokenizer import Tokenizer
from tests.tiny import CHARS, copy

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234567\n"
CONTENTS = {
    "pointer": (POINTER, r" is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"),
    "page": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", " is a web page, most likely an error"),
    "page with a mark": (b"\xef\xbb\xbf<HTML>", " is a web page, most likely an error"),
    "empty": (b"", ": it is empty; download it again"),
}
MARKED = (b"\xef\xbb\xbf{}", ": it starts with a byte order mark; save it as UTF-8 without one")


def _read(path: Path) -> None:
    """Read a file by what reads files of its name."""
    if path.name == "model.safetensors":
        open_tensors(path.parent)
    elif path.name.startswith("token"):
        Tokenizer.load(path.parent)
    else:
        read_json(path)


def _refusal(path: Path, error: type[CuplamaError]) -> str:
    with pytest.raises(error) as caught:
        _read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("content", "words"), CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("config.json", ConfigError),
        ("tokenizer.json", TokenizerError),
        ("tokenizer_config.json", TokenizerError),
        ("model.safetensors", CheckpointError),
    ],
)
def test_a_file_that_is_something_else(
    name: str, error: type[CuplamaError], content: bytes, words: str, tmp_path: Path
) -> None:
    path = copy(CHARS, tmp_path) / name
    path.write_bytes(content)
    assert re.match(f"{path}.*{words}", _refusal(path, error))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_byte_order_mark_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(MARKED[0])
    assert MARKED[1] in _refusal(tmp_path / name, TokenizerError if name == "tokenizer.json" else ConfigError)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_links_that_lead_nowhere_and_folders(name: str, tmp_path: Path) -> None:
    """As in a copy of the hub's cache without its blobs. An optional file is not taken for one that is not there."""
    path = copy(CHARS, tmp_path) / name
    path.unlink(missing_ok=True)
    path.symlink_to("../blobs/0123")
    error = {"config.json": ConfigError, "model.safetensors": CheckpointError}.get(name, TokenizerError)
    assert f"cannot read {path}: it is a link to ../blobs/0123, which leads nowhere" in _refusal(path, error)
    path.unlink()
    path.symlink_to(path)  # a link to itself
    assert _refusal(path, error).startswith(f"cannot read {path}: ")
    path.unlink()
    path.mkdir()
    assert re.search("is a folder|Is a directory", _refusal(path, error))


@pytest.mark.parametrize(
    ("method", "name", "error"),
    [("read_text", "config.json", ConfigError), ("open", "model.safetensors", CheckpointError)],
)
def test_files_that_must_not_be_read(
    method: str, name: str, error: type[CuplamaError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy(CHARS, tmp_path) / name

    def denied(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, method, denied)
    assert _refusal(path, error) == f"cannot read {path}: Permission denied"


def test_a_folder_that_must_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not said to lack its files."""

    def denied(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    for method in ("lstat", "read_text"):
        monkeypatch.setattr(Path, method, denied)
    with pytest.raises(ConfigError, match="Permission denied"):
        load_config(tmp_path)


def test_a_file_that_a_folder_need_not_have(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert read_optional_json(path) == {}
    path.write_text("{}{")
    with pytest.raises(TokenizerError, match="not valid JSON"):
        read_optional_json(path, TokenizerError)
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="leads nowhere"):
        read_optional_json(path)


def test_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    found = {name: is_missing(tmp_path / name) for name in ("file", "link", "nothing", "file/inside", "nothing/inside")}
    assert found == {"file": False, "link": False, "nothing": True, "file/inside": True, "nothing/inside": True}
