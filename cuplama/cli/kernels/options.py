"""The options that several kernel commands share, and what the values of --shape mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ...dtypes import DTYPES
from ...errors import DeviceError, ParameterError
from ...quant.catalog import CATALOG
from ..options import Decorator

if TYPE_CHECKING:
    from ...lab.workloads import Workload
    from ...ops.launch import Device
    from ...ops.op import Op

__all__ = [
    "DTYPE",
    "FORM",
    "SHAPE",
    "arch_option",
    "nvrtc_missing",
    "parse_shape",
    "shape_workloads",
    "supported_archs",
]

SHAPE = click.option(
    "--shape", "shapes", multiple=True, metavar="n=1,d=4096", help="Dims and attributes; the option may be repeated."
)
DTYPE = click.option("--dtype", type=click.Choice(["f32", "f16", "bf16"]), default="bf16", show_default=True)
FORM = click.option("-o", "form", type=click.Choice(["md", "json", "csv"]), default="md", show_default=True)


def arch_option(default: str, text: str) -> Decorator:
    """``--arch`` for a list of architectures."""
    return click.option("--arch", default=default, show_default=True, metavar="LIST", help=text)


def supported_archs(text: str) -> list[int]:
    """The architectures of an --arch value, of those that the NVRTC here knows. Raises ParameterError, DeviceError."""
    from ...backends.cuda.nvrtc import nvrtc_library
    from ...backends.cuda.toolkit import parse_archs

    return list(parse_archs(text, tuple(nvrtc_library().getSupportedArchs())))


def nvrtc_missing() -> str:
    """Why nothing can be compiled here, in one line; empty if it can. CUDA has no compiler for a Mac."""
    from ...backends.cuda.nvrtc import nvrtc_library

    try:
        nvrtc_library()
    except DeviceError as e:
        return str(e)
    return ""


def shape_workloads(op: Op, shapes: Sequence[str], dtype: str, device: Device) -> list[Workload]:
    """The workloads of --shape. Raises ParameterError for one that the op does not have or cannot launch."""
    from ...lab.check import check_launches
    from ...lab.workloads import shape_workload

    found = [shape_workload(op, parse_shape(s), dtype) for s in shapes]
    for workload in found:
        check_launches(workload, device)
    return found


def parse_shape(text: str) -> dict[str, Any]:
    """ "n=1,d=4096,eps=1e-6,b=true,U=f32" by name. Raises ParameterError naming the pair that is wrong."""
    found: dict[str, Any] = {}
    for pair in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise ParameterError(f"--shape takes name=value pairs such as n=1,d=4096, not {pair!r}")
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if text == "T" or text in DTYPES or text in CATALOG:
        return text
    raise ParameterError(f"--shape: {text!r} is neither a number, true, false, a dtype nor a format of weights")
