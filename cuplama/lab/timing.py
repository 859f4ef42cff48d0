"""Time on the device: of any body of queued work, and of an op in isolation.

An op is timed as it runs while decoding: a CUDA graph of many launches is replayed. Its inputs rotate through copies
that exceed the L2 cache together, but are at most 64: so weights come from memory, and a few kilobytes of activations
from L2, as in a model.

``time_calls`` times the op as a user of CuPy calls it, one call at a time, with cupyx.profiler: what the host takes to
queue a call, and what passes on the GPU between the two events around it. The second contains starting the kernel, and
the time in which the GPU waits for the host, so for a small kernel it is several times the replayed time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..backends import Backend
from ..backends.cuda.backend import CudaBackend
from ..dtypes import Array
from ..ops.weights import stored_bytes
from .check import uploaded
from .workloads import Workload

__all__ = [
    "REPLAYS",
    "Body",
    "CallTimes",
    "Replay",
    "Spread",
    "bodies",
    "cache_bytes",
    "copies",
    "rotation",
    "seconds",
    "time_calls",
    "time_workload",
]

REPLAYS = 30  # timed replays of a graph, whose times make the spread
_CALLS, _MAX_SECONDS = 1000, 1.0  # timed calls for ``time_calls``, and seconds after which it stops
_MAX_COPIES = 64
_MAX_COPIED_BYTES = 2 << 30  # of all copies together
_MIN_LAUNCHES = 40  # launches in one replay, so that the cost of the replay itself is little beside them
_UNTIL_REPLAYED = 3  # calls of ``replay`` until all is warm: the first runs the body, the second captures it
Body = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Repeats of one measurement: what is in the middle and how far they scatter."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The arithmetic mean."""
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        """The standard deviation of the sample (divided by n - 1); 0 for a single value."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def median(self) -> float:
        """The value in the middle."""
        return float(np.median(self.values))

    @property
    def half_range(self) -> float:
        """Half the distance between the quartiles."""
        low, high = np.percentile(self.values, (25, 75))
        return float(high - low) / 2


def seconds(backend: Backend, body: Body, repeats: int) -> Spread:
    """Seconds that ``body`` takes on the device, ``repeats`` times over: by events on a GPU, by the clock elsewhere.

    body queues its work on the backend's stream. Warm up first. On a GPU an unmeasured run goes ahead, so that the next
    ones wait in the queue and no interval holds the host's part of a launch.
    """
    if not isinstance(backend, CudaBackend):
        values = []
        for _ in range(repeats):
            began = time.perf_counter()
            body()
            values.append(time.perf_counter() - began)
        return Spread(tuple(values))
    from cupy.cuda import Event, get_elapsed_time

    with backend.gpu as gpu:
        events = []
        body()
        for _ in range(repeats):
            pair = (Event(), Event())
            pair[0].record(gpu.stream)
            body()
            pair[1].record(gpu.stream)
            events.append(pair)
        gpu.synchronize()
        return Spread(tuple(get_elapsed_time(*pair) / 1e3 for pair in events))


@dataclass(frozen=True)
class CallTimes:
    """Seconds of single calls, by cupyx.profiler.benchmark.

    cpu: until the call returns, which is before the GPU is done; gpu: between the events before and behind it.
    """

    cpu: Spread
    gpu: Spread

    def fields(self) -> dict[str, float]:
        """The medians by stable names, in microseconds."""
        return {"cupyx_cpu_microseconds": 1e6 * self.cpu.median, "cupyx_gpu_microseconds": 1e6 * self.gpu.median}


def time_calls(backend: CudaBackend, workload: Workload, ins: Sequence[Array | None]) -> CallTimes:
    """Time calls of the op on CuPy arrays, always the same ones, so that small ones come from the L2 cache."""
    from cupyx.profiler import benchmark

    with backend.gpu:
        found = benchmark(workload.op, tuple(ins), dict(workload.attrs), n_repeat=_CALLS, max_duration=_MAX_SECONDS)
    return CallTimes(Spread(tuple(found.cpu_times)), Spread(tuple(found.gpu_times[0])))


# ---- one op ----------------------------------------------------------------------------------------------------------
class Replay:
    """Many launches as one captured graph: the bodies in turn, each on its own copy of the inputs."""

    def __init__(self, backend: Backend, bodies: Sequence[Body]) -> None:
        self._backend = backend
        self.launches = -(-max(_MIN_LAUNCHES, len(bodies)) // len(bodies)) * len(bodies)

        def body() -> None:
            for i in range(self.launches):
                bodies[i % len(bodies)]()

        self._captured = backend.capture(body)
        for _ in range(_UNTIL_REPLAYED):
            self._captured.replay().synchronize()

    def seconds(self, repeats: int) -> Spread:
        """Seconds per launch."""
        spread = seconds(self._backend, self._captured.replay, repeats)
        return Spread(tuple(v / self.launches for v in spread.values))


def time_workload(backend: Backend, workload: Workload, ins: Sequence[Sequence[Array | None]]) -> Spread:
    """Seconds per call of the op, as a model runs it, going through these copies of its inputs."""
    return Replay(backend, bodies(backend, workload, ins)).seconds(REPLAYS)


def bodies(backend: Backend, workload: Workload, ins: Sequence[Sequence[Array | None]]) -> list[Body]:
    """The op on each copy of its inputs."""
    return [partial(backend.call, workload.op, given, workload.attrs) for given in ins]


def rotation(
    backend: Backend, workload: Workload, arrays: Sequence[np.ndarray[Any, Any] | None], cache: int
) -> list[list[Array | None]]:
    """As many copies of the inputs on the device as ``copies`` says. cache: bytes of L2."""
    stored = sum(stored_bytes(x) for x in arrays if x is not None)
    count = copies(min(workload.call.nbytes(), stored), stored, cache)
    return [uploaded(backend, arrays) for _ in range(count)]


def copies(touched: int, stored: int, cache: int) -> int:
    """How many copies of the inputs to go through: what a launch touches of them must together be twice the cache.

    touched, stored: bytes of one copy; cache: bytes of L2.
    """
    enough = -(-2 * cache // max(1, touched)) + 1
    return max(1, min(enough, _MAX_COPIES, _MAX_COPIED_BYTES // max(1, stored)))


def cache_bytes(backend: Backend) -> int:
    """Bytes of the GPU's L2 cache; 0 without a GPU."""
    if not isinstance(backend, CudaBackend):
        return 0
    from cupy.cuda import Device as CupyDevice

    with backend.gpu:
        return int(CupyDevice().attributes["L2CacheSize"])
