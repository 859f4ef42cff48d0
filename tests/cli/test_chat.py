"""``cuplama chat``: one question from an argument, a file or a pipe, and a conversation in a terminal."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import cuplama
from tests.cli.processes import LAUNCHER, Terminal, environment
from tests.tiny import CHARS as CHARS_FOLDER

CHARS = str(CHARS_FOLDER)
NUMPY = ("--device", "numpy")
CUT = "cuplama: the answer was cut at 8 tokens (-n 8)\n"
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


@pytest.fixture
def args(talker: str) -> tuple[str, ...]:
    """A chat whose answers have eight tokens."""
    return ("chat", "-m", talker, *NUMPY, "-n", "8", "--ignore-eos")


def answer(folder: str, *messages: str) -> str:
    """What the library says to messages such as "u:Hi"."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    parts = [{"role": roles[m[0]], "content": m[2:]} for m in messages]
    with cuplama.load(folder, device="numpy") as model:
        return model.chat(parts, max_tokens=8, ignore_eos=True).text


def test_a_question_is_answered_once(run: Run, talker: str, args: tuple[str, ...], tmp_path: Path) -> None:
    """Standard input is not read where there is a question: a job may have one that never ends."""
    wanted = (0, answer(talker, "u:Hi") + "\n", CUT)
    (tmp_path / "question").write_text("Hi\n")
    assert run(*args, "Hi", stdin=b"\xff") == wanted
    assert run(*args, "-f", str(tmp_path / "question"), stdin=b"\xff") == wanted
    assert run(*args, "-", stdin=b"Hi\n") == wanted
    assert run(*args, stdin=b"Hi\n") == wanted
    assert run(*args, "Hi", "-q") == (0, wanted[1], "")
    assert run(*args, "Hi", "--system", "Be nice")[1] == answer(talker, "s:Be nice", "u:Hi") + "\n"


def test_all_that_is_piped_in_is_one_question(run: Run, talker: str, args: tuple[str, ...]) -> None:
    assert run(*args, stdin=b"one\n\n two\n")[1] == answer(talker, "u:one\n\n two") + "\n"


def test_an_answer_of_no_tokens(run: Run, talker: str) -> None:
    assert run("chat", "Hi", "-m", talker, *NUMPY, "-n", "0") == (0, "\n", "")


@pytest.mark.parametrize(("given", "stdin"), [(("",), b"Hi"), ((" \n",), b"Hi"), ((), b" \n\n"), ((), b"")])
def test_a_blank_question_is_refused(given: tuple[str, ...], stdin: bytes, fails: Fails, args: tuple[str, ...]) -> None:
    assert "the question is empty" in fails(*args, *given, stdin=stdin)


def test_json(run: Run, talker: str, args: tuple[str, ...]) -> None:
    text = answer(talker, "s:Be nice", "u:Hi")
    status, out, err = run(*args, "--json", "--system", "Be nice", stdin=b"Hi\n")
    assert (status, err, out.count("\n")) == (0, CUT, 1)
    found = json.loads(out)
    assert (found["text"], found["finish_reason"], len(found["tokens"])) == (text, "length", 8)
    roles = {"system": "Be nice", "user": "Hi", "assistant": text}
    assert found["messages"] == [{"role": role, "content": content} for role, content in roles.items()]


def test_what_cannot_be_answered_is_an_error(fails: Fails, args: tuple[str, ...]) -> None:
    message = fails(*args, "--context", "40", stdin=b"x" * 60)
    assert "the prompt has 63 tokens; the context has room for 39" in message
    assert "logit_bias: token id 9999 is out of range" in fails(*args, "--logit-bias", "9999=1")  # no question is there
    assert "no chat template" in fails("chat", "-m", CHARS, *NUMPY)
    assert "given 2 times, by QUESTION and -f" in fails("chat", "Hi", "-f", "question", "-m", "not loaded")


