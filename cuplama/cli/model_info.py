"""What ``cuplama info`` says of a model, from its config and file headers alone.

``facts`` is for programs: numbers are numbers, and the names stay. ``view`` makes of it what people read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.cuda.unpacking import largest_slice
from ..device import stored_dtype
from ..dtypes import DTYPES
from ..engine.memory import cache_bytes, plan
from ..errors import ParameterError
from ..loading import DEFAULT_CONTEXT
from ..models.checkpoint import has_weights, load_weights
from ..models.config import ModelConfig, load_config
from ..models.family import TABLES
from ..models.lora import Adapter
from ..models.peft import load_adapter
from ..models.presets import find_shape, is_shape
from ..models.rounding import round_weights
from ..ops.attention import HEAD_DIMS
from ..ops.launch import Device
from ..quant.format import PLAIN, Format
from ..quant.weight import Weight
from .running import find_folder
from .streams import size_text
from .text_info import text_facts, text_view

__all__ = ["facts", "find_config", "view"]

_PARTS = {**dict.fromkeys(TABLES, "embedding"), "lm_head": "head"}


def find_config(model: str | None, offline: bool) -> tuple[Path | None, ModelConfig]:
    """A model's folder and config; no folder for the name of a known shape."""
    if model is not None and is_shape(model):
        return None, find_shape(model)[1]
    folder = find_folder(model, offline)
    return folder, load_config(folder)


def facts(
    folder: Path | None, config: ModelConfig, quantize: str | None = None, adapter: Path | None = None
) -> dict[str, Any]:
    """Facts about a model by stable names. Where there are no weights, what they would be by the config.

    quantize: what ``load`` is asked to quantise them to; adapter: the folder of a LoRA adapter for it.
    """
    found = folder is not None and has_weights(folder)
    T = DTYPES[config.stored]
    for option, given in (("--quantize", quantize), ("--adapter", adapter)):
        if given is not None and not found:
            raise ParameterError(f"{option} needs a model's weights, and there are none")
    if folder is not None and found:
        config, weights = _weights(folder, config, quantize, adapter)
        T = DTYPES[stored_dtype(config, weights)]
        tied = weights["lm_head"].source == weights["embed_tokens"].source
        shapes = {name: w.shape for name, w in weights.items()}
        formats = {name: w.formats for name, w in weights.items()}
        memory = {name: w.nbytes for name, w in weights.items()}
        device = {name: w.device_bytes(T) for name, w in weights.items()}
        packed = {name: w.shape for name, w in weights.items() if w.packed}
    else:
        tied = config.head_is_tied
        shapes = config.weight_shapes()
        formats, packed = dict.fromkeys(shapes, (PLAIN[config.stored],)), {}
        memory = device = {name: math.prod(shape) * T.itemsize for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in reversed(shapes.items()) if name != "lm_head" or not tied}
    parts = _by_part({name: memory[name] for name in sizes})
    per_token = config.kv_size * T.itemsize
    context = min(config.context, DEFAULT_CONTEXT)
    return {
        "folder": None if folder is None else str(folder),
        "architecture": config.architecture,
        "parameters": config.parameters(tied),
        "active_parameters": config.parameters(tied, active=True),
        **_shape(config),
        "context": config.context,
        "default_context": context,
        "vocabulary": config.vocab_size,
        "weights_found": found,
        "weight_bytes": sum(parts.values()),
        "weight_formats": _bits(sizes, formats, memory),
        "bits_per_weight": 8 * sum(parts.values()) / sum(sizes.values()),
        "head_tied": tied,
        "adapter": None if config.adapter is None else _adapter(config, config.adapter),
        "bytes_by_part": parts,
        "cache_bytes_per_token": per_token,
        "cache_bytes": per_token * context,
        "eight_bit_cache_bytes": per_token * context // T.itemsize,
        "gpu_bytes": _gpu_bytes(config, sum(device[name] for name in sizes), T, context, packed),
        "numpy_bytes": 4 * sum(sizes.values()) + cache_bytes(config, DTYPES["f32"], context),
        **text_facts(folder, config),
    }


def _adapter(config: ModelConfig, adapter: Adapter) -> dict[str, Any]:
    """Of an adapter: its ranks, its numbers, the kinds of layers that it changes, and what it was made for."""
    return {
        "ranks": sorted({added.rank for added in adapter.modules.values()}),
        "parameters": adapter.parameters(config.own_recipes(), config.dims),
        "modules": sorted({module.rpartition(".")[2] for module in adapter.modules}),
        "base": adapter.base or None,
    }


