"""Reading config.json field by field: defaults, checks, and refusals that name field, value and what is supported."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from typing import Any, NoReturn, TypeVar

from ..errors import ConfigError
from ..quant.readers import check
from . import families
from .config_fields import NEUTRAL, read_by, unclassified
from .family import REQUIRED, Family, Number

__all__ = ["MAX_NUMBER", "ConfigReader", "is_number"]

_log = logging.getLogger("cuplama")
_T = TypeVar("_T", bound=Sized)
# Class names of a supported model_type whose models are others: with another head, in both directions, with experts.
_OTHER_MODELS = re.compile(
    r"For(?!CausalLM$)|Reward|Classif|Embed|Encoder|Bidirectional|Bi(?=[A-Z])|Eagle|Medusa|Mo[eE]"
)
MAX_NUMBER = 1e30  # float32 ends at 3.4e38; products and quotients of two such numbers must not be infinite too soon


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that float32 can compute with. (Python also reads NaN, Infinity and 10^400.)"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


class ConfigReader:
    """Reads fields of one config.json. Every method raises ConfigError, which names field, value and what is supported.

    where: the file's path, for errors; within: the object of the file that the fields are in, "" for all of it;
    beside: the names of those that are not in it but beside it. raw: the fields; dropped: the names of settings of
    rotations and of quantised weights that were met and left out.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, within: str = "", beside: Collection[str] = ()) -> None:
        self.raw, self.where, self._within, self._beside = raw, where, within, beside
        self.dropped: list[str] = []
        self._spelled: dict[str, str] = {}

    def path(self, key: str) -> str:
        """The name of a field, or of a field's field, in the file."""
        key = self._spelled.get(key, key)
        inside = self._within and key.partition(".")[0].partition("[")[0] not in self._beside
        return f"{self._within}.{key}" if inside else key

    def refuse(self, key: str, supported: str, value: Any = ...) -> NoReturn:
        """Raise. supported: what the field may be; value: what it is, if not the field's own value."""
        shown = json.dumps(self.raw.get(key) if value is ... else value, default=str)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        raise ConfigError(f"{self.where}: {self.path(key)} = {shown} is not supported; supported: {supported}")

    def family(self) -> tuple[str, Family]:
        """(class name, family) by ``architectures``, or by ``model_type`` where that is not given or says no more.

        transformers goes by model_type alone. Here a class that it would load with a new, untrained head, or that
        computes something else, is refused.
        """
        names, model_type = self.raw.get("architectures"), self.raw.get("model_type")
        wrappers = {w.model_type: w.architectures for f in families.FAMILIES.values() for w in f.wrappers}
        named = next((f for f in families.FAMILIES.values() if f.model_type == model_type), None)
        if not names:
            if named is not None:
                return named.architecture, named
            if "model_type" in self.raw:
                self.refuse("model_type", ", ".join([*(f.model_type for f in families.FAMILIES.values()), *wrappers]))
            raise ConfigError(f"{self.where}: neither architectures nor model_type is given; is this a model's config?")
        known = isinstance(names, list) and isinstance(names[0], str)
        family = families.FAMILIES.get(names[0], named) if known else None
        if family is None:
            self.refuse(
                "architectures", ", ".join([*families.FAMILIES, *(name for w in wrappers.values() for name in w)])
            )
        if (model_type or family.model_type) != family.model_type:
            self.refuse("model_type", f"{family.model_type} for {names[0]}")
        if names[0] not in families.FAMILIES and _OTHER_MODELS.search(names[0]):
            self.refuse("architectures", f"{family.architecture} for {family.model_type}")
        if names[0] != family.architecture and not names[0].lower().startswith(family.model_type):
            _log.warning("%s: architectures = %r is read as %s, by model_type", self.where, names, family.architecture)
        return names[0], family

    def neutral(self, family: Family) -> None:
        """Refuse what would change the mathematics and is not read. A window that is switched off is none."""
        unread = {key: allowed for key, allowed in NEUTRAL.items() if key not in read_by(family)}
        for key, allowed in {**unread, **family.neutral}.items():
            off = key == "sliding_window" and self.raw.get("use_sliding_window") is False
            if self.raw.get(key) not in allowed and not off:
                self.refuse(key, f"{key} = {json.dumps(allowed[-1])} for {family.architecture}")

    def quantised(self) -> None:
        """Refuse what no reader of quantised weights understands."""
        self.dropped += check(self.raw.get("quantization_config"), self.where)

    def left_out(self, family: Family) -> list[str]:
        """The names of what the config says and nothing has read, sorted."""
        return sorted(self.path(name) for name in (*unclassified(self.raw, family), *self.dropped))

    def get(self, key: str, default: Any) -> Any:
        """A field's value, or the default of one that is left out; REQUIRED is none."""
        if key not in self.raw:
            if default is REQUIRED:
                raise ConfigError(f"{self.where}: {self.path(key)} is missing")
            return default
        if self.raw[key] is None and default is REQUIRED:
            raise ConfigError(f"{self.where}: {self.path(key)} is null")
        return self.raw[key]

    def size(self, key: str, value: Any) -> int:
        """A value that must be a positive whole number."""
        if type(value) is not int or not 1 <= value < 2**31:
            shown = json.dumps(value, default=str)
            raise ConfigError(f"{self.where}: {self.path(key)} = {shown:.80} is not a positive whole number below 2^31")
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

    def switch(self, key: str, absent: bool = False) -> bool:
        """A field that is true or false; null is false."""
        value = self.raw.get(key, absent)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true, false")
        return bool(value)

    def windows(self, family: Family, layers: int) -> tuple[int, ...]:
        """The window of each layer by the family's rule, which ``layer_types``, where it is given, must agree with."""
        types = self.raw.get("layer_types")
        if types is not None and (not isinstance(types, list) or len(types) != layers):
            self.refuse("layer_types", f"a list of {layers} names")
        window = self.raw.get("sliding_window")
        off = window == 0 and self.raw.get("use_sliding_window") is False  # as transformers 5 writes it for Qwen2-MoE
        if window is not None and not off and (type(window) is not int or window < 2):
            self.refuse("sliding_window", "null or a whole number >= 2")
        first = self.raw.get("max_window_layers")
        if first is not None and (type(first) is not int or first < 0):
            self.refuse("max_window_layers", "a whole number >= 0")
        self.switch("use_sliding_window")
        rule = family.windows
        windows = tuple(self.ruled(rule.reads, lambda: rule.rule(self.raw, layers), layers))
        for i, kind in enumerate(types or ()):
            kind = "full_attention" if kind == "attention" else kind  # its older name, where Mamba layers may be beside
            known = ("full_attention", "sliding_attention", *rule.others)
            if kind not in known:
                self.refuse(f"layer_types[{i}]", ", ".join(known), kind)
            if (kind == "sliding_attention") != (windows[i] > 0):
                self.refuse(
                    f"layer_types[{i}]",
                    f"{'sliding' if windows[i] else 'full'}_attention for this window setting",
                    kind,
                )
        return windows

    def ruled(self, reads: Sequence[str], rule: Callable[[], _T], layers: int | None = None) -> _T:
        """What a family's rule makes of the fields that it reads, which are to blame where it cannot.

        layers: how many layers it must make something for, if it is for layers.
        """
        try:
            found = rule()
            if layers in (None, len(found)):
                return found
            raise ValueError
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            given = {key: self.raw[key] for key in reads if key in self.raw}
            key = next(iter(given), reads[0])
            self.refuse(key, f"what goes together with {', '.join(k for k in reads if k != key) or 'the other fields'}")

    def rename(self, aliases: Mapping[str, str]) -> None:
        """Read fields under other names as those that they stand for, which errors then name as the file does."""
        raw = dict(self.raw)
        for alias, key in aliases.items():
            if raw.get(alias) is not None:
                if raw.get(key) not in (None, raw[alias]):
                    self.refuse(alias, f"the same as {key}, {json.dumps(raw[key])}")
                raw[key] = raw.pop(alias)
                self._spelled[key] = alias
        self.raw = raw

    def setting(self, source: int | tuple[str, Any] | Number) -> float | None:
        """A setting of a router, or None where its field is null."""
        if isinstance(source, Number):
            return self.number(source)
        if not isinstance(source, tuple):
            return source
        value = self.get(*source)
        if value is not None and (not isinstance(value, int) or value < 0):
            self.refuse(source[0], "true, false, or a whole number")
        return None if value is None else int(value)

    def number(self, source: Number) -> float | None:
        """A number of the mathematics, or None where its field is null: then it has no effect."""
        if source.key is None:
            return source.make(source.default)
        found: Any = self.raw
        *outer, name = source.key.split(".")
        for part in outer:
            found = found.get(part) if isinstance(found, Mapping) else None
        value = found.get(name, source.default) if isinstance(found, Mapping) else source.default
        if value is REQUIRED:
            raise ConfigError(f"{self.where}: {self.path(source.key)} is missing")
        if value is None:
            return None
        try:
            made = source.make(value) if is_number(value) else 0.0
        except (ArithmeticError, ValueError):
            made = 0.0
        if not is_number(made) or made <= 0:
            self.refuse(source.key, "a positive number", value)
        return float(made)
