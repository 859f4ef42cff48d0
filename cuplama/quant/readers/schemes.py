"""The settings of compressed-tensors: how the modules of each of its config_groups are stored, and which they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..grouping import group_size
from ..settings import Settings

__all__ = ["BLOCK", "Scheme", "Schemes", "open_schemes"]

BLOCK = 128
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_STRATEGIES = ("group", "channel", "tensor", "block")
_EMBEDDINGS = ("embed_tokens", "wte", "wpe")  # modules of class Embedding; the others that are quantised are Linear


@dataclass(frozen=True)
class Scheme:
    """How a module's weight is stored.

    packed: in words, else one number an element; bits, real: of numbers, whole ones or floats; strategy: what shares a
    scale; group: columns that do, for strategy "group"; sorted: whether groups are neighbours; activations: whether
    they were to be quantised too.
    """

    packed: bool
    bits: int
    real: bool
    symmetric: bool
    strategy: str
    group: int
    sorted: bool
    activations: bool


class _Names:
    """Names of modules, of their classes, or regular expressions after "re:"."""

    def __init__(self, settings: Settings, key: str, names: Iterable[str]) -> None:
        self.names = sorted(names, key=lambda name: ("re:" in name, name))
        self._patterns = settings.patterns(key, self.names, "re:")

    def match(self, modules: Sequence[str]) -> str | None:
        """The name that is most about a module, which may have several itself: one of its own, a pattern, or that of
        its class; None if there is none."""
        found = (n for n in self.names if any(self._is(n, module) for module in modules))
        kind = "Embedding" if modules[0].rpartition(".")[2] in _EMBEDDINGS else "Linear"
        return next(found, kind if kind in self.names else None)

    def _is(self, name: str, module: str) -> bool:
        return bool(self._patterns[name].match(module)) if name in self._patterns else name == module


@dataclass(frozen=True)
class Schemes:
    """The scheme of each module."""

    by_target: Mapping[str, Scheme | None]
    targets: _Names
    ignored: _Names

    def of(self, modules: Sequence[str]) -> Scheme | None:
        """None for a module whose weight is not quantised. modules: its names."""
        target = None if self.ignored.match(modules) else self.targets.match(modules)
        return None if target is None else self.by_target[target]


def open_schemes(settings: Settings) -> Schemes:
    """All that ``quantization_config`` says. Raises ConfigError."""
    form = settings.choice("format", (*_FORMATS, "mixed-precision"))
    if not settings.has("config_groups"):
        settings.refuse("config_groups", "an object of groups")
    groups = settings.part("config_groups")
    by_target: dict[str, Scheme | None] = {}
    for name in groups.raw:
        group = groups.part(name)
        scheme = _scheme(group, form)
        by_target |= dict.fromkeys(group.names("targets"), scheme)
    sparsity = settings.part("sparsity_config")
    sparsity.choice("format", ("dense",), "dense")
    sparsity.harmless("*")
    settings.only(transform_config=({},))
    settings.harmless(
        "kv_cache_scheme", "quantization_status", "global_compression_ratio", "version", "run_compressed", "dequantize",
        "use_optimized_inference",
    )  # fmt: skip
    return Schemes(
        by_target,
        _Names(settings, "config_groups", by_target),
        _Names(settings, "ignore", settings.names("ignore")),
    )


def _scheme(group: Settings, form: str) -> Scheme | None:
    group.harmless("input_activations", "output_activations", "format")
    weights = group.part("weights")
    if not group.has("weights"):
        return None
    form = group.choice("format", _FORMATS, None if form == "mixed-precision" else form)
    if form is None:
        group.refuse("format", ", ".join(_FORMATS))
    weights.harmless("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    weights.only(dynamic=(False,))
    packed = form == "pack-quantized"
    kinds = {"float-quantized": ("float",), "naive-quantized": ("int", "float")}.get(form, ("int",))
    real = weights.choice("type", kinds, "int") == "float"
    columns = group_size(weights, "group_size") if weights.has("group_size") else None
    inferred = "tensor" if columns is None else "channel" if columns == -1 else "group"
    strategy = weights.choice("strategy", _STRATEGIES[: 3 if packed else 4], inferred)
    if strategy == "group" and (columns or -1) < 0:
        weights.refuse("group_size", "a multiple of 16 for strategy group")
    if strategy == "block" and weights.get("block_structure") not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
        weights.refuse("block_structure", f"[{BLOCK}, {BLOCK}]")
    weights.harmless("block_structure", "group_size")
    order = weights.choice("actorder", ("group", "dynamic", "weight", "static", True, False), False)
    return Scheme(
        packed=packed,
        bits=weights.choice("num_bits", (8,) if real else (4, 8), 8),
        real=real,
        symmetric=weights.choice("symmetric", (True,) if real else (True, False), True),
        strategy=strategy,
        group=columns or 0,
        sorted=order not in ("group", "dynamic", True),
        activations=group.has("input_activations"),
    )
