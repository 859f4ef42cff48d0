"""Trials: their names, what they cost in bytes and operations, and how often one runs before it is replayed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cuplama
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.completion import Timings
from cuplama.errors import ParameterError
from cuplama.lab.dummy import dummy_model
from cuplama.lab.trials import UNTIL_REPLAYED, Runs, Trial, prompt_operations, step_bytes, trials
from cuplama.models.config import Layer, parse_config
from tests.lab.common import TINY
from tests.paths import GOLDEN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_bytes_of_a_step_are_the_weights_once_and_the_cache(folder: Path) -> None:
    matrices = 2 * (32 * 64 + 32 * 32 + 96 * 32 + 32 * 48) + 100 * 32
    norms = 5 * 32
    with dummy_model(str(folder), "numpy", "auto", 64, 64) as model:
        cache = 2 * 2 * 2 * 8  # keys and values, layers, heads, head size
        assert step_bytes(model, 10, 3) == 4 * (matrices + norms + 3 * 10 * cache)


def test_an_fp8_cache_is_a_quarter_of_the_bytes_of_float32(folder: Path) -> None:
    seen = []
    for kind in ("auto", "fp8"):
        with dummy_model(str(folder), "numpy", "auto", 64, 64, kv_cache_dtype=kind) as model:
            seen.append(step_bytes(model, 10, 3) - step_bytes(model, 0, 3))
    assert seen == [4 * 3 * 10 * 2 * 2 * 2 * 8, 3 * 10 * 2 * 2 * 2 * 8]


def test_an_untied_embedding_is_not_traffic_and_a_window_bounds_the_cache(folder: Path) -> None:
    config = {**TINY, "architectures": ["MistralForCausalLM"], "sliding_window": 4, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    with dummy_model(str(folder), "numpy", "auto", 64, 64) as model:
        assert model.engine.runner.values["lm_head"] is not model.engine.runner.values["embed_tokens"]
        short, long = (step_bytes(model, n, 1) for n in (4, 60))
        assert short == long
        assert short - step_bytes(model, 3, 1) == 4 * 2 * 2 * 2 * 8
        assert step_bytes(model, 0, 1) == 4 * (2 * (32 * 64 + 32 * 32 + 96 * 32 + 32 * 48) + 100 * 32 + 5 * 32)


def test_operations_of_a_prompt() -> None:
    config = parse_config(TINY)
    matrices = 2 * (32 * 64 + 32 * 32 + 96 * 32 + 32 * 48)
    pairs = 11 + 12 + 13  # three tokens on top of ten
    wanted = 2 * (2 * 3 * matrices + 2 * 3200) + 4 * 32 * 2 * 2 * pairs
    assert prompt_operations(config, Trial(3, 0, 10, 2)) == wanted


def test_names_and_lengths_of_trials() -> None:
    found = trials((512, 0), (128,), (0, 4096), (1, 8))
    assert [t.name for t in found] == [
        "pp512", "pp512 b8", "pp512 @ d4096", "pp512 @ d4096 b8",
        "tg128", "tg128 b8", "tg128 @ d4096", "tg128 @ d4096 b8",
    ]  # fmt: skip
    assert [t.tokens for t in found[::2]] == [513, 4609, 130, 4225]
    with pytest.raises(ParameterError, match="nothing to measure"):
        trials((0,), (0,), (0,), (1,))


def test_operations_of_a_prompt_under_a_window() -> None:
    """A layer with a window of 4 sees 4 tokens at most, one without sees all; the matrices do not change."""
    config = parse_config(TINY)
    rope = config.layers[0].rope
    windows = replace(config, layers=(Layer(4, rope), Layer(0, rope)))
    each = 4 * 32  # a multiply-add for the score and one for the sum, over all heads

    def saved(trial: Trial) -> float:
        return prompt_operations(config, trial) - prompt_operations(windows, trial)

    assert saved(Trial(6, 0)) == each * ((1 + 2 + 3 + 4 + 5 + 6) - (1 + 2 + 3 + 4 + 4 + 4))
    assert saved(Trial(3, 0, 10, 2)) == 2 * each * ((11 + 12 + 13) - 3 * 4)
    assert saved(Trial(4, 0)) == 0


def test_bytes_of_a_step_under_a_window_of_one_layer(folder: Path) -> None:
    with dummy_model(str(folder), "numpy", "auto", 64, 64) as model:
        rope = model.config.layers[0].rope
        whole = step_bytes(model, 60, 3)
        model.config = replace(model.config, layers=(Layer(4, rope), Layer(0, rope)))
        assert whole - step_bytes(model, 60, 3) == 3 * (60 - 4) * 2 * 2 * 8 * 4  # keys and values, heads, size, bytes
        assert step_bytes(model, 4, 3) - step_bytes(model, 3, 3) == 3 * 2 * 2 * 2 * 8 * 4  # both layers grow
        assert step_bytes(model, 5, 3) - step_bytes(model, 4, 3) == 3 * 2 * 2 * 8 * 4  # one does


def test_a_warm_prompt_is_replayed(command_gpu: CudaBackend, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command_gpu.gpu.emulate = False  # type: ignore[attr-defined]
    captures, done = list[int](), list[float]()
    capture = command_gpu.gpu.capture

    def counted(body: Any) -> Any:
        captures.append(len(done))
        return capture(body)

    monkeypatch.setattr(command_gpu.gpu, "capture", counted)
    with dummy_model(str(folder), "cuda", "float32", 128, 128) as model:
        runs = Runs(model)
        for _ in range(UNTIL_REPLAYED + 2):
            done.append(runs.prompt(Trial(20, 0)))
    assert captures == [UNTIL_REPLAYED - 1]


class Calls:
    """Stands for a model: keeps what ``generate`` is called with, and takes its time from a list."""

    def __init__(self, clock: list[float], timings: Timings, tokens: int | None = None) -> None:
        self.config, self.clock, self.timings, self.tokens = parse_config(TINY), clock, timings, tokens
        self.calls: list[tuple[list[list[int]], dict[str, Any]]] = []

    def generate(self, prompts: list[list[int]], **options: Any) -> list[Any]:
        self.calls.append((prompts, options))
        self.clock.append(self.clock[-1] + 10)
        count = options["max_tokens"] if self.tokens is None else self.tokens
        return [SimpleNamespace(tokens=[0] * count, timings=self.timings) for _ in prompts]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found = [0.0]
    monkeypatch.setattr("cuplama.lab.trials.time.perf_counter", lambda: found[-1])
    return found


def test_generation_is_the_librarys_call(clock: list[float]) -> None:
    """10 seconds of which 2 are the prompt's; 3 of 16 tokens came while other prompts were read."""
    model: Any = Calls(clock, Timings(40, 2.0, 13, 7.0))
    first, taken = Runs(model).generation(Trial(0, 8, 20, 2))
    assert first == 2
    assert taken == pytest.approx((10 - 2) * 16 / 13)
    ((prompts, options),) = model.calls
    assert [len(p) for p in prompts] == [20, 20]
    assert options == {"temperature": 0.0, "max_tokens": 9, "ignore_eos": True, "seed": 0}


