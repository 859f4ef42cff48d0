"""Gemma 3: Gemma 2 with norms of queries and keys and a rotation for windows, without limits of scores."""

from __future__ import annotations

from ..family import Family, Number, Wrapper, window_by_pattern
from .gemma import GATED_GELU, GEMMA, GEMMA_NUMBERS, gemma_fields
from .layout import HEAD_NORMS
from .mixed import rotation_by_window

__all__ = ["FAMILY"]


FAMILY = Family(
    "Gemma3ForCausalLM",
    "gemma3_text",
    GEMMA | HEAD_NORMS,
    # The files of some sizes leave out what their class has anyway.
    gemma_fields(vocab_size=262208, num_attention_heads=8, max_position_embeddings=131072),
    activations=GATED_GELU,
    windows=window_by_pattern(4096, 6),
    flags={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    tied=True,
    norm_offset=1.0,
    rotations=rotation_by_window(1e6, 1e4, "rope_local_base_freq"),
    numbers={**GEMMA_NUMBERS, "logits_cap": Number("final_logit_softcapping", None)},
    ignored=("hidden_act", "cache_implementation"),
    wrappers=(
        Wrapper(
            ("Gemma3ForConditionalGeneration",),
            "gemma3",
            ("language_model.model.", "model.language_model."),
            ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
        ),
    ),
)
