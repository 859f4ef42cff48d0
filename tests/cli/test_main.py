"""The command line as a whole: help, usage, models that are broken, and how what goes wrong ends."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cuplama
from cuplama.cli.main import cli
from cuplama.errors import ConfigError
from tests.cli.processes import LAUNCHER, environment
from tests.paths import ROOT
from tests.tiny import CHARS as CHARS_FOLDER
from tests.tiny import LLAMA as LLAMA_FOLDER

CHARS, LLAMA = str(CHARS_FOLDER), str(LLAMA_FOLDER)
NUMPY = ("--device", "numpy")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_help(command: str, run: Run) -> None:
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: cuplama {command} ")


def test_help_of_the_whole(run: Run) -> None:
    for args in (("--help",), ("-h",)):
        status, out, err = run(*args)
        assert (status, err) == (0, "")
        assert all(name in out for name in cli.commands)
    status, out, err = run()
    assert status in (0, 2)
    assert "Commands:" in out + err
    assert run("--version")[1] == f"cuplama, version {cuplama.__version__}\n"


def test_wrong_usage(fails: Fails) -> None:
    assert "No such command 'genrate'" in fails("genrate")
    assert "Missing argument 'PROMPT'" in fails("generate")
    assert "(cuplama generate --help)" in fails("generate")
    assert "requires an argument" in fails("generate", "x", "-m")


def broken(folder: Path, fault: str) -> Path:
    """A copy of a model with one fault."""
    shutil.copytree(LLAMA, folder, dirs_exist_ok=True)
    weights, config = folder / "model.safetensors", folder / "config.json"
    data = weights.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    if fault == "no config":
        config.unlink()
    elif fault == "not JSON":
        config.write_text("{'a': 1}")
    elif fault == "truncated":
        weights.write_bytes(data[:-9])
    elif fault == "long header":
        weights.write_bytes(struct.pack("<Q", len(data)) + data[8:])
    elif fault == "overlap":
        first, second = [n for n in header if n != "__metadata__"][:2]
        header[second]["data_offsets"] = header[first]["data_offsets"]
        text = json.dumps(header).encode()
        weights.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    elif fault == "shape":
        raw = json.loads(config.read_text())
        config.write_text(json.dumps({**raw, "intermediate_size": raw["intermediate_size"] + 1}))
    elif fault == "generation":
        (folder / "generation_config.json").write_text("[")
    elif fault == "no weights":
        weights.unlink()
    elif fault == "experts":
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_local_experts": 8}))
    return folder


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no config", "config.json does not exist"),
        ("not JSON", "config.json is not valid JSON"),
        ("truncated", "model.safetensors is truncated or corrupt"),
        ("long header", "model.safetensors is truncated or corrupt"),
        ("overlap", "model.safetensors is truncated or corrupt"),
        ("shape", "config.json asks for"),
        ("generation", "generation_config.json is not valid JSON"),
        ("no weights", "has no model.safetensors"),
        ("experts", "num_local_experts = 8 is not supported"),
        ("no tokenizer", "tokenizer.json does not exist"),
    ],
)
def test_broken_folders(fault: str, words: str, tmp_path: Path, fails: Fails) -> None:
    folder = broken(tmp_path / "model", fault)
    message = fails("generate", "Hi", "-m", str(folder), *NUMPY)
    assert words in message
    assert str(folder) in message


def test_wrong_models(tmp_path: Path, fails: Fails) -> None:
    for command in (("generate", "x"), ("info",), ("graph",), ("tokenize", "x"), ("chat",), ("perplexity", __file__)):
        assert "does not exist" in fails(*command, "-m", str(tmp_path / "nowhere"))
    assert "is a file; give the folder" in fails("info", "-m", __file__)
    assert "'' does not exist" in fails("info", "-m", "")
    assert "nowhere\\nat all" in fails("info", "-m", "nowhere\nat all")
    assert "tokenizer.json does not exist" in fails("tokenize", "x", "-m", LLAMA)
    assert "no chat template" in fails("chat", "-m", CHARS, *NUMPY)


def test_hub_ids_offline(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    begin = time.perf_counter()
    message = fails("generate", "x", "-m", "cuplama-test/nothing", "--offline")
    assert "cuplama-test/nothing: no such folder, and as a hub id: it is not in the local cache" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline" in fails("info", "-m", "cuplama-test/nothing")
    assert time.perf_counter() - begin < 5


def test_debug_shows_the_traceback(run: Run) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        run("info", "-m", "/nowhere", "--debug")


def test_what_is_no_ones_fault_is_called_internal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("cuplama.cli.running.load", bug)
    status, _, err = run("generate", "x", "-m", CHARS)
    assert (status, err) == (1, "cuplama: internal error: ZeroDivisionError: two lines (--debug shows where)\n")


def test_as_a_process() -> None:
    done = subprocess.run(
        [*LAUNCHER, "generate", "-", "-m", CHARS, *NUMPY, "-n", "5"],
        input=b"First\xff", capture_output=True, env=environment(), timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"cuplama: standard input is not valid UTF-8: byte 0xff at offset 5\n"
    done = subprocess.run(
        [*LAUNCHER, "tokenize", b"caf\xe9", "-m", CHARS], capture_output=True, env=environment(), timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


def test_as_a_module() -> None:
    args = [sys.executable, "-m", "cuplama", "--version"]
    done = subprocess.run(args, capture_output=True, env=environment(), timeout=60, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"cuplama, version {cuplama.__version__}\n", "")
