"""A stand-in for CuPy in host memory: what ``Gpu`` and ``Eager`` use of it, with CuPy's names.

What is queued on a stream is done when something waits for it. New memory, pinned memory included, holds garbage.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from tests.fakes import Queue, QueueEvent

GARBAGE = 0x5A  # every byte of new memory


class CUDARuntimeError(RuntimeError):
    """What CUDA's runtime refuses."""


class CUDADriverError(RuntimeError):
    """What CUDA's driver refuses."""


class OutOfMemoryError(MemoryError):
    """What a pool raises when the card is full."""


class CompileException(Exception):  # noqa: N818
    """What a source with an error raises."""


class Card:
    """The machine: GPUs of so many bytes, and what has been asked of them.

    entered: devices and streams that are current, innermost last; waits: how often a stream was waited for; modules:
    what was compiled; complaint: what the compiler says of a source, if anything; broken: whether CUDA refuses all;
    current_device, current_stream, allocator: the user's state, which ``with`` blocks of devices and streams change;
    launch: what a plain launch of (file, expression, grid, block, args, shared) does; by default it is only remembered.
    """

    def __init__(self, arch: int = 90, memory: int = 1 << 30) -> None:
        self.arch, self.memory = arch, memory
        self.used = self.waits = 0
        self.entered: list[Any] = []
        self.modules: list[dict[str, Any]] = []
        self.complaint = ""
        self.broken = False
        self.default_stream = Stream(self, non_blocking=True, ptr=0)
        self.allocator: Callable[[int], MemoryPointer] = MemoryPool(self).malloc
        self.launch: Callable[..., None] | None = None

    @property
    def current_device(self) -> int:
        """The number of the GPU that is current."""
        return next((e.id for e in reversed(self.entered) if isinstance(e, Device)), 0)

    @property
    def current_stream(self) -> Stream:
        """The stream that is current."""
        return next((e for e in reversed(self.entered) if isinstance(e, Stream)), self.default_stream)

    def modules_by_name(self) -> dict[str, Any]:
        """What ``sys.modules`` is to hold for the imports of ``Gpu``."""
        nvrtc = SimpleNamespace(getVersion=lambda: (12, 9))
        return {"cupy": self.cupy(), "cupy_backends.cuda.libs": SimpleNamespace(nvrtc=nvrtc)}

    def cupy(self) -> Any:
        """The module."""
        card = self

        def of_this(kind: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **named: kind(card, *args, **named)

        cuda = SimpleNamespace(
            Device=of_this(Device),
            Event=Event,
            MemoryPool=of_this(MemoryPool),
            MemoryPointer=MemoryPointer,
            PinnedMemory=PinnedMemory,
            PinnedMemoryPointer=PinnedMemoryPointer,
            Stream=of_this(Stream),
            UnownedMemory=UnownedMemory,
            compiler=SimpleNamespace(CompileException=CompileException),
            driver=SimpleNamespace(CUDADriverError=CUDADriverError),
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            get_current_stream=lambda: card.current_stream,
            runtime=SimpleNamespace(
                CUDARuntimeError=CUDARuntimeError,
                getDevice=lambda: card.current_device,
                getDeviceProperties=lambda i: {"name": b"GPU number %d" % i},
            ),
        )
        array = type("ndarray", (ndarray,), {"__module__": "cupy", "card": card})
        return SimpleNamespace(cuda=cuda, ndarray=array, RawModule=of_this(RawModule))


class _Entered:
    """What a ``with`` block makes current."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def __enter__(self) -> Any:
        self.card.entered.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.card.entered.pop() is self


class Device(_Entered):
    def __init__(self, card: Card, number: int) -> None:
        super().__init__(card)
        self.id = number
        self.compute_capability = str(card.arch)
        self.attributes = {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 232448}

    @property
    def mem_info(self) -> tuple[int, int]:
        return self.card.memory - self.card.used, self.card.memory


class Stream(_Entered):
    """captured: what a graph under capture consists of; None outside a capture."""

    def __init__(self, card: Card, non_blocking: bool, ptr: int = 0x1234) -> None:
        super().__init__(card)
        self.ptr = ptr
        assert non_blocking  # it would wait for the default stream, which others use
        self.queue = Queue()
        self.captured: list[Callable[[], None]] | None = None

    def do(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def synchronize(self) -> None:
        if self.card.broken or self.captured is not None:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported")
        self.card.waits += 1
        self.queue.wait()

    def begin_capture(self) -> None:
        assert self.ptr != 0  # the default stream cannot be captured
        self.captured = []

    def is_capturing(self) -> bool:
        assert self.ptr != 0
        return self.captured is not None

    def end_capture(self) -> Any:
        captured, self.captured = self.captured, None
        return SimpleNamespace(launch=lambda stream: stream.queue.extend(captured or []))


class Event:
    def __init__(self, disable_timing: bool) -> None:
        assert disable_timing  # events that take times are slow
        self._mark: QueueEvent | None = None

    def record(self, stream: Stream) -> None:
        self._mark = QueueEvent(stream.queue)

    def synchronize(self) -> None:
        if self._mark is not None:
            self._mark.synchronize()


# ---- memory ----------------------------------------------------------------------------------------------------------
class Memory:
    """Bytes on a GPU."""

    def __init__(self, size: int, device_id: int) -> None:
        self.content = np.full(size, GARBAGE, np.uint8)
        self.ptr, self.size, self.device_id = self.content.ctypes.data, size, device_id


class UnownedMemory:
    """Bytes that somebody else allocated."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int) -> None:
        self.ptr, self.size, self.owner, self.device_id = ptr, size, owner, device_id


class MemoryPointer:
    def __init__(self, memory: Any, offset: int) -> None:
        self.mem, self._offset = memory, offset
        self.ptr, self.device_id = memory.ptr + offset, memory.device_id

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self._offset + offset)

    def memset_async(self, byte: int, size: int, stream: Stream) -> None:
        self._within(size)
        stream.do(lambda: _put(self.ptr, bytes([byte]) * size))

    def copy_from_host_async(self, address: int, size: int, stream: Stream) -> None:
        """Pinned memory is read when the copy is done, pageable memory at once."""
        self._within(size)
        if address in PinnedMemory.addresses:
            stream.do(lambda: _put(self.ptr, ctypes.string_at(address, size)))
        else:
            content = ctypes.string_at(address, size)
            stream.do(lambda: _put(self.ptr, content))

    def copy_to_host_async(self, address: int, size: int, stream: Stream) -> None:
        self._within(size)
        stream.do(lambda: _put(address, ctypes.string_at(self.ptr, size)))

    def _within(self, size: int) -> None:
        assert 0 <= self._offset <= self._offset + size <= self.mem.size