def test_a_prompt_on_top_of_others_is_read_behind_them(clock: list[float]) -> None:
    model: Any = Calls(clock, Timings(40, 2.0, 0, 0.0))
    assert Runs(model).prompt(Trial(5, 0, 20, 2)) == 10
    (before, _), (whole, options) = model.calls
    assert [len(p) for p in whole] == [25, 25]
    assert [p[:20] for p in whole] == before
    assert options["max_tokens"] == 1
    assert Runs(model).prompt(Trial(5, 0)) == 10
    assert len(model.calls) == 3  # nothing before where nothing is in the cache


def test_a_token_that_is_missing_is_noticed(clock: list[float]) -> None:
    model: Any = Calls(clock, Timings(40, 2.0, 13, 7.0), tokens=8)
    with pytest.raises(AssertionError, match="not every sequence has its 9 tokens"):
        Runs(model).generation(Trial(0, 8))


def test_of_experts_those_count_that_are_chosen() -> None:
    """One sequence reads as many as a token has, many sequences all; of a prompt each token has its own."""
    with cuplama.load(GOLDEN / "qwen3-moe", device="numpy") as model:
        config, expert = model.config, 3 * 24 * 32  # numbers of one; two layers have them
        one, two, many = (step_bytes(model, 0, batch) for batch in (1, 2, 1000))
        assert many - one == pytest.approx((9 - 3) * 2 * 4 * expert)
        assert two - one == pytest.approx((9 * (1 - (6 / 9) ** 2) - 3) * 2 * 4 * expert)
    trial = Trial(100, 0, 0, 1)
    more = prompt_operations(replace(config, experts_per_token=4), trial) - prompt_operations(config, trial)
    assert more == 2 * 2 * 100 * expert
