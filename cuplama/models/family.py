"""What a model family is: the names of its ops, its config fields with their defaults, and its weight recipes.

The defaults are those of transformers for a config that leaves the field out (tests/golden/README.md lists them).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from ..ops.signature import dim_value
from ..quant.stored import Stored

__all__ = [
    "ALL_ALIKE",
    "GATES",
    "GELU",
    "HARMLESS_TENSORS",
    "NO_WINDOW",
    "OFF",
    "ONE_ROTATION",
    "RELU_SQUARED",
    "REQUIRED",
    "SILU",
    "TABLES",
    "WINDOW_BY_LAYER",
    "WINDOW_IF_USED",
    "Family",
    "Kinds",
    "Number",
    "Recipe",
    "Rotations",
    "Router",
    "Rows",
    "Windows",
    "Wrapper",
    "fields",
    "one",
    "window_by_pattern",
    "window_everywhere",
]

_Array = np.ndarray[Any, Any]
_Rows = TypeVar("_Rows", _Array, Stored)
REQUIRED = object()  # the default of a field that must be there


@dataclass(frozen=True)
class Rows:
    """The rows that a part of a weight takes of a tensor with further ones: the same in each group of its rows.

    whole: rows of the tensor; groups: how many groups they are; first: where in a group the part's begin, which are as
    many in each group. All are dim expressions, as in ``Recipe``.
    """

    whole: str
    groups: str
    first: str = "0"

    def slices(self, count: int, dims: Mapping[str, int]) -> list[slice]:
        """Where the ``count`` rows of the part are, in each group."""
        groups, first = dim_value(self.groups, dims), dim_value(self.first, dims)
        size = dim_value(self.whole, dims) // groups
        return [slice(at + first, at + first + count // groups) for at in range(0, groups * size, size)]


@dataclass(frozen=True)
class Recipe:
    """How a canonical weight is made of checkpoint tensors.

    parts: (shape, tensor name) of each tensor, stacked along the first axis; shapes are dim expressions over V
    (vocabulary), d (hidden), f (feed-forward), P (learned positions), num_heads, num_kv_heads, D (head_dim),
    num_layers, per_layer_size and per_layer_vocab (what a layer is given of a token), E (experts), e and s
    (feed-forward of an expert, and of the one that all tokens share), and of gated delta layers key_heads, value_heads,
    key_size, value_size and conv_size, as the *canonical* weight has them.

    transposed: the checkpoint stores the transpose (GPT-2's Conv1D). otherwise: a name to try when the first part's is
    not there, unless the config says that head and embedding are not tied. when: the config flag, or the size above 0,
    under which the weight exists. by_head: the checkpoint's rows are, for each key head, those of its queries, of
    itself and of its values (InternLM 2); canonical ones are all queries, all keys and all values. instead: flag of a
    layer -> the recipe that such a layer has, or None where it has no such weight. only: the flag of the layers that
    have the weight; by default all have it. rows: of each part, if it takes some rows of a tensor alone; () where all
    are whole. single: the tensor of a part is [m, 1, k] (a depthwise convolution).

    experts: the weight has one more axis in front, of experts, and the shapes are those of one expert's parts. A name
    with "{e}" is that of a tensor of each expert; any other tensor is of all experts, with that axis. merged: the name
    of one tensor of all parts and experts, which some files have in place of those. interleaved: the checkpoint's rows
    are by turns those of two matrices, which lie one below the other here (gpt-oss). row: the tensor of a part [m] is
    [1, m]. wide: the weight is float32 on a device, whatever the model's dtype.
    """

    parts: tuple[tuple[str, str], ...]
    transposed: bool = False
    otherwise: str | None = None
    when: str | None = None
    by_head: bool = False
    instead: Mapping[str, Recipe | None] = field(default_factory=dict)
    only: str | None = None
    rows: tuple[Rows | None, ...] = ()
    single: bool = False
    experts: bool = False
    interleaved: bool = False
    merged: str | None = None
    row: bool = False
    wide: bool = False

    def of_layer(self, flags: Collection[str]) -> Recipe | None:
        """The recipe that a layer with these flags has."""
        if self.only is not None and self.only not in flags:
            return None
        return next((recipe for flag, recipe in self.instead.items() if flag in flags), self)

    def as_merged(self) -> Recipe:
        """The same of the one tensor ``merged``."""
        rows, (_, *rest) = "+".join(shape.split(",")[0] for shape, _ in self.parts), self.parts[0][0].split(",")
        return replace(self, parts=((",".join((rows, *rest)), self.merged or ""),), merged=None)

    def tensor_shape(self, part: int, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the tensor of a part, as its layer has it: not transposed, of one expert."""
        m, *rest = (dim_value(d, dims) for d in self.parts[part][0].split(","))
        rows = self.rows[part] if self.rows else None
        return (m if rows is None else dim_value(rows.whole, dims), *((1,) if self.single else ()), *rest)

    def slices(self, part: int, dims: Mapping[str, int]) -> list[slice]:
        """The rows that a part takes of its tensor, in order."""
        count, rows = dim_value(self.parts[part][0].split(",")[0], dims), self.rows[part] if self.rows else None
        return [slice(0, count)] if rows is None else rows.slices(count, dims)

    def canonical(self, array: _Array, dims: Mapping[str, int], part: int = 0) -> tuple[_Array, ...]:
        """A tensor of the checkpoint, or an expert's share of it, as what is stacked to make that part of the weight.

        dims: the sizes by the names above. Views, unless rows lie head by head.
        """
        if self.rows:
            return tuple(array[rows] for rows in self.slices(part, dims))
        array = array[0] if self.row else array[:, 0] if self.single else array
        array = array[_rows_by_kind(dims)] if self.by_head else array
        return self.apart(array.T if self.transposed else array)

    def apart(self, rows: _Rows) -> tuple[_Rows, ...]:
        """Rows, as the canonical weight has them or quantised ones, in the parts that are stacked."""
        return (rows[::2], rows[1::2]) if self.interleaved else (rows,)

    def stored(self, array: _Array, dims: Mapping[str, int]) -> _Array:
        """The way back, of the whole part."""
        if self.interleaved:
            array = np.stack(np.split(array, 2), 1).reshape(array.shape)
        array = array.T if self.transposed else array
        array = array[np.argsort(_rows_by_kind(dims))] if self.by_head else array
        return array[None] if self.row else array[:, None] if self.single else array


def _rows_by_kind(dims: Mapping[str, int]) -> np.ndarray[Any, np.dtype[np.int_]]:
    """For each row of queries, keys and values its place among rows by head."""
    heads, kv_heads, size = (dims[name] for name in ("num_heads", "num_kv_heads", "D"))
    rows = np.arange((heads + 2 * kv_heads) * size).reshape(kv_heads, -1, size)
    return np.concatenate([rows[:, :-2].ravel(), rows[:, -2].ravel(), rows[:, -1].ravel()])


def one(shape: str, name: str, **options: Any) -> Recipe:
    """The recipe of a weight that is one tensor. options: the other fields of ``Recipe``."""
    return Recipe(((shape, name),), **options)


# Canonical weights whose rows are looked up.
TABLES = ("embed_tokens", "position_table", "embed_tokens_per_layer")

# Matrices by which a layer decides something: few numbers, which are never quantised.
GATES = ("router", "shared_gate")

# Tensors that files hold and that are nothing to load: leftovers of old exporters, and xIELU's constants.
HARMLESS_TENSORS = (
    r"model\.layers\.\d+\.mlp\.act_fn\.(beta|eps)",
    r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
)

# The names of activations in config.json -> ops. A gated one also multiplies by the other half of its input.
SILU = {"silu": "silu_mul", "swish": "silu_mul"}
GELU = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
}

