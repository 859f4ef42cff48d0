"""``cuplama completion``: a script that makes a shell complete commands and options. Click writes it."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from .options import DEBUG

__all__ = ["completion"]

_PROGRAM = "cuplama"


@click.command(short_help="A script with which a shell completes commands.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@DEBUG
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script with which SHELL completes the commands and options of cuplama.

    \b
    bash: cuplama completion bash >> ~/.bashrc
    zsh:  cuplama completion zsh >> ~/.zshrc
    fish: cuplama completion fish > ~/.config/fish/completions/cuplama.fish

    It works in shells that are started after that.
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has these three
    click.echo(kind(context.find_root().command, {}, _PROGRAM, f"_{_PROGRAM.upper()}_COMPLETE").source())
