"""Models of no family: the smallest golden case with other weights and numbers, as a new family might have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cuplama.backends.numpy import NumPyBackend
from cuplama.engine.engine import Engine
from cuplama.generation_config import Settings
from cuplama.model import Model
from cuplama.models.config import Layer, ModelConfig, load_config
from cuplama.models.family import Recipe, one
from cuplama.models.rope import Rope
from tests.paths import GOLDEN

CONFIG = load_config(GOLDEN / "llama3-gqa")
_MADE = {
    "attn_post_norm": "d", "mlp_post_norm": "d", "q_norm": "D", "k_norm": "D", "act.alpha_p": "1", "act.alpha_n": "1",
}  # fmt: skip
_WIDE = {"q_norm": "num_heads*D", "k_norm": "num_kv_heads*D"}


def synthetic(add: str = "", drop: str = "", flags: str = "", family: Any = None, **fields: Any) -> ModelConfig:
    """``CONFIG`` with other weights of its layers, by their names without the layer ("wide" makes q_norm and k_norm of
    all heads together). family, fields: other fields of the Family and of the ModelConfig."""
    weights: dict[str, Recipe] = {
        name: recipe for name, recipe in CONFIG.family.weights.items() if name.partition(".")[2] not in drop.split()
    }
    names = add.split()
    shapes = {**_MADE, **(_WIDE if "wide" in names else {})}
    weights |= {f"{{i}}.{name}": one(shapes[name], f"{name}.{{i}}.weight") for name in names if name in shapes}
    if "lm_head.bias" in names:
        weights["lm_head.bias"] = one("V", "lm_head.bias")
    if "up_proj" in names:
        weights["{i}.up_proj"] = one("f,d", "up.{i}.weight")
    own = replace(CONFIG.family, weights=weights, **(family or {}))
    return replace(CONFIG, family=own, flags=CONFIG.flags | set(flags.split()), **fields)


POST_NORMS = dict(add="attn_post_norm mlp_post_norm", drop="attn_norm mlp_norm")
SANDWICH = dict(add="attn_post_norm mlp_post_norm")
PARALLEL = dict(flags="parallel", drop="mlp_norm")


def two_rotations() -> tuple[Layer, ...]:
    """Layers of which the second has another rotation, and a window."""
    dim = CONFIG.head_dim
    return CONFIG.layers[0], Layer(5, Rope("default", 100.0, dim // 2, CONFIG.context, CONFIG.context, {}))


VARIANTS: dict[str, dict[str, Any]] = {
    "post-norms": POST_NORMS,
    "sandwich": {**SANDWICH, "family": {"norm_offset": 1.0}},
    "parallel": PARALLEL,
    "parallel, two norms": {"flags": "parallel"},
    "no norm": {"drop": "mlp_norm"},
    "two rotations": {"layers": two_rotations()},
    "neighbours": {"family": {"rope": "rope_pairs"}, "flags": "qk_norm_after_rope", "add": "q_norm k_norm"},
    "wide": {"add": "q_norm k_norm wide"},
    "scales": {"embedding_scale": 4.0, "residual_scale": 0.25, "logits_scale": 0.5, "logits_cap": 3.0},
    "attention": {"attention_scale": 0.5, "attention_cap": 2.0, "query_temperature": 0.5, "query_context": 4.0},
    "xielu": {"add": "act.alpha_p act.alpha_n up_proj", "drop": "gate_up_proj", "activation": "xielu"},
}
"""Name -> arguments of ``synthetic``: each knob, alone or with few others."""


def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random weights by canonical name, float32: norms multiply by about 1."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in config.weight_shapes().items():
        centre = 1 - config.family.norm_offset if name.endswith("norm") else 0.0
        width = 0.5 if len(shape) == 1 else 1.5 * shape[1] ** -0.5
        found[name] = (centre + width * rng.standard_normal(shape)).astype(np.float32)
    return found


def model_of(config: ModelConfig, weights: Mapping[str, np.ndarray[Any, Any]], dtype: str = "f32") -> Model:
    """The model on NumPy."""
    backend = NumPyBackend(dtype)
    arrays = {name: backend.upload(array.astype(backend.dtype)) for name, array in weights.items()}
    return Model(Path("synthetic"), config, None, Engine(backend, config, arrays, 64, 128), Settings())
