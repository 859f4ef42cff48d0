"""``cuplama kernels list``: every kernel with its file, ops, dtypes, architectures and meaning.

On a terminal each kernel is a few lines, wrapped at its width; elsewhere it is one line of plain columns.
"""

from __future__ import annotations

import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import click

from ...dtypes import DTYPES
from ...folders import source_folder
from ...ops import OPS
from ...ops.op import Op
from ...ops.prototypes import prototypes
from ..options import DEBUG
from ..streams import print_table
from .names import find_ops, kernel_users, opening_comment, split_outside

__all__ = ["list_kernels"]

_WIDEST = 100  # columns: longer lines are hard to read
_GENERATIONS = (75, 80, 90, 100)  # ops choose their kernels by these, and by nothing between them


@click.command("list", short_help="Name, file, ops, dtypes, architectures and meaning of every kernel.")
@DEBUG
@click.argument("names", nargs=-1, metavar="[NAME]...")
def list_kernels(names: tuple[str, ...]) -> None:
    """Name, file, ops, dtypes, architectures and meaning of kernels: all, or those of a NAME.

    NAME is an op, a kernel or a file, or a file of your own: my_op.py or my_op.py:NAME.
    """
    chosen = [op for name in names for op in find_ops(name)]
    ours, outside = split_outside(chosen)
    rows = []
    if not chosen or ours:
        every = _rows(OPS, sorted(path.name for path in source_folder().glob("*.cu")))
        rows += [row for row in every if not chosen or not set(ours).isdisjoint(row.ops.split())]
    if outside:
        ops = {op.name: op for op in outside}
        files = sorted({file for arch in _GENERATIONS for file, _ in kernel_users(arch, outside)})
        rows += [row for row in _rows(ops, files, outside) if row.ops != "-"]
    if sys.stdout.isatty():
        click.echo("\n".join(_paragraphs(rows, min(shutil.get_terminal_size().columns, _WIDEST))))
    else:
        print_table(("kernel", "file", "ops", "dtypes", "archs", "computes"), rows)


class _Row(NamedTuple):
    """What is told of a kernel, each a text."""

    name: str
    file: str
    ops: str
    dtypes: str
    archs: str
    meaning: str


def _rows(known: Mapping[str, Op], files: Sequence[str], outside: Sequence[Op] = ()) -> list[_Row]:
    """A row for every kernel of the files. known: ops by name; outside: those that are not the package's."""
    by_arch = {arch: kernel_users(arch, outside) for arch in _GENERATIONS}
    rows = []
    for file in files:
        for name in prototypes(file):
            found = {arch: users[file, name] for arch, users in by_arch.items() if (file, name) in users}
            ops = {op: known[op] for who in found.values() for op in who.ops}
            dtypes = {d for who in found.values() for op in who.ops for d in _dtypes(known[op], who.dtypes)}
            shown = " ".join(d for d in DTYPES if d in dtypes)
            meaning = _meaning(name, file, ops)
            rows.append(
                _Row(name, file, " ".join(sorted(ops)) or "-", shown or "-", _archs(list(found)) or "-", meaning)
            )
    return rows


def _paragraphs(rows: Sequence[_Row], width: int) -> Iterator[str]:
    """The kernels of each file, with what they compute, who launches them, and for what; wrapped at the width."""
    for file, kernels in itertools.groupby(rows, key=lambda row: row.file):
        yield click.style(file, bold=True)
        for row in kernels:
            facts = [f"op{'s' * (' ' in row.ops)} {row.ops}", row.dtypes, row.archs]
            told = "; ".join(fact for fact in facts if not fact.endswith("-"))
            yield f"  {click.style(row.name, fg='cyan')}"
            for text in filter(None, (row.meaning, told)):
                yield textwrap.fill(text, width, initial_indent="    ", subsequent_indent="      ")
        yield ""


def _dtypes(op: Op, given: frozenset[str]) -> frozenset[str]:
    """Of the model's dtypes an op was given, those that it sees: all, or what its signature names."""
    own = {s.letter for s in (*op.signature.ins, *op.signature.outs)}
    return given if "T" in own else given & own


def _archs(found: Sequence[int]) -> str:
    """ "sm_80+" for all from there on, else each by name."""
    if found and found == list(_GENERATIONS[-len(found) :]):
        return f"sm_{found[0]}+"
    return " ".join(f"sm_{arch}" for arch in found)


def _meaning(name: str, file: str, ops: Mapping[str, Op]) -> str:
    """What its op says of a kernel; of one that is not an op's own, what the opening comment of its file says."""
    for op in (ops[o] for o in sorted(ops)):
        if name in op.kernel_docs or not op.kernel_docs:
            return op.kernel_doc(name)
    opening = opening_comment(file)
    found = re.search(rf"^\s*{name}\s\s+(.*?)(?:\s\s|[,;]?$)", opening, re.M)
    return found[1] if found else opening.splitlines()[0].strip()
