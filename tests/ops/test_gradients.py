"""Every op that has a gradient: what it emits, executed by the references in float64, against finite differences.

The function whose gradient is measured is a random linear one of the op's outputs, sum(outputs * weights): its weights
are the gradients of the outputs. Nothing of the package's own differentiation is used here; the op speaks to ``Tape``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cuplama.dtypes import DTYPES
from cuplama.lab.check import model_dtypes
from cuplama.lab.workloads import case_workload
from cuplama.ops import OPS
from cuplama.ops.abstract import abstract, infer
from cuplama.ops.node import Node
from cuplama.ops.op import Op
from cuplama.ops.signature import OpError

from .harness import Case, name_of

Array = np.ndarray[Any, Any]
Values = dict[str, Any]

TABLES = {"cos", "sin"}
CONSTANT = {  # no functions of what is trained
    "rope": TABLES, "rope_pairs": TABLES, "cross_entropy": {"weights", "mixture"},
}  # fmt: skip
ENDS = {"cross_entropy": "loss"}  # ops that end the chain: the function is the sum of that output
CASES = 4  # of each op, the smallest: among them one without each input that may be absent
STEP = 1e-5  # of the differences: their own error is of the order of its square
TOLERANCE = 3e-8  # of a difference quotient, relative to the norms of gradient and direction
DIRECTIONS, ELEMENTS = 3, 9  # of each input: random directions, and single elements at random


@dataclass
class Tape:
    """What an op's ``gradient`` is told, and what it says. Values have the names of the signature.

    before: inputs that have a gradient already, "before.x".
    """

    op: str
    node: Node
    letters: Mapping[str, str]  # dtypes of the node's arrays, by name: "T", "f32", ...
    before: frozenset[str] = frozenset()
    wanted: frozenset[str] | None = None  # None: every gradient is
    nodes: list[Node] = field(default_factory=list)
    given: dict[str, str] = field(default_factory=dict)
    sums: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)  # by ``so_far``
    choices: set[str] = field(default_factory=set)  # asked by ``wants``
    in_model_dtype: set[str] = field(default_factory=set)  # gradients of float32 values
    outputs: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> str:
        names = {s.name for s in (*OPS[self.op].signature.ins, *OPS[self.op].signature.outs)}
        assert name in names, f"{self.op} has no {name}"
        return name if name in (*self.node.ins, *self.node.outs) else ""

    def has(self, name: str) -> bool:
        return name in self.node.ins

    def attr(self, name: str) -> Any:
        return {**OPS[self.op].signature.defaults, **self.node.attrs}[name]

    def of(self, out: str) -> str:
        assert out in self.node.outs
        self.outputs.add(out)
        return f"grad.{out}"

    def rounded(self, out: str) -> str:
        return f"rounded.{self.of(out)}" if self.letters[out] != "T" else self.of(out)

    def wants(self, name: str) -> bool:
        assert self.has(name)
        self.choices.add(name)
        return self.wanted is None or name in self.wanted

    def so_far(self, name: str) -> str:
        self.asked.add(name)
        return f"before.{name}" if name in self.before else ""

    def into(self, name: str) -> str:
        self.sums.add(name)
        return f"sum.{name}"

    def fresh(self, name: str) -> str:
        return f"new.{len(self.nodes)}.{name}"

    def emit(self, op: str, *ins: str, **attrs: Any) -> str:
        (out,) = OPS[op].signature.outs
        assert out.name not in OPS[op].signature.in_place
        self.nodes.append(Node(op, (self.fresh("out"),), ins, attrs))
        return self.nodes[-1].outs[0]

    def update(self, op: str, outs: tuple[str, ...], ins: tuple[str, ...], **attrs: Any) -> None:
        self.nodes.append(Node(op, outs, ins, attrs))

    def give(self, name: str, gradient: str, in_T: bool = False) -> None:
        assert name not in self.given
        self.in_model_dtype |= {name} if in_T else set()
        self.given[name] = gradient


class Differentiated:
    """An op at a case: its inputs in float64, and the tape of its gradient."""

    def __init__(self, op: Op, case: Case, before: bool = False) -> None:
        self.op, self.case = op, case
        found = case_workload(op, case, "f32", seed=3)
        self.attrs = {k: v for k, v in found.attrs.items() if k in {s.name for s in op.signature.attrs}}
        self.free = {k: v for k, v in found.attrs.items() if k not in self.attrs}
        arrays = dict(zip((s.name for s in op.signature.ins), found.arrays(seed=3), strict=True))
        self.ins = {k: x.astype(np.float64) if is_float(x) else x for k, x in arrays.items() if x is not None}
        self.rng = np.random.default_rng(len(case))
        self.outs = self.forward(self.ins)
        self.tape = self.recorded("f32", before)

    def forward(self, ins: Values) -> Values:
        """The outputs by name, of inputs that are left as they are."""
        order = (ins.get(s.name) for s in self.op.signature.ins)
        out = self.op.reference(*(None if x is None else x.copy() for x in order), **self.attrs, **self.free)
        outs = out if isinstance(out, tuple) else (out,)
        return dict(zip((s.name for s in self.op.signature.outs), outs, strict=True))

    def recorded(self, T: str, before: bool = False, wanted: frozenset[str] | None = None) -> Tape:
        """What the op's gradient emits for a model of that dtype."""
        signature = self.op.signature
        letters = {s.name: self.case.get(s.dtype) or s.letter for s in (*signature.ins, *signature.outs)}
        ins = tuple(s.name if s.name in self.ins else "" for s in signature.ins)
        attrs = self.attrs | {letter: self.case.get(letter, dtype) for letter, dtype in self.free.items()}
        node = Node(self.op.name, tuple(s.name for s in signature.outs), ins, attrs)
        floats = frozenset(k for k, x in self.ins.items() if is_float(x)) if before else frozenset()
        tape = Tape(self.op.name, node, letters, floats, wanted)
        assert self.op.gradient is not None
        self.op.gradient(tape)
        return tape

    def normal(self, shape: tuple[int, ...]) -> Array:
        return self.rng.standard_normal(shape)

    def values(self) -> Values:
        """All that the nodes of the tape may ask for, in float64, random where it is not known."""
        found: Values = {"": None, **self.ins, **self.outs}
        for name, x in self.outs.items():
            end = ENDS.get(self.op.name) == name
            found[f"grad.{name}"] = found[f"rounded.grad.{name}"] = np.ones(x.shape) if end else self.normal(x.shape)
        for name, x in self.ins.items():
            found[f"before.{name}"] = self.normal(x.shape)
            into = f"sum.{name}"
            # The whole is put together from slices: there only the sum of all of them has a meaning.
            found[into] = np.zeros(x.shape) if self.tape.given.get(name) == into else self.normal(x.shape)
            if x.dtype.kind == "i" and x.ndim == 1:
                found[f"{name}.order"] = np.argsort(x, kind="stable").astype(np.int32)
        return found


