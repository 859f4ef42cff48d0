"""Safetensors or GGUF files -> canonical weights. Memory-mapped, sharded or not, and strict.

Every tensor of the files must be used by the model and every weight of the model must be found, with the right shape:
a lost weight would otherwise turn into silently wrong text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files import is_missing, not_opened, not_understood, read_json
from ..gguf import is_gguf, open_gguf
from ..quant.readers import read_quantised
from ..quant.stored import Stored
from ..quant.tensor import SAFETENSORS, Tensor
from ..quant.weight import Weight
from .config import ModelConfig
from .family import HARMLESS_TENSORS, Recipe
from .wrapper import text_tensors, without

__all__ = ["INDEX", "Layout", "assemble", "folder_tensors", "has_weights", "load_weights", "open_file", "open_tensors"]

_DTYPES = ("F32", "F16", "BF16")  # of safetensors, those that weights may have
_Part = np.ndarray[Any, Any] | Stored
INDEX = "model.safetensors.index.json"


def has_weights(folder: Path) -> bool:
    """Whether weights are there, of any kind that can be read: a GGUF file has its own."""
    return is_gguf(folder) or (folder / INDEX).exists() or any(folder.glob("*.safetensors"))


def load_weights(folder: Path, config: ModelConfig) -> dict[str, Weight]:
    """The weights of ``config`` from the safetensors files in ``folder``, or from a GGUF file, by canonical name.

    An adapter's are not among them; peft.py reads those. Raises CheckpointError naming the file and the tensor that is
    missing, left over, of the wrong shape or unreadable.
    """
    if is_gguf(folder):
        from .gguf import gguf_name, gguf_tensors

        gguf = open_gguf(folder)
        layout = Layout(folder, gguf_tensors(gguf, config.dims()), "its metadata", partial(gguf_name, gguf))
    else:
        layout = Layout(folder, folder_tensors(folder, config), "config.json", str)
    tensors = layout.tensors
    used: set[str] = set()
    weights = {}
    for name, recipe in config.own_recipes().items():
        weight = assemble(layout, name, recipe, config.dims(name))
        weights[name] = weight
        used.update(weight.source)
    for name in sorted(tensors.keys() - used - config.unused_tensors()):
        t = tensors[name]
        if not any(re.fullmatch(pattern, name) for pattern in HARMLESS_TENSORS) and not _adds_nothing(name, tensors):
            raise CheckpointError(
                f"{t.file}: tensor {t.name} {list(t.shape)} has no place in {config.architecture} as"
                f" {layout.described} describes it; refusing to ignore it"
            )
    return weights


def _adds_nothing(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is the bias of a quantised matrix and all of it is 0: GPTQ's writers gave every layer one."""
    module, _, kind = name.rpartition(".")
    weight, data = tensors.get(f"{module}.weight"), tensors[name].data
    quantised = kind == "bias" and weight is not None and isinstance(weight.data, Stored)
    return quantised and isinstance(data, np.ndarray) and not data.any()


def folder_tensors(folder: Path, config: ModelConfig) -> Mapping[str, Tensor]:
    """The tensors of a folder by the family's full names, quantised matrices as one tensor each."""
    tensors, prefix = open_tensors(folder), config.family.prefix
    if config.wrapper is not None:
        tensors = text_tensors(tensors, config.family, config.wrapper)
    elif config.family.left_out:
        begins = [name.replace("{num_layers}", str(config.num_layers)) for name in config.family.left_out]
        tensors = without(tensors, begins, "tensors that no layer of the model has are left out")
    if not any(name.startswith(prefix) for name in tensors):  # a bare export: "h.0.ln_1.weight"
        tensors = {name if name == "lm_head.weight" else prefix + name: t for name, t in tensors.items()}
    return read_quantised(tensors, config.raw.get("quantization_config"), str(folder / "config.json"))


@dataclass(frozen=True)
class Layout:
    """A model's tensors by Hugging Face's names.

    described: what says their shapes; spelled: from such a name to that in the files.
    """

    folder: Path
    tensors: Mapping[str, Tensor]
    described: str
    spelled: Callable[[str], str]


