"""``cuplama pull``: download a model from the hub before it is needed."""

from __future__ import annotations

import click

from .options import DEBUG, QUIET
from .streams import notice, progress_bar

__all__ = ["pull"]


@click.command(short_help="Download a model from the Hugging Face hub.")
@click.argument("repository", metavar="ORG/NAME")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit.  [default: main]")
@QUIET
@DEBUG
def pull(repository: str, revision: str | None) -> None:
    """Download the model ORG/NAME from the Hugging Face hub, or bring it up to date, and print its folder.

    Of a repository of GGUF files ORG/NAME:Q4_K_M is the one whose name ends so; its path is printed.

    What was downloaded before is not downloaded again. Models are kept in the Hugging Face cache, which other programs
    share; "cuplama models" lists it. A token for models that need one is taken from HF_TOKEN or "hf auth login".
    """
    from ..hub import pull as download
    from .runnable import why_not

    with progress_bar("downloading", "B") as progress:
        folder = download(repository, revision=revision, progress=progress)
    click.echo(folder)
    reason = why_not(folder)
    if reason is not None:
        notice(f"{repository} does not run here: {reason}")
