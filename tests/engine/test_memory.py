"""The arithmetic of memory planning."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.device import Setup, open_backend
from cuplama.dtypes import DTYPES
from cuplama.engine import memory
from cuplama.engine.engine import Engine
from cuplama.engine.graphs import max_logits, padded_rows
from cuplama.engine.kv_cache import MAX_TOKENS, PAGE
from cuplama.engine.memory import MemoryPlan
from cuplama.engine.sequence import SequenceState
from cuplama.errors import DeviceError
from cuplama.models.config import Layer, ModelConfig, load_config, parse_config
from cuplama.models.presets import SHAPES, find_shape
from cuplama.ops.launch import Device
from cuplama.quant.weight import Weight
from cuplama.sampling_params import SamplingParams
from tests.fakes import PoolGpu, weights_on
from tests.paths import GOLDEN

_CASES = GOLDEN
GB = 10**9


def _llama(vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, context: int) -> ModelConfig:
    return parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": context,
        }
    )


def _llama_8b() -> ModelConfig:
    return _llama(128256, 4096, 14336, 32, 32, 8, 131072)


def _small() -> ModelConfig:
    return _llama(4000, 256, 896, 2, 8, 2, 8192)


def _bytes(config: ModelConfig, dtype: np.dtype[Any]) -> int:
    return dtype.itemsize * sum(math.prod(shape) for shape in config.weight_shapes().values())


def test_the_cache_of_llama_8b_takes_128_kib_a_token() -> None:
    assert memory.cache_bytes(_llama_8b(), DTYPES["bf16"], 64) == 64 * 128 * 1024
    assert memory.cache_bytes(_llama_8b(), DTYPES["f32"], 65) == 128 * 256 * 1024  # whole pages


def test_the_workspace_is_the_worst_moment_of_a_pass() -> None:
    """With 2,000 tokens: the residual stream and the widest layer's input and output."""
    config, n = _llama_8b(), 2000
    got = memory.workspace_bytes(config, DTYPES["bf16"], n, Device())
    residual, up, act = 4 * n * 4096, 2 * n * 2 * 14336, 2 * n * 14336
    assert got == residual + up + act
    assert memory.workspace_bytes(_two_layers(config), DTYPES["bf16"], n, Device()) == got  # layers take turns


def test_the_residual_sum_takes_no_array_of_its_own() -> None:
    """With a narrow MLP the worst moment is the attention's output, the old residual stream and the new one."""
    config, n = replace(_llama_8b(), intermediate_size=64), 2000
    attended, residual = 2 * n * 4096, 4 * n * 4096
    assert memory.workspace_bytes(config, DTYPES["bf16"], n, Device()) == attended + 2 * residual


@pytest.mark.parametrize("rows", [16, 128, 640, 1024, 2048])
def test_the_plan_covers_what_captured_passes_share(rows: int) -> None:
    """And one pass beside them."""
    config, bf16 = _llama_8b(), DTYPES["bf16"]
    plan = memory.plan(config, _bytes(config, bf16), bf16, 8192, 8192, 2048, Device())
    captured, other = (memory.workspace_bytes(config, bf16, n, Device()) for n in (rows, 2048))
    assert captured + other + memory.FIXED <= plan.workspace


def test_scratch_for_the_numbers_of_packed_weights_is_there_once() -> None:
    """Captured passes share it."""
    config, bf16 = _llama_8b(), DTYPES["bf16"]
    plain, packed = (memory.plan(config, GB, bf16, 8192, 8192, 2048, Device(), size) for size in (0, 1000))
    assert packed.workspace == plain.workspace + 1000


def test_many_logits_are_part_of_it() -> None:
    config = _llama_8b()
    assert memory.workspace_bytes(config, DTYPES["bf16"], 500, Device(), logit_rows=500) >= 4 * 500 * 128256


