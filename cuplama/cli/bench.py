"""``cuplama bench``: how fast a model reads prompts and generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import (
    DEBUG,
    QUIET,
    Decorator,
    complete_model,
    loading_options,
    options,
    picture_option,
    weight_format_option,
)
from .streams import say_progress

__all__ = ["bench"]


def _counts(_: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        numbers = tuple(int(number) for number in value.split(",") if number.strip())
    except ValueError:
        numbers = ()
    if parameter.name == "batches" and (not numbers or min(numbers) < 1):
        raise click.BadParameter(f"{value!r} is not a list of sequence counts such as 1,8, each at least 1")
    if not numbers or min(numbers) < 0:
        raise click.BadParameter(f"{value!r} is not a list of token counts such as 512,2048")
    return numbers


def _counts_option(flag: str, name: str, default: str, text: str) -> Decorator:
    """An option for a list of numbers of which each gives rows of its own."""
    return click.option(flag, name, callback=_counts, default=default, show_default=True, metavar="N,...", help=text)


_rows_options = options(
    _counts_option("-p", "prompts", "512", "Tokens of the prompts that are read."),
    _counts_option("-n", "generated", "128", "Tokens that are generated."),
    _counts_option("-d", "depths", "0", "Tokens in the cache before."),
    _counts_option("-b", "batches", "1", "Sequences at a time."),
    click.option(
        "-r",
        "repeats",
        type=click.IntRange(1),
        default=5,
        show_default=True,
        help="Repeats of each row, after a warm-up.",
    ),
)


@click.command(short_help="How fast a model reads prompts and generates.")
@click.option(
    "-m",
    "--model",
    metavar="MODEL",
    shell_complete=complete_model,
    help="Folder, GGUF file or hub id; or a known shape such as llama-3.2-1b, with --dummy-weights.  "
    "[default: the bundled story model]",
)
@_rows_options
@click.option(
    "-o", "form", type=click.Choice(["md", "json", "csv"]), default="md", show_default=True, help="Form of the table."
)
@click.option("--dummy-weights", is_flag=True, help="Random weights: the config.json alone is enough.")
@weight_format_option("--dummy-weights")
@loading_options()
@picture_option("Draw a picture as well.")
@click.option("--no-cold-start", is_flag=True, help="Do not time a fresh process from its start to a token.")
@QUIET
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
    weight_format: str,
    plot: Path | None,
    no_cold_start: bool,
    loading: dict[str, Any],
) -> None:
    """Measure prompts and generation: tokens/s, bytes/s against the measured peak, time to the first token.

    Every list may have several values; each combination is a row.
    """
    from ..lab import bench as lab
    from ..lab.dummy import Source
    from ..lab.report import command
    from ..lab.trials import trials

    if dummy_weights and model is None:
        raise click.UsageError("--dummy-weights needs -m: a folder with a config.json, or a known shape")
    if weight_format and not dummy_weights:
        raise click.UsageError("--weight-format needs --dummy-weights")
    if loading["quantize"] is not None and dummy_weights:
        raise click.UsageError("--quantize needs a model's own weights; with --dummy-weights it is --weight-format")
    wanted = trials(prompts, generated, depths, batches)
    source = Source(model, dummy_weights, weight_format, **loading)
    result = {"command": command(), **lab.run(source, wanted, repeats, not no_cold_start, say_progress)}
    click.echo(lab.text(result, form), nl=False)
    if plot is not None:
        lab.plot(result, plot)
