"""Layers of experts: how their weights are laid, which experts a token has, and what is refused.

The golden models show that the numbers are right.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cuplama
from cuplama.backends.numpy import NumPyBackend
from cuplama.dtypes import DTYPES
from cuplama.engine.batch import abstract_values
from cuplama.errors import CheckpointError, ConfigError, ParameterError
from cuplama.files import read_json
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config, parse_config
from cuplama.models.export import checkpoint_tensors
from cuplama.models.family import Recipe, one
from cuplama.models.graph import decoder
from cuplama.models.peft import load_adapter
from cuplama.quant.weight import Experts
from cuplama.train import gradients
from tests.adapters import write_adapter
from tests.paths import GOLDEN
from tools.divergence import rows_of
from tools.runs import in_one_piece

CASES = sorted(p for p in GOLDEN.iterdir() if "experts_0" in np.load(p / "golden.npz"))
QWEN, GLM, GEMMA, GRANITE = (GOLDEN / name for name in ("qwen3-moe", "glm4-moe", "gemma4-experts", "granitemoe"))
Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_tokens_have_the_experts_of_transformers(case: Path) -> None:
    with np.load(case / "golden.npz") as golden:
        prompts, rows = rows_of(golden)
    with cuplama.load(case, device="numpy", context=128) as model:
        for prompt, wanted in zip(prompts, rows, strict=True):
            found = in_one_piece(model, prompt)
            np.testing.assert_array_equal(found.experts, wanted.experts)
            np.testing.assert_allclose(found.weights, wanted.weights, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_weights_go_back_to_their_files(case: Path) -> None:
    config, tensors = load_config(case), load_file(case / "model.safetensors")
    weights = load_weights(case, config)
    assert {name: w.shape for name, w in weights.items()} == config.weight_shapes()
    found = dict(checkpoint_tensors(config, {name: weight.array() for name, weight in weights.items()}))
    assert found.keys() >= tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_nothing_is_copied_before_it_is_asked_for() -> None:
    """Neither by the weight nor by what a reference takes, but one expert at a time."""
    config = load_config(QWEN)
    weight = load_weights(QWEN, config)["0.experts.gate_up_proj"]
    assert weight.shape == (9, 48, 32)
    assert len(weight.source) == len(weight.parts) == 18
    assert not any(part.flags.owndata for part in weight.parts if isinstance(part, np.ndarray))
    mapped = weight.mapped()
    assert isinstance(mapped, Experts)
    assert (mapped.shape, len(mapped), mapped.dtype) == ((9, 48, 32), 9, np.dtype(np.float32))
    np.testing.assert_array_equal(np.stack([mapped[e] for e in range(9)]), weight.array())
    merged = load_weights(GRANITE, load_config(GRANITE))["1.experts.down_proj"].mapped()
    assert np.shares_memory(merged[3], merged.parts[3])  # type: ignore[union-attr]


def test_weights_may_stay_in_the_file() -> None:
    with cuplama.load(QWEN, device="numpy", context=128) as model:
        wanted = model.logits([5, 7, 11])
        config, weights = model.config, load_weights(QWEN, model.config)
        backend = NumPyBackend(convert=False)
        model.engine.runner.values.update({name: backend.load_weight(w) for name, w in weights.items()})
        assert isinstance(model.engine.runner.values["0.experts.down_proj"], Experts)
        np.testing.assert_allclose(model.logits([5, 7, 11]), wanted, atol=1e-5)
    assert config.experts == 9


# Of 3 experts with matrices [4, 2], whose rows are 0 to 3: each two are those of one of two matrices.
ROWS = np.arange(24.0, dtype=np.float32).reshape(3, 4, 2)
LAYOUTS: dict[str, tuple[Recipe, dict[str, Array]]] = {
    "one each": (one("4,2", "x.{e}.w", experts=True), {f"x.{e}.w": ROWS[e] for e in range(3)}),
    "halves": (
        Recipe((("2,2", "gate.{e}"), ("2,2", "up.{e}")), experts=True),
        {f"{half}.{e}": ROWS[e, i * 2 : i * 2 + 2] for e in range(3) for i, half in enumerate(("gate", "up"))},
    ),
    "merged": (one("4,2", "x", experts=True), {"x": ROWS}),
    "halves merged": (Recipe((("2,2", "g"), ("2,2", "u")), experts=True), {"g": ROWS[:, :2], "u": ROWS[:, 2:]}),
    "transposed": (one("4,2", "x", experts=True, transposed=True), {"x": ROWS.swapaxes(1, 2)}),
    "in turn": (
        one("4,2", "x", experts=True, transposed=True, interleaved=True),
        {"x": ROWS[:, [0, 2, 1, 3]].swapaxes(1, 2)},
    ),
    "biases in turn": (one("4", "x", experts=True, interleaved=True), {"x": ROWS[:, [0, 2, 1, 3], 0]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path) -> None:
    """Loaded by NumPy in 7 bytes at a time, as by a device, and written again."""
    from cuplama.models.checkpoint import Layout, assemble, open_file

    recipe, tensors = LAYOUTS[layout]
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, tmp_path / "x.safetensors")
    weight = assemble(Layout(tmp_path, open_file(tmp_path / "x.safetensors"), "here", str), "x", recipe, {"E": 3})
    wanted = ROWS[:, :, 0] if layout == "biases in turn" else ROWS
    np.testing.assert_array_equal(weight.array(), wanted)
    flat = np.full(wanted.size, np.nan, np.float32)
    for at, chunk in weight.chunks(7):
        flat[at : at + chunk.size] = chunk
    np.testing.assert_array_equal(flat.reshape(wanted.shape), wanted)
    np.testing.assert_array_equal([weight.mapped()[e] for e in range(3)], wanted)


def changed(folder: Path, out: Path, tensors: Mapping[str, Array], drop: str = "") -> Path:
    """A copy of a model's folder with other tensors, and without one."""
    shutil.copytree(folder, out)
    found = {**load_file(out / "model.safetensors"), **tensors}
    found.pop(drop, None)
    save_file(found, out / "model.safetensors")
    return out


