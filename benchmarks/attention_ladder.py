"""The ladder of attention kernels on a GPU: ``python -m benchmarks.attention_ladder [--out FILE]``.

For 512, 1,024, 4,096 and 16,384 tokens every rung of both ladders (cuplama/lab/ladder/rungs.py), 32 query and 8 key
heads of 128, bf16: checked first, then timed, beside torch's attention where torch is installed. Then a model of
random weights in the shape of Llama-3.2-1B on the lowest and on the highest rung: first token, and time between tokens.

    python -m benchmarks.attention_ladder --tables FILE --fill docs/attention.md --plot docs/attention.png

prints the results of FILE as Markdown tables, writes them between the marks of the document, and draws the prompt's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.record import record
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.errors import CuplamaError
from cuplama.lab import peaks, report
from cuplama.lab.check import relative_error
from cuplama.lab.dummy import dummy_model
from cuplama.lab.ladder.climb import climb, sizes_of
from cuplama.lab.ladder.picture import plot_ladder
from cuplama.lab.ladder.rungs import LADDERS
from cuplama.lab.ladder.whole import LadderPass, time_pass
from cuplama.lab.report import Column, significant
from cuplama.lab.timing import Spread
from cuplama.lab.trials import UNTIL_REPLAYED, Runs, Trial
from cuplama.model import Model

LENGTHS = (512, 1024, 4096, 16384)
MODEL = "llama-3.2-1b"
FIRST, ENGINE = "first token", "the engine"  # what is timed, and by what, beside rungs
_GENERATED = 64  # tokens of the engine's own decode steps

Row = dict[str, Any]


# ---- measuring -------------------------------------------------------------------------------------------------------


def kernels(lengths: Sequence[int], add: Callable[[Row], object]) -> None:
    """Both ladders at every length."""
    backend = CudaBackend("bf16")
    try:
        machine = peaks.measure(backend)
        for ladder in LADDERS:
            for s in lengths:
                for row in climb(backend, ladder, sizes_of(ladder, {"s": s}), "bf16", machine):
                    add({"ladder": ladder, **row, **machine.fields()})
    finally:
        backend.close()


def whole_model(lengths: Sequence[int], add: Callable[[Row], object]) -> None:
    """First token and time between tokens of the model: lowest rung, highest rung, and as the engine runs it."""
    context = max(lengths) + _GENERATED + 64
    with dummy_model(MODEL, "cuda", "bf16", context, context) as model:
        for ladder, what in (("attention", FIRST), ("decode", "between tokens")):
            for s in lengths:
                highest, lowest = LADDERS[ladder][-1], LADDERS[ladder][0]
                wanted = None
                for rung in (highest, lowest):
                    try:
                        one = LadderPass(model, rung, s, s if ladder == "attention" else 1)
                        logits, taken = time_pass(model.backend, one)
                    except CuplamaError as e:
                        add({"model": MODEL, "what": what, "attention": rung.name, "tokens": s, "problem": str(e)})
                        continue
                    wanted = logits if wanted is None else wanted
                    error = float(f"{relative_error(logits, wanted):.1e}")
                    add({**_whole_row(what, rung.name, s, taken), "logits_differ_by": error})
                    del one
                add(_whole_row(what, ENGINE, s, _engine(model, ladder, s)))


def _whole_row(what: str, attention: str, tokens: int, taken: Spread) -> Row:
    return {
        "model": MODEL,
        "what": what,
        "attention": attention,
        "tokens": tokens,
        "milliseconds": 1e3 * taken.median,
        "milliseconds_spread": 1e3 * taken.half_range,
        "problem": None,
    }


def _engine(model: Model, ladder: str, s: int) -> Spread:
    """Seconds of the same pass as ``generate`` runs it: fused, captured, by the clock of the host."""
    runs, trial = Runs(model), Trial(s, 0) if ladder == "attention" else Trial(0, _GENERATED, s - _GENERATED // 2)

    def once() -> float:
        return runs.prompt(trial) if trial.prompt else runs.generation(trial)[1] / trial.generated

    for _ in range(UNTIL_REPLAYED):
        once()
    return Spread(tuple(once() for _ in range(5)))


# ---- showing ---------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Markdown by the name of its mark in the document."""
    found = {}
    for name, ladder in (("prefill", "attention"), ("decode", "decode")):
        chosen = [row for row in rows if row.get("ladder") == ladder]
        rate, unit = ("teraflops", "TFLOP/s") if ladder == "attention" else ("terabytes_per_second", "TB/s")
        found[name] = _table(chosen, "s", {"rung": "rung"}, _time)
        speedup = partial(_number, field="times_lowest")
        found[f"{name} speed-ups"] = _table(chosen, "s", {"rung": "times as fast as the lowest rung"}, speedup)
        found[f"{name} rates"] = _table(chosen, "s", {"rung": unit}, partial(_number, field=rate))
    place = {rung.name: i for rungs in LADDERS.values() for i, rung in enumerate(rungs)} | {ENGINE: len(rows)}
    models = [row for row in rows if "model" in row]
    models.sort(key=lambda row: (row["what"] != FIRST, place[row["attention"]]))
    found["model"] = _table(models, "tokens", {"what": "time", "attention": "attention by"}, _time)
    return found


