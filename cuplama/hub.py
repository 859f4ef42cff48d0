"""Where a model's files are: the bundled model, a local folder, or the local copy of a hub repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import ConfigError
from .folders import data_folder

__all__ = ["BUNDLED", "HUB_FILES", "find_model"]

BUNDLED = "stories-7m"  # the name of the model that comes with the package

# The files of a repository that are fetched, as patterns of fnmatch: configs and tokenizer, chat templates, weights.
# Other formats of the same weights (*.bin, original/*.pth, a consolidated.safetensors) would double the download.
HUB_FILES = ("*.json", "*.jinja", "model*.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_model(model: str | os.PathLike[str] | None, offline: bool = False) -> Path:
    """The folder of a model. model: a folder, a hub id ("org/name"), or None for the bundled story model.

    The bundled model's name stands for it, too, where no folder has that name.

    A hub repository is downloaded, or brought up to date, unless ``offline`` (or HF_HUB_OFFLINE) forbids it.
    Raises ConfigError naming what does not exist or cannot be reached.
    """
    if model is None:
        return data_folder("weights")
    try:
        path = Path(model or "?").expanduser()  # an empty name must not mean the current folder
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError) as e:  # no permission, a name too long, no such home folder
        raise ConfigError(f"cannot open {model!s:.80}: {getattr(e, 'strerror', None) or e}") from None
    if model == BUNDLED and not exists:
        return data_folder("weights")
    if exists:
        raise ConfigError(f"{path} is a file; give the folder that holds config.json and the weights")
    if not isinstance(model, str) or not _HUB_ID.fullmatch(model):
        raise ConfigError(f"{str(model)!r:.200} does not exist, and is not a hub id of the form org/name")
    return _download(model, offline)


def _download(repository: str, offline: bool) -> Path:
    """The folder of a repository's files in the local cache. Raises ConfigError."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = offline or constants.HF_HUB_OFFLINE
    try:
        return Path(snapshot_download(repository, allow_patterns=list(HUB_FILES), local_files_only=offline))
    except LocalEntryNotFoundError:
        offline_reason = "it is not in the local cache, and the hub is off limits (offline)"
        reason = offline_reason if offline else "the hub cannot be reached"
        raise ConfigError(f"{repository}: no such folder, and as a hub id: {reason}") from None
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        raise ConfigError(f"{repository}: no such folder, and the hub says: {str(e).splitlines()[0]}") from None
