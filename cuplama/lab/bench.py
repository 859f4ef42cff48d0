"""``cuplama bench``: how fast a model reads prompts and generates, in the manner of llama-bench.

A row is a trial: ``pp512`` reads a prompt of 512 tokens and draws one; ``tg128`` then generates 128. ``@ d4096`` has
4,096 tokens in the cache before, ``b8`` is eight sequences at once. Times are those of ``Model.generate``, by the wall
clock of its caller; each trial is repeated after a warm-up. Beside them stand the machine's peaks, measured in the same
run: generation is held against the read bandwidth, prompts against the rate of a large matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..dtypes import dtype_name
from ..model import Model
from ..models.config import ModelConfig
from . import peaks, report
from .busy import Others, remark
from .cold_start import cold_start
from .dummy import Source
from .environment import environment, one_line
from .peaks import Peaks
from .report import Column
from .steps import announced
from .timing import Spread
from .trials import UNTIL_REPLAYED, Runs, Trial, cache_tokens, prompt_operations, step_bytes

__all__ = ["COLUMNS", "header", "measure", "plot", "run", "text"]

_WARM_UP_TOKENS = 8  # generated at most


def measure(model: Model, trial: Trial, repeats: int, machine: Peaks) -> dict[str, Any]:
    """A row of the table: a trial, warmed up and repeated.

    machine: the peaks that the row is held against. tokens_per_second counts all sequences; ms_per_token is the time
    between two tokens of one sequence (generation) or for each token read (prompt). gigabytes_per_second and its per
    cent are there for generation, teraflops and its per cent for prompts.
    """
    held: dict[str, Any] = dict.fromkeys(
        ("gigabytes_per_second", "percent_of_read_bandwidth", "teraflops", "percent_of_matrix_rate")
    )
    if trial.prompt:
        first = taken = _prompts(model, trial, repeats)
        tokens, per_sequence = trial.prompt * trial.batch, trial.prompt * trial.batch
        rate = prompt_operations(model.config, trial) / taken.mean
        held |= {"teraflops": rate / 1e12, "percent_of_matrix_rate": machine.percent_arithmetic(rate)}
    else:
        first, taken = _generations(model, trial, repeats)
        tokens, per_sequence = trial.generated * trial.batch, trial.generated
        rate = _generated_bytes(model, trial) / taken.mean
        held |= {"gigabytes_per_second": rate / 1e9, "percent_of_read_bandwidth": machine.percent_read(rate)}
    speeds = Spread(tuple(tokens / t for t in taken.values))
    return {
        "test": trial.name,
        "prompt_tokens": trial.prompt,
        "generated_tokens": trial.generated,
        "depth": trial.depth,
        "batch": trial.batch,
        "repeats": repeats,
        "tokens_per_second": speeds.mean,
        "tokens_per_second_std": speeds.std,
        "ms_per_token": 1e3 * taken.mean / per_sequence,
        "first_token_ms": 1e3 * first.mean,
        "first_token_ms_std": 1e3 * first.std,
        **held,
    }


def _prompts(model: Model, trial: Trial, repeats: int) -> Spread:
    """Seconds to the first token."""
    runs = Runs(model)
    for _ in range(UNTIL_REPLAYED):
        runs.prompt(trial)
    return Spread(tuple(runs.prompt(trial) for _ in range(repeats)))


def _generations(model: Model, trial: Trial, repeats: int) -> tuple[Spread, Spread]:
    """Seconds to the first token, and for the tokens after it."""
    runs = Runs(model)
    for _ in range(UNTIL_REPLAYED):
        runs.generation(Trial(0, min(_WARM_UP_TOKENS, trial.generated), trial.depth, trial.batch))
    first, taken = zip(*(runs.generation(trial) for _ in range(repeats)), strict=True)
    return Spread(first), Spread(taken)


def _generated_bytes(model: Model, trial: Trial) -> float:
    """Bytes that the trial's decode steps read. Step i attends to the prompt and i + 1 tokens that were fed since."""
    lengths = trial.start + 1 + np.arange(trial.generated)
    mean = np.mean([step_bytes(model, float(n), trial.batch) for n in _ends(lengths, model.config)])
    return float(mean) * trial.generated


