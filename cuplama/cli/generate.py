"""``cuplama generate``: a prompt's continuation, streamed as text or as one JSON object."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..completion import Stream
from ..model import Model
from .form import form_options
from .options import check_sampling, given_params, model_option, run_options, sampling_options
from .prompt import prompt_options, prompt_text
from .running import open_model, say_if_cut, speed
from .streams import notice, print_json, progress_bar, say, visible, write_text

__all__ = ["generate"]


@click.command()
@model_option()
@prompt_options()
@sampling_options
@form_options
@click.option(
    "--logprobs",
    type=int,
    callback=check_sampling,
    metavar="N",
    help="With --json: log-probabilities, and those of the N best.",
)
@click.option("--echo", is_flag=True, help="Print the prompt before the text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the text, and what repeats the run.")
@click.option("--stats", is_flag=True, help="Print tokens and speed to stderr at the end.")
@run_options
def generate(
    prompt: str | None,
    prompt_option: str | None,
    file_option: Path | None,
    model: str | None,
    offline: bool,
    loading: dict[str, Any],
    echo: bool,
    as_json: bool,
    stats: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT. Without one, or with "-", it is read from standard input.

    The text is streamed to stdout and ends with a line break. In a terminal the prompt is shown before it.

    Sampling options that are not given come from the model's generation_config.json.
    """
    if sampling["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    if echo and as_json:
        raise click.UsageError("--echo does not go with --json")
    params = given_params(sampling)
    text = prompt_text(prompt, prompt_option, file_option)
    with open_model(model, offline, **loading) as m:
        if as_json:
            stream = _collect(m, text, params)
            print_json(stream.completion.to_dict())
            if stats:
                say(speed(stream.timings))
        else:
            _print(m, text, params, echo, stats)


def _collect(model: Model, prompt: str, params: dict[str, Any]) -> Stream:
    """Generate to the end, with progress."""
    with progress_bar("reading the prompt", "tokens") as read, progress_bar("generating", "tokens") as generated:
        stream = model.stream(prompt, progress=read, **params)
        most = stream.completion.params.max_tokens or model.context
        for count, _ in enumerate(stream, 1):
            generated(count, most)
    return stream


def _print(model: Model, prompt: str, params: dict[str, Any], echo: bool, stats: bool) -> None:
    """Generate as text, and say on stderr what there is to say of it. Ctrl-C ends in KeyboardInterrupt."""
    with progress_bar("reading the prompt", "tokens") as progress:
        stream = model.stream(prompt, progress=progress, **params)  # refuses what it must before anything is printed
        if model.tokenizer.chat_template is not None:
            notice('this model has a chat template; cuplama chat "..." uses it')
        try:
            _show(prompt, stream, echo)
        finally:
            if stats:
                say(speed(stream.timings))
    say_if_cut(stream.completion)


def _show(prompt: str, stream: Stream, echo: bool) -> None:
    """Write the text as it comes, and a line break after it if it has none.

    What is written when something fails or is interrupted is ended as a line as well; the message has its own.
    """
    shown = _show_prompt(prompt, echo)
    try:
        for delta in stream:
            if delta.text:
                shown = delta.text
                write_text(shown)
    except BaseException:
        if shown:
            _end_line(shown)
        raise
    _end_line(shown)


def _show_prompt(prompt: str, echo: bool) -> str:
    """Show the prompt: on stdout if it is asked for, and else to those who see both streams. Returns what was shown."""
    if echo:
        write_text(prompt)
    elif sys.stderr.isatty() and sys.stdout.isatty():
        click.secho(visible(prompt), err=True, nl=False, dim=True)
    else:
        return ""
    return prompt


def _end_line(shown: str) -> None:
    if not shown.endswith("\n"):
        write_text("\n")  # before whatever follows on stderr
