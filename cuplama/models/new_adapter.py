"""Adapters that are made here: a new one with its first weights, and the files that PEFT would save of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..arguments import checked, items, need_type, real, shown, whole_number
from ..errors import ParameterError
from .config import ModelConfig
from .export import checkpoint_tensors
from .lora import ALL_LINEAR, Adapter, LowRank, ends_in, linear_modules, modules_of

__all__ = ["adapter_files", "initial_weights", "new_adapter"]


def new_adapter(
    config: ModelConfig, rank: int, alpha: float | None = None, targets: Sequence[str] | str = ()
) -> ModelConfig:
    """The model with a new adapter; ``initial_weights`` makes its weights.

    rank: r; alpha: twice the rank by default, so that the scale is 2; targets: names of linear layers as Hugging Face
    calls them ("q_proj"); none, or "all-linear", for all but the head. Raises ParameterError naming what is wrong.
    """
    rank = checked("rank", rank, whole_number(1), "a whole number >= 1")
    alpha = 2.0 * rank if alpha is None else checked("alpha", alpha, real(-1e30, 1e30), "a number")
    linear = modules_of(config.own_recipes())[0]
    if not targets or targets == ALL_LINEAR:
        targets = [module for module in linear if module != "lm_head"]
    need = "names of linear layers, or all-linear"
    targets = [targets] if isinstance(targets, str) else checked("targets", targets, _names, need)
    for name in targets:
        if not any(ends_in(module, [name]) for module in linear):
            known = ", ".join(sorted({module.rpartition(".")[2] for module in linear}))
            raise ParameterError(f"targets: {shown(name)} is no linear layer of {config.architecture}; known: {known}")
    modules = {module: LowRank(rank, alpha) for module in linear if ends_in(module, targets)}
    return replace(config, adapter=Adapter(modules))


def _names(value: Any) -> list[str]:
    found = items(value)
    for name in found:
        need_type(isinstance(name, str), name)
    return list(found)


def initial_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """The weights of a new adapter by canonical name, float32: B is zero, so that the model is what it was.

    A is uniform within 1 / sqrt(k), as PEFT has it: what He et al., arXiv:1502.01852, give for leaky rectifiers of
    slope sqrt(5). Drawn by Philox from the seed, in the order of the model's weights.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    shapes, own = config.weight_shapes(), config.own_recipes()
    assert config.adapter is not None
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, added in config.low_ranks.items():
        a = np.zeros(shapes[f"{name}.lora_a"], np.float32)
        for i, (_, module) in enumerate(linear_modules(name, own[name])):
            if module in config.adapter.modules:
                bound = a.shape[1] ** -0.5
                a[i * added.rank : (i + 1) * added.rank] = rng.uniform(-bound, bound, (added.rank, a.shape[1]))
        found |= {f"{name}.lora_a": a, f"{name}.lora_b": np.zeros(shapes[f"{name}.lora_b"], np.float32)}
    return found


def adapter_files(
    config: ModelConfig, arrays: Mapping[str, np.ndarray[Any, Any]], base_name: str
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """What PEFT would save: the content of adapter_config.json, and the tensors of adapter_model.safetensors by name.

    config: of a model with an adapter; arrays: its weights by canonical name (``X.lora_a``, ``X.lora_b``), of which the
    tensors are views; base_name: the folder or hub id of the model without it.
    """
    adapter, own = config.adapter, config.own_recipes()
    assert adapter is not None
    tensors = dict(checkpoint_tensors(config, {name: arrays[name] for name in config.adapter_weights()}))
    kinds = list(adapter.modules.values())
    ((rank, _),) = Counter(kind.rank for kind in kinds).most_common(1)
    ((alpha, _),) = Counter(kind.alpha for kind in kinds).most_common(1)
    ends = sorted({module.rpartition(".")[2] for module in adapter.modules})
    alike = all(module in adapter.modules for module in modules_of(own)[0] if ends_in(module, ends))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": ends if alike else sorted(adapter.modules),
        "rank_pattern": {m: k.rank for m, k in adapter.modules.items() if k.rank != rank},
        "alpha_pattern": {m: k.alpha for m, k in adapter.modules.items() if k.alpha != alpha},
        "use_rslora": kinds[0].rslora,
        "fan_in_fan_out": any(own[name].transposed for name in config.low_ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    return settings, tensors
