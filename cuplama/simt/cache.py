"""The folder that compiled kernels are kept in, shared by every checkout and every installed copy of one user."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

__all__ = ["cache_folder", "locked", "prune", "write"]

_MAX_BYTES = 1 << 30  # a full test run leaves about 100 MB, so this holds some ten versions of the kernels
_MAX_AGE = 30 * 24 * 3600.0  # seconds since a file was last used


def cache_folder() -> Path:
    """``cuplama/simt`` in the user's cache folder, which XDG_CACHE_HOME may move. Cleaned up once per process."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return _ready(Path(base) / "cuplama" / "simt")


@cache
def _ready(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    prune(folder)
    return folder


def prune(folder: Path, max_bytes: int = _MAX_BYTES, max_age: float = _MAX_AGE) -> None:
    """Delete the files that were not used for ``max_age`` seconds and, beyond ``max_bytes``, the least recently used.

    A file's modification time says when it was last used: whoever uses one touches it.
    """
    files = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process cleans up as well
            if path.is_file():
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
    oldest, total = time.time() - max_age, 0
    for used, size, path in sorted(files, reverse=True):
        total += size
        if used < oldest or total > max_bytes:
            path.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Write a file so that other processes see all of it or nothing."""
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a name in the cache, so that of several processes one compiles an object and the others wait for it."""
    with (cache_folder() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
