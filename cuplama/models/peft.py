"""LoRA adapters as PEFT stores them: ``adapter_config.json`` and ``adapter_model.safetensors``.

https://github.com/huggingface/peft (src/peft/tuners/lora) defines both. As with config.json nothing is silently
ignored: a setting that would change the result is refused by name, and every tensor of the file must be used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, ConfigError
from ..files import is_missing, read_json
from ..quant.settings import Settings
from ..quant.tensor import SAFETENSORS, Tensor
from ..quant.weight import Weight
from .checkpoint import Layout, assemble, open_file
from .config import ModelConfig
from .config_reader import is_number
from .lora import ALL_LINEAR, Adapter, LowRank, ends_in, linear_modules, lora_name, modules_of
from .wrapper import own_name

__all__ = ["ADAPTER_CONFIG", "ADAPTER_MODEL", "load_adapter"]

ADAPTER_CONFIG, ADAPTER_MODEL = "adapter_config.json", "adapter_model.safetensors"

# Settings that would change the result, with the values at which they do not. Some ways to start an adapter, "pissa"
# for one, change the base model as well, and PEFT does it again whenever it loads the adapter.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "layer_replication": ([],),
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "ensure_weight_tying"), (False,)),
}
_HARMLESS = (
    "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core",
    "runtime_config", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
)  # fmt: skip


def load_adapter(folder: Path, config: ModelConfig) -> tuple[ModelConfig, dict[str, Weight]]:
    """The model with the adapter in ``folder``, and the adapter's weights by canonical name. config: of the model.

    Raises ConfigError naming a setting of adapter_config.json and what is supported, and CheckpointError naming a
    tensor that is missing, left over or of the wrong shape, or a file that cannot be read.
    """
    adapter = _read_config(folder, config)
    adapted, file = replace(config, adapter=adapter), folder / ADAPTER_MODEL
    if is_missing(file) and (others := [p.name for p in sorted(folder.glob("adapter_model.*"))]):
        raise CheckpointError(f"{file} does not exist ({others[0]} cannot be read; convert to safetensors)")
    tensors = _full_names(open_file(file), config)
    wanted = {lora_name(module, which) for module in adapter.modules for which in "AB"}
    for name in sorted(tensors.keys() - wanted):
        t = tensors[name]
        raise CheckpointError(
            f"{file}: tensor {t.name} {list(t.shape)} has no place in the adapter as {ADAPTER_CONFIG} describes it;"
            " refusing to ignore it"
        )
    recipes = {n: r for n, r in adapted.recipes().items() if n.endswith((".lora_a", ".lora_b"))}
    weights = {}
    for name, recipe in recipes.items():
        dims = config.dims(name)
        dtype = next((tensors[n].dtype for _, n in recipe.parts if n in tensors), "F32")
        zeros = {
            n: _zeros(n, file, dtype, recipe.tensor_shape(i, dims))
            for i, (_, n) in enumerate(recipe.parts)
            if n not in wanted
        }
        weights[name] = assemble(Layout(folder, {**tensors, **zeros}, ADAPTER_CONFIG, str), name, recipe, dims)
    return adapted, weights


def _zeros(name: str, file: Path, dtype: str, shape: Sequence[int]) -> Tensor:
    """What a part that is not adapted has."""
    return Tensor(name, file, dtype, tuple(shape), np.zeros(shape, SAFETENSORS[dtype]))


def _full_names(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors by the names that they have in an adapter of the whole model. One that was made for the model
    without its head leaves out the family's prefix."""
    begin, prefix = lora_name("", "A").partition(".lora_")[0], config.family.prefix
    if (wrapper := config.wrapper) is not None:
        tensors = {begin + own_name(n.removeprefix(begin), config.family, wrapper): t for n, t in tensors.items()}
    if any(name.startswith(begin + prefix) for name in tensors):
        return dict(tensors)
    return {re.sub(f"^{re.escape(begin)}(?!lm_head)", begin + prefix, name): t for name, t in tensors.items()}


# -- adapter_config.json


