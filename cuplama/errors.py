"""The errors a user can cause. Each is one line that names the culprit; the command line exits with status 2."""

__all__ = [
    "BusyError",
    "CheckpointError",
    "ClosedError",
    "CompileError",
    "ConfigError",
    "ContextError",
    "CopyError",
    "CuplamaError",
    "DeviceError",
    "ParameterError",
    "PromptError",
    "TokenizerError",
]


class CuplamaError(Exception):
    """Base of every error that the caller can mend; anything else that escapes is a bug."""


class ConfigError(CuplamaError):
    """config.json is missing, unreadable, or asks for something that is not supported."""


class CheckpointError(CuplamaError):
    """A weight file or tensor is missing, unused, corrupt or of the wrong shape."""


class TokenizerError(CuplamaError):
    """The tokenizer or the chat template is missing or unusable."""


class PromptError(CuplamaError, ValueError):
    """The prompt cannot be used: neither text nor token ids, an id out of range, or empty without a BOS token."""


class ContextError(PromptError):
    """The prompt does not fit the context."""


class DeviceError(CuplamaError):
    """The device asked for is missing, too small, or not working."""


class ParameterError(CuplamaError, ValueError):
    """A parameter is unknown, of a wrong type or out of range."""


class ClosedError(CuplamaError, RuntimeError):
    """The model is closed and cannot generate any more."""


class BusyError(CuplamaError, RuntimeError):
    """Too many requests are waiting already."""


class CopyError(CuplamaError, TypeError):
    """A model or a stream can be neither pickled nor copied."""


class CompileError(DeviceError):
    """A kernel does not compile: file and line of our source, and the compiler's first complaint."""
