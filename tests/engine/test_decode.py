"""The decode loop: captured steps give what plain steps give. NumPy plays the capturing device here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama.dtypes import DTYPES
from cuplama.engine.batch import abstract_values, input_shapes
from cuplama.engine.decode import AHEAD, RING, decode_nodes, decode_step
from cuplama.engine.graphs import padded_sequences
from cuplama.engine.sampler import Needs, sampling_nodes
from cuplama.models.config import load_config
from cuplama.models.fusion import PREFILL_RULES, fuse
from cuplama.models.graph import decoder
from cuplama.ops.abstract import abstract, infer
from cuplama.ops.binding import bind_plan
from cuplama.ops.launch import Device
from cuplama.ops.linear import MAX_STREAMED_ROWS
from tests.paths import GOLDEN

CASES = sorted((GOLDEN).iterdir())
SAMPLED: dict[str, Any] = dict(
    max_tokens=24, temperature=1.0, seed=5, repetition_penalty=1.2, frequency_penalty=0.1, logprobs=2, min_tokens=3,
    logit_bias={3: 2.0}, stop_token_ids=[5, 6, 7, 8, 9, 10, 11],
)  # fmt: skip


def _load(case: Path) -> tuple[cuplama.Model, list[list[int]], Any]:
    golden = np.load(case / "golden.npz")
    context = json.loads((case / "meta.json").read_text())["context"]
    model = cuplama.load(case, device="numpy", context=context, cache_tokens=1000)
    prompts = [golden[f"prompt_{j}"].tolist() for j in range(4)]
    return model, prompts, golden


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_captured_steps_give_the_golden_tokens(case: Path) -> None:
    model, prompts, golden = _load(case)
    model.backend.captures = True
    greedy: dict[str, Any] = dict(max_tokens=24, temperature=0.0, ignore_eos=True)
    for j, (alone, batched) in enumerate(
        zip([model.generate(p, **greedy) for p in prompts], model.generate(prompts, **greedy), strict=True)
    ):
        assert alone.tokens == golden[f"greedy_{j}"].tolist()
        assert batched.tokens == alone.tokens
    assert model.engine.cache.free == model.engine.cache.pages


@pytest.mark.parametrize("case", CASES[1::5], ids=lambda p: p.name)
def test_captured_sampling_agrees_with_plain_steps(case: Path) -> None:
    """Sequences that end at different times, with every optional input of the sampler."""
    model, prompts, _ = _load(case)
    plain = model.generate(prompts, **SAMPLED)
    model.backend.captures = True
    captured = model.generate(prompts, **SAMPLED)
    assert len({len(c.tokens) for c in plain}) > 1
    for a, b in zip(plain, captured, strict=True):
        assert (a.tokens, a.finish_reason) == (b.tokens, b.finish_reason)
        assert a.logprobs is not None
        assert b.logprobs is not None
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-5)
            assert [i for i, _ in x.top] == [i for i, _ in y.top]


def test_a_captured_step_serves_again() -> None:
    """A second generation replays the graph of the first, with its own prompt and parameters."""
    model, prompts, golden = _load(CASES[-1])
    model.backend.captures = True
    loops = set[Any]()
    for _ in range(2):
        for j, prompt in enumerate(prompts):
            completion = model.generate(prompt, max_tokens=24, temperature=0.0, ignore_eos=True)
            assert completion.tokens == golden[f"greedy_{j}"].tolist()
            loops.add(model.engine.pipeline._loop)
    assert len(loops) == 1
    assert not len(model.engine.runner.steps)  # the loop is ready for the next sequence


def test_two_open_streams_share_captured_steps() -> None:
    model, prompts, golden = _load(CASES[-1])
    model.backend.captures = True
    greedy: dict[str, Any] = dict(max_tokens=24, temperature=0.0, ignore_eos=True)
    streams = [model.stream(prompts[j], **greedy) for j in (1, 2)]
    pairs = list(zip(*streams, strict=True))
    for i, j in enumerate((1, 2)):
        assert [pair[i].token.id for pair in pairs] == golden[f"greedy_{j}"].tolist()
    assert not len(model.engine.runner.steps)  # the loop that began with one had a row for the other
    loop = model.engine.pipeline._loop
    assert loop is not None
    assert loop.sequences == 2
    assert model.engine.cache.free == model.engine.cache.pages


def test_closing_a_stream_in_mid_flight_gives_the_pages_back() -> None:
    model, prompts, golden = _load(CASES[-1])
    model.backend.captures = True
    stream = model.stream(prompts[1], max_tokens=24, temperature=0.0, ignore_eos=True)
    first = [next(stream).token.id for _ in range(5)]
    stream.close()
    assert first == golden["greedy_1"].tolist()[:5]
    assert model.engine.cache.free == model.engine.cache.pages
    again = model.generate(prompts[1], max_tokens=24, temperature=0.0, ignore_eos=True)
    assert again.tokens == golden["greedy_1"].tolist()


def test_batch_sizes_cover_every_count() -> None:
    assert [padded_sequences(n) for n in (1, 8, 9, 13, 33, 64, 65, 96)] == [1, 8, 12, 16, 48, 64, 96, 96]


@pytest.mark.parametrize("size", [1, 8, 16])
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_what_is_read_before_a_wait_changes_in_no_step(case: Path, size: int) -> None:
    """append_attention reads lengths, pages and old keys early, gated_delta lengths, slots and states. So a step begins
    with an ordinary launch, which waits for the step before and its ``advance``, and nothing else writes to the cache:
    the last inputs of a convolution are read late."""
    config = load_config(case)
    step = decode_step(decoder(config), size, sampling_nodes(Needs()))
    shapes = {**input_shapes(size, size, 2, 0), "step": (1,), "ring": (4, size)}
    values: dict[str, Any] = {**abstract_values(config, DTYPES["bf16"], shapes, 3, 64)}
    floats = dict.fromkeys(("temperature", "top_p", "min_p"), abstract((size,), DTYPES["f32"]))
    values |= {**floats, "top_k": abstract((size,), DTYPES["i32"]), "seed": abstract((size,), DTYPES["u64"])}
    calls = [call for _, call in infer(step, values, DTYPES["bf16"])]
    for call in (calls[0], calls[-1]):
        assert call.op.kernels is not None
        plan = call.op.kernels(call, Device(arch=90))
        launches = bind_plan(plan, call, lambda _, *array: abstract(*array), lambda _, *array: abstract(*array))
        assert not any(launch.prototype.waits for launch in launches)
    assert step[-1].op == "advance"
    stateful = {"causal_conv", "gated_delta"} if config.delta_layers else set()
    assert {n.op for n in step if any(".cache." in name for name in n.outs)} == {"append_attention", *stateful}


def test_the_ring_has_a_row_that_no_step_in_flight_writes() -> None:
    """The host reads the row of the oldest step while ``AHEAD`` further ones may be queued."""
    assert RING > AHEAD >= 2


def test_norms_are_fused_up_to_the_rows_that_products_stream() -> None:
    graph = decoder(load_config(CASES[0]))
    few, many = (decode_nodes(graph, n) for n in (MAX_STREAMED_ROWS, MAX_STREAMED_ROWS + 1))
    assert len(few) == len(decode_nodes(graph, 1)) < len(many) == len(decode_nodes(graph, 64))


@pytest.mark.parametrize("sequences", [1, MAX_STREAMED_ROWS + 1])
def test_a_deterministic_step_has_the_nodes_of_a_prompt(sequences: int) -> None:
    graph = decoder(load_config(CASES[0]))
    prompt = fuse([*graph.body, *graph.every_row()], PREFILL_RULES)
    assert decode_nodes(graph, sequences, deterministic=True) == prompt != decode_nodes(graph, sequences)