def assemble(layout: Layout, name: str, recipe: Recipe, dims: Mapping[str, int]) -> Weight:
    """The weight of a recipe. Raises CheckpointError naming a tensor that is missing, or of another shape or dtype."""
    recipe = recipe.as_merged() if recipe.merged in layout.tensors else recipe
    experts, parts, sources = dims["E"] if recipe.experts else 0, list[_Part](), list[str]()
    for expert in range(max(1, experts)):
        for i, (_, tensor_name) in enumerate(recipe.parts):
            found, used = _find(layout, name, recipe, tensor_name.replace("{e}", str(expert)))
            whole = experts if "{e}" not in tensor_name else 0
            data = _checked(found, recipe.tensor_shape(i, dims), whole, recipe, layout)
            if isinstance(data, Stored):
                rows = recipe.tensor_shape(i, dims)[0]
                own = data[expert * rows : (expert + 1) * rows] if whole else data
                parts += (own[kind] for kind in recipe.slices(i, dims)) if recipe.rows else recipe.apart(own)
            else:
                parts += recipe.canonical(data[expert] if whole else data, dims, i)
            sources.append(used)
    plain = [p.dtype for p in parts if not isinstance(p, Stored)]
    if len(plain) == len(parts) and (other := next((i for i, d in enumerate(plain) if d != plain[0]), 0)):
        named = sources if not experts else (sources[0], sources[other])
        raise CheckpointError(f"{layout.folder}: tensors {', '.join(named)} have different dtypes")
    if experts:
        _check_alike(layout, parts, sources)
    source = tuple(dict.fromkeys(sources) if experts else sources)
    return Weight(name, source, tuple(parts), experts, recipe.wide)


def _find(layout: Layout, name: str, recipe: Recipe, tensor_name: str) -> tuple[Tensor, str]:
    """A tensor, and the name that it goes by. Raises CheckpointError where it is missing."""
    found = layout.tensors.get(tensor_name)
    if found is None and recipe.otherwise is not None:
        found, tensor_name = layout.tensors.get(recipe.otherwise), recipe.otherwise
    if found is None:
        raise CheckpointError(f"{layout.folder}: {_missing(layout, name, recipe, tensor_name)}")
    return found, tensor_name


def _checked(found: Tensor, shape: tuple[int, ...], experts: int, recipe: Recipe, layout: Layout) -> _Part:
    """What a tensor holds, which must have the shape of its part of the weight, and a dtype that weights may have.

    experts: how many have their share in it, 0 for a tensor that is not of several.
    """
    quantised = isinstance(found.data, Stored)
    stored = shape[::-1] if recipe.transposed and not quantised else shape
    stored = (experts, *stored) if experts else (1, *stored) if recipe.row else stored
    if found.shape != stored:
        raise CheckpointError(
            f"{found.file}: tensor {found.name} has shape {list(found.shape)};"
            f" {layout.described} asks for {list(stored)}"
        )
    if found.data is None or (found.dtype not in _DTYPES and not quantised):
        raise CheckpointError(
            f"{found.file}: tensor {found.name} has dtype {found.dtype}; supported: {', '.join(_DTYPES)}"
        )
    if quantised and recipe.by_head:
        raise CheckpointError(f"{found.file}: tensor {found.name} is quantised, and its rows lie head by head")
    return found.data


