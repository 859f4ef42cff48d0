"""InternLM 2 for transformers, which has no class for it: Llama whose files have InternLM's names and rows.

Importing this module registers it. The published code is modeling_internlm2.py beside internlm/internlm2-7b on the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

__all__ = ["InternLM2Config", "InternLM2ForCausalLM"]

# Parts of names, Llama's and InternLM's.
NAMES = {
    "model.embed_tokens": "model.tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "self_attn.wqkv": "attention.wqkv",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "lm_head": "output",
}
State = dict[str, torch.Tensor]


class InternLM2Config(LlamaConfig):  # type: ignore[misc]
    """bias: of queries, keys, values and what attention gives."""

    model_type = "internlm2"
    attribute_map = {"bias": "attention_bias"}  # noqa: RUF012


def renamed(state: State, names: dict[str, str]) -> State:
    """Tensors under other names."""
    found = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found


def to_internlm(state: State, d: int) -> State:
    """Llama's tensors as InternLM stores them: for each key head its queries, the key, the value. d: size of a head."""
    state = dict(state)
    for name in [n for n in state if ".q_proj." in n]:
        q, k, v = (state.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv")
        heads = [x.unflatten(0, (len(k) // d, -1, d)) for x in (q, k, v)]
        state[name.replace(".q_proj.", ".wqkv.")] = torch.cat(heads, 1).flatten(0, 2)
    return renamed(state, NAMES)


def to_llama(state: State, d: int, kv_heads: int) -> State:
    """The way back."""
    state = renamed(state, {new: old for old, new in NAMES.items()})
    for name in [n for n in state if ".wqkv." in n]:
        rows = state.pop(name).unflatten(0, (kv_heads, -1, d))
        for x, part in (("q", rows[:, :-2]), ("k", rows[:, -2:-1]), ("v", rows[:, -1:])):
            state[name.replace(".wqkv.", f".{x}_proj.")] = part.flatten(0, 2)
    return state


class InternLM2ForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Llama, saved and loaded as InternLM 2."""

    config_class = InternLM2Config

    def save_pretrained(self, folder: Path, **rest: Any) -> None:
        """As of any model."""
        super().save_pretrained(folder, **rest)
        file = Path(folder) / "model.safetensors"
        save_file(to_internlm(load_file(file), self.config.head_dim), file, {"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: Path, config: InternLM2Config, dtype: torch.dtype, **rest: Any) -> Any:
        """As of any model, with eager attention."""
        model = cls._from_config(config, dtype=dtype, attn_implementation="eager")
        state = load_file(Path(folder) / "model.safetensors")
        model.load_state_dict(to_llama(state, config.head_dim, config.num_key_value_heads))
        return model


AutoConfig.register("internlm2", InternLM2Config)
AutoModelForCausalLM.register(InternLM2Config, InternLM2ForCausalLM)