def _read_config(folder: Path, config: ModelConfig) -> Adapter:
    path = folder / ADAPTER_CONFIG
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; an adapter is one that holds {ADAPTER_CONFIG}")
    if is_missing(path):
        inner = [str(p.parent) for p in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))]  # PEFT's of several adapters
        hint = f"{inner[0]} has one" if inner else "an adapter is a folder as PEFT saves it"
        raise ConfigError(f"{path} does not exist; {hint}")
    settings = Settings(read_json(path), str(path))
    settings.choice("peft_type", ("lora",))
    settings.only(**_NEUTRAL)
    settings.harmless(*_HARMLESS)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not _is_rank(rank):
        settings.refuse("r", "a positive whole number")
    if not is_number(alpha):
        settings.refuse("lora_alpha", "a number")
    rslora = settings.switch("use_rslora")
    ranks, alphas = _pattern(settings, "rank_pattern"), _pattern(settings, "alpha_pattern")
    modules = {
        module: LowRank(_first(ranks, module, rank), float(_first(alphas, module, alpha)), rslora)
        for module in _targeted(settings, config)
    }
    base = settings.get("base_model_name_or_path")
    for name in settings.unread():  # what nobody knows may be in every file, switched off
        if settings.raw[name] not in (False, [], {}):
            settings.refuse(name, "adapters without it")
    _check_stacks(settings, config, modules)
    return Adapter(modules, base if isinstance(base, str) else "")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _pattern(settings: Settings, key: str) -> dict[re.Pattern[str], Any]:
    """A field that gives some modules a rank or an alpha of their own: the end of a name, as a regular expression."""
    found = settings.get(key) or {}
    if not isinstance(found, Mapping):
        settings.refuse(key, "an object of names and numbers")
    for name, value in found.items():
        if not (_is_rank(value) if key == "rank_pattern" else is_number(value)):
            settings.refuse(f"{key}.{name}", "a positive whole number" if key == "rank_pattern" else "a number", value)
    return {_compiled(settings, key, rf"(.*\.)?({name})$", name): value for name, value in found.items()}


def _compiled(settings: Settings, key: str, pattern: str, given: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        settings.refuse(key, f"regular expressions ({e})", given)


def _first(patterns: Mapping[re.Pattern[str], Any], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if pattern.match(module)), default)


def _targeted(settings: Settings, config: ModelConfig) -> list[str]:
    """The linear layers that the settings name. Raises ConfigError for none, and for anything else that they name."""
    linear, others = modules_of(config.own_recipes())
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    layers, layer_names = settings.get("layers_to_transform"), settings.get("layers_pattern") or []
    layers = [layers] if type(layers) is int else layers or []
    layer_names = [layer_names] if isinstance(layer_names, str) else layer_names
    if not isinstance(layers, list) or not all(type(i) is int for i in layers):
        settings.refuse("layers_to_transform", "a number, or a list of numbers")
    if not _are_names(layer_names):
        settings.refuse("layers_pattern", "a name, or a list of names")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = [module for module in linear if module != "lm_head"]
    if not targets or not (isinstance(targets, str) or _are_names(targets)):
        settings.refuse("target_modules", f'a list of names, a regular expression, or "{ALL_LINEAR}"')
    found = _matching(settings, "target_modules", targets, [*linear, *others])
    if layers and not isinstance(targets, str):
        begins = [rf".*?\.{name}\.(\d+)\." for name in layer_names] or [r".*?\.[^.]*\.(\d+)\."]
        found = {m for m in found if m in targets or _layer(m, begins) in layers}
    if excluded:
        if not (isinstance(excluded, str) or _are_names(excluded)):
            settings.refuse("exclude_modules", "a list of names, or a regular expression")
        found -= _matching(settings, "exclude_modules", excluded, found)
    names = ", ".join(sorted({module.rpartition(".")[2] for module in linear}))
    for module in others:
        if module in found:
            settings.refuse("target_modules", f"linear layers: {names}", module)
    if not found:
        settings.refuse("target_modules", f"layers that {config.architecture} has: {names}")
    return [module for module in linear if module in found]


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _matching(settings: Settings, key: str, wanted: str | list[str], modules: Iterable[str]) -> set[str]:
    """The modules whose whole name a regular expression matches, or of whose name a list has the end."""
    if isinstance(wanted, str):
        pattern = _compiled(settings, key, wanted, wanted)
        return {m for m in modules if pattern.fullmatch(m)}
    return {m for m in modules if ends_in(m, wanted)}


def _layer(module: str, begins: Sequence[str]) -> int | None:
    """The layer that a module is in, by the first expression that finds one."""
    found = (re.match(begin, module) for begin in begins)
    return next((int(match[1]) for match in found if match), None)


def _check_stacks(settings: Settings, config: ModelConfig, modules: Mapping[str, LowRank]) -> None:
    """Refuse matrices that are multiplied as one here and have different ranks or scales."""
    for name, recipe in config.own_recipes().items():
        parts = [module for _, module in linear_modules(name, recipe) if module in modules]
        for module in parts[1:]:
            if modules[module] != modules[parts[0]]:
                key = "rank_pattern" if settings.has("rank_pattern") else "alpha_pattern"
                settings.refuse(key, f"the same rank and alpha for {parts[0]} and {module}, which are one matrix here")
