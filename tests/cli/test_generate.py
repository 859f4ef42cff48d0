"""``cuplama generate``: what it prints, in a pipe, in a terminal, and when it is interrupted."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cuplama
from tests.cli.processes import LAUNCHER, Terminal, environment, interruptible
from tests.gguf_models import write_chars
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
    cut = "cuplama: the answer was cut at 20 tokens (-n 20)\n"
    assert run("generate", "First", "-m", CHARS, *NUMPY, *options) == (0, line(wanted.text), cut)
    assert run("generate", "First", "-m", CHARS, *NUMPY, "--max-tokens", "20") == (0, line(greedy.text), cut)
    full_context = "cuplama: the answer was cut: the context of 80 tokens is full (-c)\n"
    assert run("generate", "First", "-m", CHARS, *NUMPY, "-n", "-1") == (0, line(full.text), full_context)
    assert run("generate", "First", "-m", CHARS, *NUMPY, "-n", "0") == (0, "\n", "")
    status, out, err = run("generate", "First", "-m", CHARS, *NUMPY, "-n", "20", "--stats")
    assert (status, out) == (0, line(greedy.text))
    numbers = r"prompt: 5 tokens in .* ms \(.*\), then 20 tokens in .* s \(.* tokens/s after the first\)\n"
    assert re.fullmatch(numbers + re.escape(cut), err)


def line(text: str) -> str:
    """A text as it is printed: with a line break at its end, once."""
    return text if text.endswith("\n") else text + "\n"


def test_where_the_prompt_comes_from(run: Run, tmp_path: Path) -> None:
    """All of these are one prompt; the line break that ends a file or a pipe is not part of it."""
    (tmp_path / "prompt").write_bytes(b"First\r\n")
    generate = ("generate", "-m", CHARS, *NUMPY, "-n", "6", "--echo")
    wanted = run(*generate, "First")
    assert wanted[0] == 0
    assert wanted[1].startswith("First")
    assert len(wanted[1]) == len("First") + 6 + 1
    for args, stdin in (
        (("-",), b"First\n"),
        ((), b"First\n"),
        (("-p", "First"), b"not read"),
        (("--prompt=First",), b""),
        (("-f", str(tmp_path / "prompt")), b"not read"),
        (("--file", "-"), b"First"),
    ):
        assert run(*generate, *args, stdin=stdin) == wanted, args
    assert run(*generate, "-p", "-", stdin=b"First")[1].startswith("-")  # as text


def test_prompts_that_are_given_twice_or_not_at_all(fails: Fails, tmp_path: Path) -> None:
    file = ("-f", str(tmp_path / "nothing"))
    assert "given 2 times, by PROMPT and -f" in fails("generate", "First", *file)
    assert "given 2 times, by -p and -f" in fails("generate", "-p", "First", *file)
    assert "given 3 times, by PROMPT and -p and -f" in fails("generate", "", "-p", "", *file)
    assert "cannot read" in fails("generate", *file)
    assert "Missing argument 'PROMPT': give it, -p TEXT or -f FILE, or pipe it in" in fails("generate")
    assert "Missing argument 'PROMPT'" in fails("generate", stdin=b"\n")


def test_quiet(run: Run, with_template: str) -> None:
    args = ("generate", "First", "-m", with_template, *NUMPY, "-n", "5")
    status, out, err = run(*args)
    hint = 'cuplama: this model has a chat template; cuplama chat "..." uses it\n'
    assert (status, err) == (0, hint + "cuplama: the answer was cut at 5 tokens (-n 5)\n")
    assert run(*args, "--quiet") == run(*args, "-q") == (0, out, "")
    assert run(*args, "--json")[2] == ""
    assert re.fullmatch("prompt: .*\n", run(*args, "-q", "--stats")[2])  # that was asked for


def test_quiet_silences_the_log_of_one_run(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cuplama.device.cuda_available", lambda: (False, "no driver"))
    args = ("generate", "First", "-m", CHARS, "-n", "2")
    assert run(*args, "-q")[0] == 0
    assert caplog.messages == []
    assert run(*args)[0] == 0
    assert caplog.messages == ["running on NumPy: no driver"]


@pytest.fixture(scope="module")
def with_template(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of characters, with a chat template."""
    folder = tmp_path_factory.mktemp("with-template")
    shutil.copytree(CHARS, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return str(folder)


def test_generate_json(run: Run) -> None:
    status, out, err = run("generate", "First", "-m", CHARS, *NUMPY, "-n", "3", "--json", "--logprobs", "2")
    assert (status, err) == (0, "")
    found = json.loads(out)
    with cuplama.load(CHARS, device="numpy") as model:
        wanted = model.generate("First", max_tokens=3, logprobs=2, seed=found["seed"])
    assert out.count("\n") == 1
    assert type(found.pop("timings")) is dict
    assert found == {name: value for name, value in wanted.to_dict().items() if name != "timings"}
    assert len(found["logprobs"]) == 3


def test_json_repeats_a_run_whose_seed_nobody_gave(run: Run) -> None:
    args = ("generate", "First", "-m", CHARS, *NUMPY, "-n", "20", "--temp", "2", "--json")
    found = json.loads(run(*args)[1])
    params = cuplama.SamplingParams.from_dict(found["params"])
    with cuplama.load(found["model"], device=found["device"], dtype=found["dtype"]) as model:
        assert model.generate(found["prompt"], params).text == found["text"]
    assert json.loads(run(*args, "--seed", str(found["seed"]))[1])["text"] == found["text"]


def test_without_a_gpu() -> None:
    """auto says in one line that NumPy is used, and why; cuda fails with the reason."""
    env = environment(CUDA_VISIBLE_DEVICES="-1")
    args = [*LAUNCHER, "generate", "First", "-m", CHARS, "-n", "3"]
    done = subprocess.run(args, capture_output=True, env=env, timeout=60, text=True)
    assert (done.returncode, len(done.stdout)) == (0, 4)
    assert re.fullmatch(r"cuplama: running on NumPy: .+\ncuplama: the answer was cut .*\n", done.stderr)
    done = subprocess.run([*args, "--device", "cuda"], capture_output=True, env=env, timeout=60, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"cuplama: device cuda cannot be used: .+\n", done.stderr)


def test_counts_of_one_are_singular(run: Run) -> None:
    err = run("generate", "F", "-m", CHARS, *NUMPY, "-n", "2", "--stats")[2]
    assert re.match(r"prompt: 1 token in .*, then 2 tokens in .*\n", err)
    err = run("generate", "F", "-m", CHARS, *NUMPY, "-n", "1", "--stats")[2]
    assert re.match(r"prompt: 1 token in .*, then 1 token in .*\n", err)
    err = run("generate", "F", "-m", CHARS, *NUMPY, "-n", "0", "--stats")[2]
    assert re.match(r"prompt: 1 token in .*, then 0 tokens in .*\n", err)


def test_wrong_prompts(tmp_path: Path, fails: Fails) -> None:
    generate = ("generate", "-m", CHARS, *NUMPY)
    assert "the prompt has 90 tokens; the context has room for 79" in fails(*generate, "a" * 90)
    assert "the prompt is empty and the model has no BOS" in fails(*generate, "")
    assert "the prompt is empty and the model has no BOS" in fails(*generate, "-")
    assert "standard input is not valid UTF-8: byte 0xff at offset 2" in fails(*generate, "-", stdin=b"ab\xff")
    assert "not valid Unicode" in fails(*generate, "a\udcff")  # how Python passes on a byte that is not UTF-8


@pytest.mark.parametrize("stats", [False, True])
def test_ctrl_c_ends_generate_with_130(stats: bool, talker: str) -> None:
    args = ["generate", "First", "-m", talker, *NUMPY, "-n", "-1", "--context", "20000", "--ignore-eos", "--quiet"]
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


@pytest.mark.parametrize(
    "settings", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "cp1252"}]
)
def test_json_is_ascii_whatever_the_locale(settings: dict[str, str]) -> None:
    """The token of the bundled model that is the byte E2 becomes U+FFFD at the end of a text; no locale has that."""
    args = [*LAUNCHER, "generate", "Once", *NUMPY, "-n", "2", "--json", "--stop", "\N{LLAMA}"]
    banned = ["--logit-bias", "226=1000"]
    done = subprocess.run([*args, *banned], capture_output=True, env=environment(**settings), timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "\N{REPLACEMENT CHARACTER}" in json.loads(done.stdout.decode("ascii"))["text"]


@pytest.mark.parametrize("redirect", ["<&-", "</dev/null"])
@pytest.mark.parametrize("prompt", [["First"], ["-p", "First"], []])
def test_a_job_without_standard_input_needs_none(prompt: list[str], redirect: str) -> None:
    args = [*LAUNCHER, "generate", *prompt, "-m", CHARS, *NUMPY, "-n", "3", "-q"]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *args],
        capture_output=True, env=environment(), timeout=60, text=True,
    )  # fmt: skip
    assert (done.returncode, len(done.stdout)) == ((0, 4) if prompt else (2, 0))
    assert ("Missing argument 'PROMPT'" in done.stderr) == (not prompt)


