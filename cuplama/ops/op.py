"""Ops: what a graph node computes, declared once and executed by every backend.

An op's signature is one line::

    y[n,d]:T = (x[n,d]:f32, w[d]:T, eps:f32)

``name[dims]:dtype`` is an array, ``name:dtype`` a scalar attribute, ``?`` marks an input that may be absent, and a name
on both sides is updated in place. Dims are names, or sums and products of names and numbers (``b+1``, ``num_heads*D``).
Dtypes are ``f32 i32 u64 ...`` or a letter that the call decides: ``T`` is the model's dtype; a letter that no input
fixes is an attribute of the node (``U`` of ``linear``).

From the signature follow the checks before every launch, the casts of scalars, the random test cases, the bytes moved,
and the test that the kernel's parameter list agrees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .launch import Device, Plan
from ..dtypes import DTYPES, Array
from .signature import OpError, Signature, Spec, dim_names, dim_value

__all__ = ["Call", "Op"]


@dataclass
class Call:
    """One op with its arrays: the dims, dtypes and attributes that follow from them.

    ``env`` holds dims and attributes by name, ``dtypes`` the letters, ``arrays`` inputs and (once made) outputs;
    an absent optional input is None.
    """

    op: Op
    env: dict[str, Any]
    dtypes: dict[str, np.dtype[Any]]
    arrays: dict[str, Array | None]

    def __getitem__(self, name: str) -> Any:
        return self.env[name]

    def dtype(self, spec: Spec) -> np.dtype[Any]:
        return DTYPES.get(spec.dtype) or self.dtypes[spec.dtype]

    def shape(self, spec: Spec) -> tuple[int, ...]:
        return tuple(dim_value(d, self.env) for d in spec.dims or ())

    def nbytes(self) -> int:
        """Bytes a perfect kernel moves: inputs read once, outputs written once, unless the op says otherwise."""
        if self.op.bytes is not None:
            return int(self.op.bytes(self))
        total = 0
        for spec in (*self.op.signature.ins, *self.op.signature.outs):
            if spec in self.op.signature.ins and self.arrays.get(spec.name) is None:
                continue
            total += math.prod(self.shape(spec)) * self.dtype(spec).itemsize
        return total

    def flops(self) -> int:
        return int(self.op.flops(self)) if self.op.flops is not None else 0


@dataclass(frozen=True, eq=False)
class Op:
    """One op: its signature, its meaning in NumPy, its kernels, and the cases that test and time it.

    reference: ``f(*inputs, **attributes)`` on NumPy arrays; computes in float32, or in float64 when given float64.
    kernels:   ``f(call, device) -> Plan``: the launches, or None while the op has no kernel of its own.
    cases:     dims and attributes of the tests; small, odd and edge shapes.
    ranges:    for integer inputs, the dim expression that bounds the values.
    inputs:    ``f(rng, case, T) -> dict`` for inputs that must be consistent with each other (page tables, ...).
    """

    name: str
    text: str
    doc: str
    reference: Callable[..., Any]
    kernels: Callable[[Call, Device], Plan] | None = None
    cases: Sequence[Mapping[str, Any]] = ()
    ranges: Mapping[str, str] = field(default_factory=dict)
    inputs: Callable[[np.random.Generator, Mapping[str, Any], np.dtype[Any]], dict[str, Any]] | None = None
    bytes: Callable[[Call], float] | None = None
    flops: Callable[[Call], float] | None = None

    @cached_property
    def signature(self) -> Signature:
        return Signature.parse(self.text)

    def bind(self, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> Call:
        """Check the inputs against the signature and solve for the dims.

        Raises OpError naming the op, the array and what was expected.
        """
        call = Call(self, {}, {}, {})
        for spec in self.signature.attrs:
            if spec.name not in attrs:
                raise OpError(f"{self.name}: attribute {spec.name} is missing")
            call.env[spec.name] = attrs[spec.name]
        letters = {key: value for key, value in attrs.items() if key in _letters(self.signature)}
        call.dtypes.update((key, DTYPES[value]) for key, value in letters.items() if value in DTYPES)
        if len(ins) > len(self.signature.ins):
            raise OpError(f"{self.name}: {len(ins)} inputs for {self.text}")
        sizes: list[tuple[Spec, str, int]] = []
        padded = [*ins, *[None] * (len(self.signature.ins) - len(ins))]
        for spec, array in zip(self.signature.ins, padded, strict=True):
            call.arrays[spec.name] = array
            if array is not None:
                self._check(call, spec, array)
                sizes += [(spec, d, s) for d, s in zip(spec.dims or (), array.shape, strict=True)]
            elif not spec.optional:
                raise OpError(f"{self.name}: input {spec.name} is missing")
        # Plain names first: they fix the unknowns of the expressions.
        for spec, expression, size in sorted(sizes, key=lambda s: len(dim_names(s[1])) + (not s[1].isidentifier())):
            unknown = [n for n in dim_names(expression) if n not in call.env]
            if unknown:
                (name,) = unknown
                at0, at1 = (dim_value(expression, {**call.env, name: v}) for v in (0, 1))
                call.env[name] = (size - at0) // (at1 - at0)
            if (wanted := dim_value(expression, call.env)) != size:
                raise OpError(f"{self.name}: {spec.name} has {size} where {expression} is {wanted}")
        call.dtypes.update((key, call.dtypes[value]) for key, value in letters.items() if value not in DTYPES)
        return call

    def _check(self, call: Call, spec: Spec, array: Array) -> None:
        assert spec.dims is not None
        dtype = np.dtype(array.dtype)
        wanted = DTYPES.get(spec.dtype) or call.dtypes.setdefault(spec.dtype, dtype)
        where = f"{self.name}: {spec.name}[{','.join(spec.dims)}]"
        if dtype != wanted:
            raise OpError(f"{where} is {dtype}, not {wanted}")
        if len(array.shape) != len(spec.dims):
            raise OpError(f"{where} has shape {tuple(array.shape)}")
        if not array.flags.c_contiguous:
            raise OpError(f"{where} is not contiguous")

    def random_inputs(
        self, rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]
    ) -> dict[str, np.ndarray[Any, Any] | None]:
        """Inputs for one case: normal floats in the signature's dtypes, integers within ``ranges``."""
        given = self.inputs(rng, case, T) if self.inputs is not None else {}
        arrays: dict[str, np.ndarray[Any, Any] | None] = {}
        for spec in self.signature.ins:
            assert spec.dims is not None
            if spec.name in given:
                arrays[spec.name] = given[spec.name]
                continue
            if spec.optional and not case.get(spec.name, True):
                arrays[spec.name] = None
                continue
            shape = tuple(dim_value(d, case) for d in spec.dims)
            dtype = DTYPES.get(spec.dtype) or T
            if dtype.kind in "iu":
                arrays[spec.name] = rng.integers(0, dim_value(self.ranges[spec.name], case), shape).astype(dtype)
            else:
                arrays[spec.name] = rng.standard_normal(shape).astype(np.float32).astype(dtype)
        return arrays


def _letters(signature: Signature) -> set[str]:
    return {s.dtype for s in (*signature.outs, *signature.ins) if s.dtype not in DTYPES}
