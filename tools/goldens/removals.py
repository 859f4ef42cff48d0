"""What each part of a model changes: the part is removed or altered, and the logits must show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

from tools.goldens.case import Case, Config
from tools.goldens.removals_delta import delta_removals
from tools.goldens.removals_experts import expert_removals
from tools.goldens.removals_more import more_removals
from tools.goldens.removals_scaled import scaled_removals

__all__ = ["removals"]

Mutate = Callable[[Any], None]
# Parameters that some models have: the words by which their names are found.
PARTS = (
    "q_proj.bias", "v_proj.bias", "o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias", "dense.bias",
    "fc1.bias", "fc2.bias", "c_fc.bias", "c_proj.bias", "layernorm.bias", "model.norm.bias", "lm_head.bias",
    "alpha_p", "alpha_n",
)  # fmt: skip


def zero(match: str) -> Mutate:
    """Zero the parameters whose name contains the text."""

    def mutate(model: Any) -> None:
        found = [p for n, p in model.named_parameters() if match in n]
        assert found, match
        for p in found:
            p.data.zero_()

    return mutate


def norms_one(match: str) -> Mutate:
    """Set the norm weights whose name contains the text to one."""

    def mutate(model: Any) -> None:
        for n, p in model.named_parameters():
            if match in n and n.endswith("weight"):
                p.data.fill_(1.0)

    return mutate


def eps_less(model: Any) -> None:
    """Divide the epsilon of every norm by ten."""
    for module in model.modules():
        for name in ("variance_epsilon", "eps"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, getattr(module, name) / 10)


def no_rotation(model: Any) -> None:
    """Rotate by no angle."""
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda *args, **rest: tuple(
        f(t) for f, t in zip((torch.ones_like, torch.zeros_like), forward(*args, **rest), strict=True)
    )


def rotations(cfg: Any) -> dict[str, Config]:
    """The settings of rotations by layer type, "" for one that all layers have."""
    settings: dict[str, Any] = cfg.rope_parameters
    return {"": settings} if "rope_type" in settings else settings


def named(kind: str, what: str) -> str:
    """The attribute of transformers' rotation module that belongs to a layer type."""
    return f"{kind}_{what}" if kind else what


def unscaled_rotation(kind: str, theta: float) -> Mutate:
    """RoPE without its scaling."""

    def mutate(model: Any) -> None:
        rotary = model.model.rotary_emb
        rotary.rope_type = {**rotary.rope_type, kind: "default"} if kind else "default"
        inv_freq = getattr(rotary, named(kind, "inv_freq"))
        inv_freq.copy_(1.0 / theta ** (torch.arange(len(inv_freq)) / len(inv_freq)))
        setattr(rotary, named(kind, "attention_scaling"), 1.0)

    return mutate


def no_attention_factor(kind: str) -> Mutate:
    """RoPE's scaling without its factor on cos and sin."""
    return lambda model: setattr(model.model.rotary_emb, named(kind, "attention_scaling"), 1.0)


def short_factors_only(model: Any) -> None:
    """LongRoPE that never takes the long factors."""
    model.model.rotary_emb.rope_type = "default"


def same_position(model: Any) -> None:
    """Give every position the embedding of the first."""
    wpe = model.transformer.wpe.weight.data
    wpe.copy_(wpe[:1].expand_as(wpe))


def other_gelu(model: Any) -> None:
    """The exact GELU for the tanh formula, or the other way round."""
    other = "gelu" if model.config.activation_function == "gelu_new" else "gelu_new"
    for block in model.transformer.h:
        block.mlp.act = transformers.activations.ACT2FN[other]


def attentions(model: Any) -> list[Any]:
    """The attention of each layer that has it."""
    return [layer.self_attn for layer in model.model.layers if hasattr(layer, "self_attn")]


def swapped_kv_heads(model: Any) -> None:
    """KV head h % n_kv in place of h // group, the other way one might share them."""
    cfg = model.config
    n = cfg.num_attention_heads
    for attention in attentions(model):
        kv, d = n // attention.num_key_value_groups, attention.head_dim
        order = [h for k in range(kv) for h in range(n) if h % kv == k]
        rows = torch.tensor([h * d + i for h in order for i in range(d)])
        q, o = attention.q_proj, attention.o_proj
        for tensors in (q, getattr(attention, "q_norm", None)):
            for parameter in tensors.parameters() if tensors is not None else ():
                if len(parameter) == len(rows):  # a norm of all heads together, and not of each
                    parameter.data = parameter.data[rows]
                elif len(parameter) == 2 * len(rows):  # of each head its query, and then its gate
                    parameter.data = parameter.data.unflatten(0, (n, -1))[order].flatten(0, 1)
        o.weight.data = o.weight.data[:, rows]


def removals(case: Case, model: Any) -> Iterator[tuple[str, Mutate, Config]]:
    """(name, change to the loaded model, config overrides) of everything that must matter."""
    names = [n for n, _ in model.named_parameters()]
    cfg = model.config

    def keep(model: Any) -> None:
        pass

    yield "eps_tenth", eps_less, {}
    yield "norms_one", norms_one(".ln_" if case.family == "gpt2" else "norm"), {}
    if case.family == "gpt2":
        yield "positions", same_position, {}
        yield "other_gelu", other_gelu, {}
        for part in ("c_attn.bias", "c_fc.bias", "c_proj.bias", "ln_f.bias", "ln_1.bias"):
            yield part, zero(part), {}
        return
    yield "rotation", no_rotation, {}
    yield from more_removals(model)
    yield from scaled_removals(model)
    yield from delta_removals(model)
    yield from expert_removals(model)
    for part in PARTS:
        if any(part in n for n in names):
            yield part, zero(part), {}
    for part in ("q_norm", "k_norm", "query_layernorm", "key_layernorm"):
        if any(part in n for n in names):
            yield part, norms_one(part), {}
    if 1 < attentions(model)[0].num_key_value_groups < cfg.num_attention_heads:
        yield "kv_sharing", swapped_kv_heads, {}
    for kind, settings in rotations(cfg).items():
        if settings["rope_type"] != "default":
            yield named(kind, "rope_scaling"), unscaled_rotation(kind, settings["rope_theta"]), {}
        if getattr(model.model.rotary_emb, named(kind, "attention_scaling")) != 1.0:
            yield named(kind, "attention_factor"), no_attention_factor(kind), {}
        if settings["rope_type"] == "longrope":
            yield "long_factor", short_factors_only, {}
    if getattr(cfg, "sliding_window", None):
        width = cfg.sliding_window
        yield "window", keep, {"sliding_window": 1000}
        yield "window_plus_one", keep, {"sliding_window": width + 1}
        yield "window_minus_one", keep, {"sliding_window": width - 1}
    alike = len({attention.head_dim for attention in attentions(model)}) == 1
    if alike and "sliding_attention" in (getattr(cfg, "layer_types", None) or []):
        yield "max_window_layers", keep, {"layer_types": ["sliding_attention"] * cfg.num_hidden_layers}