DOWN = "model.layers.2.mlp.experts.8.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, f"tensor {DOWN} is missing"),
        (
            {DOWN: np.zeros((24, 32), np.float32)},
            rf"tensor {DOWN} has shape \[24, 32\]; config.json asks for \[32, 24\]",
        ),
        (
            {DOWN: np.zeros((32, 24), np.float16)},
            r"tensors model.*experts.0.*, model.*experts.8.* have different dtypes",
        ),
        (
            {"model.layers.0.mlp.experts.9.down_proj.weight": np.zeros((32, 24), np.float32)},
            "experts.9.* has no place in",
        ),
        (
            {"model.layers.0.mlp.up_proj.weight": np.zeros((40, 32), np.float32)},
            "layers.0.mlp.up_proj.* has no place in",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Array], words: str, tmp_path: Path) -> None:
    drop = "" if change else DOWN
    folder = changed(QWEN, tmp_path / "x", change, drop)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_weights(folder, load_config(folder))
    assert len(str(caught.value)) < 400


def test_a_layer_that_predicts_ahead_is_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = {"model.layers.2.eh_proj.weight": np.zeros((32, 64), np.float32)}
    folder = changed(GLM, tmp_path / "x", more)
    load_weights(folder, load_config(folder))
    assert "tensors that no layer of the model has are left out: model.layers.2 (1)" in caplog.text
    for name in more:
        shutil.rmtree(tmp_path / "x")
        folder = changed(GLM, tmp_path / "x", {name.replace("2", "3"): more[name]})
        with pytest.raises(CheckpointError, match=r"model.layers.3.*has no place"):
            load_weights(folder, load_config(folder))


def test_corrections_and_scales_stay_in_float32() -> None:
    """Also where the model is in 16 bits: they decide between scores that are near."""
    for case, name in ((GLM, "1.router.correction"), (GEMMA, "0.router.scale")):
        config = load_config(case)
        weights = load_weights(case, config)
        assert NumPyBackend("bf16").load_weight(weights[name]).dtype == np.float32
        assert weights[name].device_bytes(DTYPES["bf16"]) == 4 * config.experts
        described = abstract_values(config, DTYPES["bf16"], {}, 1, 1)
        assert {n for n, x in described.items() if x.dtype == np.float32} - {
            f"rope{i}.{x}" for i in ("", 1) for x in ("cos", "sin")
        } == config.wide_weights()
        assert name in config.wide_weights()


def test_layers_with_and_without_experts() -> None:
    config = load_config(QWEN)
    assert [f"{i}.router" in config.weight_shapes() for i in range(3)] == [True, False, True]
    assert [f"{i}.down_proj" in config.weight_shapes() for i in range(3)] == [False, True, False]
    ops = [node.op for node in decoder(config).body]
    assert [ops.count(op) for op in ("route", "sort_pairs", "expert_linear", "combine_pairs", "silu_mul")] == [
        2
    ] * 4 + [1]
    shapes = load_config(GOLDEN / "qwen2-moe").weight_shapes()
    assert (shapes["1.shared_gate"], shapes["1.shared.down_proj"]) == ((1, 32), (32, 28))
    assert config.parameters(False) - config.parameters(False, active=True) == 2 * (9 - 3) * 3 * 24 * 32


