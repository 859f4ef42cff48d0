"""Whether a folder holds a model that cuplama runs, and if not, why not, in a few words."""

from __future__ import annotations

from pathlib import Path

from ..errors import CuplamaError
from ..generation_config import Settings
from ..models.checkpoint import load_weights
from ..models.config import load_config
from ..text.tokenizer import Tokenizer
from .streams import no_warnings

__all__ = ["why_not"]


def why_not(folder: Path) -> str | None:
    """Why the model in the folder cannot be run; None if it can.

    Its JSON files, the tokenizer and the headers of the weights are read. Whether the memory suffices is not asked.
    """
    try:
        with no_warnings():
            load_weights(folder, config := load_config(folder))
            Settings.read(folder, config, Tokenizer.load(folder))
    except CuplamaError as e:
        return str(e).replace(str(folder), "").lstrip("/: ").partition(";")[0]
    return None
