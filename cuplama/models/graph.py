"""A model as a plain list of nodes, from its config alone. This is the only place where a model's layers are written.

Values are names: weights ("3.qkv"), inputs ("input_ids", "positions", "rows", ...), cache arrays ("3.cache.k") and activations.
The tokens of all sequences in a batch are concatenated: every activation is [n_tokens, ...].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ops.node import Node
from .config import ModelConfig

__all__ = ["INPUTS", "LOGITS", "decoder"]

LOGITS = "logits"
# The inputs of a pass, beside weights and cache: name -> what it is.
INPUTS: Mapping[str, str] = {
    "input_ids": "[n] token ids of the new tokens, sequence after sequence",
    "positions": "[n] position of each in its sequence",
    "slot_mapping": "[n] place of each in the cache: page * page_size + offset",
    "cu_seqlens": "[b+1] first row of each sequence; the last entry is n",
    "seq_lens": "[b] tokens of each sequence, new ones included",
    "page_table": "[b,M] pages of each sequence",
    "logit_rows": "[r] rows whose logits are asked for",
    "rope.rows": "[n] row of each token in the cos/sin tables",
    "rope.cos": "[R,h] cosines",
    "rope.sin": "[R,h] sines",
}


def decoder(config: ModelConfig) -> list[Node]:
    """The nodes that turn token ids into logits [r, vocab], float32, for the rows in ``wanted``."""
    family = config.family
    weights = config.weight_shapes().keys()
    nodes: list[Node] = []
    shape = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}

    def emit(op: str, out: str, *ins: str, **attrs: Any) -> str:
        nodes.append(Node(op, (out,), ins, attrs))
        return out

    def optional(name: str) -> tuple[str, ...]:
        return (name,) if name in weights else ()

    def norm(x: str, weight: str) -> str:
        return emit(family.norm, f"{weight}.out", x, weight, *optional(f"{weight}.bias"), eps=config.eps)

    def linear(x: str, weight: str, U: str) -> str:
        return emit("linear", f"{weight}.out", x, weight, *optional(f"{weight}.bias"), U=U)

    x = emit(
        family.embed,
        "x",
        "input_ids",
        *(("positions", "embed_tokens", "position_table") if "position_table" in weights else ("embed_tokens",)),
    )
    for i in range(config.num_layers):
        h = linear(norm(x, f"{i}.attn_norm"), f"{i}.qkv_proj", U="T")
        if f"{i}.q_norm" in weights:
            h = emit("qk_norm", f"{i}.normed", h, f"{i}.q_norm", f"{i}.k_norm", **shape, eps=config.eps)
        if (rope := config.rope_name(i)) is not None:
            tables = (f"{rope}.rows", f"{rope}.cos", f"{rope}.sin")
            h = emit("rope", f"{i}.rotated", h, *tables, **shape, D=config.head_dim)
        cache = (f"{i}.cache.k", f"{i}.cache.v")
        nodes.append(Node("kv_append", cache, (h, "slot_mapping", *cache)))
        h = emit(
            "attention",
            f"{i}.attended",
            h,
            *cache,
            "cu_seqlens",
            "seq_lens",
            "page_table",
            num_heads=config.num_heads,
            window=config.windows[i],
            scale=config.head_dim**-0.5,
        )
        x = emit("add", f"{i}.x", x, linear(h, f"{i}.o_proj", U="f32"))
        h = linear(
            norm(x, f"{i}.mlp_norm"), f"{i}.gate_up_proj" if f"{i}.gate_up_proj" in weights else f"{i}.up_proj", U="T"
        )
        x = emit("add", f"{i + 1}.x0", x, linear(emit(config.activation, f"{i}.act", h), f"{i}.down_proj", U="f32"))
    h = norm(emit("select_rows", "x.wanted", x, "logit_rows"), "norm")
    nodes.append(Node("linear", (LOGITS,), (h, "lm_head"), {"U": "f32"}))
    return nodes