RELU_SQUARED = {"relu2": "relu_squared"}


@dataclass(frozen=True)
class Windows:
    """A rule for sliding windows.

    reads: the fields of config.json that it goes by; rule: (config.json, number of layers) -> the window of each layer
    in tokens, 0 for full attention; others: what ``layer_types`` may call layers without attention, which have none.
    """

    reads: tuple[str, ...]
    rule: Callable[[Mapping[str, Any], int], list[int]]
    others: tuple[str, ...] = ()


def window_everywhere(absent: int | None) -> Windows:
    """``sliding_window`` in every layer. absent: the window of a config that leaves the field out."""
    return Windows(("sliding_window",), lambda raw, layers: [raw.get("sliding_window", absent) or 0] * layers)


def window_by_pattern(absent: int | None, period: int) -> Windows:
    """``sliding_window`` in the layers that ``layer_types`` names; where that is not given, in those that
    ``sliding_window_pattern`` says: n for all but every n-th, "LLLG" for L again and again, but never the last layer.

    absent, period: what a config that leaves these fields out means.
    """

    def rule(raw: Mapping[str, Any], layers: int) -> list[int]:
        window, pattern = raw.get("sliding_window", absent) or 0, raw.get("sliding_window_pattern", period)
        if not window:
            return [0] * layers
        if types := raw.get("layer_types"):
            local = [kind == "sliding_attention" for kind in types]
        elif isinstance(pattern, str):
            local = [pattern[i % len(pattern)] == "L" and i + 1 < layers for i in range(layers)]
        else:
            local = [(i + 1) % pattern > 0 for i in range(layers)]
        return [window * here for here in local]

    return Windows(("sliding_window", "sliding_window_pattern"), rule)


