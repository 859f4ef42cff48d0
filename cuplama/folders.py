"""The folders of data beside the Python code: in a checkout next to the package, in a wheel inside it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["data_folder", "source_folder"]


def data_folder(name: str) -> Path:
    """``cuda_src/`` or ``weights/``: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def source_folder() -> Path:
    """The folder of the CUDA C++ sources."""
    return data_folder("cuda_src")
