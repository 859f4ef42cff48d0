"""Files that are whole or not there: each is written under another name, reaches the disk, and then gets its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..dtypes import dtype_name
from ..models.safetensors import lay_out
from ..quant.compressed import TensorSpec

__all__ = ["UNFINISHED", "Staging", "saved_together"]

UNFINISHED = ".unfinished"
"""The end of the name of a file that is not whole yet."""
Arrays = Mapping[str, np.ndarray[Any, Any]]


class Staging:
    """Collects the files of a folder for ``saved_together``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: list[tuple[Path, Path]] = []  # (name until then, name)

    def text(self, name: str, text: str) -> None:
        """A text file in UTF-8."""
        self._write(name, lambda file: file.write(text.encode()))

    def tensors(self, name: str, arrays: Arrays, metadata: Mapping[str, str] | None = None) -> None:
        """A safetensors file. metadata: text by name for its header."""
        specs = {n: TensorSpec(dtype_name(a.dtype).upper(), a.shape) for n, a in arrays.items()}
        head, places = lay_out(specs, metadata)

        def write(file: BinaryIO) -> None:
            file.write(head)
            for n in places:
                file.write(np.ascontiguousarray(arrays[n]).reshape(-1).view(np.uint8).data)

        self._write(name, write)

    def copy(self, source: Path, name: str) -> None:
        """A copy of a file."""

        def write(file: BinaryIO) -> None:
            with source.open("rb") as old:
                shutil.copyfileobj(old, file)

        self._write(name, write)

    def _write(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        final = self.folder / name
        other = final.with_name(final.name + UNFINISHED)
        final.parent.mkdir(parents=True, exist_ok=True)
        self.written.append((other, final))
        with other.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def saved_together(folder: Path) -> Iterator[Staging]:
    """Files that get their names when the block ends, in the order in which they were written; none if it raises.

    A process that is killed leaves each file as it was or as it is to be, and maybe unfinished ones beside them.
    """
    staging = Staging(folder)
    try:
        yield staging
    except BaseException:
        for other, _ in staging.written:
            with suppress(OSError):
                other.unlink(missing_ok=True)
        raise
    for other, final in staging.written:
        other.replace(final)
    for place in dict.fromkeys(final.parent for _, final in staging.written):
        _sync_folder(place)


def _sync_folder(folder: Path) -> None:
    """Have the names themselves reach the disk, where the system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