@pytest.mark.parametrize("case", sorted(p.name for p in _CASES.iterdir()))
def test_every_family_can_be_planned(case: str) -> None:
    config = load_config(_CASES / case)
    plan = memory.plan(config, _bytes(config, DTYPES["f16"]), DTYPES["f16"], 64, 64, 64, Device(arch=75))
    assert plan.weights == _bytes(config, DTYPES["f16"])
    assert plan.workspace > memory.FIXED
    assert plan.total == sum(size for _, size in plan.parts())


def test_a_plan_that_fits_passes() -> None:
    config = _llama_8b()
    plan = memory.plan(config, _bytes(config, DTYPES["bf16"]), DTYPES["bf16"], 8192, 8192, 2048, Device())
    assert 17.5 * GB < plan.total < 19 * GB
    memory.check(plan, plan.total, "a GPU")


def test_passes_are_shorter_where_memory_is_short() -> None:
    config, bf16, chunks = _llama_8b(), DTYPES["bf16"], (4096, 2048, 512)
    totals = {c: memory.plan(config, _bytes(config, bf16), bf16, 8192, 8192, c, Device()).total for c in chunks}
    assert totals[4096] > totals[2048] > totals[512]
    for free, chosen in ((totals[4096], 4096), (totals[4096] - 1, 2048), (totals[512], 512), (totals[512] - 1, 512)):
        chunk, plan = memory.fit(config, _bytes(config, bf16), bf16, 8192, 8192, chunks, free, Device())
        assert (chunk, plan.total) == (chosen, totals[chosen])


def test_a_long_pass_is_planned_only_where_it_takes_little_of_the_memory() -> None:
    config, bf16 = _llama_8b(), DTYPES["bf16"]
    size = _bytes(config, bf16)
    workspace = memory.plan(config, size, bf16, 8192, 8192, 8192, Device()).workspace
    for free, chosen in ((16 * workspace, 8192), (16 * workspace - 1, 4096)):
        assert memory.fit(config, size, bf16, 8192, 8192, (8192, 4096, 2048), free, Device())[0] == chosen
    assert 30 * GB < 16 * workspace < 60 * GB


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
    need = memory.plan(config, _bytes(config, bf16), bf16, 131072, 131072, 2048, Device())
    with pytest.raises(DeviceError, match=r"--context (\d+) would fit") as e:
        memory.check(need, 24 * GB, "RTX 4090")
    tokens = int(str(e.value).split("--context ")[1].split()[0])
    memory.check(memory.plan(config, _bytes(config, bf16), bf16, tokens, tokens, 2048, Device()), 24 * GB, "RTX 4090")
    assert tokens > 32768


def test_the_parts_of_a_workspace() -> None:
    """Activations of two passes, rotation tables, logits and the padding page, each by hand."""
    config, f16 = _small(), DTYPES["f16"]  # heads of 32, 2 KV heads, 2 layers

    def rest(config: ModelConfig, tokens: int, chunk: int, context: int = 100, rows: int = 64) -> int:
        work = 2 * memory.workspace_bytes(config, f16, rows, Device())
        plan = memory.plan(config, 20, f16, context, tokens, chunk, Device())
        assert (plan.weights, plan.tokens, plan.dtype) == (20, tokens, "f16")
        assert plan.cache == memory.cache_bytes(config, f16, tokens)
        return plan.workspace - math.ceil(memory.POOL * work) - memory.FIXED

    page = 2 * 2 * 2 * 64 * 32 * 2  # keys and values, layers, heads, tokens, elements, bytes
    tables, logits = 2 * 100 * 16 * 4, 4 * 4000
    step = math.ceil(memory.POOL * memory.step_bytes(config, f16, 1, Device()))
    assert rest(config, 200, 64) == page + tables + 64 * logits
    assert rest(config, 64, 512) == page + tables + 64 * logits  # a pass has no more rows than the cache
    assert rest(config, 200, 64, context=200) == page + 2 * tables + 64 * logits
    assert rest(config, 200, 3, rows=16) == page + tables + step  # a decode step's, with few rows
    assert rest(config, 0, 64, rows=16) == page + tables + step
    assert rest(replace(config, layers=(Layer(),) * 2), 200, 64) == page + 64 * logits
    wide = replace(config, vocab_size=1 << 23)
    assert rest(wide, 200, 64) == page + tables + 8 * 4 * (1 << 23)  # no more than max_logits


