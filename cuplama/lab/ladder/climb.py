"""Every rung of a ladder, checked by the judge and then timed.

A rung that is wrong has no time, and one that does not fit into memory says so; the others go on. What the judge sees
of a large shape are the first, the middle and the last rows: those of a smaller problem each, so that the reference
computes only them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...backends import Backend
from ...backends.cuda.nvrtc import compile_program
from ...errors import CuplamaError, DeviceError, ParameterError
from ...ops.launch import Device
from ...ops.op import Call
from ..check import BackendExecutor, Run, WrongResultError, check, expected, relative_error, run_guarded, uploaded
from ..emulation import Emulator
from ..inventory import expressions, judge
from ..peaks import Peaks
from ..report import Column
from ..timing import Spread, cache_bytes, rotation, seconds, time_workload
from ..workloads import Workload
from . import ops
from .peer import torch_attention, torch_missing
from .rungs import LADDERS, Inputs, Rung

__all__ = ["case_workloads", "check_compiled", "check_emulated", "check_rung", "climb", "columns", "judged", "sizes_of"]

_ROWS = 32  # rows that are judged at the beginning, in the middle and at the end
_LONG = 5e-3  # seconds from which on a call is timed as it is, not as part of a replayed graph
_VERY_LONG = 0.5
_PEER = "torch"


def sizes_of(ladder: str, given: Mapping[str, Any]) -> dict[str, int]:
    """n, s, num_heads, H and D of a shape; s is n where only n is given. Raises ParameterError."""
    op = LADDERS[ladder][0].op
    if unknown := sorted(given.keys() - op.shape.keys()):
        raise ParameterError(f"the ladder has no {unknown[0]!r}; it has {', '.join(op.shape)}")
    if ladder == "attention" and "n" in given:
        given = {"s": given["n"], **given}
    elif ladder == "attention" and "s" in given:
        given = {"n": given["s"], **given}
    sizes = {**op.shape, **given}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ParameterError(f"--shape: {name} is {value}, not a whole number of at least 1")
    n, s, num_heads, H, D = (sizes[name] for name in ("n", "s", "num_heads", "H", "D"))
    if num_heads % H or n > s or D not in (64, 128) or (ladder == "decode" and n != 1):
        needs = "num_heads % H == 0, D = 64 or 128, " + ("n = 1" if ladder == "decode" else "n <= s")
        raise ParameterError(f"the ladder needs {needs}, not n={n},s={s},num_heads={num_heads},H={H},D={D}")
    return sizes


def case_workloads(rung: Rung, ladder: str, dtype: str) -> list[Workload]:
    """The ladder's small cases for a rung; also in float32, where an error shows that rounding to 16 bits hides."""
    cases = LADDERS[ladder][0].op.cases
    return [
        rung.workload(Inputs.random(case, T, seed), T)
        for T in dict.fromkeys((dtype, "f32"))
        for seed, case in enumerate(cases)
    ]


def check_rung(workloads: Sequence[Workload], run: Run) -> None:
    """Hold what ``run`` computes to the reference. Raises WrongResultError."""
    for workload in workloads:
        arrays = workload.arrays()
        check(workload, arrays, run(workload, arrays))


