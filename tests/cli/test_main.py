"""The command line: called in this process, and as a real process where pipes, signals and terminals matter."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cuplama
from cuplama.cli.main import cli, main
from tests.paths import ROOT

CASES = ROOT / "tests" / "golden" / "cases"
CHARS, LLAMA = str(CASES / "gpt2-char"), str(CASES / "llama3-gqa")
NUMPY = ("--device", "numpy")
LAUNCHER = [sys.executable, str(ROOT / "cli.py")]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: (exit status, stdout, stderr)."""

    def call(*args: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cuplama", *args])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        monkeypatch.setattr(logging, "basicConfig", lambda **options: None)  # it would keep this test's stderr
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    return call


@pytest.fixture
def fails(run: Run) -> Callable[..., str]:
    """Run something that must end in one line on stderr and status 2; the line."""

    def call(*args: str, stdin: bytes = b"") -> str:
        status, out, err = run(*args, stdin=stdin)
        assert status == 2, err
        assert out == ""
        assert err.count("\n") == 1, err
        assert err.startswith("cuplama: ")
        assert "Traceback" not in err
        assert "internal error" not in err
        return err

    return call


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that chats, without sense but at any length: rotary positions, characters and a template."""
    folder = tmp_path_factory.mktemp("talker")
    shutil.copytree(LLAMA, folder, dirs_exist_ok=True)
    shutil.copy(Path(CHARS) / "tokenizer.json", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20000}))  # any length it is
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}")
    return str(folder)


# --- What it prints -------------------------------------------------------------------------------


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


def test_info_graph_and_tokenize(run: Run) -> None:
    status, out, err = run("info", "-m", LLAMA)
    assert (status, err) == (0, "")
    facts = json.loads(run("info", "-m", LLAMA, "--json")[1])
    assert {"architecture", "bytes_by_part", "stop_tokens"} <= facts.keys()
    for name in ("parameters", "layers", "heads", "context", "weight_bytes", "cache_bytes", "cache_bytes_per_token"):
        assert type(facts[name]) is int, name
    assert all(re.fullmatch("[a-z_]+", name) for name in (*facts, *facts["bytes_by_part"]))
    assert sum(facts["bytes_by_part"].values()) == facts["weight_bytes"]
    assert (facts["architecture"], facts["weights_found"]) == ("LlamaForCausalLM", True)
    shown = dict(re.split("  +", line, maxsplit=1) for line in out.splitlines())
    assert shown["parameters"] == f"{facts['parameters']:,}"
    assert shown["attention"] == f"{facts['heads']} heads, {facts['kv_heads']} KV heads of {facts['head_size']}"
    status, out, err = run("graph", "-m", LLAMA)
    assert (status, err) == (0, "")
    assert out.startswith("x = embedding(ids, embed)\n")
    assert out.count("= attention(") == json.loads((CASES / "llama3-gqa/config.json").read_text())["num_hidden_layers"]
    assert run("tokenize", "It", "-m", CHARS, "--ids") == (0, "21 58\n", "")
    assert run("tokenize", "It", "-m", CHARS)[1].split() == ["21", "'I'", "58", "'t'"]
    assert run("tokenize", "-", "-m", CHARS, "--ids", stdin=b"It\r\n")[1] == "21 58\n"
    assert run("tokenize", "21, 58", "-m", CHARS, "--decode") == (0, "It\n", "")


def test_info_and_graph_without_weights(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a config.json alone the same numbers as with the weights beside it; and known shapes need no file."""
    shutil.copy(Path(LLAMA) / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    full = json.loads(run("info", "-m", LLAMA, "--json")[1])
    alone = json.loads(run("info", "-m", str(tmp_path), "--json")[1])
    assert (alone["weights_found"], alone["head_tied"]) == (False, bool(config["tie_word_embeddings"]))
    assert alone["parameters"] == full["parameters"]
    status, out, err = run("info", "-m", str(tmp_path))
    assert (status, err) == (0, "")
    assert "none here; by the config" in out
    monkeypatch.chdir(tmp_path)  # a config.json in the current folder has no part in it
    known = json.loads(run("info", "-m", "llama-3.2-1b", "--json")[1])
    assert (known["folder"], known["parameters"], known["head_tied"]) == (None, 1_235_814_400, True)
    assert "the published shape of a known model" in run("info", "-m", "llama-3.2-1b")[1]
    status, out, err = run("graph", "-m", "llama-3.2-1b")
    assert (status, err, out.count("= attention(")) == (0, "", 16)


def test_tokens_that_are_no_characters(run: Run) -> None:
    out = run("tokenize", "🦙", "--no-bos")[1]
    assert [line.split()[1] for line in out.splitlines()] == [r"b'\xf0'", r"b'\x9f'", r"b'\xa6'", r"b'\x99'"]


def test_options_are_listed_from_the_first_needed_to_the_last(run: Run) -> None:
    for command in ("generate", "chat", "perplexity", "info", "graph", "tokenize", "bench"):
        help_ = run(command, "--help")[1]
        names = re.findall(r"^  (-[^ ,]+)", help_, re.M)
        assert (names[0], names[-2:]) == ("-m", ["--debug", "-h"])
    assert "..." not in run("--help")[1].partition("Commands:")[2]


def test_counts_of_one_are_singular(run: Run) -> None:
    err = run("generate", "F", "-m", CHARS, *NUMPY, "-n", "2", "--stats")[2]
    assert re.fullmatch(r"\nprompt: 1 token in .*, then 1 token in .*\n", err)


def test_perplexity(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("To be, or not to be, that is the question. " * 5)
    status, out, err = run("perplexity", str(file), "-m", CHARS, *NUMPY, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert (found["tokens"], found["bytes"]) == (214, 215)
    assert found["perplexity"] > 1
    assert found["standard_error"] > 0
    status, out, _ = run(
        "perplexity", "-", "-m", CHARS, *NUMPY, "--window", "20", "--stride", "7", stdin=file.read_bytes()
    )
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["tokens", "nats", "bits", "perplexity"]


def test_perplexity_of_a_file_and_of_standard_input_are_one(run: Run, tmp_path: Path) -> None:
    text = b"To be, or not to be.\n"
    (tmp_path / "text").write_bytes(text)
    file = run("perplexity", str(tmp_path / "text"), "-m", CHARS, *NUMPY, "--json")
    assert run("perplexity", "-", "-m", CHARS, *NUMPY, "--json", stdin=text) == file
    assert json.loads(file[1])["bytes"] == len(text)


def test_json_has_no_infinity(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cuplama.perplexity

    (tmp_path / "text").write_text("To be")
    hopeless = cuplama.perplexity.Perplexity(tokens=1, nats=1e4, squares=1e8, size=5)
    monkeypatch.setattr(cuplama.perplexity, "perplexity", lambda *_: hopeless)
    out = run("perplexity", str(tmp_path / "text"), "-m", CHARS, *NUMPY, "--json")[1]
    assert (json.loads(out)["perplexity"], "Infinity" in out, "NaN" in out) == (None, False, False)


# --- What a user can do wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--temp", "hot"], "'hot' is not a valid float"),
        (["--temp", "nan"], "'--temp' / '--temperature': nan is not a number >= 0"),
        (["--temp", "-1"], "'--temp' / '--temperature': -1.0 is not a number >= 0"),
        (["-n", "-5"], "'-n' / '--max-tokens': -5 is not a whole number >= 0, or -1: until the context is full"),
        (["-n", "1.5"], "'1.5' is not a valid integer"),
        (["--top-k", "-1"], "'--top-k': -1 is not a whole number >= 0"),
        (["--top-p", "2"], "'--top-p': 2.0 is not a number from 0 to 1"),
        (["--min-p", "-0.1"], "'--min-p': -0.1 is not a number from 0 to 1"),
        (["--min-tokens", "-1"], "'--min-tokens': -1 is not a whole number >= 0"),
        (["--repeat-penalty", "0"], "'--repeat-penalty': 0.0 is not a number > 0"),
        (["--frequency-penalty", "inf"], "'--frequency-penalty': inf is not a finite number"),
        (["--seed", "-1"], "'--seed': -1 is not a whole number from 0 to 2^64 - 1 (cuplama"),
        (["--seed", str(2**64)], "'--seed': 18446744073709551616 is not"),
        (["--stop", ""], "'--stop': the text is empty"),
        (["--logit-bias", "5"], "must look like 42=-1.5"),
        (["--logit-bias", "5=nan"], "must look like 42=-1.5"),
        (["--logit-bias", "-5=1"], "must look like 42=-1.5"),
        (["--logit-bias", "65=1"], "token id 65 is out of range"),
        (["--logprobs", "3"], "--logprobs needs --json"),
        (["--json", "--logprobs", "99"], "'--logprobs': 99 is not a whole number from 0 to 64 (cuplama"),
        (["--device", "tpu"], "'tpu' is not one of"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--context", "0"], "'--context': 0 is not in the range"),
        (["--context", "81"], "context 81 is more than the 80 positions"),
        (["--frobnicate"], "No such option"),
        (["extra"], "unexpected extra argument"),
    ],
)
def test_wrong_options(args: list[str], words: str, fails: Callable[..., str]) -> None:
    device = () if "--device" in args else NUMPY
    message = fails("generate", "First", "-m", CHARS, *device, *args)
    assert words in message
    assert "None" not in message


def test_a_wrong_option_costs_no_loading(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("loaded")  # an internal error, for the command line

    monkeypatch.setattr("cuplama.cli.main.load", load)
    (tmp_path / "text").write_text("To be or not to be")
    for command in (("generate", "x"), ("chat",)):
        assert "'--top-p'" in fails(*command, "-m", CHARS, "--top-p", "2")
    assert "--stride = 9" in fails("perplexity", str(tmp_path / "text"), "-m", CHARS, "--window", "9", "--stride", "9")


def test_bench_refuses_before_it_works(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("cuplama.lab.bench.run", lambda *_: pytest.fail("it works"))
    monkeypatch.chdir(tmp_path)
    assert "there is no folder nowhere" in fails("bench", "--plot", "nowhere/x.png")
    for name in ("x.doc", "x"):
        assert "the name must end in one of" in fails("bench", "--plot", name)
    assert "'0' is not a list of sequence counts such as 1,8" in fails("bench", "-b", "0")
    assert "--dummy-weights needs -m" in fails("bench", "--dummy-weights")  # and no word of the bundled model


def test_wrong_usage(fails: Callable[..., str]) -> None:
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
def test_broken_folders(fault: str, words: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    folder = broken(tmp_path / "model", fault)
    message = fails("generate", "Hi", "-m", str(folder), *NUMPY)
    assert words in message
    assert str(folder) in message


def test_wrong_models(tmp_path: Path, fails: Callable[..., str]) -> None:
    for command in (("generate", "x"), ("info",), ("graph",), ("tokenize", "x"), ("chat",), ("perplexity", __file__)):
        assert "does not exist" in fails(*command, "-m", str(tmp_path / "nowhere"))
    assert "is a file; give the folder" in fails("info", "-m", __file__)
    assert "'' does not exist" in fails("info", "-m", "")
    assert "nowhere\\nat all" in fails("info", "-m", "nowhere\nat all")
    assert "tokenizer.json does not exist" in fails("tokenize", "x", "-m", LLAMA)
    assert "no chat template" in fails("chat", "-m", CHARS, *NUMPY)


def test_wrong_prompts(tmp_path: Path, fails: Callable[..., str]) -> None:
    generate = ("generate", "-m", CHARS, *NUMPY)
    assert "the prompt has 90 tokens; the context has room for 79" in fails(*generate, "a" * 90)
    assert "the prompt is empty and the model has no BOS" in fails(*generate, "")
    assert "the prompt is empty and the model has no BOS" in fails(*generate, "-")
    assert "standard input is not valid UTF-8: byte 0xff at offset 2" in fails(*generate, "-", stdin=b"ab\xff")
    assert "not valid Unicode" in fails(*generate, "a\udcff")  # how Python passes on a byte that is not UTF-8
    assert "token id 65 is out of range" in fails("tokenize", "3 65", "-m", CHARS, "--decode")
    assert "token id -1 is out of range" in fails("tokenize", "-m", CHARS, "--decode", "--", "-1")
    assert "takes token ids; 'three' is not a whole number" in fails("tokenize", "three", "-m", CHARS, "--decode")


def test_wrong_files(tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    perplexity = ("perplexity", "-m", CHARS, *NUMPY)
    assert "fewer than two tokens" in fails(*perplexity, str(tmp_path / "empty"))
    assert "latin is not valid UTF-8: byte 0xe9 at offset 3" in fails(*perplexity, str(tmp_path / "latin"))
    assert "nothing: No such file" in fails(*perplexity, str(tmp_path / "nothing"))
    assert "Is a directory" in fails(*perplexity, str(tmp_path))
    (tmp_path / "text").write_text("To be or not to be")
    for option, value, words in (
        ("--context", "1", "--context = 1 is too short; a window needs at least 2 tokens"),
        ("--window", "1", "--window = 1 is out of range; it must be from 2 to 80"),
        ("--window", "81", "--window = 81 is out of range"),
        ("--stride", "0", "--stride = 0 is out of range; it must be from 1 to 79"),
        ("--stride", "80", "--stride = 80 is out of range"),
    ):
        assert words in fails(*perplexity, str(tmp_path / "text"), option, value)


def test_hub_ids_offline(fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    begin = time.perf_counter()
    message = fails("generate", "x", "-m", "cuplama-test/nothing", "--offline")
    assert "cuplama-test/nothing: no such folder, and as a hub id: it is not in the local cache" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline" in fails("info", "-m", "cuplama-test/nothing")
    assert time.perf_counter() - begin < 5


def test_debug_shows_the_traceback(run: Run) -> None:
    from cuplama.errors import ConfigError

    with pytest.raises(ConfigError, match="does not exist"):
        run("info", "-m", "/nowhere", "--debug")


def test_what_is_no_ones_fault_is_called_internal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import cuplama.cli

    def bug(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(cuplama.cli, "load", bug)
    status, _, err = run("generate", "x", "-m", CHARS)
    assert (status, err) == (1, "cuplama: internal error: ZeroDivisionError: two lines (--debug shows where)\n")


# --- Real processes -------------------------------------------------------------------------------


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


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


@pytest.mark.parametrize("args", ["generate First -n 4000 --context 5000 --temp 1.5 --ignore-eos", "graph"])
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


@pytest.mark.parametrize("stats", [False, True])
def test_ctrl_c_ends_generate_with_130(stats: bool, talker: str) -> None:
    args = ["generate", "First", "-m", talker, *NUMPY, "-n", "-1", "--context", "20000", "--ignore-eos"]
    with subprocess.Popen(
        [*LAUNCHER, *args, *(["--stats"] if stats else [])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        said = process.stderr.read().strip().decode()
        assert re.fullmatch(r"prompt: 5 tokens in .*, then \d+ tokens in .*" if stats else "", said)


def test_as_a_module() -> None:
    args = [sys.executable, "-m", "cuplama", "--version"]
    done = subprocess.run(args, capture_output=True, env=environment(), timeout=60, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"cuplama, version {cuplama.__version__}\n", "")


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


def test_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuplama.cli.main import _progress

    for step, shown in ((0.01, False), (1.0, True)):
        clock, stderr = iter(range(10**6)), Teletype()
        monkeypatch.setattr("cuplama.cli.main.time.perf_counter", lambda clock=clock, step=step: next(clock) * step)
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("TERM", "xterm")
        with _progress("loading", "B") as update:
            for done in range(5):
                update(done, 4)
        assert ("loading" in stderr.getvalue()) == shown
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with _progress("loading", "B") as update:
        update(1, 2)


def test_generate_in_a_terminal_shows_the_prompt() -> None:
    terminal = Terminal([*LAUNCHER, "generate", "First", "-m", CHARS, *NUMPY, "-n", "5"], environment(TERM="dumb"))
    text = terminal.until("\r\n")
    assert re.sub(r"\x1b\[\d*m", "", text).startswith("First")
    assert len(re.sub(r"\x1b\[\d*m", "", text)) == 10
    assert terminal.status() == 0
    terminal = Terminal([*LAUNCHER, "generate", "First", "-m", CHARS, *NUMPY, "--logit-bias", "65=1"], environment())
    assert terminal.until("\r\n").startswith("cuplama: logit_bias: token id 65")  # no prompt before it
    assert terminal.status() == 2


# --- Chat -----------------------------------------------------------------------------------------


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


def test_chat_checks_its_parameters_before_the_first_question(fails: Callable[..., str], talker: str) -> None:
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


class Terminal:
    """A process whose standard streams are a terminal."""

    def __init__(self, args: list[str], env: dict[str, str]) -> None:
        self.seen = b""
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execve(args[0], args, env)

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, words: str, seconds: float = 30) -> str:
        """Read up to and including the words."""
        end = time.monotonic() + seconds
        while words.encode() not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{words!r} did not come: {self.seen!r}"
            self.seen += os.read(self.fd, 4096)
        text, _, self.seen = self.seen.partition(words.encode())
        return text.decode(errors="replace")

    def status(self) -> int:
        """Read to the end, and wait."""
        try:
            while os.read(self.fd, 4096):
                pass
        except OSError:  # the terminal is gone
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


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
