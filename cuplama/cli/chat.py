"""``cuplama chat``: a conversation with a model that has a chat template. The loop itself is in ``repl``."""

from __future__ import annotations

from typing import Any

import click

from .options import given_params, model_option, run_options, sampling_options
from .running import open_model, speed

__all__ = ["chat"]


@click.command()
@model_option()
@sampling_options
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option("--stats", is_flag=True, help="Print tokens and speed to stderr after each answer.")
@run_options
def chat(
    model: str | None,
    offline: bool,
    device: str,
    dtype: str,
    context: int | None,
    system: str | None,
    stats: bool,
    **sampling: Any,
) -> None:
    """Talk to a model that has a chat template. /help lists the commands.

    Sampling options that are not given come from the model's generation_config.json.
    """
    from .repl import repl

    with open_model(model, offline, device, dtype, context) as m:
        repl(m, given_params(sampling), system, speed if stats else None)