def _from_a_layer_on(raw: Mapping[str, Any], layers: int) -> list[int]:
    window = raw.get("sliding_window", 4096) or 0 if raw.get("use_sliding_window", False) else 0
    types = raw.get("layer_types")
    first = 28 if raw.get("max_window_layers") is None else raw["max_window_layers"]
    return [window if (types[i] == "sliding_attention" if types else i >= first) else 0 for i in range(layers)]


# Full attention in every layer.
NO_WINDOW = Windows((), lambda raw, layers: [0] * layers)
# Qwen: the layers that ``layer_types`` names, or those from ``max_window_layers`` on, if the window is on.
WINDOW_BY_LAYER = Windows(("sliding_window", "use_sliding_window", "max_window_layers"), _from_a_layer_on)
# The same for every layer, if the window is on.
WINDOW_IF_USED = Windows(
    ("sliding_window", "use_sliding_window"),
    lambda raw, layers: [raw.get("sliding_window", 4096) or 0 if raw.get("use_sliding_window") else 0] * layers,
)


@dataclass(frozen=True)
class Rotations:
    """A rule for the rotations of layers.

    reads: the fields of config.json that it goes by; rule: (config.json, the window of each layer) -> for each layer
    the key of its settings in ``rope_parameters``, "" where these are one object for all layers, None for a layer
    without rotation; settings: (config.json) -> ``rope_parameters`` by these keys, where a config has other names for
    them; defaults: of settings that a config gives nowhere; harmless: further settings that change nothing.
    """

    reads: tuple[str, ...]
    rule: Callable[[Mapping[str, Any], Sequence[int]], list[str | None]]
    settings: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()


ONE_ROTATION = Rotations((), lambda raw, windows: [""] * len(windows))


@dataclass(frozen=True)
class Kinds:
    """A rule for what else differs from layer to layer.

    reads: the fields of config.json that it goes by; rule: (config.json, the window of each layer) -> for each layer
    the fields of ``Layer`` that it has beside window and rotation.
    """

    reads: tuple[str, ...]
    rule: Callable[[Mapping[str, Any], Sequence[int]], Sequence[Mapping[str, Any]]]


ALL_ALIKE = Kinds((), lambda raw, windows: [{}] * len(windows))


@dataclass(frozen=True)
class Number:
    """A number that the mathematics needs, as config.json gives it.

    key: its field, "rope_parameters.NAME" for one of an object's, or None for a constant; default: the value of a field
    that is absent, or the constant; make: from the value to the number, which must be positive. Where the field is null
    the number has no effect.
    """

    key: str | None
    default: Any = REQUIRED
    make: Callable[[float], float] = float


