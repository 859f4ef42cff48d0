"""``cuplama train``: options, errors, signals, and a run that is killed while it saves."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cuplama.train.log import read_log
from tests.cli.processes import LAUNCHER, Terminal, environment, interruptible
from tests.train.made import write_config, write_tokenizer

Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]
Command = Callable[..., list[str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """The arguments of a training of few steps, with the output folder ``out``."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat.\n" * 40)
    config, tokenizer = write_config(tmp_path / "config.json"), write_tokenizer(tmp_path / "t", eos="</s>")

    def made(**options: Any) -> list[str]:
        given = {"out": "out", "steps": 3, "batch-size": 2, "context": 16, "lr": 0.01, "device": "numpy", **options}
        given["out"] = tmp_path / given["out"]
        begin = ["train", "--data", str(tmp_path / "text.txt"), "--config", str(config), "--tokenizer", str(tokenizer)]
        return begin + [str(word) for name, value in given.items() for word in (f"--{name}", value)]

    return made


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.train.run.draw_losses", lambda folder: None)


def test_a_training_says_what_it_does(run: Run, command: Command, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    status, text, said = run(*command(steps=4, **{"eval-every": 2}), "--eval-data", str(tmp_path / "text.txt"))
    assert (status, text) == (0, f"{out}\n")
    lines = said.splitlines()
    assert lines[0].startswith("cuplama: training 4,944 weights on 960 tokens of data, NumPy")
    assert lines[1].startswith("step 1 of 4: loss 3.8")
    assert lines[1].endswith(" left")
    assert "evaluation 3." in lines[2]
    again = run(*command(steps=4, **{"eval-every": 2}), "--resume")[2]
    assert again.endswith("has all 4 steps; there is nothing to do\n")
    assert run("generate", "the", "-m", out, "--device", "numpy", "-n", "3", "-q")[0] == 0
    assert run(*command(out="quiet"), "-q") == (0, f"{tmp_path / 'quiet'}\n", "")


def test_several_files_follow_one_option(run: Run, command: Command, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("abc" * 9)
    more = [str(tmp_path / name) for name in ("a", "b")]
    assert run(*command(), "-q", "--data", *more, "--eval-data", str(tmp_path / "c"))[0] == 0
    sources = json.loads((tmp_path / "out" / "data" / "train.json").read_text())["sources"]
    assert [Path(s["file"]).name for s in sources] == ["text.txt", "a", "b"]


def test_what_is_refused(fails: Fails, command: Command, tmp_path: Path) -> None:
    assert "give either --from MODEL, or --config and --tokenizer" in fails(*command(), "--from", "x")
    assert "give either --from MODEL" in fails("train", "--data", "x", "--out", "y", "--steps", "1")
    bare = ("train", "--data", "x", "--out", "y", "--steps", "1")
    assert "--config and --tokenizer go together" in fails(*bare, "--config", "x")
    assert "--config and --tokenizer go together" in fails(*bare, "--from", "x", "--tokenizer", "x")
    assert "Missing option '--steps'" in fails(*bare[:-2], "--from", "x")
    assert "--batch-size = 0 is out of range; it must be a number of at least 1" in fails(*command(**{"batch-size": 0}))
    assert "--lora-target is for adapters alone" in fails(*command(**{"lora-target": "q_proj"}))
    assert "--teacher-share = 2.0 is out of range" in fails(*command(**{"teacher-share": 2}))
    assert "--lora trains adapters of a model that was trained before" in fails(*command(lora=2))
    assert "the data has 960 tokens, and a row of 1000 needs 1001" in fails(*command(context=1000), "-q")
    assert "nothing.txt does not exist" in fails(*command(), "--data", str(tmp_path / "nothing.txt"))
    assert "--config" not in fails("train", "--data", "x", "--from", str(tmp_path), "--out", "y", "--steps", "1")


def test_help_is_in_sections(run: Run) -> None:
    status, text, _ = run("train", "--help")
    assert status == 0
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "The model:", "The data:", "The steps:", "Adapters, and learning from other models:", "Where it runs:",
        "Other options:",
    ]  # fmt: skip
    assert text.index("--from") < text.index("The data:") < text.index("--eval-data") < text.index("The steps:")


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """The command as a process, which draws no pictures. folder: for a file that sees to that."""
    (folder / "matplotlib.py").write_text("raise ImportError")
    return subprocess.Popen(
        [*LAUNCHER, *command], env=environment(PYTHONPATH=str(folder)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=interruptible,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_goes_on(command: Command, tmp_path: Path, number: signal.Signals) -> None:
    process = start(command(steps=100_000, **{"save-every": 0, "eval-every": 0}), tmp_path)
    wait_for(tmp_path / "out" / "log.jsonl", process)
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert out == ""
    step = list(read_log(tmp_path / "out" / "log.jsonl"))[-1]["step"]
    assert "stopping after this step, which is saved" in said
    assert f"stopped after step {step} of 100000, which is saved; --resume goes on from there" in said
    last = step + 3
    process = start([*command(steps=last, **{"save-every": 0, "eval-every": 0}), "--resume"], tmp_path)
    assert f"from step {step} on" in process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert list(read_log(tmp_path / "out" / "log.jsonl"))[-1]["step"] == last


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_end(run: Run, command: Command, tmp_path: Path) -> None:
    options = {"steps": 120, "save-every": 1, "eval-every": 0}
    for attempt in range(5):
        process = start([*command(**options), "--resume"], tmp_path)
        wait_for(tmp_path / "out" / "training" / "state.safetensors", process)
        time.sleep(0.5 + 0.13 * attempt)
        process.kill()
        process.communicate(timeout=60)
    assert run(*command(**options), "--resume", "-q")[0] == 0
    assert run(*command(out="whole", **options), "-q")[0] == 0
    for name in ("model.safetensors", "training/state.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_terminal_gets_a_bar(command: Command, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    many = command(steps=100_000, **{"save-every": 0, "eval-every": 0})
    more = environment(COLUMNS="140", TERM="xterm-256color", PYTHONPATH=str(tmp_path))
    terminal = Terminal([*LAUNCHER, *many], more)
    assert "training" in terminal.until("tokens/s")
    terminal.until(" left")
    terminal.send("\x03")
    terminal.until("--resume goes on from there")
    assert terminal.status() == 130
