"""LoRA: a matrix W [m, k] of a linear layer becomes W + scale B A, with A [r, k] and B [m, r] of a small rank r.

Hu et al., arXiv:2106.09685; scale is alpha / r, or alpha / sqrt(r) as in rsLoRA (Kalajdzievski, arXiv:2312.03732).

A canonical weight X may be stacked of several matrices, as q, k and v are: its parts. Beside it a model with an adapter
has these values, of which the first two are weights:

* ``X.lora_a`` [parts*r, k]: the A of every part, one below the other.
* ``X.lora_b`` [m, r]: the rows of B, stacked as those of X are.
* ``X.lora_part`` int32 [m]: the part of each row, which says which A it goes with.

A part that is not adapted has zeros in both. They stay exactly zero in training as well: the gradient of such an A is
a product with its B, and that of the B one with its A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ops.signature import dim_value
from .family import TABLES, Recipe

__all__ = ["ALL_LINEAR", "Adapter", "LowRank", "ends_in", "linear_modules", "lora_name", "modules_of", "part_rows"]

ALL_LINEAR = "all-linear"
"""What stands for every linear layer but the head, where layers are named."""
_PREFIX = "base_model.model."  # PEFT wraps a model twice


@dataclass(frozen=True)
class LowRank:
    """What is added to one matrix. rank: r; alpha: as PEFT calls it; rslora: whether alpha is divided by sqrt(r)."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Adapter:
    """The adapter of a model. modules: Hugging Face's name of a linear layer ("model.layers.3.self_attn.q_proj") ->
    what is added to its matrix, the same in all parts of a canonical weight; base: the name of the model that it was
    made for, "" if nobody says."""

    modules: Mapping[str, LowRank]
    base: str = ""

    def matrices(self, recipes: Mapping[str, Recipe]) -> dict[str, LowRank]:
        """Canonical weight -> what is added to it, for those with an adapted part. recipes: of the model itself."""
        found = {}
        for name, recipe in recipes.items():
            added = [self.modules[module] for _, module in linear_modules(name, recipe) if module in self.modules]
            if added:
                found[name] = added[0]
        return found

    def stores(self, tensor: str) -> bool:
        """Whether a tensor of a recipe is in a file: those of parts that are not adapted are in none."""
        module = tensor.removeprefix(_PREFIX).rpartition(".lora_")[0]
        return not module or module in self.modules

    def parameters(self, recipes: Mapping[str, Recipe], dims: Callable[[str], Mapping[str, int]]) -> int:
        """How many numbers it has. recipes: as of ``matrices``; dims: ``ModelConfig.dims``."""
        every = ((dims(name), *part) for name, recipe in recipes.items() for part in linear_modules(name, recipe))
        return sum(
            self.modules[module].rank * sum(dim_value(size, sizes) for size in shape.split(","))
            for sizes, shape, module in every
            if module in self.modules
        )

    def recipes(self, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
        """The recipes of ``X.lora_a`` and ``X.lora_b``, with the names that PEFT stores tensors under."""
        found: dict[str, Recipe] = {}
        for name, added in self.matrices(recipes).items():
            parts = [(*shape.split(","), module) for shape, module in linear_modules(name, recipes[name])]
            a = tuple((f"{added.rank},{columns}", lora_name(module, "A")) for _, columns, module in parts)
            b = tuple((f"{rows},{added.rank}", lora_name(module, "B")) for rows, _, module in parts)
            found |= {f"{name}.lora_a": Recipe(a), f"{name}.lora_b": Recipe(b, by_head=recipes[name].by_head)}
        return found


def linear_modules(name: str, recipe: Recipe) -> list[tuple[str, str]]:
    """(shape of the matrix, name of the module) of each part of a canonical weight; none if it is no linear layer's.

    PEFT stores another kind of adapter for tables whose rows are looked up, and for tensors of several experts.
    """
    if name in TABLES or recipe.experts or not all("," in shape for shape, _ in recipe.parts):
        return []
    return [(shape, tensor.removesuffix(".weight")) for shape, tensor in recipe.parts]


def lora_name(module: str, which: str) -> str:
    """PEFT's name of a tensor. which: "A" or "B"."""
    return f"{_PREFIX}{module}.lora_{which}.weight"


def modules_of(recipes: Mapping[str, Recipe]) -> tuple[list[str], list[str]]:
    """The names of a model's linear layers, and of what else has a weight. recipes: of the model itself."""
    linear = [module for name, recipe in recipes.items() for _, module in linear_modules(name, recipe)]
    tensors = [tensor for recipe in recipes.values() for _, tensor in recipe.parts if tensor.endswith(".weight")]
    others = dict.fromkeys(tensor.removesuffix(".weight").replace("{e}", "0") for tensor in tensors)
    for module in linear:
        del others[module]
    return linear, list(others)


def ends_in(module: str, names: Iterable[str]) -> bool:
    """Whether one of the names is the module's, or the end of it ("self_attn.q_proj")."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def part_rows(recipe: Recipe, dims: Mapping[str, int]) -> np.ndarray[Any, Any]:
    """The part of each row of a canonical weight, int32 [m]."""
    rows = [dim_value(shape.split(",")[0], dims) for shape, _ in recipe.parts]
    return np.repeat(np.arange(len(rows), dtype=np.int32), rows)
