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
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.kv_cache import PAGE
from ..errors import DeviceError
from ..model import Model
from ..models.config import ModelConfig
from . import peaks as ceilings
from . import report
from .dummy import Source
from .peaks import Peaks, Spread
from .report import Column
from .trials import _UNTIL_REPLAYED, Runs, Trial, cache_tokens, prompt_operations, step_bytes

__all__ = ["COLUMNS", "cold_start", "header", "measure", "plot", "run", "show_peaks", "text"]

_WARM_UP = 8  # tokens


def measure(model: Model, test: Trial, repeats: int, limits: Peaks) -> dict[str, Any]:
    """A row of the table: a test, warmed up and repeated.

    tokens_per_second counts all sequences; ms_per_token is the time between two tokens of one sequence (generation) or
    per token read (prompt). gigabytes_per_second and its per cent are of generation, teraflops and its per cent of
    prompts.
    """
    runs = Runs(model)
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
    found: dict[str, Any] = {"environment": facts, "ceilings": show_peaks(limits), "cold_start": None}
    if cold:
        say("measuring the cold start")
        found["cold_start"] = cold_start(source)
    return {**found, "rows": rows}


def show_peaks(limits: Peaks) -> dict[str, Any]:
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
    """A bar per test: tokens per second, and how near to the ceiling that is. Sequence left, prompts right."""
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
