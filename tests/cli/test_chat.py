"""``cuplama chat``: through a pipe and in a terminal."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import cuplama
from tests.cli.processes import LAUNCHER, Terminal, environment
from tests.tiny import CHARS as CHARS_FOLDER
from tests.tiny import LLAMA as LLAMA_FOLDER

CHARS, LLAMA = str(CHARS_FOLDER), str(LLAMA_FOLDER)
NUMPY = ("--device", "numpy")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


def test_chat_through_a_pipe(run: Run, talker: str) -> None:
    with cuplama.load(talker, device="numpy") as model:

        def answer(*messages: str) -> str:
            roles = {"s": "system", "u": "user", "a": "assistant"}
            parts = [{"role": roles[m[0]], "content": m[2:]} for m in messages]
            return model.chat(parts, max_tokens=8, ignore_eos=True).text

        first = answer("u:Hi")
        wanted = [
            first,
            answer("u:Hi", f"a:{first}", "u:there"),
            first,
            answer("s:Be nice", "u:Hi"),
            first,
            answer("u:one\ntwo"),
        ]
    lines = "Hi|there|/clear|Hi|/system Be nice|Hi|/system|Hi||/nope|/help|/clear|one\\|two|/exit|not read"
    status, out, err = run(
        "chat", "-m", talker, *NUMPY, "-n", "8", "--ignore-eos", stdin=lines.replace("|", "\n").encode()
    )
    assert status == 0
    assert out == "".join(f"{text}\n" for text in wanted)
    assert err.startswith("/nope is not a command; /help lists them\n/help ")
    assert "Ctrl-C stops an answer" in err


def test_chat_ends_with_its_input(run: Run, talker: str) -> None:
    status, out, err = run("chat", "-m", talker, *NUMPY, "-n", "3", "--ignore-eos", stdin=b"Hi\\")
    assert (status, out.count("\n"), err) == (0, 1, "")
    assert run("chat", "-m", talker, *NUMPY) == (0, "", "")


def test_chat_beyond_the_context(run: Run, talker: str) -> None:
    """In a pipe it is an error; who types can go on."""
    args = ("chat", "-m", talker, *NUMPY, "-n", "2", "--context", "40", "--ignore-eos")
    status, out, err = run(*args, stdin=b"Hi\n" + b"x" * 60 + b"\nHi\n")
    assert status == 2
    assert out.count("\n") == 1
    assert re.fullmatch(r"cuplama: the prompt has \d+ tokens; [^/]*\n", err)
    terminal = Terminal([*LAUNCHER, *args], environment(TERM="dumb"))
    terminal.until("> ")
    terminal.send("x" * 60 + "\n")
    assert "cuplama: the prompt has" in terminal.until(" (/clear starts again)\r\n> ")
    terminal.send("/exit\n")
    assert terminal.status() == 0


def test_chat_checks_its_parameters_before_the_first_question(fails: Fails, talker: str) -> None:
    message = fails("chat", "-m", talker, *NUMPY, "--logit-bias", "9999=1")  # no question is there
    assert "logit_bias: token id 9999 is out of range" in message
    assert "/clear" not in message


def test_only_a_full_context_is_mended_by_clear(talker: str, tmp_path: Path) -> None:
    shutil.copytree(talker, tmp_path, dirs_exist_ok=True)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}x"
    (tmp_path / "chat_template.jinja").write_text(refusal)
    terminal = Terminal([*LAUNCHER, "chat", "-m", str(tmp_path), *NUMPY, "-n", "2"], environment(TERM="dumb"))
    terminal.until("> ")
    terminal.send("/system Be nice\n")
    terminal.until("\r\n> ")
    terminal.send("Hi\n")
    terminal.until("no system message")
    assert "/clear" not in terminal.until("> ")
    terminal.send("/exit\n")
    assert terminal.status() == 0


def test_chat_refuses_input_that_is_not_utf8(talker: str) -> None:
    done = subprocess.run(
        [*LAUNCHER, "chat", "-m", talker, *NUMPY, "-n", "3"],
        input=b"Hi\n\xff\n", capture_output=True, env=environment(PYTHONUTF8="1"), timeout=60,
    )  # fmt: skip
    assert done.returncode in (0, 2)
    assert b"Traceback" not in done.stderr
    assert b"not valid U" in done.stderr


def test_chat_in_a_terminal(talker: str, tmp_path: Path) -> None:
    args = [*LAUNCHER, "chat", "-m", talker, *NUMPY, "-n", "-1", "--context", "20000", "--ignore-eos"]
    env = environment(HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path), TERM="dumb")
    terminal = Terminal(args, env)
    assert "/help lists the commands" in terminal.until("> ")
    terminal.send("Hello\n")
    terminal.until("Hello\r\n")
    time.sleep(0.3)
    terminal.send("\x03")  # stops the answer ...
    assert len(terminal.until("\r\n> ")) > 2
    terminal.send("/help\n")  # ... and not the program
    assert "/clear" in terminal.until("\r\n> ")
    terminal.send("half a line")
    terminal.until("half a line")
    time.sleep(0.3)  # until Python's readline waits again: it sees a signal only there
    terminal.send("\x03")  # drops the line
    assert "(/exit or Ctrl-D leaves)" in terminal.until("\r\n> ")
    terminal.send("/exit\n")
    assert terminal.status() == 0
    history = tmp_path / "cuplama" / "chat_history"
    assert history.read_text().splitlines()[-3:] == ["Hello", "/help", "/exit"]
    again = Terminal(args, env)
    again.until("> ")
    again.send("\x1b[A\x1b[A\n")  # two lines up: /help
    assert "/system TEXT" in again.until("\r\n> ")
    again.send("\x04")  # Ctrl-D
    assert again.status() == 0
