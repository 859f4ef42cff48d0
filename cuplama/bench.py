"""``cuplama bench``: how fast a model reads prompts and generates, in the manner of llama-bench.

A row is a test: ``pp512`` reads a prompt of 512 tokens and draws one; ``tg128`` then generates 128. ``@ d4096`` has
4,096 tokens in the cache before, ``b8`` is eight sequences at once. Times are what a caller of the library sees, by the
wall clock; each test is repeated after a warm-up. Beside them stand the ceilings of the machine, measured in the same
run: generation is held against the read bandwidth, prompts against the rate of a large matrix product.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import ceilings, report
from .cache import PAGE, pages_for
from .ceilings import Ceilings, Spread, random_weight
from .checkpoint import Weight
from .config import ModelConfig
from .engine import Generation
from .errors import ConfigError, DeviceError, ParameterError
from .model import Model, Settings, _context, load, start_engine
from .op import DTYPES
from .report import Column
from .sampling import SamplingParams
from .shapes import find_shape, is_shape

__all__ = [
    "COLUMNS",
    "Source",
    "Trial",
    "cache_tokens",
    "cold_start",
    "dummy_model",
    "measure",
    "plot",
    "run",
    "step_bytes",
    "text",
    "trials",
]

_WARM_UP = 8  # tokens
# Runs to warm up. A prompt of a size that was not there yet is not recorded; one that was is run as it is, the next is
# captured, and from then on it is replayed. A decode step is recorded the first time.
_UNTIL_REPLAYED = 3


@dataclass(frozen=True)
class Trial:
    """One row to measure. prompt and generated: tokens; one of them is 0. depth: tokens in the cache before."""

    prompt: int
    generated: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        what = f"pp{self.prompt}" if self.prompt else f"tg{self.generated}"
        return what + (f" @ d{self.depth}" if self.depth else "") + (f" b{self.batch}" if self.batch > 1 else "")

    @property
    def start(self) -> int:
        """Tokens of the prompt before generating: there must be one."""
        return max(1, self.depth)

    @property
    def tokens(self) -> int:
        """Tokens of each sequence at the end: the one that is drawn last is never fed, but has its place."""
        return self.depth + self.prompt + 1 if self.prompt else self.start + self.generated + 1


def trials(
    prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int], batches: Sequence[int]
) -> list[Trial]:
    """Every combination; 0 tokens to read or to generate is no test. Raises ParameterError if nothing is left."""
    found = [Trial(p, 0, d, b) for d in depths for b in batches for p in prompts if p]
    found += [Trial(0, n, d, b) for d in depths for b in batches for n in generated if n]
    if not found:
        raise ParameterError("nothing to measure: give tokens to read (-p) or to generate (-n)")
    return found


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Which model runs and how. model: folder, hub id or a known shape; dummy: random weights from its config alone."""

    model: str | None
    dummy: bool = False
    device: str = "auto"
    dtype: str = "auto"

    def open(self, context: int, cache_tokens: int) -> Model:
        """Load the model, or make it up."""
        if self.dummy:
            if self.model is None:
                raise ParameterError("--dummy-weights needs -m: a folder with a config.json, or a known shape")
            return dummy_model(self.model, self.device, self.dtype, context, cache_tokens)
        if is_shape(self.model):
            raise ConfigError(f"{self.model} is a known shape without weights; add --dummy-weights")
        return load(self.model, device=self.device, dtype=self.dtype, context=context, cache_tokens=cache_tokens)


def dummy_weights(config: ModelConfig, dtype: np.dtype[Any]) -> dict[str, Weight]:
    """Random weights by canonical name, as a checkpoint would give them. Scales of norms are near 1, the rest near 0.

    The head shares the embedding's array if the config ties them.
    """
    tied = bool(config.raw.get("tie_word_embeddings"))
    return {
        name: random_weight(
            name, shape, dtype, ("embed",) if name == "head" and tied else (name,), float(name.endswith("norm"))
        )
        for name, shape in config.weight_shapes().items()
    }


def dummy_model(model: str, device: str, dtype: str, context: int, cache_tokens: int) -> Model:
    """A model of that shape with random weights and without a tokenizer. dtype "auto": what the config states."""
    name, config = find_shape(model)
    weights = dummy_weights(config, DTYPES[config.stored])
    length = _context(config, context)
    engine = start_engine(config, weights, device, dtype, length, max(length, cache_tokens))
    return Model(Path(name), config, None, engine, Settings.read(Path(name), config, None, {}))


