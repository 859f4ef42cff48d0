"""All ops by name, found by themselves, and as functions: ``y = cuplama.ops.rms_norm(x, w, eps=1e-5)``.

Every module of this folder that holds an ``Op`` adds it to ``OPS``. One module per stem: the kernels of
``ops/<stem>.py`` are in ``cuda_src/<stem>.cu``. An op that has the name of its module, such as ``linear``, is what the
name means here: ``ops.linear`` is the op, and ``from cuplama.ops.linear import ...`` still finds the module.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .op import Op
from .signature import OpError

if TYPE_CHECKING:  # Type checkers take a name that a module has as well for the module, unless they are told.
    from .advance import advance as advance
    from .attention import attention as attention
    from .embedding import embedding as embedding
    from .linear import linear as linear
    from .rope import rope as rope

__all__ = ["OPS", "Op", "OpError", "load", "load_all"]

_found: dict[str, Op] = {}
OPS: Mapping[str, Op] = _found

# OPS is there, still empty, before the modules are imported: some of them (node.py, abstract.py) import it from here.
for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    for _op in vars(importlib.import_module(f"{__name__}.{_module}")).values():
        if isinstance(_op, Op):
            _found[_op.name] = _op
globals().update(_found)  # after all imports: importing a module sets its own name here

from .outside import load, load_all  # noqa: E402  it imports OPS from here


def __getattr__(name: str) -> Op:
    """For type checkers: the names of ops are set above. Raises AttributeError, with the name that was meant."""
    import difflib  # 4 ms, for an error alone

    near = difflib.get_close_matches(name, OPS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; ops: {', '.join(OPS)}"
    raise AttributeError(f"cuplama.ops has no {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*__all__, *OPS})
