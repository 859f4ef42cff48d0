"""The command line. Text goes to stdout, everything else to stderr; it holds no model code."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from .. import __version__
from ..completion import Completion, Stream, Timings
from ..errors import CuplamaError, ParameterError, PromptError
from ..lab.dummy import Source
from ..lab.report import check_picture, counted
from ..lab.trials import trials
from ..load import context_length, find_model, load
from ..model import Model
from ..sampling_params import SamplingParams
from .kernels import DEBUG, kernels

__all__ = ["Command", "bench", "chat", "cli", "doctor", "generate", "graph", "info", "main", "perplexity", "tokenize"]

Command = Callable[..., Any]
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="cuplama")
def cli() -> None:
    """Run Llama-family language models: no PyTorch, no conversion, a GPU if there is one."""


cli.add_command(kernels)


def main(prog_name: str = "cuplama") -> NoReturn:
    """Run the command line. What a user can cause ends in one line on stderr and exit status 2."""
    if sys.stderr is None:  # `cuplama ... 2>&-`: Python has no stream for what is closed
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)
    if sys.stdout is None:
        _fail("standard output is closed", 2)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    logging.basicConfig(format="cuplama: %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        cli.main(prog_name=prog_name, standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # `cuplama ... | head -1` ends quietly
        _drop_output()
        sys.exit(1)
    except click.ClickException as e:
        if type(e).__name__ == "NoArgsIsHelpError":  # no command: its message is the help text (click 8.2 and later)
            e.show()
            sys.exit(e.exit_code)
        help_ = f" ({e.ctx.command_path} --help)" if isinstance(e, click.UsageError) and e.ctx is not None else ""
        _fail(f"{e.format_message()}{help_}", e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except CuplamaError as e:
        if "--debug" in sys.argv:
            raise
        _fail(str(e), 2)
    except OSError as e:  # a full disk, a terminal that is gone; files are named where they are opened
        if "--debug" in sys.argv:
            raise
        _drop_output()
        _fail(f"{e.filename or 'reading or writing failed'}: {e.strerror or e}", 2)
    except Exception as e:
        if "--debug" in sys.argv:
            raise
        _fail(f"internal error: {type(e).__name__}: {e} (--debug shows where)", 1)
    sys.exit(0)


def _drop_output() -> None:
    """What could not be written must not be tried again when the interpreter ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int) -> NoReturn:
    """One line on stderr, whatever the message holds."""
    click.echo(f"cuplama: {' '.join(message.splitlines())}", err=True)
    sys.exit(status)


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator for several options, in the order in which --help lists them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _model_option(also: str = "") -> Callable[[Command], Command]:
    text = f"Folder or hub id (org/name){also}.  [default: the bundled story model]"
    return click.option("-m", "--model", metavar="MODEL", help=text)


_SHAPES = ", or a known shape such as llama-3.2-1b"
_OFFLINE = click.option("--offline", is_flag=True, help="Never ask the hub; use what was downloaded before.")
# Where and how a model runs.
_run_options = _options(
    click.option("--device", type=click.Choice(["auto", "cuda", "numpy"]), default="auto", help="Where to run."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16", "fp32", "fp16", "bf16"]),
        default="auto",
        metavar="DTYPE",
        help="float32, float16, bfloat16 or auto: the checkpoint's on CUDA, float32 on NumPy.",
    ),
    click.option(
        "--context",
        type=click.IntRange(1),
        metavar="N",
        help="Tokens a sequence may have.  [default: the model's, at most 8192]",
    ),
    _OFFLINE,
    DEBUG,
)


