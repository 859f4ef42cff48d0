"""Every op of a decode step as a user of CuPy calls it: ``python -m benchmarks.ops_for_cupy [--out FILE]``.

A row is an op at the shapes of one node of Llama 3.2 1B (or --model), bf16, for one sequence with 512 tokens in the
cache; then the same of a prompt of 512 tokens. Each is called on CuPy arrays and judged against its reference in
float64, as ``cuplama kernels bench`` judges kernels; a wrong one ends the run. Three times of it, in microseconds:

- cupyx CPU: until the call returns, and the work is queued;
- cupyx GPU: what passes on the GPU between an event ahead of the call and one behind it;
- graph: of a launch in a replayed graph of many, on inputs that exceed the L2 cache together, as a model runs it.

"% of read" is the bytes that the op moves over the graph's time, relative to the measured read bandwidth. The lines at
the end are the same for an empty kernel of CuPy's own, ``cupy.RawKernel``: what no caller can do without; and for
CuPy's own sum of two arrays of 2,048 numbers, which allocates its result as an op does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import record
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.lab import kernel_bench, peaks, report
from cuplama.lab.check import check, uploaded
from cuplama.lab.timing import CallTimes, Spread, cache_bytes, rotation, time_calls, time_workload
from cuplama.lab.workloads import Workload, decode_workloads, prompt_workloads
from cuplama.models.presets import find_shape

COLUMNS = (
    report.Column("graph", "graph"),
    report.Column("op", "op"),
    report.Column("weights", "weights"),
    report.Column("shape", "shape"),
    report.Column("count", "count", 1),
    report.Column("cupyx_cpu_microseconds", "cupyx CPU µs", 3),
    report.Column("cupyx_gpu_microseconds", "cupyx GPU µs", 3),
    report.Column("microseconds", "graph µs", 3),
    report.Column("percent_of_read_bandwidth", "% of read", 3),
)


def judge_call(backend: CudaBackend, workload: Workload) -> None:
    """Call the op on CuPy arrays and hold what it gives to the reference. Raises WrongResultError."""
    arrays = workload.arrays()
    ins = uploaded(backend, arrays)
    with backend.gpu:  # whose stream and device are then CuPy's current ones
        found = workload.op(*ins, **workload.attrs)
        outs = [backend.download(a) for a in (found if isinstance(found, tuple) else (found,))]
    check(workload, arrays, outs)


def measure(backend: CudaBackend, workloads: Sequence[Workload]) -> list[dict[str, Any]]:
    """A row for each workload, in order."""
    machine, cache, rows = peaks.measure(backend), cache_bytes(backend), []
    for workload in workloads:
        judge_call(backend, workload)
        ins = rotation(backend, workload, workload.arrays(), cache)
        row = kernel_bench.row(workload, time_workload(backend, workload, ins), None, machine)
        row |= time_calls(backend, workload, ins[0]).fields()
        rows.append(row)
        print(f"{workload.label}: right; {row['cupyx_cpu_microseconds']:.1f} µs to call", flush=True)
    return rows


def of_cupy(backend: CudaBackend) -> list[dict[str, Any]]:
    """The two cupyx times of calls that are CuPy's own, in the fields of rows."""
    import cupy
    from cupyx.profiler import benchmark

    kernel = cupy.RawKernel('extern "C" __global__ void nothing() {}', "nothing")
    rows = []
    with backend.gpu:
        x = cupy.ones(2048, cupy.float32)
        for op, call, arguments in (
            ("an empty cupy.RawKernel", kernel, ((1,), (32,), ())),
            ("cupy.add", cupy.add, (x, x)),
        ):
            found = benchmark(call, arguments, n_repeat=1000, name=op)
            times = CallTimes(Spread(tuple(found.cpu_times)), Spread(tuple(found.gpu_times[0])))
            known = {"graph": "", "op": op, "weights": "", "shape": ""}
            rows.append({**dict.fromkeys(c.field for c in COLUMNS), **known, **times.fields()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = find_shape(args.model)[1]
    backend = CudaBackend("bf16")
    try:
        rows = measure(backend, [*decode_workloads(config, "bf16"), *prompt_workloads(config, "bf16")])
        rows += of_cupy(backend)
    finally:
        backend.close()
    print(report.render(COLUMNS, rows, "md"))
    record(rows, args.out)


if __name__ == "__main__":
    main()
