"""Signatures: the one line that says what arrays and scalars an op takes and gives, read into plain data.

``cuplama/ops/op.py`` explains the notation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..dtypes import DTYPES
from ..errors import CuplamaError

__all__ = ["OpError", "Signature", "Spec", "dim_names", "dim_value"]


class OpError(CuplamaError, TypeError):
    """Arrays or attributes that do not fit an op's signature. The caller's mistake: whoever calls ``cuplama.ops``."""


@dataclass(frozen=True)
class Spec:
    """One array or scalar of a signature."""

    name: str
    dims: tuple[str, ...] | None  # None: a scalar attribute
    dtype: str
    optional: bool = False
    default: float | None = None  # of an attribute that a call may leave out

    @property
    def letter(self) -> str:
        """The dtype or letter that an array must have: a weight (``W``) of a plain format holds the model's ``T``."""
        return "T" if self.dtype == "W" else self.dtype


@dataclass(frozen=True)
class Signature:
    """A parsed signature: output arrays, input arrays, scalar attributes."""

    text: str
    outs: tuple[Spec, ...]
    ins: tuple[Spec, ...]
    attrs: tuple[Spec, ...]

    @staticmethod
    def parse(text: str) -> Signature:
        """Read ``y[n]:T = (x[n]:T, eps:f32)``. Raises ValueError with the text that cannot be read, or names a dtype
        that does not exist or a size of an output that no input gives."""
        left, _, right = (part.strip() for part in text.partition("="))
        if not (right.startswith("(") and right.endswith(")")):
            raise ValueError(f"a signature is as in y[n]:T = (x[n]:T, eps:f32), not {text!r}")
        specs = _specs(right[1:-1])
        ins, attrs = (tuple(s for s in specs if (s.dims is None) == scalar) for scalar in (False, True))
        signature = Signature(text, _specs(left), ins, attrs)
        known = {name for s in ins for d in s.dims or () for name in dim_names(d)} | {s.name for s in attrs}
        for s in signature.outs:
            if unknown := sorted({name for d in s.dims or () for name in dim_names(d)} - known):
                raise ValueError(f"{s.name} has a size {unknown[0]} that no input gives: {text}")
        return signature

    @cached_property
    def in_place(self) -> frozenset[str]:
        """The arrays that are both inputs and outputs."""
        return frozenset(s.name for s in self.outs) & frozenset(s.name for s in self.ins)

    @cached_property
    def defaults(self) -> dict[str, float]:
        """The attributes that a call may leave out, with their values then."""
        return {s.name: s.default for s in self.attrs if s.default is not None}


_SPEC = re.compile(r"\s*(\w+)(?:\[([^\]]*)\])?:(\w+)(\??)(?:=([-\d.]+))?\s*(?:,|$)")


def _specs(text: str) -> tuple[Spec, ...]:
    specs, at = [], 0
    while at < len(text.rstrip()):
        m = _SPEC.match(text, at)
        if m is None:
            raise ValueError(f"cannot read the signature at {text[at:]!r}")
        name, dims, dtype, optional, default = m.groups()
        if dtype not in DTYPES and not re.fullmatch("[A-Z]", dtype):
            raise ValueError(f"{name} has the dtype {dtype}; it may be {', '.join(DTYPES)}, or a capital letter")
        split = None if dims is None else tuple(d.strip() for d in dims.split(","))
        number = None if default is None else float(default) if dtype == "f32" else int(default)
        specs.append(Spec(name, split, dtype, bool(optional), number))
        at = m.end()
    return tuple(specs)


_DIM_CODE: dict[str, Any] = {}
_DIM_NAMES: dict[str, tuple[str, ...]] = {}


def dim_names(expression: str) -> tuple[str, ...]:
    """The names in a dim expression."""
    if expression not in _DIM_NAMES:
        tree = ast.parse(expression, mode="eval")
        _DIM_NAMES[expression] = tuple(sorted({n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}))
        _DIM_CODE[expression] = compile(tree, "<dim>", "eval")
    return _DIM_NAMES[expression]


def dim_value(expression: str, env: Mapping[str, Any]) -> int:
    """The value of a dim expression once its names are known."""
    dim_names(expression)
    return int(eval(_DIM_CODE[expression], {"__builtins__": {}}, dict(env)))
