"""What the NAME of a kernel command means: an op, a kernel, a source file, or an op from a user's own folder; and who
uses which kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ParameterError
from ...folders import source_folder
from ...ops import OPS
from ...ops.op import Op
from ...ops.outside import is_outside, load_all
from ...ops.prototypes import prototypes

__all__ = ["Users", "find_ops", "kernel_users", "opening_comment", "split_outside", "unlaunched_kernels"]


@dataclass(frozen=True)
class Users:
    """Who needs a kernel: names of ops, and the dtypes of the models that they are launched for."""

    ops: frozenset[str] = field(default_factory=frozenset)
    dtypes: frozenset[str] = field(default_factory=frozenset)


def kernel_users(arch: int = 90, outside: Sequence[Op] = ()) -> dict[tuple[str, str], Users]:
    """(file, kernel) -> its users, for the kernels that ops launch on that architecture: the package's, or those from
    outside alone."""
    from ...backends.cuda.toolkit import shared_limit
    from ...lab.inventory import needed
    from ...ops.launch import Device

    users: dict[tuple[str, str], Users] = {}
    for file, instances in needed(Device(arch=arch, shared=shared_limit(arch)), outside=outside).items():
        for expression, need in instances.items():
            key = file, expression.split("<")[0]
            before = users.get(key, Users())
            if need.ops:
                users[key] = Users(before.ops | need.ops, before.dtypes | need.dtypes)
    return users


def find_ops(name: str) -> list[Op]:
    """The ops that a name stands for: an op, a kernel, the stem of a file, ``my_op.py`` or ``my_op.py:NAME``.

    Raises ParameterError.
    """
    if name in OPS:
        return [OPS[name]]
    if is_outside(name):
        return list(load_all(name).values())
    stem = name.removesuffix(".cu")
    users = kernel_users()
    ops = {op for (file, kernel), who in users.items() if stem in (kernel, Path(file).stem) for op in who.ops}
    if not ops:
        known = sorted({*OPS, *(k for _, k in users), *(Path(f).stem for f, _ in users)})
        raise ParameterError(f"no op, kernel or file is named {name!r}; known: {', '.join(known)}")
    return [op for op in OPS.values() if op.name in ops]


def split_outside(ops: Sequence[Op]) -> tuple[list[str], list[Op]]:
    """(names of the package's ops, ops from outside): what ``compile_kernels`` of the lab takes."""
    ours = [op.name for op in ops if OPS.get(op.name) is op]
    return ours, [op for op in ops if OPS.get(op.name) is not op]


def unlaunched_kernels(name: str) -> dict[str, list[str]]:
    """file -> kernels that no op launches (those that measure the machine), if the name means them."""
    users = kernel_users()
    stem = name.removesuffix(".cu")
    found: dict[str, list[str]] = {}
    for path in sorted(source_folder().glob("*.cu")):
        for kernel, prototype in prototypes(path.name).items():
            if (path.name, kernel) not in users and not prototype.template and stem in (kernel, path.stem):
                found.setdefault(path.name, []).append(kernel)
    return found


def opening_comment(file: str) -> str:
    """The comment that opens a source, indented by two spaces. file: a name in ``cuda_src/``, or a whole path."""
    lines = (source_folder() / file).read_text(encoding="utf-8").splitlines()
    head = []
    for line in lines:
        if not line.startswith("//"):
            break
        head.append("  " + line.removeprefix("//").removeprefix(" "))
    return "\n".join(head)
