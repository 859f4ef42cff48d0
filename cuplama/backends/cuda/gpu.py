"""One GPU through CuPy and cuBLAS: memory, streams, compiled functions, copies, captured graphs.

CuPy is imported when a ``Gpu`` is made, not before.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

import numpy as np

from ...dtypes import Array
from ...errors import DeviceError
from ...ops.signature import OpError
from ...ops.weights import named_segments, segments_of
from .cublas import Cublas, load_cublas
from .driver import PdlLaunch, driver_version, load_driver
from .fixed_cublas import FixedCublas
from .functions import Functions

__all__ = ["STAGE", "Gpu", "parallel_copy", "windows"]

_WORKSPACE = 32 << 20  # bytes of scratch for cuBLAS: what NVIDIA recommends for Hopper; fixed, so that results repeat
STAGE = 32 << 20  # bytes of each of the two pinned buffers that weights pass through


class Gpu:
    """One GPU: a stream, a memory pool, compiled functions and cuBLAS, all given back by ``close``.

    Its arrays are CuPy arrays in its own pool. The user's CuPy state (current stream, default pool) is not touched.
    """

    workspace = 0  # Products of cuBLAS use the library's own.
    activations = "auto"  # Set by the backend.

    def __init__(self, device: int = 0) -> None:
        self.functions = functions = Functions(device)
        cupy = self._cupy = functions.cupy
        self._process = os.getpid()
        self.array_type: type = cupy.ndarray
        self._device, self.limits, self.name = functions.device, functions.limits, functions.name
        self.failures = functions.failures
        self._early_launches: dict[int, PdlLaunch] = {}
        self._stage: _Stage | None = None
        driver = load_driver()
        self._early: ctypes.CDLL | None = None
        if driver is not None and self.limits.arch >= PdlLaunch.OLDEST_ARCH:
            self._early = driver if driver_version(driver) >= PdlLaunch.OLDEST_DRIVER else None
        with self._device:
            self.stream = cupy.cuda.Stream(non_blocking=True)
            self.pool = self.main_pool = cupy.cuda.MemoryPool()
        self.give_back: Callable[[], None] = lambda: None  # drops what others keep only to be fast
        self._capturing = False
        library = load_cublas()
        self.cublas: Cublas | None = None
        if library is not None:
            with self:
                self._workspace = self.pool.malloc(_WORKSPACE)
                self.cublas = Cublas(library, self.stream.ptr, self._workspace.ptr, _WORKSPACE)

    def __enter__(self) -> Gpu:
        """Make device and stream current. Every method below is called inside such a ``with`` block."""
        self._device.__enter__()
        self.stream.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stream.__exit__(*exc)
        self._device.__exit__(*exc)

    @property
    def is_capturing(self) -> bool:
        """Whether launches become a part of a graph, and do not run now."""
        return self._capturing

    @property
    def compile_seconds(self) -> float:
        """Seconds spent on compiling kernels, or on finding them in the cache and loading them."""
        return self.functions.compile_seconds

    def describe(self) -> str:
        """Name, architecture, memory in GB (10^9 bytes) and CUDA version, in one line."""
        total = self._device.mem_info[1]
        version = ".".join(map(str, self.functions.cuda_version))
        return f"{self.name} (sm_{self.limits.arch}, {total / 1e9:.0f} GB), CUDA {version}"

    def free_memory(self) -> int:
        """Bytes that can still be allocated: free on the card, or free in the pool."""
        return int(self._device.mem_info[0] + self.main_pool.free_bytes())

    def key(self, array: Array) -> tuple[Any, ...]:
        """What a plan depends on. Raises AttributeError for an array that is not on a GPU."""
        if segments_of(array) is not None:
            return cast("tuple[Any, ...]", array.key)
        return (array.shape, array.dtype, array.flags.c_contiguous, array.data.device_id)

    def check(self, where: str, array: Array) -> None:
        """Raise OpError unless the array lies on this GPU."""
        for name, part in named_segments("", array):
            if part is not None:
                self.check(where + name, part)
        if segments_of(array) is not None:
            return
        if not isinstance(array, self.array_type):
            raise OpError(f"{where} is a {type(array).__module__}.{type(array).__name__}, not an array on the GPU")
        if array.data.device_id != self._device.id:  # type: ignore[attr-defined]
            raise OpError(f"{where} lies on GPU {array.data.device_id}, not {self._device.id}")  # type: ignore[attr-defined]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array whose content is undefined. Raises DeviceError, with the numbers, when memory is short."""
        count = dtype.itemsize * math.prod(shape)
        failure = self._cupy.cuda.memory.OutOfMemoryError
        try:
            return self.array_type(shape, dtype, self.pool.malloc(count))
        except failure:
            if self._capturing:  # nothing may be freed now; a body's first run has made its pool large enough
                raise self._out_of_memory(count) from None
        # A pool gives its own free blocks back before it fails, but no other pool's.
        self.give_back()
        self.main_pool.free_all_blocks()
        try:
            return self.array_type(shape, dtype, self.pool.malloc(count))
        except failure:
            raise self._out_of_memory(count) from None

    def _out_of_memory(self, count: int) -> DeviceError:
        free, total = self._device.mem_info
        return DeviceError(
            f"out of GPU memory: {count / 1e9:.2f} GB asked for, {free / 1e9:.2f} of {total / 1e9:.2f} GB free;"
            " a shorter --context or a smaller batch needs less"
        )

    def fill(self, array: Array, byte: int) -> None:
        """Set every byte of an array, in order with what is queued."""
        array.data.memset_async(byte, array.nbytes, self.stream)

    def transpose(self, out: Array, array: Array) -> None:
        """Copy the transpose of a matrix."""
        bits = np.dtype(f"u{array.dtype.itemsize}")  # a copy need not know what they mean
        out.view(bits)[...] = array.view(bits).T

    def write(self, array: Array, host: np.ndarray[Any, Any]) -> None:
        """Copy from pageable memory; the host array may change as soon as this returns."""
        array.data.copy_from_host_async(host.ctypes.data, host.nbytes, self.stream)

    def copy(self, array: Array, source: Array) -> None:
        """Copy an array on the GPU, in order with what is queued."""
        array.data.copy_from_device_async(source.data, array.nbytes, self.stream)

    def read(self, array: Array) -> np.ndarray[Any, Any]:
        """A copy in host memory, once everything queued before has run."""
        host = np.empty(array.shape, array.dtype)
        array.data.copy_to_host_async(host.ctypes.data, host.nbytes, self.stream)
        self.stream.synchronize()
        return host

    def fetch(self, array: Array) -> np.ndarray[Any, Any]:
        """A copy in pinned host memory, which is there once everything queued until now has run."""
        memory = self._cupy.cuda.alloc_pinned_memory(max(1, array.nbytes))  # of a pool: asking CUDA takes 0.1 ms
        host = np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
        array.data.copy_to_host_async(host.ctypes.data, host.nbytes, self.stream)
        return host

    def stage(self, array: Array, offset: int, host: np.ndarray[Any, Any]) -> None:
        """Copy 1-D ``host`` to the array's elements from ``offset`` on, through the pinned buffers."""
        self.stage_pieces(array, [(offset * host.itemsize, host.view(np.uint8))])

    def stage_pieces(self, array: Array, pieces: Sequence[tuple[int, np.ndarray[Any, Any]]]) -> None:
        """Copy 1-D pieces of bytes to their offsets in an array, in bytes, through the pinned buffers.

        They come in the order of their places; what lies between two of them may change.
        """
        if self._stage is None:
            self._stage = _Stage(self._cupy, self.stream)
        self._stage.copy(array.data, pieces)

    def end_staging(self) -> None:
        """Give the pinned buffers back, once what went through them has arrived, and memory that nothing holds."""
        if self._stage is not None:
            self._stage.close()
            self._stage = None
            self.main_pool.free_all_blocks()

    def synchronize(self) -> None:
        """Wait until everything queued has run."""
        self.stream.synchronize()

    def event(self) -> Any:
        """A CUDA event behind everything queued."""
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(self.stream)
        return event

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[np.ndarray[Any, Any], Array]:
        """Zeroed page-locked host memory, as the host and as kernels see it (one address serves both)."""
        size = int(np.prod(shape)) * dtype.itemsize
        memory = self._cupy.cuda.PinnedMemoryPointer(self._cupy.cuda.PinnedMemory(size), 0)
        host = np.frombuffer(memory, dtype, size // dtype.itemsize).reshape(shape)
        host[...] = 0
        owned = self._cupy.cuda.UnownedMemory(memory.ptr, size, memory, self._device.id)
        return host, self.array_type(shape, dtype, self._cupy.cuda.MemoryPointer(owned, 0))

    def new_pool(self) -> Any:
        """A memory pool beside the main one; its memory goes back when it dies."""
        return self._cupy.cuda.MemoryPool()

    @contextmanager
    def drawing_from(self, pool: Any) -> Iterator[None]:
        """Allocate from another pool for a while."""
        before, self.pool = self.pool, pool
        try:
            yield
        finally:
            self.pool = before

    def capture(self, body: Callable[[], None]) -> Any:
        """The launches of ``body`` as a CUDA graph; none of them runs now."""
        collecting = gc.isenabled()
        gc.disable()  # An object that is collected may wait for the stream, which a capture does not allow.
        self.stream.begin_capture()
        self._capturing = True
        try:
            body()
        finally:
            self._capturing = False
            graph = self.stream.end_capture()
            if collecting:
                gc.enable()
        return graph

    def stream_pointer(self) -> int:
        """The address of the stream that launches go to."""
        return int(self.stream.ptr)

    def address(self, array: Array) -> int:
        """Where the array begins in GPU memory."""
        return int(array.data.ptr)

    def function(self, file: str, expression: str, shared: int, waits: bool = False) -> Callable[..., None]:
        """``f(grid, block, args, shared)`` for a kernel instance, compiled or taken from CuPy's disk cache.

        waits: the kernel waits for what it needs of the kernel ahead, so it is launched early where that is possible.
        """
        raw = self.functions.kernel(file, expression, shared)
        launch: Callable[..., None] = raw.kernel
        if not waits or self._early is None:
            return launch
        return self._early_launches.setdefault(id(raw), PdlLaunch(self._early, launch, self.stream.ptr))

    def fix_sums(self) -> None:
        """From now on a row of a result does not depend on how many rows there are: for plans, and for cuBLAS, whose
        workspace becomes memory for trials. Called before the first plan is made."""
        self.limits = replace(self.limits, deterministic=True)
        if self.cublas is None:
            return
        with self:
            memory, library, byte = self._workspace, self.cublas.library, np.dtype(np.uint8)

            def read(at: int, size: int) -> np.ndarray[Any, Any]:
                return self.read(self.array_type((size,), byte, memory + at))

            def write(at: int, host: np.ndarray[Any, Any]) -> None:
                self.write(self.array_type((host.nbytes,), byte, memory + at), host)

            self.cublas.close()
            self.cublas = FixedCublas(library, self.stream.ptr, memory.ptr, _WORKSPACE, read, write)

    def close(self) -> None:
        """Give back memory, handles and modules. Arrays that the caller still holds keep theirs until they die.

        Nothing in a child that was forked: they are the parent's.
        """
        if os.getpid() != self._process:
            return
        with self, suppress(*self.failures):  # a GPU in an error state refuses everything; the process's end frees it
            self.stream.synchronize()
            self.end_staging()
            if self.cublas is not None:
                self.cublas.close()
            self.cublas, self._workspace = None, None
            self.give_back = lambda: None
            self._early_launches.clear()
            self.functions.clear()
            self.main_pool.free_all_blocks()


class _Stage:
    """Two pinned buffers of ``STAGE`` bytes: while one is copied to the GPU, the next chunk is read into the other.

    Several threads fill a buffer, because reading a mapped file is bound by page faults, not by bandwidth.
    """

    _THREADS = min(8, os.cpu_count() or 1)

    def __init__(self, cupy: Any, stream: Any) -> None:
        pinned = [cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(STAGE), 0) for _ in range(2)]
        self._stream = stream
        self._ring = itertools.cycle(
            [(p, np.frombuffer(p, np.uint8, STAGE), cupy.cuda.Event(disable_timing=True)) for p in pinned]
        )
        self._threads = ThreadPoolExecutor(self._THREADS)

    def copy(self, target: Any, pieces: Sequence[tuple[int, np.ndarray[Any, Any]]]) -> None:
        for start, size, parts in windows(pieces, STAGE):
            pointer, buffer, sent = next(self._ring)
            sent.synchronize()  # returns at once if it was never recorded
            pairs = [(buffer[at : at + data.size], data) for at, data in parts]
            parallel_copy(self._threads, self._THREADS, pairs)
            (target + start).copy_from_host_async(pointer.ptr, size, self._stream)
            sent.record(self._stream)

    def close(self) -> None:
        self._threads.shutdown()
        self._stream.synchronize()
        self._ring = itertools.cycle(())


