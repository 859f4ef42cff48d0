"""Ops as functions: how the arguments of a call become an op's inputs and attributes, and what runs them.

What runs an op is decided by where its arrays are: NumPy arrays are for the op's own reference, CuPy arrays for the
executor in ``EXECUTORS``. That is named and not imported: it stands on a floor above, and needs a GPU.
"""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Array, dtype_name
from .signature import OpError, Signature, Spec

__all__ = ["EXECUTORS", "MODEL_DTYPES", "Parameters", "checked_attributes", "executor", "kind_of"]

MODEL_DTYPES = ("f32", "f16", "bf16")
"""What the letter T of a signature may stand for."""

EXECUTORS: Mapping[str, str] = {"cupy": "cuplama.backends.cuda.eager"}
"""Package of an array's type -> the module whose function ``run(op, ins, attrs)`` computes ops on such arrays."""


@dataclass(frozen=True)
class Parameters:
    """What a call of an op takes: its inputs by position or name, its attributes by name alone.

    A dtype letter that no input decides (``U`` of ``linear``) is an attribute, and by default the model's dtype ``T``;
    it has no default where no input has that (``cast``).
    """

    name: str
    signature: Signature

    @cached_property
    def free(self) -> tuple[str, ...]:
        """The letters that no input decides."""
        given = {s.letter for s in self.signature.ins} | set(DTYPES)
        return tuple(dict.fromkeys(s.letter for s in self.signature.outs if s.letter not in given))

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """What those letters may be."""
        return ("T", "f32") if any(s.letter == "T" for s in self.signature.ins) else MODEL_DTYPES

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {spec.name: i for i, spec in enumerate(self.signature.ins)}

    @cached_property
    def _attributes(self) -> frozenset[str]:
        return frozenset(spec.name for spec in self.signature.attrs)

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        letters = dict.fromkeys(self.free, "T") if "T" in self.choices else {}
        return {**self.signature.defaults, **letters}

    def take(
        self, arrays: Sequence[Array | None], named: Mapping[str, Any]
    ) -> tuple[list[Array | None], dict[str, Any]]:
        """(inputs, attributes) of a call; absent inputs are None. Raises OpError naming what is too much or missing."""
        width = len(self.signature.ins)
        if len(arrays) > width:
            raise OpError(f"{self.name} takes {width} arrays, not {len(arrays)}: {self.text}")
        ins: list[Array | None] = [*arrays, *[None] * (width - len(arrays))]
        attrs = self._defaults.copy()
        for key, value in named.items():
            if key in self._attributes:
                attrs[key] = value
            elif (at := self._positions.get(key)) is not None:
                if at < len(arrays):
                    raise OpError(f"{self.name}: {key} is given twice, by position and by name")
                ins[at] = value
            elif key in self.free:
                attrs[key] = _short(self.name, key, value, self.choices)
            else:
                raise OpError(f"{self.name} has no argument {key!r}: {self.text}")
        if len(attrs) < len(self._attributes) + len(self.free):
            names = (*(s.name for s in self.signature.attrs), *self.free)
            missing = next(name for name in names if name not in attrs)
            raise OpError(f"{self.name}: attribute {missing} is missing: {self.text}")
        return ins, attrs

    @property
    def text(self) -> str:
        """The call as one writes it: ``rms_norm(x, w, *, eps)``."""
        return f"{self.name}{self.inspected}"

    @cached_property
    def inspected(self) -> inspect.Signature:
        """For ``inspect.signature``. An input that may be absent has the default None where no input behind it is
        needed."""
        found = []
        last = max((i for i, spec in enumerate(self.signature.ins) if not spec.optional), default=-1)
        for i, spec in enumerate(self.signature.ins):
            default = None if spec.optional and i > last else inspect.Parameter.empty
            found.append(inspect.Parameter(spec.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default))
        for name in (*(spec.name for spec in self.signature.attrs), *self.free):
            default = self._defaults.get(name, inspect.Parameter.empty)
            found.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
        return inspect.Signature(found)

    def documentation(self, doc: str) -> str:
        """A docstring: the call, what the op computes, and every argument and result with shape and dtype."""
        rows = [("Arguments:", "")]
        for spec in self.signature.ins:
            rows.append((f"    {spec.name}", f"{_shape(spec)}{', or None' if spec.optional else ''}"))
        rows += [
            (f"    {s.name}", f"{'float' if DTYPES[s.dtype].kind == 'f' else 'int'}") for s in self.signature.attrs
        ]
        dtypes = " or ".join(f'"{dtype}"' for dtype in self.choices)
        rows += [(f"    {letter}", f"{dtypes}: the dtype of the result") for letter in self.free]
        rows.append(("Returns:", ""))
        for spec in self.signature.outs:
            same = ", the array that was given, changed in place" if spec.name in self.signature.in_place else ""
            rows.append((f"    {spec.name}", f"{_shape(spec)}{same}"))
        width = max(len(name) for name, _ in rows) + 2
        lines = [f"{name:{width}}{text}".rstrip() for name, text in rows]
        letters = {s.letter for s in (*self.signature.ins, *self.signature.outs)}
        known = [text for letter, text in _LETTERS.items() if letter in letters]
        return "\n".join([self.text, "", doc, "", *lines, "", *known, _WHERE])