def _ends(lengths: np.ndarray[Any, Any], config: ModelConfig) -> Sequence[int]:
    """Lengths whose mean traffic is that of all ``lengths``.

    The first and the last will do where the traffic of a step grows linearly with the length; a window makes it stop
    growing, and then every length counts.
    """
    return lengths.tolist() if any(config.windows) else [int(lengths[0]), int(lengths[-1])]


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
    trials: Sequence[Trial],
    repeats: int,
    cold: bool = True,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Measure the trials, each ``repeats`` times. cold: time a cold start as well; say: told what comes next.

    Returns environment, peaks, cold_start (or None), other_cores (what other processes used meanwhile, on average; or
    None) and rows, with stable field names.
    """
    context = max(t.tokens for t in trials)
    room = max(cache_tokens(t.batch, t.tokens) for t in trials)
    say(f"loading {source.model or 'the bundled model'}{' (random weights)' if source.dummy else ''}")
    with source.open(context, room) as model:
        say("measuring the peaks")
        machine = peaks.measure(model.backend)
        own = f"own, {source.quantize} from loading on" if source.quantize else "own"
        facts = {"model": source.model or "bundled", "weights": "random" if source.dummy else own}
        facts |= environment(model.backend) | {"kv_cache_dtype": dtype_name(model.engine.cache.dtype)}
        rows, others = [], Others()
        for trial in announced(trials, lambda trial: trial.name, say):
            rows.append({"model": facts["model"], "dtype": facts["dtype"], **measure(model, trial, repeats, machine)})
        other_cores = others.cores()
    found: dict[str, Any] = {"environment": facts, "peaks": machine.fields(), "cold_start": None}
    found["other_cores"] = other_cores
    if cold:
        say("measuring the cold start")
        found["cold_start"] = cold_start(source)
    return {**found, "rows": rows}


def text(result: Mapping[str, Any], form: str) -> str:
    """The result in a form of ``report.FORMATS``; in Markdown with the environment above and the cold start below."""
    extra = {k: v for k, v in result.items() if k != "rows"}
    table = report.render(COLUMNS, result["rows"], form, extra)
    return table if form != "md" else "\n".join([*header(result), "", table.rstrip("\n"), *_footer(result)]) + "\n"


def header(result: Mapping[str, Any]) -> Iterator[str]:
    """Command, environment and peaks, for people."""
    if "command" in result:
        yield f"$ {result['command']}\n"
    yield one_line(result["environment"])
    machine = result["peaks"]
    yield (
        f"measured peaks: read {report.significant(machine['read_gigabytes_per_second'], 4)} GB/s, "
        f"{machine['matrix_dtype']} matrix product {report.significant(machine['matrix_teraflops'], 3)} TFLOP/s"
    )


def _footer(result: Mapping[str, Any]) -> Iterator[str]:
    busy = remark(result["other_cores"])
    if busy is not None:
        yield ""
        yield busy
    cold = result["cold_start"]
    if cold is not None:
        parts = ", ".join(f"{k.removesuffix('_seconds').replace('_', ' ')} {v:.2f}" for k, v in list(cold.items())[1:])
        yield ""
        yield f"cold start: {cold['total_seconds']:.2f} s from process start to first token ({parts})"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """A bar per trial: tokens per second, and how near to the peak that is. Generation left, prompts right."""
    figure = report.new_figure(10, 1.6 + 0.42 * max(2, len(result["rows"])))
    kinds = (
        ("generated_tokens", "generation", "percent_of_read_bandwidth", "of read bandwidth", "#1f6f8b"),
        ("prompt_tokens", "prompt", "percent_of_matrix_rate", "of matrix rate", "#c8553d"),
    )
    shown = [(k, rows) for k in kinds if (rows := [r for r in result["rows"] if r[k[0]]])]
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    labels: list[Any] = []  # of the bars, for each of the axes
    for ax, ((_, title, percent, of, colour), rows) in zip(axes, shown, strict=True):
        speeds = [r["tokens_per_second"] for r in rows]
        bars = ax.barh(range(len(rows)), speeds, xerr=[r["tokens_per_second_std"] for r in rows], color=colour)
        names = [f" {s:,.0f}  ({r[percent]:.0f}% {of})" for s, r in zip(speeds, rows, strict=True)]
        labels.append(ax.bar_label(bars, names, fontsize=8))
        ax.set_yticks(range(len(rows)), [r["test"] for r in rows])
        ax.invert_yaxis()
        ax.locator_params(axis="x", nbins=4)  # more numbers would run into each other
        ax.set_xlabel("tokens per second")
        ax.set_title(title)
        ax.spines[["top", "right"]].set_visible(False)
    facts = result["environment"]
    figure.suptitle(f"{facts['model']} on {facts['device']}, {facts['dtype']}, {facts['date'][:10]}", fontsize=10)
    for ax, texts in zip(axes, labels, strict=True):
        report.make_room(ax, texts)
    report.save_figure(figure, path)