def is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind not in "iu"


def run(nodes: list[Node], values: Values) -> Values:
    """The values, with those that the nodes make; arrays that are changed in place are copied before."""
    values = dict(values)
    for node in nodes:
        ins = [None if values[name] is None else values[name].copy() for name in node.ins]
        out = OPS[node.op].reference(*ins, **node.attrs)
        for name, array in zip(node.outs, out if isinstance(out, tuple) else (out,), strict=True):
            values[name] = array
    return values


def smallest(op: Op) -> list[Case]:
    """The cases to differentiate: those with the fewest elements, of each choice of what is there."""

    def elements(case: Case) -> int:
        return sum(math.prod(x.shape) for x in case_workload(op, case, "f32").ins if x is not None)

    order = sorted((case for case in op.cases if not case.get("W") and not case.get("sinks")), key=elements)
    kinds = [tuple((k, v) for k, v in sorted(case.items()) if isinstance(v, bool)) for case in order]
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    others = [i for i in range(len(order)) if i not in first][: max(0, CASES - len(first))]
    return [order[i] for i in (*first, *others) if is_finite(op, order[i])]


def is_finite(op: Op, case: Case) -> bool:
    """Whether the outputs are: some cases are there to show that what is not a number stays none."""
    return all(np.isfinite(x).all() for x in Differentiated(op, case).outs.values())


def all_cases() -> Iterator[tuple[Op, Case]]:
    for op in OPS.values():
        if op.gradient is not None:
            yield from ((op, case) for case in smallest(op))


def test_sinks_are_refused_where_they_are_trained() -> None:
    ins = ("x", "cu_seqlens", "sinks")
    attrs = dict(num_heads=2, H=1, D=8, window=0, scale=1.0)
    node = Node("self_attention", ("y", "lse"), ins, attrs)
    frozen, trained = (Tape(node.op, node, {}, wanted=frozenset(names)) for names in (("x",), ("x", "sinks")))
    gradient = OPS[node.op].gradient
    assert gradient is not None
    gradient(frozen)
    assert frozen.given.keys() == {"x"}
    with pytest.raises(OpError, match=r"^self_attention: sinks have no gradient"):
        gradient(trained)


ALL = list(all_cases())
IDS = [name_of(op, case, "").replace("--", "-") for op, case in ALL]


@pytest.mark.parametrize(("op", "case"), ALL, ids=IDS)
def test_gradient_against_finite_differences(op: Op, case: Case) -> None:
    compare(Differentiated(op, case))


@pytest.mark.parametrize(("op", "case"), ALL, ids=IDS)
def test_gradient_is_added_to_what_is_there(op: Op, case: Case) -> None:
    """Ops that ask what gradient an input has already add their own to it."""
    it = Differentiated(op, case, before=True)
    assert it.tape.asked <= it.tape.given.keys()
    if it.tape.asked:
        compare(it)


