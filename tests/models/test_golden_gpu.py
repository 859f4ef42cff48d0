"""Every family on a GPU against what transformers computed in float32 (tests/golden/README.md), in all ways that tokens
take: launch by launch, captured and replayed, one prompt and a ragged batch, token by token, in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuplama.backends.cuda.driver import cuda_available
from tests.paths import GOLDEN
from tools.golden_figures import Golden, figures_16_bit, figures_float32, met_16_bit, met_float32

pytestmark = pytest.mark.gpu

CASES = sorted(GOLDEN.iterdir())


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")


@pytest.mark.parametrize("folder", CASES, ids=lambda p: p.name)
def test_float32(folder: Path) -> None:
    golden = Golden(folder)
    with golden.load("cuda") as model:
        found = figures_float32(golden, model)
    assert met_float32(found), f"{golden.name}: {found}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("folder", CASES, ids=lambda p: p.name)
def test_sixteen_bits_stay_as_close_to_float32_as_transformers(folder: Path, dtype: str) -> None:
    golden = Golden(folder)
    with golden.load("cuda", dtype) as model:
        found = figures_16_bit(golden, model, dtype)
    assert met_16_bit(found), f"{golden.name} {dtype}: {found}"
