"""``cuplama kernels watch``: check and time a kernel whenever a source of it is saved."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click

from ...errors import ParameterError
from ...folders import source_folder
from ...ops.outside import is_outside
from ..options import DEBUG
from ..streams import say
from .names import find_ops
from .options import DTYPE, SHAPE, parse_shape

__all__ = ["stamps", "watch", "watch_kernel"]

_PACKAGE = Path(__file__).resolve().parents[2]


@click.command("watch", short_help="Check and time a kernel whenever a source of it is saved.")
@click.argument("name")
@SHAPE
@DTYPE
@DEBUG
def watch_kernel(name: str, shapes: tuple[str, ...], dtype: str) -> None:
    """Check and time NAME whenever a source of it is saved. Ctrl-C ends it."""
    from ...backends.cuda.driver import cuda_available
    from ...lab.emulation import emulator_missing
    from ...lab.workloads import shape_workload

    ops = find_ops(name)
    if shapes and len(ops) != 1:
        raise ParameterError("--shape needs the NAME of one op")
    for shape in shapes:  # refused once, not after every change
        shape_workload(ops[0], parse_shape(shape), dtype)
    if not cuda_available()[0] and (missing := emulator_missing()):
        say(f"nothing can be checked: {missing}")
        sys.exit(1)
    names = [name] if is_outside(name) else [op.name for op in ops]
    arguments = ["kernels", "bench", *names, "--dtype", dtype]
    for shape in shapes:
        arguments += ["--shape", shape]
    own = [Path(name).resolve().parent] if is_outside(name) else []
    folders = (*own, source_folder(), _PACKAGE / "ops")

    def again() -> None:
        # A process of its own: it sees every change, and a crashed GPU context ends with it.
        path = os.pathsep.join(filter(None, (str(_PACKAGE.parent), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "cuplama", *arguments]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
        say(f"watching {' and '.join(map(str, folders))}; Ctrl-C ends")

    watch(lambda: stamps(folders), again)


def stamps(folders: Sequence[Path]) -> dict[str, int]:
    """When each source was saved, in nanoseconds."""
    files = [f for folder in folders for pattern in ("*.cu", "*.cuh", "*.py") for f in folder.glob(pattern)]
    found = {}
    for file in files:
        try:
            found[str(file)] = file.stat().st_mtime_ns
        except OSError:  # an editor is replacing it
            continue
    return found


def watch(look: Callable[[], Mapping[str, int]], again: Callable[[], object], pause: float = 0.3) -> None:
    """Call ``again`` now and after every change that ``look`` sees, until the user interrupts.

    pause: seconds between two looks.
    """
    try:
        seen = look()
        again()
        while True:
            time.sleep(pause)
            now = look()
            if now != seen:
                seen = now
                again()
    except KeyboardInterrupt:
        return
