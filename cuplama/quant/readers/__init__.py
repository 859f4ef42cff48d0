"""Readers of quantised layouts, one a file. One is found by being there: add a module with a ``READER``, no more."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...files import is_missing, read_json
from ..reader import Layout, Reader
from ..settings import Settings
from ..tensor import Tensor

__all__ = ["FILES", "READERS", "check", "read_quantised", "settings_beside"]


def _found() -> dict[str, Reader]:
    """Method -> reader, of every module of this folder that has a ``READER``."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    readers: list[Reader] = [m.READER for m in modules if hasattr(m, "READER")]
    return {method: reader for reader in readers for method in reader.methods}


READERS: Mapping[str, Reader] = _found()
FILES = tuple(reader.beside for reader in READERS.values() if reader.beside is not None)
"""What may hold the settings beside config.json."""
_KEY = "quantization_config"


def check(raw: Any, where: str) -> list[str]:
    """The names of settings that nobody reads. Raises ConfigError for those that nobody understands.

    raw: ``quantization_config`` of a config.json, or None; where: that file, for errors.
    """
    if raw is None:
        return []
    settings, _ = _open(raw, where, _KEY)
    return settings.unread()


def read_quantised(tensors: Mapping[str, Tensor], raw: Any, where: str) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint with its quantised matrices as ``Stored``. raw, where: as for ``check``."""
    return tensors if raw is None else _open(raw, where, _KEY)[1].read(tensors)


def settings_beside(folder: Path) -> dict[str, Any] | None:
    """The settings that a file of their own holds, as ``quantization_config`` would; None if there is no such file."""
    for method, reader in READERS.items():
        if reader.beside is not None and not is_missing(folder / reader.beside):
            raw = read_json(folder / reader.beside)
            raw = raw if raw.get("quant_method") is not None else {**raw, "quant_method": method}
            _open(raw, str(folder / reader.beside), "")
            return raw
    return None


def _open(raw: Any, where: str, within: str) -> tuple[Settings, Layout]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: {within} is not an object of settings")
    if raw.get("quant_method") is None:
        found = [method for method, reader in READERS.items() if any(raw.get(sign) is True for sign in reader.signs)]
        raw = {**raw, "quant_method": found[0]} if found else raw
    settings = Settings(raw, where, within)
    method = settings.choice("quant_method", tuple(READERS))
    return settings, READERS[method].open(settings)
