"""The files of a case beside its weights: config.json in the spellings that checkpoints have, and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.goldens.case import Case, Config

__all__ = ["write_char_tokenizer", "write_configs", "write_json"]

CHARS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def spell_v4(config: Config) -> Config:
    """As checkpoints of transformers 4 spell it: rope_theta and rope_scaling at the top."""
    out = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype", "layer_types")}
    settings = dict(config["rope_parameters"])
    if "full_attention" in settings:  # one rotation for each type of layer: the top has that of full attention
        out["rope_local_base_freq"] = settings["sliding_attention"]["rope_theta"]
        out["sliding_window_pattern"] = config["layer_types"].index("full_attention") + 1
        settings = dict(settings["full_attention"])
    out["rope_theta"] = settings.pop("rope_theta")
    if (partial := settings.pop("partial_rotary_factor", 1.0)) != 1.0:
        out["partial_rotary_factor"] = partial
    rope_type = settings.pop("rope_type")
    if config["model_type"] == "phi3" and rope_type == "longrope":
        # Phi-3 keeps it at the top only.
        settings.pop("original_max_position_embeddings")
    # "type" is the older name, which Qwen and Phi use.
    key = "rope_type" if rope_type == "llama3" or "sliding_window_pattern" in out else "type"
    out["rope_scaling"] = None if rope_type == "default" else {key: rope_type, **settings}
    out["torch_dtype"] = "float32"
    out["transformers_version"] = "4.44.0"
    return out


def spell_v1(config: Config) -> Config:
    """As the first Llama checkpoints: nothing about rope, KV heads, head_dim or biases."""
    absent = ("rope_parameters", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "dtype")
    kept = {k: v for k, v in config.items() if k not in (*absent, "attention_dropout", "pretraining_tp")}
    return {**kept, "torch_dtype": "float32", "transformers_version": "4.28.1"}


def spell_internlm3(config: Config) -> Config:
    """As InternLM 3 is published: its own class, and switches for biases by its own names."""
    out = spell_v4(config)
    biases = {"qkv_bias": out.pop("attention_bias"), "bias": out.pop("mlp_bias")}
    return {**out, **biases, "architectures": ["InternLM3ForCausalLM"]}


def spell_internlm2(config: Config) -> Config:
    """As InternLM 2 is published."""
    out = spell_v4({k: v for k, v in config.items() if k not in ("head_dim", "mlp_bias", "attention_bias")})
    return {**out, "bias": config["attention_bias"], "architectures": ["InternLM2ForCausalLM"]}


def spell_minimax_m2(config: Config) -> Config:
    """As MiniMax-M2 is published: how many elements of a head rotate."""
    out = spell_v4(config)
    part = out.pop("partial_rotary_factor")
    return {**out, "rotary_dim": int(out["head_dim"] * part)}


def write_json(path: Path, data: Any) -> None:
    """JSON as the golden files have it."""
    path.write_text(json.dumps(data, indent=1) + "\n")


def write_configs(case: Case, folder: Path) -> None:
    """Rewrite the saved config.json in the case's spelling, and write its twins."""
    saved = json.loads((folder / "config.json").read_text())
    if case.family == "qwen2" and case.spelling == "v4":
        # Qwen's own files: a window that is switched off, and max_window_layers.
        saved.update(use_sliding_window=False, sliding_window=64, max_window_layers=2)
    spell = {
        "v5": lambda c: c,
        "v4": spell_v4,
        "v1": spell_v1,
        "internlm2": spell_internlm2,
        "internlm3": spell_internlm3,
        "minimax_m2": spell_minimax_m2,
    }[case.spelling]
    write_json(folder / "config.json", spell(saved))
    if case.twins:
        write_json(folder / "config.v5.json", saved)
        write_json(folder / "config.v4.json", spell_v4(saved))


def write_char_tokenizer(folder: Path) -> None:
    """tokenizer.json of a character-level model: each of tiny Shakespeare's 65 characters is one id."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    assert len(CHARS) == 65
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    text = "KING: what, ho!\n\nThou 3 & $x; y-z?"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    tokenizer.save(str(folder / "tokenizer.json"))
