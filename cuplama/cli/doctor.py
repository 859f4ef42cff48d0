"""``cuplama doctor``: what this machine lacks for CUDA, and how to mend it. The checks are in ``diagnosis``."""

from __future__ import annotations

import sys

import click

from .options import DEBUG

__all__ = ["doctor"]


@click.command()
@DEBUG
def doctor() -> None:
    """Check driver, CUDA libraries, GPU and cache; say what to mend."""
    from .diagnosis import run

    sys.exit(run(click.echo))
