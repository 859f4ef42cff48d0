"""cuplama: a torch-free runtime for Llama-family language models.

import cuplama
model = cuplama.load()
print(model.generate("Once upon a time", seed=1).text)

A name is imported when it is first used: ``import cuplama`` costs nothing, and Ctrl-C works from the first moment.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .completion import Completion, Delta
    from .errors import CuplamaError
    from .loading import load
    from .model import Model
    from .sampling_params import SamplingParams

__all__ = ["Completion", "CuplamaError", "Delta", "Model", "SamplingParams", "load"]
__version__ = "0.1.0"

_MODULES = {
    "Completion": "completion",
    "CuplamaError": "errors",
    "Delta": "completion",
    "Model": "model",
    "SamplingParams": "sampling_params",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name == "ops":  # the kernels as functions: cuplama.ops.rms_norm(x, w, eps=1e-5)
        return importlib.import_module(f"{__name__}.ops")
    if name not in _MODULES:
        raise AttributeError(f"module 'cuplama' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