def _table(
    rows: Sequence[Mapping[str, Any]], length: str, names: Mapping[str, str], cell: Callable[[Mapping[str, Any]], str]
) -> str:
    """A line for each combination of the fields of ``names``, a column for each length."""
    lengths = sorted({row[length] for row in rows})
    lines: dict[tuple[str, ...], Row] = {}
    for row in rows:
        line = lines.setdefault(tuple(row[name] for name in names), {name: row[name] for name in names})
        line[str(row[length])] = cell(row)
    found = [{**dict.fromkeys(map(str, lengths), "-"), **line} for line in lines.values()]
    columns = [*(Column(*item) for item in names.items()), *(Column(str(s), f"{s:,} tokens") for s in lengths)]
    return report.render(columns, found, "md")


def _time(row: Mapping[str, Any]) -> str:
    """ "0.71 ms (0.72 ms)": measured, and in brackets foretold."""
    if row.get("milliseconds") is None:
        return "-"
    told = row.get("foretold_milliseconds")
    return _seconds(row["milliseconds"]) + (f" ({_seconds(told)})" if told is not None else "")


def _seconds(milliseconds: float) -> str:
    for factor, unit in ((1e3, "µs"), (1.0, "ms")):
        if milliseconds * factor < 1e3:
            return f"{significant(milliseconds * factor, 3)} {unit}"
    return f"{significant(milliseconds / 1e3, 3)} s"


def _number(row: Mapping[str, Any], field: str) -> str:
    return "-" if row[field] is None else significant(row[field], 3)


def fill(document: str, found: Mapping[str, str]) -> str:
    """The document with each table between its marks, ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    for name, table in found.items():
        marks = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.S)
        document, count = marks.subn(lambda m, table=table: f"{m[1]}\n{table}\n{m[2]}", document)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"the document has {count} places for the table {name!r}")
    return document


def show(results: Mapping[str, Any], document: Path | None, picture: Path | None) -> None:
    """Print the tables of a file of results, fill them into the document, and draw the picture."""
    rows = results["results"]
    found = tables(rows)
    print("\n".join(f"{name}:\n\n{table}" for name, table in found.items()))
    if document is not None:
        document.write_text(fill(document.read_text(encoding="utf-8"), found), encoding="utf-8")
    if picture is not None:
        chosen = [row for row in rows if row.get("ladder") == "attention"]
        plot_ladder(chosen, f"attention of a prompt, bf16: {results['environment']['gpu']}", picture)


def _print_row(row: Mapping[str, Any]) -> None:
    name = f"{row['ladder']} {row['rung']}" if "ladder" in row else f"{row['what']} {row['attention']}"
    told = f" (foretold {row['foretold_milliseconds']:.3g})" if row.get("foretold_milliseconds") else ""
    shown = row.get("problem") or f"{row['milliseconds']:.4g} ms{told}"
    extra = {k: round(v, 2) for k in ("teraflops", "terabytes_per_second", "times_below") if (v := row.get(k))}
    errors = {k: row[k] for k in ("relative_error", "logits_differ_by") if row.get(k) is not None}
    print(f"{row.get('s', row.get('tokens')):>6} {name:24} {shown} {extra or ''} {errors or ''}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file as well, after every part")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens, divided by commas")
    parser.add_argument("--part", choices=("kernels", "model", "all"), default="all")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="print the tables of a file of results; no GPU")
    parser.add_argument("--fill", type=Path, metavar="DOCUMENT", help="with --tables: write them into the document")
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="with --tables: draw the times of the prompt")
    args = parser.parse_args()
    if args.tables is not None:
        show(json.loads(args.tables.read_text(encoding="utf-8")), args.fill, args.plot)
        return 0
    lengths, rows, failed = [int(s) for s in args.lengths.split(",")], [], False

    def add(row: Row) -> None:
        rows.append(row)
        _print_row(row)

    parts = {"kernels": kernels, "model": whole_model}
    for name, part in parts.items():
        if args.part in (name, "all"):
            try:
                part(lengths, add)
            except Exception:  # what was measured before is kept
                traceback.print_exc()
                failed = True
            record(rows, args.out)
    print("\n".join(f"\n{name}:\n\n{table}" for name, table in tables(rows).items()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