def test_chat_refuses_input_that_is_not_utf8(args: tuple[str, ...]) -> None:
    done = subprocess.run(
        [*LAUNCHER, *args], input=b"Hi\n\xff\n", capture_output=True, env=environment(PYTHONUTF8="1"), timeout=60
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"cuplama: standard input is not valid UTF-8: byte 0xff at offset 3\n"


def test_template_variables_reach_the_template(run: Run, talker: str, tmp_path: Path) -> None:
    shutil.copytree(talker, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ 'on' if enable_thinking else 'off' }}{{ tools | length }}{{ documents[0].title }}{{ messages[-1].content }}"
    )
    (tmp_path / "tools.json").write_text('[{"type": "function"}, {}, {}]')
    (tmp_path / "documents.json").write_text('[{"title": "Some"}]')
    files = ("--tools", str(tmp_path / "tools.json"), "--documents", str(tmp_path / "documents.json"))
    for value, word in (("false", "off"), ("False", "off"), ("None", "off"), ("true", "on"), ("high", "on")):
        given = ("-m", str(tmp_path), *NUMPY, "-n", "4", "--template-arg", f"enable_thinking={value}", *files)
        out = run("chat", "Hi", *given)[1]
        with cuplama.load(tmp_path, device="numpy") as model:
            assert out == model.generate(f"{word}3SomeHi", max_tokens=4).text + "\n"


def test_a_variable_that_the_template_does_not_read_is_refused(fails: Fails, args: tuple[str, ...]) -> None:
    """Before the first question: standard input is not asked for one."""
    assert "enable_thinkin" in fails(*args, "--template-arg", "enable_thinkin=false", stdin=b"\xff")


def test_json_needs_a_question_in_a_terminal(args: tuple[str, ...]) -> None:
    terminal = Terminal([*LAUNCHER, *args, "--json"], environment(TERM="dumb"))
    terminal.until("cuplama: --json needs a QUESTION, -f FILE or a pipe")
    assert terminal.status() == 2


def test_ctrl_c_ends_a_single_question(talker: str) -> None:
    args = ["chat", "Hi", "-m", talker, *NUMPY, "--context", "20000", "--ignore-eos"]
    terminal = Terminal([*LAUNCHER, *args], environment(TERM="dumb"))
    terminal.until(answer(talker, "u:Hi"))  # its beginning
    terminal.send("\x03")
    assert terminal.status() == 130


def test_chat_in_a_terminal(talker: str) -> None:
    args = [*LAUNCHER, "chat", "-m", talker, *NUMPY, "--context", "20000", "--ignore-eos"]
    terminal = Terminal(args, environment(TERM="dumb"))
    banner = terminal.until("> ")
    assert f"{Path(talker).name} (LlamaForCausalLM) on NumPy" in banner
    assert "context 20000. /help lists the commands.\r\n" in banner
    terminal.send("Hi\n")
    terminal.until(answer(talker, "u:Hi"))
    terminal.send("\x03")  # stops the answer ...
    assert terminal.until("\r\n> ").endswith("stopped; what was said so far stays in the conversation")
    terminal.send("/undo\n")  # ... and not the program
    assert "took back: Hi" in terminal.until("\r\n> ")
    terminal.send("\x04")  # Ctrl-D
    assert terminal.status() == 0


def test_a_conversation_in_a_terminal(talker: str, args: tuple[str, ...]) -> None:
    first = answer(talker, "u:one\ntwo")
    second = answer(talker, "u:one\ntwo", f"a:{first}", "u:Hi")
    terminal = Terminal([*LAUNCHER, *args, "--context", "80"], environment(TERM="dumb"))
    terminal.until("> ")
    terminal.send("one\ntwo\n")  # pasted
    assert terminal.until("\r\n> ").endswith(f"\n{first}\r\n{CUT[:-1]}")
    terminal.send("x" * 90 + "\n")
    assert terminal.until("\r\n> ").partition("\n")[2].startswith("cuplama: the prompt has 93 tokens; ")
    terminal.send("Hi\n")  # the conversation stands
    assert terminal.until("\r\n> ").endswith(f"\n{second}\r\n{CUT[:-1]}")
    terminal.send("x" * 65 + "\n")
    assert "\ncuplama: left out the 4 oldest messages: the conversation no longer fits the context of 80 tokens" in (
        terminal.until("\r\n> ")
    )
    terminal.send("/exit\n")
    assert terminal.status() == 0
