"""``cuplama merge``: a model with a LoRA adapter folded in."""

from __future__ import annotations

from pathlib import Path

import click

from .options import DEBUG, OFFLINE, QUIET, complete_model, shard_size_option
from .running import find_folder
from .streams import notice, progress_bar

__all__ = ["merge"]


@click.command(short_help="Write a copy of a model with a LoRA adapter folded in.")
@click.argument("model", shell_complete=complete_model)
@click.argument("adapter", shell_complete=complete_model)
@click.argument("out", type=click.Path(path_type=Path))
@shard_size_option
@OFFLINE
@QUIET
@DEBUG
def merge(model: str, adapter: str, out: Path, shard_size: int, offline: bool) -> None:
    """Write MODEL with the LoRA ADAPTER folded in, both a folder or hub id, to the new folder OUT.

    OUT is a model folder like any other: give it to -m, or to cuplama quantize. Its numbers have the dtype that MODEL
    has; tokenizer and settings are MODEL's. A run that was stopped goes on when the same command is given again.

    To use an adapter without a copy, give --adapter to generate, chat or perplexity.
    """
    from ..conversion.merge import merge as fold  # here, so that no other command waits for it

    folder, adapter_folder = find_folder(model, offline), find_folder(adapter, offline)
    with progress_bar("merging", "parts") as progress:
        made = fold(folder, adapter_folder, out, shard_size, progress)
    if not made:
        notice(f"{out} is finished; there is nothing to do")
    click.echo(out)