@dataclass(frozen=True)
class Router:
    """How the experts of a token are chosen.

    op: of ops/route.py; settings: its attribute -> the value of it; a field of config.json that is a whole number or a
    switch, with the default of an absent one; or a ``Number``. Where a field is null the op's own default counts.
    """

    op: str = "route"
    settings: Mapping[str, int | tuple[str, Any] | Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Wrapper:
    """A model of text and more, of which the text part runs: its settings are ``text_config``.

    architectures, model_type: its names in the outer config.json; prefixes: of its text part's tensors, in place of the
    family's own; left_out: what the names of the other parts' tensors begin with.
    """

    architectures: tuple[str, ...]
    model_type: str
    prefixes: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One architecture.

    architecture, model_type: its names in config.json; weights: canonical name -> recipe, "{i}" standing for the layer;
    fields: quantity -> (config field, default of an absent one); activations: name in config.json -> op; embed, norm:
    op names; rotary: whether positions are rotations; prefix: of tensor names, which bare exports leave out; windows:
    the rule for sliding windows; flags: flag of a recipe -> the config field that sets it, false where it is absent or
    with the value that it then has, or a constant; one with the name of a size that may be 0 switches that; rope_types:
    those that it may have; rope_aliases: other names of rope types; partial_rotary: whether a part of the head may stay
    unrotated; original_context: its own default of original_max_position_embeddings; neutral, ignored: further fields
    as in ``NEUTRAL`` and ``HARMLESS`` of config_fields.py; tied: whether head and embedding are one matrix where a
    config of a model without a head does not say; norm_offset: what is added to the weights of norms; rope: the op that
    rotates; rotations, kinds: the rules for those of layers, and for what else differs among these; numbers: fields of
    ModelConfig that are multipliers and limits -> how config.json gives them; wrappers: models of which this is the
    text part; router: of models with experts; aliases: other names of fields, as other versions of transformers write
    them, -> the names that are used here; left_out: what the names of tensors begin with that are of no layer of the
    model, "{num_layers}" standing for its number.

    Weights say the rest (graph.py): which norms a layer has, and where; whether its MLP is gated; whether queries and
    keys are normalised; whether what attention gives has a gate; whether experts are its MLP. A layer with the flag
    "delta" has a gated delta rule in place of attention. Flags: "parallel", for attention and MLP side by side;
    "qk_norm_after_rope"; "v_norm", for values that are normalised with them, without a weight.
    """

    architecture: str
    model_type: str
    weights: Mapping[str, Recipe]
    fields: Mapping[str, tuple[str, Any]]
    activations: Mapping[str, str] = field(default_factory=lambda: SILU)
    embed: str = "embedding"
    norm: str = "rms_norm"
    rotary: bool = True
    prefix: str = "model."
    windows: Windows = NO_WINDOW
    flags: Mapping[str, str | bool | tuple[str, bool]] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    partial_rotary: bool = False
    original_context: int | None = None
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    tied: bool = False
    norm_offset: float = 0.0
    rope: str = "rope"
    rotations: Rotations = ONE_ROTATION
    kinds: Kinds = ALL_ALIKE
    numbers: Mapping[str, Number] = field(default_factory=dict)
    wrappers: tuple[Wrapper, ...] = ()
    router: Router = field(default_factory=Router)
    aliases: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


# Llama's: quantity -> (its field in config.json, the default of an absent one).
_FIELDS: Mapping[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", REQUIRED),
    "hidden_size": ("hidden_size", REQUIRED),
    "intermediate_size": ("intermediate_size", REQUIRED),
    "num_layers": ("num_hidden_layers", REQUIRED),
    "num_heads": ("num_attention_heads", REQUIRED),
    "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "eps": ("rms_norm_eps", 1e-6),
    "context": ("max_position_embeddings", 2048),
    "activation": ("hidden_act", "silu"),
}


def fields(**defaults: Any) -> dict[str, tuple[str, Any]]:
    """Llama's config fields, with other defaults for those that are named as config.json names them."""
    return {name: (key, defaults.get(key, default)) for name, (key, default) in _FIELDS.items()}


# The values under which a field that would change the mathematics does not.
OFF = (None, False)
