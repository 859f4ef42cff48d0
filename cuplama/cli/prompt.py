"""Where a command's text comes from: an argument, -p, -f, or standard input where somebody pipes into it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .options import Decorator, options
from .streams import read_file, read_text, without_line_end

__all__ = ["prompt_options", "prompt_text"]

# The parameters "prompt", "prompt_option" and "prompt_file", which ``prompt_text`` takes.
prompt_options: Decorator = options(
    click.argument("prompt", required=False),
    click.option("-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt, as an option."),
    click.option(
        "-f",
        "--file",
        "prompt_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help='The prompt, from a file ("-": standard input).',
    ),
)


def prompt_text(prompt: str | None, prompt_option: str | None, prompt_file: Path | None) -> str:
    """The text that was given in one of these ways, "-" for standard input, or piped into the command.

    A line break that ends a file or standard input is not part of it. Standard input is touched only if it is asked
    for or nothing else is given: a job without one, as of cron, may have it closed. Raises UsageError for a text that
    is given twice or not at all, and PromptError for one that cannot be read.
    """
    named = {"PROMPT": prompt, "-p": prompt_option, "-f": prompt_file}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"the prompt is given twice, by {' and '.join(given)}")
    if prompt_option is not None:
        return prompt_option
    if prompt_file is not None:
        return without_line_end(read_file(prompt_file))
    if prompt is not None:
        return read_text(prompt)
    text = "" if sys.stdin is None or sys.stdin.isatty() else read_text("-")
    if not text:
        raise click.UsageError("Missing argument 'PROMPT': give it, -p TEXT or -f FILE, or pipe it in")
    return text
