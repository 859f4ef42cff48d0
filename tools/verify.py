"""Every op on a GPU against the NumPy reference in float64: ``python -m tools.verify --out FOLDER``.

Each case of the registry and each random one, in every dtype, runs twice through two roads: the op's kernels between
guard zones, as the tests of tests/ops do, and ``CudaBackend.call``, which takes cuBLAS for many rows. Outputs are
poisoned before; every element is checked; both runs must agree bit for bit. Writes ``ops.json`` and ``ops.txt`` with
the largest relative error per op, dtype and output dtype, and prints the text. Exit status 1 if anything is wrong.

Under compute-sanitizer use ``--no-pool`` (every array an allocation of its own, so that memcheck sees its bounds) and
``--run-only`` (no comparison)::

    compute-sanitizer --tool memcheck python -m tools.verify --no-pool --run-only
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.driver import driver_version, load_driver
from cuplama.dtypes import DTYPES, dtype_name
from cuplama.lab.check import BackendExecutor, check, expected, relative_error, run_guarded, uploaded
from cuplama.lab.workloads import Workload
from cuplama.ops import OPS
from cuplama.quant.weight import Weight
from tests.ops import harness

__all__ = ["environment", "error", "main", "report", "run_backend", "speeds", "verify"]

Arrays = list[np.ndarray[Any, Any] | None]
KEPT = 1 << 15  # elements of a case's outputs that --outputs keeps at most


class _NoPool:
    """An allocation per array."""

    def __init__(self) -> None:
        import cupy

        self._cuda = cupy.cuda

    def malloc(self, size: int) -> Any:
        return self._cuda.MemoryPointer(self._cuda.Memory(max(1, size)), 0)

    def free_bytes(self) -> int:
        return 0

    def free_all_blocks(self) -> None:
        pass


def run_backend(workload: Workload, arrays: Arrays, backend: CudaBackend) -> list[np.ndarray[Any, Any]]:
    """The outputs by the way that a model takes: cuBLAS for many rows."""
    outs = backend.call(workload.op, uploaded(backend, arrays), workload.attrs)
    return [backend.download(a) for a in outs]


def error(outs: list[np.ndarray[Any, Any]], wanted: list[np.ndarray[Any, Any]]) -> dict[str, float]:
    """The largest relative error of the float outputs by their dtype, as a norm over all elements."""
    found: dict[str, float] = {}
    for out, want in zip(outs, wanted, strict=True):
        if out.dtype.kind not in "iu":
            U = dtype_name(out.dtype)
            found[U] = max(found.get(U, 0.0), relative_error(out, want))
    return found


def verify(
    backend: CudaBackend, names: list[str], compare: bool, kept: dict[str, np.ndarray[Any, Any]] | None = None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(op -> dtype -> cases and largest errors by the outputs' dtype, problems).

    kept: collects the kernels' outputs, where they are small.
    """
    table: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    executor = BackendExecutor(backend)
    for op, case, T in harness.all_cases(lambda op: op.kernels is not None and (not names or op.name in names)):
        if T == "bf16" and executor.device.arch < 80:
            continue
        workload = harness.workload(op, case, T)
        arrays = workload.arrays()
        rows = table.setdefault(op.name, {})
        entry = rows.setdefault(T, {"cases": 0, "errors": {}, "wrong": 0})
        entry["cases"] += 1
        try:
            runs = [run_guarded(workload, arrays, executor) for _ in range(2)]
            runs += [run_backend(workload, arrays, backend) for _ in range(2)]
            for i, out in enumerate(runs[0] if kept is not None and sum(o.size for o in runs[0]) <= KEPT else ()):
                assert kept is not None
                kept[f"{harness.name_of(op, case, T)}/{i}"] = out if out.dtype.kind in "iu" else out.astype(np.float32)
            if compare:
                wanted = expected(workload, arrays)
                for outs in (runs[0], runs[2]):
                    check(workload, arrays, outs, wanted)
                    for U, relative in error(outs, wanted).items():
                        entry["errors"][U] = max(entry["errors"].get(U, 0.0), relative)
                for a, b in (runs[:2], runs[2:]):
                    same = all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in zip(a, b, strict=True))
                    assert same, "two runs differ"
        except Exception as e:  # one broken op must not hide the next
            entry["wrong"] += 1
            problems.append(f"{harness.name_of(op, case, T)}: {type(e).__name__}: {e}"[:500])
            if len(problems) >= 50:
                break  # the GPU's context is lost, most likely
    missing = [op.name for op in OPS.values() if op.kernels is None and (not names or op.name in names)]
    return table, problems + [f"{name}: no kernel" for name in missing]


