"""A golden model as a row of a table: what its config says beside the sizes that all share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["SMALL", "Case", "Config", "O", "rope"]

O = 32  # the original context of a scaled RoPE, in tokens: prompts beyond it stay cheap

Config = dict[str, Any]

# Norm epsilons are far larger than the published ones, so that a wrong one shows in the logits.
SMALL: Config = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 2e-3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Case:
    """One golden model.

    spelling: how config.json is written: "v5" as saved, "v4" with rope_theta and rope_scaling, "v1" like the first
    Llama configs, which name no rope, KV heads or head_dim at all, or a family's name for a way of its own. twins: also
    write config.v4.json and config.v5.json. sequential: transformers' decoding with its cache is not the same function
    as one pass (dynamic RoPE only).
    """

    family: str
    config: Config
    base: Config = field(default_factory=lambda: SMALL)
    context: int = 128
    spelling: str = "v5"
    twins: bool = False
    sequential: bool = False
    chars: bool = False


def rope(rope_type: str, theta: float = 10000.0, **settings: Any) -> Config:
    """The rope part of a config; settings: as transformers names them for that type."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **settings}}
