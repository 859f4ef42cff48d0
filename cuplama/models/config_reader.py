"""Reading config.json field by field: defaults, checks, and refusals that name field, value and what is supported."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import ConfigError
from ..quant.readers import check
from .config_fields import NEUTRAL, unclassified
from .families import FAMILIES
from .family import REQUIRED, Family
from .rope import ROPE_HARMLESS, ROPE_KEYS, ROPE_LEFT_OUT, Rope

__all__ = ["ConfigReader", "is_number"]

_log = logging.getLogger("cuplama")
# Class names of a supported model_type whose models are others: with another head, in both directions, with experts.
_OTHER_MODELS = re.compile(
    r"For(?!CausalLM$)|Reward|Classif|Embed|Encoder|Bidirectional|Bi(?=[A-Z])|Eagle|Medusa|Mo[eE]"
)
_MAX_NUMBER = 1e30  # float32 ends at 3.4e38; products and quotients of two such numbers must not be infinite too soon


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that float32 can compute with. (Python also reads NaN, Infinity and 10^400.)"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER


class ConfigReader:
    """Reads fields of one config.json. Every method raises ConfigError, which names field, value and what is supported.

    where: the file's path, for errors.
    """

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where
        self._dropped: list[str] = []  # settings of rotations and of quantised weights that were met and left out

    def refuse(self, key: str, supported: str, value: Any = ...) -> NoReturn:
        """Raise. supported: what the field may be; value: what it is, if not the field's own value."""
        shown = json.dumps(self.raw.get(key) if value is ... else value, default=str)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        raise ConfigError(f"{self.where}: {key} = {shown} is not supported; supported: {supported}")

    def family(self) -> tuple[str, Family]:
        """(class name, family) by ``architectures``, or by ``model_type`` where that is not given or says no more.

        transformers goes by model_type alone. Here a class that it would load with a new, untrained head, or that
        computes something else, is refused.
        """
        names, model_type = self.raw.get("architectures"), self.raw.get("model_type")
        named = next((f for f in FAMILIES.values() if f.model_type == model_type), None)
        if not names:
            if named is not None:
                return named.architecture, named
            if "model_type" in self.raw:
                self.refuse("model_type", ", ".join(f.model_type for f in FAMILIES.values()))
            raise ConfigError(f"{self.where}: neither architectures nor model_type is given; is this a model's config?")
        known = isinstance(names, list) and isinstance(names[0], str)
        family = FAMILIES.get(names[0], named) if known else None
        if family is None:
            self.refuse("architectures", ", ".join(FAMILIES))
        if (model_type or family.model_type) != family.model_type:
            self.refuse("model_type", f"{family.model_type} for {names[0]}")
        if _OTHER_MODELS.search(names[0]):
            self.refuse("architectures", f"{family.architecture} for {family.model_type}")
        if not names[0].lower().startswith(family.model_type):
            _log.warning("%s: architectures = %r is read as %s, by model_type", self.where, names, family.architecture)
        return names[0], family

    def neutral(self, family: Family) -> None:
        """Refuse what would change the mathematics. A window that is switched off is none."""
        for key, allowed in {**NEUTRAL, **family.neutral}.items():
            off = key == "sliding_window" and self.raw.get("use_sliding_window") is False
            if self.raw.get(key) not in allowed and not off:
                self.refuse(key, f"{key} = {json.dumps(allowed[-1])} for {family.architecture}")

    def quantised(self) -> None:
        """Refuse what no reader of quantised weights understands."""
        self._dropped += check(self.raw.get("quantization_config"), self.where)

    def left_out(self, family: Family) -> list[str]:
        """The names of what the config says and nothing has read, sorted."""
        return sorted([*unclassified(self.raw, family), *self._dropped])

    def get(self, key: str, default: Any) -> Any:
        """A field's value, or the default of one that is left out; REQUIRED is none."""
        if key not in self.raw:
            if default is REQUIRED:
                raise ConfigError(f"{self.where}: {key} is missing")
            return default
        if self.raw[key] is None and default is REQUIRED:
            raise ConfigError(f"{self.where}: {key} is null")
        return self.raw[key]

    def size(self, key: str, value: Any) -> int:
        """A value that must be a positive whole number."""
        if type(value) is not int or not 1 <= value < 2**31:
            shown = json.dumps(value, default=str)
            raise ConfigError(f"{self.where}: {key} = {shown:.80} is not a positive whole number below 2^31")
        return value

    def tied(self, name: str, family: Family) -> bool | None:
        """Whether head and embedding are one matrix, or None: the weights show it.

        A class without a head ("LlamaModel") brings none, and transformers would make one up: there the family decides.
        """
        headless = name.endswith("Model") and not name.endswith("LMHeadModel")
        given = self.switch("tie_word_embeddings")
        if self.raw.get("tie_word_embeddings") is None:
            return family.tied if headless else None
        return given

    def dtype(self) -> str | None:
        """The checkpoint's dtype by either of its names, or None."""
        found = None
        for key in ("torch_dtype", "dtype"):
            value = self.raw.get(key)
            if value is not None and not isinstance(value, str):
                self.refuse(key, 'a name such as "bfloat16"')
            found = found if value in (None, "", "auto") else value.removeprefix("torch.")
        return found

    def switch(self, key: str) -> bool:
        """A field that is true or false; null is false."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true, false")
        return bool(value)

    def windows(self, family: Family, layers: int) -> tuple[int, ...]:
        """The window of each layer by the family's rule, which ``layer_types``, where it is given, must agree with."""
        types = self.raw.get("layer_types")
        if types is not None and (not isinstance(types, list) or len(types) != layers):
            self.refuse("layer_types", f"a list of {layers} names")
        window = self.raw.get("sliding_window")
        if window is not None and (type(window) is not int or window < 2):
            self.refuse("sliding_window", "null or a whole number >= 2")
        first = self.raw.get("max_window_layers")
        if first is not None and (type(first) is not int or first < 0):
            self.refuse("max_window_layers", "a whole number >= 0")
        self.switch("use_sliding_window")
        windows = tuple(family.windows.rule(self.raw, layers))
        for i, kind in enumerate(types or ()):
            if kind not in ("full_attention", "sliding_attention"):
                self.refuse(f"layer_types[{i}]", "full_attention, sliding_attention", kind)
            if (kind == "sliding_attention") != (windows[i] > 0):
                self.refuse(
                    f"layer_types[{i}]",
                    f"{'sliding' if windows[i] else 'full'}_attention for this window setting",
                    kind,
                )
        return windows

    def rope(self, family: Family, head_dim: int, context: int) -> Rope:
        """The rotation, spelled as transformers 4 does (rope_theta and rope_scaling) or 5 (rope_parameters)."""
        older, newer = (self.raw.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
        key, settings = ("rope_scaling", older) if older else ("rope_parameters", newer)
        if not isinstance(settings, dict) or any(isinstance(v, dict) for v in settings.values()):
            self.refuse(key, "one object of settings (not one per layer type)")
        if older and newer and older != newer:  # transformers reads the older name where both are given
            self._dropped.append("rope_parameters")
        settings = dict(settings)
        theta = settings.pop("rope_theta", self.raw.get("rope_theta", 10000.0))
        if not is_number(theta) or theta <= 1:
            self.refuse("rope_theta", "a number > 1", theta)
        kind = settings.pop("rope_type", settings.pop("type", None)) or "default"
        kind = family.rope_aliases.get(kind, kind) if isinstance(kind, str) else kind
        if kind not in family.rope_types:
            self.refuse(f"{key}.rope_type", ", ".join(family.rope_types), kind)
        partial = settings.pop("partial_rotary_factor", self.raw.get("partial_rotary_factor"))
        partial = 1.0 if partial is None else partial
        if not is_number(partial) or not 0 < partial <= 1:
            self.refuse("partial_rotary_factor", "a number in (0, 1]", partial)
        if partial != 1 and not family.partial_rotary:
            self.refuse("partial_rotary_factor", f"1 for {family.model_type}", partial)
        dim = int(head_dim * partial)
        minimum = 4 if kind == "dynamic" else 2  # dynamic's exponent is dim / (dim - 2)
        if dim % 2 or dim < minimum:
            self.refuse("head_dim", f"an even number of rotated elements >= {minimum}", dim)
        original = self._original(family, settings, context)
        self._dropped += [f"{key}.{name}" for name in ROPE_LEFT_OUT if settings.pop(name, None) is not None]
        for name in ROPE_HARMLESS:
            settings.pop(name, None)
        if kind == "longrope" and original < 2:  # its attention factor divides by log(original)
            self.refuse("original_max_position_embeddings", "a whole number >= 2", original)
        self._check_keys(key, kind, settings, dim)
        return Rope(kind, float(theta), dim, context, original, settings)

    def _original(self, family: Family, settings: dict[str, Any], context: int) -> int:
        """A top-level original_max_position_embeddings wins over the one among the settings, as in transformers."""
        name = "original_max_position_embeddings"
        inner = settings.pop(name, None)
        choices = (self.raw.get(name), family.original_context, inner, context)
        found = next(c for c in choices if c is not None)
        return self.size(name, int(found) if isinstance(found, float) and found.is_integer() else found)

    def _check_keys(self, where: str, kind: str, settings: Mapping[str, Any], dim: int) -> None:
        required, optional = ROPE_KEYS[kind]
        for name in sorted(required - settings.keys()):
            raise ConfigError(f"{self.where}: {where}.{name} is missing; rope type {kind} needs it")
        for name in sorted(settings.keys() - required - optional):
            self.refuse(
                f"{where}.{name}",
                f"{', '.join(sorted(required | optional)) or 'no setting'} for {kind}",
                settings[name],
            )
        nullable = optional | ({"factor"} if kind == "yarn" else frozenset[str]())
        for name, value in settings.items():
            if value is None and name in nullable:
                continue
            if name in ("short_factor", "long_factor"):
                ok = (
                    isinstance(value, list)
                    and len(value) == dim // 2
                    and all(is_number(x) and x > 1 / _MAX_NUMBER for x in value)
                )
                wanted = f"a list of {dim // 2} positive numbers"
            elif name == "truncate":
                ok, wanted = isinstance(value, bool), "true, false"
            elif name == "factor":
                ok, wanted = is_number(value) and value >= 1, "a number >= 1"
            elif name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
                ok, wanted = is_number(value) and value >= 0, "a number >= 0"
            else:
                ok, wanted = is_number(value) and value > 1 / _MAX_NUMBER, "a positive number"
            if not ok:
                self.refuse(f"{where}.{name}", wanted, value)
        if kind == "llama3" and settings["high_freq_factor"] <= settings["low_freq_factor"]:
            wanted = f"a number > low_freq_factor = {settings['low_freq_factor']}"
            self.refuse(f"{where}.high_freq_factor", wanted, settings["high_freq_factor"])
