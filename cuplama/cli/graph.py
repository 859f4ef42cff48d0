"""``cuplama graph``: the list of nodes that a model is."""

from __future__ import annotations

import click

from .options import DEBUG, OFFLINE, OR_A_SHAPE, model_option

__all__ = ["graph"]


@click.command()
@model_option(OR_A_SHAPE)
@click.option("--fused", is_flag=True, help="The list that a decode step runs, with what each fused node stands for.")
@OFFLINE
@DEBUG
def graph(model: str | None, offline: bool, fused: bool) -> None:
    """The list of nodes that a model is, one line each."""
    from ..engine.decode import decode_nodes
    from ..models.graph import decoder
    from .model_info import find_config

    whole = decoder(find_config(model, offline)[1])
    for node in decode_nodes(whole, 1) if fused else (*whole.body, *whole.selected_rows()):
        click.echo(str(node))
        for part in node.parts:
            click.echo(f"    {part}")
