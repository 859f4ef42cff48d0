"""The model families, one row per file. A family is found by being there: add a module with a ``FAMILY``, no more."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from ..family import Family

__all__ = ["FAMILIES"]


def _found() -> dict[str, Family]:
    """Architecture -> family, of every module of this folder that has a ``FAMILY``; others hold what several share."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    families: list[Family] = [m.FAMILY for m in modules if hasattr(m, "FAMILY")]
    return {f.architecture: f for f in families}


FAMILIES: Mapping[str, Family]  # made when it is first asked for: `import cuplama` need not import fifty files


def __getattr__(name: str) -> Mapping[str, Family]:
    if name != "FAMILIES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = _found()
    return found
