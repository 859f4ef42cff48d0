"""Fields of config.json that no size or weight is read from: refused, without effect, or named in a warning.

A field is one of four kinds. Read: ``READ``, for rotary families ``ROTARY``, and what the family's row names. Refused
unless it has a value that changes nothing: ``NEUTRAL`` where the family does not read it, and the family's ``neutral``.
Without effect on the result: ``HARMLESS``, and the family's ``ignored``. Anything else nobody has classified, and a
warning names it: the text may be wrong, and whoever reads it should know why. ``NAMED`` holds fields that have no
effect at their usual values and are named at others.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from .family import OFF, Family, Number

__all__ = ["NEUTRAL", "read_by", "unclassified"]

READ = (
    "architectures", "model_type", "dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "layer_types", "quantization_config",
)  # fmt: skip
ROTARY = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")

# Fields that would change the mathematics, with the values under which they do not. Anything else is refused.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "quantization": (None,),  # MLX
    "compression_config": (None,),  # compressed-tensors before it was called quantization_config
    "is_encoder_decoder": OFF,
    "add_cross_attention": OFF,
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "num_experts_per_tok": (None, 0),
    "attention_sinks": OFF,
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "scale_emb": (None, 1, 1.0),
    "clip_qkv": (None,),
    "use_qk_norm": OFF,
    "qk_layernorm": OFF,
    "qk_layer_norms": OFF,
    "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
    "dual_chunk_attention_config": (None,),  # Qwen2.5-1M
    "alibi": OFF,
    "lm_head_bias": OFF,
    "rope_interleaved": OFF,
    "use_mrope": OFF,
    "is_causal": (None, True),
    "use_bidirectional_attention": OFF,
    "per_layer_config": (None,),
    "num_nextn_predict_layers": (None, 0),
    "pruned_heads": (None, [], {}),
    "vision_config": (None,),
    "audio_config": (None,),
    "transformers_weights": (None, "model.safetensors"),  # another file of weights than the usual one
}

# Patterns, as fnmatch has them, of fields that change no result.
HARMLESS = (
    # Where the model came from, and what a library notes about itself.
    "_*", "name_or_path", "transformers_version", "transformers.js_config", "auto_map", "custom_pipelines", "unsloth_*",
    "is_*_config", "tokenizer_class", "tokenizer_padding_side", "*_token_id", "task_specific_params",
    # Training: dropout, initialisation, losses.
    "*dropout*", "*_pdrop", "initializer_*", "gradient_checkpointing", "use_reentrant_checkpointing", "pretraining_tp",
    "neftune_noise_alpha", "router_aux_loss_coef", "output_router_logits", "ignore_pad_tokens",
    # Heads that a language model does not have.
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "is_decoder", "tie_encoder_decoder",
    "cross_attention_hidden_size",
    # How something is computed or returned, not what.
    "use_cache", "attn_implementation", "use_flash_attn*", "use_flash_attention*", "use_memory_efficient_attention",
    "chunk_size_feed_forward", "torchscript", "use_bfloat16", "tf_legacy_loss", "xla_device", "output_attentions",
    "output_hidden_states", "output_past", "output_scores", "return_dict*", "use_return_dict",
    # Limits that transformers does not read either.
    "max_sequence_length", "max_seq_len*", "seq_length", "model_max_length", "tokenizer_model_max_length",
)  # fmt: skip

# Old files hold settings of generation, at the defaults of that time as a rule; generation_config.json is their place.
NAMED: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "temperature": (1,),
    "top_k": (50,),
    "top_p": (1,),
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "diversity_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "max_length": (20,),
    "min_length": (0,),
    "early_stopping": (False,),
    "remove_invalid_values": (False,),
}


def read_by(family: Family) -> set[str]:
    """The fields that a family reads beyond those that all of them do."""
    router = family.router.settings.values()
    sources = (*family.numbers.values(), *(source for source in router if isinstance(source, Number)))
    numbers = (number.key.partition(".")[0] for number in sources if number.key is not None)
    flags = tuple(source for source in family.flags.values() if not isinstance(source, bool))
    fields = (source[0] for source in (*family.fields.values(), *router, *flags) if isinstance(source, tuple))
    switches = (source for source in flags if isinstance(source, str))
    return {*fields, *switches, *numbers, *family.windows.reads, *family.rotations.reads, *family.kinds.reads}


def unclassified(raw: Mapping[str, Any], family: Family) -> list[str]:
    """The names of the fields that are of no known kind, sorted; null says nothing, whatever its name."""
    known = {*READ, *NEUTRAL, *read_by(family), *family.neutral, *(ROTARY if family.rotary else ())}
    patterns = (*HARMLESS, *family.ignored)
    return sorted(
        name
        for name, value in raw.items()
        if value is not None
        and name not in known
        and value not in NAMED.get(name, ())
        and not any(fnmatchcase(name, pattern) for pattern in patterns)
    )
