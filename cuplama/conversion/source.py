"""The model that another one is made of: its tensors part by part, and which are matrices of linear layers."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from ..dtypes import dtype_name
from ..errors import ConfigError, ParameterError
from ..hub import HUB_FILES
from ..models.checkpoint import INDEX, folder_tensors, load_weights, open_tensors
from ..models.config import ModelConfig, load_config
from ..models.family import GATES, Recipe
from ..models.rounding import linear_weights
from ..quant.compressed import TensorSpec, tensor_specs
from ..quant.grid import Grid
from ..quant.rtn import GROUPS
from ..quant.weight import Weight

__all__ = ["Source", "layer_of", "plain_spec"]

# Beside the files that are fetched from the hub: what other libraries read of a tokenizer, and licences.
_COPIED = (
    *(n for n in HUB_FILES if n != "adapter_config.json"),
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def plain_spec(array: np.ndarray[Any, Any]) -> TensorSpec:
    """What a tensor is that is written as an array."""
    return TensorSpec(dtype_name(array.dtype).upper(), array.shape)


def layer_of(name: str) -> int | None:
    """The layer of a canonical weight, "3.qkv_proj", or None for a weight of no layer."""
    first = name.partition(".")[0]
    return int(first) if first.isdigit() else None


@dataclass(frozen=True)
class Source:
    """A model folder.

    weights: by canonical name; linear: of these the matrices of the layers; tensors: the arrays of the files, by the
    names they have there, or would have of the text part alone, in the order of the weights; names: canonical name ->
    the names of its tensors.
    """

    folder: Path
    config: ModelConfig
    weights: Mapping[str, Weight]
    linear: tuple[str, ...]
    tensors: Mapping[str, np.ndarray[Any, Any]]
    names: Mapping[str, tuple[str, ...]]

    @classmethod
    def open(cls, folder: Path, verb: str = "quantise") -> Source:
        """Raises ConfigError and CheckpointError as a model is loaded, and ConfigError for one that is quantised
        already, or whose tensors are taken apart. verb: what is to be done with it, in words."""
        if folder.is_file():
            raise ConfigError(f"{folder} is a file; only folders in Hugging Face layout are taken here")
        config = load_config(folder)
        recipes = config.recipes()
        if any(recipe.rows for recipe in recipes.values()):
            raise ConfigError(
                f"{folder}: {config.architecture} takes tensors apart, and nothing can {verb} such a model yet;"
                " load it with --quantize or --adapter instead"
            )
        weights, linear = load_weights(folder, config), linear_weights(config)
        if any(w.packed for w in weights.values()):
            raise ConfigError(f"{folder} is quantised already; {verb} the model that it was made of")
        files, prefix = open_tensors(folder).keys(), config.family.prefix
        names = {  # a bare export leaves the prefix out, and stays one; of a wrapper's text part a whole model is made
            name: tuple(s if s in files or config.wrapper else s.removeprefix(prefix) for s in weight.source)
            for name, weight in weights.items()
        }
        stored, tensors = folder_tensors(folder, config), dict[str, np.ndarray[Any, Any]]()
        for name, weight in weights.items():
            for written, source in zip(names[name], weight.source, strict=True):
                data = stored[source].data
                assert isinstance(data, np.ndarray)
                tensors[written] = data
        return cls(folder, config, weights, linear, tensors, names)

    def check_described(self) -> None:
        """Raises ConfigError for a model whose matrices compressed-tensors cannot describe."""
        recipes = self.config.recipes()
        if any(self._undescribed(recipes[name]) for name in self.linear):
            raise ConfigError(
                f"{self.folder}: {self.config.architecture} stores its matrices transposed, head by head, or those of"
                " all experts together, and nothing reads compressed-tensors of such; load it with --quantize instead"
            )

    @staticmethod
    def _undescribed(recipe: Recipe) -> bool:
        together = recipe.experts and any("{e}" not in tensor for _, tensor in recipe.parts)
        return recipe.transposed or recipe.by_head or together

    @property
    def plain(self) -> tuple[str, ...]:
        """The modules of the layers that stay as they are."""
        names = [tensor for name, own in self.names.items() if name.endswith(GATES) for tensor in own]
        return tuple(name.removesuffix(".weight") for name in names)

    def group(self, grid: Grid, asked: int | None) -> int:
        """The columns that share a scale: as many as were asked for, or else the grid's own number or the largest
        smaller one that divides every row. Raises ParameterError naming a matrix and its size."""
        if asked is None and grid.group == 0:
            return 0
        tried = GROUPS if asked is None else (asked,)
        widths = {name: self.weights[name].shape[-1] for name in self.linear}
        for group in tried:
            if group == 0 or all(width % group == 0 for width in widths.values()):
                return group
        name = next(n for n, width in widths.items() if width % tried[-1])
        others = [str(g) for g in (*GROUPS, 0) if g == 0 or all(width % g == 0 for width in widths.values())]
        raise ParameterError(
            f"group_size = {tried[-1]} does not divide the rows of {self.names[name][0]}, which have {widths[name]}"
            f" numbers; possible here: {', '.join(others)} for whole rows"
        )

    def parts(self) -> list[list[str]]:
        """The names of the tensors, part by part: first all that are of no layer, then layer after layer."""
        found: list[list[str]] = [[] for _ in range(self.config.num_layers + 1)]
        for name, tensors in self.names.items():
            layer = layer_of(name)
            found[0 if layer is None else layer + 1] += tensors
        return [list(dict.fromkeys(names)) for names in found]  # a tied head is stored once

    def specs(self, grid: Grid, group: int) -> dict[str, TensorSpec]:
        """What is to be written, by name, in the order of the parts."""
        quantised = {n for w in self.linear for n in self.names[w]}
        found: dict[str, TensorSpec] = {}
        for name in itertools.chain.from_iterable(self.parts()):
            array = self.tensors[name]
            plain = plain_spec(array)
            if name in quantised:
                m, k = array.shape
                ends = tensor_specs(grid, group, m, k, plain.dtype)
                found |= {f"{name.removesuffix('weight')}{end}": spec for end, spec in ends.items()}
            else:
                found[name] = plain
        return found

    def copies(self) -> list[tuple[Path, str]]:
        """The files that a model has beside config and weights, with their names in the folder."""
        files = sorted(p for p in (*self.folder.iterdir(), *self.folder.glob("*/*.jinja")) if p.is_file())
        names = [(p, p.relative_to(self.folder).as_posix()) for p in files]
        return [
            (p, name)
            for p, name in names
            if name not in ("config.json", INDEX) and any(fnmatchcase(name, pattern) for pattern in _COPIED)
        ]

    def fingerprint(self) -> str:
        """Of config and weights: a SHA-256 of config.json, of each tensor's name, shape and first row."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name, array in self.tensors.items():
            digest.update(repr((name, array.dtype, array.shape)).encode())
            digest.update(np.ascontiguousarray(array[:1]).tobytes())
        return digest.hexdigest()[:16]
