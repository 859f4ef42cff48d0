"""A folder that one process at a time may write to."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderLock"]


class FolderLock:
    """The right to write to a folder, until ``close`` or the end of the process, however that ends. It leaves no file.

    Raises CheckpointError if another process has it. A file system that locks nothing refuses nobody.
    """

    def __init__(self, folder: Path) -> None:
        self._handle: int | None = None
        if fcntl is None:
            return
        self._handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise CheckpointError(f"{folder} is in use: another process trains there") from None
        except OSError:  # a network's file system may have no locks
            self.close()

    def close(self) -> None:
        """Give the right back. A second call does nothing."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()
