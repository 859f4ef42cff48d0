"""``cuplama generate``: what it prints, in a pipe, in a terminal, and when it is interrupted."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cuplama
from tests.cli.processes import LAUNCHER, Terminal, environment, interruptible
from tests.tiny import CHARS as CHARS_FOLDER
from tests.tiny import LLAMA as LLAMA_FOLDER

CHARS, LLAMA = str(CHARS_FOLDER), str(LLAMA_FOLDER)
NUMPY = ("--device", "numpy")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


def test_generate(run: Run) -> None:
    with cuplama.load(CHARS, device="numpy") as model:
        params: dict[str, Any] = {
            "max_tokens": 20,
            "temperature": 1.2,
            "top_k": 30,
            "top_p": 0.9,
            "min_p": 0.01,
            "seed": 4,
        }
        wanted = model.generate("First", repetition_penalty=1.1, stop=["zq"], **params)
        greedy = model.generate("First", max_tokens=20)
        full = model.generate("First", max_tokens=None)
    options = ["--temp", "1.2", "--top-k", "30", "--top-p", "0.9", "--min-p", "0.01"]
    options += ["-n", "20", "--repeat-penalty", "1.1", "--seed", "4", "--stop", "zq"]
    assert run("generate", "First", "-m", CHARS, *NUMPY, *options) == (0, wanted.text, "")
    assert run("generate", "-", "-m", CHARS, *NUMPY, *options, stdin=b"First\n") == (0, wanted.text, "")
    assert run("generate", "First", "-m", CHARS, *NUMPY, "--max-tokens", "20")[1] == greedy.text
    assert run("generate", "First", "-m", CHARS, *NUMPY, "-n", "-1")[1] == full.text
    assert run("generate", "First", "-m", CHARS, *NUMPY, "-n", "0") == (0, "", "")
    status, out, err = run("generate", "First", "-m", CHARS, *NUMPY, "-n", "20", "--stats")
    assert (status, out) == (0, greedy.text)
    assert re.fullmatch(r"\nprompt: 5 tokens in .* ms \(.*\), then 19 tokens in .* s \(.* tokens/s\)\n", err)


def test_generate_json(run: Run) -> None:
    status, out, err = run("generate", "First", "-m", CHARS, *NUMPY, "-n", "3", "--json", "--logprobs", "2")
    assert (status, err) == (0, "")
    found = json.loads(out)
    with cuplama.load(CHARS, device="numpy") as model:
        wanted = model.generate("First", max_tokens=3, logprobs=2)
    assert out.count("\n") == 1
    assert (found["text"], found["tokens"], found["finish_reason"]) == (wanted.text, wanted.tokens, "length")
    assert found["prompt_tokens"] == 5
    assert [x["id"] for x in found["logprobs"]] == wanted.tokens
    assert all(len(x["top"]) == 2 and x["logprob"] <= 0 for x in found["logprobs"])
    assert "logprobs" not in json.loads(run("generate", "First", "-m", CHARS, *NUMPY, "-n", "3", "--json")[1])


def test_without_a_gpu() -> None:
    """auto says in one line that NumPy is used, and why; cuda fails with the reason."""
    env = environment(CUDA_VISIBLE_DEVICES="-1")
    args = [*LAUNCHER, "generate", "First", "-m", CHARS, "-n", "3"]
    done = subprocess.run(args, capture_output=True, env=env, timeout=60, text=True)
    assert (done.returncode, len(done.stdout)) == (0, 3)
    assert re.fullmatch(r"cuplama: running on NumPy: .+\n", done.stderr)
    done = subprocess.run([*args, "--device", "cuda"], capture_output=True, env=env, timeout=60, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"cuplama: device cuda cannot be used: .+\n", done.stderr)


def test_counts_of_one_are_singular(run: Run) -> None:
    err = run("generate", "F", "-m", CHARS, *NUMPY, "-n", "2", "--stats")[2]
    assert re.fullmatch(r"\nprompt: 1 token in .*, then 1 token in .*\n", err)


def test_wrong_prompts(tmp_path: Path, fails: Fails) -> None:
    generate = ("generate", "-m", CHARS, *NUMPY)
    assert "the prompt has 90 tokens; the context has room for 79" in fails(*generate, "a" * 90)
    assert "the prompt is empty and the model has no BOS" in fails(*generate, "")
    assert "the prompt is empty and the model has no BOS" in fails(*generate, "-")
    assert "standard input is not valid UTF-8: byte 0xff at offset 2" in fails(*generate, "-", stdin=b"ab\xff")
    assert "not valid Unicode" in fails(*generate, "a\udcff")  # how Python passes on a byte that is not UTF-8


@pytest.mark.parametrize("stats", [False, True])
def test_ctrl_c_ends_generate_with_130(stats: bool, talker: str) -> None:
    args = ["generate", "First", "-m", talker, *NUMPY, "-n", "-1", "--context", "20000", "--ignore-eos"]
    with subprocess.Popen(
        [*LAUNCHER, *args, *(["--stats"] if stats else [])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), preexec_fn=interruptible,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        said = process.stderr.read().strip().decode()
        assert re.fullmatch(r"prompt: 5 tokens in .*, then \d+ tokens in .*" if stats else "", said)


def test_generate_in_a_terminal_shows_the_prompt() -> None:
    terminal = Terminal([*LAUNCHER, "generate", "First", "-m", CHARS, *NUMPY, "-n", "5"], environment(TERM="dumb"))
    text = terminal.until("\r\n")
    assert re.sub(r"\x1b\[\d*m", "", text).startswith("First")
    assert len(re.sub(r"\x1b\[\d*m", "", text)) == 10
    assert terminal.status() == 0
    terminal = Terminal([*LAUNCHER, "generate", "First", "-m", CHARS, *NUMPY, "--logit-bias", "65=1"], environment())
    assert terminal.until("\r\n").startswith("cuplama: logit_bias: token id 65")  # no prompt before it
    assert terminal.status() == 2
