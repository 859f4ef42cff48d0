"""Captured prefill passes give what plain passes give. NumPy plays the capturing device here; see also
test_emulated_models.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuplama
from cuplama.engine.batch import Batch
from cuplama.engine.graphs import MAX_PASSES, padded_rows
from cuplama.engine.kv_cache import PAGE
from cuplama.engine.sequence import SequenceState
from cuplama.errors import DeviceError
from tests.engine.feeding import last_logits, release
from tests.paths import GOLDEN

CASES = sorted((GOLDEN).iterdir())
LLAMA = next(case for case in CASES if case.name == "llama3-gqa")


def _load(case: Path, records: bool = True, chunk: int = 512) -> tuple[cuplama.Model, list[list[int]]]:
    """A model, and four prompts: some cross the original context."""
    golden = np.load(case / "golden.npz")
    context = json.loads((case / "meta.json").read_text())["context"]
    model = cuplama.load(case, device="numpy", context=context, cache_tokens=1000)
    backend: Any = model.backend
    backend.captures, backend.prefill_chunk = records, chunk
    return model, [golden[f"prompt_{j}"].tolist() for j in range(4)]


def continued(model: cuplama.Model, prompts: list[list[int]]) -> list[np.ndarray[Any, Any]]:
    """The last logits of a ragged batch: of a part of each prompt, and then of the rest on top of it."""
    engine = model.engine
    sequences = [SequenceState(p, model.params(), frozenset()) for p in prompts]
    found = []
    for part in (0.6, 1.0):
        for s, p in zip(sequences, prompts, strict=True):
            s.tokens = p[: max(1, int(part * len(p)))]
            s.cached = min(s.cached, len(s.tokens) - 1)  # one of a single token is fed twice
        found.append(last_logits(engine, sequences))
    release(engine.cache, sequences)
    return found


@pytest.mark.parametrize("chunk", [512, 23])
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.name)
def test_captured_passes_agree_with_plain_ones(case: Path, chunk: int) -> None:
    """Ragged batches, continued and chunked prompts; every row's logits."""
    captured, prompts = _load(case, chunk=chunk)
    plain, _ = _load(case, records=False, chunk=chunk)
    one, other = ({name: a.shape for name, a in model.engine.cache.arrays.items()} for model in (captured, plain))
    assert one == other
    for batch in ([prompts[1]], prompts, prompts[:2] * 3):
        wanted = continued(plain, batch)
        for _ in range(2):  # nothing is captured before it comes again
            for a, b in zip(continued(captured, batch), wanted, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4, rtol=0)
    for _ in range(2):
        np.testing.assert_allclose(captured.logits(prompts[2]), plain.logits(prompts[2]), atol=1e-4, rtol=0)
    assert len(captured.engine.runner.passes)
    assert not len(plain.engine.runner.passes)


def test_what_is_left_over_reaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of no sequence become NaN on their way; neither a logit nor a page of a sequence may notice."""
    model, prompts = _load(LLAMA)
    wanted = [continued(model, prompts[:3]) for _ in range(2)][1]
    for name, array in model.engine.cache.arrays.items():
        array[...] = 0
        assert name.split(".")[1] == "cache"
    runner, rows = model.engine.runner, [0]
    run, forward = model.backend.run, runner.forward

    def spoiled(nodes: Any, *given: Any) -> Any:
        hidden = run(nodes, *given)
        for array in hidden.values() if nodes is runner._body else ():
            array[rows[0] :] = np.nan
        for array in model.engine.cache.arrays.values():
            array[model.engine.cache.padding_page] = np.nan
        return hidden

    def counted(batch: Batch) -> Any:
        rows[0] = batch.rows
        return forward(batch)

    monkeypatch.setattr(model.backend, "run", spoiled)
    monkeypatch.setattr(runner, "forward", counted)
    runner.passes.close()
    for a, b in zip(continued(model, prompts[:3]), wanted, strict=True):
        assert np.array_equal(a, b)
    for array in model.engine.cache.arrays.values():
        assert not np.isnan(array[: model.engine.cache.padding_page]).any()


@pytest.mark.parametrize(("rows", "padded"), [(1, 16), (16, 16), (17, 32), (65, 96), (128, 128), (129, 192), (512, 512),
                                              (513, 640), (2048, 2048), (2049, 2176)])  # fmt: skip
def test_rows_are_padded_to_the_next_size(rows: int, padded: int) -> None:
    assert padded_rows(rows) == padded


def _sizes(model: cuplama.Model) -> list[tuple[int, int]]:
    return model.engine.runner.passes.sizes  # type: ignore[return-value]


def test_the_first_pass_of_a_size_has_the_rows_of_the_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of other sizes may add up in another order: the same prompt gave other logits the second time."""
    model, _ = _load(LLAMA)
    rows: list[int] = []
    run = model.backend.run

    def counted(nodes: Any, values: Any, keep: Any) -> Any:
        if nodes is model.engine.runner._body:
            rows.append(len(values["input_ids"]))
        return run(nodes, values, keep)

    monkeypatch.setattr(model.backend, "run", counted)
    logits = [model.logits([5] * 13) for _ in range(4)]
    assert rows == [16] * 4
    assert all(np.array_equal(logits[0], x) for x in logits)


