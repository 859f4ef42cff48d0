"""Closed, full and broken streams, and the progress bar."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from rich.progress import Progress

from cuplama.cli.streams import QUIET_KEY, print_json, progress_bar, say, write_text
from tests.cli.processes import LAUNCHER, environment
from tests.tiny import CHARS as CHARS_FOLDER
from tests.tiny import LLAMA as LLAMA_FOLDER

CHARS, LLAMA = str(CHARS_FOLDER), str(LLAMA_FOLDER)
NUMPY = ("--device", "numpy")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


@pytest.mark.parametrize("args", ["generate First -n 4000 --context 5000 --temp 1.5 --ignore-eos -q", "graph"])
def test_a_closed_pipe_ends_quietly(args: str, talker: str) -> None:
    command, *rest = args.split()
    device = NUMPY if command == "generate" else ()
    with subprocess.Popen(
        [*LAUNCHER, command, *rest, "-m", talker, *device],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5)
        process.stdout.close()
        assert process.wait(timeout=60) in (0, 1)  # a short text may all be in the pipe already
        assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["generate", "info"])
def test_a_full_disk_is_said_in_one_line(command: str) -> None:
    args = [command, "-m", CHARS, *(("First", *NUMPY, "-n", "5") if command == "generate" else ())]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*LAUNCHER, *args], stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=60, text=True
        )
    assert (done.returncode, done.stderr) == (2, "cuplama: reading or writing failed: No space left on device\n")


@pytest.mark.parametrize(
    ("args", "closed", "status", "said"),
    [
        (["generate", "-", "-m", CHARS, *NUMPY], "<&-", 2, "cuplama: standard input is closed\n"),
        (["chat", "-m", "TALKER", *NUMPY], "<&-", 2, "cuplama: standard input is closed\n"),
        (["info", "-m", CHARS], ">&-", 2, "cuplama: standard output is closed\n"),
        (["generate", "First", "-m", CHARS, *NUMPY, "-n", "5"], "2>&-", 0, ""),
    ],
)
def test_closed_streams(args: list[str], closed: str, status: int, said: str, talker: str) -> None:
    args = [talker if a == "TALKER" else a for a in args]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *LAUNCHER, *args],
        capture_output=True, env=environment(), timeout=60, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (status, said)


class Teletype(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_a_terminal_gets_controls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may print what clears the screen or writes to the clipboard; a file gets it as it is."""
    text = "a\tb\r\n\x1b[2J\x1b]52;c;aGk=\x07\x7f\x9b31m é\U0001f600"
    for stream, wanted in ((Teletype(), "a\tb␍\n␛[2J␛]52;c;aGk=␇␡\ufffd31m é\U0001f600"), (io.StringIO(), text)):
        monkeypatch.setattr(sys, "stdout", stream)
        write_text(text)
        assert stream.getvalue() == wanted
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    say("what a template says: \x1b[2J")
    assert stderr.getvalue() == "what a template says: ␛[2J\n"


def test_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    for step, shown in ((0.01, False), (1.0, True)):
        clock, stderr = iter(range(10**6)), Teletype()
        monkeypatch.setattr("cuplama.cli.streams.time.perf_counter", lambda clock=clock, step=step: next(clock) * step)
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("TERM", "xterm")
        with progress_bar("loading", "B") as update:
            for done in range(5):
                update(done, 4)
        assert ("loading" in stderr.getvalue()) == shown
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar("loading", "B") as update:
        update(1, 2)


def test_the_progress_bar_is_gone_before_the_text_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It redraws itself ten times a second: what is printed meanwhile on the same terminal would be torn."""
    monkeypatch.setattr("cuplama.cli.streams.time.perf_counter", iter(range(10**6)).__next__)
    monkeypatch.setattr(sys, "stderr", Teletype())
    monkeypatch.setenv("TERM", "xterm")
    calls: list[str] = []

    def recorded(name: str) -> Callable[[Progress], None]:
        method = getattr(Progress, name)

        def call(bar: Progress) -> None:
            calls.append(name)
            method(bar)

        return call

    for name in ("start", "stop"):
        monkeypatch.setattr(Progress, name, recorded(name))
    with progress_bar("reading", "tokens") as update:
        update(1, 3)
        update(3, 3)
        assert calls == ["start", "stop"]
        update(3, 4)  # a total that grows, as of a download
        assert calls == ["start", "stop", "start"]
    assert calls == ["start", "stop", "start", "stop"]


def test_no_progress_bar_under_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Teletype()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("cuplama.cli.streams.time.perf_counter", iter(range(100)).__next__)
    with click.Context(click.Command("x"), obj=None) as context:
        context.meta[QUIET_KEY] = True
        with progress_bar("loading", "B") as update:
            update(1, 2)
    assert stderr.getvalue() == ""


def test_json_has_no_infinity_and_no_letter_that_a_locale_may_lack(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": "é \N{LLAMA} \udcff"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"text": "é \N{LLAMA} \udcff"}
    with pytest.raises(ValueError):
        print_json({"x": float("inf")})
