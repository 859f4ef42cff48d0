"""What type checkers say of right and wrong calls: a misspelt or ill-typed keyword is found before the program runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

# Each line that is wrong says so; every other line is right.
CALLS = """
import numpy as np

from cuplama import Completion, Model, SamplingParams, Stream

def right(model: Model, params: SamplingParams, n: int) -> None:
    one: Completion = model.generate("a", max_tokens=5, temperature=0.5, stop=["x"], logit_bias={1: 2.0}, seed=None)
    one = model.generate([1, 2, 3], params, top_k=3)
    many: list[Completion] = model.generate(["a", [1, 2]], params, ignore_eos=True)
    many = model.generate(["a", "b"], max_tokens=None, progress=lambda done, total: None)
    many = model.generate("a", n=n, stop="x")
    many = model.generate(["a", "b"], n=2, logprobs=3)
    stream: Stream = model.stream("a", params, n=2, max_tokens=3)
    own: SamplingParams = model.params(params, min_tokens=3)
    own = model.params()
    text: str = model.decode(model.encode("a"), skip_special=False) + stream.completion.text
    print(one, many, own, text, model.logits("a"), model.logits([1]))

def right_arrays(model: Model, ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    one: Completion = model.generate(ids, max_tokens=5)
    many: list[Completion] = model.generate(ids.reshape(1, -1))
    many = model.generate([ids, "a"])
    one = model.generate(np.array([1, 2]))
    print(one, many, model.decode(ids), model.decode(np.array([1, 2])))

def right_chat(model: Model, params: SamplingParams) -> None:
    messages = [{"role": "user", "content": "a"}]
    one: Completion = model.chat(messages, params, enable_thinking=False, tools=[{"name": "f"}], top_k=3)
    many: list[Completion] = model.chat(messages, n=2, continue_final_message=True)
    stream: Stream = model.stream_chat(messages, template_args={"style": "x"}, special_text=True)
    ids: list[int] = model.encode_chat(messages, documents=None, chat_template="rag")
    print(one, many, stream, ids)

def wrong(model: Model) -> None:
    model.generate("a", max_token=5)  # wrong
    model.generate("a", max_tokens="5")  # wrong
    model.generate("a", {"max_tokens": 5})  # wrong
    model.generate("a", "b")  # wrong
    model.generate("a", n="2")  # wrong
    model.generate(5)  # wrong
    model.generate("a", stop=5)  # wrong
    model.generate(["a"], logit_bias={"a": 1.0})  # wrong
    model.stream("a", temprature=0.5)  # wrong
    model.stream("a", ignore_eos="yes")  # wrong
    model.params(topk=3)  # wrong
    model.params(top_k=3.5)  # wrong
    model.chat("a")  # wrong
    model.chat([{"role": "user"}], temprature=0.5)  # wrong
    model.stream_chat([{"role": "user"}], enable_thinking="no")  # wrong
    model.encode_chat([{"role": "user"}], special_text=1)  # wrong
    text: str = model.generate(["a", "b"])  # wrong
    print(text)
"""
WRONG = {number for number, line in enumerate(CALLS.splitlines(), 1) if line.endswith("# wrong")}


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    path = tmp_path / "calls.py"
    path.write_text(CALLS)
    return path


def run(*command: str | Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT).stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy, which `make setup` installs")
def test_mypy_finds_wrong_calls(calls: Path) -> None:
    found = run(sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", calls)
    assert {int(n) for n in re.findall(rf"{calls.name}:(\d+): error", found)} == WRONG, found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pyright") is None, reason="needs pyright (pip install pyright)")
def test_pyright_finds_wrong_calls(calls: Path) -> None:
    found = json.loads(run("pyright", "--pythonpath", sys.executable, "--outputjson", calls))["generalDiagnostics"]
    errors = {entry["range"]["start"]["line"] + 1 for entry in found if entry["severity"] == "error"}
    assert errors == WRONG, found
