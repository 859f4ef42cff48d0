"""The options that several commands share, and the checks on their values before anything is loaded."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..device import ACTIVATIONS, DEVICES
from ..engine.kv_cache import KV_CACHE_DTYPES, MAX_TOKENS
from ..errors import ParameterError
from ..loading import DTYPE_NAMES
from ..quant.grid import GRIDS
from ..sampling_params import allowed_values, read_parameter
from .names import DEVICE_WORDS, NamedOption, device_word
from .streams import QUIET_KEY, no_warnings

__all__ = [
    "ACTIVATIONS_OPTION",
    "ADAPTER",
    "CACHE_TOKENS",
    "DEBUG",
    "DEVICE",
    "KV_CACHE_DTYPE",
    "OFFLINE",
    "OR_A_SHAPE",
    "QUANTIZE",
    "QUIET",
    "Decorator",
    "check_sampling",
    "complete_model",
    "dtype_option",
    "given_params",
    "loading_options",
    "model_option",
    "options",
    "picture_option",
    "quantize_option",
    "run_options",
    "sampling_options",
    "shard_size_option",
    "weight_format_option",
]

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

DEBUG = click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback when something fails.")
OFFLINE = click.option("--offline", is_flag=True, help="Never ask the hub; use what was downloaded before.")
DEVICE = click.option(
    "--device",
    type=click.Choice([*DEVICES, *DEVICE_WORDS]),
    default="auto",
    callback=device_word,
    metavar=f"[{'|'.join(DEVICES)}]",
    help="Where to run; cpu is numpy, gpu is cuda.",
)
KV_CACHE_DTYPE = click.option(
    "--kv-cache-dtype",
    type=click.Choice(list(KV_CACHE_DTYPES)),
    default="auto",
    metavar="DTYPE",
    help="How keys and values are kept: auto is the model's dtype; fp8 takes 8 bits, less memory and less exact.",
)


def weight_format_option(needs: str) -> Decorator:
    """--weight-format for random weights. needs: the option without which it has no meaning."""

    def known(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
        from ..lab.quantised import WEIGHT_FORMATS

        if value and value not in WEIGHT_FORMATS:
            raise click.BadParameter(f"{value!r} is not one of {', '.join(WEIGHT_FORMATS)}")
        return value

    return click.option(
        "--weight-format",
        metavar="FORMAT",
        default="",
        callback=known,
        help=f'With {needs}: quantised matrices in the layers, such as "int4 g128", "fp8" or "Q4_K_M".',
    )


def quantize_option(text: str) -> Decorator:
    """``--quantize``. text: what it does, for --help."""
    return click.option("--quantize", type=click.Choice(list(GRIDS)), help=text)


QUANTIZE = quantize_option(
    "Turn the layers' weights into 4 or 8 bits while they are loaded: less memory and faster on a GPU, less exact."
)
ACTIVATIONS_OPTION = click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default="auto",
    help="fp8: multiply prompts and large batches in fp8, if the weights are: faster on a GPU with sm_90, less exact.",
)
DETERMINISTIC = click.option(
    "--deterministic",
    is_flag=True,
    help="The same text whatever else is computed at the same time, to the last bit; slower, and on a GPU alone.",
)
OR_A_SHAPE = ", or a known shape such as llama-3.2-1b"


def _quiet(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.meta[QUIET_KEY] = True
        context.with_resource(no_warnings())


QUIET = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_quiet,
    help="No hints, notices, warnings or progress on stderr; errors alone.",
)


def options(*decorators: Decorator) -> Decorator:
    """One decorator for several options, in the order in which --help lists them."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def complete_model(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What a shell completes after -m: folders and files, and the hub ids of the models that were downloaded."""
    from ..hub import cached_models

    names = sorted(model.repository for model in cached_models())
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return [*found, CompletionItem(incomplete, type="file")]


def model_option(also: str = "") -> Decorator:
    """``-m``. also: what the option takes beside a folder, a GGUF file and a hub id."""
    text = f"Folder, GGUF file or hub id (org/name, org/name:Q4_K_M){also}.  [default: the bundled story model]"
    return click.option("-m", "--model", metavar="MODEL", shell_complete=complete_model, help=text)


def dtype_option(auto: str = "") -> Decorator:
    """``--dtype`` with the names that ``load`` takes. auto: what "auto" stands for, where the help says it."""
    choices, text = click.Choice(list(DTYPE_NAMES)), f"float32, float16, bfloat16 or auto{auto}."
    return click.option("--dtype", type=choices, default="auto", metavar="DTYPE", help=text)


ADAPTER = click.option(
    "--adapter",
    metavar="ADAPTER",
    shell_complete=complete_model,
    help="Folder or hub id of a LoRA adapter for the model, as PEFT saves it.",
)
_LOADING = (
    "device", "dtype", "quantize", "activations", "kv_cache_dtype", "deterministic", "context", "cache_tokens",
    "adapter",
)  # fmt: skip
CONTEXT = click.option(
    "-c",
    "--context",
    cls=NamedOption,
    also=("--ctx-size",),
    type=click.IntRange(1),
    metavar="N",
    help="Tokens a text may have.  [default: the model's limit, at most 8192]",
)


def _cache_tokens(_: click.Context, __: click.Parameter, value: str) -> int | str:
    if value == "auto":
        return value
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= MAX_TOKENS:
        raise click.BadParameter(f"{value!r} is not a number from 1 to {MAX_TOKENS}, or auto")
    return int(value)


