"""What compressed-tensors stores: read back, and described."""

from __future__ import annotations

import numpy as np
import pytest

from cuplama.dtypes import DTYPES, dtype_name
from cuplama.quant.compressed import config_of, read_tensors, tensor_specs, tensors_of
from cuplama.quant.grid import GRIDS
from cuplama.quant.rtn import round_to_nearest

CASES = [("int4", 128), ("int4", 0), ("int8", 0), ("int8", 64), ("fp8", 0)]


@pytest.mark.parametrize(("name", "group"), CASES)
@pytest.mark.parametrize("k", [128, 384])
def test_tensors_are_as_they_were_foretold_and_are_read_back(name: str, group: int, k: int) -> None:
    w = np.random.default_rng(0).standard_normal((9, k)).astype(DTYPES["bf16"])
    grid = GRIDS[name]
    q = round_to_nearest(w, grid, group, w.dtype)
    tensors, specs = tensors_of(q), tensor_specs(grid, group, 9, k, "BF16")
    assert list(tensors) == list(specs)
    for end, tensor in tensors.items():
        assert tensor.shape == specs[end].shape
        if end != "weight":
            assert dtype_name(tensor.dtype).upper() == specs[end].dtype
    again = read_tensors(tensors, grid, group, k)
    assert np.array_equal(again.codes, q.codes)
    assert np.array_equal(again.numbers(), q.numbers())


def test_the_config() -> None:
    found = config_of(GRIDS["int4"], 64, ("lm_head",), True)
    assert (found["quant_method"], found["format"], found["ignore"]) == (
        "compressed-tensors",
        "pack-quantized",
        ["lm_head"],
    )
    weights = found["config_groups"]["group_0"]["weights"]
    wanted = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 64,
        "symmetric": True,
        "actorder": "weight",
    }
    assert {name: weights[name] for name in wanted} == wanted
    found = config_of(GRIDS["fp8"], 0, (), False)
    weights = found["config_groups"]["group_0"]["weights"]
    assert (found["format"], weights["type"], weights["num_bits"]) == ("float-quantized", "float", 8)
    assert (weights["strategy"], weights["group_size"], weights["actorder"]) == ("channel", None, None)