def test_the_logits_of_all_tokens_come_in_passes_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = _load(LLAMA)
    wanted = model.logits(prompts[3])
    monkeypatch.setattr("cuplama.engine.pipeline.max_logits", lambda vocab: 7)
    sizes = [len(rows) for rows in model.engine.logits(prompts[3])]
    assert max(sizes) == 7
    assert sum(sizes) == len(prompts[3])
    np.testing.assert_allclose(model.logits(prompts[3]), wanted, atol=1e-4, rtol=0)


def test_passes_of_nearly_the_same_size_share_a_graph() -> None:
    model, _ = _load(LLAMA)
    model.logits([5] * 17)
    assert _sizes(model) == []  # not before it comes again
    for n in (32, 20):
        model.logits([5] * n)
        assert _sizes(model) == [(32, 1)]
    for _ in range(2):
        model.generate([[5]] * 16, max_tokens=1)  # 16 rows of 16 sequences would be a decode step
    assert _sizes(model) == [(32, 1), (32, 16)]


def test_the_number_of_graphs_is_bounded() -> None:
    model, _ = _load(LLAMA, chunk=64)
    assert model.engine.runner.passes.most == MAX_PASSES
    model.engine.runner.passes.most = 3
    for n in (10, 60, 40, 10, 30):
        for _ in range(2):
            model.logits([5] * n)
    assert _sizes(model) == [(48, 1), (16, 1), (32, 1)]  # 64 was used least recently
    model.logits([5] * 60)  # as if it were there for the first time
    assert _sizes(model) == [(48, 1), (16, 1), (32, 1)]


def test_a_failed_graph_is_dropped_and_gives_the_pages_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = _load(LLAMA)
    wanted = [model.generate(prompts[1], max_tokens=4, temperature=0.0).tokens for _ in range(2)][1]
    passes = model.engine.runner.passes
    (size,) = passes.sizes
    before = passes.take(size)
    assert before is not None
    passes.keep(size, before)

    def fail(*_: Any) -> Any:
        raise DeviceError("out of GPU memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.backend, "run", fail)
        with pytest.raises(DeviceError):
            model.generate(prompts[1], max_tokens=4)
    cache = model.engine.cache
    assert cache.free == cache.pages
    assert _sizes(model) == []
    for _ in range(2):  # as if it were there for the first time
        assert model.generate(prompts[1], max_tokens=4, temperature=0.0).tokens == wanted
    assert passes.take(size) not in (None, before)


def test_a_stream_opened_while_another_reads_its_prompt() -> None:
    """Both use the same graphs, and the second makes the steps for both."""
    model, prompts = _load(LLAMA, chunk=16)
    one = prompts[3][:40]
    other = one[::-1]
    greedy: dict[str, Any] = dict(max_tokens=5, temperature=0.0, ignore_eos=True)
    alone = [model.generate(p, **greedy).tokens for p in (one, other)]
    inner: list[list[int]] = []
    sequence = SequenceState(one, model.params(**greedy), frozenset())

    def progress(done: int, total: int) -> None:
        if done < total:
            inner.append(model.generate(other, **greedy).tokens)

    found = [token.id for step in model.engine.generate([sequence], progress) for _, token in step]
    assert found == alone[0]
    assert inner == [alone[1]]


def test_padding_writes_to_the_padding_page() -> None:
    model, prompts = _load(LLAMA)
    for _ in range(2):
        model.generate(prompts[1], max_tokens=1)
    passes = model.engine.runner.passes
    kept = passes.take(passes.sizes[0])
    assert kept is not None
    host, n = kept._inputs.host, len(prompts[1])
    assert len(host["input_ids"]) > n
    assert (host["slot_mapping"][n:] // PAGE == model.engine.cache.padding_page).all()
    assert (host["slot_mapping"][:n] // PAGE != model.engine.cache.padding_page).all()
    assert host["cu_seqlens"].tolist() == [0, n]