def _check_alike(layout: Layout, parts: Sequence[_Part], sources: Sequence[str]) -> None:
    """Refuse experts that are not all quantised in one way, or with an order of their columns. sources: as many for
    each of the parts."""
    named = [sources[i * len(sources) // len(parts)] for i in range(len(parts))]
    kinds = [p.format.name if isinstance(p, Stored) else "plain" for p in parts]
    if other := next((i for i, kind in enumerate(kinds) if kind != kinds[0]), 0):
        raise CheckpointError(
            f"{layout.folder}: tensor {named[0]} is {kinds[0]}, {named[other]} is {kinds[other]};"
            " the experts of a layer must be quantised alike"
        )
    ordered = (n for n, p in zip(named, parts, strict=True) if isinstance(p, Stored) and p.order is not None)
    if name := next(ordered, ""):
        raise CheckpointError(f"{layout.folder}: tensor {name} has an order of columns (desc_act); experts cannot")


def _missing(layout: Layout, name: str, recipe: Recipe, tensor_name: str) -> str:
    """The words for a tensor that is not there. A model that was wrapped when it was saved has longer names."""
    tensors = layout.tensors
    wanted = [layout.spelled(n) for n in (tensor_name, *([recipe.parts[0][1]] if recipe.otherwise else []))]
    text = f"tensor {' (nor '.join(wanted)}{')' if recipe.otherwise else ''} is missing"
    if longer := [t.name for t in tensors.values() if t.name.endswith(tuple(f".{name}" for name in wanted))]:
        return f"{text}; there is {longer[0]}, whose name begins otherwise"
    if name in ("embed_tokens", "lm_head") and not recipe.otherwise:
        text += ", and config.json says that head and embedding are not tied (tie_word_embeddings is not true)"
    return text


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by name: of ``model.safetensors``, or of the shards that the index lists.

    Where both are there the one file counts and the index is left over from another sharding, as in transformers.
    Raises CheckpointError for a missing, truncated or corrupt file and for an index that does not match its shards.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return open_file(single)
    if not is_missing(folder / INDEX):
        return _open_shards(folder)
    files = sorted(folder.glob("*.safetensors")) if is_missing(single) else [single]
    if not files:
        others = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(pattern))]
        hint = f" ({', '.join(others[:3])} cannot be read; convert to safetensors)" if others else ""
        raise CheckpointError(f"{folder} has no model.safetensors{hint}")
    if len(files) > 1:
        raise CheckpointError(f"{folder} has {len(files)} safetensors files but no {INDEX} that says how they belong")
    return open_file(files[0])


def _open_shards(folder: Path) -> dict[str, Tensor]:
    index = folder / INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise CheckpointError(f"{index} has no weight_map")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(names.values())):
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise CheckpointError(f"{index} names a shard outside the folder: {shard!r:.200}")
        if is_missing(folder / shard):
            count = sum(v == shard for v in names.values())
            raise CheckpointError(f"{folder / shard} is missing; {INDEX} places {count} tensors in it")
        for name, tensor in open_file(folder / shard).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is in both {tensors[name].file} and {tensor.file}")
            tensors[name] = tensor
    for name, shard in names.items():
        if name not in tensors or tensors[name].file != folder / shard:
            raise CheckpointError(f"{folder / shard}: tensor {name} is missing, though {INDEX} places it there")
    for name in sorted(tensors.keys() - names.keys()):
        raise CheckpointError(f"{tensors[name].file}: tensor {name} is not listed in {INDEX}")
    return tensors


def open_file(path: Path) -> dict[str, Tensor]:
    """Map one file. The safetensors library checks the header against the file; the views are then plain offsets.

    Raises CheckpointError.
    """
    try:
        with path.open("rb"), safe_open(str(path), framework="np"):  # the library says of every failure "no such file"
            pass
        data = np.memmap(path, np.uint8, "r")
    except SafetensorError as e:
        raise CheckpointError(not_understood(path, "is truncated or corrupt", str(e).split(": ", 1)[-1])) from None
    except OSError as e:
        raise CheckpointError(not_opened(path, e)) from None
    start = 8 + int(data[:8].view(np.uint64)[0])
    tensors = {}
    for name, entry in json.loads(data[8:start].tobytes()).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), SAFETENSORS.get(entry["dtype"])
        view = None if dtype is None else np.asarray(data[start + first : start + last]).view(dtype).reshape(shape)
        tensors[name] = Tensor(name, path, entry["dtype"], shape, view)
    return tensors
