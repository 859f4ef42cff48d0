"""The CUDA backend: every op as kernels of ``cuda_src/``, compiled at run time for the GPU at hand.

Two parts. ``Gpu`` is what CuPy and cuBLAS do for us: memory, streams, compiled functions, matrix products.
``CudaBackend`` plans: which launches compute an op, on which arrays, and when an array is dead. The plan of an op
depends only on shapes, dtypes and attributes, so it is made once and repeated; a decode step then costs a few
microseconds of Python per node. CuPy is imported when a backend is made, not before.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import compiler, kernel, memory
from ..checkpoint import Weight
from ..config import ModelConfig
from ..errors import CheckpointError, DeviceError
from ..graph import Node
from ..op import DTYPES, Array, Call, OpError, dtype_name
from ..ops import OPS
from ..ops.linear import LIBRARY, STREAMED_ROWS
from .cublas import Cublas, Product, load_cublas

__all__ = ["CudaBackend", "Gpu", "cuda_available"]

WORKSPACE = 32 << 20  # bytes for cuBLAS: what NVIDIA recommends for Hopper; fixed, so that results repeat
STAGE = 32 << 20  # bytes of each of the two pinned buffers that weights pass through
OLDEST_ARCH = 75
OLDEST_DRIVER = 12000  # as cuDriverGetVersion counts: CUDA 12.0, driver 525

_log = logging.getLogger("cuplama")


# ---- is there a GPU? -------------------------------------------------------------------------------------------------


def cuda_available(device: int = 0) -> tuple[bool, str]:
    """Whether a CUDA backend can be made, and if not, the reason in a few words. Imports nothing heavy."""
    driver = load_driver()
    if driver is None:
        return False, "no NVIDIA driver is installed (libcuda.so.1 not found)"
    if code := driver.cuInit(0):
        reasons = {100: "the NVIDIA driver finds no GPU", 804: "the NVIDIA driver does not support this GPU"}
        return False, reasons.get(code, f"the NVIDIA driver does not start (cuInit: error {code})")
    if (version := driver_version(driver)) < OLDEST_DRIVER:
        return False, f"the NVIDIA driver is too old (CUDA {_dotted(version)}; driver 525 or newer is needed)"
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if device >= count.value:
        return False, f"there is no GPU {device} ({count.value} found)" if count.value else "no NVIDIA GPU is visible"
    if (arch := compute_capability(driver, device)) < OLDEST_ARCH:
        return False, f"the GPU is too old (sm_{arch}; sm_{OLDEST_ARCH} or newer is needed)"
    if importlib.util.find_spec("cupy") is None:
        return False, "cupy is not installed (pip install cupy-cuda12x)"
    return True, ""


def load_driver() -> ctypes.CDLL | None:
    """The CUDA driver library, or None where there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def driver_version(driver: ctypes.CDLL) -> int:
    """The newest CUDA version the driver supports, as 12090 for 12.9."""
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def compute_capability(driver: ctypes.CDLL, device: int) -> int:
    """75 for sm_75."""
    return 10 * _attribute(driver, device, 75) + _attribute(driver, device, 76)


def _attribute(driver: ctypes.CDLL, device: int, attribute: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


# ---- programmatic dependent launch -----------------------------------------------------------------------------------


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute. The value is a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class EarlyLaunch:
    """A kernel launch that may begin before the kernel ahead of it has ended: the kernel itself waits where it must.

    CuPy has no access to the attribute, so the driver is called directly. If it refuses, the launch is an ordinary one.
    """

    _PROGRAMMATIC_STREAM_SERIALIZATION = 6
    OLDEST_ARCH, OLDEST_DRIVER = 90, 12030  # a captured graph keeps such edges from CUDA 12.3 on

    def __init__(self, driver: ctypes.CDLL, function: Any, stream: int) -> None:
        self._driver, self._plain, self._stream = driver, function, stream
        self._attribute = _Attribute(self._PROGRAMMATIC_STREAM_SERIALIZATION)
        self._attribute.value[0] = 1

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared: int) -> None:
        values = [np.array(a if isinstance(a, np.generic) else np.uintp(a.data.ptr)) for a in args]
        pointers = (ctypes.c_void_p * len(values))(*[v.ctypes.data for v in values])
        config = _Config(
            (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), shared, self._stream,
            ctypes.pointer(self._attribute), 1,
        )  # fmt: skip
        if self._driver.cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(self._plain.ptr), pointers, None):
            self._plain(grid, block, args, shared)


