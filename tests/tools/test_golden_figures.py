"""The figures of golden models, and what is demanded of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.paths import GOLDEN
from tools.golden_figures import (
    ANYHOW,
    FEWER,
    LATER,
    LIMIT,
    MIN_COMPARED,
    SCATTER,
    Golden,
    figures_float32,
    met_16_bit,
    met_float32,
)
from tools.runs import in_one_piece, step_by_step
from tools.verify_models import golden, golden_line

GOOD_32: dict[str, Any] = {
    **dict.fromkeys(("logits", "steps", "chunks"), LIMIT),
    **dict.fromkeys(("alone", "batch", "plain", "pieces"), True),
}
FACTORS = {"whole": SCATTER, "steps": FEWER, "alike": LATER}
GOOD_16 = {
    "transformers": 1e-4,
    "counted": 0.5,
    **{name: factor * 1e-4 for name, factor in FACTORS.items()},
    "any": ANYHOW,
    "compared": MIN_COMPARED,
}


@pytest.mark.parametrize("name", ["mixtral", "qwen35"])
def test_numpy_meets_what_is_demanded_of_a_gpu(name: str) -> None:
    row = golden(GOLDEN / name, "numpy")
    assert row["ok"]
    assert met_float32(row)
    assert all(met_16_bit(row[dtype]) for dtype in ("bfloat16", "float16"))
    line = golden_line(row)
    assert line.startswith(f"{name:<22} logits ")
    assert "tokens equal bfloat16 KL " in line
    assert "LARGER" not in line


def test_wrong_logits_and_tokens_show_in_each_figure() -> None:
    """A model whose head is shifted by a token."""
    data = Golden(GOLDEN / "phi")
    with data.load("numpy") as model:
        values = model.engine.runner.values
        values["lm_head"] = np.roll(values["lm_head"], 1, 0)
        found = figures_float32(data, model)
    assert not any(found[name] for name in ("alone", "batch", "plain", "pieces"))
    assert min(found[name] for name in ("logits", "steps", "chunks")) > LIMIT


@pytest.mark.parametrize("figure", GOOD_32)
def test_each_figure_of_float32_is_demanded(figure: str) -> None:
    assert met_float32(GOOD_32)
    for bad in (False,) if GOOD_32[figure] is True else (2 * LIMIT, math.nan):
        assert not met_float32(GOOD_32 | {figure: bad})
    assert "TOKENS DIFFER" in golden_line(
        {"case": "x", **GOOD_32, "batch": False, "bfloat16": GOOD_16, "float16": GOOD_16}
    )


@pytest.mark.parametrize("figure", ["transformers", "whole", "steps", "alike", "any", "compared"])
def test_each_figure_of_16_bits_is_demanded(figure: str) -> None:
    assert met_16_bit(GOOD_16)
    for bad in (math.nan, 0.9 * GOOD_16[figure] if figure in ("transformers", "compared") else 1.0):
        assert not met_16_bit(GOOD_16 | {figure: bad})
    assert not met_16_bit(GOOD_16 | {"whole": 0.0})  # equal to float32, as if it ran in that


def test_a_mean_of_less_than_half_of_the_tokens_may_scatter_more() -> None:
    more = GOOD_16 | {"whole": FEWER * 1e-4}
    assert not met_16_bit(more)
    assert met_16_bit(more | {"counted": 0.49})
    assert not met_16_bit(more | {"counted": 0.49, "whole": 2.1e-4})


def test_steps_and_one_piece_have_the_experts_of_transformers() -> None:
    data = Golden(GOLDEN / "qwen35-moe")
    with data.load("numpy") as model:
        model.logits(data.prompts[1])  # a pass of this size has been
        for run in (in_one_piece, step_by_step):
            found = run(model, data.prompts[1])
            assert np.array_equal(found.experts, data.rows[1].experts)
            np.testing.assert_allclose(found.weights, data.rows[1].weights, atol=2e-5)
            np.testing.assert_allclose(found.logits, data.rows[1].logits, atol=2e-4)
        assert model.engine.cache.free == model.engine.cache.pages
        assert model.engine.cache.states.free == model.engine.cache.states.slots
