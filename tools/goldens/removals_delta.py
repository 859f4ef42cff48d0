"""What the parts of gated delta layers change, and the gate of the attention beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tools.goldens.case import Config

__all__ = ["delta_removals"]

Mutate = Callable[[Any], None]


def of_delta(change: Callable[[Any], None]) -> Mutate:
    """A change to every gated delta layer."""

    def mutate(model: Any) -> None:
        for layer in model.model.layers:
            if hasattr(layer, "linear_attn"):
                change(layer.linear_attn)

    return mutate


def half_open(model: Any) -> None:
    """Attention whose output gate is open by half, whatever it reads."""
    for layer in model.model.layers:
        if hasattr(layer, "self_attn"):
            d = layer.self_attn.head_dim
            layer.self_attn.q_proj.weight.data.unflatten(0, (-1, 2, d))[:, 1].zero_()


def swapped_heads(delta: Any) -> None:
    """Key head h % groups in place of h // each, the other way one might share them: the rows of queries and keys stay,
    and what belongs to value heads is permuted."""
    heads, groups, size = delta.num_v_heads, delta.num_k_heads, delta.head_v_dim
    order = [h for g in range(groups) for h in range(heads) if h % groups == g]
    values = [h * size + i for h in order for i in range(size)]
    keys = list(range(2 * delta.key_dim))
    rows = [*keys, *(2 * delta.key_dim + row for row in values)]
    delta.in_proj_qkv.weight.data = delta.in_proj_qkv.weight.data[rows]
    delta.conv1d.weight.data = delta.conv1d.weight.data[rows]
    delta.in_proj_z.weight.data = delta.in_proj_z.weight.data[values]
    delta.out_proj.weight.data = delta.out_proj.weight.data[:, values]
    for module in (delta.in_proj_a, delta.in_proj_b):
        module.weight.data = module.weight.data[order]
    delta.A_log.data, delta.dt_bias.data = delta.A_log.data[order], delta.dt_bias.data[order]


def delta_removals(model: Any) -> Iterator[tuple[str, Mutate, Config]]:
    """(name, change to the loaded model, config overrides) of what gated delta layers have."""
    names = [name for name, _ in model.named_parameters()]
    if not any("linear_attn" in name for name in names):
        return
    yield "convolution", of_delta(lambda delta: delta.conv1d.weight.data[:, :, :-1].zero_()), {}
    yield "oldest_token", of_delta(lambda delta: delta.conv1d.weight.data[:, :, 0].zero_()), {}
    yield "A_log", of_delta(lambda delta: delta.A_log.data.zero_()), {}
    yield "dt_bias", of_delta(lambda delta: delta.dt_bias.data.zero_()), {}
    yield "output_gate", half_open, {}
    if any("in_proj_qkv." in name for name in names):
        yield "decay", of_delta(lambda delta: delta.in_proj_a.weight.data.zero_()), {}
        yield "beta", of_delta(lambda delta: delta.in_proj_b.weight.data.zero_()), {}
        yield "delta_gate", of_delta(lambda delta: delta.in_proj_z.weight.data.zero_()), {}
        if 1 < model.config.linear_num_key_heads < model.config.linear_num_value_heads:
            yield "delta_heads", of_delta(swapped_heads), {}
