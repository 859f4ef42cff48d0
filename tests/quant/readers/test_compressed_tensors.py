"""compressed-tensors: every strategy and format by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuplama.quant.readers import check
from tests.quant.readers.made import BF16, E4M3, codes_along, left, numbers, refusal, stored

M, K = 24, 64


def config(form: str = "pack-quantized", *, targets: Any = ("Linear",), **weights: Any) -> dict[str, Any]:
    """A quantization_config with one group."""
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    group = {"targets": list(targets), "weights": args, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None,
        "quantization_status": "compressed", "global_compression_ratio": 1.5, "version": "0.9",
    }  # fmt: skip


def made(
    bits: int = 4, groups: int = 2, seed: int = 1
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(whole numbers [M, K], scales bf16 [M, groups], zero points [M, groups])."""
    rng = np.random.default_rng(seed)
    half = 1 << (bits - 1)
    q, zero = (rng.integers(-half, half, shape) for shape in ((M, K), (M, groups)))
    return q, rng.uniform(0.1, 1, (M, groups)).astype(BF16), zero


def packed(
    bits: int, q: np.ndarray[Any, Any], scale: np.ndarray[Any, Any], **more: np.ndarray[Any, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    return {
        "x.weight_packed": codes_along(q + (1 << (bits - 1)), bits, 1),
        "x.weight_scale": scale,
        "x.weight_shape": np.array(q.shape, np.int64),
        **{f"x.{name}": array for name, array in more.items()},
    }


def spread(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.repeat(values.astype(np.float32), K // values.shape[1], 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)])
def test_groups(bits: int, dtype: np.dtype[Any]) -> None:
    q, scale, _ = made(bits)
    scale = scale.astype(dtype)
    weight = stored(config(num_bits=bits), packed(bits, q, scale))
    assert np.array_equal(weight.numbers(), q * spread(scale))
    assert weight.format.packing is not None
    assert (weight.format.name, weight.format.packing.group) == (f"int{bits} g32", 32)
    assert weight.nbytes == M * K * bits // 8 + scale.nbytes + 16


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_are_packed_along_the_outputs(bits: int) -> None:
    q, scale, zero = made(bits)
    arrays = packed(bits, q, scale, weight_zero_point=codes_along(zero + (1 << (bits - 1)), bits, 0))
    assert np.array_equal(numbers(config(num_bits=bits, symmetric=False), arrays), (q - spread(zero)) * spread(scale))


@pytest.mark.parametrize("bits", [4, 8])
def test_channels(bits: int) -> None:
    q, scale, zero = made(bits, 1)
    settings = config(num_bits=bits, strategy="channel", group_size=None)
    weight = stored(settings, packed(bits, q, scale))
    assert np.array_equal(weight.numbers(), q * scale.astype(np.float32))
    assert weight.format.packing is not None
    assert weight.format.packing.group == 0
    # Whole rows with zero points are groups of 128, as blocks have no other.
    arrays = packed(bits, q, scale, weight_zero_point=codes_along(zero + (1 << (bits - 1)), bits, 0))
    weight = stored(config(num_bits=bits, strategy="channel", group_size=-1, symmetric=False), arrays)
    assert np.array_equal(weight.numbers(), (q - zero) * scale.astype(np.float32))
    assert weight.format.packing is not None
    assert weight.format.packing.group == 128


def test_one_scale_for_all() -> None:
    q, _, _ = made()
    settings = config(strategy="tensor", group_size=None)
    for scale in (np.array([0.5], BF16), np.array(0.5, np.float32)):
        assert np.array_equal(numbers(settings, packed(4, q, scale)), q * np.float32(0.5))
    settings = config(strategy=None, group_size=None, symmetric=False)
    arrays = packed(4, q, np.array([0.5], BF16), weight_zero_point=np.array([-3], np.int8))
    assert np.array_equal(numbers(settings, arrays), (q + 3) * np.float32(0.5))


def test_inputs_that_do_not_fill_a_word() -> None:
    q, scale, _ = made(4, 1)
    q = q[:, :37]
    arrays = packed(4, q, scale)
    assert arrays["x.weight_packed"].shape == (M, 5)
    assert np.array_equal(numbers(config(strategy="channel", group_size=None), arrays), q * scale.astype(np.float32))


@pytest.mark.parametrize("group", [16, 48, 64, 128, 256, 384])
def test_groups_of_any_size_become_those_that_blocks_know(group: int) -> None:
    rng = np.random.default_rng(2)
    q = rng.integers(-8, 8, (M, 768))
    scale = rng.uniform(0.1, 1, (M, 768 // group)).astype(np.float16)
    weight = stored(config(group_size=group), packed(4, q, scale))
    assert np.array_equal(weight.numbers(), q * np.repeat(scale.astype(np.float32), group, 1))
    assert weight.format.packing is not None
    assert weight.format.packing.group == {16: 16, 48: 16, 64: 64}.get(group, 128)
    assert np.shares_memory(weight.fields["scale"].planes[0].data, scale)


@pytest.mark.parametrize("actorder", ["group", "dynamic", True])
def test_columns_are_sorted_by_group(actorder: object) -> None:
    q, scale, _ = made()
    g_idx = np.random.default_rng(3).permutation(np.arange(K) // 32).astype(np.int32)
    settings = config(actorder=actorder)
    weight = stored(settings, packed(4, q, scale, weight_g_idx=g_idx))
    assert np.array_equal(weight.numbers(), q * scale.astype(np.float32)[:, g_idx])
    assert weight.order is not None
    assert weight.order.dtype == np.int32
    assert (np.diff(g_idx[weight.order]) >= 0).all()
    for neighbours in (np.arange(K) // 32, np.full(K, -1)):
        weight = stored(settings, packed(4, q, scale, weight_g_idx=neighbours.astype(np.int32)))
        assert weight.order is None
        assert np.array_equal(weight.numbers(), q * spread(scale))


@pytest.mark.parametrize("actorder", ["static", "weight", None, False])
def test_an_order_that_only_calibration_had(actorder: object) -> None:
    q, scale, _ = made()
    weight = stored(config(actorder=actorder), packed(4, q, scale))
    assert weight.order is None


@pytest.mark.parametrize("form", ["int-quantized", "naive-quantized"])
def test_bytes(form: str) -> None:
    q, scale, zero = made(8, 1)
    settings = config(form, num_bits=8, strategy="channel", group_size=None)
    arrays = {"x.weight": q.astype(np.int8), "x.weight_scale": scale, "x.input_scale": np.ones(1, np.float32)}
    assert np.array_equal(numbers(settings, arrays), q * scale.astype(np.float32))
    settings = config(form, num_bits=8, strategy="channel", group_size=None, symmetric=False)
    arrays |= {"x.weight_zero_point": zero.astype(np.int8)}
    assert np.array_equal(numbers(settings, arrays), (q - zero) * scale.astype(np.float32))


def test_four_bits_in_bytes() -> None:
    q, scale, _ = made()
    arrays = {"x.weight": q.astype(np.int8), "x.weight_scale": scale}
    assert np.array_equal(numbers(config("naive-quantized"), arrays), q * spread(scale))


def floats(m: int = M, k: int = K) -> np.ndarray[Any, Any]:
    return np.random.default_rng(4).standard_normal((m, k)).astype(E4M3)


@pytest.mark.parametrize(
    ("strategy", "shape"), [("tensor", (1,)), ("tensor", ()), ("channel", (M, 1)), ("channel", (M,)), ("group", (M, 2))]
)
def test_floats(strategy: str, shape: tuple[int, ...]) -> None:
    scale = np.random.default_rng(5).uniform(0.1, 1, shape).astype(BF16)
    settings = config("float-quantized", num_bits=8, type="float", strategy=strategy)
    settings["config_groups"]["group_0"]["weights"]["group_size"] = 32 if strategy == "group" else None
    arrays = {"x.weight": floats(), "x.weight_scale": scale, "x.input_scale": np.ones(1, BF16)}
    by_row = np.broadcast_to(
        scale.astype(np.float32).reshape(-1, max(1, len(shape) == 2 and shape[1])), (M, 2 if strategy == "group" else 1)
    )
    assert np.array_equal(numbers(settings, arrays), floats().astype(np.float32) * spread(by_row))


def test_blocks_of_floats() -> None:
    m, k = 200, 272
    scale = np.random.default_rng(6).uniform(0.1, 1, (2, 3)).astype(np.float32)
    settings = config(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128], group_size=None
    )
    weight = stored(settings, {"x.weight": floats(m, k), "x.weight_scale": scale})
    by_element = scale[np.arange(m) // 128][:, np.arange(k) // 128]
    assert np.array_equal(weight.numbers(), floats(m, k).astype(np.float32) * by_element)


def test_which_group_a_module_is_of() -> None:
    q, scale, _ = made()
    eight, scale8, _ = made(8, 1)
    settings = config("mixed-precision", targets=("Linear",))
    groups = settings["config_groups"]
    groups["group_0"]["format"] = "pack-quantized"
    wide = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups["group_1"] = {"targets": ["re:.*down_proj$", "a.b"], "weights": wide, "format": "int-quantized"}
    settings["ignore"] = ["lm_head", "re:.*gate"]
    arrays: dict[str, np.ndarray[Any, Any]] = dict(packed(4, q, scale))
    for name in ("l.down_proj", "a.b"):
        arrays |= {f"{name}.weight": eight.astype(np.int8), f"{name}.weight_scale": scale8}
    arrays |= {
        "lm_head.weight": np.ones((2, 2), BF16),
        "l.gate.weight": np.ones((2, 2), np.float32),
        "n.bias": np.ones(2, BF16),
    }
    found = left(settings, arrays)
    assert {name: t.dtype for name, t in found.items()} == {
        "x.weight": "int4 g32", "l.down_proj.weight": "int8", "a.b.weight": "int8", "lm_head.weight": "BF16",
        "l.gate.weight": "F32", "n.bias": "BF16",
    }  # fmt: skip
    settings["config_groups"]["group_1"]["targets"] = ["a.b"]
    assert "l.down_proj.weight_shape is missing beside l.down_proj.weight" in refusal(settings, arrays)


def test_an_embedding_is_no_linear_module() -> None:
    q, scale, _ = made()
    arrays = {name.replace("x.", "model.embed_tokens."): array for name, array in packed(4, q, scale).items()}
    assert "model.embed_tokens.weight_packed is quantised, but no group" in refusal(config(), arrays)
    assert left(config(targets=("Embedding",)), arrays)["model.embed_tokens.weight"].shape == (M, K)


def test_scales_of_a_cache_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    q, scale, _ = made()
    arrays = packed(4, q, scale) | {f"l.self_attn.{x}_scale": np.ones(1, np.float32) for x in "kv"}
    settings = config() | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    assert set(left(settings, arrays)) == {"x.weight"}
    assert "2 scales of a quantised KV cache are left out, l.self_attn.k_scale first" in caplog.text


def test_zero_points_of_a_symmetric_weight() -> None:
    q, scale, _ = made()
    arrays = packed(4, q, scale, weight_zero_point=np.zeros((M, 2), np.int8))
    assert np.array_equal(numbers(config(), arrays), q * spread(scale))
    arrays |= {"x.weight_zero_point": np.ones((M, 2), np.int8)}
    assert "x.weight_zero_point has 48 zero points that are not 0" in refusal(config(), arrays)


def test_what_nobody_reads_is_named() -> None:
    settings = config(frobnicate=3) | {"novel": 1, "sparsity_config": {"format": "dense"}}
    wanted = ["quantization_config.config_groups.group_0.weights.frobnicate", "quantization_config.novel"]
    assert check(settings, "config.json") == wanted


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num_bits": 3}, "weights.num_bits is 3; supported: 4, 8"),
        ({"type": "float"}, 'weights.type is "float"; supported: int'),
        ({"strategy": "tensor_group"}, 'weights.strategy is "tensor_group"; supported: group, channel, tensor'),
        ({"strategy": "block"}, 'weights.strategy is "block"; supported: group, channel, tensor'),
        ({"group_size": 100}, "weights.group_size is 100; supported: -1 or a multiple of 16"),
        ({"group_size": 0}, "weights.group_size is 0; supported: a positive whole number, or -1"),
        ({"group_size": "a"}, 'weights.group_size is "a"; supported'),
        ({"group_size": None}, "weights.group_size is null; supported: a multiple of 16"),
        ({"actorder": "odd"}, 'weights.actorder is "odd"; supported: group, dynamic, weight, static, true, false'),
        ({"dynamic": True}, "weights.dynamic is true; supported: false"),
        ({"symmetric": 1}, "weights.symmetric is 1; supported: true, false"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], line: str) -> None:
    assert refusal(config(**change), {}).startswith(
        "ConfigError: config.json: quantization_config.config_groups.group_0." + line
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"format": "nvfp4-pack-quantized"}, 'format is "nvfp4-pack-quantized"; supported: pack-quantized, int-q'),
        ({"format": "marlin-24"}, 'format is "marlin-24"; supported'),
        ({"format": None}, "format is null; supported"),
        ({"config_groups": None}, "config_groups is null; supported: an object of groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, 'config_groups.W4A16 is ["Linear"]; supported: an object'),
        ({"ignore": "lm_head"}, 'ignore is "lm_head"; supported: a list of names'),
        ({"ignore": ["re:("]}, 'ignore is "re:("; supported: regular expressions ('),
        (
            {"ignore": [f"re:a{{{10**20}}}"]},
            'ignore is "re:a{100000000000000000000}"; supported: regular expressions (',
        ),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, 'sparsity_config.format is "sparse-24-bitmask"; sup'),
        ({"transform_config": {"config_groups": {"u": {}}}}, 'transform_config is {"config_groups": {"u": {}}}; sup'),
        ({"quant_method": "quark"}, 'quant_method is "quark"; supported: awq, bitsandbytes'),
    ],
)
def test_more_settings_that_are_refused(change: dict[str, Any], line: str) -> None:
    assert refusal(config() | change, {}).startswith("ConfigError: config.json: quantization_config." + line)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num_bits": 4}, "num_bits is 4; supported: 8"),
        ({"symmetric": False}, "symmetric is false; supported: true"),
        ({"strategy": "block", "block_structure": [64, 64]}, "block_structure is [64, 64]; supported: [128, 128]"),
        ({"strategy": "block"}, "block_structure is missing; supported: [128, 128]"),
        ({"type": "int"}, 'type is "int"; supported: float'),
    ],
)
def test_settings_of_floats_that_are_refused(change: dict[str, Any], line: str) -> None:
    settings = config(
        "float-quantized", **({"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None} | change)
    )
    assert f"group_0.weights.{line}" in refusal(settings, {})


def test_a_group_of_activations_alone_quantises_no_weight() -> None:
    settings = config("mixed-precision")
    settings["config_groups"]["group_0"] |= {"weights": None, "input_activations": {"num_bits": 8}}
    plain = {"x.weight": np.ones((M, K), BF16)}
    assert left(settings, plain)["x.weight"].dtype == "BF16"
    assert "x.weight is quantised, but no group" in refusal(settings, {"x.weight": floats()})


def test_a_mixture_needs_a_format_for_each_group() -> None:
    assert "group_0.format is missing; supported: pack-quantized" in refusal(config("mixed-precision"), {})


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("weight_packed", np.zeros((M, 7), np.int32), "x.weight_packed has shape [24, 7]; expected: [24, 8]"),
        ("weight_packed", np.zeros((M, 8), np.int64), "x.weight_packed has dtype I64; expected: I32"),
        ("weight_shape", np.array([M, K + 32]), "x.weight_packed has shape [24, 8]; expected: [24, 12]"),
        ("weight_shape", np.array([M, -1]), "x.weight_shape says [24, -1]; expected: positive sizes"),
        ("weight_shape", np.array([M, K, 1]), "x.weight_shape has shape [3]; expected: [2]"),
        ("weight_shape", None, "x.weight_shape is missing beside x.weight_packed"),
        ("weight_scale", np.zeros((M, 1), BF16), "x.weight_scale has shape [24, 1]; expected: [24, 2]"),
        ("weight_scale", np.zeros((M, 2)), "x.weight_scale has dtype F64; expected: F32, F16, BF16"),
        ("weight_scale", None, "x.weight_scale is missing beside x.weight_packed"),
        ("weight_packed", None, "x.weight_scale is left over; there is no x.weight_packed, nor a .weight in 8 bits"),
        ("weight_g_idx", np.zeros(K, np.int32), "x.weight_g_idx is left over; there is no"),
        ("weight", np.zeros((M, K), BF16), "x.weight is there beside x.weight_"),
    ],
)
def test_tensors_that_are_refused(name: str, value: np.ndarray[Any, Any] | None, line: str) -> None:
    q, scale, _ = made()
    arrays = {**packed(4, q, scale), f"x.{name}": value}
    found = refusal(config(), {name: array for name, array in arrays.items() if array is not None})
    assert found.startswith("CheckpointError: F: tensor " + line)


def test_orders_and_zero_points_that_are_refused() -> None:
    q, scale, _ = made()
    uneven = np.zeros(K, np.int32)
    assert "x.weight_g_idx does not put 32 of the 64 inputs into each of 2 groups" in refusal(
        config(actorder="group"), packed(4, q, scale, weight_g_idx=uneven)
    )
    assert "x.weight_g_idx has shape [3]; expected: [64]" in refusal(
        config(actorder="group"), packed(4, q, scale, weight_g_idx=uneven[:3])
    )
    assert "x.weight_g_idx is missing" in refusal(config(actorder="group"), packed(4, q, scale))
    assert "x.weight_zero_point is missing" in refusal(config(symmetric=False), packed(4, q, scale))
    assert "x.weight_zero_point has shape [24, 2]; expected: [3, 2]" in refusal(
        config(symmetric=False), packed(4, q, scale, weight_zero_point=np.zeros((M, 2), np.int32))
    )
    assert "x.weight_packed has 64 inputs; expected: a multiple of group_size 48" in refusal(
        config(group_size=48), packed(4, q, scale)
    )