def _is_adapter(name: str) -> bool:
    return name.endswith((".lora_a", ".lora_b"))


def _layers_by_heads(config: ModelConfig) -> list[dict[str, int]]:
    """How many layers have so many key/value heads of that size."""
    every = (config.dims(f"{i}.") for i in range(config.num_layers))
    found = Counter((dims["num_kv_heads"], dims["D"]) for dims in every)
    return [{"kv_heads": heads, "head_size": size, "layers": count} for (heads, size), count in found.items()]


def _experts(config: ModelConfig) -> dict[str, int] | None:
    """Of a model with experts: how many a layer has and how many of them compute a token, the sizes of one and of what
    all tokens share, and how many layers have them, and how many an MLP."""
    if not config.experts:
        return None
    names = config.own_recipes()
    return {
        "count": config.experts,
        "per_token": config.experts_per_token,
        "size": config.expert_size,
        "shared_size": config.shared_size,
        "layers": sum(f"{i}.router" in names for i in range(config.num_layers)),
        "mlp_layers": sum(f"{i}.down_proj" in names for i in range(config.num_layers)),
    }


def _shape(config: ModelConfig) -> dict[str, Any]:
    """What the layers are."""
    used = [config.rope_name(i) for i in range(config.num_layers)]
    return {
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "feed_forward_size": config.intermediate_size,
        "experts": _experts(config),
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_size": config.head_dim,
        "layers_by_heads": _layers_by_heads(config),
        "layers_without_keys": config.num_layers - len(config.caches),
        "learned_positions": not config.family.rotary,
        "rotations": [
            {"type": rope.type, "theta": rope.theta, "size": rope.dim, "layers": used.count(name)}
            for name, rope in config.ropes.items()
        ],
        "sliding_window": max(config.windows) or None,
        "sliding_layers": sum(map(bool, config.windows)),
    }


def _weights(
    folder: Path, config: ModelConfig, quantize: str | None, adapter: Path | None
) -> tuple[ModelConfig, dict[str, Weight]]:
    weights = load_weights(folder, config)
    weights = weights if quantize is None else round_weights(weights, config, quantize)
    if adapter is None:
        return config, weights
    adapted, more = load_adapter(adapter, config)
    return adapted, weights | more