def compare(it: Differentiated) -> None:
    start = it.values()
    found = run(it.tape.nodes, start)
    measured = {name for name, x in it.ins.items() if is_float(x)} - CONSTANT.get(it.op.name, set())
    assert measured == it.tape.given.keys() | it.tape.sums, "the inputs that have a gradient"
    for name in sorted(measured):
        gradient = gradient_of(it.tape, name, start, found)
        assert gradient.shape == it.ins[name].shape
        assert gradient.dtype == np.float64
        for direction in directions(it.rng, it.ins[name].shape):
            error = abs(float((gradient * direction).sum()) - quotient(it, name, direction, start))
            scale = float(np.linalg.norm(gradient) * np.linalg.norm(direction)) + 1
            assert error <= TOLERANCE * scale, f"{it.op.name}: the gradient of {name} is off by {error / scale:.1e}"


def gradient_of(tape: Tape, name: str, start: Values, found: Values) -> Array:
    """What the tape says the gradient of an input is, less what was there before."""
    if name not in tape.given:
        grown: Array = found[f"sum.{name}"] - start[f"sum.{name}"]
        return grown
    gradient: Array = found[tape.given[name]]
    return gradient - start[f"before.{name}"] if name in tape.asked & tape.before else gradient


def directions(rng: np.random.Generator, shape: tuple[int, ...]) -> Iterator[Array]:
    for _ in range(DIRECTIONS):
        yield rng.standard_normal(shape)
    size = math.prod(shape)
    for element in rng.permutation(size)[:ELEMENTS]:
        one = np.zeros(size)
        one[element] = 1
        yield one.reshape(shape)


def quotient(it: Differentiated, name: str, direction: Array, start: Values) -> float:
    """How fast the linear function of the outputs grows in a direction: by a central difference of fourth order."""
    outputs = {ENDS[it.op.name]} if it.op.name in ENDS else it.tape.outputs
    weights = {out: start[f"grad.{out}"] for out in outputs}
    scale = STEP / max(1.0, float(np.abs(direction).max()))

    def at(step: float) -> float:
        outs = it.forward({**it.ins, name: it.ins[name] + step * scale * direction})
        return float(sum((outs[out] * w).sum() for out, w in weights.items()))

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * scale)


@pytest.mark.parametrize(("op", "case"), ALL, ids=IDS)
def test_nodes_of_a_gradient_fit_their_ops(op: Op, case: Case) -> None:
    """In each dtype: the shapes and dtypes of what is emitted, and that a gradient is what its value is."""
    it = Differentiated(op, case)
    for T in model_dtypes(op):
        for before in (False, True):
            tape = it.recorded(T, before)
            values = described(it, T)
            for _ in infer(tape.nodes, values, DTYPES[T]):
                pass
            for name, gradient in tape.given.items():
                value = described(it, T)[name]
                dtype = DTYPES[T] if name in tape.in_model_dtype else value.dtype
                assert (values[gradient].shape, values[gradient].dtype) == (value.shape, dtype), name


def described(it: Differentiated, T: str) -> Values:
    """The values of the tape in a model of that dtype, without arrays; sums are float32."""

    def dtype(name: str) -> Any:
        letter = it.tape.letters[name]
        return DTYPES[T if letter == "T" else letter]

    found: Values = {}
    for name, x in (*it.ins.items(), *it.outs.items()):
        found[name] = abstract(x.shape, dtype(name))
    for name in it.outs:
        found[f"grad.{name}"] = found[name]
        found[f"rounded.grad.{name}"] = abstract(found[name].shape, DTYPES[T])
    for name in it.ins:
        found[f"before.{name}"] = found[name]
        # Of a weight; the whole that slices are put together in is in the dtype of its value.
        own = it.tape.given.get(name) == f"sum.{name}"
        found[f"sum.{name}"] = found[name] if own else abstract(found[name].shape, DTYPES["f32"])
        found[f"{name}.order"] = found[name]
    return found


@pytest.mark.parametrize(("op", "case"), ALL, ids=IDS)
def test_what_is_not_wanted_is_not_computed(op: Op, case: Case) -> None:
    """Ops that ask whether a gradient is wanted leave it out where it is not, and the others stay as they were."""
    it = Differentiated(op, case)
    start = it.values()
    whole = run(it.tape.nodes, start)
    for left_out in sorted(it.tape.choices):
        tape = it.recorded("f32", wanted=frozenset(it.ins) - {left_out})
        others = tape.given.keys() | tape.sums
        assert others == (it.tape.given.keys() | it.tape.sums) - {left_out}
        found = run(tape.nodes, start)
        for name in others:
            np.testing.assert_array_equal(
                gradient_of(tape, name, start, found), gradient_of(it.tape, name, start, whole)
            )
