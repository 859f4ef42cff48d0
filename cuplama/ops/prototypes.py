"""The prototypes of kernels, read from the ``.cu`` text: that is how parameters get their values by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..folders import source_folder
from .signature import OpError

__all__ = ["Parameter", "Prototype", "parse_prototypes", "prototype_of", "prototypes"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: ``const T* x`` has type ``T``, pointer and const true."""

    name: str
    type: str
    pointer: bool = False
    const: bool = False


@dataclass(frozen=True)
class Prototype:
    """A kernel as its ``.cu`` declares it; template parameters have type ``typename`` or an integer type.

    waits: its text calls ``pdl_wait``, so it may be started before the kernel ahead of it has ended.
    """

    name: str
    template: tuple[Parameter, ...]
    parameters: tuple[Parameter, ...]
    waits: bool = False


_KERNEL = re.compile(
    r"(?:template\s*<([^>]*)>\s*)?(?:extern\s+\"C\"\s+)?__global__\s+(?:static\s+)?void\s+"
    r"(?:__launch_bounds__\s*\([^)]*\)\s+)?(\w+)\s*\(([^)]*)\)\s*\{",
    re.S,
)


def parse_prototypes(text: str) -> dict[str, Prototype]:
    """Every kernel of a ``.cu`` text by name."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    found = {}
    for m in _KERNEL.finditer(text):
        template, name, params = m.groups(default="")
        waits = "pdl_wait(" in _block(text, m.end())
        found[name] = Prototype(name, _parameters(template), _parameters(params), waits)
    return found


def _block(text: str, start: int) -> str:
    """The text from just behind a brace to the brace that closes it."""
    depth, at = 1, start
    while depth and at < len(text):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    return text[start:at]


def _parameters(text: str) -> tuple[Parameter, ...]:
    parsed = []
    for piece in filter(None, (p.strip() for p in text.split(","))):
        piece = piece.split("=")[0]
        words = piece.replace("*", " * ").replace("__restrict__", " ").replace("volatile", " ").split()
        const, pointer = "const" in words, "*" in words
        words = [w for w in words if w not in ("const", "*")]
        parsed.append(Parameter(words[-1], " ".join(words[:-1]), pointer, const))
    return tuple(parsed)


def prototypes(file: str, folder: Path | None = None) -> dict[str, Prototype]:
    """Every kernel of ``cuda_src/<file>`` by name, read again when the file has changed. Raises OSError.

    file: a name, or the whole path of a source from elsewhere.
    """
    path = (folder or source_folder()) / file  # a whole path wins over the folder
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


def prototype_of(kernel: str) -> Prototype:
    """The kernel that a launch names, as "norm.cu:rms_norm". Raises OpError if there is none."""
    file, colon, name = kernel.rpartition(":")
    if not colon:
        raise OpError(f"a launch names {kernel!r}; a kernel is named as in file.cu:kernel")
    try:
        found = prototypes(file)
    except OSError:
        raise OpError(f"a launch names {kernel}, and there is no file {source_folder() / file}") from None
    if name not in found:
        raise OpError(f"{file} has no kernel {name!r}; it has {', '.join(found) or 'none'}")
    return found[name]


@lru_cache(maxsize=256)
def _read(path: Path, mtime_ns: int, size: int) -> dict[str, Prototype]:
    return parse_prototypes(path.read_text(encoding="utf-8"))