# ---- what CuPy does for us -------------------------------------------------------------------------------------------


class Gpu:
    """One GPU: a stream, a memory pool, compiled functions and cuBLAS, all given back by ``close``.

    Its arrays are CuPy arrays in its own pool. The user's CuPy state (current stream, default pool) is not touched.
    """

    def __init__(self, device: int = 0) -> None:
        ok, reason = cuda_available(device)
        if not ok:
            raise DeviceError(f"CUDA cannot be used: {reason}")
        try:
            import cupy
            from cupy_backends.cuda.libs import nvrtc

            self._cuda_version = nvrtc.getVersion()
        except Exception as e:  # CuPy raises several kinds, by what is missing
            raise DeviceError(f"cupy does not start: {e}; run `cuplama doctor`") from None
        self._cupy = cupy
        self.array_type: type = cupy.ndarray
        self._device = cupy.cuda.Device(device)
        attributes = self._device.attributes
        self.limits = kernel.Device(
            arch=int(self._device.compute_capability),
            sms=attributes["MultiProcessorCount"],
            shared=attributes["MaxSharedMemoryPerBlockOptin"],
        )
        self.name: str = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
        self.failures: tuple[type[Exception], ...] = (
            cupy.cuda.driver.CUDADriverError,
            cupy.cuda.runtime.CUDARuntimeError,
        )
        self._functions: dict[tuple[str, str], tuple[Any, Any]] = {}
        self._stage: _Stage | None = None
        driver = load_driver()
        self._early: ctypes.CDLL | None = None
        if driver is not None and self.limits.arch >= EarlyLaunch.OLDEST_ARCH:
            self._early = driver if driver_version(driver) >= EarlyLaunch.OLDEST_DRIVER else None
        with self._device:
            self.stream = cupy.cuda.Stream(non_blocking=True)
            self.pool = cupy.cuda.MemoryPool()
        library = load_cublas()
        self.cublas: Cublas | None = None
        if library is not None:
            with self:
                self._workspace = self.pool.malloc(WORKSPACE)
                self.cublas = Cublas(library, self.stream.ptr, self._workspace.ptr, WORKSPACE)

    def __enter__(self) -> Gpu:
        """Make device and stream current; everything below happens inside."""
        self._device.__enter__()
        self.stream.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stream.__exit__(*exc)
        self._device.__exit__(*exc)

    def describe(self) -> str:
        total = self._device.mem_info[1]
        version = ".".join(map(str, self._cuda_version))
        return f"{self.name} (sm_{self.limits.arch}, {total / 1e9:.0f} GB), CUDA {version}"

    def free_memory(self) -> int:
        """Bytes that can still be allocated: free on the card, or free in the pool."""
        return int(self._device.mem_info[0] + self.pool.free_bytes())

    def key(self, array: Array) -> tuple[Any, ...]:
        """What a plan depends on. Raises AttributeError for an array that is not on a GPU."""
        return (array.shape, array.dtype, array.flags.c_contiguous, array.data.device_id)

    def check(self, where: str, array: Array) -> None:
        """Raise OpError unless the array lies on this GPU."""
        if not isinstance(array, self.array_type):
            raise OpError(f"{where} is a {type(array).__module__}.{type(array).__name__}, not an array on the GPU")
        if array.data.device_id != self._device.id:  # type: ignore[attr-defined]
            raise OpError(f"{where} lies on GPU {array.data.device_id}, not {self._device.id}")  # type: ignore[attr-defined]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        count = dtype.itemsize * math.prod(shape)
        try:
            return self.array_type(shape, dtype, self.pool.malloc(count))
        except self._cupy.cuda.memory.OutOfMemoryError:
            free, total = self._device.mem_info
            raise DeviceError(
                f"out of GPU memory: {count / 1e9:.2f} GB asked for, {free / 1e9:.2f} of {total / 1e9:.2f} GB free;"
                " a shorter --context or a smaller batch needs less"
            ) from None

    def fill(self, array: Array, byte: int) -> None:
        array.data.memset_async(byte, array.nbytes, self.stream)

    def write(self, array: Array, host: np.ndarray[Any, Any]) -> None:
        """Copy from pageable memory; the host array may change as soon as this returns."""
        array.data.copy_from_host_async(host.ctypes.data, host.nbytes, self.stream)

    def read(self, array: Array) -> np.ndarray[Any, Any]:
        host = np.empty(array.shape, array.dtype)
        array.data.copy_to_host_async(host.ctypes.data, host.nbytes, self.stream)
        self.stream.synchronize()
        return host

    def stage(self, array: Array, offset: int, host: np.ndarray[Any, Any]) -> None:
        """Copy 1-D ``host`` to the array's elements from ``offset`` on, through the pinned buffers."""
        if self._stage is None:
            self._stage = _Stage(self._cupy, self.stream)
        self._stage.copy(array.data + offset * host.itemsize, host.view(np.uint8))

    def synchronize(self) -> None:
        self.stream.synchronize()

    def mark(self) -> Any:
        """An event behind everything queued."""
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
        main, self.pool = self.pool, pool
        try:
            yield
        finally:
            self.pool = main

    def capture(self, body: Callable[[], None]) -> Any:
        """The launches of ``body`` as a CUDA graph; none of them runs now."""
        self.stream.begin_capture()
        try:
            body()
        finally:
            graph = self.stream.end_capture()
        return graph

    def address(self, array: Array) -> int:
        return int(array.data.ptr)

    def function(self, file: str, expression: str, shared: int, waits: bool = False) -> Callable[..., None]:
        """``f(grid, block, args, shared)`` for a kernel instance, compiled or taken from CuPy's disk cache.

        waits: the kernel waits for what it needs of the kernel ahead, so it is launched early where that is possible.
        One module per instance: whichever instances a run needs, each is found in the cache on its own.
        """
        found = self._functions.get((file, expression))
        if found is None:
            module = self._cupy.RawModule(
                code=compiler.source(file),
                options=compiler.options(self._cuda_version[0], self.limits.arch),
                name_expressions=(expression,),
            )
            try:
                raw = module.get_function(expression)
            except self._cupy.cuda.compiler.CompileException as e:
                raise compiler.compile_error(file, str(e), self.limits.arch) from None
            launch = raw.kernel
            # All kernels alike: a multiprocessor must be empty to change its shared memory, and then none starts early.
            raw.preferred_shared_memory_carveout = 100
            if waits and self._early is not None:
                launch = EarlyLaunch(self._early, launch, self.stream.ptr)
            found = self._functions[file, expression] = (raw, launch)
        raw, function = found
        if shared + raw.shared_size_bytes > 48 * 1024 and shared > raw.max_dynamic_shared_size_bytes:
            raw.max_dynamic_shared_size_bytes = shared
        return function  # type: ignore[no-any-return]

    def close(self) -> None:
        """Give back memory, handles and modules. Arrays that the caller still holds keep theirs until they die."""
        with self, suppress(*self.failures):  # a GPU in an error state refuses everything; the process's end frees it
            self.stream.synchronize()
            if self._stage is not None:
                self._stage.close()
            if self.cublas is not None:
                self.cublas.close()
            self._stage, self.cublas, self._workspace = None, None, None
            self._functions.clear()
            self.pool.free_all_blocks()