def speeds(backend: CudaBackend) -> dict[str, float]:
    """Weight transfer in GB/s, from memory that was read before, and the host's cost of a launch in microseconds."""
    weight = Weight("w", ("w",), (np.ones((1 << 15, 1 << 14), np.float16),))
    backend.dtype = DTYPES["f16"]
    backend.load_weight(weight)
    backend.synchronize()
    began = time.perf_counter()
    backend.load_weight(weight)
    backend.synchronize()
    transfer = weight.nbytes / (time.perf_counter() - began) / 1e9
    a = backend.upload(np.ones((1, 64), np.float32))
    backend.checking = False
    for _ in range(2):
        backend.synchronize()
        began = time.perf_counter()
        for _ in range(2000):
            backend.call(OPS["add"], (a, a), {})
        launch = (time.perf_counter() - began) / 2000 * 1e6
    backend.checking = True
    return {"weights_gb_per_s": round(transfer, 2), "call_us": round(launch, 2)}


def environment(backend: CudaBackend) -> dict[str, str]:
    """The GPU and the versions of what runs on it."""
    import cupy

    driver = load_driver()
    assert driver is not None
    return {
        "gpu": backend.describe(),
        "driver_cuda": str(driver_version(driver)),
        "runtime_cuda": str(cupy.cuda.runtime.runtimeGetVersion()),
        "cublas": "yes" if backend.gpu.cublas is not None else "no",
        "cupy": cupy.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def report(result: Mapping[str, Any]) -> str:
    """The text of ``ops.txt``."""
    lines = [f"{name}: {value}" for name, value in {**result["environment"], **result["speeds"]}.items()]
    lines += ["", f"{'op':<28} {'dtype':<6} {'output':<6} {'cases':>5} {'largest error':>14} {'allowed':>8}"]
    for op, dtypes in result["ops"].items():
        for T, entry in dtypes.items():
            wrong = f"   {entry['wrong']} WRONG" if entry["wrong"] else ""
            for U, relative in entry["errors"].items():
                allowed = OPS[op].allowed(U, T)
                lines.append(f"{op:<28} {T:<6} {U:<6} {entry['cases']:>5} {relative:>14.2e} {allowed:>8.1e}{wrong}")
            if not entry["errors"]:
                lines.append(f"{op:<28} {T:<6} {'-':<6} {entry['cases']:>5} {'-':>14} {'exact':>8}{wrong}")
    lines += ["", f"{len(result['problems'])} problems", *result["problems"]]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for ops.json and ops.txt")
    parser.add_argument("--no-pool", action="store_true", help="every array is an allocation of its own")
    parser.add_argument("--run-only", action="store_true", help="run, but compare nothing")
    parser.add_argument("--outputs", type=Path, help="keep the kernels' outputs, for tools.agree")
    parser.add_argument("ops", nargs="*", help="op names; all by default")
    args = parser.parse_args()
    os.environ["CUPLAMA_CHECK"] = "1"  # poison outputs, name the failing node
    backend = CudaBackend("f32")
    if args.no_pool:
        backend.gpu.pool = _NoPool()
    began = time.perf_counter()
    kept: dict[str, np.ndarray[Any, Any]] | None = {} if args.outputs else None
    table, problems = verify(backend, args.ops, not args.run_only, kept)
    if kept is not None:
        np.savez_compressed(args.outputs, allow_pickle=False, **kept)
    result = {
        "environment": environment(backend),
        "speeds": {} if args.run_only or problems else speeds(backend),
        "seconds": round(time.perf_counter() - began, 1),
        "ops": table,
        "problems": problems,
    }
    text = report(result)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "ops.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (args.out / "ops.txt").write_text(text, encoding="utf-8")
    backend.close()
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