@pytest.mark.parametrize("sequences", [1, 8, 64, 256])
def test_a_decode_step_has_what_every_token_of_the_vocabulary_takes(sequences: int) -> None:
    """Logits and penalised logits, counts and bias; activations are small beside them."""
    config = _llama_8b()
    taken = memory.step_bytes(config, DTYPES["bf16"], sequences, Device())
    least = sequences * 4 * 4 * config.vocab_size
    assert least < taken < 1.02 * least


def test_a_plan_has_room_for_the_largest_decode_step() -> None:
    config, bf16 = _llama_8b(), DTYPES["bf16"]
    few, many, odd = (
        memory.plan(config, GB, bf16, 8192, 8192, 2048, Device(), running=n).workspace for n in (1, 256, 225)
    )
    step = math.ceil(memory.POOL * memory.step_bytes(config, bf16, 256, Device()))
    logits = 4 * config.vocab_size * max_logits(config.vocab_size)
    assert many - few == step - logits > 0
    assert odd == many  # as many sequences as the captured step has


@pytest.mark.parametrize("cache", ["bf16", "e4m3"])
@pytest.mark.parametrize("free", [24 * GB, 80 * GB, 139 * GB])
def test_the_largest_cache_takes_most_of_what_is_free_beside_the_rest(free: int, cache: str) -> None:
    config, bf16, chunks = _llama_8b(), DTYPES["bf16"], (4096, 2048)
    size, C = _bytes(_llama_8b(), bf16), DTYPES[cache]
    chunk, found = memory.fit(config, size, bf16, 8192, None, chunks, free, Device(), 0, C, running=64)
    assert found == memory.plan(config, size, bf16, 8192, found.tokens, chunk, Device(), 0, C, 64)
    assert found.tokens % PAGE == 0
    page = memory.cache_bytes(config, C, PAGE) + (2 * 64 * 8 * 128 * 2 if cache == "e4m3" else 0)
    taken = found.tokens // PAGE * page
    rest = found.total - taken
    assert rest == memory.plan(config, size, bf16, 8192, 8192, 4096, Device(), 0, C, 64).total - 8192 // PAGE * page
    assert taken <= memory.SHARE * (free - rest) < taken + page
    assert found.total < free


def test_the_largest_cache_holds_one_text_at_least_and_is_refused_as_any_other() -> None:
    config, bf16 = _llama_8b(), DTYPES["bf16"]
    size = _bytes(config, bf16)
    _, exact = memory.fit(config, size, bf16, 8192, 8192, (512,), 0, Device())
    for free in (exact.total, exact.total - 1, GB):
        _, found = memory.fit(config, size, bf16, 8192, None, (512,), free, Device())
        assert found == exact
    with pytest.raises(DeviceError, match="--context"):
        memory.check(found, exact.total - 1, "a GPU")


def test_a_step_has_as_many_sequences_as_the_cache_has_room_for() -> None:
    """Or fewer, if fewer may run; what is not asked for must not keep a model from a card on which it fits."""
    config, bf16 = _llama_8b(), DTYPES["bf16"]
    for tokens, running, sequences in ((8192, 256, 1), (10 * 8192, 256, 10), (10 * 8192, 4, 4), (100, 256, 1)):
        found = memory.fit(config, GB, bf16, 8192, tokens, (2048,), 10 * GB, Device(), running=running)[1]
        assert found == memory.plan(config, GB, bf16, 8192, tokens, 2048, Device(), running=sequences)


def test_the_largest_cache_has_no_more_tokens_than_places_have_numbers() -> None:
    assert memory.fit(_small(), 0, DTYPES["f16"], 64, None, (512,), 1 << 60, Device())[1].tokens == MAX_TOKENS


