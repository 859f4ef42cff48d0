"""``cuplama graph``: the list of nodes that a model is."""

from __future__ import annotations

import click

from .options import DEBUG, OFFLINE, OR_A_SHAPE, QUIET, model_option

__all__ = ["graph"]


@click.command(short_help="The list of nodes that a model is, with shapes.")
@model_option(OR_A_SHAPE)
@click.option("--fused", is_flag=True, help="The list that a decode step runs, with what each fused node stands for.")
@click.option("--training", is_flag=True, help="The list of a training step: forward, loss, and every gradient.")
@OFFLINE
@QUIET
@DEBUG
def graph(model: str | None, offline: bool, fused: bool, training: bool) -> None:
    """The list of nodes that a model is, one line each.

    A value has its shape and dtype where it is first named: x[n,4096]:f32. Sizes that a pass decides are letters.

    \b
    n  new tokens of a pass, all sequences together
    b  sequences
    r  rows whose logits are asked for
    M  pages that a sequence may have
    P  pages of the cache
    Z  slots for states of sequences
    """
    from ..engine.decode import decode_nodes
    from ..lab.shapes import shapes, training_shapes
    from ..models.graph import decoder
    from .model_info import find_config

    if fused and training:
        raise click.UsageError("--fused is a decode step, and --training is none")
    config = find_config(model, offline)[1]
    if training:
        nodes, left = training_shapes(config)
    else:
        whole, left = decoder(config), shapes(config, every_row=fused)
        nodes = decode_nodes(whole, 1) if fused else [*whole.body, *whole.selected_rows()]

    def shown(name: str) -> str:
        return name + left.pop(name, "")

    for node in nodes:
        click.echo(node.text(shown))
        for part in node.parts:
            click.echo(f"    {part.text(shown)}")
