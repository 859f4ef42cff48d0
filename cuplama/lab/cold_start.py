"""The cold start: what passes from the start of a fresh process to its first token, and what it goes to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path

from ..engine.kv_cache import PAGE
from ..errors import DeviceError
from .dummy import Source

__all__ = ["cold_start", "first_token"]

_PARTS = ("start", "import", "load", "compile", "first_token")
# What the fresh process runs. It takes the time before it imports anything of ours, so it is no ``python -m``.
_PROGRAM = (
    "import sys, time; began = time.time(); from cuplama.lab.cold_start import first_token;"
    " first_token(began, sys.argv[1])"
)


def cold_start(source: Source) -> dict[str, float]:
    """Seconds from the start of a fresh process to its first token, and what they went to.

    start: the interpreter; import: cuplama; load: weights, with CuPy and the device; compile: kernels, or what it takes
    to find them in the cache on disk; first_token: one prompt token fed and one drawn. Raises DeviceError if the
    process fails.
    """
    ours = str(Path(__file__).resolve().parents[2])  # the process imports this package, installed or not
    path = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(astuple(source))],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DeviceError(f"the process that measures the cold start failed: {last}")
    points = [began, *json.loads(done.stdout.splitlines()[-1])]
    parts = {f"{name}_seconds": points[i + 1] - points[i] for i, name in enumerate(_PARTS)}
    return {"total_seconds": points[-1] - began, **parts}


def first_token(began: float, settings: str) -> None:
    """What the fresh process does: load, draw one token, and print the times at which each part was done, as JSON.

    began: when the interpreter had started; settings: the fields of a Source, as JSON.
    """
    imported = time.time()
    model = Source(*json.loads(settings)).open(PAGE, PAGE)
    with model:
        _ = [model.backend.download(a) for a in list(model.engine.runner.values.values())[-1:]]  # wait for the copies
        loaded, before = time.time(), model.backend.compile_seconds
        next(iter(model.stream([0], max_tokens=1, temperature=0.0)))
        compiled = loaded + model.backend.compile_seconds - before  # as if all came first
        print(json.dumps([began, imported, loaded, compiled, time.time()]))
