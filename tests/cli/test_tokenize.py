"""``cuplama tokenize``: text to ids and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.tiny import CHARS as CHARS_FOLDER
from tests.tiny import LLAMA as LLAMA_FOLDER

CHARS, LLAMA = str(CHARS_FOLDER), str(LLAMA_FOLDER)
NUMPY = ("--device", "numpy")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


def test_tokenize(run: Run, tmp_path: Path) -> None:
    assert run("tokenize", "It", "-m", CHARS, "--ids") == (0, "21 58\n", "")
    assert run("tokenize", "It", "-m", CHARS)[1].split() == ["21", "'I'", "58", "'t'"]
    assert run("tokenize", "-", "-m", CHARS, "--ids", stdin=b"It\r\n")[1] == "21 58\n"
    assert run("tokenize", "-m", CHARS, "--ids", stdin=b"It\n")[1] == "21 58\n"
    assert run("tokenize", "-p", "It", "-m", CHARS, "--ids")[1] == "21 58\n"
    (tmp_path / "text").write_bytes(b"It\n")
    assert run("tokenize", "-f", str(tmp_path / "text"), "-m", CHARS, "--ids")[1] == "21 58\n"
    assert run("tokenize", "-m", CHARS, "--decode", stdin=b"21 58\n")[1] == "It\n"
    assert run("tokenize", "21, 58", "-m", CHARS, "--decode") == (0, "It\n", "")


def test_a_text_that_is_given_twice_or_not_at_all(fails: Fails) -> None:
    assert "given 2 times, by TEXT and -p" in fails("tokenize", "It", "-p", "It", "-m", CHARS)
    assert "Missing argument 'TEXT'" in fails("tokenize", "-m", CHARS)


def test_ids_that_are_no_tokens(fails: Fails) -> None:
    assert "token id 65 is out of range" in fails("tokenize", "3 65", "-m", CHARS, "--decode")
    assert "token id -1 is out of range" in fails("tokenize", "-m", CHARS, "--decode", "--", "-1")
    assert "takes token ids; 'three' is not a whole number" in fails("tokenize", "three", "-m", CHARS, "--decode")


def test_tokens_that_are_no_characters(run: Run) -> None:
    out = run("tokenize", "🦙", "--no-bos")[1]
    assert [line.split()[1] for line in out.splitlines()] == [r"b'\xf0'", r"b'\x9f'", r"b'\xa6'", r"b'\x99'"]
