"""Fields in which AutoGPTQ, AutoAWQ, GPTQModel and transformers note how they quantised or will run."""

__all__ = ["NOTES"]

NOTES = (
    # How the codes were found.
    "tokenizer", "dataset", "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "model_seqlen",
    "batch_size", "pad_token_id", "max_input_length", "cache_block_outputs", "act_group_aware", "hyb_act", "mse",
    "meta", "adapter", "rotation_*", "gptaq*", "failsafe*", "fallback*", "v2*", "offload_*", "block_name_to_quantize",
    "module_name_preceding_first_block", "modules_in_block_to_quantize", "duo_scaling", "apply_clip", "max_calib_*",
    # Where it came from and which kernels run it.
    "model_name_or_path", "model_file_base_name", "base_model_name_or_path", "use_cuda_fp16", "use_exllama",
    "disable_exllama", "exllama_config", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "version_*",
)  # fmt: skip
