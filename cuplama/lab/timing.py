"""TODO: lab.timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..backends import Backend
from ..dtypes import Array
from . import peaks as ceilings
from .cases import Case
from .check import uploaded
from .peaks import Spread

__all__ = ["Body", "Replay", "bodies", "cache_bytes", "copies", "rotation", "time_case"]

_MOST_COPIES = 64
_MOST_BYTES = 2 << 30  # of all copies
_LAUNCHES = 40  # at least, in one replay
_REPLAYS = 30
Body = Callable[[], object]


def copies(touched: int, stored: int, cache: int) -> int:
    """How many copies of the inputs to go through: what a launch touches of them must together be twice the cache.

    touched, stored: bytes of one copy; cache: bytes of L2.
    """
    enough = -(-2 * cache // max(1, touched)) + 1
    return max(1, min(enough, _MOST_COPIES, _MOST_BYTES // max(1, stored)))


def cache_bytes(backend: Backend) -> int:
    """Bytes of the GPU's L2 cache."""
    if backend.name != "cuda":
        return 0
    from cupy.cuda import Device as CupyDevice

    with backend.gpu:  # type: ignore[attr-defined]
        return int(CupyDevice().attributes["L2CacheSize"])


class Replay:
    """Many launches as one recording: the bodies in turn, each on its own copy of the inputs."""

    def __init__(self, backend: Backend, bodies: Sequence[Body]) -> None:
        self._backend = backend
        self.launches = -(-max(_LAUNCHES, len(bodies)) // len(bodies)) * len(bodies)

        def body() -> None:
            for i in range(self.launches):
                bodies[i % len(bodies)]()

        self._captured = backend.capture(body)
        for _ in range(3):  # plain, captured, replayed
            self._captured.replay().synchronize()

    def seconds(self, repeats: int) -> Spread:
        """Seconds per launch."""
        spread = ceilings.seconds(self._backend, self._captured.replay, repeats)
        return Spread(tuple(v / self.launches for v in spread.values))


def time_case(backend: Backend, case: Case, ins: Sequence[Sequence[Array | None]]) -> Spread:
    """Seconds per call of the op, as a model runs it, going through these copies of its inputs."""
    return Replay(backend, bodies(backend, case, ins)).seconds(_REPLAYS)


def rotation(
    backend: Backend, case: Case, arrays: Sequence[np.ndarray[Any, Any] | None], cache: int
) -> list[list[Array | None]]:
    """Copies of the inputs on the device."""
    stored = sum(x.nbytes for x in arrays if x is not None)
    count = copies(min(case.call.nbytes(), stored), stored, cache)
    return [uploaded(backend, arrays) for _ in range(count)]


def bodies(backend: Backend, case: Case, ins: Sequence[Sequence[Array | None]]) -> list[Body]:
    """The op on each copy of its inputs."""
    return [partial(backend.call, case.op, given, case.attrs) for given in ins]