def windows(
    pieces: Sequence[tuple[int, np.ndarray[Any, Any]]], limit: int
) -> Iterator[tuple[int, int, list[tuple[int, np.ndarray[Any, Any]]]]]:
    """Pieces of bytes, each with its offset, in runs of at most ``limit`` bytes: (start, size, the run's pieces with
    their offsets from its start)."""
    start, end, inside = 0, 0, list[tuple[int, np.ndarray[Any, Any]]]()
    for offset, data in pieces:
        at = 0
        while at < data.size:
            if inside and offset + at - start >= limit:
                yield start, end - start, inside
                inside = []
            if not inside:
                start = offset + at
            part = data[at : at + limit - (offset + at - start)]
            inside.append((offset + at - start, part))
            at += part.size
            end = offset + at
    if inside:
        yield start, end - start, inside


_SMALL = 1 << 18  # bytes: to copy less takes no longer than handing it to a thread


def parallel_copy(
    pool: ThreadPoolExecutor, threads: int, pairs: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
) -> None:
    """``target[:] = data`` for pairs of 1-D bytes, with several threads where it is worth it."""
    size = max(1 << 20, -(-sum(data.size for _, data in pairs) // threads))
    cuts = [(pair, at) for pair in pairs for at in range(0, pair[1].size, size)]
    large = [cut for cut in cuts if cut[0][1].size > _SMALL]

    def copy(cut: tuple[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]], int]) -> None:
        (target, data), at = cut
        np.copyto(target[at : at + size], data[at : at + size])

    done = pool.map(copy, large)  # they begin now
    for cut in cuts:
        if cut[0][1].size <= _SMALL:
            copy(cut)
    list(done)
