"""The endpoints, some per file. They are found by being there: add a module with ``ENDPOINTS``, no more."""

from __future__ import annotations

import importlib
import pkgutil

from ..endpoint import Endpoint

__all__ = ["ENDPOINTS"]


def _found() -> tuple[Endpoint, ...]:
    """All endpoints of the modules of this folder; a module without ``ENDPOINTS`` holds what several share."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return tuple(endpoint for m in modules for endpoint in getattr(m, "ENDPOINTS", ()))


ENDPOINTS: tuple[Endpoint, ...] = _found()
