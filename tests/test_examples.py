"""Every program of ``examples/``, run as a user runs it on the bundled model, without a GPU."""

from __future__ import annotations

import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import cuplama
from cuplama.backends.cuda.driver import cuda_available
from cuplama.lab.perplexity import perplexity
from tests.paths import ROOT

EXAMPLES = ROOT / "examples"


def run(name: str, **environment: str) -> str:
    """What an example prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1", **environment}
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def constants(name: str) -> dict[str, Any]:
    """The names of an example's module; its main is not run."""
    return runpy.run_path(str(EXAMPLES / name))


@pytest.fixture(scope="module")
def model() -> Iterator[cuplama.Model]:
    with cuplama.load(device="numpy") as model:
        yield model


def test_each_example_is_tested_and_has_a_line_in_the_readme() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    tested = set(re.findall(r"\brun\(\"(\w+\.py)\"", (ROOT / "tests" / "test_examples.py").read_text(encoding="utf-8")))
    listed = set(re.findall(r"^\| \[`(\w+\.py)`\]", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.M))
    assert len(names) == 11
    assert tested == names
    assert listed == names


def test_stream(model: cuplama.Model) -> None:
    prompt = constants("stream.py")["PROMPT"]
    expected = model.generate(prompt, max_tokens=40, temperature=0.8, seed=1).text
    assert run("stream.py") == f"{prompt}{expected}\n"


def test_batch_gives_what_each_prompt_gives_alone(model: cuplama.Model) -> None:
    prompts = constants("batch.py")["PROMPTS"]
    expected = "".join(f"{prompt}{model.generate(prompt, max_tokens=20, seed=1).text}\n" for prompt in prompts)
    assert run("batch.py") == expected


def test_tasks_end_in_the_order_of_their_lengths(model: cuplama.Model) -> None:
    pairs = zip(constants("tasks.py")["PROMPTS"], (30, 20, 10), strict=True)
    expected = [f"{prompt}{model.generate(prompt, max_tokens=n, seed=1).text}\n" for prompt, n in pairs]
    assert run("tasks.py") == "".join(reversed(expected))


def test_chat_answers_each_question_inside_its_quotation_marks() -> None:
    questions = constants("chat.py")["QUESTIONS"]
    lines = run("chat.py").splitlines()
    assert lines[0::2] == [f"> {question}" for question in questions]
    assert len(lines) == 2 * len(questions)
    for answer in lines[1::2]:
        assert answer.strip()
        assert '"' not in answer


def test_logits(model: cuplama.Model) -> None:
    ids = model.encode(constants("logits.py")["TEXT"])
    best = [model.tokenizer.token_text(int(i)) for i in model.logits(ids).argmax(-1)]
    lines = [re.fullmatch(r"after '(.*)': '(.*)' with probability ([\d.]+)", x) for x in run("logits.py").splitlines()]
    found = [m for m in lines if m is not None]
    assert [m[1] for m in found] == [model.tokenizer.token_text(i) for i in ids]
    assert [m[2] for m in found] == best
    assert all(1 / model.config.vocab_size < float(m[3]) < 1 for m in found)


def test_logprobs(model: cuplama.Model) -> None:
    prompt = constants("logprobs.py")["PROMPT"]
    expected = model.generate(prompt, max_tokens=8, temperature=1.0, seed=7, logprobs=3)
    lines = run("logprobs.py").splitlines()
    assert len(lines) == len(expected.tokens) == 8
    for line, token in zip(lines, expected.logprobs or (), strict=True):
        assert token.logprob is not None
        probability, *best = [float(x) for x in re.findall(r"\d\.\d{3}", line)]
        assert probability == pytest.approx(math.exp(token.logprob), abs=1e-3)
        assert len(best) == 3
        assert best == sorted(best, reverse=True)


def test_op_on_cupy_computes_with_numpy_where_there_is_no_gpu() -> None:
    where, result, call, refused = run("op_on_cupy.py").splitlines()
    assert where.startswith("NumPy computes: ")
    assert re.fullmatch(r"y is a numpy.ndarray float32\[4, 256\], 0\.\d{3}", result)
    assert call == "the call: <op linear_add(x, w, a, b=None)>"
    assert refused.startswith("refused: rms_norm: x[n,d] is float16, not float32; ")


def test_op_from_outside_is_judged_and_called() -> None:
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    judged, result = run("op_from_outside.py").splitlines()
    assert judged == "hard_tanh is right on 2 cases, on the emulator"
    assert float(result.rpartition(" ")[2]) == 30.0


def test_op_from_outside_says_so_where_there_is_no_compiler() -> None:
    assert "not checked: without a GPU kernels run on an emulator, which needs" in run("op_from_outside.py", PATH="")


def test_time_one_kernel_checks_on_the_emulator_and_says_that_it_does_not_time() -> None:
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    judged, timed = run("time_one_kernel.py").splitlines()
    assert judged == "rms_norm is right on 7 cases, on the emulator"
    assert timed.startswith("not timed: ")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["op_on_cupy", "op_from_outside", "time_one_kernel"])
def test_examples_on_a_gpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")
    constants(f"{name}.py")["main"]()
    shown = capsys.readouterr().out
    assert {"op_on_cupy": "y is a cupy.ndarray", "op_from_outside": "right on 2 cases", "time_one_kernel": "rms_norm"}[
        name
    ] in shown
    assert (name == "time_one_kernel") == ("µs per launch" in shown)


def test_perplexity(model: cuplama.Model) -> None:
    expected = perplexity(model, constants("perplexity.py")["TEXT"])
    first, second = run("perplexity.py").splitlines()
    assert first == f"perplexity {expected.perplexity:.2f} ± {expected.error:.2f} over {expected.tokens} tokens"
    assert second == f"{expected.bits_per_byte:.3f} bits per byte"
    assert 0.2 < expected.bits_per_byte < 1  # the bundled model knows such stories


def test_train_tiny_recites_and_its_gradient_is_a_slope() -> None:
    *steps, rhyme, slope = run("train_tiny.py").splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in steps]
    assert len(losses) == 6
    assert losses[0] > 0.5
    assert losses[-1] < 0.2
    assert f"{rhyme}\n" == constants("train_tiny.py")["RHYME"]
    gradient, difference = map(float, re.findall(r"-?\d\.\d{4}", slope))
    assert abs(gradient) > 0.02
    assert difference == pytest.approx(gradient, rel=0.01)
