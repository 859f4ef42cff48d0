"""config.json -> ModelConfig. Whatever is not supported is refused by name; nothing is silently ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..ops.signature import dim_value
from .families import FAMILIES
from .family import NEUTRAL, REQUIRED, Family, Recipe
from .rope import ROPE_KEYS, Rope

__all__ = ["ModelConfig", "load_config", "parse_config", "read_json", "token_ids"]


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer. window: of attention in tokens, 0 for none; rope: None without rotation."""

    window: int = 0
    rope: Rope | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape. Sizes are element counts.

    context: the positions the model was made for; activation: an op name; tied: whether head and embedding are one
    matrix, None where the config does not say; flags: which optional weights exist; dtype: of the checkpoint as
    config.json states it ("bfloat16", ...), or None; bos/eos: token ids.
    """

    architecture: str
    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    context: int
    activation: str
    layers: tuple[Layer, ...]
    tied: bool | None
    flags: frozenset[str]
    dtype: str | None
    bos: int | None
    eos: tuple[int, ...]
    raw: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def ropes(self) -> Mapping[str, Rope]:
        """The distinct rotations of the layers by the name of their tables: "rope", and "rope1", ... if there are more."""
        found: list[Rope] = []
        for layer in self.layers:
            if layer.rope is not None and layer.rope not in found:
                found.append(layer.rope)
        return {f"rope{i or ''}": rope for i, rope in enumerate(found)}

    def rope_name(self, layer: int) -> str | None:
        """The name in ``ropes`` of a layer's rotation."""
        return next((name for name, rope in self.ropes.items() if rope == self.layers[layer].rope), None)

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each layer."""
        return tuple(layer.window for layer in self.layers)

    @property
    def stored(self) -> str:
        """The checkpoint's dtype by the config, as ops name it; float32 where the config does not say."""
        return {"float16": "f16", "bfloat16": "bf16"}.get(self.dtype or "", "f32")

    def dims(self) -> dict[str, int]:
        """The sizes by the names that weight recipes use."""
        return {
            "V": self.vocab_size,
            "d": self.hidden_size,
            "f": self.intermediate_size,
            "P": self.context,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "D": self.head_dim,
        }

    def recipes(self) -> dict[str, Recipe]:
        """Canonical weight name -> recipe, for the weights that this model has, with layer numbers filled in."""
        found = {}
        for name, recipe in self.family.weights.items():
            if recipe.when is not None and recipe.when not in self.flags:
                continue
            for i in range(self.num_layers) if "{i}" in name else (0,):
                found[name.replace("{i}", str(i))] = Recipe(
                    tuple((shape, tensor.replace("{i}", str(i))) for shape, tensor in recipe.parts),
                    recipe.transposed,
                    None if self.tied is False else recipe.otherwise,
                )
        return found

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical weight name -> shape. A head that is tied to the embedding is listed under both names."""
        dims = self.dims()
        shapes = {}
        for name, recipe in self.recipes().items():
            parts = [tuple(dim_value(x, dims) for x in shape.split(",")) for shape, _ in recipe.parts]
            shapes[name] = (sum(p[0] for p in parts), *parts[0][1:])
        return shapes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ConfigError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, a number too long, too deeply nested
        raise ConfigError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """The ids of an eos_token_id-like field: null, a number or a list of numbers."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise ConfigError(f"{where} is {value!r}; it must be a token id or a list of token ids")
    return tuple(i for i in ids if i >= 0)