class _Stage:
    """Two pinned buffers: while one is on its way to the GPU, the next piece is read from the file into the other.

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

    def copy(self, target: Any, data: np.ndarray[Any, Any]) -> None:
        for at in range(0, data.size, STAGE):
            piece = data[at : at + STAGE]
            pointer, buffer, sent = next(self._ring)
            sent.synchronize()  # returns at once if it was never recorded
            parallel_copy(self._threads, self._THREADS, buffer[: piece.size], piece)
            (target + at).copy_from_host_async(pointer.ptr, piece.size, self._stream)
            sent.record(self._stream)

    def close(self) -> None:
        self._threads.shutdown()
        self._stream.synchronize()
        self._ring = itertools.cycle(())


def parallel_copy(
    pool: ThreadPoolExecutor, threads: int, target: np.ndarray[Any, Any], data: np.ndarray[Any, Any]
) -> None:
    """``target[:] = data`` for 1-D bytes, with several threads where it is worth it."""
    size = max(1 << 20, -(-data.size // threads))
    cuts = range(0, data.size, size)
    list(pool.map(lambda at: np.copyto(target[at : at + size], data[at : at + size]), cuts))


# ---- planning --------------------------------------------------------------------------------------------------------


class _Launch:
    """A kernel launch without its arrays: ``slots`` says which array goes where."""

    __slots__ = ("args", "block", "function", "grid", "shared", "slots", "text")

    def __init__(
        self, function: Callable[..., None], bound: kernel.BoundLaunch, position: Mapping[str, int], fixed: set[str]
    ) -> None:
        """position: parameter name -> number of its array; fixed: names whose value belongs to the launch itself."""
        self.function, self.grid, self.block, self.shared = function, bound.grid, bound.block, bound.shared
        self.text = bound.describe()
        names = [p.name if p.pointer and p.name not in fixed else "" for p in bound.prototype.parameters]
        given = [name in position and not isinstance(a, np.generic) for name, a in zip(names, bound.args, strict=True)]
        self.slots = [(i, position[name]) for i, name in enumerate(names) if given[i]]
        self.args = [None if given[i] else a for i, a in enumerate(bound.args)]

    def __call__(self, arrays: Sequence[Array | None]) -> None:
        args = self.args.copy()
        for i, j in self.slots:
            args[i] = arrays[j]
        self.function(self.grid, self.block, tuple(args), self.shared)


class _Matmul:
    """A cuBLAS product without its arrays. slots: which array is which argument of the product."""

    __slots__ = ("address", "product", "slots", "text")

    def __init__(self, product: Product, address: Callable[[Array], int], slots: Mapping[str, int]) -> None:
        self.product, self.address, self.slots, self.text = product, address, slots, product.text

    def __call__(self, arrays: Sequence[Array | None]) -> None:
        self.product(**{name: self.address(arrays[i]) for name, i in self.slots.items()})


@dataclass(frozen=True)
class _Planned:
    """An op for given shapes. Arrays are numbered: inputs (``width`` of them), then new outputs, then scratch.

    outs: which numbers are the outputs; new: shape and dtype of every new output and scratch buffer.
    """

    width: int
    outs: tuple[int, ...]
    new: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]
    actions: tuple[Callable[[Sequence[Array | None]], None], ...]


@dataclass(frozen=True)
class _Step:
    """A node made ready to run. id: stands for op and attributes in the plans' keys; dead: names that die after it."""

    node: Node
    id: int
    ins: tuple[str, ...]
    outs: tuple[str, ...]
    dead: tuple[str, ...]


