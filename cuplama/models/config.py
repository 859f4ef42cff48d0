"""config.json -> ModelConfig. Whatever is not supported is refused by name; nothing is silently ignored."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..files import is_missing, read_json
from ..gguf import is_gguf, open_gguf
from ..ops import OPS
from ..ops.signature import dim_names, dim_value
from ..quant.readers import settings_beside
from .config_reader import ConfigReader, is_number
from .config_sizes import DELTA_SIZES, model_flags, model_sizes
from .family import Family, Recipe, Wrapper
from .lora import Adapter, LowRank, part_rows
from .rope import Rope
from .rope_reader import rotations
from .wrapper import open_config

__all__ = ["Layer", "ModelConfig", "load_config", "parse_config", "token_ids"]

_log = logging.getLogger("cuplama")
# What a folder without a config.json may hold, and what to do about it.
_INSTEAD = {
    "adapter_config.json": "an adapter; give its base model to -m and this folder to --adapter, or cuplama merge both",
    "quantize.json": "the model is not finished; run the same cuplama quantize again",
    "merge.json": "the model is not finished; run the same cuplama merge again",
    "params.json": "a checkpoint in the layout of its makers; look for the one in Hugging Face layout",
    "*.gguf": "a GGUF file is a model by itself; name it",
    "snapshots/*/config.json": "give that folder",
}


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer.

    window: the tokens that attention sees, a token itself included, 0 for all; rope: its rotation, None for none;
    head_dim, num_kv_heads, intermediate_size: its own sizes, None where they are the model's; kv_layer: the earlier
    layer whose keys and values it attends to, None for its own; flags: which of its weights are made in another way
    than those of most layers (``Recipe.instead``).
    """

    window: int = 0
    rope: Rope | None = None
    head_dim: int | None = None
    num_kv_heads: int | None = None
    intermediate_size: int | None = None
    kv_layer: int | None = None
    flags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape. Sizes are element counts.

    eps: of the norms; context: the positions the model was made for; activation: an op name; layers: what differs from
    layer to layer; tied: whether head and embedding are one matrix, None where the config does not say; flags: which
    optional weights exist; dtype: of the checkpoint as config.json states it ("bfloat16", ...), or None; bos, eos:
    token ids; raw: all of config.json, and ``quantization_config`` also where a file of its own holds it; adapter: what
    is added to linear layers, see lora.py; wrapper: the model of which this is the text part, then ``raw`` is what a
    model of the text part alone would have.

    What some families multiply or limit: embedding_scale, of the embedding's rows; residual_scale, of what a layer adds
    to the residual stream; attention_scale, of queries times keys, 0 for head_dim^-0.5; logits_scale; attention_cap,
    logits_cap, the soft limits of scores and of logits, 0 for none; query_temperature, query_context: queries at
    position p are multiplied by 1 + query_temperature * log(1 + p // query_context).

    per_layer_size: of what each layer is given beside the residual stream, 0 for nothing; per_layer_vocab: tokens that
    have an embedding for that.

    Of gated delta layers: key_heads, value_heads of them, key_size, value_size of one, and conv_size, the tokens that
    their convolution sees; 0 where no layer is such.

    experts, experts_per_token: how many the layers of experts have, and how many of them compute a token; expert_size,
    shared_size: the feed-forward size of one, and of what all tokens share beside them, 0 for nothing; router: the
    attributes of the op that chooses them; router_scale: what its logits are multiplied by; swiglu_alpha, swiglu_limit:
    of a clamped activation (ops/experts.py), 0 for others.
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
    adapter: Adapter | None = field(default=None, repr=False)
    wrapper: Wrapper | None = field(default=None, repr=False)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float = 0.0
    logits_scale: float = 1.0
    attention_cap: float = 0.0
    logits_cap: float = 0.0
    query_temperature: float = 0.0
    query_context: float = 0.0
    per_layer_size: int = 0
    per_layer_vocab: int = 0
    key_heads: int = 0
    value_heads: int = 0
    key_size: int = 0
    value_size: int = 0
    conv_size: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_size: int = 0
    swiglu_alpha: float = 0.0
    swiglu_limit: float = 0.0
    router: Mapping[str, float] = field(default_factory=dict)
    router_scale: float = 1.0

    def __repr__(self) -> str:
        experts = f"{self.experts} experts of {self.expert_size}, " if self.experts else ""
        return (
            f"<ModelConfig {self.architecture}: {self.num_layers} layers of {self.hidden_size}, "
            f"{self.num_heads} heads and {self.num_kv_heads} KV heads of {self.head_dim}, {experts}"
            f"feed-forward {self.intermediate_size}, "
            f"vocabulary {self.vocab_size}, context {self.context}>"
        )

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @cached_property
    def ropes(self) -> Mapping[str, Rope]:
        """The distinct rotations of the layers by the name of their tables: "rope", for further ones "rope1", ..."""
        found: list[Rope] = []
        for layer in self.layers:
            if layer.rope is not None and layer.rope not in found:
                found.append(layer.rope)
        return {f"rope{i or ''}": rope for i, rope in enumerate(found)}

    def rope_name(self, layer: int) -> str | None:
        """The name in ``ropes`` of a layer's rotation, or None for a layer without."""
        return next((name for name, rope in self.ropes.items() if rope == self.layers[layer].rope), None)

    @property
    def head_is_tied(self) -> bool:
        """Whether head and embedding are one matrix as far as no weights show it: what the config says, or what its
        family has without saying."""
        return self.family.tied if self.tied is None else self.tied

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each layer in tokens, 0 for none."""
        return tuple(layer.window for layer in self.layers)

    @property
    def stored(self) -> str:
        """The checkpoint's dtype by the config, as ops name it; float32 where the config does not say."""
        return {"float16": "f16", "bfloat16": "bf16"}.get(self.dtype or "", "f32")

    def dims(self, weight: str = "") -> dict[str, int]:
        """The sizes by the names that weight recipes use. weight: a canonical name, "3.qkv_proj" or "3." of a layer:
        then those of its layer, where it has its own."""
        number = weight.partition(".")[0]
        layer = self.layers[int(number)] if number.isdigit() else Layer()
        return {
            "V": self.vocab_size,
            "d": self.hidden_size,
            "f": layer.intermediate_size or self.intermediate_size,
            "P": self.context,
            "num_heads": self.num_heads,
            "num_kv_heads": layer.num_kv_heads or self.num_kv_heads,
            "D": layer.head_dim or self.head_dim,
            "num_layers": self.num_layers,
            "per_layer_size": self.per_layer_size,
            "per_layer_vocab": self.per_layer_vocab,
            **{name: getattr(self, name) for name in DELTA_SIZES},
            "E": self.experts,
            "e": self.expert_size,
            "s": self.shared_size,
        }

    @cached_property
    def caches(self) -> Mapping[int, tuple[int, int]]:
        """Layer -> (key/value heads, their size), for the layers that have keys and values of their own."""
        own = (i for i, layer in enumerate(self.layers) if layer.kv_layer is None and "delta" not in layer.flags)
        dims = {i: self.dims(f"{i}.") for i in own}
        return {i: (sizes["num_kv_heads"], sizes["D"]) for i, sizes in dims.items()}

    @cached_property
    def delta_layers(self) -> tuple[int, ...]:
        """The layers that have a state of each sequence in place of keys and values."""
        return tuple(i for i, layer in enumerate(self.layers) if "delta" in layer.flags)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of one sequence in one of those layers: the last inputs of the convolution, in the dtype of activations, and
        the state, float32."""
        channels = 2 * self.key_heads * self.key_size + self.value_heads * self.value_size
        return (self.conv_size - 1, channels), (self.value_heads, self.key_size, self.value_size)

    @cached_property
    def head_dims(self) -> frozenset[int]:
        """The sizes of heads of all layers."""
        return frozenset(layer.head_dim or self.head_dim for layer in self.layers)

    @property
    def kv_size(self) -> int:
        """Numbers that the keys and values of one token are, of all layers together."""
        return sum(2 * heads * size for heads, size in self.caches.values())

    def every_kind(self) -> ModelConfig:
        """The same model with one layer of each kind: every two differ in something."""
        kinds = [layer for i, layer in enumerate(self.layers) if layer not in self.layers[:i]]
        for i, layer in enumerate(kinds):
            if layer.kv_layer is not None:
                kinds[i] = replace(layer, kv_layer=kinds.index(self.layers[layer.kv_layer]))
        return replace(self, layers=tuple(kinds))

    def recipes(self) -> dict[str, Recipe]:
        """Canonical weight name -> recipe, for the weights that this model has, with layer numbers filled in.

        Those of an adapter come last; their tensors are in its own file.
        """
        found = self.own_recipes()
        return found if self.adapter is None else found | self.adapter.recipes(found)

    def own_recipes(self) -> dict[str, Recipe]:
        """The same without an adapter."""
        found = {}
        for name, recipe in self.family.weights.items():
            if recipe.when is not None and recipe.when not in self.flags:
                continue
            for i in range(self.num_layers) if "{i}" in name else (0,):
                chosen = recipe.of_layer(self.layers[i].flags) if "{i}" in name else recipe
                if chosen is not None:
                    found[name.replace("{i}", str(i))] = replace(
                        chosen,
                        parts=tuple((shape, tensor.replace("{i}", str(i))) for shape, tensor in chosen.parts),
                        otherwise=None if self.tied is False else chosen.otherwise,
                        merged=None if chosen.merged is None else chosen.merged.replace("{i}", str(i)),
                        when=None,
                        instead={},
                        only=None,
                    )
        return found

    def unused_tensors(self) -> set[str]:
        """Names of tensors that layers of another kind have, and that a layer has no use for: files may hold them. A
        layer with a gated delta rule is another layer altogether."""
        alike = replace(self, layers=tuple(replace(layer, flags=layer.flags & {"delta"}) for layer in self.layers))
        named, used = (
            {tensor for recipe in config.own_recipes().values() for _, tensor in recipe.parts}
            for config in (alike, self)
        )
        return named - used

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical weight name -> shape. A head that is tied to the embedding is listed under both names."""
        shapes = {}
        for name, recipe in self.recipes().items():
            dims = self.dims(name)
            parts = [tuple(dim_value(x, dims) for x in shape.split(",")) for shape, _ in recipe.parts]
            shape = (sum(p[0] for p in parts), *parts[0][1:])
            shapes[name] = (self.experts, *shape) if recipe.experts else shape
        return shapes

    def wide_weights(self) -> frozenset[str]:
        """The canonical names of those that a device holds in float32, whatever the model's dtype."""
        return frozenset(name for name, recipe in self.own_recipes().items() if recipe.wide)

    def parameters(self, tied: bool, active: bool = False) -> int:
        """How many numbers the model's own tensors hold, each once. tied: whether head and embedding are one matrix;
        active: only of the experts that compute a token, with everything else."""
        found, experts = dict[str, int](), self.experts_per_token if active else self.experts
        for name, recipe in self.own_recipes().items():
            if name != "lm_head" or not tied:
                dims, times = self.dims(name), experts if recipe.experts else 1
                for i, (_, tensor) in enumerate(recipe.parts):
                    found[tensor] = times * math.prod(recipe.tensor_shape(i, dims))
        return sum(found.values())

    @cached_property
    def low_ranks(self) -> Mapping[str, LowRank]:
        """Canonical weight name -> what the adapter adds to it."""
        return {} if self.adapter is None else self.adapter.matrices(self.own_recipes())

    def adapter_weights(self) -> list[str]:
        """Canonical names of the adapter's own weights; none without one."""
        return [f"{name}.lora_{which}" for name in self.low_ranks for which in "ab"]

    def lora_parts(self) -> dict[str, np.ndarray[Any, Any]]:
        """The values of an adapter that no file holds: ``X.lora_part``, int32 [rows of X]; see lora.py."""
        recipes = self.own_recipes()
        return {f"{name}.lora_part": part_rows(recipes[name], self.dims(name)) for name in self.low_ranks}


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """The ids of an eos_token_id-like field: null, a number or a list of numbers."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise ConfigError(f"{where} is {value!r}; it must be a token id or a list of token ids")
    return tuple(i for i in ids if i >= 0)


def load_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` of a model folder, or the metadata of a GGUF file.

    Raises ConfigError naming the field, its value and what is supported, and CheckpointError for a damaged GGUF file.
    """
    if is_gguf(folder):
        from .gguf import gguf_config  # here, as wherever files are told apart: folders do not wait for it

        return parse_config(gguf_config(open_gguf(folder)), str(folder))
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    path = folder / "config.json"
    if is_missing(path):
        found = (
            f"{p.relative_to(folder)} is here: {hint}"
            for pattern, hint in _INSTEAD.items()
            for p in folder.glob(pattern)
        )
        raise ConfigError("; ".join([f"{path} does not exist", *itertools.islice(found, 1)]))
    raw = read_json(path)
    if raw.get("quantization_config") is None and (settings := settings_beside(folder)) is not None:
        raw["quantization_config"] = settings
    return parse_config(raw, str(path))


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """A ModelConfig from the content of a config.json. ``where`` names it in errors.

    Raises ConfigError. What nothing here reads, though it may mean something, is named in one warning.
    """
    reader, wrapper = open_config(raw, where)
    name, family = reader.family()
    given = reader.raw
    reader.rename(family.aliases)
    reader.neutral(family)
    reader.quantised()
    sizes: dict[str, Any] = dict(model_sizes(reader, family))
    layers = _layers(reader, family, sizes)
    del sizes["num_layers"]
    activation = reader.get(*family.fields["activation"])
    if not isinstance(activation, str) or activation not in family.activations:
        reader.refuse(family.fields["activation"][0], ", ".join(family.activations))
    eps = reader.get(*family.fields["eps"])
    if not is_number(eps) or eps < 0:
        reader.refuse(family.fields["eps"][0], "a number >= 0")
    numbers: dict[str, Any] = {}
    for quantity, source in family.numbers.items():
        if (number := reader.number(source)) is not None:
            numbers[quantity] = number
    router = _router(reader, family, sizes, any("sparse" in layer.flags for layer in layers))
    if left_out := reader.left_out(family):
        _log.warning("%s: fields that nothing reads are left out: %s", where, ", ".join(left_out))
    return ModelConfig(
        architecture=family.architecture,
        family=family,
        **sizes,
        **numbers,
        eps=float(eps),
        activation=family.activations[activation],
        layers=layers,
        tied=reader.tied(name, family),
        flags=model_flags(reader, family, sizes),
        dtype=reader.dtype(),
        bos=next(iter(_ids(reader, "bos_token_id")), None),
        eos=_ids(reader, "eos_token_id"),
        raw=given,
        wrapper=wrapper,
        router=router,
    )


def _layers(reader: ConfigReader, family: Family, sizes: Mapping[str, int]) -> tuple[Layer, ...]:
    windows, rule = reader.windows(family, sizes["num_layers"]), family.kinds
    kinds = reader.ruled(rule.reads, lambda: rule.rule(reader.raw, windows), len(windows))
    layers = tuple(Layer(window, **kind) for window, kind in zip(windows, kinds, strict=True))
    if not family.rotary:
        return layers
    head_dims = [layer.head_dim or sizes["head_dim"] for layer in layers]
    ropes = rotations(reader, family, windows, head_dims, sizes["context"])
    return tuple(replace(layer, rope=rope) for layer, rope in zip(layers, ropes, strict=True))


def _router(reader: ConfigReader, family: Family, sizes: Mapping[str, int], sparse: bool) -> dict[str, float]:
    """The attributes of the op that chooses experts, which must be such that it can; none for a model without.
    sparse: whether there are layers that have experts and nothing else."""
    if not sizes.get("experts") and not sparse:
        return {}
    for name in ("experts", "experts_per_token", "expert_size"):
        reader.size(family.fields[name][0], sizes.get(name))
    op, settings = OPS[family.router.op], family.router.settings
    given = {"k": sizes["experts_per_token"], **{name: reader.setting(source) for name, source in settings.items()}}
    found = {name: value for name, value in given.items() if value is not None}
    env = {"E": sizes["experts"], **op.signature.defaults, **found}
    for rule in ("k <= E", *op.rules):
        if not dim_value(rule, env):
            shown = ", ".join(f"{name} = {env[name]}" for name in dim_names(rule))
            reader.refuse(family.fields["experts_per_token"][0], f"what a router can do: {rule}, with {shown} here")
    return found


def _ids(reader: ConfigReader, key: str) -> tuple[int, ...]:
    return token_ids(reader.raw.get(key), f"{reader.where}: {reader.path(key)}")
