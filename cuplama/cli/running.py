"""What the commands that run a model have in common: they load it, and say how fast it was."""

from __future__ import annotations

from ..completion import Timings
from ..lab.report import counted
from ..loading import load
from ..model import Model
from .streams import progress_bar

__all__ = ["open_model", "speed"]


def open_model(model: str | None, offline: bool, device: str, dtype: str, context: int | None) -> Model:
    """Load a model as the options say, with a progress bar."""
    with progress_bar("loading", "B") as progress:
        return load(model, device=device, dtype=dtype, context=context, offline=offline, progress=progress)


def speed(t: Timings) -> str:
    """What --stats prints: tokens and seconds of the prompt and of what was generated after its first token."""
    prompt, decode = counted(t.prompt_tokens, "token"), counted(t.decode_tokens, "token")
    return (
        f"prompt: {prompt} in {t.prompt_seconds * 1e3:.1f} ms ({t.prompt_rate:.0f} tokens/s), "
        f"then {decode} in {t.decode_seconds:.2f} s ({t.decode_rate:.1f} tokens/s)"
    )
