"""Ministral 3: Llama with yarn, whose queries grow with the logarithm of their position."""

from __future__ import annotations

from ..family import OFF, Family, Number, fields, window_everywhere
from .layout import LLAMA, MISTRAL3

__all__ = ["FAMILY"]


FAMILY = Family(
    "Ministral3ForCausalLM",
    "ministral3",
    LLAMA,
    fields(num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=262144),
    windows=window_everywhere(None),
    neutral={"attention_bias": OFF, "mlp_bias": OFF},
    numbers={
        "query_temperature": Number("rope_parameters.llama_4_scaling_beta"),
        "query_context": Number("rope_parameters.original_max_position_embeddings"),
    },
    wrappers=(MISTRAL3,),
)
