"""Decoding with an fp8 cache on a GPU: NumPy's logits, from prompts and from steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import cuplama
from cuplama import Model
from cuplama.backends.cuda.driver import cuda_available
from cuplama.dtypes import dtype_name
from tools.divergence import kl
from tools.runs import stepwise

pytestmark = pytest.mark.gpu

TEXT = "Once upon a time there was a little dog who lived in a big red house with a girl called Lily. " * 3


@pytest.fixture(scope="module")
def plain() -> Iterator[Model]:
    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")
    with cuplama.load(device="numpy", context=512, kv_cache_dtype="fp8") as model:
        yield model


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_logits_are_those_of_numpy(plain: Model, dtype: str, allowed: float) -> None:
    """allowed: the mean divergence, in nats. In float32 a key may be rounded to the other of two neighbours."""
    tokens = plain.encode(TEXT)[:120]
    wanted = plain.logits(tokens)
    with cuplama.load(device="cuda", dtype=dtype, context=512, kv_cache_dtype="fp8") as model:
        assert dtype_name(model.engine.cache.dtype) == "e4m3"
        for logits in (model.logits(tokens), stepwise(model, tokens)):
            assert np.isfinite(logits).all()
            assert kl(wanted, logits).mean() <= allowed


def test_replayed_steps_give_the_text_of_numpy(plain: Model) -> None:
    """Twice, so that prompts and steps come from captured graphs the second time."""
    wanted = plain.generate(TEXT[:60], max_tokens=40, temperature=0.0).tokens
    with cuplama.load(device="cuda", dtype="float32", context=512, kv_cache_dtype="fp8") as model:
        for _ in range(3):
            assert model.generate(TEXT[:60], max_tokens=40, temperature=0.0).tokens == wanted
