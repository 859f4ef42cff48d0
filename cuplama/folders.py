"""The folders of data beside the Python code: in a checkout next to the package, in a wheel inside it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

__all__ = ["data_folder", "source_folder"]


@cache
def data_folder(name: str) -> Path:
    """``cuda_src/`` or ``weights/``: inside the installed package, or beside it in a checkout.

    Found once in a process: every kernel of a plan asks, and links are followed in 30 microseconds.
    """
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def source_folder() -> Path:
    """The folder of the CUDA C++ sources."""
    return data_folder("cuda_src")