def _put(address: int, content: bytes) -> None:
    ctypes.memmove(address, content, len(content))


class MemoryPool:
    """Memory of the GPU that is current. What dies is kept free for the next, until ``free_all_blocks``."""

    def __init__(self, card: Card) -> None:
        self._card, self._free = card, 0

    def malloc(self, size: int) -> MemoryPointer:
        reused = size if self._free >= size else 0
        if self._card.used + size - reused > self._card.memory:
            raise OutOfMemoryError
        self._free -= reused
        self._card.used += size - reused
        devices = [e.id for e in self._card.entered if isinstance(e, Device)]
        memory = Memory(size, devices[-1] if devices else 0)
        weakref.finalize(memory, self._release, size)
        return MemoryPointer(memory, 0)

    def _release(self, size: int) -> None:
        self._free += size

    def free_bytes(self) -> int:
        return self._free

    def free_all_blocks(self) -> None:
        self._card.used -= self._free
        self._free = 0


class PinnedMemory:
    addresses: ClassVar[weakref.WeakValueDictionary[int, PinnedMemory]] = weakref.WeakValueDictionary()

    def __init__(self, size: int) -> None:
        self.content = np.full(size, GARBAGE, np.uint8)
        self.addresses[self.content.ctypes.data] = self


class PinnedMemoryPointer(np.ndarray[Any, Any]):
    """Has a buffer, as CuPy's has."""

    def __new__(cls, memory: PinnedMemory, offset: int) -> PinnedMemoryPointer:
        made = memory.content[offset:].view(cls)
        made.memory = memory
        return made

    memory: PinnedMemory | None = None

    @property
    def ptr(self) -> int:
        return int(self.ctypes.data)


class ndarray:  # noqa: N801
    """An array on a GPU; its content is the host's to see only through copies. Without data it is new memory of the
    current allocator."""

    card: Card

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], data: MemoryPointer | None = None, contiguous: bool = True
    ) -> None:
        self.shape, self.dtype, self.size = shape, dtype, int(np.prod(shape))
        self.flags = SimpleNamespace(c_contiguous=contiguous)
        self.strides = np.empty(self.shape, dtype).strides if contiguous else None
        self.nbytes = self.size * dtype.itemsize
        self.data = self.card.allocator(self.nbytes) if data is None else data
        assert self.nbytes <= self.data.mem.size

    def host(self) -> np.ndarray[Any, Any]:
        """The memory itself, seen from the host."""
        content = (ctypes.c_byte * self.nbytes).from_address(self.data.ptr)
        return np.frombuffer(memoryview(content).cast("B"), self.dtype).reshape(self.shape)


# ---- kernels ---------------------------------------------------------------------------------------------------------
class RawModule:
    def __init__(self, card: Card, **given: Any) -> None:
        self._card, self._file = card, given["code"].split('"')[1]
        card.modules.append(given)

    def get_function(self, name: str) -> RawKernel:
        if self._card.complaint:
            raise CompileException(self._card.complaint)
        return RawKernel(name, self._card, self._file)


class RawKernel:
    """A function with 1 KB of static shared memory. launches: what its plain launch was given."""

    shared_size_bytes = 1024
    preferred_shared_memory_carveout = -1

    def __init__(self, name: str, card: Card, file: str) -> None:
        self.name, self.launches = name, list[tuple[Any, ...]]()
        self.raised = list[int]()  # what the limit of dynamic shared memory was set to
        self._card, self._file = card, file
        self.kernel = partial(self._launch)  # which can be given attributes, as CuPy's function has them

    def _launch(self, *launch: Any) -> None:
        """Queue it on the stream that is current."""
        self.launches.append(launch)
        run = self._card.launch
        if run is not None:
            self._card.current_stream.do(lambda: run(self._file, self.name, *launch))

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self.raised[-1] if self.raised else 48 * 1024 - self.shared_size_bytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        self.raised.append(size)
