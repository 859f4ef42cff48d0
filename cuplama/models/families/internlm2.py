"""InternLM 2 and 2.5: Llama with other names, and one matrix for q, k and v, whose rows lie head by head.

transformers has no class for it; this is what the code beside the published files does.
"""

from __future__ import annotations

from ..family import OFF, Family, Recipe, fields, one
from .layout import KV_ROWS, LAYER, Q_ROWS

__all__ = ["FAMILY"]

_QKV_ROWS = f"{Q_ROWS}+2*{KV_ROWS}"
_WEIGHTS = {
    "embed_tokens": one("V,d", "model.tok_embeddings.weight", otherwise="output.weight"),
    "lm_head": one("V,d", "output.weight", otherwise="model.tok_embeddings.weight"),
    "norm": one("d", "model.norm.weight"),
    "{i}.attn_norm": one("d", LAYER + "attention_norm.weight"),
    "{i}.qkv_proj": one(f"{_QKV_ROWS},d", LAYER + "attention.wqkv.weight", by_head=True),
    "{i}.qkv_proj.bias": one(_QKV_ROWS, LAYER + "attention.wqkv.bias", by_head=True, when="bias"),
    "{i}.o_proj": one(f"d,{Q_ROWS}", LAYER + "attention.wo.weight"),
    "{i}.o_proj.bias": one("d", LAYER + "attention.wo.bias", when="bias"),
    "{i}.mlp_norm": one("d", LAYER + "ffn_norm.weight"),
    "{i}.gate_up_proj": Recipe((("f,d", LAYER + "feed_forward.w1.weight"), ("f,d", LAYER + "feed_forward.w3.weight"))),
    "{i}.down_proj": one("d,f", LAYER + "feed_forward.w2.weight"),
}

FAMILY = Family(
    "InternLM2ForCausalLM",
    "internlm2",
    _WEIGHTS,
    fields(),
    flags={"bias": "bias"},
    rope_types=("default", "linear", "dynamic"),
    neutral={"attention_bias": OFF, "mlp_bias": OFF},
)
