"""Hopper's backward of attention with parts changed or left out: what each costs. To be run on a scratch copy of the tree.

``python -m benchmarks.attention_backward_variants [NAME ...]``: prints a JSON line per variant. Some compute wrong
results on purpose; ``errors`` tells.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np

from benchmarks.attention_backward import SHAPES, SMALL, backward
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES
from cuplama.folders import source_folder
from cuplama.lab.check import relative_error
from cuplama.lab.timing import Replay
from cuplama.lab.workloads import case_workload

CU, KEYS, WORK = "attention_backward_wgmma.cu", "attention_backward_keys.cuh", "attention_backward_wgmma.cuh"
NO_ADD = (KEYS, "        if (begin) return;\n", "        return;\n")
NO_STORE = (KEYS, "            if (begin)\n", "            if (begin && thread < 0)\n")
NO_TURN = (CU, "while (ld_acquire(turns + tile) != mine) {", "while (false) {")
VARIANTS: dict[str, list[tuple[str, str, str]]] = {
    "base": [],
    "up": [(WORK, "const bool down = level / round % 2 == 0;", "const bool down = false;"), (WORK, "level / round % 2 == 0 ?", "false ?")],
    "down": [(WORK, "const bool down = level / round % 2 == 0;", "const bool down = true;"), (WORK, "level / round % 2 == 0 ?", "true ?")],
    "no_turn": [NO_TURN],
    "no_add": [NO_ADD, NO_STORE],
    "no_add_no_turn": [NO_ADD, NO_STORE, NO_TURN],
    "no_exp": [(KEYS, "low = exp2f(low * factor - shift.v[0]), high = exp2f(high * factor - shift.v[1]);", "low = low * factor - shift.v[0], high = high * factor - shift.v[1];")],
    "not_ahead": [(CU, "constexpr bool AHEAD = D == 64;", "constexpr bool AHEAD = false;")],
    "no_fence": [(CU, "                fence_gpu();\n", "")],
}  # fmt: skip


def errors() -> list[float]:
    found = []
    for heads, H, D, lengths, window in SMALL:
        case = dict(
            n=sum(lengths), b=len(lengths), num_heads=heads, H=H, D=D, lengths=lengths, window=window, scale=D**-0.5
        )
        workload = case_workload(backward(), case, "bf16", 3)
        want = workload.op.reference(*workload.arrays(), **workload.attrs)
        backend = CudaBackend("bf16")
        ins = [backend.upload(a) for a in workload.arrays()]
        found.append(
            float(f"{relative_error(backend.download(backend.call(workload.op, ins, workload.attrs)[0]), want):.2e}")
        )
        backend.close()
    return found


def one() -> dict[str, Any]:
    row: dict[str, Any] = {"errors": errors()}
    for b, n, heads, H, D in SHAPES:
        rng = np.random.default_rng(1)
        rows = b * n

        def some(width: int) -> Any:
            return rng.standard_normal((rows, width), dtype=np.float32).astype(DTYPES["bf16"])

        lse = (
            np.log(np.tile(np.arange(1, n + 1, dtype=np.float32), b))[:, None] + np.zeros((1, heads), np.float32) + 0.5
        )
        arrays = (
            some((heads + 2 * H) * D),
            some(heads * D),
            lse,
            some(heads * D),
            np.arange(b + 1, dtype=np.int32) * n,
        )
        backend, op = CudaBackend("bf16"), backward()
        ins = [backend.upload(a) for a in arrays]
        attrs = {"num_heads": heads, "H": H, "D": D, "window": 0, "scale": D**-0.5}
        seconds = Replay(backend, [partial(backend.call, op, ins, attrs)]).seconds(5).median
        backend.close()
        flops = 10 * D * heads * b * n * (n + 1) / 2
        row[f"{b}x{n} {heads}/{H}x{D}"] = [round(seconds * 1e6, 1), round(flops / seconds / 1e12)]
    return row


def main() -> int:
    if sys.argv[1:] == ["--one"]:
        print(json.dumps(one()))
        return 0
    for name in sys.argv[1:] or VARIANTS:
        old = {}
        try:
            for file, before, after in VARIANTS[name]:
                path = source_folder() / file
                text = path.read_text()
                old.setdefault(path, text)
                assert text.count(before) == 1, (name, before)
                path.write_text(text.replace(before, after))
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.attention_backward_variants", "--one"],
                    capture_output=True,
                    text=True,
                    timeout=90,
                )
                print(name, (done.stdout if done.returncode == 0 else done.stderr[-600:]).strip(), flush=True)
            except subprocess.TimeoutExpired:
                print(name, "took more than 90 s", flush=True)
        finally:
            for path, text in old.items():
                path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
