"""Fusion: rules that replace adjacent nodes of a node list by one fused node, which one kernel can compute.

A fused node keeps the nodes that it stands for (``Node.parts``): they define its result, and a backend without a kernel
for the fused op runs them instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..dtypes import DTYPES
from ..ops import OPS
from ..ops.node import Node

__all__ = [
    "ADDED_NORM_RULES",
    "BATCH_RULES",
    "EIGHT_BIT_BATCH_RULES",
    "EIGHT_BIT_RULES",
    "FEW_ROWS_RULES",
    "PREFILL_RULES",
    "Rule",
    "fuse",
]


@dataclass(frozen=True)
class Rule:
    """Adjacent nodes whose ops are ``parts``, in this order, become one node of the op ``fused``.

    An input of the fused op takes the value of the first part's input of the same name. Where the names differ, or
    another part is meant, ``sources`` says so: name of the fused op's input -> (op of the part, name of its input). An
    input that no part has is left out. The fused op's outputs are those of the last part, then the arrays that others
    update in place, then ``kept``: outputs of others that later nodes need, as (op of the part, name of the output).
    """

    parts: tuple[str, ...]
    fused: str
    sources: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    kept: tuple[tuple[str, str], ...] = ()


def _norm_linear(norm: str, act: str | None) -> Rule:
    return Rule(
        (norm, "linear", *([act] if act else [])),
        f"{norm}_linear_{act}" if act else f"{norm}_linear",
        {"g": (norm, "w"), "h": (norm, "b"), "w": ("linear", "w"), "b": ("linear", "b")},
    )


def _added(product: Rule) -> Rule:
    """A norm behind a sublayer is computed by the product that reads the residual stream next, through a norm or cast.
    Later nodes read the residual stream, too."""
    first = {"x": "x", "post": "w", "a": "a", "scalar": "scalar"}
    return Rule(
        ("rms_norm_add", *product.parts),
        product.fused,
        {**{name: ("rms_norm_add", of) for name, of in first.items()}, **product.sources},
        kept=(("rms_norm_add", "y"),),
    )


# For any number of rows: our kernels and cuBLAS alike add the residual to a product before they write it, and so does
# the sum over experts, if it has not something else to add.
_SUMS: tuple[Rule, ...] = (
    Rule(("linear", "add"), "linear_add"),
    Rule(("combine_pairs", "add"), "combine_pairs", {"a": ("add", "a")}),
)

# A norm behind a sublayer and the one ahead of the next read the same rows.
PREFILL_RULES: tuple[Rule, ...] = (
    *_SUMS,
    Rule(
        ("rms_norm_add", "rms_norm"),
        "rms_norm_add_norm",
        {"post": ("rms_norm_add", "w"), "g": ("rms_norm", "w"), "x": ("rms_norm_add", "x")},
        kept=(("rms_norm_add", "y"),),
    ),
)

# For many rows where activations are rounded to 8 bits: what comes before a product writes them so.
_EIGHT_BIT: tuple[Rule, ...] = (
    _norm_linear("rms_norm", None),
    Rule(("silu_mul", "linear", "add"), "silu_mul_linear_add"),
    Rule(("gelu_tanh_mul", "linear", "add"), "gelu_tanh_mul_linear_add"),
)
EIGHT_BIT_RULES: tuple[Rule, ...] = (*_EIGHT_BIT, *_SUMS)

_ATTENTION: tuple[Rule, ...] = (
    Rule(("qk_norm", "rope", "kv_append", "attention"), "append_attention"),
    Rule(("rope", "kv_append", "attention"), "append_attention"),
    Rule(("kv_append", "attention"), "append_attention"),
)

# For a decode step, where every sequence has one new token.
BATCH_RULES: tuple[Rule, ...] = (*PREFILL_RULES, *_ATTENTION)

# The same for more rows than packed weights are multiplied with as they are, where activations are rounded to 8 bits.
EIGHT_BIT_BATCH_RULES: tuple[Rule, ...] = (*_EIGHT_BIT, *_SUMS, *_ATTENTION)

# For few rows: a norm behind a sublayer, ahead of the MLP, of the next layer's attention, and of the head.
ADDED_NORM_RULES: tuple[Rule, ...] = (
    *(
        _added(replace(rule, fused=rule.fused.replace("rms_norm", "rms_norm_add_norm")))
        for rule in (_norm_linear("rms_norm", act) for act in ("silu_mul", "gelu_tanh_mul", None))
    ),
    _added(Rule(("cast", "linear"), "rms_norm_add_linear", {"w": ("linear", "w"), "b": ("linear", "b")})),
)

# For a decode step of at most ``MAX_STREAMED_ROWS`` rows, whose products our own kernels compute. The first rule that
# fits is taken, so longer patterns stand before shorter ones.
FEW_ROWS_RULES: tuple[Rule, ...] = (
    Rule(("route", "sort_pairs"), "route_pairs", kept=(("route", "experts"), ("route", "weights"))),
    Rule(
        ("expert_linear", "combine_pairs", "add"),
        "expert_linear_combine",
        {"b": ("expert_linear", "b"), "a": ("add", "a")},
    ),
    Rule(("expert_linear", "combine_pairs"), "expert_linear_combine"),
    *ADDED_NORM_RULES,
    _norm_linear("rms_norm", "silu_mul"),
    _norm_linear("rms_norm", "gelu_tanh_mul"),
    _norm_linear("layer_norm", "gelu_tanh"),
    _norm_linear("layer_norm", "gelu_erf"),
    _norm_linear("rms_norm", None),
    _norm_linear("layer_norm", None),
    *BATCH_RULES,
)


def fuse(nodes: Sequence[Node], rules: Sequence[Rule]) -> list[Node]:
    """The list with every run of nodes that a rule describes replaced by one node; the first rule that fits wins."""
    out: list[Node] = []
    at = 0
    while at < len(nodes):
        for rule in rules:
            parts = tuple(nodes[at : at + len(rule.parts)])
            fits = tuple(p.op for p in parts) == rule.parts and _closed(rule, parts, nodes[at + len(parts) :])
            if fits and _complete(fused := _fused(rule, parts)) and _agreed(fused):
                out.append(fused)
                at += len(parts)
                break
        else:
            out.append(nodes[at])
            at += 1
    return out


def _inner(parts: Sequence[Node]) -> set[str]:
    """The values that all parts but the last make, unless they are arrays updated in place."""
    return {name for p in parts[:-1] for name in p.outs if name not in p.ins}


def _kept(rule: Rule, parts: Sequence[Node]) -> list[str]:
    """The values of those that the fused node makes all the same."""
    outs = {(p.op, s.name): name for p in parts for s, name in zip(OPS[p.op].signature.outs, p.outs, strict=True)}
    return [outs[which] for which in rule.kept]


def _closed(rule: Rule, parts: Sequence[Node], rest: Sequence[Node]) -> bool:
    """Whether each part feeds the next, and nothing later needs a value that fusion would hide."""
    chained = all(set(a.outs) & set(b.ins) for a, b in itertools.pairwise(parts))
    hidden = _inner(parts).difference(_kept(rule, parts))
    return chained and not any(hidden & set(node.ins) for node in rest)


def _complete(fused: Node) -> bool:
    """Whether a fused node has all that its op needs, and its op all that the parts are given.

    So a norm without a bias is not fused into an op that needs one, and a part with an optional input or attribute that
    the fused op does not have stays as it is.
    """
    signature = OPS[fused.op].signature
    given = dict(itertools.zip_longest((s.name for s in signature.ins), fused.ins, fillvalue=""))
    read = {name for p in fused.parts for name in p.ins} - _inner(fused.parts) - {""}
    optional = {name for p in fused.parts for name in p.attrs.keys() & OPS[p.op].signature.defaults.keys()}
    known = {s.name for s in signature.attrs}
    return all(given[s.name] or s.optional for s in signature.ins) and read <= set(fused.ins) and optional <= known


def _agreed(fused: Node) -> bool:
    """Whether the parts that have an attribute of a fused node give it one value, such as the eps of two norms."""
    for spec in OPS[fused.op].signature.attrs:
        given = (p.attrs.get(spec.name, OPS[p.op].signature.defaults.get(spec.name)) for p in fused.parts)
        if len({value for value in given if value is not None}) > 1:
            return False
    return True


def _inputs(rule: Rule, parts: Sequence[Node]) -> tuple[str, ...]:
    """The values of the fused op's inputs, in its order; the empty name for one that is left out."""
    inner = _inner(parts)
    by_part = [(p.op, {s.name: v for s, v in zip(OPS[p.op].signature.ins, p.ins, strict=False)}) for p in parts]
    found = []
    for spec in OPS[rule.fused].signature.ins:
        part, name = rule.sources.get(spec.name, ("", spec.name))
        values = (given.get(name, "") for op, given in by_part if part in ("", op))
        found.append(next((v for v in values if v and v not in inner), ""))
    while not found[-1]:
        found.pop()
    return tuple(found)


def _fused(rule: Rule, parts: tuple[Node, ...]) -> Node:
    in_place = tuple(name for p in parts[:-1] for name in p.outs if name in p.ins)
    signature = OPS[rule.fused].signature
    known = {s.name for s in signature.attrs} | {s.dtype for s in signature.outs} - DTYPES.keys()
    # An eps that no part gives is not used.
    attrs = {s.name: 0.0 for s in signature.attrs if s.dtype == "f32" and s.default is None}
    attrs |= {k: v for p in parts for k, v in p.attrs.items() if k in known}
    outs = (*parts[-1].outs, *in_place, *_kept(rule, parts))
    return Node(rule.fused, outs, _inputs(rule, parts), attrs, parts)
