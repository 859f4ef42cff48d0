"""What an op lacks, and which kernels lack an op: a line for each, so that whoever adds an op sees what is left."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ..dtypes import DTYPES
from ..folders import source_folder
from . import OPS
from .abstract import attributes, described_inputs
from .launch import Device
from .op import Call, Op
from .prototypes import prototypes
from .signature import OpError

__all__ = ["launched", "missing"]

_DEVICES = (Device(75, 40, 65536), Device(80), Device(90))  # Ops choose their kernels by these generations.


Bind = Callable[[Op, Mapping[str, Any], str], Call]


def _bound(op: Op, case: Mapping[str, Any], T: str) -> Call:
    """The call of a case with plain weights."""
    return op.bind(described_inputs(op, case, DTYPES[T]), attributes(op, case, DTYPES[T]))


def missing(others: Collection[str] = (), ops: Mapping[str, Op] = OPS, bind: Bind = _bound) -> list[str]:
    """A line for everything that is missing, such as "x.cu: no op launches it" or "op x: no random sizes".

    others: kernels that belong to no op, as "bias.cu:cast_bias"; bind: makes the call of (op, case, dtype), where cases
    with quantised weights are to be seen too.
    """
    found = [line for op in ops.values() for line in _of_op(op, bind)]
    used = set(others)
    for op in ops.values():
        try:
            used |= launched(op, bind)
        except (OpError, KeyError) as e:
            found.append(f"op {op.name}: its launches cannot be planned: {e}")
    for path in sorted(source_folder().glob("*.cu")):
        unused = [name for name in prototypes(path.name) if f"{path.name}:{name}" not in used]
        if len(unused) == len(prototypes(path.name)):
            found.append(f"{path.name}: no op launches it")
        else:
            found += [f"{path.name}: no op launches {name}" for name in unused]
    return found


def _of_op(op: Op, bind: Bind) -> Iterator[str]:
    if not op.doc:
        yield f"op {op.name}: no documentation"
    if not op.cases:
        yield f"op {op.name}: no cases"
    if op.sizes is None:
        yield f"op {op.name}: no random sizes"
    if op.kernels is None:
        yield f"op {op.name}: no kernels"
        return
    try:
        kernels = {kernel.split(":")[1] for kernel in launched(op, bind)}
    except (OpError, KeyError):
        return
    if len(kernels) > 1:
        yield from (f"op {op.name}: no sentence about {name}" for name in sorted(kernels - set(op.kernel_docs)))


def launched(op: Op, bind: Bind = _bound) -> set[str]:
    """The kernels that the op's cases launch on some GPU, as "norm.cu:rms_norm". Raises OpError."""
    found: set[str] = set()
    for case in op.cases if op.kernels is not None else ():
        for T in ("f32", "f16"):
            call = bind(op, case, T)
            for device in _DEVICES:
                assert op.kernels is not None
                found |= {launch.kernel for launch in op.kernels(call, device).launches}
    return found
