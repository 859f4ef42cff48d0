"""NVTX ranges, which Nsight Systems shows on its time line: with CUPLAMA_NVTX=1 each node and each replay has one.

https://nvidia.github.io/NVTX/
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["nvtx_ranges"]

_log = logging.getLogger("cuplama")


def nvtx_ranges() -> Callable[[str], AbstractContextManager[Any]] | None:
    """Makes a context manager that marks a range of that name; None where ranges are not asked for, or cannot be had.

    A range is the time of the host: in it the work of a node is queued. Nsight Systems projects it onto the GPU.
    """
    if os.environ.get("CUPLAMA_NVTX", "") in ("", "0"):
        return None
    try:
        from cupyx.profiler import time_range

        time_range("cuplama")
    except (ImportError, RuntimeError) as e:
        _log.warning("CUPLAMA_NVTX: no ranges are marked: %s", e)
        return None
    return time_range  # type: ignore[no-any-return]
