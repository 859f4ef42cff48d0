"""``cuplama kernels``: see, check, compile, time and compare single kernels, a module for each sub-command."""

from __future__ import annotations

import click

from .bench import bench_kernels
from .compare import compare_kernels
from .compile import compile_kernels
from .ladder import climb_ladder
from .list import list_kernels
from .show import show_kernel
from .watch import watch_kernel

__all__ = ["kernels"]


@click.group()
def kernels() -> None:
    """See, check, compile, time and compare the CUDA kernels. Only times need a GPU."""


for _command in (
    bench_kernels,
    compare_kernels,
    compile_kernels,
    climb_ladder,
    list_kernels,
    show_kernel,
    watch_kernel,
):
    kernels.add_command(_command)