_LETTERS = {
    "T": "T is f32, f16 or bf16, one for all arrays.",
    "C": "C, of the cache, is T or e4m3 (ml_dtypes.float8_e4m3fn).",
}
_WHERE = (
    "CuPy arrays: launched on CuPy's current stream and device, with memory from CuPy's current allocator; returns\n"
    "CuPy arrays. NumPy arrays: the reference. Arrays are C-contiguous. Raises OpError for arguments that do not fit.\n"
    "The values of integer arrays, such as row numbers, are not looked at."
)


def _shape(spec: Spec) -> str:
    return f"[{', '.join(spec.dims or ())}] {spec.letter}"


def _short(op: str, letter: str, value: Any, choices: Sequence[str]) -> str:
    """The short name of a dtype that was given by another: "T" stays, ``np.float32`` becomes "f32"."""
    if isinstance(value, str) and (value in choices or value in DTYPES):
        return value
    try:
        return dtype_name(np.dtype(value))
    except (TypeError, KeyError):
        raise OpError(f"{op}: {letter} is {value!r}, not a dtype: {' or '.join(choices)}") from None


def checked_attributes(name: str, signature: Signature, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes as numbers of Python. Raises OpError for one that is none, or that is no whole number where it
    has to be."""
    found = dict(attrs)
    for spec in signature.attrs:
        whole, value = DTYPES[spec.dtype].kind != "f", attrs.get(spec.name, spec.default)
        try:
            found[spec.name] = operator.index(value) if whole else float(value)
        except (TypeError, ValueError):
            wanted = "a whole number" if whole else "a number"
            raise OpError(f"{name}: {spec.name} is {value!r}, not {wanted}") from None
    return found


@lru_cache(maxsize=64)
def _runner(kind: type) -> Callable[..., Any] | None:
    """What runs ops on arrays of a class, which may be derived from CuPy's; None if nothing in ``EXECUTORS`` does."""
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
    module = next((EXECUTORS[package] for package in packages if package in EXECUTORS), None)
    return None if module is None else importlib.import_module(module).run


def executor(op: str, signature: Signature, ins: Sequence[Array | None]) -> Callable[..., Any] | None:
    """What runs an op on these arrays, by the first of them; None stands for NumPy, where the op's reference does.

    Raises OpError for what is neither a NumPy nor a CuPy array.
    """
    for spec, array in zip(signature.ins, ins, strict=True):
        if array is None:
            continue
        run = _runner(type(array))  # type: ignore[arg-type]  # mypy thinks that a class cannot be hashed
        if run is None and not isinstance(array, np.ndarray):
            raise OpError(f"{op}: {spec.name} is {kind_of(array)}")
        return run
    raise OpError(f"{op}: input {signature.ins[0].name} is missing")


def kind_of(value: Any) -> str:
    """What something is that is no array of an op, and what to do about it."""
    shown = f"a {type(value).__module__}.{type(value).__qualname__}".replace("a builtins.", "a ")
    hint = "; cupy.from_dlpack makes one of it without a copy" if hasattr(value, "__dlpack__") else ""
    return f"{shown}, not a CuPy or NumPy array{hint}"
