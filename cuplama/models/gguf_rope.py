"""The rotation of a GGUF file as config.json would have it.

Beside keys of its metadata a file has tensors of it: what each frequency is divided by. ``rope_freqs`` are those of
Llama 3.1's scaling, whose settings the file does not name; they are found again, so that the frequencies are the
numbers that config.json gives. Other divisors become a longrope whose long and short ones are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import CheckpointError, ConfigError
from ..gguf import GGUF
from .rope import Rope

__all__ = ["ROPE_TENSORS", "decimal", "rope_fields"]

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FREQUENCIES, LONG, SHORT)
"""Tensors that are settings, not weights."""

_NEVER = 2**31 - 1  # an original context that no sequence exceeds
_TYPES = ("none", "linear", "yarn", "longrope")
# Key behind "rope.scaling." -> setting of config.json.
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_READ = ("type", "factor", "original_context_length", "attn_factor", "finetuned", *_YARN)


def decimal(number: float) -> float:
    """A float32 of a file as the shortest decimal that stands for it: 1e-05 and not 9.999999747378752e-06."""
    with np.errstate(over="ignore"):  # infinity is refused where it is read
        return float(str(np.float32(number)))


def rope_fields(gguf: GGUF, architecture: str, head_dim: int, context: int) -> tuple[dict[str, Any], set[str]]:
    """(fields of config.json, keys of the metadata that were read). Raises CheckpointError and ConfigError.

    head_dim, context: of the model, elements and tokens.
    """
    prefix = f"{architecture}.rope."
    read = {"freq_base", "dimension_count", "scale_linear", *(f"scaling.{key}" for key in _READ)}
    theta = decimal(gguf.get(f"{prefix}freq_base", float, 10000.0))
    dim = gguf.get(f"{prefix}dimension_count", int, head_dim)
    fields: dict[str, Any] = {"rope_theta": theta}
    if dim != head_dim:
        if not 0 < dim < head_dim:
            raise ConfigError(f"{gguf.path}: {prefix}dimension_count is {dim}; supported: 1 to head_dim = {head_dim}")
        fields["partial_rotary_factor"] = _share(dim, head_dim)
    original = gguf.get(f"{prefix}scaling.original_context_length", int)
    if original is not None:
        fields["original_max_position_embeddings"] = original
    settings = _scaling(gguf, prefix, theta, dim, context)
    if "original" in settings:
        fields["original_max_position_embeddings"] = settings.pop("original")
    if settings:
        fields["rope_scaling"] = settings
    return fields, {prefix + key for key in read}


def _share(dim: int, head_dim: int) -> float:
    """The partial_rotary_factor for which int(head_dim * factor) is ``dim``, whatever is rounded."""
    factor = dim / head_dim
    return factor if int(head_dim * factor) == dim else float(np.nextafter(factor, 2))


def _scaling(gguf: GGUF, prefix: str, theta: float, dim: int, context: int) -> dict[str, Any]:
    """rope_scaling, empty for none; ``original`` is in it where the context before scaling is not the file's."""
    scaling = f"{prefix}scaling."
    linear = gguf.get(f"{scaling}factor", float, gguf.get(f"{prefix}scale_linear", float, 1.0))
    kind = gguf.get(f"{scaling}type", str, "linear" if linear != 1 else "none")
    if kind not in _TYPES:
        raise ConfigError(f"{gguf.path}: {scaling}type is {kind!r:.80}; supported: {', '.join(_TYPES)}")
    attention = gguf.get(f"{scaling}attn_factor", float)
    long, short, divisors = (_divisors(gguf, name, dim) for name in (LONG, SHORT, FREQUENCIES))
    if (long is None) != (short is None):
        raise CheckpointError(f"{gguf.path}: of the tensors {LONG} and {SHORT} one is missing")
    if divisors is not None and kind not in ("none", "longrope"):
        raise ConfigError(f"{gguf.path}: {scaling}type is {kind!r}, beside a tensor {FREQUENCIES}; supported: none")
    if long is not None and short is not None:
        factor = decimal(1.0 if attention is None else attention)
        return {"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": factor}
    if divisors is not None:
        return _llama3(theta, dim, context, divisors) or {
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "attention_factor": 1.0,
            "original": _NEVER,
        }
    if kind == "linear" and linear != 1:
        return {"rope_type": "linear", "factor": decimal(linear)}
    if kind == "yarn":
        return _yarn(gguf, scaling, decimal(linear), attention)
    return {}


def _divisors(gguf: GGUF, name: str, dim: int) -> list[float] | None:
    """What each frequency is divided by, of a tensor that need not be there."""
    tensor = gguf.tensors.get(name)
    if tensor is None:
        return None
    if tensor.type.name != "F32" or tensor.shape != (dim // 2,):
        has = f"type {tensor.type.name} and shape {list(tensor.shape)}"
        raise CheckpointError(f"{tensor.file}: tensor {name} has {has}; it must be F32 and [{dim // 2}]")
    return [decimal(x) for x in tensor.data.view(np.float32)]


def _llama3(theta: float, dim: int, context: int, divisors: list[float]) -> dict[str, Any] | None:
    """The settings of Llama 3.1's scaling that give these divisors, or None. Models have 1 and 4 for the low and the
    high factor, and a power of two for the context before scaling."""
    settings = {"factor": max(divisors), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if dim % 2 or not theta > 1:  # refused where it is read
        return None
    plain, _ = Rope("default", theta, dim, context, context, {}).frequencies(1)
    for original in (2**n for n in range(4, 25)):
        scaled, _ = Rope("llama3", theta, dim, context, original, settings).frequencies(1)
        if np.allclose(plain / scaled, divisors, rtol=1e-5, atol=0):
            return {"rope_type": "llama3", **settings, "original": original}
    return None


def _yarn(gguf: GGUF, scaling: str, factor: float, attention: float | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    for key, name in _YARN.items():
        value = gguf.get(scaling + key, float)
        if value is not None:
            settings[name] = decimal(value)
    if attention is not None and attention != 1:
        # llama.cpp multiplies its own factor by this one, config.json states the product.
        settings["attention_factor"] = decimal(attention) * (0.1 * np.log(max(factor, 1.0)).item() + 1.0)
    return settings
