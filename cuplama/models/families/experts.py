"""Layers of experts as most families store them, and the rules for which layers are such.

A layer's flag is "sparse" where experts are its MLP, and "dense" where it has one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..family import Kinds, Number, Recipe, Router, one
from .layout import LAYER

__all__ = [
    "ALL_SPARSE",
    "correction",
    "either_way",
    "expert_weights",
    "merged_experts",
    "mlp_where_dense",
    "router_by_groups",
    "shared_expert",
    "sparse_behind",
    "sparse_where",
]

_SPARSE, _DENSE = "sparse", "dense"
_MLP = ("{i}.gate_up_proj", "{i}.down_proj")

ALL_SPARSE = Kinds((), lambda raw, windows: [{"flags": frozenset({_SPARSE})}] * len(windows))


def sparse_where(reads: Sequence[str], rule: Callable[[Mapping[str, Any], int], bool]) -> Kinds:
    """Experts in the layers for which the rule says so. rule: (config.json, number of the layer) -> whether."""

    def kinds(raw: Mapping[str, Any], windows: Sequence[int]) -> list[Mapping[str, Any]]:
        return [{"flags": frozenset({_SPARSE if rule(raw, i) else _DENSE})} for i in range(len(windows))]

    return Kinds(tuple(reads), kinds)


def sparse_behind(absent: int) -> Kinds:
    """Experts behind the first ``first_k_dense_replace`` layers. absent: their number where the field is left out."""
    name = "first_k_dense_replace"
    return sparse_where((name,), lambda raw, layer: bool(layer >= raw.get(name, absent)))


def router_by_groups(renormalise: bool) -> Router:
    """Sigmoids, of the experts of the best groups. renormalise: whether the weights of a token's experts add up to one
    where ``norm_topk_prob`` is left out."""
    return Router(
        settings={
            "sigmoid": 1,
            "groups": ("n_group", 1),
            "kept": ("topk_group", 1),
            "renormalise": ("norm_topk_prob", renormalise),
            "factor": Number("routed_scaling_factor", 1.0),
        }
    )


def mlp_where_dense(weights: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The weights of a model in which the MLPs are those of dense layers."""
    return {name: replace(recipe, only=_DENSE) if name.startswith(_MLP) else recipe for name, recipe in weights.items()}


def expert_weights(
    module: str = "mlp", names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"), router: str = "gate.weight"
) -> dict[str, Recipe]:
    """Experts, each with a tensor for each matrix, and their router. module: of a layer, which holds both."""
    gate, up, down = (f"{LAYER}{module}.experts.{{e}}.{name}.weight" for name in names)
    return {
        "{i}.router": one("E,d", f"{LAYER}{module}.{router}", only=_SPARSE),
        "{i}.experts.gate_up_proj": Recipe((("e,d", gate), ("e,d", up)), experts=True, only=_SPARSE),
        "{i}.experts.down_proj": one("d,e", down, experts=True, only=_SPARSE),
    }


def either_way(weights: Mapping[str, Recipe], gate_up: str, down: str) -> dict[str, Recipe]:
    """The same where some files have each matrix of all experts in one tensor of these names, without the layer's."""
    merged = {"{i}.experts.gate_up_proj": LAYER + gate_up, "{i}.experts.down_proj": LAYER + down}
    return {name: replace(recipe, merged=merged.get(name)) for name, recipe in weights.items()}


def merged_experts(router: str, gate_up: str, down: str, **options: Any) -> dict[str, Recipe]:
    """The same where each matrix of all experts is one tensor. The names of tensors come without the layer's; options:
    further fields of the experts' recipes."""
    return {
        "{i}.router": one("E,d", LAYER + router, only=_SPARSE),
        "{i}.experts.gate_up_proj": one("2*e,d", LAYER + gate_up, experts=True, only=_SPARSE, **options),
        "{i}.experts.down_proj": one("d,e", LAYER + down, experts=True, only=_SPARSE, **options),
    }


def shared_expert(module: str) -> dict[str, Recipe]:
    """The expert that all tokens share, where its size is not 0."""
    gate, up, down = (f"{LAYER}{module}.{name}_proj.weight" for name in ("gate", "up", "down"))
    options: Mapping[str, Any] = {"when": "shared_size", "only": _SPARSE}
    return {
        "{i}.shared.gate_up_proj": Recipe((("s,d", gate), ("s,d", up)), **options),
        "{i}.shared.down_proj": one("d,s", down, **options),
    }


def correction(tensor: str, **options: Any) -> dict[str, Recipe]:
    """What is added to scores where experts are compared, float32. options: further fields of the recipe."""
    return {"{i}.router.correction": one("E", LAYER + tensor, only=_SPARSE, wide=True, **options)}
