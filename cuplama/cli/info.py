"""``cuplama info``: what a model is, from its files' headers alone. The facts themselves are in ``model_info``."""

from __future__ import annotations

import click

from .options import ADAPTER, DEBUG, OFFLINE, OR_A_SHAPE, QUIET, model_option, quantize_option
from .streams import print_json

__all__ = ["info"]


@click.command(short_help="What a model is: parameters, memory, context, tokenizer.")
@model_option(OR_A_SHAPE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@quantize_option("What the model would be with this option of generate and chat.")
@ADAPTER
@OFFLINE
@QUIET
@DEBUG
def info(model: str | None, offline: bool, quantize: str | None, adapter: str | None, as_json: bool) -> None:
    """What a model is: parameters, formats of weights, memory, context, tokenizer, template, sampling defaults.

    Reads no weights.
    """
    from .model_info import facts, find_config, view
    from .running import find_folder

    added = None if adapter is None else find_folder(adapter, offline)
    found = facts(*find_config(model, offline), quantize, added)
    if as_json:
        print_json(found, indent=1)
        return
    lines = view(found)
    width = max(map(len, lines))
    for name, value in lines.items():
        shown = (", ".join(map(str, value)) or "none") if isinstance(value, list) else value
        click.echo(f"{name:<{width}}  {shown}")
