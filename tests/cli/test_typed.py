"""What is typed or pasted into a terminal becomes texts."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.cli.processes import Terminal, environment
from tests.paths import ROOT

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from cuplama.cli.typed import line_history, typed_texts
with line_history():
    for text in typed_texts():
        print(f"<{text!r}>")
"""


def typing(home: Path, term: str = "dumb") -> Terminal:
    """A terminal in which the program above waits for the first text."""
    env = environment(HOME=str(home), XDG_CONFIG_HOME=str(home), TERM=term, PYTHONIOENCODING="utf-8:strict")
    terminal = Terminal([sys.executable, "-c", PROGRAM, str(ROOT)], env)
    terminal.until("> ")
    return terminal


def texts(terminal: Terminal, sent: str) -> str:
    """Send this; what of it becomes texts."""
    terminal.send(sent)
    terminal.until("<")
    text = terminal.until(">\r\n")
    terminal.until("> ")
    return text


def test_lines(tmp_path: Path) -> None:
    terminal = typing(tmp_path)
    assert texts(terminal, "one\n") == "'one'"
    assert texts(terminal, "  one \n") == "'  one'"
    terminal.send("\n")
    terminal.until("> ")
    terminal.send("one\\\n")
    terminal.until(". ")
    assert texts(terminal, "two\n") == "'one\\ntwo'"
    terminal.send("\x04")
    assert terminal.status() == 0


def test_lines_pasted_together_are_one_text(tmp_path: Path) -> None:
    """Also where the terminal does not say that it pastes, and where the last line has no end."""
    terminal = typing(tmp_path)
    assert texts(terminal, "one\ntwo\n\n  three\\\nfour\n") == "'one\\ntwo\\n\\n  three\\\\\\nfour'"
    terminal.send("one\rtwo")
    terminal.until(". two")
    time.sleep(0.1)
    assert texts(terminal, "\r") == "'one\\ntwo'"
    terminal.send("one\\\n")  # the end of a paste goes on as a line does
    terminal.until(". ")
    assert texts(terminal, "two\nthree\n") == "'one\\ntwo\\nthree'"


def test_a_long_paste_is_one_text(tmp_path: Path) -> None:
    """More than the 4096 bytes that Linux keeps of what is typed ahead."""
    lines = [f"line {i} " + "x" * 50 for i in range(150)]
    assert texts(typing(tmp_path), "\n".join(lines) + "\n") == repr("\n".join(lines))


def test_a_terminal_that_says_what_is_pasted(tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit does not know bracketed paste")
    terminal = typing(tmp_path, "xterm")
    terminal.send("\x1b[200~one\rtwo\x1b[201~")
    terminal.until("two")
    time.sleep(0.1)
    assert texts(terminal, "\r") == "'one\\ntwo'"


def test_ctrl_c_drops_what_is_typed(tmp_path: Path) -> None:
    terminal = typing(tmp_path)
    for half in ("half a line", "one\\\nhalf a line"):
        terminal.send(half)
        terminal.until("half a line")
        time.sleep(0.3)  # until Python's readline waits again: it sees a signal only there
        terminal.send("\x03")
        assert "(/exit or Ctrl-D leaves)" in terminal.until("\r\n> ")
        assert texts(terminal, "whole\n") == "'whole'"


def test_the_end_of_input_gives_what_was_held(tmp_path: Path) -> None:
    terminal = typing(tmp_path)
    terminal.send("one\\\n")
    terminal.until(". ")
    terminal.send("\x04")
    assert terminal.until(">\r\n").endswith("<'one'")
    assert terminal.status() == 0


def test_the_history_survives(tmp_path: Path) -> None:
    terminal = typing(tmp_path)
    for text in ("one", "two"):
        texts(terminal, f"{text}\n")
    terminal.send("\x04")
    assert terminal.status() == 0
    assert (tmp_path / "cuplama" / "chat_history").read_text() == "one\ntwo\n"
    assert texts(typing(tmp_path), "\x1b[A\x1b[A\n") == "'one'"  # two lines up


def test_what_is_not_utf8_is_said(tmp_path: Path) -> None:
    terminal = typing(tmp_path)
    terminal.send_bytes(b"\xff\n")
    assert "UTF-8" in terminal.until("> ")
    assert texts(terminal, "one\n") == "'one'"
