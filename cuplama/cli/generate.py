"""``cuplama generate``: a prompt's continuation, streamed as text or as one JSON object."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..completion import Completion, Stream
from .options import check_sampling, given_params, model_option, run_options, sampling_options
from .running import open_model, speed
from .streams import print_json, progress_bar, read_text

__all__ = ["generate"]


@click.command()
@click.argument("prompt")
@model_option()
@sampling_options
@click.option(
    "--logprobs",
    type=int,
    callback=check_sampling,
    metavar="N",
    help="With --json: log-probabilities, and those of the N best.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming text.")
@click.option("--stats", is_flag=True, help="Print tokens and speed to stderr at the end.")
@run_options
def generate(
    prompt: str,
    model: str | None,
    offline: bool,
    device: str,
    dtype: str,
    context: int | None,
    as_json: bool,
    stats: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT. "-" reads the prompt from standard input.

    The text is streamed to stdout. In a terminal the prompt is shown before it.

    Sampling options that are not given come from the model's generation_config.json.
    """
    if sampling["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    text = read_text(prompt)
    interrupted = False
    with open_model(model, offline, device, dtype, context) as m:
        params = given_params(sampling)
        with progress_bar("reading the prompt", "tokens") as progress:
            if as_json:
                completion = m.generate(text, progress=progress, **params)
                print_json(_as_json(completion))
                timings = completion.timings
            else:
                stream = m.stream(text, progress=progress, **params)  # refuses what it must before the prompt is shown
                try:
                    _show(text, stream)
                except KeyboardInterrupt:
                    interrupted = True
                timings = stream.timings
        if stats:
            # A text that goes to a file or a pipe ends without a line break; both may end up on one screen.
            on_a_new_line = as_json or sys.stdout.isatty()
            click.echo(("" if on_a_new_line else "\n") + speed(timings), err=True)
    if interrupted:
        raise KeyboardInterrupt


def _show(prompt: str, stream: Stream) -> None:
    """Write the text as it comes; in a terminal after the prompt and with a line break at the end."""
    if sys.stderr.isatty() and sys.stdout.isatty():
        click.secho(prompt, err=True, nl=False, dim=True)
    try:
        for delta in stream:
            if delta.text:
                sys.stdout.write(delta.text)
                sys.stdout.flush()
    finally:
        if sys.stdout.isatty():
            sys.stdout.write("\n")


def _as_json(c: Completion) -> dict[str, Any]:
    t = c.timings
    found: dict[str, Any] = {
        "text": c.text,
        "tokens": c.tokens,
        "finish_reason": c.finish_reason,
        "prompt_tokens": t.prompt_tokens,
        "prompt_seconds": round(t.prompt_seconds, 6),
        "decode_seconds": round(t.decode_seconds, 6),
        "tokens_per_second": round(t.decode_rate, 2),
    }
    if c.logprobs is not None:
        found["logprobs"] = [{"id": x.id, "logprob": x.logprob, "top": [list(p) for p in x.top]} for x in c.logprobs]
    return found
