"""Cohere 2 (Command R7B, Command A): attention and MLP side by side behind one LayerNorm; windows, and only their
layers rotate, neighbour by neighbour; scaled logits."""

from __future__ import annotations

from ..family import OFF, Family, Number, Rotations, fields, window_by_pattern
from .layout import LLAMA

__all__ = ["FAMILY"]


FAMILY = Family(
    "Cohere2ForCausalLM",
    "cohere2",
    {name: recipe for name, recipe in LLAMA.items() if name != "{i}.mlp_norm"},
    {**fields(max_position_embeddings=8192), "eps": ("layer_norm_eps", 1e-5)},
    norm="layer_norm",
    windows=window_by_pattern(4096, 4),
    flags={"parallel": True, "qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    neutral={
        "mlp_bias": OFF,
        "use_parallel_block": (None, True),
        "use_gated_activation": (None, True),
        "position_embedding_type": (None, "rope_gptj"),
        "rotary_pct": (None, 1, 1.0),
    },
    # Notes of the makers' own code, which transformers does not read: layer_types or sliding_window_pattern say it.
    ignored=(
        "layer_switch",
        "order_of_interleaved_layers",
        "use_*_embedding",
        "use_embedding_*",
        "cache_implementation",
    ),
    tied=True,
    rope="rope_pairs",
    rotations=Rotations(("sliding_window",), lambda raw, windows: ["" if window else None for window in windows]),
    numbers={"logits_scale": Number("logit_scale", 0.0625)},
)