def load_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` of a model folder. Raises ConfigError naming the field, its value and what is supported."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    return parse_config(read_json(folder / "config.json"), str(folder / "config.json"))


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """A ModelConfig from the content of a config.json. ``where`` names it in errors."""
    reader = _Reader(raw, where)
    architecture, family = reader.family()
    for key, allowed in {**NEUTRAL, **family.neutral}.items():
        if raw.get(key) not in allowed:
            reader.refuse(key, f"{key} = {json.dumps(allowed[-1])} for {architecture}")
    values = {name: reader.get(*source) for name, source in family.fields.items()}
    sizes = {
        name: reader.size(family.fields[name][0], values[name])
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads")
    }
    hidden, heads, layers = sizes["hidden_size"], sizes["num_heads"], sizes.pop("num_layers")
    if layers > _MAX_LAYERS:
        reader.refuse(family.fields["num_layers"][0], f"at most {_MAX_LAYERS:,} layers")
    kv_heads = reader.size("num_key_value_heads", _or(values.get("num_kv_heads"), heads))
    intermediate = reader.size(family.fields["intermediate_size"][0], _or(values["intermediate_size"], 4 * hidden))
    context = reader.size(family.fields["context"][0], values["context"])
    if values.get("head_dim") is None and hidden % heads:
        reader.refuse(family.fields["num_heads"][0], f"a divisor of hidden size {hidden} (or an explicit head_dim)")
    head_dim = reader.size("head_dim", _or(values.get("head_dim"), hidden // heads))
    if heads % kv_heads:
        reader.refuse("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads)
    activation = values["activation"]
    if not isinstance(activation, str) or activation not in family.activations:
        reader.refuse(family.fields["activation"][0], ", ".join(family.activations))
    eps = values["eps"]
    if not _is_number(eps) or eps < 0:
        reader.refuse(family.fields["eps"][0], "a number >= 0")
    rope = reader.rope(family, head_dim, context) if family.rotary else None
    return ModelConfig(
        architecture=architecture,
        family=family,
        **sizes,
        num_kv_heads=kv_heads,
        intermediate_size=intermediate,
        head_dim=head_dim,
        eps=float(eps),
        context=context,
        activation=family.activations[activation],
        layers=tuple(Layer(window, rope) for window in reader.windows(family, layers)),
        tied=raw.get("tie_word_embeddings"),
        flags=frozenset(
            flag
            for flag, source in family.flags.items()
            if (reader.switch(source) if isinstance(source, str) else source)
        ),
        dtype=reader.dtype(),
        bos=next(iter(token_ids(raw.get("bos_token_id"), f"{where}: bos_token_id")), None),
        eos=token_ids(raw.get("eos_token_id"), f"{where}: eos_token_id"),
        raw=raw,
    )


def _or(value: Any, default: int) -> Any:
    """A field that may be null. Zero is not null."""
    return default if value is None else value


_HUGE = 1e30
_MAX_LAYERS = 10_000  # far beyond any model; every layer takes memory before a weight is read


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a number that float32 can compute with. (Python also reads NaN, Infinity and 10^400.)"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _HUGE


class _Reader:
    """Reads fields of one config.json and words the refusals."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def refuse(self, key: str, supported: str, value: Any = None) -> None:
        shown = json.dumps(self.raw.get(key) if value is None else value, default=str)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        raise ConfigError(f"{self.where}: {key} = {shown} is not supported; supported: {supported}")

    def family(self) -> tuple[str, Family]:
        names = self.raw.get("architectures")
        if names:
            if not isinstance(names, list) or not isinstance(names[0], str) or names[0] not in FAMILIES:
                self.refuse("architectures", ", ".join(FAMILIES))
            family = FAMILIES[names[0]]
            if (self.raw.get("model_type") or family.model_type) != family.model_type:
                self.refuse("model_type", f"{family.model_type} for {names[0]}")
            return names[0], family
        for name, family in FAMILIES.items():
            if family.model_type == self.raw.get("model_type"):
                return name, family
        if "model_type" not in self.raw:
            raise ConfigError(f"{self.where}: neither architectures nor model_type is given; is this a model's config?")
        self.refuse("model_type", ", ".join(f.model_type for f in FAMILIES.values()))
        raise AssertionError

    def get(self, key: str, default: Any) -> Any:
        if key not in self.raw:
            if default is REQUIRED:
                raise ConfigError(f"{self.where}: {key} is missing")
            return default
        if self.raw[key] is None and default is REQUIRED:
            raise ConfigError(f"{self.where}: {key} is null")
        return self.raw[key]

    def size(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value < 2**31:
            shown = json.dumps(value, default=str)
            raise ConfigError(f"{self.where}: {key} = {shown:.80} is not a positive whole number below 2^31")
        return value

    def dtype(self) -> str | None:
        """The checkpoint's dtype by either of its names, or None."""
        for key in ("dtype", "torch_dtype"):
            value = self.raw.get(key)
            if value is not None and not isinstance(value, str):
                self.refuse(key, 'a name such as "bfloat16"')
        return self.raw.get("dtype") or self.raw.get("torch_dtype")

    def switch(self, key: str) -> bool:
        """A field that is true or false; null is false."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true, false")
        return bool(value)

    def windows(self, family: Family, layers: int) -> tuple[int, ...]:
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
        windows = tuple(family.windows(self.raw, layers))
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
        """Both spellings: rope_theta + rope_scaling (transformers 4) and rope_parameters (transformers 5)."""
        key = "rope_scaling" if self.raw.get("rope_scaling") else "rope_parameters"
        settings = self.raw.get(key) or {}
        if not isinstance(settings, dict) or any(isinstance(v, dict) for v in settings.values()):
            self.refuse(key, "one object of settings (not one per layer type)")
        settings = dict(settings)
        theta = settings.pop("rope_theta", self.raw.get("rope_theta", 10000.0))
        if not _is_number(theta) or theta <= 1:
            self.refuse("rope_theta", "a number > 1", theta)
        kind = settings.pop("rope_type", settings.pop("type", None)) or "default"
        settings.pop("type", None)
        kind = family.rope_aliases.get(kind, kind) if isinstance(kind, str) else kind
        if kind not in family.rope_types:
            self.refuse(f"{key}.rope_type", ", ".join(family.rope_types), kind)
        partial = settings.pop("partial_rotary_factor", self.raw.get("partial_rotary_factor"))
        partial = 1.0 if partial is None else partial
        if not _is_number(partial) or not 0 < partial <= 1:
            self.refuse("partial_rotary_factor", "a number in (0, 1]", partial)
        if partial != 1 and not family.partial_rotary:
            self.refuse("partial_rotary_factor", f"1 for {family.model_type}", partial)
        dim = int(head_dim * partial)
        least = 4 if kind == "dynamic" else 2  # dynamic's exponent is dim / (dim - 2)
        if dim % 2 or dim < least:
            self.refuse("head_dim", f"an even number of rotated elements >= {least}", dim)
        original = self._original(family, settings, context)
        if kind == "longrope" and original < 2:  # its attention factor divides by log(original)
            self.refuse("original_max_position_embeddings", "a whole number >= 2", original)
        self._check_keys(key, kind, settings, dim)
        return Rope(kind, float(theta), dim, context, original, settings)

    def _original(self, family: Family, settings: dict[str, Any], context: int) -> int:
        """A top-level original_max_position_embeddings wins over the one among the settings, as in transformers."""
        name = "original_max_position_embeddings"
        inner = settings.pop(name, None)
        choices = (self.raw.get(name), family.original_context, inner, context)
        return self.size(name, next(c for c in choices if c is not None))

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
                    and all(_is_number(x) and x > 1 / _HUGE for x in value)
                )
                wanted = f"a list of {dim // 2} positive numbers"
            elif name == "truncate":
                ok, wanted = isinstance(value, bool), "true, false"
            elif name == "factor":
                ok, wanted = _is_number(value) and value >= 1, "a number >= 1"
            elif name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
                ok, wanted = _is_number(value) and value >= 0, "a number >= 0"
            else:
                ok, wanted = _is_number(value) and value > 1 / _HUGE, "a positive number"
            if not ok:
                self.refuse(f"{where}.{name}", wanted, value)
        if kind == "llama3" and settings["high_freq_factor"] <= settings["low_freq_factor"]:
            wanted = f"a number > low_freq_factor = {settings['low_freq_factor']}"
            self.refuse(f"{where}.high_freq_factor", wanted, settings["high_freq_factor"])
