"""The arithmetic of memory planning."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from cuplama import memory
from cuplama.config import ModelConfig, load_config, parse_config
from cuplama.errors import DeviceError
from cuplama.kernel import Device
from cuplama.memory import MemoryPlan
from cuplama.op import DTYPES
from cuplama.prefill import KEPT_CHUNKS

_CASES = Path(__file__).parent / "golden" / "cases"
GB = 10**9


def _llama_8b() -> ModelConfig:
    return parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
        }
    )


def _elements(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in config.weight_shapes().values())


def test_the_cache_of_llama_8b_takes_128_kib_a_token() -> None:
    assert memory.cache_bytes(_llama_8b(), DTYPES["bf16"], 64) == 64 * 128 * 1024
    assert memory.cache_bytes(_llama_8b(), DTYPES["f32"], 65) == 128 * 256 * 1024  # whole pages


def test_the_workspace_is_the_worst_moment_of_a_pass() -> None:
    """With 2,000 tokens: the residual stream and the widest layer's input and output."""
    config, n = _llama_8b(), 2000
    got = memory.workspace_bytes(config, DTYPES["bf16"], n, Device())
    residual, up, act = 4 * n * 4096, 2 * n * 2 * 14336, 2 * n * 14336
    assert got == residual + up + act
    assert memory.workspace_bytes(replace(config, layers=2), DTYPES["bf16"], n, Device()) == got  # layers take turns


def test_the_residual_sum_takes_no_array_of_its_own() -> None:
    """With a narrow MLP the worst moment is the attention's output, the old residual stream and the new one."""
    config, n = replace(_llama_8b(), ffn=64), 2000
    attended, residual = 2 * n * 4096, 4 * n * 4096
    assert memory.workspace_bytes(config, DTYPES["bf16"], n, Device()) == attended + 2 * residual


@pytest.mark.parametrize("rows", [16, 128, 640, 1024, 2048])
def test_the_plan_covers_the_recorded_passes_that_are_kept(rows: int) -> None:
    """As many passes of that many rows as may be kept, each with memory of its own, and one beside them."""
    config, bf16 = _llama_8b(), DTYPES["bf16"]
    kept = KEPT_CHUNKS * 2048 // rows
    plan = memory.plan(config, _elements(config), bf16, 8192, 2048, Device())
    recorded, other = (memory.workspace_bytes(config, bf16, n, Device()) for n in (rows, 2048))
    assert kept * recorded + other + memory.FIXED <= plan.workspace


def test_many_logits_are_part_of_it() -> None:
    config = _llama_8b()
    assert memory.workspace_bytes(config, DTYPES["bf16"], 500, Device(), rows=500) >= 4 * 500 * 128256


@pytest.mark.parametrize("case", sorted(p.name for p in _CASES.iterdir()))
def test_every_family_can_be_planned(case: str) -> None:
    config = load_config(_CASES / case)
    plan = memory.plan(config, _elements(config), DTYPES["f16"], 64, 64, Device(arch=75))
    assert plan.weights == 2 * _elements(config)
    assert plan.workspace > memory.FIXED
    assert plan.total == sum(size for _, size in plan.parts())


def test_a_plan_that_fits_passes() -> None:
    config = _llama_8b()
    plan = memory.plan(config, _elements(config), DTYPES["bf16"], 8192, 2048, Device())
    assert 17.5 * GB < plan.total < 18.5 * GB
    memory.check(plan, plan.total, "a GPU")


def test_passes_are_shorter_where_memory_is_short() -> None:
    config, bf16, chunks = _llama_8b(), DTYPES["bf16"], (4096, 2048, 512)
    totals = {c: memory.plan(config, _elements(config), bf16, 8192, c, Device()).total for c in chunks}
    assert totals[4096] > totals[2048] > totals[512]
    for free, chosen in ((totals[4096], 4096), (totals[4096] - 1, 2048), (totals[512], 512), (totals[512] - 1, 512)):
        chunk, plan = memory.fit(config, _elements(config), bf16, 8192, chunks, free, Device())
        assert (chunk, plan.total) == (chosen, totals[chosen])


@pytest.mark.parametrize(
    ("plan", "free", "said"),
    [
        (MemoryPlan(10 * GB, 8 * GB, GB, 8000, "bf16"), 15 * GB, "--context 3968 would fit"),
        (MemoryPlan(20 * GB, 8 * GB, GB, 8000, "f32"), 15 * GB, "--dtype float16 would halve it"),
        (MemoryPlan(20 * GB, 8 * GB, GB, 8000, "bf16"), 15 * GB, "a smaller model or a larger GPU"),
    ],
)
def test_a_refusal_has_the_numbers_and_what_would_help(plan: MemoryPlan, free: int, said: str) -> None:
    with pytest.raises(DeviceError) as e:
        memory.check(plan, free, "Tesla T4")
    text = str(e.value)
    assert said in text
    assert "\n" not in text
    for number in (f"{plan.total / GB:.2f} GB", f"{plan.cache / GB:.2f} GB", "Tesla T4 has 15.00 GB free"):
        assert number in text


def test_the_context_that_would_fit_does_fit() -> None:
    config, bf16 = _llama_8b(), DTYPES["bf16"]
    need = memory.plan(config, _elements(config), bf16, 131072, 2048, Device())
    with pytest.raises(DeviceError, match=r"--context (\d+) would fit") as e:
        memory.check(need, 24 * GB, "RTX 4090")
    tokens = int(str(e.value).split("--context ")[1].split()[0])
    memory.check(memory.plan(config, _elements(config), bf16, tokens, 2048, Device()), 24 * GB, "RTX 4090")
    assert tokens > 32768
