"""``cuplama kernels list``: every kernel with its file, ops, dtypes, architectures and meaning."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click

from ...dtypes import DTYPES
from ...folders import source_folder
from ...ops import OPS
from ...ops.op import Op
from ...ops.prototypes import prototypes
from ..options import DEBUG
from ..streams import print_table
from .names import kernel_users, opening_comment

__all__ = ["list_kernels"]

_GENERATIONS = (75, 80, 90, 100)  # ops choose their kernels by these, and by nothing between them


@click.command("list", short_help="Name, file, ops, dtypes, architectures and meaning of every kernel.")
@DEBUG
def list_kernels() -> None:
    """Name, file, ops, dtypes, architectures and meaning of every kernel."""
    by_arch = {arch: kernel_users(arch) for arch in _GENERATIONS}
    rows = []
    for path in sorted(source_folder().glob("*.cu")):
        for name in prototypes(path.name):
            found = {arch: users[path.name, name] for arch, users in by_arch.items() if (path.name, name) in users}
            ops = frozenset(op for who in found.values() for op in who.ops)
            dtypes = {d for who in found.values() for op in who.ops for d in _dtypes(OPS[op], who.dtypes)}
            cells = (" ".join(sorted(ops)), " ".join(d for d in DTYPES if d in dtypes), _archs(list(found)))
            rows.append((name, path.name, *(cell or "-" for cell in cells), _meaning(name, path.name, ops)))
    print_table(("kernel", "file", "ops", "dtypes", "archs", "computes"), rows)


def _dtypes(op: Op, given: frozenset[str]) -> frozenset[str]:
    """Of the model's dtypes an op was given, those that it sees: all, or what its signature names."""
    own = {s.letter for s in (*op.signature.ins, *op.signature.outs)}
    return given if "T" in own else given & own


def _archs(found: Sequence[int]) -> str:
    """ "sm_80+" for all from there on, else each by name."""
    if found and found == list(_GENERATIONS[-len(found) :]):
        return f"sm_{found[0]}+"
    return " ".join(f"sm_{arch}" for arch in found)


def _meaning(name: str, file: str, ops: frozenset[str]) -> str:
    """What its op says of a kernel; of one that is not an op's own, what the opening comment of its file says."""
    for op in (OPS[o] for o in sorted(ops)):
        if name in op.kernel_docs or not op.kernel_docs:
            return op.kernel_doc(name)
    opening = opening_comment(file)
    found = re.search(rf"^\s*{name}\s\s+(.*?)(?:\s\s|[,;]?$)", opening, re.M)
    return found[1] if found else opening.splitlines()[0].strip()
