"""Launch descriptions: how an op's arrays reach a ``__global__`` function, for the GPU and for the emulator alike.

Kernel parameters are bound by name. The prototype is read from the ``.cu`` text, and each parameter takes the value of
the same name: an array of the op's signature, a scratch buffer, a dim, an attribute, or a constant that the launch
adds. So an argument can neither be swapped nor have the wrong width, and no list of arguments is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .op import DTYPES, Array, Call, OpError, dtype_name

__all__ = [
    "BoundLaunch",
    "Device",
    "Launch",
    "Parameter",
    "Plan",
    "Prototype",
    "bind",
    "prototypes",
    "source_folder",
]


@dataclass(frozen=True)
class Device:
    """What a launch may depend on. arch: 75, 80, ..., 120; shared: bytes of shared memory a block can have."""

    arch: int = 90
    sms: int = 132
    shared: int = 232448


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, before its arguments are bound.

    kernel: ``"norm.cu:rms_norm"``; shared: bytes of dynamic shared memory; constants: values for parameters (run time
    or template) that are neither arrays, dims nor attributes.
    """

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int = 0
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The launches that compute an op, in order, and the scratch buffers they share: name -> (shape, dtype name).

    zeroed: scratch buffers that hold zeros before the first launch and that the launches leave holding zeros, such as
    counters. They are made once and kept; the others hold anything.
    """

    launches: tuple[Launch, ...]
    scratch: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    zeroed: frozenset[str] = frozenset()


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

    waits: its text calls ``wait_for_previous``, so it may be started before the kernel ahead of it has ended.
    """

    name: str
    template: tuple[Parameter, ...]
    parameters: tuple[Parameter, ...]
    waits: bool = False


@dataclass(frozen=True)
class BoundLaunch:
    """A launch with everything decided: what an executor needs, and all it needs.

    expression: the C++ name, ``rms_norm<bf16, 64>``; args: arrays and NumPy scalars in the order of the parameters.
    """

    file: str
    expression: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    args: tuple[Any, ...]
    prototype: Prototype

    def describe(self) -> str:
        """One line for error messages: kernel, grid, block, and each argument's shape and dtype or value."""
        args = ", ".join(
            f"{p.name}={tuple(a.shape)}:{a.dtype}" if hasattr(a, "shape") and a.shape != () else f"{p.name}={a}"
            for p, a in zip(self.prototype.parameters, self.args, strict=True)
        )
        return f"{self.file}: {self.expression} grid={self.grid} block={self.block} shared={self.shared} ({args})"


# C++ scalar types that kernels may take, and the NumPy scalar that has their size.
_SCALARS: Mapping[str, Callable[[Any], Any]] = {
    "int": np.int32,
    "unsigned": np.uint32,
    "float": np.float32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "i32": np.int32,
    "u32": np.uint32,
    "f32": np.float32,
    "i64": np.int64,
    "u64": np.uint64,
}
# Array dtypes by the C++ element type of the pointer.
_ELEMENTS = {
    "int": "i32",
    "unsigned": "u32",
    "float": "f32",
    "double": "f64",
    "long long": "i64",
    "unsigned long long": "u64",
    "__half": "f16",
    "__nv_bfloat16": "bf16",
}

_KERNEL = re.compile(
    r"(?:template\s*<([^>]*)>\s*)?(?:extern\s+\"C\"\s+)?__global__\s+(?:static\s+)?void\s+"
    r"(?:__launch_bounds__\s*\([^)]*\)\s+)?(\w+)\s*\(([^)]*)\)\s*\{",
    re.S,
)


def data_folder(name: str) -> Path:
    """``cuda_src/`` or ``weights/``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def source_folder() -> Path:
    """The folder of the CUDA C++ sources."""
    return data_folder("cuda_src")


def parse_prototypes(text: str) -> dict[str, Prototype]:
    """Every kernel of a ``.cu`` text by name."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    found = {}
    for m in _KERNEL.finditer(text):
        template, name, params = m.groups(default="")
        waits = "wait_for_previous(" in _block(text, m.end())
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


@cache
def prototypes(file: str, folder: Path | None = None) -> dict[str, Prototype]:
    """Every kernel of ``cuda_src/<file>`` by name."""
    return parse_prototypes(((folder or source_folder()) / file).read_text(encoding="utf-8"))


def bind(launch: Launch, call: Call, scratch: Mapping[str, Array]) -> BoundLaunch:
    """Resolve every parameter of the kernel by name. Raises OpError for a name without a value or a wrong dtype."""
    file, name = launch.kernel.split(":")
    proto = prototypes(file)[name]
    types = {letter: dtype_name(dtype) for letter, dtype in call.dtypes.items()}
    values: dict[str, Any] = {**call.env, **call.arrays, **scratch, **launch.constants}

    template = []
    for p in proto.template:
        value = values[p.name] if p.name in values else types.get(p.name)
        if value is None:
            raise OpError(f"{file}: {name}: no value for template parameter {p.name}")
        if p.type == "typename":
            types[p.name] = str(value)
        template.append(str(value).lower() if isinstance(value, bool) else str(value))

    args = []
    for p in proto.parameters:
        if p.name not in values:
            raise OpError(f"{file}: {name}: no value for parameter {p.name}")
        args.append(_pointer(file, name, p, values[p.name], types) if p.pointer else _SCALARS[p.type](values[p.name]))
    return BoundLaunch(
        file,
        f"{name}<{', '.join(template)}>" if template else name,
        _three(launch.grid),
        _three(launch.block),
        launch.shared,
        tuple(args),
        proto,
    )


def _pointer(file: str, kernel: str, p: Parameter, array: Array | None, types: Mapping[str, str]) -> Any:
    if array is None:  # an absent optional input
        return np.uintp(0)
    element = types.get(p.type) or _ELEMENTS.get(p.type, p.type)
    if np.dtype(array.dtype) != DTYPES[element]:
        raise OpError(f"{file}: {kernel}: {p.name} is {array.dtype}, the kernel takes {element}*")
    return array


def _three(size: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*size, 1, 1)[:3]
    return int(x), int(y), int(z)