def glm(**changes: Any) -> Any:
    return parse_config({**read_json(GLM / "config.json"), **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_experts_per_tok": 13, "n_group": 1, "topk_group": 1},
            r"num_experts_per_tok = 13 .*: k <= E, with E = 12",
        ),
        ({"num_experts_per_tok": 7}, r"num_experts_per_tok = 7 .*k <= E // groups \* kept"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0 "),
        ({"n_group": 5}, "E % groups == 0, with E = 12, groups = 5"),
        ({"topk_group": 5}, "kept <= groups"),
        ({"n_group": "4"}, 'n_group = "4" .*a whole number'),
        ({"norm_topk_prob": "yes"}, 'norm_topk_prob = "yes"'),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor = 0 .*a positive number"),
        ({"n_routed_experts": None}, "n_routed_experts = 0 is not a positive"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size = -1"),
        ({"n_shared_experts": 1.5}, "n_shared_experts = 1.5"),
        ({"first_k_dense_replace": "1"}, 'first_k_dense_replace = "1"'),
        ({"num_local_experts": 13}, "num_local_experts = 13 .*the same as n_routed_experts, 12"),
    ],
)
def test_configs_that_no_router_can_follow(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        glm(**changes)


def test_fields_under_other_names() -> None:
    """transformers 5 saves num_local_experts where older versions and the hub have num_experts."""
    raw = read_json(QWEN / "config.json")
    (name,) = raw.keys() & {"num_experts", "num_local_experts"}
    other = ({"num_experts", "num_local_experts"} - {name}).pop()
    renamed = {other if key == name else key: value for key, value in raw.items()}
    assert parse_config(renamed) == load_config(QWEN)
    assert parse_config(renamed).raw == renamed
    with pytest.raises(ConfigError, match=f"config.json: {other} = -1 is not a positive whole number"):
        parse_config({**renamed, other: -1})


def test_gemma_4_says_whether_it_has_experts() -> None:
    raw = read_json(GEMMA / "config.json")
    off = parse_config({**raw, "enable_moe_block": False})
    assert off.experts == 0
    assert "0.router" not in off.weight_shapes()
    with pytest.raises(ConfigError, match="num_experts = null is not a positive whole number"):
        parse_config({**raw, "num_experts": None})


def test_phi_scales_its_rotation_by_the_same_factor_at_all_lengths() -> None:
    factors = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "short_mscale": 1.25}
    raw = {**read_json(GOLDEN / "phimoe" / "config.json"), "original_max_position_embeddings": 32}
    raw.pop("rope_parameters")
    (rope,) = parse_config({**raw, "rope_scaling": {**factors, "long_mscale": 1.25}}).ropes.values()
    assert rope.frequencies(1)[1] == rope.frequencies(100)[1] == 1.25
    with pytest.raises(ConfigError, match="rope_scaling = "):
        parse_config({**raw, "rope_scaling": {**factors, "long_mscale": 1.5}})


def test_what_experts_cannot_do_yet_is_refused() -> None:
    words = r"^Qwen3MoeForCausalLM cannot be trained: node .*combine_pairs has no gradient"
    with cuplama.load(QWEN, device="numpy") as model, pytest.raises(ParameterError, match=words):
        gradients(model, [[1, 2, 3, 4]])


def test_adapters_of_attention_run_and_of_experts_are_refused(tmp_path: Path) -> None:
    config = load_config(QWEN)
    write_adapter(tmp_path / "attention", QWEN, ("q_proj", "o_proj"))
    with cuplama.load(QWEN, device="numpy", adapter=tmp_path / "attention") as model:
        found = model.logits([5, 7, 11])
    with cuplama.load(QWEN, device="numpy") as model:
        assert np.abs(found - model.logits([5, 7, 11])).max() > 0.1
    adapted, _ = load_adapter(tmp_path / "attention", config)
    assert {name.partition(".")[2] for name in adapted.low_ranks} == {"qkv_proj", "o_proj"}
    write_adapter(tmp_path / "experts", QWEN, ("q_proj",), target_modules=["down_proj"])
    with pytest.raises(ConfigError, match=r'"model.layers.0.mlp.experts.0.down_proj"; supported: linear layers: '):
        load_adapter(tmp_path / "experts", config)
