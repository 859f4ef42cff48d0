"""StarCoder2: LayerNorm, biases everywhere but on the head, an MLP of GELU without a gate, a window in every layer."""

from __future__ import annotations

from ..family import GELU, Family, fields, one, window_everywhere
from .layout import LAYER, NORM_BIASES, UNGATED

__all__ = ["FAMILY"]

FAMILY = Family(
    "Starcoder2ForCausalLM",
    "starcoder2",
    {
        **UNGATED,
        **NORM_BIASES,
        "{i}.up_proj": one("f,d", LAYER + "mlp.c_fc.weight"),
        "{i}.up_proj.bias": one("f", LAYER + "mlp.c_fc.bias", when="mlp_bias"),
        "{i}.down_proj": one("d,f", LAYER + "mlp.c_proj.weight"),
        "{i}.down_proj.bias": one("d", LAYER + "mlp.c_proj.bias", when="mlp_bias"),
    },
    {
        **fields(
            intermediate_size=12288,
            num_key_value_heads=2,
            hidden_act="gelu_pytorch_tanh",
            max_position_embeddings=4096,
        ),
        "eps": ("norm_epsilon", 1e-5),
    },
    activations=GELU,
    norm="layer_norm",
    windows=window_everywhere(None),
    flags=dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), ("use_bias", True)),
    neutral={"mlp_type": (None, "default"), "norm_type": (None, "layer_norm")},
    tied=True,
)
