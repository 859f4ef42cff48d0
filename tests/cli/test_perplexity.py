"""``cuplama perplexity``: of files and of standard input."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from cuplama.lab.perplexity import Perplexity
from tests.tiny import CHARS as CHARS_FOLDER
from tests.tiny import LLAMA as LLAMA_FOLDER
from tests.tiny import copy

CHARS, LLAMA = str(CHARS_FOLDER), str(LLAMA_FOLDER)
NUMPY = ("--device", "numpy")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


def test_perplexity(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("To be, or not to be, that is the question. " * 5)
    status, out, err = run("perplexity", str(file), "-m", CHARS, *NUMPY, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert (found["tokens"], found["bytes"]) == (214, 215)
    assert found["perplexity"] > 1
    assert found["standard_error"] > 0
    status, out, _ = run(
        "perplexity", "-", "-m", CHARS, *NUMPY, "--window", "20", "--stride", "7", stdin=file.read_bytes()
    )
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["tokens", "nats", "bits", "perplexity"]


def test_perplexity_of_a_file_and_of_standard_input_are_one(run: Run, tmp_path: Path) -> None:
    text = b"To be, or not to be.\n"
    (tmp_path / "text").write_bytes(text)
    file = run("perplexity", str(tmp_path / "text"), "-m", CHARS, *NUMPY, "--json")
    assert run("perplexity", "-", "-m", CHARS, *NUMPY, "--json", stdin=text) == file
    assert run("perplexity", "-m", CHARS, *NUMPY, "--json", stdin=text) == file
    assert run("perplexity", "-f", str(tmp_path / "text"), "-m", CHARS, *NUMPY, "--json") == file
    assert json.loads(file[1])["bytes"] == len(text)


def test_a_warning_of_the_config_comes_once(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text").write_text("To be")
    config = json.loads((CHARS_FOLDER / "config.json").read_text())
    folder = str(copy(CHARS_FOLDER, tmp_path / "model", config={**config, "wat": 3}))
    with caplog.at_level(logging.WARNING, "cuplama"):
        assert run("perplexity", str(tmp_path / "text"), "-m", folder, *NUMPY)[0] == 0
    assert ["wat" in message for message in caplog.messages] == [True]


def test_json_has_no_infinity(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("To be")
    hopeless = Perplexity(tokens=1, nats=1e4, squares=1e8, size=5)
    monkeypatch.setattr("cuplama.lab.perplexity.perplexity", lambda *_: hopeless)
    out = run("perplexity", str(tmp_path / "text"), "-m", CHARS, *NUMPY, "--json")[1]
    assert (json.loads(out)["perplexity"], "Infinity" in out, "NaN" in out) == (None, False, False)


def test_wrong_files(tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    perplexity = ("perplexity", "-m", CHARS, *NUMPY)
    assert "fewer than two tokens" in fails(*perplexity, str(tmp_path / "empty"))
    assert "latin is not valid UTF-8: byte 0xe9 at offset 3" in fails(*perplexity, str(tmp_path / "latin"))
    assert "nothing: No such file" in fails(*perplexity, str(tmp_path / "nothing"))
    assert "Is a directory" in fails(*perplexity, str(tmp_path))
    (tmp_path / "text").write_text("To be or not to be")
    assert "given 2 times, by FILE and -f" in fails(*perplexity, str(tmp_path / "text"), "-f", "other")
    for option, value, words in (
        ("--context", "1", "--context = 1 is too short; a window needs at least 2 tokens"),
        ("--window", "1", "--window = 1 is out of range; it must be from 2 to 80"),
        ("--window", "81", "--window = 81 is out of range"),
        ("--stride", "0", "--stride = 0 is out of range; it must be from 1 to 79"),
        ("--stride", "80", "--stride = 80 is out of range"),
    ):
        assert words in fails(*perplexity, str(tmp_path / "text"), option, value)
