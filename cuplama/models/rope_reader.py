"""The rotations of a config.json: rope_theta and rope_scaling of transformers 4, or rope_parameters of 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .config_reader import MAX_NUMBER, ConfigReader, is_number
from .family import Family
from .rope import ROPE_BY_LENGTH, ROPE_HARMLESS, ROPE_KEYS, ROPE_LEFT_OUT, Rope

__all__ = ["rotations"]


def rotations(
    reader: ConfigReader, family: Family, windows: Sequence[int], head_dims: Sequence[int], context: int
) -> list[Rope | None]:
    """The rotation of each layer by the family's rule, None for none. windows, head_dims: of the layers.

    Raises ConfigError naming the setting, its value and what is supported.
    """
    rule = family.rotations
    keys = reader.ruled(rule.reads, lambda: rule.rule(reader.raw, windows), len(windows))
    name, by_key = _settings(reader, family)
    found: dict[tuple[str, int], Rope] = {}
    layers = [None if key is None else (key, size) for key, size in zip(keys, head_dims, strict=True)]
    for key, head_dim in dict.fromkeys(layer for layer in layers if layer is not None):
        if key not in by_key:
            supported = f"settings for {key} in it" if key else "one object of settings (not one per layer type)"
            reader.refuse(name, supported)
        given = by_key[key] or {}
        if not isinstance(given, Mapping):
            reader.refuse(f"{name}.{key}", "an object of settings", given)
        found[key, head_dim] = _One(reader, family, name, key).rope(dict(given), head_dim, context)
    several = any(rope != other for rope in found.values() for other in found.values())
    for (key, _), rope in found.items():
        if several and rope.type in ROPE_BY_LENGTH:
            types = (kind for kind in family.rope_types if kind not in ROPE_BY_LENGTH)
            reader.refuse(f"{name}.{key}.rope_type", f"{', '.join(types)} beside another rotation", rope.type)
    return [None if layer is None else found[layer] for layer in layers]


def _settings(reader: ConfigReader, family: Family) -> tuple[str, Mapping[str, Any]]:
    """(field, settings by the keys of the family's rule): "" for settings that are one object."""
    older, newer = (reader.raw.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    name, settings = ("rope_scaling", older) if older else ("rope_parameters", newer)
    for field, value in (("rope_scaling", older), ("rope_parameters", newer)):
        if not isinstance(value, dict):
            reader.refuse(field, "an object of settings")
    rule = family.rotations
    if (own := rule.settings) is not None:
        return name, reader.ruled((name, *rule.reads), lambda: own(reader.raw))
    if older and newer and older != newer:  # transformers reads the older name where both are given
        reader.dropped.append("rope_parameters")
    if not any(isinstance(value, dict) for value in settings.values()):
        return name, {"": settings}
    if not all(isinstance(value, dict | None) for value in settings.values()):
        reader.refuse(name, "one object of settings, or one per layer type, but not both")
    return name, settings


@dataclass(frozen=True)
class _One:
    """Reads one rotation. name: the field that it is in; key: its own in there, "" where the field has no others."""

    reader: ConfigReader
    family: Family
    name: str
    key: str

    @property
    def path(self) -> str:
        return f"{self.name}.{self.key}" if self.key else self.name

    def rope(self, settings: dict[str, Any], head_dim: int, context: int) -> Rope:
        """The rotation that settings describe, which it empties of what is no key of the type."""
        family, refuse = self.family, self.reader.refuse
        theta = self._inherited(settings, "rope_theta", 10000.0)
        if not is_number(theta) or theta <= 1:
            refuse("rope_theta", "a number > 1", theta)
        kind = settings.pop("rope_type", settings.pop("type", None)) or "default"
        kind = family.rope_aliases.get(kind, kind) if isinstance(kind, str) else kind
        if kind not in family.rope_types:
            refuse(f"{self.path}.rope_type", ", ".join(family.rope_types), kind)
        partial = self._inherited(settings, "partial_rotary_factor", None)
        partial = 1.0 if partial is None else partial
        if not is_number(partial) or not 0 < partial <= 1:
            refuse("partial_rotary_factor", "a number in (0, 1]", partial)
        if "partial_rotary_factor" in ROPE_KEYS[kind][1]:
            settings["partial_rotary_factor"], partial = partial, 1.0
        if partial != 1 and not family.partial_rotary:
            refuse("partial_rotary_factor", f"1 for {family.model_type}", partial)
        dim = int(head_dim * partial)
        minimum = 4 if kind in ("dynamic", "ntk_alpha") else 2  # their exponent is dim / (dim - 2)
        if dim % 2 or dim < minimum:
            refuse("head_dim", f"an even number of rotated elements >= {minimum}", dim)
        original = self._original(settings, context)
        self._drop(settings)
        if kind == "longrope" and original < 2:  # its attention factor divides by log(original)
            refuse("original_max_position_embeddings", "a whole number >= 2", original)
        self._check_keys(kind, settings, dim)
        return Rope(kind, float(theta), dim, context, original, settings)

    def _inherited(self, settings: dict[str, Any], name: str, otherwise: Any) -> Any:
        """A setting, which config.json may have at its top, and a default of the family's."""
        return settings.pop(name, self.reader.raw.get(name, self.family.rotations.defaults.get(name, otherwise)))

    def _original(self, settings: dict[str, Any], context: int) -> int:
        """The context before scaling. A top-level original_max_position_embeddings wins over the one among settings
        that are one object, as in transformers, which among several reads each one's own."""
        name = "original_max_position_embeddings"
        outer = () if self.key else (self.reader.raw.get(name), self.family.original_context)
        found = next(c for c in (*outer, settings.pop(name, None), context) if c is not None)
        return self.reader.size(name, int(found) if isinstance(found, float) and found.is_integer() else found)

    def _drop(self, settings: dict[str, Any]) -> None:
        """Empty settings of what changes nothing here, or is read as a number of the model's."""
        left_out = [name for name in ROPE_LEFT_OUT if settings.pop(name, None) is not None]
        self.reader.dropped += [f"{self.path}.{name}" for name in left_out]
        numbers = (str(number.key).rpartition(".") for number in self.family.numbers.values())
        for name in (
            *ROPE_HARMLESS,
            *self.family.rotations.harmless,
            *(key for path, _, key in numbers if path == self.path),
        ):
            settings.pop(name, None)

    def _check_keys(self, kind: str, settings: Mapping[str, Any], dim: int) -> None:
        required, optional = ROPE_KEYS[kind]
        for name in sorted(required - settings.keys()):
            path = self.reader.path(f"{self.path}.{name}")
            raise ConfigError(f"{self.reader.where}: {path} is missing; rope type {kind} needs it")
        for name in sorted(settings.keys() - required - optional):
            supported = ", ".join(sorted(required | optional)) or "no setting"
            self.reader.refuse(f"{self.path}.{name}", f"{supported} for {kind}", settings[name])
        nullable = optional | ({"factor"} if kind == "yarn" else frozenset[str]())
        for name, value in settings.items():
            ok, wanted = _allowed(name, value, dim)
            if not ok and not (value is None and name in nullable):
                self.reader.refuse(f"{self.path}.{name}", wanted, value)
        if kind == "llama3" and settings["high_freq_factor"] <= settings["low_freq_factor"]:
            wanted = f"a number > low_freq_factor = {settings['low_freq_factor']}"
            self.reader.refuse(f"{self.path}.high_freq_factor", wanted, settings["high_freq_factor"])


def _allowed(name: str, value: Any, dim: int) -> tuple[bool, str]:
    """(whether a setting may have that value, what it may be). dim: rotated elements."""
    if name in ("short_factor", "long_factor"):
        ok = isinstance(value, list) and len(value) == dim // 2
        return ok and all(is_number(x) and x > 1 / MAX_NUMBER for x in value), f"a list of {dim // 2} positive numbers"
    if name == "truncate":
        return isinstance(value, bool), "true, false"
    if name == "factor":
        return is_number(value) and value >= 1, "a number >= 1"
    if name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        return is_number(value) and value >= 0, "a number >= 0"
    return is_number(value) and value > 1 / MAX_NUMBER, "a positive number"