def view(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same for people: name -> a value or a list of values."""
    more = f" ({facts['default_context']} unless --context asks for more)"
    tied = " (head tied to the embedding)" if facts["head_tied"] else ""
    size = f"{size_text(facts['weight_bytes'])}, {facts['bits_per_weight']:.4g} bits per weight{tied}"
    gpu = f"at least {size_text(facts['gpu_bytes'])} on a GPU" if facts["gpu_bytes"] else "no GPU runs such heads"
    per_token, context = size_text(facts["cache_bytes_per_token"]), facts["default_context"]
    return {
        "folder": facts["folder"] or "none: the published shape of a known model",
        "architecture": facts["architecture"],
        "parameters": f"{facts['parameters']:,}"
        + (f", of which a token uses {facts['active_parameters']:,}" if facts["experts"] else ""),
        "layers": facts["layers"],
        "hidden size": facts["hidden_size"],
        "feed-forward size": facts["feed_forward_size"] if facts["experts"] is None else _feed_forward(facts),
        "attention": _attention(facts),
        "positions": _positions(facts),
        "context": f"{facts['context']} tokens" + (more if context < facts["context"] else ""),
        "vocabulary": facts["vocabulary"],
        "weights": size if facts["weights_found"] else f"none here; by the config {size}",
        "formats": [
            f"{name}: {p['elements']:,} weights of {p['bits']:.4g} bits" for name, p in facts["weight_formats"].items()
        ],
        **({} if facts["adapter"] is None else {"adapter": _adapter_text(facts["adapter"])}),
        "memory by part": [f"{part.replace('_', '-')} {size_text(n)}" for part, n in facts["bytes_by_part"].items()],
        "KV cache": f"{per_token} per token, {size_text(facts['cache_bytes'])} for {context} tokens;"
        f" {size_text(facts['eight_bit_cache_bytes'])} with --kv-cache-dtype fp8",
        "memory needed": f"{gpu}, {size_text(facts['numpy_bytes'])} on NumPy, with that cache",
        **text_view(facts),
    }


def _attention(facts: Mapping[str, Any]) -> str:
    kinds, shared = facts["layers_by_heads"], facts["layers_without_keys"]
    each = [
        f"{k['kv_heads']} KV head{'s' if k['kv_heads'] > 1 else ''} of {k['head_size']}{_share(facts, k['layers'])}"
        for k in kinds
    ]
    more = f", those of other layers{_share(facts, shared)}" if shared else ""
    return f"{facts['heads']} heads, {', '.join(each)}{more}"


def _feed_forward(facts: Mapping[str, Any]) -> str:
    experts, mlps = facts["experts"], facts["experts"]["mlp_layers"]
    shared = f" and one of {experts['shared_size']}" if experts["shared_size"] else ""
    chosen = f"{experts['per_token']} of {experts['count']} experts of {experts['size']}{shared} for each token"
    dense = f"; {facts['feed_forward_size']}{_share(facts, mlps)}" if mlps else ""
    return f"{chosen}{_share(facts, experts['layers'])}{dense}"


def _adapter_text(adapter: Mapping[str, Any]) -> str:
    base = f", made for {adapter['base']}" if adapter["base"] else ""
    ranks = " and ".join(map(str, adapter["ranks"]))
    return f"LoRA of rank {ranks}, {adapter['parameters']:,} parameters, for {', '.join(adapter['modules'])}{base}"


def _by_part(memory: Mapping[str, int]) -> dict[str, int]:
    """Bytes of each part of the model. memory: of each weight."""
    found: dict[str, int] = {}
    for name, size in memory.items():
        kind = "adapter" if _is_adapter(name) else _PARTS.get(name, "")
        part = kind or ("attention" if _is_attention(name) else _layer_part(name))
        found[part] = found.get(part, 0) + size
    return found


def _layer_part(name: str) -> str:
    """The part that a weight of a layer belongs to, beside attention."""
    return "norms" if "norm" in name else "experts" if ".experts." in name else "feed_forward"


def _bits(
    sizes: Mapping[str, int], formats: Mapping[str, Sequence[Format]], memory: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Format -> how many weights have it, and bits for each, scales included, as stored."""
    found: dict[str, dict[str, float]] = {}
    for name, size in sizes.items():
        whole = found.setdefault(" + ".join(sorted(f.name for f in formats[name])), {"elements": 0, "bits": 0.0})
        whole["elements"] += size
        whole["bits"] += 8.0 * memory[name]
    for whole in found.values():
        whole["bits"] /= whole["elements"]
    return dict(sorted(found.items(), key=lambda item: -item[1]["elements"]))


def _gpu_bytes(
    config: ModelConfig, weights: int, T: np.dtype[Any], context: int, packed: Mapping[str, tuple[int, ...]]
) -> int | None:
    """What the model takes on a GPU, in T, with the smallest workspace; None if no GPU runs it. packed: the shapes of
    quantised weights, whose numbers have room in it."""
    from ..backends.cuda.backend import CudaBackend

    if not config.head_dims <= {*HEAD_DIMS}:
        return None
    chunk, unpacked = CudaBackend.prefill_chunks[-1], largest_slice(packed, T.itemsize)
    return plan(config, weights, T, context, context, chunk, Device(), unpacked).total


def _is_attention(name: str) -> bool:
    return name.split(".")[1:2] in (["qkv_proj"], ["o_proj"])


def _positions(facts: Mapping[str, Any]) -> str:
    window = facts["sliding_window"]
    sliding = f", sliding window of {window}{_share(facts, facts['sliding_layers'])}" if window else ""
    if facts["learned_positions"]:
        return "learned" + sliding
    found, left = [], facts["layers"]
    for rope in facts["rotations"]:
        partial = f" on {rope['size']} of {facts['head_size']} dims" if rope["size"] < facts["head_size"] else ""
        found.append(f"RoPE ({rope['type']}, theta {rope['theta']:,.12g}){partial}{_share(facts, rope['layers'])}")
        left -= rope["layers"]
    return ", ".join([*found, *([f"none{_share(facts, left)}"] if left else [])]) + sliding


def _share(facts: Mapping[str, Any], layers: int) -> str:
    """Words for the layers that have something; none if these are all."""
    return f" in {layers} of {facts['layers']} layers" if layers < facts["layers"] else ""
