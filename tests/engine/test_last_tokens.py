"""A pass over prompts computes the end of the last layer for the tokens alone whose logits are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama.engine.sequence import SequenceState
from cuplama.models.config import load_config
from cuplama.models.graph import LAST, decoder
from tests.adapters import LORA
from tests.engine.feeding import release
from tests.paths import GOLDEN

CASES = sorted(GOLDEN.iterdir())
ADAPTED = sorted(LORA.iterdir())


def _load(case: Path, **options: Any) -> tuple[cuplama.Model, list[list[int]]]:
    golden = np.load(case / "golden.npz")
    context = json.loads((case / "meta.json").read_text())["context"]
    model = cuplama.load(case, device="numpy", context=context, cache_tokens=1000, **options)
    return model, [golden[f"prompt_{j}"].tolist() for j in range(4)]


def _fed(model: cuplama.Model, prompts: list[list[int]], passes: list[dict[int, int | None]]) -> dict[int, Any]:
    """The logits after each prompt, by these passes: number of a prompt -> how many tokens of it, None for the rest."""
    runner, found = model.engine.runner, dict[int, Any]()
    sequences = [SequenceState(p, model.params(), frozenset()) for p in prompts]
    for s in sequences:
        assert runner.cache.extend(s.pages, len(s.tokens))
        s.slot = runner.cache.states.begin()
    for counts in passes:
        parts = [(sequences[j], count or len(prompts[j]) - sequences[j].cached) for j, count in counts.items()]
        logits = runner.forward(runner.batch(parts))
        for s, count in parts:
            s.cached += count
        whole = [j for j in counts if sequences[j].cached == len(prompts[j])]
        assert (logits is None) == (not whole)
        found |= zip(whole, runner.backend.download(logits).copy() if whole else [], strict=True)
    release(runner.cache, sequences)
    return found


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_the_logits_after_a_prompt_are_the_last_of_all_of_its_logits(case: Path, captures: bool) -> None:
    """Whole prompts and parts of others in one pass, the middle of one alone, and as many rows as sequences."""
    model, prompts = _load(case)
    backend: Any = model.backend
    backend.captures = captures
    prompts[0] = prompts[0][:1]
    passes: list[dict[int, int | None]] = [{1: 2, 0: None, 2: 3}, {3: None, 2: 1, 1: None}, {2: 2}, {2: None}]
    with model:
        wanted = [model.logits(p)[-1] for p in prompts]
        for _ in range(2 + captures):  # no pass is captured before it comes again
            found = _fed(model, prompts, passes)
            assert found.keys() == {0, 1, 2, 3}
            for j, logits in found.items():
                # Each token hands the roundings of its state on to the next.
                atol = 5e-5 if model.config.delta_layers else 2e-5
                np.testing.assert_allclose(logits, wanted[j], atol=atol, rtol=0)
        assert bool(len(model.engine.runner.passes)) == captures


@pytest.mark.parametrize("name", ["gpt2-char", "llama3-gqa", "mistral-window"])
def test_a_prompt_whose_beginning_is_cached(name: str) -> None:
    model, prompts = _load(GOLDEN / name)
    beginning = (prompts[3] * 8)[:64]  # a page
    with model:
        model.generate([*beginning, 3], max_tokens=1)
        for end in ([5], [7, 8, 9]):
            done = model.generate([*beginning, *end], max_tokens=1, temperature=0.0, logprobs=1, ignore_eos=True)
            assert done.cached_tokens == 64
            z = model.logits([*beginning, *end])[-1].astype(np.float64)
            assert done.tokens == [z.argmax()]
            assert done.logprobs is not None
            assert done.logprobs[0].logprob == pytest.approx(z.max() - np.logaddexp.reduce(z), abs=1e-5)


def test_a_pass_in_the_middle_ends_with_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = _load(GOLDEN / "llama3-gqa")
    lists, run = list[Any](), model.backend.run

    def recorded(nodes: Any, *given: Any) -> Any:
        lists.append(nodes)
        return run(nodes, *given)

    monkeypatch.setattr(model.backend, "run", recorded)
    _fed(model, prompts, [{3: 4}, {3: None}])
    middle, body, last = lists
    end = model.config.num_layers - 1
    assert middle is body
    assert [node.op for node in body][-1] == "kv_append"
    read = {name for node in body for name in node.ins}
    assert {f"{end}.qkv_proj", "0.o_proj", "0.down_proj"} <= read
    assert not read & {f"{end}.o_proj", f"{end}.mlp_norm", f"{end}.gate_up_proj", f"{end}.down_proj", "lm_head"}
    assert [node.op for node in last][:3] == ["select_rows", "select_rows", "attention"]


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_both_parts_are_the_whole_model(case: Path) -> None:
    config = load_config(case)
    graph = decoder(config)
    cut = graph.cut()
    assert [*cut.body, *cut.rest] == list(graph.body)
    # A parallel MLP reads what attention reads, some layers what they are given of a token, and some have a gate.
    gated = len(config.delta_layers) > 0
    assert len(cut.between) == 2 + ("parallel" in config.flags) + (config.per_layer_size > 0) + gated
    rows = [node for node in cut.last if node.op == "select_rows"]
    assert [node.ins for node in rows] == [(name, "logit_rows") for name in cut.between]
    behind = cut.last[len(rows) :]
    assert [(n.op, n.outs, n.attrs) for n in behind] == [(n.op, n.outs, n.attrs) for n in [*cut.rest, *graph.head]]
    read = {name for node in behind for name in node.ins}
    assert not read & {*LAST, *cut.between, "slot_mapping", "positions"}  # nothing of every token


@pytest.mark.parametrize("folder", ADAPTED, ids=lambda p: p.name)
def test_an_adapter_goes_with_its_weights(folder: Path) -> None:
    with cuplama.load(GOLDEN / folder.name, device="numpy", adapter=folder, cache_tokens=1000) as model:
        with np.load(folder / "golden.npz") as data:
            prompts = [data[f"prompt_{j}"].tolist() for j in range(3)]
            wanted = [data[f"logits_{j}"][-1] for j in range(3)]
        for j, logits in _fed(model, prompts, [{0: None, 1: 2}, {2: 1, 1: None}, {2: None}]).items():
            np.testing.assert_allclose(logits, wanted[j], atol=2e-4, rtol=0)
