"""The sizes of a model, and which of its optional weights exist, as config.json says them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config_reader import ConfigReader
from .family import Family

__all__ = ["DELTA_SIZES", "model_flags", "model_sizes"]

DELTA_SIZES = ("key_heads", "value_heads", "key_size", "value_size", "conv_size")
# Sizes that may be 0, or absent.
_OPTIONAL_SIZES = (
    "per_layer_size", "per_layer_vocab", "experts", "experts_per_token", "expert_size", "shared_size", *DELTA_SIZES,
)  # fmt: skip
_MAX_LAYERS = 10_000  # far beyond any model; every layer takes memory before a weight is read


def model_sizes(reader: ConfigReader, family: Family) -> dict[str, int]:
    """The sizes of a ModelConfig by name, and num_layers."""
    quantities = (name for name in family.fields if name not in ("activation", "eps"))
    values = {name: reader.get(*family.fields[name]) for name in quantities}
    sizes = {
        name: reader.size(family.fields[name][0], values[name])
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads")
    }
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    if sizes["num_layers"] > _MAX_LAYERS:
        reader.refuse(family.fields["num_layers"][0], f"at most {_MAX_LAYERS:,} layers")
    kv_heads = reader.size("num_key_value_heads", _or(values.get("num_kv_heads"), heads))
    intermediate = reader.size(family.fields["intermediate_size"][0], _or(values["intermediate_size"], 4 * hidden))
    context = reader.size(family.fields["context"][0], values["context"])
    if values.get("head_dim") is None and hidden % heads:
        reader.refuse(family.fields["num_heads"][0], f"a divisor of hidden size {hidden} (or an explicit head_dim)")
    head_dim = reader.size("head_dim", _or(values.get("head_dim"), hidden // heads))
    if heads % kv_heads:
        reader.refuse("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads)
    for name in _OPTIONAL_SIZES:
        on = _is_on(reader, family.flags[name]) if name in family.flags else values.get(name)
        if name in values:
            sizes[name] = reader.size(family.fields[name][0], values[name]) if on else 0
    if values.get("shared_experts"):  # as one of their size all together
        count = reader.size(family.fields["shared_experts"][0], values["shared_experts"])
        sizes["shared_size"] = count * sizes["expert_size"]
    if sizes.get("key_heads") and sizes["value_heads"] % sizes["key_heads"]:
        reader.refuse(family.fields["value_heads"][0], f"a multiple of {family.fields['key_heads'][0]}")
    return sizes | {
        "num_kv_heads": kv_heads,
        "intermediate_size": intermediate,
        "context": context,
        "head_dim": head_dim,
    }


def model_flags(reader: ConfigReader, family: Family, sizes: Mapping[str, int]) -> frozenset[str]:
    """The flags of recipes that the config sets, and the sizes that may be 0 and are not."""
    found = {flag for flag, source in family.flags.items() if _is_on(reader, source)}
    return frozenset(found | {name for name in _OPTIONAL_SIZES if sizes.get(name)})


def _is_on(reader: ConfigReader, source: str | bool | tuple[str, bool]) -> bool:
    """Whether a flag is set."""
    key, absent = source if isinstance(source, tuple) else (source, False)
    return reader.switch(key, absent) if isinstance(key, str) else key


def _or(value: Any, default: int) -> Any:
    """A field that may be null. Zero is not null."""
    return default if value is None else value
