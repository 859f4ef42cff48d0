"""Runs the project's CUDA kernels on the CPU, with CUDA's execution model, and finds their faults.

``run(launch)`` compiles the launch's ``.cu`` file, unchanged, with g++ against the headers in ``include/``, and runs
one fiber per CUDA thread (``runtime.cpp``). ``README.md`` describes the model and its limits.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from .arguments import Arguments
from .fault import KernelFault
from .objects import CUDA_SRC, HERE, Build, LoadedKernel, load, precompile
from .structures import LaunchRequest, Region

__all__ = ["CUDA_SRC", "HERE", "NOT_EMULATED", "KernelFault", "LaunchLike", "precompile", "run"]

# Functions of ptx.cuh without a twin in include/simt_ptx.h; kernels that call them cannot run here.
NOT_EMULATED: frozenset[str] = frozenset()
_STACK_BYTES = 128 << 10  # of a fiber, that is, of one CUDA thread
_REPORT_BYTES = 1 << 16
_MAX_THREADS, _MAX_SHARED = 1024, 232448  # of a block; bytes of dynamic shared memory, on Hopper


class LaunchLike(Protocol):
    """What ``run`` reads of a ``cuplama.ops.binding.BoundLaunch``."""

    @property
    def file(self) -> str: ...
    @property
    def expression(self) -> str: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def block(self) -> tuple[int, int, int]: ...
    @property
    def shared(self) -> int: ...
    @property
    def args(self) -> tuple[Any, ...]: ...


def run(
    launch: LaunchLike,
    *,
    check: bool = True,
    race_check: bool = True,
    folder: Path | None = None,
    arch: int = 90,
    defines: Sequence[str] = (),
    seed: int = 0,
    timeout: float = 60.0,
    max_blocks: int = 1024,
    debug: bool | None = None,
) -> None:
    """Executes a launch on the CPU; arrays are changed in place.

    launch: a ``BoundLaunch`` of cuplama.ops.binding, or what has its fields. Arrays: C-contiguous; ``None`` is a null
    pointer. check: verify every memory access (False: about 3 times faster, finds only deadlocks, divergence, undefined
    behaviour and crashes). race_check: report shared-memory races. folder: where ``launch.file`` is, ``cuda_src/`` if
    None. arch: ``__CUDA_ARCH__`` / 10. defines: ``NAME=VALUE`` macros. seed: 0 starts threads in order, another number
    in a random order. timeout: seconds (0: none). max_blocks: blocks that may be alive at once. debug: compile
    with -O0 for gdb; None: if the environment has SIMT_DEBUG=1.

    Raises KernelFault; its first line is ``kind: expression: block, thread: file:line``. Raises TypeError for arguments
    that do not fit the kernel's parameters.
    """
    if debug is None:
        debug = os.environ.get("SIMT_DEBUG", "0") == "1"
    build = Build.of(launch.file, folder, arch, defines, debug)
    kernel = load(build, launch.expression)
    names = _parameter_names(launch)
    _check_size(launch, kernel)
    arguments = Arguments(kernel, launch.args, names)
    request = LaunchRequest(
        kernel=kernel.kernel,
        grid=launch.grid,
        block=launch.block,
        dynamic_shared=launch.shared,
        seed=seed,
        stack_bytes=_STACK_BYTES,
        max_blocks=max_blocks,
        timeout=0.0 if debug else timeout,
        check=int(check),
        race_check=int(race_check),
    )
    report = _launch(kernel, request, arguments, names)
    arguments.copy_back()
    if report is not None:
        raise _fault(kernel, launch, report)


def _parameter_names(launch: LaunchLike) -> list[str]:
    """For reports: the names in the prototype, or numbers where the launch has none."""
    prototype = getattr(launch, "prototype", None)
    if prototype is None:
        return [f"#{i}" for i in range(len(launch.args))]
    return [p.name for p in prototype.parameters]


def _check_size(launch: LaunchLike, kernel: LoadedKernel) -> None:
    if len(launch.args) != len(kernel.parameters):
        raise TypeError(
            f"{launch.expression} has {len(kernel.parameters)} parameters, but got {len(launch.args)} arguments"
        )
    threads = math.prod(launch.block)
    if not 1 <= threads <= _MAX_THREADS or min(launch.grid) < 1 or not 0 <= launch.shared <= _MAX_SHARED:
        raise TypeError(
            f"{launch.expression}: cannot launch grid {launch.grid}, block {launch.block}, shared {launch.shared}"
        )


def _launch(kernel: LoadedKernel, request: LaunchRequest, arguments: Arguments, names: Sequence[str]) -> str | None:
    """Runs the kernel; returns the runtime's report of a fault, or None."""
    buffers = [ctypes.create_string_buffer(value, max(8, len(value))) for value in arguments.values]
    pointers = (ctypes.c_void_p * max(1, len(buffers)))(*[ctypes.addressof(b) for b in buffers])
    regions = (Region * max(1, len(arguments.regions)))(*arguments.regions)
    labels = (ctypes.c_char_p * max(1, len(names)))(*[name.encode() for name in names])
    report = ctypes.create_string_buffer(_REPORT_BYTES)
    request.args = ctypes.cast(pointers, ctypes.c_void_p)
    request.regions, request.region_count = ctypes.cast(regions, ctypes.c_void_p), len(arguments.regions)
    if len(kernel.variables):
        request.variables = ctypes.cast(kernel.variables, ctypes.c_void_p)
    request.variable_count = len(kernel.variables)
    request.argument_names = ctypes.cast(labels, ctypes.c_void_p)
    request.report, request.report_bytes = ctypes.cast(report, ctypes.c_char_p), len(report)
    return report.value.decode(errors="replace") if kernel.launch(ctypes.byref(request)) else None


# ---- reports -------------------------------------------------------------------------------------------------------
def _line(kernel: LoadedKernel, pc: int) -> str:
    """file:line of a code address: the innermost inlined frame that is not in the emulator's own headers."""
    output = subprocess.run(
        ["addr2line", "-i", "-e", str(kernel.path), hex(pc - kernel.base)], capture_output=True, text=True, check=False
    ).stdout
    frames = [re.sub(r" \(discriminator \d+\)", "", f).removeprefix("./") for f in output.split("\n") if f]
    mine = [f for f in frames if not re.search(r"(^|/)simt/include/", f)] or frames or ["?:0"]
    return mine[0]


def _fault(kernel: LoadedKernel, launch: LaunchLike, report: str) -> KernelFault:
    """The report with code addresses replaced by lines, as an exception."""
    resolved = re.sub(r"\{pc:([0-9a-f]+)\}", lambda m: _line(kernel, int(m[1], 16)), report)
    kind, block, thread, where, detail = resolved.split("\x1f", 4)
    return KernelFault(kind, f"{kind}: {launch.expression}: block {block}, thread {thread}: {where}\n{detail}")
