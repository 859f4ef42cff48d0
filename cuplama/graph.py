"""A model as a plain list of nodes, from its config alone. This is the only place where a model's layers are written.

Values are names: weights ("3.qkv"), inputs ("ids", "pos", "rows", ...), cache arrays ("3.cache.k") and activations.
The tokens of all sequences in a batch are concatenated: every activation is [n_tokens, ...].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import ModelConfig

__all__ = ["INPUTS", "LOGITS", "Node", "decoder"]

LOGITS = "logits"

# The inputs of a pass, beside weights and cache: name -> what it is.
INPUTS: Mapping[str, str] = {
    "ids": "[n] token ids of the new tokens, sequence after sequence",
    "pos": "[n] position of each in its sequence",
    "slots": "[n] place of each in the cache: page * page_size + offset",
    "starts": "[b+1] first row of each sequence; the last entry is n",
    "lengths": "[b] tokens of each sequence, new ones included",
    "blocks": "[b,M] pages of each sequence",
    "wanted": "[r] rows whose logits are asked for",
    "rope.rows": "[n] row of each token in the cos/sin tables",
    "rope.cos": "[R,h] cosines",
    "rope.sin": "[R,h] sines",
}


@dataclass(frozen=True)
class Node:
    """One op applied to named values. An out that is also an in is updated in place.

    parts: the nodes that a fused node stands for.
    """

    op: str
    outs: tuple[str, ...]
    ins: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Node, ...] = ()

    def __str__(self) -> str:
        attrs = "".join(f" {k}={v:g}" if isinstance(v, float) else f" {k}={v}" for k, v in self.attrs.items())
        return f"{', '.join(self.outs)} = {self.op}({', '.join(self.ins)}){attrs}"


def decoder(config: ModelConfig) -> list[Node]:
    """The nodes that turn token ids into logits [r, vocab], float32, for the rows in ``wanted``."""
    family = config.family
    weights = config.weight_shapes().keys()
    nodes: list[Node] = []
    shape = {"heads": config.heads, "kv_heads": config.kv_heads}

    def emit(op: str, out: str, *ins: str, **attrs: Any) -> str:
        nodes.append(Node(op, (out,), ins, attrs))
        return out

    def optional(name: str) -> tuple[str, ...]:
        return (name,) if name in weights else ()

    def norm(x: str, weight: str) -> str:
        return emit(family.norm, f"{weight}.out", x, weight, *optional(f"{weight}.bias"), eps=config.eps)

    def linear(x: str, weight: str, U: str) -> str:
        return emit("linear", f"{weight}.out", x, weight, *optional(f"{weight}.bias"), U=U)

    x = emit(family.embed, "x", "ids", *(("pos", "embed", "positions") if "positions" in weights else ("embed",)))
    for i in range(config.layers):
        h = linear(norm(x, f"{i}.attn_norm"), f"{i}.qkv", U="T")
        if f"{i}.q_norm" in weights:
            h = emit("head_norm", f"{i}.normed", h, f"{i}.q_norm", f"{i}.k_norm", **shape, eps=config.eps)
        if family.rotate is not None:
            h = emit(family.rotate, f"{i}.rotated", h, "rope.rows", "rope.cos", "rope.sin", **shape, D=config.head_dim)
        cache = (f"{i}.cache.k", f"{i}.cache.v")
        nodes.append(Node("kv_append", cache, (h, "slots", *cache)))
        h = emit(
            "attention",
            f"{i}.attended",
            h,
            *cache,
            "starts",
            "lengths",
            "blocks",
            heads=config.heads,
            window=config.windows[i],
            scale=config.head_dim**-0.5,
        )
        x = emit("add", f"{i}.x", x, linear(h, f"{i}.o", U="f32"))
        h = linear(norm(x, f"{i}.mlp_norm"), f"{i}.up", U="T")
        x = emit("add", f"{i + 1}.x0", x, linear(emit(config.activation, f"{i}.act", h), f"{i}.down", U="f32"))
    h = norm(emit("select_rows", "x.wanted", x, "wanted"), "norm")
    nodes.append(Node("linear", (LOGITS,), (h, "head"), {"U": "f32"}))
    return nodes
