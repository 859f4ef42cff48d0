"""Ops: what a graph node computes, declared once and executed by every backend.

An op's signature is one line::

    y[n,d]:T = (x[n,d]:f32, w[d]:T, eps:f32)

``name[dims]:dtype`` is an array, ``name:dtype`` a scalar attribute, ``?`` marks an input that may be absent, ``=0`` is
the value of an attribute that is left out, and a name on both sides is updated in place. Dims are names, or sums and
products of names and numbers (``b+1``, ``num_heads*D``).
Dtypes are ``f32 i32 u64 ...`` or a letter that the call decides: ``T`` is the model's dtype; a letter that no input
fixes is an attribute of the node (``U`` of ``linear``). ``W`` is the format of a weight: plain, which holds ``T``, or
packed, see ``weights.py``. ``C`` is what the cache of keys and values holds: ``T``, or ``e4m3``.

From the signature follow the checks before every launch, the casts of scalars, the random test cases, the bytes moved,
the test that the kernel's parameter list agrees, and what the op takes and says of itself as a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Array, narrow
from .calling import MODEL_DTYPES, Parameters, checked_attributes, executor, kind_of
from .gradient import Gradient
from .launch import Device, Launch, Plan
from .matmul import Matmul
from .signature import OpError, Signature, Spec, dim_names, dim_value
from .weights import segments_of, stored_bytes

__all__ = ["EXACT", "ROUNDING", "Call", "Draw", "Op", "case_dtype"]

ROUNDING: Mapping[str, float] = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8, "e4m3": 2.0**-4}
"""The most that rounding to a dtype can cost, relative to the number: half a unit in the last place."""


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
        if name not in self.env:
            raise OpError(f"{self.op.name} has no size or attribute {name!r}; it has {', '.join(self.env)}")
        return self.env[name]

    def dtype(self, spec: Spec) -> np.dtype[Any]:
        """The dtype of an array of the signature, its letter filled in."""
        return DTYPES.get(spec.dtype) or self.dtypes[spec.letter]

    def shape(self, spec: Spec) -> tuple[int, ...]:
        """The shape of an array of the signature, its sizes filled in."""
        return tuple(dim_value(d, self.env) for d in spec.dims or ())

    def nbytes(self) -> int:
        """Bytes a perfect kernel moves: inputs read once, outputs written once, unless the op says otherwise."""
        if self.op.bytes is not None:
            return int(self.op.bytes(self))
        total = 0
        for spec in (*self.op.signature.ins, *self.op.signature.outs):
            if spec in self.op.signature.ins and self.arrays.get(spec.name) is None:
                continue
            packed = spec.dtype == "W" and segments_of(array := self.arrays[spec.name]) is not None
            total += stored_bytes(array) if packed else math.prod(self.shape(spec)) * self.dtype(spec).itemsize
        return total

    def flops(self) -> int:
        """Floating-point operations, two for a multiply-add; 0 where the op does not count them."""
        return int(self.op.flops(self)) if self.op.flops is not None else 0


Draw = Callable[[int, int], int]
"""A random whole number from the first to the last, both included."""

EXACT: Mapping[str, float] = {"f32": 0.0, "f16": 0.0, "bf16": 0.0, "e4m3": 0.0}
"""The tolerance of an op that only moves numbers."""
_TOLERANCE: Mapping[str, float] = {"f32": 4.0, "f16": 1.0, "bf16": 1.0, "e4m3": 1.0}


@dataclass(frozen=True, eq=False)
class Op:
    """One op, and all that is known of it: no table elsewhere names ops. It is a function, too: see ``__call__``.

    reference:   ``f(*inputs, **attributes)`` on NumPy arrays; computes in float32, or in float64 when given float64.
    kernels:     ``f(call, device) -> Plan``: the launches, or None while the op has no kernel of its own.
    kernel_docs: what each kernel computes, by its name, in a sentence; not needed where one kernel is the whole op.
    cases:       dims and attributes of the tests; small, odd and edge shapes.
    compiled:    ``f(case)``: whether `cuplama kernels compile` compiles what a case launches, with what models launch;
                 None: of every case. Tests run all cases.
    sizes:       ``f(draw) -> case``: a random case, where ``draw(low, high)`` is a random whole number.
    ranges:      for integer inputs, the dim expression that bounds the values.
    inputs:      ``f(rng, case, T) -> dict`` for inputs that must be consistent with each other (page tables, ...).
    shape:       dims and attributes to time where no well-known model has the op; what is left out is as in the first
                 case.
    rules:       what sizes must fulfil besides the signature, as expressions over them.
    together:    optional inputs of which all are given or none.
    complete:    ``f(sizes) -> case`` where people give other sizes than a case has; then ``shape`` holds all of theirs.
    tolerance:   by the dtype of a float output, how far a right result may be from the reference, as a norm relative to
                 the reference's; the unit is the most that one rounding to that dtype can cost (``ROUNDING``: half a
                 unit in the last place). Dtypes left out have 1; f32, whose results come from more than one operation,
                 has 4. "bf16:f32" is for float32 outputs of a model in bf16 alone.
    bytes, flops: ``f(call)``: what the call moves and computes; by default every array once, and nothing.
    matmul:      the product of matrices that the op is or ends in, if a library may compute it.
    inner:       of such a product behind another op: ``f(call) -> launch``, which writes the x[n,k] of the product, in
                 T, to the scratch "inner".
    gradient:    ``f(gradient)``: emits the nodes that compute the gradients of the inputs, see gradient.py.
    recompute:   from which policy of training on a result is computed again in the backward pass and not kept till
                 then: "cheap", for what costs little, or "layers"; "" for results that are always kept.
    library:     ``f(y, *inputs)``: a call of CuPy that computes the op into ``y``, to compare times with.
    unaligned:   whether arrays may begin anywhere; else at multiples of 16 bytes, where allocators begin them.
    admitted_spills: "kernel@arch" -> (bytes of registers that an instance may spill at most, why).
    """

    name: str
    text: str
    doc: str
    reference: Callable[..., Any]
    kernels: Callable[[Call, Device], Plan] | None = None
    kernel_docs: Mapping[str, str] = field(default_factory=dict)
    cases: Sequence[Mapping[str, Any]] = ()
    compiled: Callable[[Mapping[str, Any]], bool] | None = None
    sizes: Callable[[Draw], Mapping[str, Any]] | None = None
    ranges: Mapping[str, str] = field(default_factory=dict)
    inputs: Callable[[np.random.Generator, Mapping[str, Any], np.dtype[Any]], dict[str, Any]] | None = None
    shape: Mapping[str, Any] = field(default_factory=dict)
    rules: Sequence[str] = ()
    together: Sequence[Sequence[str]] = ()
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    tolerance: Mapping[str, float] = field(default_factory=dict)
    bytes: Callable[[Call], float] | None = None
    flops: Callable[[Call], float] | None = None
    matmul: Matmul | None = None
    inner: Callable[[Call], Launch] | None = None
    gradient: Callable[[Gradient], None] | None = None
    recompute: str = ""
    library: Callable[..., object] | None = None
    unaligned: bool = True
    admitted_spills: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """What help(), inspect, cupyx.profiler and others ask of a function. Raises ValueError for the text."""
        own = {
            "__name__": self.name,
            "__qualname__": self.name,
            "__signature__": self.parameters.inspected,
            "__doc__": self.parameters.documentation(self.doc),
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"<op {self.parameters.text}>"

    @cached_property
    def signature(self) -> Signature:
        """The signature's text, read."""
        return Signature.parse(self.text)

    @cached_property
    def parameters(self) -> Parameters:
        """What a call takes."""
        return Parameters(self.name, self.signature)

    def __call__(self, *arrays: Array | None, **named: Any) -> Any:
        """Compute the op: on CuPy arrays by its kernels, on NumPy arrays by its reference.

        arrays: the inputs in the signature's order; inputs may also be named. named: attributes, and the dtype letters
        that no input decides, which are "T" by default. Returns the output, or a tuple of them; an output that is
        updated in place is the array that was given. Kernels are launched on CuPy's current stream and device, and
        memory comes from CuPy's current allocator. Raises OpError for arguments that do not fit, DeviceError for a
        launch that fails, CompileError.
        """
        ins, attrs = self.parameters.take(arrays, named)
        run = executor(self.name, self.signature, ins)
        return self._on_numpy(ins, attrs) if run is None else run(self, ins, attrs)

    def _on_numpy(self, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> Any:
        for spec, array in zip(self.signature.ins, ins, strict=True):
            if array is not None and not isinstance(array, np.ndarray):
                raise OpError(f"{self.name}: {spec.name} is {kind_of(array)}; arrays of both kinds do not mix")
        call = self.called(ins, attrs)
        attrs = {k: v for k, v in call.env.items() if k in attrs} | {k: attrs[k] for k in self.parameters.free}
        given = self.reference(*ins, **attrs)
        outs = []
        for spec, out in zip(self.signature.outs, given if isinstance(given, tuple) else (given,), strict=True):
            if spec.name in self.signature.in_place:
                target = call.arrays[spec.name]
                assert target is not None
                if out is not target:
                    target[...] = out
                outs.append(target)
            else:
                outs.append(out.astype(call.dtype(spec), copy=False))
        return tuple(outs) if len(outs) > 1 else outs[0]

    def called(self, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> Call:
        """``bind`` for what a user gives: attributes and dtypes are looked at as well, and what sizes must fulfil.

        Raises OpError, which says what the op takes.
        """
        try:
            call = self.bind(ins, checked_attributes(self.name, self.signature, attrs))
            for spec, array in zip(self.signature.ins, ins, strict=True):
                if array is not None and not array.size:
                    raise OpError(f"{self.name}: {spec.name} has no elements: its shape is {tuple(array.shape)}")
            T = call.dtypes.get("T")
            if T is not None and T not in map(DTYPES.get, MODEL_DTYPES):
                raise OpError(f"{self.name}: T is {T}; it may be {', '.join(MODEL_DTYPES)}")
            for letter in self.parameters.free:
                choices = [T if dtype == "T" else DTYPES[dtype] for dtype in self.parameters.choices]
                if call.dtypes[letter] not in choices:
                    shown = " or ".join(f"T, which is {T}," if d == "T" else d for d in self.parameters.choices)
                    raise OpError(f"{self.name}: {letter} is {call.dtypes[letter]}; it may be {shown}")
            if (C := call.dtypes.get("C")) not in (None, T, DTYPES["e4m3"]):
                raise OpError(f"{self.name}: the cache is {C}; it may be {T}, as T is, or {DTYPES['e4m3']}")
            for group in self.together:
                if len({call.arrays[name] is None for name in group}) > 1:
                    raise OpError(f"{self.name}: {', '.join(group)} go together: all of them, or none")
            for rule in self.rules:
                if call.env.keys() >= set(dim_names(rule)) and not dim_value(rule, call.env):
                    shown = ", ".join(f"{name}={call.env[name]}" for name in dim_names(rule))
                    raise OpError(f"{self.name} needs {rule}, not {shown}")
        except OpError as e:
            raise OpError(f"{e}; the op is {self.text}") from None
        return call

    def allowed(self, dtype: str, T: str) -> float:
        """The largest relative error of a right output of that dtype in a model of dtype T, as a norm."""
        units = self.tolerance.get(f"{T}:{dtype}", self.tolerance.get(dtype, _TOLERANCE[dtype]))
        return units * ROUNDING[dtype]

    def kernel_doc(self, kernel: str) -> str:
        """What one of the op's kernels computes: its own sentence, or the first of the op's."""
        first, more, _ = self.doc.partition(". ")
        return self.kernel_docs.get(kernel) or first + "." * bool(more)

    def random_cases(self, count: int) -> list[Mapping[str, Any]]:
        """Cases of random sizes, the same in every run. Raises OpError if the op does not say how to draw them."""
        if self.sizes is None:
            raise OpError(f"op {self.name}: no random sizes")
        rng = np.random.default_rng(sum(self.name.encode()))
        return [self.sizes(lambda low, high: int(rng.integers(low, high + 1))) for _ in range(count)]

    def bind(self, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> Call:
        """Check the inputs against the signature and solve for the dims.

        Raises OpError naming the op, the array and what was expected.
        """
        call = Call(self, {}, {}, {})
        for spec in self.signature.attrs:
            call.env[spec.name] = attrs.get(spec.name, spec.default)
            if call.env[spec.name] is None:
                raise OpError(f"{self.name}: attribute {spec.name} is missing")
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
        packed = spec.dtype == "W" and segments_of(array) is not None
        where = f"{self.name}: {spec.name}[{','.join(spec.dims)}]"
        if not packed:
            dtype = np.dtype(array.dtype)
            wanted = DTYPES.get(spec.dtype) or call.dtypes.setdefault(spec.letter, dtype)
            if dtype != wanted:
                raise OpError(f"{where} is {dtype}, not {wanted}")
        if len(array.shape) != len(spec.dims):
            raise OpError(f"{where} has shape {tuple(array.shape)}")
        if not packed and not array.flags.c_contiguous:
            raise OpError(f"{where} is not contiguous")

    def random_inputs(
        self, rng: np.random.Generator, case: Mapping[str, Any], T: np.dtype[Any]
    ) -> dict[str, np.ndarray[Any, Any] | None]:
        """Inputs for one case: normal floats in the signature's dtypes, integers within ``ranges``."""
        given = self.inputs(rng, case, T) if self.inputs is not None else {}
        arrays: dict[str, np.ndarray[Any, Any] | None] = {}
        for spec in self.signature.ins:
            if spec.name in given and not _left_out(spec, case):
                arrays[spec.name] = given[spec.name]
                continue
            if (found := self.input_shape(spec, case, T)) is None:
                arrays[spec.name] = None
                continue
            shape, dtype = found
            if dtype.kind in "iu":
                arrays[spec.name] = rng.integers(0, dim_value(self.ranges[spec.name], case), shape).astype(dtype)
            else:
                arrays[spec.name] = narrow(rng.standard_normal(shape).astype(np.float32), dtype)
        return arrays

    def input_shape(
        self, spec: Spec, case: Mapping[str, Any], T: np.dtype[Any]
    ) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
        """Shape and dtype of an input in a case, which names every size; None if the case leaves the input out."""
        assert spec.dims is not None
        if _left_out(spec, case):
            return None
        return tuple(dim_value(d, case) for d in spec.dims), DTYPES.get(spec.dtype) or case_dtype(spec.letter, case, T)


def _left_out(spec: Spec, case: Mapping[str, Any]) -> bool:
    return spec.optional and not case.get(spec.name, True)


def case_dtype(letter: str, case: Mapping[str, Any], T: np.dtype[Any]) -> np.dtype[Any]:
    """What a letter of the signature stands for in a case: the dtype that the case names, or else ``T``."""
    return DTYPES.get(case.get(letter, "T"), T)


def _letters(signature: Signature) -> set[str]:
    return {s.letter for s in (*signature.outs, *signature.ins) if s.dtype not in DTYPES}
