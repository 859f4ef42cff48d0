"""How an op's arrays reach a ``__global__`` function, for the GPU and for the emulator alike.

Kernel parameters are bound by name. The prototype is read from the ``.cu`` text, and each parameter takes the value of
the same name: an array of the op's signature, a scratch buffer, a dim, an attribute, or a constant that the launch
adds. So an argument can neither be swapped nor have the wrong width, and no list of arguments is written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Array, dtype_name
from .launch import Launch, Plan
from .op import Call
from .prototypes import Parameter, Prototype, prototype_of
from .signature import OpError
from .weights import named_segments

__all__ = ["Allocate", "BoundLaunch", "bind", "bind_plan"]

Allocate = Callable[[str, tuple[int, ...], np.dtype[Any]], Array]


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


def bind(launch: Launch, call: Call, scratch: Mapping[str, Array]) -> BoundLaunch:
    """Resolve every parameter of the kernel by name. Raises OpError for a name without a value or a wrong dtype."""
    file, _, name = launch.kernel.rpartition(":")
    proto = prototype_of(launch.kernel)
    types = {letter: dtype_name(dtype) for letter, dtype in call.dtypes.items()}
    segments = (part for name, array in call.arrays.items() for part in named_segments(name, array))
    values: dict[str, Any] = {**call.env, **call.arrays, **dict(segments), **scratch, **launch.constants}
    values |= {parameter: _named(launch, values, array) for parameter, array in launch.names.items()}
    values |= {parameter: values[parameter][start:] for parameter, start in launch.starts.items()}

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
        if not p.pointer and p.type not in _SCALARS:
            raise OpError(f"{file}: {name}: {p.name} is of type {p.type}; a number may be {', '.join(_SCALARS)}")
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


def bind_plan(plan: Plan, call: Call, empty: Allocate, zeros: Allocate) -> list[BoundLaunch]:
    """The launches of a plan on the call's arrays, with outputs and scratch that ``empty`` makes.

    The new outputs are put into ``call.arrays``. zeros: makes the scratch that holds zeros before the first launch.
    Both are called with (name, shape, dtype); descriptions of arrays will do where nothing is run.
    """
    for spec in call.op.signature.outs:
        if spec.name not in call.op.signature.in_place:
            call.arrays[spec.name] = empty(spec.name, call.shape(spec), call.dtype(spec))
    scratch = {
        name: (zeros if name in plan.zeroed else empty)(name, shape, DTYPES[dtype])
        for name, (shape, dtype) in plan.scratch.items()
    }
    return [bind(launch, call, scratch) for launch in plan.launches]


def _named(launch: Launch, values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise OpError(f"{launch.kernel}: a parameter is to take {name!r}, which is no array of the call")
    return values[name]


def _pointer(file: str, kernel: str, p: Parameter, array: Array | None, types: Mapping[str, str]) -> Any:
    if array is None:  # an absent optional input
        return np.uintp(0)
    element = types.get(p.type) or _ELEMENTS.get(p.type, p.type)
    if p.type == "W" and np.dtype(array.dtype) == np.uint8:  # the blocks of a packed weight
        return array
    if np.dtype(array.dtype) != DTYPES[element]:
        raise OpError(f"{file}: {kernel}: {p.name} is {array.dtype}, the kernel takes {element}*")
    return array


def _three(size: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*size, 1, 1)[:3]
    return int(x), int(y), int(z)
