"""Gradients of whole models against torch autograd in float64 (tests/golden/README.md)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

import cuplama
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.driver import cuda_available
from cuplama.engine.engine import Engine
from cuplama.generation_config import Settings
from cuplama.model import Model
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.models.families import FAMILIES
from cuplama.train import gradients
from tests.fakes import FakeGpu
from tests.train.goldens import CASES, Array, Golden, golden, relative_error, whole_error

LOSS_TOLERANCE = 1e-6
TOLERANCE = 1e-5  # of the norm of each gradient
BF16_LOSS_TOLERANCE = 2.0**-8  # what rounding a logit of one unit costs at most
BF16_TENSOR = 4  # times transformers' own error: what a single tensor may be off


@pytest.fixture
def gpu() -> None:
    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")


def of_model(case: Golden, device: str, dtype: str = "float32") -> tuple[float, dict[str, Array]]:
    with cuplama.load(case.folder, device=device, dtype=dtype) as model:
        return gradients(model, case.ids)


def check(case: Golden, loss: float, found: Mapping[str, Array]) -> None:
    """Loss and gradients of a run in float32."""
    assert found.keys() == case.gradients.keys()
    assert abs(loss - case.loss) <= LOSS_TOLERANCE
    errors = {name: relative_error(found[name], wanted) for name, wanted in case.gradients.items()}
    assert not {name: error for name, error in errors.items() if error > TOLERANCE}
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}


def check_bf16(case: Golden, loss: float, found: Mapping[str, Array]) -> None:
    """Of a run in bfloat16: it is no further from the truth than transformers' own is.

    That is said of all gradients as one vector, and of the tensor in the middle. A single small tensor, or the loss,
    may be nearer to the truth by chance in either of the two.
    """
    assert abs(loss - case.loss) <= BF16_LOSS_TOLERANCE
    assert whole_error(found, case.gradients) <= case.bf16_error
    ratios = {name: relative_error(found[name], g) / case.bf16_errors[name] for name, g in case.gradients.items()}
    assert np.median(list(ratios.values())) <= 1
    assert not {name: ratio for name, ratio in ratios.items() if ratio > BF16_TENSOR}


def test_goldens_are_of_every_family() -> None:
    """Apertus, Gemma 4, Qwen3.5 and models with experts cannot be trained. Granite 4 has the nodes of Granite, and the
    InternLMs those of Llama."""
    families = {load_config(golden(name).folder).family.model_type for name in CASES}
    others = {"apertus", "gemma4_text", "granitemoehybrid", "internlm2", "internlm3"}
    others |= {"qwen3_5_text"} | {family.model_type for family in FAMILIES.values() if "{i}.router" in family.weights}
    assert families == {family.model_type for family in FAMILIES.values()} - others


@pytest.mark.parametrize("name", CASES)
def test_float32_on_numpy(name: str) -> None:
    case = golden(name)
    check(case, *of_model(case, "numpy"))


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_on_numpy(name: str) -> None:
    """Every activation and its gradient rounded, as on a GPU; sums in float32."""
    case = golden(name)
    check_bf16(case, *of_model(case, "numpy", "bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("gpt2", "f32"), ("qwen3", "f32"), ("mistral-window", "bf16")])
def test_on_the_emulator(name: str, dtype: str) -> None:
    """The kernels' own text, planned and fused as on a GPU without cuBLAS."""
    case, gpu = golden(name), FakeGpu(emulate=True)
    backend, config = CudaBackend(dtype, gpu=gpu), load_config(case.folder)
    weights = load_weights(case.folder, config)
    loaded = {w.source: backend.load_weight(w) for w in {w.source: w for w in weights.values()}.values()}
    arrays = {key: loaded[w.source] for key, w in weights.items()}
    model = Model(case.folder, config, None, Engine(backend, config, arrays, 64, 64), Settings())
    (check if dtype == "f32" else check_bf16)(case, *gradients(model, case.ids))
    assert gpu.launches


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", CASES)
def test_float32_on_a_gpu(name: str) -> None:
    case = golden(name)
    check(case, *of_model(case, "cuda"))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_on_a_gpu(name: str) -> None:
    case = golden(name)
    check_bf16(case, *of_model(case, "cuda", "bfloat16"))
