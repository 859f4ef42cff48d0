"""``cuplama tokenize``: text to token ids, and back."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import ParameterError, PromptError
from .options import DEBUG, OFFLINE, QUIET, model_option
from .prompt import prompt_options, prompt_text
from .running import find_folder
from .streams import write_text

__all__ = ["tokenize"]


@click.command(short_help="The tokens of TEXT, one per line.")
@model_option()
@prompt_options("TEXT")
@click.option("--no-bos", is_flag=True, help="Leave out the token that begins a text.")
@click.option("--ids", is_flag=True, help="Print only the ids, on one line.")
@click.option("--decode", is_flag=True, help="TEXT holds token ids; print the text they stand for.")
@OFFLINE
@QUIET
@DEBUG
def tokenize(
    prompt: str | None,
    prompt_option: str | None,
    file_option: Path | None,
    model: str | None,
    offline: bool,
    no_bos: bool,
    ids: bool,
    decode: bool,
) -> None:
    """The tokens of TEXT, one per line: id and text. Without TEXT, or with "-", it is read from standard input."""
    from ..text.tokenizer import Tokenizer

    text = prompt_text(prompt, prompt_option, file_option, "TEXT")
    tokenizer = Tokenizer.load(find_folder(model, offline))
    if decode:
        numbers = [_token_id(word) for word in text.replace(",", " ").split()]
        for n in numbers:
            if not 0 <= n < tokenizer.vocab_size:
                raise PromptError(f"token id {n} is out of range; the tokenizer has {tokenizer.vocab_size}")
        write_text(tokenizer.decode(numbers, skip_special=False) + "\n")
        return
    tokens = tokenizer.encode(text, bos=not no_bos)
    if ids:
        click.echo(" ".join(map(str, tokens)))
    else:
        for t in tokens:
            click.echo(f"{t:>7}  {tokenizer.token_shown(t)}")


def _token_id(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ParameterError(f"--decode takes token ids; {word!r:.80} is not a whole number") from None
