"""What options are refused, and where those that are accepted arrive."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cuplama.cli.conversation import Conversation
from cuplama.cli.main import cli
from cuplama.completion import Clock, Completion, Delta, Stream, Timings
from cuplama.lab.dummy import Source
from cuplama.lab.perplexity import Perplexity
from cuplama.lab.trials import trials
from cuplama.sampling_params import PARAMETERS, SamplingParams
from tests.tiny import CHARS as CHARS_FOLDER
from tests.tiny import LLAMA as LLAMA_FOLDER

CHARS, LLAMA = str(CHARS_FOLDER), str(LLAMA_FOLDER)
NUMPY = ("--device", "numpy")
Run = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]


def test_options_are_listed_from_the_first_needed_to_the_last(run: Run) -> None:
    for command in ("generate", "chat", "perplexity", "info", "graph", "tokenize", "bench"):
        help_ = run(command, "--help")[1]
        names = re.findall(r"^  (-[^ ,]+)", help_, re.M)
        assert (names[0], names[-2:]) == ("-m", ["--debug", "-h"])
    assert "..." not in run("--help")[1].partition("Commands:")[2]


def test_help_is_readable_at_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in cli.commands:
        help_ = run(command, "--help")[1]
        assert max(map(len, help_.splitlines())) <= 80
        assert not re.findall(r"\B-[a-z-]*-$", help_, re.M)  # the name of an option, broken


def test_help_tells_the_names_that_other_programs_have(run: Run) -> None:
    help_ = " ".join(run("generate", "--help")[1].split())
    assert "-c, --context N Tokens a text" in help_
    for names in ("--ctx-size", "--n-predict, --predict, --max-new-tokens", "--repetition-penalty"):
        assert f"[also: {names}]" in help_


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--temp", "hot"], "'hot' is not a valid float"),
        (["--temp", "nan"], "'--temp' / '--temperature': nan is not a number >= 0"),
        (["--temp", "-1"], "'--temp' / '--temperature': -1.0 is not a number >= 0"),
        (["-n", "-5"], "'-n' / '--max-tokens': -5 is not a whole number >= 0, or -1: until the context is full"),
        (["-n", "1.5"], "'1.5' is not a valid integer"),
        (["--top-k", "-2"], "'--top-k': -2 is not a whole number >= 0"),
        (["--top-p", "2"], "'--top-p': 2.0 is not a number from 0 to 1"),
        (["--min-p", "-0.1"], "'--min-p': -0.1 is not a number from 0 to 1"),
        (["--min-tokens", "-1"], "'--min-tokens': -1 is not a whole number >= 0"),
        (["--repeat-penalty", "0"], "'--repeat-penalty': 0.0 is not a number > 0"),
        (["--frequency-penalty", "inf"], "'--frequency-penalty': inf is not a finite number"),
        (["--seed", "-1"], "'--seed': -1 is not a whole number from 0 to 2^64 - 1 (cuplama"),
        (["--seed", str(2**64)], "'--seed': 18446744073709551616 is not"),
        (["--max-tokens", "5", "--min-tokens", "6"], "--max-tokens 5 is less than --min-tokens 6 (cuplama"),
        (["--repetition-penalty", "0"], "'--repeat-penalty': 0.0 is not a number > 0"),
        (["--stop", ""], "'--stop': the text is empty"),
        (["--logit-bias", "5"], "must look like 42=-1.5"),
        (["--logit-bias", "5=nan"], "must look like 42=-1.5"),
        (["--logit-bias", "-5=1"], "must look like 42=-1.5"),
        (["--logit-bias", "65=1"], "token id 65 is out of range"),
        (["--logprobs", "3"], "--logprobs needs --json"),
        (["--json", "--logprobs", "99"], "'--logprobs': 99 is not a whole number from 0 to 64 (cuplama"),
        (["--device", "tpu"], "'tpu' is not one of"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--kv-cache-dtype", "int8"], "'int8' is not one of 'auto', 'fp8'"),
        (["--context", "0"], "'-c' / '--context': 0 is not in the range"),
        (["--context", "81"], "context 81 is more than the 80 positions"),
        (["--frobnicate"], "No such option"),
        (["extra"], "unexpected extra argument"),
        (["-p", "extra"], "the same is given 2 times, by PROMPT and -p; give it once (cuplama"),
        (["--echo", "--json"], "--echo does not go with --json (cuplama"),
    ],
)
def test_wrong_options(args: list[str], words: str, fails: Fails) -> None:
    device = () if "--device" in args else NUMPY
    message = fails("generate", "First", "-m", CHARS, *device, *args)
    assert words in message
    assert "None" not in message


def test_a_wrong_option_costs_no_loading(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("loaded")  # an internal error, for the command line

    monkeypatch.setattr("cuplama.cli.running.load", load)
    (tmp_path / "text").write_text("To be or not to be")
    for command in (("generate", "x"), ("chat",)):
        assert "'--top-p'" in fails(*command, "-m", CHARS, "--top-p", "2")
    contradiction = ("--max-tokens", "5", "--min-tokens", "6")
    assert "less than --min-tokens" in fails("generate", "x", "-m", CHARS, *contradiction)
    assert "Missing argument 'PROMPT'" in fails("generate", "-m", CHARS)
    assert "--stride = 9" in fails("perplexity", str(tmp_path / "text"), "-m", CHARS, "--window", "9", "--stride", "9")


# --- Where options arrive -------------------------------------------------------------------------

# The options of a model that runs -> the parameter of ``load`` and its value.
LOAD: list[tuple[str, str, Any]] = [
    ("--device numpy", "device", "numpy"),
    ("--device cuda", "device", "cuda"),
    ("--device cpu", "device", "numpy"),
    ("--device gpu", "device", "cuda"),
    ("--dtype float16", "dtype", "float16"),
    ("--dtype bf16", "dtype", "bf16"),
    ("--quantize int4", "quantize", "int4"),
    ("--activations fp8", "activations", "fp8"),
    ("--deterministic", "deterministic", True),
    ("--kv-cache-dtype fp8", "kv_cache_dtype", "fp8"),
    ("--context 33", "context", 33),
    ("-c 33", "context", 33),
    ("--ctx-size 33", "context", 33),
    (f"--adapter {LLAMA_FOLDER}", "adapter", str(LLAMA_FOLDER)),
]
LOAD_DEFAULTS = {
    "device": "auto", "dtype": "auto", "quantize": None, "context": None, "kv_cache_dtype": "auto",
    "activations": "auto", "deterministic": False, "adapter": None, "offline": True,
}  # fmt: skip
# The sampling options -> the field of SamplingParams and its value.
SAMPLING: list[tuple[str, str, Any]] = [
    ("-n 7", "max_tokens", 7),
    ("--max-tokens 7", "max_tokens", 7),
    ("-n -1", "max_tokens", None),
    ("--n-predict 7", "max_tokens", 7),
    ("--predict -1", "max_tokens", None),
    ("--max-new-tokens 7", "max_tokens", 7),
    ("--max_new_tokens 7", "max_tokens", 7),
    ("--top_k 9", "top_k", 9),
    ("--temp 0.5", "temperature", 0.5),
    ("--temperature 0.5", "temperature", 0.5),
    ("--top-k 9", "top_k", 9),
    ("--top-p 0.25", "top_p", 0.25),
    ("--min-p 0.125", "min_p", 0.125),
    ("--repeat-penalty 1.5", "repetition_penalty", 1.5),
    ("--repetition-penalty 1.5", "repetition_penalty", 1.5),
    ("--presence-penalty -0.5", "presence_penalty", -0.5),
    ("--frequency-penalty 0.75", "frequency_penalty", 0.75),
    ("--logit-bias 5=1.5 --logit-bias 6=-inf", "logit_bias", {5: 1.5, 6: -math.inf}),
    ("--seed 11", "seed", 11),
    ("-s 11", "seed", 11),
    ("--stop a --stop b", "stop", ("a", "b")),
    ("--stop a -r b --reverse-prompt c", "stop", ("a", "b", "c")),
    ("--min-tokens 3", "min_tokens", 3),
    ("--ignore-eos", "ignore_eos", True),
    ("--regex [a-z]+", "regex", "[a-z]+"),
]

CHAT = {"system": None, "stats": False}  # what reaches a chat without any option


class Recorder:
    """Stands for ``load`` and for the model that it returns; keeps what both are called with."""

    def __init__(self) -> None:
        self.model: Any = ...
        self.loaded: dict[str, Any] = {}
        self.prompt = ""
        self.given: dict[str, Any] = {}
        self.context = 80
        self.tokenizer = SimpleNamespace(chat_template=None)

    def load(self, model: Any, **options: Any) -> Recorder:
        assert callable(options.pop("progress"))
        self.model, self.loaded = model, options
        return self

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stream(self, prompt: str, progress: Callable[[int, int], None], **params: Any) -> Stream:
        self.prompt, self.given = prompt, params
        nothing: tuple[Delta, ...] = ()
        completion = Completion("", [], "length", None, Timings(1, 1.0, 0, 0.0), params=SamplingParams(**params))
        return Stream((delta for delta in nothing), Clock(), lambda: [completion])


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr("cuplama.cli.running.load", found.load)

    def session(
        model: Recorder, sampling: dict[str, Any], template: dict[str, Any], conversation: Conversation, stats: bool
    ) -> SimpleNamespace:
        model.given = {**sampling, **template, "system": conversation.system, "stats": stats}
        return SimpleNamespace(check=lambda: None, ask=lambda question, show: SimpleNamespace(finish_reason="stop"))

    def score(model: Recorder, text: str, window: int, stride: int, progress: Any) -> Perplexity:
        model.given = {"text": text, "window": window, "stride": stride}
        return Perplexity(tokens=1, nats=1.0, squares=1.0, size=1)

    monkeypatch.setattr("cuplama.cli.chat.ChatSession", session)
    monkeypatch.setattr("cuplama.lab.perplexity.perplexity", score)
    return found


@pytest.mark.parametrize(("option", "name", "value"), LOAD)
@pytest.mark.parametrize("command", ["generate", "chat", "perplexity"])
def test_options_that_reach_load(
    command: str, option: str, name: str, value: Any, run: Run, recorder: Recorder, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("To be")
    argument = [str(tmp_path / "text") if command == "perplexity" else "Hi"]
    assert run(command, *argument, "-m", CHARS)[0] == 0
    assert (recorder.model, recorder.loaded) == (CHARS, LOAD_DEFAULTS)
    assert run(command, *argument, "-m", CHARS, *option.split())[0] == 0
    assert (recorder.model, recorder.loaded) == (CHARS, {**LOAD_DEFAULTS, name: value})


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_no_model_is_the_bundled_one(command: str, run: Run, recorder: Recorder) -> None:
    assert run(command, "Hi")[0] == 0
    assert recorder.model is None


@pytest.mark.parametrize(("option", "name", "value"), SAMPLING)
def test_options_that_reach_generate(option: str, name: str, value: Any, run: Run, recorder: Recorder) -> None:
    for json_ in ([], ["--json"]):
        assert run("generate", "Hi", *json_)[0] == 0
        assert (recorder.prompt, recorder.given) == ("Hi", {})  # the model's own defaults are not overridden
        assert run("generate", "Hi", *json_, *option.split())[0] == 0
        assert (recorder.prompt, recorder.given) == ("Hi", {name: value})


def test_logprobs_reach_generate(run: Run, recorder: Recorder) -> None:
    assert run("generate", "Hi", "--json", "--logprobs", "0")[0] == 0
    assert recorder.given == {"logprobs": 0}


@pytest.mark.parametrize(("option", "name", "value"), SAMPLING)
def test_options_that_reach_chat(option: str, name: str, value: Any, run: Run, recorder: Recorder) -> None:
    assert run("chat", "Hi")[0] == 0
    assert recorder.given == {**CHAT, "max_tokens": None}  # not the 512 of generate: as long as the context allows
    assert run("chat", "Hi", *option.split())[0] == 0
    assert recorder.given == {**CHAT, "max_tokens": None, name: value}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--system nice --stats", {"system": "nice", "stats": True}),
        ("--template-arg enable_thinking=false", {"enable_thinking": False}),
        ("--template-arg a=1 --template-arg b=high --template-arg c=", {"a": 1, "b": "high", "c": ""}),
        ("--template-arg a=1=2", {"a": "1=2"}),
        ('--template-arg a={"b":[null]}', {"a": {"b": [None]}}),
        ("--special-text", {"special_text": True}),
        ("--tools FILE --documents FILE", {"tools": [{"a": 1}], "documents": [{"a": 1}]}),
    ],
)
def test_what_reaches_the_template_of_chat(
    options: str, found: dict[str, Any], run: Run, recorder: Recorder, tmp_path: Path
) -> None:
    (tmp_path / "list.json").write_text('[{"a": 1}]')
    assert run("chat", "Hi", *options.replace("FILE", str(tmp_path / "list.json")).split())[0] == 0
    assert recorder.given == {**CHAT, "max_tokens": None, **found}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--template-arg thinking", "must look like enable_thinking=false"),
        ("--template-arg =false", "must look like enable_thinking=false"),
        ("--template-arg no-think=1", "must look like enable_thinking=false"),
        ("--template-arg messages=[]", "messages is not a variable that can be set"),
        ("--template-arg tools=[]", "tools is not a variable that can be set; see the other options"),
        ("--tools FILE", "list.json is not JSON: Expecting"),
        ("--documents FILE", "list.json is not JSON: Expecting"),
        ("--tools OBJECT", "object.json must hold a JSON list of objects"),
        ("--tools nowhere", "cannot read nowhere: No such file"),
    ],
)
def test_wrong_options_of_chat(option: str, words: str, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[{")
    (tmp_path / "object.json").write_text("{}")
    option = option.replace("FILE", str(tmp_path / "list.json")).replace("OBJECT", str(tmp_path / "object.json"))
    assert words in fails("chat", "Hi", "-m", "not loaded", *option.split())


def test_every_sampling_parameter_has_an_option() -> None:
    """But token ids that stop, of which users know the text; what is said of a prompt, which perplexity says; and to
    show special tokens, which --json tells by their ids."""
    from_files = {"json_schema", "grammar"}
    found = {name for _, name, _ in SAMPLING} | {"logprobs"} | from_files
    assert found == set(PARAMETERS) - {"stop_token_ids", "prompt_logprobs", "show_special"}


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_forms_from_files(command: str, run: Run, recorder: Recorder, fails: Fails, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "a.lark"
    schema.write_text('{"type": "null"}')
    grammar.write_text('start: "a"')
    assert run(command, "Hi", "--json-schema", str(schema))[0] == 0
    assert recorder.given["json_schema"] == {"type": "null"}
    assert run(command, "Hi", "--grammar", str(grammar))[0] == 0
    assert recorder.given["grammar"] == 'start: "a"'
    for args, words in (
        (["--json-schema", str(schema), "--regex", "a"], "--json-schema and --regex do not go together"),
        (["--json-schema", str(grammar)], "json_schema = 'start: \"a\"' is no JSON: Expecting value"),
        (["--grammar", "nowhere"], "cannot read nowhere: No such file"),
        (["--regex", ""], "regex = '' is out of range"),
    ):
        assert words in fails(command, "Hi", "-m", "not loaded", *args)


@pytest.mark.parametrize(
    ("options", "window", "stride"),
    [
        ("", 80, 40),
        ("--context 50", 50, 25),
        ("--window 20", 20, 10),
        ("--window 20 --stride 7", 20, 7),
        ("--stride 7", 80, 7),
    ],
)
def test_options_that_reach_perplexity(
    options: str, window: int, stride: int, run: Run, recorder: Recorder, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("To be")
    assert run("perplexity", str(tmp_path / "text"), "-m", CHARS, *options.split())[0] == 0
    assert recorder.given == {"text": "To be", "window": window, "stride": stride}


def test_offline_reaches_the_hub(run: Run, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is looked up once, with progress; a model is then loaded from what is here."""
    asked: list[tuple[str, bool]] = []

    def find(model: str, offline: bool, progress: Callable[[int, int], None]) -> Path:
        progress(1, 2)
        asked.append((model, offline))
        return CHARS_FOLDER

    monkeypatch.setattr("cuplama.hub.find_model", find)
    (tmp_path / "text").write_text("To be")
    for command in (["generate", "Hi"], ["chat", "Hi"], ["info"], ["graph"], ["tokenize", "Hi"]):
        for offline in (False, True):
            assert run(*command, "-m", "org/name", *(["--offline"] if offline else []))[0] == 0
            assert asked == [("org/name", offline)]
            asked.clear()
    assert recorder.loaded["offline"]
    assert run("perplexity", str(tmp_path / "text"), "-m", "org/name", "--offline")[0] == 0
    assert asked == [("org/name", True), (CHARS, True)]


