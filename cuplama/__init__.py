"""cuplama: a torch-free runtime for Llama-family language models.

import cuplama
model = cuplama.load()
print(model.generate("Once upon a time", seed=1).text)

A name is imported when it is first used: ``import cuplama`` costs nothing, and Ctrl-C works from the first moment.
"""

from __future__ import annotations

import importlib

# As in typing, whose import takes 10 ms in which Ctrl-C would still end in a traceback. Type checkers know the name.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from .answer import read_answer
    from .async_stream import AsyncStream
    from .chat import ChatOptions
    from .completion import Completion, Delta, Stream, Timings
    from .engine.sequence import Token
    from .errors import (
        BusyError,
        CheckpointError,
        ClosedError,
        CompileError,
        ConfigError,
        ContextError,
        CopyError,
        CuplamaError,
        DeviceError,
        ParameterError,
        PromptError,
        TokenizerError,
    )
    from .loading import load
    from .model import Model
    from .models.config import ModelConfig
    from .sampling_params import SamplingOptions, SamplingParams
    from .text.answer import Answer, ToolCall
    from .text.tokenizer import Tokenizer

__all__ = [
    "Answer",
    "AsyncStream",
    "BusyError",
    "ChatOptions",
    "CheckpointError",
    "ClosedError",
    "CompileError",
    "Completion",
    "ConfigError",
    "ContextError",
    "CopyError",
    "CuplamaError",
    "Delta",
    "DeviceError",
    "Model",
    "ModelConfig",
    "ParameterError",
    "PromptError",
    "SamplingOptions",
    "SamplingParams",
    "Stream",
    "Timings",
    "Token",
    "Tokenizer",
    "TokenizerError",
    "ToolCall",
    "load",
    "read_answer",
]
__version__ = "0.1.0"

# The modules of the public names that have one of their own; every other name is an error's.
_MODULES = {
    "Answer": "text.answer",
    "AsyncStream": "async_stream",
    "ChatOptions": "chat",
    "Completion": "completion",
    "Delta": "completion",
    "Stream": "completion",
    "Timings": "completion",
    "Token": "engine.sequence",
    "load": "loading",
    "Model": "model",
    "ModelConfig": "models.config",
    "SamplingOptions": "sampling_params",
    "SamplingParams": "sampling_params",
    "Tokenizer": "text.tokenizer",
    "ToolCall": "text.answer",
    "read_answer": "answer",
}


def __getattr__(name: str) -> Any:
    if name == "ops":  # the kernels as functions: cuplama.ops.rms_norm(x, w, eps=1e-5)
        return importlib.import_module(f"{__name__}.ops")
    if name not in __all__:
        raise AttributeError(f"module 'cuplama' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
