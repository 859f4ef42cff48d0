"""Checkpoint names that Llama introduced and most families kept."""

from __future__ import annotations

from ..family import Recipe, Wrapper, one

__all__ = [
    "EMBED_AND_HEAD",
    "HEAD_NORMS",
    "KV_ROWS",
    "LAYER",
    "LLAMA",
    "MISTRAL3",
    "NORM_BIASES",
    "POST_NORMS",
    "Q_ROWS",
    "UNGATED",
    "WIDE_NORMS",
]

LAYER = "model.layers.{i}."
Q_ROWS, KV_ROWS = "num_heads*D", "num_kv_heads*D"

EMBED_AND_HEAD = {
    # A tied matrix may be stored under either name; if both are stored, both count.
    "embed_tokens": one("V,d", "model.embed_tokens.weight", otherwise="lm_head.weight"),
    "lm_head": one("V,d", "lm_head.weight", otherwise="model.embed_tokens.weight"),
    "norm": one("d", "model.norm.weight"),
    "{i}.attn_norm": one("d", LAYER + "input_layernorm.weight"),
    "{i}.mlp_norm": one("d", LAYER + "post_attention_layernorm.weight"),
    "{i}.o_proj": one(f"d,{Q_ROWS}", LAYER + "self_attn.o_proj.weight"),
    "{i}.down_proj": one("d,f", LAYER + "mlp.down_proj.weight"),
}

LLAMA = {
    **EMBED_AND_HEAD,
    "{i}.qkv_proj": Recipe(
        tuple(
            (f"{rows},d", f"{LAYER}self_attn.{x}_proj.weight")
            for x, rows in (("q", Q_ROWS), ("k", KV_ROWS), ("v", KV_ROWS))
        )
    ),
    "{i}.qkv_proj.bias": Recipe(
        tuple((rows, f"{LAYER}self_attn.{x}_proj.bias") for x, rows in (("q", Q_ROWS), ("k", KV_ROWS), ("v", KV_ROWS))),
        when="qkv_bias",
    ),
    "{i}.o_proj.bias": one("d", LAYER + "self_attn.o_proj.bias", when="o_bias"),
    "{i}.gate_up_proj": Recipe((("f,d", LAYER + "mlp.gate_proj.weight"), ("f,d", LAYER + "mlp.up_proj.weight"))),
    "{i}.gate_up_proj.bias": Recipe(
        (("f", LAYER + "mlp.gate_proj.bias"), ("f", LAYER + "mlp.up_proj.bias")), when="mlp_bias"
    ),
    "{i}.down_proj.bias": one("d", LAYER + "mlp.down_proj.bias", when="mlp_bias"),
}

# Norms behind attention and MLP, and none before them.
POST_NORMS = {
    **{name: recipe for name, recipe in LLAMA.items() if name not in ("{i}.attn_norm", "{i}.mlp_norm")},
    "{i}.attn_post_norm": one("d", LAYER + "post_attention_layernorm.weight"),
    "{i}.mlp_post_norm": one("d", LAYER + "post_feedforward_layernorm.weight"),
}

# Norms of each query and each key head.
HEAD_NORMS = {
    "{i}.q_norm": one("D", LAYER + "self_attn.q_norm.weight"),
    "{i}.k_norm": one("D", LAYER + "self_attn.k_norm.weight"),
}

# Norms of all queries and of all keys of a token together.
WIDE_NORMS = {
    "{i}.q_norm": one(Q_ROWS, LAYER + "self_attn.q_norm.weight"),
    "{i}.k_norm": one(KV_ROWS, LAYER + "self_attn.k_norm.weight"),
}

# Pictures beside a text model of Mistral's, which may be of more than one kind.
MISTRAL3 = Wrapper(
    ("Mistral3ForConditionalGeneration",),
    "mistral3",
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)

# The same with an MLP that has no gate.
UNGATED = {
    **{name: recipe for name, recipe in LLAMA.items() if not name.startswith("{i}.gate_up_proj")},
    "{i}.up_proj": one("f,d", LAYER + "mlp.up_proj.weight"),
    "{i}.up_proj.bias": one("f", LAYER + "mlp.up_proj.bias", when="mlp_bias"),
}

# Of LayerNorm, beside the weights that any norm has.
NORM_BIASES = {
    "norm.bias": one("d", "model.norm.bias"),
    "{i}.attn_norm.bias": one("d", LAYER + "input_layernorm.bias"),
    "{i}.mlp_norm.bias": one("d", LAYER + "post_attention_layernorm.bias"),
}