def _bias(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[int, float] | None:
    try:
        given = {int(i): float(v) for i, v in (value.split("=") for value in values)}
        SamplingParams(logit_bias=given)
    except ValueError:  # a ParameterError is one
        raise click.BadParameter("must look like 42=-1.5: a token id and a number (-inf bans the token)") from None
    return given or None


def _stops(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...] | None:
    if "" in values:
        raise click.BadParameter("the text is empty")
    return values or None


def _checked(_: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Check a sampling option before anything is loaded. SamplingParams knows what it may be; -n -1 is its None."""
    name = str(parameter.name)
    if value is None or (name == "max_tokens" and value == -1):
        return value
    try:
        SamplingParams(**{name: value})
    except ParameterError as e:
        wanted = str(e).partition("it must be ")[2].removesuffix(", or None")
        more = ", or -1: until the context is full" if name == "max_tokens" else ""
        raise click.BadParameter(f"{value} is not {wanted}{more}") from None
    return value


def _sampling_option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    return click.option(*names, callback=_checked, **settings)


# The fields of SamplingParams; what is not given comes from the model's generation_config.json.
_sampling_options = _options(
    _sampling_option(
        "-n",
        "--max-tokens",
        type=int,
        metavar="N",
        help="Tokens at most; -1: until the context is full.  [default: 512]",
    ),
    _sampling_option("--temp", "--temperature", "temperature", type=float, metavar="T", help="0 is greedy."),
    _sampling_option("--top-k", type=int, metavar="K", help="Keep the K best tokens; 0 is off."),
    _sampling_option("--top-p", type=float, metavar="P", help="Keep the best tokens that together reach P."),
    _sampling_option(
        "--min-p", type=float, metavar="P", help="Keep tokens with at least P times the best probability."
    ),
    _sampling_option(
        "--repeat-penalty",
        "repetition_penalty",
        type=float,
        metavar="X",
        help="Divide the logits of tokens that occurred by X; 1 is off.",
    ),
    _sampling_option("--presence-penalty", type=float, metavar="X", help="Subtract X from tokens that occurred."),
    _sampling_option("--frequency-penalty", type=float, metavar="X", help="Subtract X per earlier occurrence."),
    click.option(
        "--logit-bias",
        multiple=True,
        callback=_bias,
        metavar="ID=X",
        help="Add X to a token's logit; -inf bans it (repeatable).",
    ),
    _sampling_option("--seed", type=int, metavar="N", help="The same seed gives the same text."),
    click.option(
        "--stop", multiple=True, callback=_stops, metavar="TEXT", help="End the text before this string (repeatable)."
    ),
    _sampling_option("--min-tokens", type=int, metavar="N", help="No stop token before N tokens."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Do not stop at the model's stop tokens."),
)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The sampling options that were given."""
    given = {k: v for k, v in options.items() if v is not None}
    if given.get("max_tokens") == -1:
        given["max_tokens"] = None
    return given


@contextmanager
def _progress(description: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, in a terminal only, once the work has lasted half a second."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import progress as rich
    from rich.console import Console

    sizes = (rich.DownloadColumn(), rich.TransferSpeedColumn())
    counts = sizes if unit == "B" else (rich.MofNCompleteColumn(), rich.TextColumn(unit))
    columns = (rich.TextColumn(description), rich.BarColumn(), *counts, rich.TimeRemainingColumn())
    bar = rich.Progress(*columns, console=Console(stderr=True), transient=True)
    task, begin = bar.add_task(description), time.perf_counter()

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done < total and time.perf_counter() - begin > 0.5:
            bar.start()

    try:
        yield update
    finally:
        if bar.live.is_started:  # stopping prints an empty line on a dumb terminal
            bar.stop()


def _load(model: str | None, offline: bool, device: str, dtype: str, context: int | None) -> Model:
    with _progress("loading", "B") as progress:
        return load(model, device=device, dtype=dtype, context=context, offline=offline, progress=progress)


def _standard_input() -> str:
    """All of it, to the last byte."""
    if sys.stdin is None:  # `cuplama ... <&-`
        raise PromptError("standard input is closed")
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise PromptError(
            f"standard input is not valid UTF-8: byte 0x{data[e.start]:02x} at offset {e.start}"
        ) from None


def _read_text(source: str) -> str:
    """An argument as it is; "-" is standard input, without the newline that ends it."""
    return source if source != "-" else _standard_input().removesuffix("\n").removesuffix("\r")


def _print_json(facts: dict[str, Any], indent: int | None = None) -> None:
    click.echo(json.dumps(facts, ensure_ascii=False, allow_nan=False, indent=indent))


def _finite(value: float, digits: int) -> float | None:
    """A rounded number for JSON, which has none for infinity."""
    return round(value, digits) if math.isfinite(value) else None


@cli.command()
@click.argument("prompt")
@_model_option()
@_sampling_options
@_sampling_option("--logprobs", type=int, metavar="N", help="With --json: log-probabilities, and those of the N best.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming text.")
@click.option("--stats", is_flag=True, help="Print tokens and speed to stderr at the end.")
@_run_options
def generate(
    prompt: str,
    model: str | None,
    offline: bool,
    device: str,
    dtype: str,
    context: int | None,
    as_json: bool,
    stats: bool,
    **options: Any,
) -> None:
    """Continue PROMPT. "-" reads the prompt from standard input.

    The text is streamed to stdout. In a terminal the prompt is shown before it.

    Sampling options that are not given come from the model's generation_config.json.
    """
    if options["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    text = _read_text(prompt)
    interrupted = False
    with _load(model, offline, device, dtype, context) as m:
        params = _given(options)
        with _progress("reading the prompt", "tokens") as progress:
            if as_json:
                completion = m.generate(text, progress=progress, **params)
                _print_json(_as_json(completion))
                timings = completion.timings
            else:
                stream = m.stream(text, progress=progress, **params)  # refuses what it must before the prompt is shown
                try:
                    _show(text, stream)
                except KeyboardInterrupt:
                    interrupted = True
                timings = stream.timings
        if stats:
            # A text that goes to a file or a pipe ends without a line break; both may end up on one screen.
            on_a_new_line = as_json or sys.stdout.isatty()
            click.echo(("" if on_a_new_line else "\n") + _stats(timings), err=True)
    if interrupted:
        raise KeyboardInterrupt


def _show(prompt: str, stream: Stream) -> None:
    """Write the text as it comes; in a terminal after the prompt and with a line break at the end."""
    if sys.stderr.isatty() and sys.stdout.isatty():
        click.secho(prompt, err=True, nl=False, dim=True)
    try:
        for piece in stream:
            if piece.text:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
    finally:
        if sys.stdout.isatty():
            sys.stdout.write("\n")


def _stats(t: Timings) -> str:
    prompt, decode = counted(t.prompt_tokens, "token"), counted(t.decode_tokens, "token")
    return (
        f"prompt: {prompt} in {t.prompt_seconds * 1e3:.1f} ms ({t.prompt_rate:.0f} tokens/s), "
        f"then {decode} in {t.decode_seconds:.2f} s ({t.decode_rate:.1f} tokens/s)"
    )


def _as_json(c: Completion) -> dict[str, Any]:
    t = c.timings
    found = {
        "text": c.text,
        "tokens": c.tokens,
        "finish_reason": c.finish_reason,
        "prompt_tokens": t.prompt_tokens,
        "prompt_seconds": round(t.prompt_seconds, 6),
        "decode_seconds": round(t.decode_seconds, 6),
        "tokens_per_second": round(t.decode_rate, 2),
    }
    if c.logprobs is not None:
        found["logprobs"] = [{"id": x.id, "logprob": x.logprob, "top": [list(p) for p in x.top]} for x in c.logprobs]
    return found


@cli.command()
@_model_option()
@_sampling_options
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option("--stats", is_flag=True, help="Print tokens and speed to stderr after each answer.")
@_run_options
def chat(
    model: str | None,
    offline: bool,
    device: str,
    dtype: str,
    context: int | None,
    system: str | None,
    stats: bool,
    **options: Any,
) -> None:
    """Talk to a model that has a chat template. /help lists the commands.

    Sampling options that are not given come from the model's generation_config.json.
    """
    from .repl import repl

    with _load(model, offline, device, dtype, context) as m:
        repl(m, _given(options), system, _stats if stats else None)


@cli.command(short_help="What a model is: parameters, memory, context, stop tokens.")
@_model_option(_SHAPES)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_OFFLINE
@DEBUG
def info(model: str | None, offline: bool, as_json: bool) -> None:
    """What a model is: family, parameters, memory by part, context, stop tokens. Reads no weights."""
    from .model_info import facts, find_config, view

    found = facts(*find_config(model, offline))
    if as_json:
        _print_json(found, indent=1)
        return
    lines = view(found)
    width = max(map(len, lines))
    for name, value in lines.items():
        shown = (", ".join(map(str, value)) or "none") if isinstance(value, list) else value
        click.echo(f"{name:<{width}}  {shown}")


@cli.command()
@_model_option(_SHAPES)
@click.option("--fused", is_flag=True, help="The list that a decode step runs, with what each fused node stands for.")
@_OFFLINE
@DEBUG
def graph(model: str | None, offline: bool, fused: bool) -> None:
    """The list of nodes that a model is, one line each."""
    from ..engine.decode import decode_nodes
    from ..models.graph import decoder
    from .model_info import find_config

    nodes = decoder(find_config(model, offline)[1])
    for node in decode_nodes(nodes) if fused else nodes:
        click.echo(str(node))
        for part in node.parts:
            click.echo(f"    {part}")


@cli.command(short_help="How well a model predicts a text FILE, with the standard error.")
@click.argument("file", type=click.Path(path_type=Path))
@_model_option()
@click.option("--window", type=int, metavar="N", help="Tokens per window.  [default: the context, at most 1024]")
@click.option("--stride", type=int, metavar="N", help="Tokens between windows.  [default: half a window]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_run_options
def perplexity(
    file: Path,
    model: str | None,
    offline: bool,
    device: str,
    dtype: str,
    context: int | None,
    window: int | None,
    stride: int | None,
    as_json: bool,
) -> None:
    """Perplexity of a text FILE ("-": standard input), in nats, bits per byte and with its standard error."""
    from ..lab.perplexity import perplexity as score
    from ..lab.perplexity import window_and_stride
    from ..models.config import load_config

    text = _file_text(file)
    folder = find_model(model, offline)
    limit = context_length(load_config(folder), context)
    try:
        window, stride = window_and_stride(limit, window, stride)  # before the weights are loaded
    except ParameterError as e:
        raise click.UsageError(f"--{e}") from None  # its parameters have the options' names
    with _load(str(folder), offline, device, dtype, context) as m, _progress("scoring", "tokens") as progress:
        result = score(m, text, window, stride, progress)
    facts = {
        "tokens": result.tokens,
        "bytes": result.size,
        "nats_per_token": round(result.nats_per_token, 5),
        "bits_per_byte": round(result.bits_per_byte, 5),
        "perplexity": _finite(result.perplexity, 4),
        "standard_error": _finite(result.error, 4),
    }
    if as_json:
        _print_json(facts)
    else:
        click.echo(f"tokens         {result.tokens} ({counted(result.size, 'byte')})")
        click.echo(f"nats per token {result.nats_per_token:.4f}")
        click.echo(f"bits per byte  {result.bits_per_byte:.4f}")
        click.echo(f"perplexity     {result.perplexity:.3f} ± {result.error:.3f}")


def _file_text(file: Path) -> str:
    if str(file) == "-":
        return _standard_input()
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as e:
        raise PromptError(f"cannot read {file}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise PromptError(f"{file} is not valid UTF-8: byte 0x{e.object[e.start]:02x} at offset {e.start}") from None


@cli.command(short_help='The tokens of TEXT ("-": standard input), one per line.')
@click.argument("text")
@_model_option()
@click.option("--no-bos", is_flag=True, help="Leave out the token that begins a text.")
@click.option("--ids", is_flag=True, help="Print only the ids, on one line.")
@click.option("--decode", is_flag=True, help="TEXT holds token ids; print the text they stand for.")
@_OFFLINE
@DEBUG
def tokenize(text: str, model: str | None, offline: bool, no_bos: bool, ids: bool, decode: bool) -> None:
    """The tokens of TEXT ("-": standard input), one per line: id and text."""
    from ..text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(find_model(model, offline))
    text = _read_text(text)
    if decode:
        numbers = [_token_id(piece) for piece in text.replace(",", " ").split()]
        for n in numbers:
            if not 0 <= n < tokenizer.vocab_size:
                raise PromptError(f"token id {n} is out of range; the tokenizer has {tokenizer.vocab_size}")
        click.echo(tokenizer.decode(numbers, skip_special=False))
        return
    tokens = tokenizer.encode(text, bos=not no_bos)
    if ids:
        click.echo(" ".join(map(str, tokens)))
    else:
        for t in tokens:
            click.echo(f"{t:>7}  {tokenizer.token_shown(t)}")


def _token_id(piece: str) -> int:
    try:
        return int(piece)
    except ValueError:
        raise ParameterError(f"--decode takes token ids; {piece!r:.80} is not a whole number") from None


@cli.command()
@DEBUG
def doctor() -> None:
    """Check driver, CUDA libraries, GPU and cache; say what to mend."""
    from .doctor import run

    sys.exit(run(click.echo))


def _counts(_: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        numbers = tuple(int(piece) for piece in value.split(",") if piece.strip())
    except ValueError:
        numbers = ()
    if parameter.name == "batches" and (not numbers or min(numbers) < 1):
        raise click.BadParameter(f"{value!r} is not a list of sequence counts such as 1,8, each at least 1")
    if not numbers or min(numbers) < 0:
        raise click.BadParameter(f"{value!r} is not a list of token counts such as 512,2048")
    return numbers


def _picture(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    if path is not None:
        check_picture(path)
    return path


@cli.command(short_help="How fast a model reads prompts and generates.")
@click.option(
    "-m",
    "--model",
    metavar="MODEL",
    help="Folder, hub id, or with --dummy-weights a known shape such as llama-3.2-1b.  [default: the story model]",
)
@click.option(
    "-p",
    "prompts",
    callback=_counts,
    default="512",
    show_default=True,
    metavar="N,...",
    help="Tokens of the prompts that are read.",
)
@click.option(
    "-n",
    "generated",
    callback=_counts,
    default="128",
    show_default=True,
    metavar="N,...",
    help="Tokens that are generated.",
)
@click.option(
    "-d",
    "depths",
    callback=_counts,
    default="0",
    show_default=True,
    metavar="N,...",
    help="Tokens in the cache before.",
)
@click.option(
    "-b", "batches", callback=_counts, default="1", show_default=True, metavar="N,...", help="Sequences at a time."
)
@click.option(
    "-r", "repeats", type=click.IntRange(1), default=5, show_default=True, help="Repeats of each row, after a warm-up."
)
@click.option(
    "-o", "form", type=click.Choice(["md", "json", "csv"]), default="md", show_default=True, help="Form of the table."
)
@click.option("--dummy-weights", is_flag=True, help="Random weights: the config.json alone is enough.")
@click.option("--device", type=click.Choice(["auto", "cuda", "numpy"]), default="auto", help="Where to run.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16", "fp32", "fp16", "bf16"]),
    default="auto",
    metavar="DTYPE",
    help="float32, float16, bfloat16 or auto.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_picture,
    metavar="FILE",
    help="Draw a picture as well.",
)
@click.option("--no-cold-start", is_flag=True, help="Do not time a fresh process from its start to a token.")
@DEBUG
def bench(
    model: str | None,
    prompts: tuple[int, ...],
    generated: tuple[int, ...],
    depths: tuple[int, ...],
    batches: tuple[int, ...],
    repeats: int,
    form: str,
    dummy_weights: bool,
    device: str,
    dtype: str,
    plot: Path | None,
    no_cold_start: bool,
) -> None:
    """Measure prompts and generation: tokens/s, bytes/s against the measured ceiling, time to the first token.

    Every list may have several values; each combination is a row.
    """
    from ..lab import bench as benches
    from ..lab.report import command

    if dummy_weights and model is None:
        raise click.UsageError("--dummy-weights needs -m: a folder with a config.json, or a known shape")
    wanted = trials(prompts, generated, depths, batches)
    source = Source(model, dummy_weights, device, dtype)
    result = {"command": command()} | benches.run(
        source, wanted, repeats, not no_cold_start, lambda text: click.echo(text, err=True)
    )
    click.echo(benches.text(result, form), nl=False)
    if plot is not None:
        benches.plot(result, plot)