# An option of bench -> what of its call is then not the default.
BENCH: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("-m there", {"source": Source("there")}),
    ("-m there --dummy-weights", {"source": Source("there", dummy=True)}),
    ("--device numpy", {"source": Source(None, device="numpy")}),
    ("--dtype fp16", {"source": Source(None, dtype="fp16")}),
    ("--quantize fp8", {"source": Source(None, quantize="fp8")}),
    ("--activations fp8", {"source": Source(None, activations="fp8")}),
    ("--deterministic", {"source": Source(None, deterministic=True)}),
    ("--kv-cache-dtype fp8", {"source": Source(None, kv_cache_dtype="fp8")}),
    ("-p 5,6", {"wanted": trials([5, 6], [128], [0], [1])}),
    ("-n 5,6", {"wanted": trials([512], [5, 6], [0], [1])}),
    ("-d 5,6", {"wanted": trials([512], [128], [5, 6], [1])}),
    ("-b 5,6", {"wanted": trials([512], [128], [0], [5, 6])}),
    ("-r 3", {"repeats": 3}),
    ("--no-cold-start", {"cold_start": False}),
    ("-o csv", {"form": "csv"}),
    ("--plot x.png", {"plot": Path("x.png")}),
]


@pytest.mark.parametrize(("options", "changes"), BENCH)
def test_options_that_reach_bench(
    options: str, changes: dict[str, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {"plot": None}

    def measure(source: Source, wanted: Any, repeats: int, cold_start: bool, say: Any) -> dict[str, Any]:
        found.update(source=source, wanted=wanted, repeats=repeats, cold_start=cold_start)
        return {}

    def text(result: dict[str, Any], form: str) -> str:
        found["form"] = form
        return ""

    monkeypatch.setattr("cuplama.lab.bench.run", measure)
    monkeypatch.setattr("cuplama.lab.bench.text", text)
    monkeypatch.setattr("cuplama.lab.bench.plot", lambda result, path: found.update(plot=path))
    monkeypatch.setattr("cuplama.lab.report.check_picture", lambda path: None)  # matplotlib need not be here
    assert run("bench", *options.split())[0] == 0
    defaults = {"source": Source(None), "wanted": trials([512], [128], [0], [1]), "repeats": 5, "cold_start": True}
    assert found == {**defaults, "form": "md", "plot": None, **changes}


@pytest.mark.parametrize(
    ("options", "tokens"), [("", "auto"), ("--cache-tokens auto", "auto"), ("--cache-tokens 700", 700)]
)
def test_cache_tokens_reach_what_is_served(
    options: str, tokens: int | str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    lifecycle = pytest.importorskip("cuplama.server.lifecycle", reason="serve needs its extra")
    loaded: list[Any] = []
    monkeypatch.setattr("cuplama.cli.serve.open_model", lambda *_, **more: loaded.append(more["cache_tokens"]))
    monkeypatch.setattr("cuplama.server.warm_up.warm_up", lambda model: None)
    monkeypatch.setattr(lifecycle, "serve", lambda service, load, sock, **more: (load(), sock.close()))
    assert run("serve", "--port", "0", *options.split())[0] == 0
    assert loaded == [tokens]


@pytest.mark.parametrize("value", ["0", "-5", "most", "1.5", "²", str(2**30 + 1)])
def test_cache_tokens_that_are_no_number(value: str, fails: Fails) -> None:
    message = fails("serve", "--cache-tokens", value)
    assert f"'--cache-tokens': '{value}' is not a number from 1 to 1073741824, or auto (cuplama" in message
