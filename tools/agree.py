"""Emulator and GPU on the same inputs: ``python -m tools.agree OUTPUTS.npz``.

OUTPUTS.npz holds what ``python -m tools.verify --outputs OUTPUTS.npz`` got from a GPU. Every case runs again here,
on the emulator; the table gives, per op and dtype, the largest difference relative to the norm of the output, how many
elements differ at all, and whether integers are equal. Exit status 1 if a difference is larger than rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cuplama.lab.check import run_guarded
from cuplama.lab.emulation import EmulatedDevice
from tests.ops import harness

__all__ = ["main"]

# Two ways to round the same sum may end one unit apart: twice the unit of each dtype, as a norm. float32 also carries
# the last bits of exp and log, which differ between the libraries of host and device.
ROUNDING = {"f32": 2e-6, "f16": 1e-3, "bf16": 8e-3}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", type=Path, metavar="OUTPUTS.npz", help="what a GPU computed")
    outputs = np.load(parser.parse_args(argv).outputs)
    table: dict[tuple[str, str], dict[str, float]] = {}
    for op, case, T in harness.all_cases(lambda op: op.kernels is not None):
        name = harness.name_of(op, case, T)
        if f"{name}/0" not in outputs:
            continue
        row = table.setdefault((op.name, T), {"cases": 0, "largest": 0.0, "elements": 0, "different": 0})
        row["cases"] += 1
        workload = harness.workload(op, case, T)
        for i, here in enumerate(run_guarded(workload, workload.arrays(), EmulatedDevice(check=False))):
            there = outputs[f"{name}/{i}"].astype(np.float64)
            mine = here.astype(np.float64)
            finite = np.isfinite(there)
            assert np.array_equal(finite, np.isfinite(mine)), name
            off = np.where(finite, mine, 0) - np.where(finite, there, 0)
            norm = float(np.linalg.norm(np.where(finite, there, 0)))
            row["largest"] = max(row["largest"], float(np.linalg.norm(off)) / max(norm, 1e-30))
            row["elements"] += off.size
            row["different"] += int(np.count_nonzero(off))
    print(f"{'op':<28} {'dtype':<6} {'cases':>5} {'largest difference':>19} {'elements that differ':>21}")
    wrong = 0
    for (op_name, T), row in table.items():
        bad = row["largest"] > ROUNDING[T]
        wrong += bad
        share = f"{row['different']:.0f} of {row['elements']:.0f}"
        print(f"{op_name:<28} {T:<6} {row['cases']:>5.0f} {row['largest']:>19.1e} {share:>21}{'  BAD' if bad else ''}")
    print(f"\n{len(table)} rows, {wrong} beyond rounding")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
