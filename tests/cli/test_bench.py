"""``cuplama bench``: what it refuses before it works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import CHARS as CHARS_FOLDER
from tests.tiny import LLAMA as LLAMA_FOLDER

CHARS, LLAMA = str(CHARS_FOLDER), str(LLAMA_FOLDER)
NUMPY = ("--device", "numpy")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


def test_wrong_options_are_refused_before_the_work(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.lab.bench.run", lambda *_: pytest.fail("it works"))
    assert "'0' is not a list of sequence counts such as 1,8" in fails("bench", "-b", "0")
    assert "'1,x' is not a list of token counts such as 512,2048" in fails("bench", "-p", "1,x")
    assert "nothing to measure" in fails("bench", "-p", "0", "-n", "0")
    assert "--dummy-weights needs -m" in fails("bench", "--dummy-weights")  # and no word of the bundled model


def test_progress_is_said_on_stderr_unless_quiet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.lab.bench.run", lambda *args: args[4]("1/2: pp8") or {})
    monkeypatch.setattr("cuplama.lab.bench.text", lambda *_: "table\n")
    assert run("bench") == (0, "table\n", "1/2: pp8\n")
    assert run("bench", "--quiet") == (0, "table\n", "")


def test_a_picture_that_cannot_be_written(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, which says what kinds of pictures there are")
    monkeypatch.setattr("cuplama.lab.bench.run", lambda *_: pytest.fail("it works"))
    monkeypatch.chdir(tmp_path)
    assert "there is no folder nowhere" in fails("bench", "--plot", "nowhere/x.png")
    for name in ("x.doc", "x"):
        assert "the name must end in one of" in fails("bench", "--plot", name)


def test_a_picture_without_matplotlib(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.lab.bench.run", lambda *_: pytest.fail("it works"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "--plot needs matplotlib; pip install 'cuplama[plot]'" in fails("bench", "--plot", "x.png")
