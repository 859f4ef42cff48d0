"""Fusion: rewrite rules on the node list. A fused node keeps its parts, which are its meaning and its fallback."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..dtypes import DTYPES
from ..ops import OPS
from ..ops.node import Node

__all__ = ["BATCH_RULES", "PREFILL_RULES", "RULES", "Rule", "fuse"]


@dataclass(frozen=True)
class Rule:
    """Adjacent nodes with these ops become one ``fused`` node.

    ins: where the fused node's inputs come from: (part, number of its input). An input that a part does not have is
    left out at the end, and is the empty name before that.
    """

    parts: tuple[str, ...]
    fused: str
    ins: tuple[tuple[int, int], ...]


def _norm_linear(norm: str, act: str | None) -> Rule:
    scales = 2 if norm == "layer_norm" else 1
    return Rule(
        (norm, "linear", *([act] if act else [])),
        f"{norm}_linear_{act}" if act else f"{norm}_linear",
        (*((0, i) for i in range(1 + scales)), (1, 1), (1, 2)),
    )


def _append_attention(qk_norm: bool, rope: bool) -> Rule:
    parts = (*(["qk_norm"] if qk_norm else []), *(["rope"] if rope else []), "kv_append", "attention")
    append, turn = len(parts) - 2, len(parts) - 3
    absent = (append, 9)  # no op has that many inputs
    return Rule(
        parts,
        "append_attention",
        (
            (0, 0), (append, 1), (append, 2), (append, 3), (append + 1, 3), (append + 1, 4), (append + 1, 5),
            *((turn, i) if rope else absent for i in (1, 2, 3)),
            *((0, i) if qk_norm else absent for i in (1, 2)),
        ),
    )  # fmt: skip


# For any number of rows: a product adds the residual on its way out, our kernels' as well as cuBLAS's.
PREFILL_RULES: tuple[Rule, ...] = (Rule(("linear", "add"), "linear_add", ((0, 0), (0, 1), (1, 0), (0, 2))),)
# For a decode step, where every sequence has one new token.
BATCH_RULES: tuple[Rule, ...] = (
    *PREFILL_RULES,
    _append_attention(qk_norm=True, rope=True),
    _append_attention(qk_norm=False, rope=True),
    _append_attention(qk_norm=False, rope=False),
)
# For a decode step of so few rows that the products are our own kernels'. Longer patterns first: the first rule that
# fits is taken.
RULES: tuple[Rule, ...] = (
    _norm_linear("rms_norm", "silu_mul"),
    _norm_linear("layer_norm", "gelu_tanh"),
    _norm_linear("layer_norm", "gelu_erf"),
    _norm_linear("rms_norm", None),
    _norm_linear("layer_norm", None),
    *BATCH_RULES,
)


def fuse(nodes: Sequence[Node], rules: Sequence[Rule] = RULES) -> list[Node]:
    """The list with every run of nodes that a rule describes replaced by one node."""
    out: list[Node] = []
    at = 0
    while at < len(nodes):
        for rule in rules:
            parts = tuple(nodes[at : at + len(rule.parts)])
            if tuple(p.op for p in parts) == rule.parts and _closed(parts, nodes[at + len(parts) :]):
                out.append(_fused(rule, parts))
                at += len(parts)
                break
        else:
            out.append(nodes[at])
            at += 1
    return out


def _closed(parts: Sequence[Node], rest: Sequence[Node]) -> bool:
    """Whether each part feeds the next, and nothing later needs a value that fusion would hide."""
    hidden = {name for p in parts[:-1] for name in p.outs if name not in p.ins}
    chained = all(set(a.outs) & set(b.ins) for a, b in itertools.pairwise(parts))
    return chained and not any(hidden & set(node.ins) for node in rest)


def _fused(rule: Rule, parts: tuple[Node, ...]) -> Node:
    names = [parts[p].ins[i] if i < len(parts[p].ins) else "" for p, i in rule.ins]
    while not names[-1]:
        names.pop()
    in_place = tuple(name for p in parts[:-1] for name in p.outs if name in p.ins)
    signature = OPS[rule.fused].signature
    known = {s.name for s in signature.attrs} | {s.dtype for s in signature.outs} - DTYPES.keys()
    attrs = {s.name: 0.0 for s in signature.attrs if s.dtype == "f32"}  # eps, where there is no norm to use it
    attrs |= {k: v for p in parts for k, v in p.attrs.items() if k in known}
    return Node(rule.fused, (*parts[-1].outs, *in_place), tuple(names), attrs, parts)