class Mark:
    """A point in the stream."""

    def __init__(self, event: Any, failures: tuple[type[Exception], ...]) -> None:
        self._event, self._failures = event, failures

    def synchronize(self) -> None:
        """Wait until the GPU has passed it. Raises DeviceError if something before it failed."""
        try:
            self._event.synchronize()
        except self._failures as e:
            raise _failure("a kernel before this point", e) from e


class Recording:
    """Repeats a body of calls as one CUDA graph.

    The first run is an ordinary one: it compiles and plans. The second is captured. Both take their memory from a pool
    of the recording's own, so that what the graph writes to stays its own for as long as it can be replayed.
    """

    def __init__(self, gpu: Gpu, body: Callable[[], None], eager: bool) -> None:
        self._gpu, self._body, self._eager = gpu, body, eager
        self._pool = gpu.new_pool()
        self._graph: Any = None
        self._warm = False

    def run(self) -> Mark:
        """Queue the body once; the mark is behind it. Raises DeviceError if the GPU refuses."""
        with self._gpu as gpu:
            try:
                if self._graph is None:
                    with gpu.drawing_from(self._pool):
                        if self._warm and not self._eager:
                            self._graph = gpu.capture(self._body)
                        else:
                            self._body()
                            self._warm = True
                if self._graph is not None:
                    self._graph.launch(gpu.stream)
                return Mark(gpu.mark(), gpu.failures)
            except gpu.failures as e:
                raise _failure("a recorded step", e) from e

    def close(self) -> None:
        """Give back the graph and its memory. The recording cannot be run afterwards."""
        with self._gpu as gpu, suppress(*gpu.failures):
            gpu.synchronize()
            del self._graph, self._body
            self._pool.free_all_blocks()