def test_an_fp8_cache_takes_half_and_16_bit_pages_of_one_layer() -> None:
    """Those a prompt's attention needs on tensor cores: as many as the cache has, one for padding among them."""
    config, bf16, e4m3, tokens = _llama_8b(), DTYPES["bf16"], DTYPES["e4m3"], 8192
    plain, fp8 = (memory.plan(config, 0, bf16, tokens, tokens, 512, Device(), cache=C) for C in (None, e4m3))
    assert memory.plan(config, 0, bf16, tokens, tokens, 512, Device(), cache=bf16) == plain
    assert plain.cache == 2 * fp8.cache == tokens * 128 * 1024
    pages = 2 * (tokens + 64) * 8 * 128 * 2  # keys and values, heads, head size, bytes
    padding = 64 * 128 * 1024
    assert fp8.workspace - plain.workspace == pages - padding // 2
    assert memory.shared_bytes(config, bf16, e4m3, tokens, Device()) == pages
    for T, device in (("f32", Device()), ("f16", Device(75))):  # there numbers are converted on their way
        assert memory.shared_bytes(config, DTYPES[T], e4m3, tokens, device) == 0
    assert "cache (8192 tokens in e4m3) 0.54 GB" in fp8.describe()
    assert "cache (8192 tokens) 1.07 GB" in plain.describe()


def test_a_plan_in_words() -> None:
    plan = MemoryPlan(10 * GB, 8 * GB, GB, 8000, "bf16")
    assert plan.total == 19 * GB
    assert plan.describe() == ("19.00 GB = weights (bf16) 10.00 GB + cache (8000 tokens) 8.00 GB + workspace 1.00 GB")


@pytest.mark.parametrize(
    ("plan", "free", "said"),
    [
        (MemoryPlan(10 * GB, 8 * GB, GB, 8000, "bf16"), 11 * GB + 64 * 10**6, "--context 64 would fit"),
        (MemoryPlan(10 * GB, 8 * GB, GB, 8000, "bf16"), 11 * GB + 64 * 10**6 - 1, "no --context is short enough"),
        (MemoryPlan(10 * GB, 8 * GB, GB, 8000, "bf16"), 19 * GB - 1, "--context 7936 would fit"),
        (MemoryPlan(20 * GB, GB, GB, 8000, "f32"), 11 * GB, "no --context is short enough"),
        (MemoryPlan(20 * GB, GB, GB, 8000, "f32"), 11 * GB + 1, "--dtype float16 would halve it"),
        (MemoryPlan(20 * GB, GB, GB, 8000, "f16"), 11 * GB + 1, "no --context is short enough"),
    ],
)
def test_what_would_help_at_the_limits(plan: MemoryPlan, free: int, said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        memory.check(plan, free, "a GPU")


# ---- against a pool like CuPy's --------------------------------------------------------------------------------------


def _two_layers(config: ModelConfig) -> ModelConfig:
    return replace(config, layers=config.layers[:2])


def _engine(config: ModelConfig, capacity: int = 1 << 60, context: int = 8192) -> Engine:
    gpu = PoolGpu(capacity)
    backend = CudaBackend("bf16", gpu=gpu)
    return Engine(backend, config, weights_on(gpu, config, backend.dtype), context, context, slots=2)


def _generate(engine: Engine, *prompts: int) -> None:
    params = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0.0)
    for _ in engine.generate([SequenceState([1] * n, params, frozenset()) for n in prompts]):
        pass


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_pool_takes_no_more_than_planned_for_a_pass(name: str) -> None:
    config = _two_layers(find_shape(name)[1])
    context = min(8192, config.context)
    engine, rows = _engine(config, context=context), min(4096, context - 4)
    gpu: Any = engine.backend.gpu  # type: ignore[attr-defined]
    before = gpu.used()
    _generate(engine, rows)
    taken = gpu.main_pool.total - before
    work = memory.workspace_bytes(config, DTYPES["bf16"], padded_rows(rows), Device())
    assert work < taken < memory.POOL * work + 16 * config.vocab_size + (1 << 20)