def cache_tokens(batch: int, tokens: int) -> int:
    """What the cache must hold for that many sequences of that length, in whole pages."""
    return batch * pages_for(tokens) * PAGE


def step_bytes(model: Model, length: float, batch: int) -> float:
    """Bytes that a decode step must read: every weight once, and the keys and values of ``length`` tokens a sequence.

    A table from which only rows are taken (embedding, learned positions) counts only if it is the head as well.
    """
    values, config = model.engine.values, model.config
    used = {id(values[n]): values[n] for n in config.weight_shapes() if n not in ("embed", "positions")}
    weights = sum(int(a.nbytes) for a in used.values())
    seen = sum(min(length, w) if w else length for w in config.windows)
    return weights + 2 * batch * seen * config.kv_heads * config.head_dim * model.backend.dtype.itemsize


def prompt_operations(config: ModelConfig, test: Trial) -> float:
    """Floating-point operations of reading a prompt: two per multiply-add, causal attention by the pairs it sees."""
    rows = test.batch * test.prompt
    shapes = config.weight_shapes()
    matrices = sum(s[0] * s[1] for n, s in shapes.items() if len(s) == 2 and n not in ("embed", "positions", "head"))
    head = test.batch * shapes["head"][0] * shapes["head"][1]  # of the last token alone
    at = np.arange(test.depth, test.depth + test.prompt, dtype=np.float64) + 1
    pairs = sum(float((np.minimum(at, w) if w else at).sum()) for w in config.windows)
    return 2 * (rows * matrices + head) + 4 * config.heads * config.head_dim * test.batch * pairs


# ---- one test --------------------------------------------------------------------------------------------------------


class _Runs:
    """Runs tests on one model. Prompts are random tokens, others at every repeat."""

    def __init__(self, model: Model) -> None:
        self._model, self._engine = model, model.engine
        self._rng = np.random.default_rng(0)

    def _sequences(self, batch: int, tokens: int, generated: int) -> list[Generation]:
        params = SamplingParams(temperature=0.0, max_tokens=generated, ignore_eos=True, seed=0)
        return [Generation(self._tokens(tokens), params, frozenset()) for _ in range(batch)]

    def _tokens(self, count: int) -> list[int]:
        found: list[int] = self._rng.integers(0, self._model.config.vocab, count).tolist()
        return found

    def prompt(self, test: Trial) -> float:
        """Seconds from the call to the first token, on the host, when the prompt is fed on top of ``depth`` tokens."""
        engine, backend = self._engine, self._engine.backend
        sequences = self._sequences(test.batch, test.depth, 1)
        with engine.cache.promise(test.batch * pages_for(test.tokens)):
            try:
                if test.depth:
                    backend.download(engine._last_rows(sequences))
                for s in sequences:
                    s.tokens += self._tokens(test.prompt)
                began = time.perf_counter()
                engine._draw(sequences)
                return time.perf_counter() - began
            finally:
                for s in sequences:
                    engine.cache.release(s.pages)

    def generation(self, test: Trial) -> tuple[float, float]:
        """(seconds to the first token, seconds for the ``generated`` tokens of each sequence after it)."""
        sequences = self._sequences(test.batch, test.start, test.generated + 1)
        began = time.perf_counter()
        stamps = []
        for _ in self._engine.generate(sequences):
            stamps.append(time.perf_counter())
        if len(stamps) != test.generated + 1:  # the cache was made for all sequences together
            raise AssertionError(f"{test.name} took {len(stamps)} steps")
        return stamps[0] - began, stamps[-1] - stamps[0]


