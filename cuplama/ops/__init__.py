"""All ops by name, found by themselves: every module of this folder that holds an ``Op`` adds it to ``OPS``.

One module per stem: the kernels of ``ops/<stem>.py`` are in ``cuda_src/<stem>.cu``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from .op import Op

__all__ = ["OPS"]

_found: dict[str, Op] = {}
OPS: Mapping[str, Op] = _found

# OPS is there, still empty, before the modules are imported: some of them (node.py, abstract.py) import it from here.
for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    for _op in vars(importlib.import_module(f"{__name__}.{_module}")).values():
        if isinstance(_op, Op):
            _found[_op.name] = _op
