"""What the commands that run a model have in common: they load it, and say how fast it was and whether it was cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import hub
from ..completion import Completion, Timings
from ..lab.report import counted
from ..loading import load
from ..model import Model
from .streams import notice, progress_bar

__all__ = ["find_folder", "open_model", "say_if_cut", "speed"]


def find_folder(model: str | None, offline: bool) -> Path:
    """The folder of a model as the options name it; a download has a progress bar."""
    with progress_bar("downloading", "B") as progress:
        return hub.find_model(model, offline, progress)


def open_model(model: str | None, offline: bool, **loading: Any) -> Model:
    """Load a model as the options say, with a progress bar for each of its parts: downloads and loading.

    loading: the options of ``load``, as ``run_options`` give them.
    """
    find_folder(model, offline)
    if loading.get("adapter") is not None:
        find_folder(loading["adapter"], offline)
    with progress_bar("loading", "B") as progress:  # offline: all that the hub has is here now
        return load(model, offline=True, progress=progress, **loading)


def speed(t: Timings) -> str:
    """What --stats prints of one sequence: tokens and seconds of the prompt, and of what was generated.

    The prompt's time ends with the first token drawn. That token is counted among the generated ones, as -n counts it,
    but the rate of generation is that of the tokens after it.
    """
    return (
        f"prompt: {counted(t.prompt_tokens, 'token')} in {t.prompt_seconds * 1e3:.1f} ms "
        f"({t.prompt_rate:.0f} tokens/s), then {counted(t.generated_tokens, 'token')} in {t.decode_seconds:.2f} s "
        f"({t.decode_rate:.1f} tokens/s after the first)"
    )


def say_if_cut(answer: Completion) -> None:
    """Say on stderr that an answer was cut, and by which option; nothing where it ended by itself.

    Nothing was cut where nothing was asked for: max_tokens = 0 reads the prompt alone.
    """
    limit, count = answer.params.max_tokens, len(answer.tokens)
    if answer.finish_reason != "length" or limit == 0:
        return
    if limit is not None and count >= limit:
        notice(f"the answer was cut at {counted(count, 'token')} (-n {limit})")
    else:
        notice(f"the answer was cut: the context of {counted(answer.context, 'token')} is full (-c)")