def measure(model: Model, test: Trial, repeats: int, limits: Ceilings) -> dict[str, Any]:
    """A row of the table: a test, warmed up and repeated.

    tokens_per_second counts all sequences; ms_per_token is the time between two tokens of one sequence (generation) or
    per token read (prompt). gigabytes_per_second and its per cent are of generation, teraflops and its per cent of
    prompts.
    """
    runs = _Runs(model)
    if test.prompt:
        for _ in range(_UNTIL_REPLAYED):
            runs.prompt(test)
        taken = Spread(tuple(runs.prompt(test) for _ in range(repeats)))
        first, tokens, per_sequence = taken, test.prompt * test.batch, test.prompt * test.batch
        rate = prompt_operations(model.config, test) / taken.mean
        held = {
            "gigabytes_per_second": None,
            "percent_of_read_bandwidth": None,
            "teraflops": rate / 1e12,
            "percent_of_matrix_rate": limits.percent_arithmetic(rate),
        }
    else:
        for _ in range(_UNTIL_REPLAYED):
            runs.generation(Trial(0, min(_WARM_UP, test.generated), test.depth, test.batch))
        pairs = [runs.generation(test) for _ in range(repeats)]
        first, taken = (Spread(tuple(values)) for values in zip(*pairs, strict=True))
        tokens, per_sequence = test.generated * test.batch, test.generated
        # Step i attends to the prompt and the tokens fed until then: start + 1 in the first, growing by one.
        lengths = test.start + 1 + np.arange(test.generated)
        traffic = float(np.mean([step_bytes(model, float(n), test.batch) for n in _ends(lengths, model.config)]))
        rate = traffic * test.generated / taken.mean
        held = {
            "gigabytes_per_second": rate / 1e9,
            "percent_of_read_bandwidth": limits.percent_read(rate),
            "teraflops": None,
            "percent_of_matrix_rate": None,
        }
    speeds = Spread(tuple(tokens / t for t in taken.values))
    return {
        "test": test.name,
        "prompt_tokens": test.prompt,
        "generated_tokens": test.generated,
        "depth": test.depth,
        "batch": test.batch,
        "repeats": repeats,
        "tokens_per_second": speeds.mean,
        "tokens_per_second_std": speeds.std,
        "ms_per_token": 1e3 * taken.mean / per_sequence,
        "first_token_ms": 1e3 * first.mean,
        "first_token_ms_std": 1e3 * first.std,
        **held,
    }


def _ends(lengths: np.ndarray[Any, Any], config: ModelConfig) -> Sequence[int]:
    """Lengths whose mean traffic is that of all: both ends where it grows in a line, all where windows bend it."""
    return lengths.tolist() if any(config.windows) else [int(lengths[0]), int(lengths[-1])]


# ---- cold start ------------------------------------------------------------------------------------------------------

_CHILD = "import sys, time; began = time.time(); from cuplama import bench; bench._cold_child(began, sys.argv[1])"


def cold_start(source: Source) -> dict[str, float]:
    """Seconds from the start of a fresh process to its first token, and what they went to.

    start: the interpreter; import: cuplama; load: weights, with CuPy and the device; compile: kernels, or what it takes
    to find them in the cache on disk; first_token: one prompt token fed and one drawn. Raises DeviceError if the
    process fails.
    """
    environment = dict(os.environ)
    here = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (here, environment.get("PYTHONPATH"))))
    settings = json.dumps([source.model, source.dummy, source.device, source.dtype])
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, settings], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DeviceError(f"the process that measures the cold start failed: {last}")
    stamps = json.loads(done.stdout.splitlines()[-1])
    names = ("start", "import", "load", "compile", "first_token")
    points = [began, *stamps]
    parts = {f"{name}_seconds": points[i + 1] - points[i] for i, name in enumerate(names)}
    return {"total_seconds": points[-1] - began, **parts}


def _cold_child(began: float, settings: str) -> None:
    """What the fresh process does: load, one token, and the times at which each was done, as JSON."""
    imported = time.time()
    model = Source(*json.loads(settings)).open(PAGE, PAGE)
    with model:
        _ = [model.backend.download(a) for a in list(model.engine.values.values())[-1:]]  # wait for the copies
        loaded, before = time.time(), model.backend.compile_seconds
        next(iter(model.stream([0], max_tokens=1, temperature=0.0)))
        compiled = loaded + model.backend.compile_seconds - before  # as if all came first
        print(json.dumps([began, imported, loaded, compiled, time.time()]))


# ---- everything ------------------------------------------------------------------------------------------------------

COLUMNS = (
    Column("test", "test"),
    Column("tokens_per_second", "tokens/s", 5, "tokens_per_second_std"),
    Column("ms_per_token", "ms/token", 4),
    Column("gigabytes_per_second", "GB/s", 4),
    Column("percent_of_read_bandwidth", "% of read", 3),
    Column("teraflops", "TFLOP/s", 3),
    Column("percent_of_matrix_rate", "% of GEMM", 3),
    Column("first_token_ms", "first token ms", 4, "first_token_ms_std"),
)