def test_a_prompt_that_is_given_leaves_standard_input_alone() -> None:
    """A pipe that never ends must not hold it up."""
    args = [*LAUNCHER, "generate", "First", "-m", CHARS, *NUMPY, "-n", "3", "-q"]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert len(process.stdout.read()) == 4
        assert process.wait(timeout=60) == 0


def test_a_terminal_without_a_prompt_is_told_how_to_give_one() -> None:
    terminal = Terminal([*LAUNCHER, "generate", "-m", CHARS, *NUMPY], environment())
    terminal.until("cuplama: Missing argument 'PROMPT': give it, -p TEXT or -f FILE, or pipe it in")
    assert terminal.status() == 2


def test_no_color_means_none() -> None:
    for settings in ({"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}):
        args = [*LAUNCHER, "generate", "First", "-m", CHARS, *NUMPY, "-n", "5", "-q"]
        terminal = Terminal(args, environment(**settings))
        assert "\x1b" not in terminal.until("\r\n")
        assert terminal.status() == 0


def test_echo_in_a_terminal_shows_the_prompt_once() -> None:
    terminal = Terminal([*LAUNCHER, "generate", "First", "-m", CHARS, *NUMPY, "-n", "5", "--echo"], environment())
    text = terminal.until("\r\n")
    assert text.startswith("First")
    assert text.count("First") == 1
    assert len(text) == 10
    terminal.until("cuplama: the answer was cut at 5 tokens (-n 5)\r\n")
    assert terminal.status() == 0


def test_generate_in_a_terminal_shows_the_prompt() -> None:
    terminal = Terminal([*LAUNCHER, "generate", "First", "-m", CHARS, *NUMPY, "-n", "5"], environment(TERM="dumb"))
    text = terminal.until("\r\n")
    assert re.sub(r"\x1b\[\d*m", "", text).startswith("First")
    assert len(re.sub(r"\x1b\[\d*m", "", text)) == 10
    assert terminal.status() == 0
    terminal = Terminal([*LAUNCHER, "generate", "First", "-m", CHARS, *NUMPY, "--logit-bias", "65=1"], environment())
    assert terminal.until("\r\n").startswith("cuplama: logit_bias: token id 65")  # no prompt before it
    assert terminal.status() == 2


def test_generate_from_a_gguf_file(run: Run, fails: Fails, tmp_path: Path) -> None:
    path = write_chars(tmp_path / "m.gguf")
    wanted = run("generate", "-m", CHARS, *NUMPY, "-n", "12", "First")[1]
    assert run("generate", "-m", str(path), *NUMPY, "-n", "12", "First")[:2] == (0, wanted)
    assert run("tokenize", "-m", str(path), "--ids", "First")[1] == run("tokenize", "-m", CHARS, "--ids", "First")[1]
    path.write_bytes(path.read_bytes()[:-1])
    assert "it is cut off or corrupt" in fails("generate", "-m", str(path), *NUMPY, "First")