class CudaBackend:
    """Runs node lists on an NVIDIA GPU. dtype: "f32", "f16" or "bf16".

    bf16 needs sm_80; on older GPUs the model runs in fp16, with a warning on the ``cuplama`` logger. Environment:
    CUPLAMA_CHECK=1 fills outputs and scratch with NaN before every node and waits after it, so that an error names its
    node. Raises DeviceError if there is no usable GPU, CompileError if a kernel does not compile.
    """

    name = "cuda"
    _CHUNKS = (4096, 2048, 1024, 512)  # the most tokens of a pass; fewer where memory is short
    prefill_chunk = _CHUNKS[0]
    records = True
    _MOST_PLANS = 8192  # forgotten all at once beyond this; shapes of prompts vary without end

    def __init__(self, dtype: str = "bf16", device: int = 0, gpu: Gpu | None = None) -> None:
        self.gpu = gpu or Gpu(device)
        if dtype == "bf16" and self.gpu.limits.arch < 80:
            _log.warning("%s (sm_%d) has no bf16; running in fp16", self.gpu.name, self.gpu.limits.arch)
            dtype = "f16"
        self.dtype = DTYPES[dtype]
        self._check = os.environ.get("CUPLAMA_CHECK", "") not in ("", "0")
        self._ids: dict[tuple[Any, ...], int] = {}
        self._plans: dict[tuple[Any, ...], _Planned] = {}
        self._zeroed: dict[tuple[tuple[int, ...], str], Array] = {}
        self._steps: dict[tuple[int, tuple[str, ...]], tuple[Sequence[Node], list[_Step]]] = {}

    @classmethod
    def open(cls, config: ModelConfig, weights: Mapping[str, Weight], dtype: str, tokens: int) -> CudaBackend:
        """A backend for one model. dtype "auto": the checkpoint's; tokens: of the KV cache, all sequences together.

        Raises DeviceError, with the numbers, if weights, cache and workspace exceed the GPU's free memory.
        """
        unique = {w.source: w for w in weights.values()}.values()
        backend = cls(dtype_name(weights["embed"].dtype) if dtype == "auto" else dtype)
        elements = sum(w.nbytes // w.dtype.itemsize for w in unique)
        free, limits = backend.free_memory(), backend.gpu.limits
        backend.prefill_chunk, plan = memory.fit(config, elements, backend.dtype, tokens, cls._CHUNKS, free, limits)
        try:
            memory.check(plan, free, backend.gpu.name)
        except DeviceError:
            backend.close()
            raise
        return backend

    # -- arrays

    def describe(self) -> str:
        return self.gpu.describe()

    def free_memory(self) -> int:
        """Bytes of GPU memory that can still be allocated."""
        return self.gpu.free_memory()

    def upload(self, array: np.ndarray[Any, Any]) -> Array:
        array = np.ascontiguousarray(array)
        with self.gpu as gpu:
            out = gpu.empty(array.shape, array.dtype)
            gpu.write(out, array)
        return out

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        with self.gpu as gpu:
            gpu.check("the array to download", array)
            try:
                return gpu.read(array)
            except gpu.failures as e:
                raise _failure("a kernel before this point", e) from e

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        with self.gpu as gpu:
            out = gpu.empty(tuple(shape), np.dtype(dtype))
            gpu.fill(out, 0)
        return out

    def load_weight(self, weight: Weight) -> Array:
        """A checkpoint weight in the backend's dtype, through the pinned buffers; copies are queued, not awaited.

        Raises CheckpointError naming a tensor whose values float16 cannot hold.
        """
        with self.gpu as gpu:
            out = gpu.empty(weight.shape, self.dtype)
            widest = max(1, self.dtype.itemsize // weight.dtype.itemsize)
            for offset, piece in weight.chunks(STAGE // widest):
                gpu.stage(out, offset, convert(piece, self.dtype, weight.name))
        return out

    def write(self, array: Array, host: np.ndarray[Any, Any]) -> None:
        """Overwrite a device array with a host array of its shape and dtype, in order with what is queued."""
        if array.shape != host.shape:
            raise OpError(f"cannot write an array of shape {host.shape} over one of shape {array.shape}")
        with self.gpu as gpu:
            gpu.write(array, np.ascontiguousarray(host, array.dtype))

    def host_ring(self, shape: tuple[int, int]) -> tuple[np.ndarray[Any, Any], Array]:
        """Pinned int32 host memory that kernels write directly: the host's view, and the array that ops take."""
        with self.gpu as gpu:
            return gpu.pinned(shape, DTYPES["i32"])

    def recording(self, body: Callable[[], None]) -> Recording:
        """A body of calls that runs once as it is and from then on as one CUDA graph."""
        return Recording(self.gpu, body, eager=self._check)

    def synchronize(self) -> None:
        """Wait for everything queued. Raises DeviceError if some of it failed."""
        with self.gpu as gpu:
            try:
                gpu.synchronize()
            except gpu.failures as e:
                raise _failure("a kernel before this point", e) from e

    # -- running

    def call(self, op: str, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> tuple[Array, ...]:
        """Run one op. Raises OpError for arrays that do not fit its signature, DeviceError for a failed launch."""
        with self.gpu:
            return self._execute(op, self._id(op, attrs), ins, attrs)

    def run(self, nodes: Sequence[Node], values: dict[str, Array], keep: Sequence[str]) -> dict[str, Array]:
        """Run a node list. The list must not change after its first run: liveness and ids are worked out once."""
        live = {"": None, **values}
        with self.gpu:
            for step in self._prepare(nodes, tuple(keep)):
                outs = self._execute(step.node.op, step.id, [live[n] for n in step.ins], step.node.attrs, step.node)
                for name, array in zip(step.outs, outs, strict=True):
                    live[name] = array
                del outs
                for name in step.dead:
                    del live[name]
        return {name: live[name] for name in keep}

    def _execute(
        self, op: str, op_id: int, ins: Sequence[Array | None], attrs: Mapping[str, Any], node: Node | None = None
    ) -> tuple[Array, ...]:
        gpu = self.gpu
        try:
            key = (op_id, *[None if a is None else gpu.key(a) for a in ins])
        except AttributeError:
            key = ()  # something that is no GPU array; planning says what
        planned = self._plans.get(key)
        if planned is None:
            planned = self._plan(op, ins, attrs)
            if len(self._plans) >= self._MOST_PLANS:
                self._plans.clear()
            self._plans[key] = planned
        arrays = [*ins, *[None] * (planned.width - len(ins)), *[gpu.empty(*new) for new in planned.new]]
        if self._check:
            for array in arrays[planned.width :]:
                gpu.fill(array, 0xFF)  # NaN in every float dtype
        for action in planned.actions:
            try:
                action(arrays)
            except gpu.failures as e:
                raise _failure(action.text, e, node) from e  # type: ignore[attr-defined]
        if self._check:
            try:
                gpu.synchronize()
            except gpu.failures as e:
                raise _failure("; ".join(a.text for a in planned.actions), e, node) from e  # type: ignore[attr-defined]
        return tuple(arrays[i] for i in planned.outs)

    def _plan(self, name: str, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> _Planned:
        """Check the arrays against the op's signature and decide the launches."""
        op, gpu = OPS[name], self.gpu
        signature = op.signature
        for spec, array in zip(signature.ins, ins, strict=False):
            if array is not None:
                gpu.check(f"{name}: {spec.name}", array)
        call = op.bind(ins, compiler.attributes(op, attrs, self.dtype))
        width = len(signature.ins)
        arrays: list[Array | None] = [*ins, *[None] * (width - len(ins))]
        position = {spec.name: i for i, spec in enumerate(signature.ins)}
        new: list[tuple[tuple[int, ...], np.dtype[Any]]] = []

        def add(array_name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
            position[array_name] = len(arrays)
            new.append((shape, dtype))
            arrays.append(gpu.empty(shape, dtype))
            return arrays[-1]

        for spec in signature.outs:
            if spec.name not in signature.in_place:
                call.arrays[spec.name] = add(spec.name, call.shape(spec), call.dtype(spec))
        outs = tuple(position[spec.name] for spec in signature.outs)
        actions: list[Callable[[Sequence[Array | None]], None]] = []
        way = _by_library(gpu.cublas, call)
        if way is not None:
            plan = way.before
        elif op.kernels is not None:
            plan = op.kernels(call, gpu.limits)
        else:
            raise OpError(f"{name} has no CUDA kernel")
        scratch = {
            n: self._zeros(shape, dtype) if n in plan.zeroed else add(n, shape, DTYPES[dtype])
            for n, (shape, dtype) in plan.scratch.items()
        }
        for launch in plan.launches:
            bound = kernel.bind(launch, call, scratch)
            function = gpu.function(bound.file, bound.expression, bound.shared, bound.prototype.waits)
            actions.append(_Launch(function, bound, position, set(launch.constants)))
        if way is not None:
            slots = {argument: position[array] for argument, array in way.arrays.items()}
            actions.append(_Matmul(way.product, gpu.address, slots))
        return _Planned(width, outs, tuple(new), tuple(actions))

    def _zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Scratch that its users find and leave zero, so they share it. Kept for good: recordings know its address."""
        if (shape, dtype) not in self._zeroed:
            array = self._zeroed[shape, dtype] = self.gpu.empty(shape, DTYPES[dtype])
            self.gpu.fill(array, 0)
        return self._zeroed[shape, dtype]

    def _id(self, name: str, attrs: Mapping[str, Any]) -> int:
        """A small number for an op with its attributes; layers that differ in nothing else share their plans."""
        key = (name, *sorted(compiler.attributes(OPS[name], attrs, self.dtype).items()))
        return self._ids.setdefault(key, len(self._ids))

    def _prepare(self, nodes: Sequence[Node], keep: tuple[str, ...]) -> list[_Step]:
        """The steps of a node list, with the names that die after each."""
        known = self._steps.get((id(nodes), keep))
        if known is not None and known[0] is nodes:
            return known[1]
        flat = [part for node in nodes for part in runnable(node)]
        made = {name for node in flat for name in node.outs if name not in node.ins}
        last = {name: i for i, node in enumerate(flat) for name in (*node.ins, *node.outs)}
        steps = []
        for i, node in enumerate(flat):
            touched = dict.fromkeys((*node.ins, *node.outs))
            dead = tuple(n for n in touched if n in made and last[n] == i and n not in keep)
            steps.append(_Step(node, self._id(node.op, node.attrs), node.ins, node.outs, dead))
        if len(self._steps) >= 64:
            self._steps.clear()
        self._steps[id(nodes), keep] = (nodes, steps)
        return steps

    def close(self) -> None:
        """Give back everything: plans, modules, pool, pinned buffers, cuBLAS. The backend cannot be used afterwards."""
        self._plans.clear()
        self._steps.clear()
        self._zeroed.clear()
        self.gpu.close()


@dataclass(frozen=True)
class _Way:
    """A product, what is launched before it, and the names of the arrays that are its arguments."""

    before: kernel.Plan
    arrays: Mapping[str, str]
    product: Product


def _by_library(cublas: Cublas | None, call: Call) -> _Way | None:
    """How cuBLAS computes the op; None if our kernels do."""
    if cublas is None or call.op.name not in LIBRARY or call["n"] <= STREAMED_ROWS:
        return None
    n, m, k = call["n"], call["m"], call["k"]
    T, U = dtype_name(call.dtypes["T"]), dtype_name(call.dtype(call.op.signature.outs[0]))
    for before, arrays in _ways(call, n, m, T, U):
        product = cublas.product(n, m, k, T, U, bias="b" in arrays, add="c" in arrays)
        if product is not None:
            return _Way(before, arrays, product)
    return None


def _ways(call: Call, n: int, m: int, T: str, U: str) -> Iterator[tuple[kernel.Plan, Mapping[str, str]]]:
    """What can be launched before a product, with the product's arguments by the names of arrays; the best first."""
    given, columns = {"x": "x", "w": "w", "y": "y"}, -(-m // 256)
    residual = {"c": "a"} if "a" in call.arrays else {}
    if call.arrays["b"] is None:
        yield kernel.Plan(()), given | residual
        return
    if T == U:
        yield kernel.Plan(()), given | residual | {"b": "b"}
    else:
        cast = kernel.Launch("bias.cu:cast_bias", (columns,), (256,), constants={"U": U})
        yield kernel.Plan((cast,), {"bias": ((m,), U)}), given | residual | {"b": "bias"}
    constants = {"U": U} if residual else {"U": U, "a": None}
    fill = kernel.Launch("bias.cu:fill_rows", (columns, min(n, 65535)), (256,), constants=constants)
    yield kernel.Plan((fill,)), given | {"c": "y"}


def runnable(node: Node) -> list[Node]:
    """The node, or the nodes it stands for where its op has no kernel."""
    op = OPS.get(node.op)
    if node.parts and (op is None or op.kernels is None):
        return [piece for part in node.parts for piece in runnable(part)]
    return [node]


def convert(piece: np.ndarray[Any, Any], dtype: np.dtype[Any], name: str) -> np.ndarray[Any, Any]:
    """A piece of a weight in another dtype. Raises CheckpointError if float16 cannot hold a finite value of it."""
    if piece.dtype == dtype:
        return piece
    if piece.dtype == DTYPES["bf16"]:  # a bf16 is the upper half of a float32: much faster than a cast
        piece = (piece.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        out = piece.astype(dtype, copy=False)
    if dtype == np.float16 and not np.isfinite(out).all() and np.isfinite(piece).all():
        largest = float(np.abs(piece).max())
        raise CheckpointError(f"weight {name} holds {largest:g}, which float16 cannot; --dtype float32 can")
    return out


def _failure(what: str, error: Exception, node: Node | None = None) -> DeviceError:
    hint = "" if node is not None else " (CUPLAMA_CHECK=1 names the node)"
    return DeviceError(f"{f'node {node}: ' if node is not None else ''}{what}: {error}{hint}")