# For a command that runs many texts at a time.
CACHE_TOKENS = click.option(
    "--cache-tokens",
    callback=_cache_tokens,
    default="auto",
    show_default=True,
    metavar="N|auto",
    help="Tokens that all texts have room for together; auto: as many as fit into memory.",
)


def loading_options(auto: str = "", *more: Decorator) -> Decorator:
    """Where and how a model runs, which the command gets as one argument ``loading``: parameters of ``load`` by name.

    auto: as of ``dtype_option``; more: further options of that kind.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def gathered(*args: Any, **given: Any) -> Any:
            loading = {name: given.pop(name) for name in _LOADING if name in given}
            return command(*args, loading=loading, **given)

        shared = (DEVICE, dtype_option(auto), QUANTIZE, KV_CACHE_DTYPE, ACTIVATIONS_OPTION, DETERMINISTIC)
        return options(*shared, *more)(gathered)

    return decorate


# What every command has that runs a model.
run_options = options(
    loading_options(": the checkpoint's on CUDA, float32 on NumPy", CONTEXT, ADAPTER),
    OFFLINE,
    QUIET,
    DEBUG,
)


def _bytes(_: click.Context, __: click.Parameter, size: float) -> int:
    if not 1 <= size * 1e9 < math.inf:  # nor is NaN
        raise click.UsageError(f"--shard-size = {size:g} is out of range; it must be a number of GB")
    return int(size * 1e9)


# For commands that write a model; they get a number of bytes.
shard_size_option = click.option(
    "--shard-size",
    type=float,
    callback=_bytes,
    default=5,
    show_default=True,
    metavar="GB",
    help="Size that a file of weights has at most.",
)


def _picture(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    if path is not None:
        from ..lab.report import check_picture

        check_picture(path)
    return path


def picture_option(text: str) -> Decorator:
    """``--plot``, refused before the work if the picture could not be written after it."""
    path = click.Path(path_type=Path, dir_okay=False)
    return click.option("--plot", type=path, callback=_picture, metavar="FILE", help=text)


def _bias(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[int, float] | None:
    try:
        given = {int(i): float(v) for i, v in (value.split("=") for value in values)}
        read_parameter("logit_bias", given)
    except ValueError:  # a ParameterError is one
        raise click.BadParameter("must look like 42=-1.5: a token id and a number (-inf bans the token)") from None
    return given or None


def _stops(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...] | None:
    if "" in values:
        raise click.BadParameter("the text is empty")
    return values or None


def check_sampling(_: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """A click callback: ``read_parameter`` knows what the parameter of that name may be; -n -1 is its None."""
    name = str(parameter.name)
    if value is None or (name == "max_tokens" and value == -1):
        return value
    try:
        read_parameter(name, value)
    except ParameterError:
        wanted = allowed_values(name).removesuffix(", or None")
        more = ", or -1: until the context is full" if name == "max_tokens" else ""
        raise click.BadParameter(f"{value} is not {wanted}{more}") from None
    return value


def _sampling(*names: str, type: type, metavar: str, help: str, also: Sequence[str] = ()) -> Decorator:
    return click.option(
        *names, cls=NamedOption, also=also, callback=check_sampling, type=type, metavar=metavar, help=help
    )


# The fields of SamplingParams; what is not given comes from the model's generation_config.json.
sampling_options = options(
    _sampling(
        "-n",
        "--max-tokens",
        type=int,
        metavar="N",
        help="Tokens at most; -1: until the context is full.  [default: 512; in chat: -1]",
        also=("--n-predict", "--predict", "--max-new-tokens"),
    ),
    _sampling("--temp", "--temperature", "temperature", type=float, metavar="T", help="0 is greedy."),
    _sampling("--top-k", type=int, metavar="K", help="Keep the K best tokens; 0 is off."),
    _sampling("--top-p", type=float, metavar="P", help="Keep the best tokens that together reach P."),
    _sampling("--min-p", type=float, metavar="P", help="Keep tokens with at least P times the best probability."),
    _sampling(
        "--repeat-penalty",
        "repetition_penalty",
        type=float,
        metavar="X",
        help="Divide the logits of tokens that occurred by X; 1 is off.",
        also=("--repetition-penalty",),
    ),
    _sampling("--presence-penalty", type=float, metavar="X", help="Subtract X from tokens that occurred."),
    _sampling("--frequency-penalty", type=float, metavar="X", help="Subtract X per earlier occurrence."),
    click.option(
        "--logit-bias",
        multiple=True,
        callback=_bias,
        metavar="ID=X",
        help="Add X to a token's logit; -inf bans it (repeatable).",
    ),
    _sampling("--seed", type=int, metavar="N", help="The same seed gives the same text.", also=("-s",)),
    click.option(
        "--stop",
        cls=NamedOption,
        also=("-r", "--reverse-prompt"),
        multiple=True,
        callback=_stops,
        metavar="TEXT",
        help="End the text before this string (repeatable).",
    ),
    _sampling("--min-tokens", type=int, metavar="N", help="No stop token before N tokens."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Do not stop at the model's stop tokens."),
)


def given_params(values: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters that were given; the model's own defaults stand for the others.

    Raises UsageError for two that contradict each other, so it is called before a model is loaded.
    """
    given = {k: v for k, v in values.items() if v is not None}
    if given.get("max_tokens") == -1:
        given["max_tokens"] = None
    most, least = given.get("max_tokens"), given.get("min_tokens", 0)
    if most is not None and most < least:
        raise click.UsageError(f"--max-tokens {most} is less than --min-tokens {least}")
    return given
