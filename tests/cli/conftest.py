"""Fixtures for the tests of the command line: run a command in this process, and a model that chats."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cuplama.cli.main import main
from tests.tiny import CHARS as CHARS_FOLDER
from tests.tiny import LLAMA as LLAMA_FOLDER

CHARS, LLAMA = str(CHARS_FOLDER), str(LLAMA_FOLDER)
NUMPY = ("--device", "numpy")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: (exit status, stdout, stderr)."""

    def call(*args: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cuplama", *args])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        monkeypatch.setattr(logging, "basicConfig", lambda **options: None)  # it would keep this test's stderr
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    return call


@pytest.fixture
def fails(run: Run) -> Fails:
    """Run something that must end in one line on stderr and status 2; the line."""

    def call(*args: str, stdin: bytes = b"") -> str:
        status, out, err = run(*args, stdin=stdin)
        assert status == 2, err
        assert out == ""
        assert err.count("\n") == 1, err
        assert err.startswith("cuplama: ")
        assert "Traceback" not in err
        assert "internal error" not in err
        return err

    return call


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that chats, without sense but at any length: rotary positions, characters and a template."""
    folder = tmp_path_factory.mktemp("talker")
    shutil.copytree(LLAMA, folder, dirs_exist_ok=True)
    shutil.copy(Path(CHARS) / "tokenizer.json", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20000}))  # any length it is
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}")
    return str(folder)