def run(
    source: Source,
    wanted: Sequence[Trial],
    repeats: int,
    cold: bool = True,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Measure everything. say: told what happens next.

    Returns environment, ceilings, cold_start (or None) and rows, with stable field names.
    """
    context = max(t.tokens for t in wanted)
    room = max(cache_tokens(t.batch, t.tokens) for t in wanted)
    say(f"loading {source.model or 'the bundled model'}{' (random weights)' if source.dummy else ''}")
    with source.open(context, room) as model:
        say("measuring the ceilings")
        limits = ceilings.measure(model.backend)
        facts = {"model": source.model or "bundled", "weights": "random" if source.dummy else "own"}
        facts |= ceilings.environment(model.backend)
        rows = []
        for i, test in enumerate(wanted):
            say(f"{i + 1}/{len(wanted)}: {test.name}")
            rows.append({"model": facts["model"], "dtype": facts["dtype"], **measure(model, test, repeats, limits)})
    found: dict[str, Any] = {"environment": facts, "ceilings": show_ceilings(limits), "cold_start": None}
    if cold:
        say("measuring the cold start")
        found["cold_start"] = cold_start(source)
    return {**found, "rows": rows}


def show_ceilings(limits: Ceilings) -> dict[str, Any]:
    """The ceilings by stable names."""
    return {
        "read_gigabytes_per_second": limits.read / 1e9,
        "matrix_teraflops": limits.arithmetic / 1e12,
        "matrix_dtype": limits.dtype,
    }


def text(result: Mapping[str, Any], form: str) -> str:
    """The result in a form of ``report.FORMATS``; in Markdown with the environment above and the cold start below."""
    extra = {k: v for k, v in result.items() if k != "rows"}
    table = report.render(COLUMNS, result["rows"], form, extra)
    return table if form != "md" else "\n".join([*header(result), "", table.rstrip("\n"), *_footer(result)]) + "\n"


def header(result: Mapping[str, Any]) -> Iterator[str]:
    """Command, environment and ceilings, for people."""
    if "command" in result:
        yield f"$ {result['command']}\n"
    yield ceilings.header(result["environment"])
    limits = result["ceilings"]
    yield (
        f"measured ceilings: read {report.significant(limits['read_gigabytes_per_second'], 4)} GB/s, "
        f"{limits['matrix_dtype']} matrix product {report.significant(limits['matrix_teraflops'], 3)} TFLOP/s"
    )


def _footer(result: Mapping[str, Any]) -> Iterator[str]:
    cold = result["cold_start"]
    if cold is not None:
        parts = ", ".join(f"{k.removesuffix('_seconds').replace('_', ' ')} {v:.2f}" for k, v in list(cold.items())[1:])
        yield ""
        yield f"cold start: {cold['total_seconds']:.2f} s from process start to first token ({parts})"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """A bar per test: tokens per second, and how near to the ceiling that is. Generation left, prompts right."""
    figure = report.new_figure(10, 1.6 + 0.42 * max(2, len(result["rows"])))
    kinds = (
        ("generated_tokens", "generation", "percent_of_read_bandwidth", "of read bandwidth", "#1f6f8b"),
        ("prompt_tokens", "prompt", "percent_of_matrix_rate", "of matrix rate", "#c8553d"),
    )
    shown = [(k, rows) for k in kinds if (rows := [r for r in result["rows"] if r[k[0]]])]
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for ax, ((_, title, percent, of, colour), rows) in zip(axes, shown, strict=True):
        speeds = [r["tokens_per_second"] for r in rows]
        bars = ax.barh(range(len(rows)), speeds, xerr=[r["tokens_per_second_std"] for r in rows], color=colour)
        ax.bar_label(
            bars, [f" {s:,.0f}  ({r[percent]:.0f}% {of})" for s, r in zip(speeds, rows, strict=True)], fontsize=8
        )
        ax.set_yticks(range(len(rows)), [r["test"] for r in rows])
        ax.invert_yaxis()
        ax.set_xlim(0, 1.6 * max(speeds))
        ax.set_xlabel("tokens per second")
        ax.set_title(title)
        ax.spines[["top", "right"]].set_visible(False)
    facts = result["environment"]
    figure.suptitle(f"{facts['model']} on {facts['device']}, {facts['dtype']}, {facts['date'][:10]}", fontsize=10)
    report.save_figure(figure, path)
