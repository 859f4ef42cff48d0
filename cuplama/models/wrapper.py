"""Models of text and more, of which the text part runs: its settings, and the family's names for its tensors."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from ..quant.tensor import Tensor
from . import families
from .config_reader import ConfigReader
from .family import Family, Wrapper

__all__ = ["open_config", "own_name", "text_tensors", "without"]

_log = logging.getLogger("cuplama")
# The fields beside ``text_config`` that count for the text part, and win over its own, as in transformers 5.24: a
# model's dtype, the tying of its head and its quantisation are read of the whole model's config, and so are token ids,
# unless only the text part has them. "quantization", "compression_config" and "transformers_weights" are refused.
_OUTER = (
    "dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "quantization_config",
    "quantization", "compression_config", "transformers_weights",
)  # fmt: skip


def open_config(raw: Mapping[str, Any], where: str) -> tuple[ConfigReader, Wrapper | None]:
    """A reader of a config.json, or of its text part if it is a wrapper's, and that wrapper.

    Raises ConfigError for a wrapper without the settings of its text part, or with those of another family.
    """
    outer = ConfigReader(raw, where)
    wrapped = _wrapped(raw)
    if not wrapped:
        return outer, None
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        outer.refuse("text_config", f"the settings of a {' or '.join(wrapped)} model")
    kind = text.get("model_type") or (next(iter(wrapped)) if len(wrapped) == 1 else None)
    if not isinstance(kind, str) or kind not in wrapped:
        outer.refuse("text_config.model_type", ", ".join(wrapped), kind)
    family, wrapper = wrapped[kind]
    given = {key: raw[key] for key in _OUTER if raw.get(key) is not None}
    dtypes = ("dtype", "torch_dtype")  # two names of one field
    inner = {key: value for key, value in text.items() if key not in dtypes or not given.keys() & {*dtypes}}
    merged = {**inner, **given, "architectures": [family.architecture], "model_type": family.model_type}
    if "quantization_config" in merged:
        merged["quantization_config"] = _renamed(merged["quantization_config"], family, wrapper)
    return ConfigReader(merged, where, "text_config", given.keys()), wrapper


def _wrapped(raw: Mapping[str, Any]) -> dict[str, tuple[Family, Wrapper]]:
    """model_type -> (family, wrapper) of what the text part of a wrapper may be; nothing if it is none."""
    names = raw.get("architectures") or [raw.get("model_type")]
    name = names[0] if isinstance(names, list) else None
    return {
        family.model_type: (family, wrapper)
        for family in families.FAMILIES.values()
        for wrapper in family.wrappers
        if name in (*wrapper.architectures, *([] if raw.get("architectures") else [wrapper.model_type]))
    }


def _renamed(value: Any, family: Family, wrapper: Wrapper) -> Any:
    """Settings in whose lists modules have the family's names."""
    if isinstance(value, Mapping):
        return {key: _renamed(item, family, wrapper) for key, item in value.items()}
    if isinstance(value, list):
        return [own_name(item, family, wrapper) if isinstance(item, str) else item for item in value]
    return value


def own_name(name: str, family: Family, wrapper: Wrapper) -> str:
    """The family's name of a tensor or module of the text part; any other name is as it was."""
    for prefix in wrapper.prefixes:
        if name.startswith(prefix):
            return family.prefix + name.removeprefix(prefix)
    for prefix in wrapper.prefixes:  # what is not in the family's base model: the head
        outside = prefix.removesuffix(family.prefix)
        if outside not in ("", prefix) and name.startswith(outside):
            return name.removeprefix(outside)
    return name


def text_tensors(tensors: Mapping[str, Tensor], family: Family, wrapper: Wrapper) -> dict[str, Tensor]:
    """The tensors of the text part by the family's names. What of the other parts is left out is named in one warning.

    Raises CheckpointError for two tensors of one name.
    """
    found: dict[str, Tensor] = {}
    left_out = (*wrapper.left_out, *family.left_out)
    text = without(tensors, left_out, "only the text part runs; tensors of other parts are left out")
    for name, tensor in text.items():
        own = own_name(name, family, wrapper)
        if own in found:
            raise CheckpointError(f"{tensor.file}: tensor {name} is {found[own].name} once more")
        found[own] = tensor
    return found


def without(tensors: Mapping[str, Tensor], begins: Sequence[str], why: str) -> dict[str, Tensor]:
    """The tensors but those whose names begin so; one warning says why, and how many there are of each kind."""
    found: dict[str, Tensor] = {}
    others: Counter[str] = Counter()
    for name, tensor in tensors.items():
        part = next((begin for begin in begins if name.startswith(begin)), None)
        if part is None:
            found[name] = tensor
        else:
            others[part.rstrip(".")] += 1
    if others:
        _log.warning("%s: %s", why, ", ".join(f"{part} ({count})" for part, count in sorted(others.items())))
    return found