def test_memory_that_other_sizes_keep_is_given_back_when_it_is_needed() -> None:
    config, bf16 = _small(), DTYPES["bf16"]
    plan = memory.plan(config, _bytes(config, bf16), bf16, 8192, 8192, 4096, Device())
    engine = _engine(config)
    room = engine.backend.gpu.used() + plan.workspace - memory.FIXED  # type: ignore[attr-defined]
    engine = _engine(config, room)
    for _ in engine.logits([1] * 4096):
        pass
    sizes = [[4096], [2000, 2000], [1000] * 4, [100] * 8, [50] * 16, [64] * 32]
    for prompts in [s for s in sizes for _ in range(3)]:
        _generate(engine, *prompts)
    assert engine.cache.free == engine.cache.pages


def test_a_pass_for_which_there_is_no_memory_is_refused_and_loses_nothing() -> None:
    config = _small()
    base = _engine(config).backend.gpu.used()  # type: ignore[attr-defined]
    engine = _engine(config, base + (2 << 20))
    _generate(engine, 100)
    with pytest.raises(DeviceError, match=r"out of GPU memory: .* a shorter --context or a smaller batch"):
        _generate(engine, 4096)
    assert engine.cache.free == engine.cache.pages
    _generate(engine, 100)


def test_a_model_that_was_dropped_makes_room_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine is part of reference cycles: its memory comes back when they are found, not before."""
    config = _small()
    weights = {name: Weight(name, (name,), (np.zeros(s, np.float32),)) for name, s in config.weight_shapes().items()}
    plan = memory.plan(config, _bytes(config, DTYPES["f32"]), DTYPES["f32"], 512, 512, 512, Device())
    gpu = PoolGpu(plan.total)
    monkeypatch.setattr("cuplama.backends.cuda.backend.Gpu", lambda device: gpu)
    monkeypatch.setattr("cuplama.device.cuda_available", lambda: (True, ""))
    gc.disable()
    try:
        backend, _ = open_backend(Setup("cuda", "f32", 512, 512), config, weights)
        engine = Engine(backend, config, {n: backend.load_weight(w) for n, w in weights.items()}, 512, 512)
        _generate(engine, 100)
        del engine, backend
        gpu.give_back = lambda: None  # a real model has a Gpu of its own, which goes with it
        assert gpu.free_memory() < plan.total
        open_backend(Setup("cuda", "f32", 512, 512), config, weights)
    finally:
        gc.enable()


def test_a_model_that_was_dropped_makes_room_for_the_largest_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    config, sizes = _small(), []
    weights = {name: Weight(name, (name,), (np.zeros(s, np.float32),)) for name, s in config.weight_shapes().items()}
    gpu = PoolGpu(GB)
    monkeypatch.setattr("cuplama.backends.cuda.backend.Gpu", lambda device: gpu)
    monkeypatch.setattr("cuplama.device.cuda_available", lambda: (True, ""))
    for _ in range(2):
        backend, room = open_backend(Setup("cuda", "f32", 512, None), config, weights)
        tokens = room.tokens
        engine = Engine(backend, config, {n: backend.load_weight(w) for n, w in weights.items()}, 512, tokens)
        assert engine.cache.pages * PAGE == tokens > 512
        sizes.append(tokens)
        del engine, backend
        gpu.give_back = lambda: None
    assert sizes[0] == sizes[1]


def test_a_head_size_without_kernels_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.device.cuda_available", lambda: (True, ""))
    config = replace(_small(), head_dim=100)
    with pytest.raises(
        DeviceError, match=r"head_dim = 100: .*multiples of 8 up to 256, and of 16 up to 512; --device numpy"
    ):
        open_backend(Setup("cuda", "bf16", 64, 64), config, {})