def judged(inputs: Inputs, dtype: str, y: np.ndarray[Any, Any]) -> float:
    """The largest relative error of the rows that are looked at. y: [n, num_heads*D]. Raises WrongResultError."""
    n, worst = len(inputs.q), 0.0
    for first in sorted({0, max(0, n // 2 - _ROWS // 2), max(0, n - _ROWS)}):
        end = min(first + _ROWS, n)
        part = inputs.rows(first, end)
        workload = Workload(ops.prefill_naive, (part.q, part.k, part.v), part.attrs, dtype)
        wanted = expected(workload, workload.ins)
        check(workload, workload.ins, [y[first:end]], wanted)
        worst = max(worst, relative_error(y[first:end], wanted[0]))
    return worst


# ---- without a GPU ---------------------------------------------------------------------------------------------------


def check_emulated(workloads: Sequence[Workload], device: Device) -> None:
    """Run the kernels of workloads on the CPU. Raises WrongResultError."""
    emulator = Emulator(arch=device.arch)
    emulator.prepare(workloads)
    check_rung(workloads, emulator.outputs)


def check_compiled(ladder: str, dtype: str, device: Device) -> Iterator[tuple[str, str]]:
    """Compile what the rungs' small cases launch: (C++ name, problem or "") of each instance. Raises CompileError."""
    wanted: dict[str, dict[str, None]] = {}
    for rung in LADDERS[ladder]:
        for workload in case_workloads(rung, ladder, dtype):
            for file, expression in expressions(workload.call, device):
                wanted.setdefault(file, {})[expression] = None
    for file, names in wanted.items():
        for found in judge(compile_program(file, list(names), device.arch)):
            yield found.expression or file, found.problem or ""


# ---- on a GPU --------------------------------------------------------------------------------------------------------


_RATES = {
    "attention": (Column("teraflops", "TFLOP/s", 3), Column("percent_of_matrix_rate", "% of GEMM", 3)),
    "decode": (Column("terabytes_per_second", "TB/s", 3), Column("percent_of_read_bandwidth", "% of read", 3)),
}


def columns(ladder: str, rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns of a ladder's table that have anything to show."""
    found = (
        Column("rung", "rung"),
        Column("milliseconds", "ms", 3, "milliseconds_spread"),
        Column("foretold_milliseconds", "foretold", 3),
        Column("times_lowest", "x lowest", 3),
        Column("times_below", "x below", 3),
        *_RATES[ladder],
        Column("relative_error", "error"),
        Column("problem", "not timed because"),
    )
    return [column for column in found if any(row[column.field] is not None for row in rows)]


def climb(
    backend: Backend,
    ladder: str,
    sizes: Mapping[str, int],
    dtype: str,
    peaks: Peaks,
    say: Callable[[str], object] = lambda text: None,
) -> list[dict[str, Any]]:
    """A row for each rung, and one for PyTorch where it is installed: see ``columns``.

    TFLOP/s count the pairs of query and key that the mask lets through, TB/s every array once: what a perfect kernel
    would do. problem: why a rung has no time; wrong: whether that is because the judge refused its result.
    """
    inputs = Inputs.random(sizes, dtype)
    ways: list[tuple[dict[str, Any], Callable[[], Measured]]] = []
    for rung in LADDERS[ladder]:
        row = _row(rung.name, rung.title, sizes, dtype, _foretold(rung, ladder, sizes, dtype))
        ways.append((row, partial(_run, backend, rung, ladder, inputs, dtype)))
    peer = _row(_PEER, "torch.nn.functional.scaled_dot_product_attention", sizes, dtype, None)
    ways.append((peer, partial(_run_peer, inputs, dtype)))
    for row, run in ways:
        say(f"{ladder} n={sizes['n']} s={sizes['s']}: {row['rung']}")
        _measure(row, run, inputs, dtype)
    rows = [row for row, _ in ways]
    _compare(rows, Workload(ops.prefill_naive, (inputs.q, inputs.k, inputs.v), inputs.attrs, dtype).call, peaks)
    return rows


Measured = tuple[np.ndarray[Any, Any], Callable[[], Spread]]
"""A result, and what times its making."""


def _foretold(rung: Rung, ladder: str, sizes: Mapping[str, int], dtype: str) -> float | None:
    """Microseconds, if the shape is one that they were foretold for."""
    usual = {**LADDERS[ladder][0].op.shape, "n": sizes["n"], "s": sizes["s"]}
    if dtype != "bf16" or sizes != usual or (ladder == "attention" and sizes["n"] != sizes["s"]):
        return None
    return rung.foretold.get(sizes["s"])


def _row(name: str, title: str, sizes: Mapping[str, int], dtype: str, foretold: float | None) -> dict[str, Any]:
    """A row without measurements."""
    fields = dict.fromkeys(
        ("milliseconds", "milliseconds_spread", "foretold_milliseconds", "times_lowest", "times_below", "teraflops",
         "percent_of_matrix_rate", "terabytes_per_second", "percent_of_read_bandwidth", "relative_error", "problem")
    )  # fmt: skip
    told = None if foretold is None else foretold / 1e3
    told_fields = {"foretold_milliseconds": told, "wrong": False}
    return {"rung": name, "title": title, **sizes, "dtype": dtype, **fields, **told_fields}


def _run(backend: Backend, rung: Rung, ladder: str, inputs: Inputs, dtype: str) -> Measured:
    """Judge the rung's small cases, and compute the large one once."""
    executor = BackendExecutor(backend)
    check_rung(case_workloads(rung, ladder, dtype), lambda small, arrays: run_guarded(small, arrays, executor))
    workload = rung.workload(inputs, dtype)
    arrays = workload.arrays()
    ins = uploaded(backend, arrays)
    (y,) = backend.call(rung.op, ins, workload.attrs)
    result = backend.download(y)

    def time() -> Spread:
        body = partial(backend.call, rung.op, ins, workload.attrs)
        once = seconds(backend, body, 1).median
        if once > _LONG:
            return seconds(backend, body, 2 if once > _VERY_LONG else 10)
        return time_workload(backend, workload, rotation(backend, workload, arrays, cache_bytes(backend)))

    return result, time


def _run_peer(inputs: Inputs, dtype: str) -> Measured:
    if missing := torch_missing():
        raise DeviceError(missing)
    return torch_attention(inputs, dtype)


def _measure(row: dict[str, Any], run: Callable[[], Measured], inputs: Inputs, dtype: str) -> None:
    """Fill in the time and the error, or the reason why there is none."""
    try:
        y, time = run()
        row["relative_error"] = float(f"{judged(inputs, dtype, y):.1e}")
        taken = time()
    except (CuplamaError, RuntimeError) as e:  # torch's and CUDA's own are of the second kind
        row["problem"], row["wrong"] = str(e).splitlines()[0], isinstance(e, WrongResultError)
        return
    row["milliseconds"], row["milliseconds_spread"] = 1e3 * taken.median, 1e3 * taken.half_range


def _compare(rows: Sequence[dict[str, Any]], call: Call, peaks: Peaks) -> None:
    """Fill in what follows from the times: rates, and how many times as fast as the lowest rung and the one below."""
    timed = [row for row in rows if row["milliseconds"] is not None]
    for i, row in enumerate(timed):
        taken = row["milliseconds"] / 1e3
        rate, bandwidth = call.flops() / taken, call.nbytes() / taken
        row["teraflops"], row["terabytes_per_second"] = rate / 1e12, bandwidth / 1e12
        row["percent_of_matrix_rate"] = peaks.percent_arithmetic(rate)
        row["percent_of_read_bandwidth"] = peaks.percent_read(bandwidth)
        if timed[0]["rung"] == rows[0]["rung"]:
            row["times_lowest"] = timed[0]["milliseconds"] / row["milliseconds"]
        if i and row["rung"] != _PEER:
            row["times_below"] = timed[i - 1]["milliseconds"] / row["milliseconds"]
