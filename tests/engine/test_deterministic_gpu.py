"""``deterministic=True`` on a GPU: a text's tokens and log-probabilities are the same, bit for bit, in any batch, with
its prompt cut anywhere, and when what was generated is read again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama import Completion, Model
from cuplama.backends.cuda.driver import cuda_available
from cuplama.backends.cuda.fixed_cublas import FixedCublas
from cuplama.dtypes import DTYPES
from cuplama.lab.dummy import dummy_model
from cuplama.ops import OPS

pytestmark = pytest.mark.gpu

# How the model is kept and computed: each takes other kernels.
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "f16": {"dtype": "float16"},
    "f32": {"dtype": "float32"},
    "fp8 cache": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
    "fp8": {"dtype": "bfloat16", "quantize": "fp8"},
}
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": 5}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 5, "ignore_eos": True, "logprobs": 5}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")
    kind = KINDS[request.param]
    with cuplama.load(device="cuda", context=512, cache_tokens=64 * 256, deterministic=True, **kind) as model:
        yield model


def _prompt(model: Model, length: int) -> list[int]:
    return RNG.integers(0, model.config.vocab_size, length).tolist()  # type: ignore[no-any-return]


def _bits(completion: Completion) -> list[Any]:
    assert completion.logprobs is not None
    return [(t.id, t.logprob, t.top) for t in completion.logprobs]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [2, 3, 8, 9, 17, 33, 64])
def test_a_text_does_not_depend_on_its_batch(model: Model, batch: int, params: dict[str, Any]) -> None:
    prompt = _prompt(model, 37)
    alone = _bits(model.generate(prompt, max_tokens=24, **params))
    others = [_prompt(model, int(length)) for length in RNG.integers(1, 150, batch - 1)]
    for place in (0, batch - 1):
        prompts = [*others[:place], prompt, *others[place:]]
        assert _bits(model.generate(prompts, max_tokens=24, **params)[place]) == alone


@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 130])
def test_nor_on_how_its_prompt_is_cut(model: Model, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = _prompt(model, 300)
    whole, text = model.logits(prompt), _bits(model.generate(prompt, max_tokens=8, **GREEDY))
    monkeypatch.setattr(model.backend, "prefill_chunk", chunk)
    assert np.array_equal(model.logits(prompt), whole)
    assert _bits(model.generate(prompt, max_tokens=8, **GREEDY)) == text


def test_nor_on_whether_its_tokens_were_generated_or_read(model: Model) -> None:
    prompt = _prompt(model, 60)
    text = _bits(model.generate(prompt, max_tokens=150, **GREEDY))
    for cut in (1, 3, 64, 149):
        longer = [*prompt, *(token for token, *_ in text[:cut])]
        assert _bits(model.generate(longer, max_tokens=150 - cut, **GREEDY)) == text[cut:]


@pytest.mark.parametrize("T", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(("m", "k"), [(6144, 4096), (4096, 14336), (1536, 2048), (65, 40), (48, 4096)])
@pytest.mark.parametrize(("op", "U", "bias"), [("linear", "T", False), ("linear", "T", True), ("linear_add", "", True)])
def test_a_row_of_a_product_is_the_same_alone(T: str, m: int, k: int, op: str, U: str, bias: bool) -> None:
    from cuplama.backends.cuda.backend import CudaBackend

    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")
    backend, dtype = CudaBackend(T, deterministic=True), DTYPES[T]
    if backend.gpu.cublas is None:
        pytest.skip("needs cuBLAS, which is not installed")
    assert isinstance(backend.gpu.cublas, FixedCublas)
    x, w, b = (RNG.standard_normal(shape, np.float32).astype(dtype) for shape in ((600, k), (m, k), (m,)))
    a = [RNG.standard_normal((600, m), np.float32)] * (op == "linear_add")

    def product(rows: slice) -> np.ndarray[Any, Any]:
        ins = [backend.upload(i) for i in (x[rows], w, *(added[rows] for added in a), *[b] * bias)]
        (y,) = backend.call(OPS[op], ins, {"U": U} if U else {})
        return backend.download(y)

    whole = product(slice(0, 600))
    for rows in (slice(0, 1), slice(599, 600), slice(3, 6), slice(20, 36), slice(1, 65), slice(100, 300)):
        assert np.array_equal(product(rows).view(np.uint8), whole[rows].view(np.uint8)), rows
    backend.close()


def test_a_head_of_128_and_rows_as_long_as_those_of_a_large_model() -> None:
    """The bundled model has small matrices; here are others, of random numbers, with a graph's captured sizes."""
    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")
    with dummy_model("llama-3.2-1b", "cuda", "bfloat16", 1024, 16 * 1024, deterministic=True) as model:
        prompt = _prompt(model, 200)
        alone = _bits(model.generate(prompt, max_tokens=20, **GREEDY))
        others = [_prompt(model, int(length)) for length in RNG.integers(1, 700, 15)]
        for _ in range(2):  # launch by launch, then captured
            assert _bits(model.generate([*others, prompt], max_tokens=20, **GREEDY)[-1]) == alone
        longer = [*prompt, *(token for token, *_ in alone[:9])]
        assert _bits(model.generate(longer, max_tokens=11, **GREEDY)) == alone[9:]
