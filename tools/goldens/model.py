"""A golden model in transformers: random weights that float16 and bfloat16 both hold, and what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tools.goldens.internlm2  # noqa: F401  registers its classes
from tools.divergence import Rows, stacked

__all__ = ["NEW_TOKENS", "exact", "greedy", "load", "logits_of", "randomize", "routers", "run"]

NEW_TOKENS = 24


def exact(x: torch.Tensor) -> torch.Tensor:
    """Round to values that bfloat16 and float16 both hold exactly."""
    x = x.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16).to(torch.float32)
    assert torch.equal(x, x.half().float())
    return x


def randomize(model: Any, seed: int, tied: bool) -> None:
    """Perturb every parameter: norm weights are not one, biases not zero, attention far from uniform.

    Gains are chosen for logits of a few units: a fan-in scaling for matrices, doubled for q and k.
    """
    rng = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.copy_(exact(0.7 + 0.1 * torch.randn(buffer.shape, generator=rng)))
        elif name.endswith("e_score_correction_bias"):  # between scores, so that it decides
            buffer.copy_(exact(0.2 * torch.randn(buffer.shape, generator=rng)))
    # Of norm weights: to these one is added (the Gemmas' are large all the same).
    added = model.config.model_type in ("nemotron", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=rng)
        if "norm" in name or ".ln_" in name:
            mean = 0.0 if added and not name.endswith("linear_attn.norm.weight") else 1.0
            value = 0.25 * noise if name.endswith("bias") else mean + 0.3 * noise
            if "q_norm" in name and model.config.model_type == "gemma4_text":
                value = value / 2  # its attention has no other scale, and would be so sharp that roundings grow
        elif name.endswith("e_score_correction_bias"):
            value = 0.1 * noise
        elif name.endswith(("router.scale", "per_expert_scale")):
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "alpha_" in name:  # of xIELU
            value = p + 0.3 * noise
        elif name.endswith("A_log"):  # states that outlast some tokens
            value = 0.5 * noise - 1
        elif name.endswith("conv1d.weight"):
            value = 1.5 * noise / p.shape[2] ** 0.5
        elif "embed_tokens" in name or "wte" in name:
            # An untied embedding is kept small, where the first norm's epsilon shows. A tied one that is multiplied
            # must not outweigh the layers, or each token is followed by itself.
            multiplied = hasattr(model.get_input_embeddings(), "embed_scale")
            value = noise * ((1.0 if multiplied else 2.5) / model.config.hidden_size**0.5 if tied else 0.3)
        elif "wpe" in name:
            value = 0.5 * noise
        elif "lm_head" in name:
            value = noise * 3.0 / model.config.hidden_size**0.5
        else:
            conv1d = model.config.model_type == "gpt2" and name.endswith(
                ("c_attn.weight", "c_proj.weight", "c_fc.weight")
            )
            fan_in = p.shape[0] if conv1d else p.shape[-1]
            sharp = any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "c_attn"))
            # The two GELUs differ by 5e-4 at most: amplify what they feed.
            sharp |= any(part in name for part in ("mlp.c_", "mlp.fc"))
            value = noise * (1.7 if sharp else 1.0) / fan_in**0.5
        p.copy_(exact(value))


def load(folder: Path, dtype: torch.dtype = torch.float32, config: Path | None = None, **overrides: Any) -> Any:
    """A fresh model: transformers' dynamic RoPE remembers earlier lengths, so none is used twice."""
    cfg = AutoConfig.from_pretrained(config or folder / "config.json", **overrides)
    how = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, config=cfg, dtype=dtype, **how).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits [n, vocab] of ids [n], float32, in one pass."""
    out: np.ndarray = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float().numpy()
    return out


def routers(model: Any) -> list[torch.nn.Module]:
    """The modules that choose experts, layer by layer."""
    return [m for m in model.modules() if type(m).__name__.endswith(("Router", "TopKGating"))]


def run(model: Any, ids: np.ndarray) -> Rows:
    """What each token of ids [n] gives, in one pass."""
    found: list[tuple[np.ndarray, np.ndarray]] = []

    def keep(module: torch.nn.Module, ins: Any, outs: tuple[torch.Tensor, ...]) -> None:
        found.append((outs[2].numpy(), outs[1].float().numpy()))

    for router in routers(model):
        router.register_forward_hook(keep)
    return stacked(logits_of(model, ids), found)


def greedy(model: Any, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The greedy continuation of ids [n]: tokens [NEW_TOKENS], int32, and logits [NEW_TOKENS, vocab], float32."""
    prompt = torch.from_numpy(ids.astype(np.int64))[None]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, len(ids) :].numpy().astype(np.int32)
    steps = torch.stack(out.logits, dim=1)[0].float().numpy()
    assert steps.shape[0] == tokens.shape[0] == NEW_TOKENS
    return tokens, steps
