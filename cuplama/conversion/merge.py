"""Fold a LoRA adapter into its model: every adapted matrix W becomes W + scale B A, and the model needs no adapter.

The sum is in float32 and rounded once, to the dtype that the model is stored in. Hu et al., arXiv:2106.09685.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import checked, whole_number
from ..dtypes import narrow, upcast
from ..errors import CheckpointError, ConfigError
from ..models.config import ModelConfig
from ..models.peft import ADAPTER_CONFIG, ADAPTER_MODEL, load_adapter
from ..quant.weight import Weight
from .folder import OutputFolder
from .shards import make_shards
from .source import Source, plain_spec

__all__ = ["MERGE_RECORD", "merge"]

MERGE_RECORD = "merge.json"
Progress = Callable[[int, int], None]  # (layers that are done, layers in all)


@dataclass(frozen=True)
class _Term:
    """What is added to a tensor: scale B A, as ``stored`` lays it in files. a: float32 [r, k]; b: float32 [rows, r]."""

    a: np.ndarray[Any, Any]
    b: np.ndarray[Any, Any]
    scale: float
    stored: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]

    def added_to(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The sum, in the array's dtype."""
        found = self.b @ self.a
        found *= np.float32(self.scale)
        found = self.stored(found)
        found += upcast(array)
        return np.asarray(narrow(found, array.dtype))


def merge(
    folder: Path, adapter: Path, out: Path, shard_bytes: int = 5 * 10**9, progress: Progress | None = None
) -> bool:
    """Write the model of ``folder`` with the adapter of another folder in it to the folder ``out``.

    Where an earlier call with the same arguments was stopped, this one goes on. False: all had been done before.
    shard_bytes: of a file of weights at most; progress: called with (layers done, layers in all). Raises
    ParameterError, ConfigError and CheckpointError, each naming the culprit.
    """
    checked("shard_bytes", shard_bytes, whole_number(1), "a number of bytes")
    source = Source.open(folder, "merge the adapter into")
    terms = _terms(source, *load_adapter(adapter, source.config))
    specs = {name: plain_spec(source.tensors[name]) for name in itertools.chain.from_iterable(source.parts())}
    recipe = {"source": source.fingerprint(), "adapter": _fingerprint(adapter), "shard_bytes": shard_bytes}
    target = OutputFolder(out, recipe, make_shards(specs, shard_bytes), MERGE_RECORD)
    if target.finished:
        return False
    for part, names in enumerate(source.parts()):
        if progress is not None:
            progress(part, len(source.parts()))
        if part >= target.done:
            target.write({name: _merged(source, name, terms.get(name)) for name in names})
    target.finish(source.config.raw, source.copies())
    if progress is not None:
        progress(len(source.parts()), len(source.parts()))
    return True


def _terms(source: Source, config: ModelConfig, weights: Mapping[str, Weight]) -> dict[str, _Term]:
    """What is added to which tensor, by the names in the model's files. Raises ConfigError for an adapted head that is
    one matrix with the embedding."""
    recipes, found = config.own_recipes(), dict[str, _Term]()
    tied = source.weights["lm_head"].source == source.weights["embed_tokens"].source
    if "lm_head" in config.low_ranks and tied:
        raise ConfigError(
            f"{source.folder}: the adapter changes lm_head, which is one matrix with the embedding; it can only be used"
            " as an adapter (--adapter)"
        )
    for name, added in config.low_ranks.items():
        a, b = (np.asarray(upcast(weights[f"{name}.lora_{which}"].array())) for which in "ab")
        row, turned = 0, recipes[name].transposed
        for i, tensor in enumerate(source.names[name]):
            rows = source.tensors[tensor].shape[1 if turned else 0]
            ab = a[i * added.rank : (i + 1) * added.rank], b[row : row + rows]
            term = _Term(*ab, added.scale, partial(recipes[name].stored, dims=config.dims()))
            row += rows
            if term.b.any():  # zeros where the part is not adapted
                found[tensor] = term
    return found


def _merged(source: Source, name: str, term: _Term | None) -> np.ndarray[Any, Any]:
    array = source.tensors[name]
    if term is None:
        return array
    with np.errstate(all="ignore"):  # what is not finite is refused
        found = term.added_to(array)
    if not np.isfinite(upcast(found)).all():
        raise CheckpointError(
            f"{source.folder}: tensor {name} with the adapter holds numbers that are not finite in {array.dtype}"
        )
    return found


def _fingerprint(adapter: Path) -> str:
    digest = hashlib.sha256((adapter / ADAPTER_CONFIG).read_bytes())
    with (adapter / ADAPTER_MODEL).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
