"""``cuplama perplexity``: how well a model predicts a text."""

from __future__ import annotations

import math
from pathlib import Path

import click

from ..errors import ParameterError
from ..lab.report import counted
from .options import model_option, run_options
from .prompt import file_options, file_text
from .running import find_folder, open_model
from .streams import no_warnings, print_json, progress_bar

__all__ = ["perplexity"]


@click.command(short_help="How well a model predicts the text of FILE, with the standard error.")
@model_option()
@file_options
@click.option("--window", type=int, metavar="N", help="Tokens per window.  [default: the context, at most 1024]")
@click.option("--stride", type=int, metavar="N", help="Tokens between windows.  [default: half a window]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@run_options
def perplexity(
    file: Path | None,
    file_option: Path | None,
    model: str | None,
    offline: bool,
    device: str,
    dtype: str,
    kv_cache_dtype: str,
    context: int | None,
    window: int | None,
    stride: int | None,
    as_json: bool,
) -> None:
    """Perplexity of a text FILE, in nats, bits per byte and with its standard error.

    Without FILE, or with "-", the text is read from standard input.
    """
    from ..lab import perplexity as lab
    from ..loading import context_length
    from ..models.config import load_config

    text = file_text(file, file_option)
    folder = find_folder(model, offline)
    with no_warnings():  # they come when the model is loaded
        limit = context_length(load_config(folder), context)
    try:
        window, stride = lab.window_and_stride(limit, window, stride)  # before the weights are loaded
    except ParameterError as e:
        raise click.UsageError(f"--{e}") from None  # its parameters have the options' names
    opened = open_model(str(folder), True, device, dtype, context, kv_cache_dtype)
    with opened as m, progress_bar("scoring", "tokens") as progress:
        result = lab.perplexity(m, text, window, stride, progress)
    if as_json:
        print_json(
            {
                "tokens": result.tokens,
                "bytes": result.size,
                "nats_per_token": round(result.nats_per_token, 5),
                "bits_per_byte": round(result.bits_per_byte, 5),
                "perplexity": _finite(result.perplexity, 4),
                "standard_error": _finite(result.error, 4),
            }
        )
    else:
        click.echo(f"tokens         {result.tokens} ({counted(result.size, 'byte')})")
        click.echo(f"nats per token {result.nats_per_token:.4f}")
        click.echo(f"bits per byte  {result.bits_per_byte:.4f}")
        click.echo(f"perplexity     {result.perplexity:.3f} ± {result.error:.3f}")


def _finite(value: float, digits: int) -> float | None:
    """A rounded number for JSON, which has none for infinity."""
    return round(value, digits) if math.isfinite(value) else None
