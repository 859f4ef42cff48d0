"""Stand-ins for the hardware: a GPU in host memory, its memory pool, cuBLAS, the driver."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from cuplama.backends.cuda.gpu import Gpu
from cuplama.backends.numpy import NumPyBackend
from cuplama.dtypes import DTYPES
from cuplama.models.config import ModelConfig
from cuplama.ops.binding import BoundLaunch
from cuplama.ops.launch import Device
from cuplama.ops.prototypes import prototypes
from cuplama.ops.signature import OpError
from cuplama.ops.weights import named_segments, segments_of

_Captured = tuple[Callable[[], None], Callable[[], None]]  # what ``FakeGpu.do`` is given


def garbage(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """What new memory holds: NaN in every float dtype, and integers that are no index of anything."""
    size = int(np.prod(shape)) * dtype.itemsize
    return np.full(size, 0x5A if dtype.kind in "iu" else 0xFF, np.uint8).view(dtype).reshape(shape)


class Queue(list[Callable[[], None]]):
    """A stream: what is queued is done when something waits for it, in order and no sooner.

    done: how many have been done since the beginning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done = 0

    @property
    def end(self) -> int:
        """The number of what is queued next."""
        return self.done + len(self)

    def wait(self, end: int | None = None) -> None:
        """Do everything queued, or what was queued before number ``end``."""
        while self and (end is None or self.done < end):
            self.done += 1
            self.pop(0)()


class QueueEvent:
    """A point in a queue."""

    def __init__(self, queue: Queue) -> None:
        self._queue, self._end = queue, queue.end

    def synchronize(self) -> None:
        self._queue.wait(self._end)


class Launcher:
    """Stands for a compiled function; remembers its launches and runs them on the emulator if asked to."""

    def __init__(self, gpu: FakeGpu, file: str, expression: str) -> None:
        self.gpu, self.file, self.expression = gpu, file, expression

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared: int) -> None:
        work = (lambda: self._run(grid, block, args, shared)) if self.gpu.emulate else _nothing
        self.gpu.do(work, lambda: self._launched(args))

    def _launched(self, args: tuple[Any, ...]) -> None:
        self.gpu.launches.append(self.expression)
        self.gpu.seen = [id(a) for a in args]
        if self.gpu.fail:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE")

    def _run(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared: int) -> None:
        from cuplama.simt import emulator

        prototype = prototypes(self.file)[self.expression.split("<")[0]]
        g, b = (tuple(map(int, (*size, 1, 1)[:3])) for size in (grid, block))
        bound = BoundLaunch(self.file, self.expression, g, b, shared, args, prototype)  # type: ignore[arg-type]
        emulator.run(bound, check=self.gpu.checked, folder=self.gpu.folder)


class HostCublas:
    """The products that Cublas promises, on addresses in host memory. refuses: what it has no algorithm for; by_row:
    whether each row of x is multiplied alone, so that the others do not matter."""

    def __init__(self, refuses: Callable[[bool, bool], bool] = lambda bias, add: False) -> None:
        self.refuses, self.by_row = refuses, False
        self.gpu: FakeGpu | None = None

    def product(
        self, n: int, m: int, k: int, T: str, U: str, bias: bool = False, add: bool = False, width: int = 0,
        form: str = "nt",
    ) -> Any:  # fmt: skip
        gpu = self.gpu
        shapes = {"nt": ((n, k), (m, k)), "nn": ((n, k), (k, m)), "tn": ((k, n), (k, m))}[form]

        def run(x: int, w: int, y: int, b: int = 0, c: int = 0) -> None:
            if gpu is not None:
                gpu.do(lambda: multiply(x, w, y, b, c))
            else:
                multiply(x, w, y, b, c)

        def multiply(x: int, w: int, y: int, b: int, c: int) -> None:
            assert (bool(b), bool(c)) == (bias, add)
            f, g = (_at(p, s, T).astype(np.float32) for p, s in zip((x, w), shapes, strict=True))
            rows, g = f.T if form == "tn" else f, g.T if form == "nt" else g
            out = np.concatenate([row[None] @ g for row in rows]) if self.by_row else rows @ g
            for address, shape in ((b, (m,)), (c, (n, width or m))):
                if address:
                    out += _at(address, shape, U)[..., :m].astype(np.float32)
            _at(y, (n, width or m), U)[:, :m] = out

        run.text = "a product on the host"  # type: ignore[attr-defined]
        return None if self.refuses(bias, add) else run

    def scaled_product(
        self, n: int, m: int, k: int, scales: str, U: str, bias: bool = False, add: bool = False, fast: bool = False,
        width: int = 0,
    ) -> Any:  # fmt: skip
        """Those of 8-bit floats, with scales of the kinds "row" and "group"."""
        gpu, K = self.gpu, -(-k // 128)

        def spread(address: int, rows: int) -> np.ndarray[Any, Any]:
            shape = (rows, 1) if scales == "row" else (K, rows)
            found = _at(address, shape, "f32")
            return found if scales == "row" else np.repeat(found.T, 128, 1)[:, :k]

        def run(x: int, w: int, y: int, x_scale: int, w_scale: int, b: int = 0, c: int = 0) -> None:
            assert gpu is not None
            gpu.do(lambda: multiply(x, w, y, x_scale, w_scale, b, c))

        def multiply(x: int, w: int, y: int, x_scale: int, w_scale: int, b: int, c: int) -> None:
            assert (bool(b), bool(c), fast) == (bias, add, scales == "row")
            f = _at(x, (n, k), "e4m3").astype(np.float32) * spread(x_scale, n)
            out = f @ (_at(w, (m, k), "e4m3").astype(np.float32) * spread(w_scale, m)).T
            for address, shape in ((b, (m,)), (c, (n, width or m))):
                if address:
                    out += _at(address, shape, U)[..., :m].astype(np.float32)
            _at(y, (n, width or m), U)[:, :m] = out

        run.text = "a product of 8-bit floats on the host"  # type: ignore[attr-defined]
        multiple = 4 if scales == "group" else 1
        fits = k % 16 == 0 and m % 8 == 0 and n % multiple == 0 and not (bias and U == "f32")
        return run if fits and not self.refuses(bias, add) else None

    def close(self) -> None:
        pass


def _at(address: int, shape: tuple[int, ...], name: str) -> np.ndarray[Any, Any]:
    dtype = np.dtype(ml_dtypes.float8_e4m3fn) if name == "e4m3" else DTYPES[name]
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(memoryview((ctypes.c_byte * size).from_address(address)).cast("B"), dtype).reshape(shape)


class HostArray(np.ndarray[Any, Any]):
    """An array "on the GPU": host memory of another type than the arrays of the caller."""


class _Pool(str):
    """The name of a pool."""

    def free_all_blocks(self) -> None:
        pass


class FakeGpu(Gpu):
    """A GPU in host memory. Nothing is done before something waits for it, and new memory holds garbage.

    emulate: whether kernels run, on the emulator; otherwise they do nothing. checked: whether it looks at every access;
    folder: where the kernels' files are, if not in cuda_src/.
    """

    workspace = 0
    checked = False
    folder: Path | None = None

    def __init__(self, emulate: bool = False, arch: int = 90, cublas: Any = None) -> None:
        self.limits, self.name = Device(arch=arch), "a fake GPU"
        self.failures, self.array_type = (RuntimeError,), HostArray
        self.cublas, self.emulate, self.fail = cublas, emulate, False
        self.launches: list[str] = []
        self.seen: list[int] = []
        self._made: list[weakref.ref[HostArray]] = []
        self.captured: list[_Captured] | None = None
        self.captured_memory: list[HostArray] = []
        self.queue = Queue()
        self._addressed: list[Any] = []  # arrays that work in the queue knows by their addresses
        if cublas is not None:
            cublas.gpu = self
        self.stream, self.pool = None, _Pool("main pool")
        self.main_pool = self.pool
        self.pools: list[str] = []
        self.peak = self.synchronised = 0

    @property
    def is_capturing(self) -> bool:
        return self.captured is not None

    @property
    def compile_seconds(self) -> float:
        return 0.0

    def fix_sums(self) -> None:
        self.limits = replace(self.limits, deterministic=True)
        if isinstance(self.cublas, HostCublas):
            self.cublas.by_row = True

    def __enter__(self) -> FakeGpu:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def key(self, array: Any) -> tuple[Any, ...]:
        if segments_of(array) is not None:
            return tuple(array.key)
        if type(array) is not HostArray:
            raise AttributeError
        return array.shape, array.dtype, array.flags.c_contiguous

    def check(self, where: str, array: Any) -> None:
        for name, part in named_segments("", array):
            if part is not None:
                self.check(where + name, part)
        if segments_of(array) is None and type(array) is not HostArray:
            raise OpError(f"{where} is not on the GPU")

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        array = garbage(shape, np.dtype(dtype)).view(HostArray)
        self.pools.append(self.pool)
        self._made.append(weakref.ref(array))
        if self.captured is not None:
            self.captured_memory.append(array)
        self.peak = max(self.peak, sum(a.nbytes for a in self.alive))
        return array

    @property
    def alive(self) -> list[HostArray]:
        return [array for ref in self._made if (array := ref()) is not None]

    def do(self, work: Callable[[], None], at_launch: Callable[[], None] = lambda: None) -> None:
        """Queue something, or make it a part of the graph that is being captured. at_launch: called when it is queued,
        at every launch of the graph."""
        if self.captured is None:
            at_launch()
            self.queue.append(work)
        else:
            self.captured.append((work, at_launch))

    def fill(self, array: Any, byte: int) -> None:
        def set_bytes() -> None:
            array.view(np.ndarray).reshape(-1).view(np.uint8)[...] = byte

        self.do(set_bytes)

    def transpose(self, out: Any, array: Any) -> None:
        self.do(lambda: np.copyto(out, array.T))

    def write(self, array: Any, host: np.ndarray[Any, Any]) -> None:
        content = host.copy()
        self.do(lambda: np.copyto(array, content))

    def copy(self, array: Any, source: Any) -> None:
        self.do(lambda: np.copyto(array, source))

    def read(self, array: Any) -> np.ndarray[Any, Any]:
        self._wait()
        return np.array(array)

    def fetch(self, array: Any) -> np.ndarray[Any, Any]:
        host = garbage(array.shape, array.dtype)
        self.do(lambda: np.copyto(host, array))
        return host

    def stage(self, array: Any, offset: int, host: np.ndarray[Any, Any]) -> None:
        content = host.copy()
        self.do(lambda: np.copyto(array.reshape(-1)[offset : offset + content.size], content))

    def stage_pieces(self, array: Any, pieces: Sequence[tuple[int, np.ndarray[Any, Any]]]) -> None:
        for offset, data in pieces:
            self.stage(array.view(np.uint8), offset, data)

    def end_staging(self) -> None:
        self._wait()

    def synchronize(self) -> None:
        self.synchronised += 1
        self._wait()

    def _wait(self) -> None:
        self.queue.wait()
        self._addressed.clear()

    def new_pool(self) -> _Pool:
        return _Pool("pool of a graph")

    def event(self) -> Any:
        return QueueEvent(self.queue)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[np.ndarray[Any, Any], Any]:
        host = np.zeros(shape, dtype)
        return host, host.view(HostArray)

    def capture(self, body: Callable[[], None]) -> Any:
        """As on a GPU: nothing runs until the graph is launched, and then in the same memory, which stays its own."""
        self.captured, self.captured_memory, addressed = [], [], len(self._addressed)
        body()
        calls, self.captured = self.captured, None
        memory = [*self.captured_memory, *self._addressed[addressed:]]

        def launch(_: Any) -> None:
            for work, at_launch in calls:
                self.do(work, at_launch)

        return SimpleNamespace(launch=launch, memory=memory)

    def address(self, array: Any) -> int:
        self._addressed.append(array)
        return int(array.ctypes.data)

    def function(self, file: str, expression: str, shared: int, waits: bool = False) -> Callable[..., None]:
        return Launcher(self, file, expression)

    def close(self) -> None:
        pass


class LateNumPyBackend(NumPyBackend):
    """NumPy as a device that captures: what a replay writes reaches the host no sooner than something waits for it."""

    def __init__(self, dtype: str = "f32", convert: bool = True) -> None:
        super().__init__(dtype, convert)
        self.captures, self.queue = True, Queue()
        self._rings: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []

    def host_ring(self, shape: tuple[int, int]) -> tuple[np.ndarray[Any, Any], Any]:
        host = garbage(shape, DTYPES["i32"])
        self._rings.append((host, host.copy()))
        return self._rings[-1]

    def capture(self, body: Callable[[], None], sharing: object = None) -> Any:
        def replay() -> QueueEvent:
            body()
            for host, device in self._rings:
                self.queue.append(partial(np.copyto, host, device.copy()))
            return QueueEvent(self.queue)

        return SimpleNamespace(replay=replay, close=self.queue.wait)

    def download(self, array: Any) -> np.ndarray[Any, Any]:
        self.queue.wait()
        return super().download(array)

    def fetch(self, arrays: Sequence[Any]) -> Any:
        copies = super().fetch(arrays).wait()
        late = [garbage(a.shape, a.dtype) for a in copies]
        for host, copy in zip(late, copies, strict=True):
            self.queue.append(partial(np.copyto, host, copy))
        event = QueueEvent(self.queue)

        def wait() -> list[np.ndarray[Any, Any]]:
            event.synchronize()
            return late

        return SimpleNamespace(wait=wait)


class Driver:
    """A libcuda with the given answers."""

    def __init__(self, init: int = 0, version: int = 12090, count: int = 1, arch: int = 90) -> None:
        self.init, self.version, self.count, self.arch = init, version, count, arch

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.init

    def cuDriverGetVersion(self, out: Any) -> int:  # noqa: N802
        out._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:  # noqa: N802
        out._obj.value = self.count
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: int) -> int:  # noqa: N802
        out._obj.value = {75: self.arch // 10, 76: self.arch % 10}[attribute]
        return 0


_UNIT = 512


class OutOfMemoryError(Exception):
    """Stands for CuPy's."""


class Block:
    """A piece of what one cudaMalloc gave, between its neighbours."""

    def __init__(self, size: int, before: Block | None = None, after: Block | None = None) -> None:
        self.size, self.before, self.after = size, before, after


class Pool:
    def __init__(self, card: PoolGpu) -> None:
        self._card, self._free, self.total = card, list[Block](), 0
        card.pools_made.append(weakref.ref(self))

    def malloc(self, size: int) -> Block | None:
        size = -(-size // _UNIT) * _UNIT
        if not size:
            return None
        fits = [b for b in self._free if b.size >= size]
        if not fits:
            if self._card.used() + size > self._card.capacity:
                self.free_all_blocks()
            if self._card.used() + size > self._card.capacity:
                raise OutOfMemoryError
            self.total += size
            return Block(size)
        block = min(fits, key=lambda b: b.size)
        self._free.remove(block)
        if block.size > size:
            rest = Block(block.size - size, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._free.append(rest)
        return block

    def release(self, block: Block) -> None:
        if block.after in self._free:
            block = self._join(block, block.after)
        if block.before in self._free:
            block = self._join(block.before, block)
        self._free.append(block)

    def _join(self, left: Block, right: Block) -> Block:
        """One block of two neighbours, of which at most one is among the free."""
        self._free = [b for b in self._free if b is not left and b is not right]
        left.size += right.size
        left.after = right.after
        if left.after is not None:
            left.after.before = left
        return left

    def free_all_blocks(self) -> None:
        whole = [b for b in self._free if b.before is None and b.after is None]
        self._free = [b for b in self._free if b not in whole]
        self.total -= sum(b.size for b in whole)

    def free_bytes(self) -> int:
        return sum(b.size for b in self._free)


class PoolGpu(FakeGpu):
    """A card of so many bytes. Its kernels do nothing, so arrays of any size cost the test no memory."""

    def __init__(self, capacity: int = 1 << 60) -> None:
        cublas = HostCublas()
        cublas.product = lambda *_, **__: _nothing  # type: ignore[method-assign]
        self.capacity, self.pools_made = capacity, list["weakref.ref[Pool]"]()
        super().__init__(cublas=cublas)
        card = self

        class Device:
            @property
            def mem_info(self) -> tuple[int, int]:
                return card.capacity - card.used(), card.capacity

        self._device: Any = Device()
        self._cupy: Any = SimpleNamespace(
            cuda=SimpleNamespace(memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError))
        )
        self.pool: Any = Pool(self)
        self.main_pool = self.pool
        self.give_back: Callable[[], None] = lambda: None
        self._capturing = False
        self.array_type: Any = self._array

    def used(self) -> int:
        return sum(pool.total for ref in self.pools_made if (pool := ref()) is not None)

    def _array(self, shape: tuple[int, ...], dtype: np.dtype[Any], block: Block | None) -> HostArray:
        array = np.zeros(shape, dtype).view(HostArray)
        if block is not None:
            weakref.finalize(array, self.pool.release, block)
        return array

    empty, free_memory = Gpu.empty, Gpu.free_memory

    def do(self, work: Callable[[], None], at_launch: Callable[[], None] = lambda: None) -> None:
        """At once: work that waited in a queue would keep the memory that it uses."""
        if self.captured is None:
            at_launch()
            work()

    def address(self, array: Any) -> int:
        return int(array.ctypes.data)

    def new_pool(self) -> Any:
        return Pool(self)

    def capture(self, body: Callable[[], None]) -> Any:
        self._capturing, self.captured = True, []
        try:
            body()
        finally:
            self._capturing, self.captured = False, None
        return SimpleNamespace(launch=lambda stream: None)


def _nothing(*_: int, **__: int) -> None:
    pass


_nothing.text = "a product"  # type: ignore[attr-defined]


def weights_on(gpu: PoolGpu, config: ModelConfig, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Weights of zeros."""
    wide, shapes = config.wide_weights(), config.weight_shapes()
    return {name: gpu.empty(shape, DTYPES["f32"] if name in wide else dtype) for name, shape in shapes.items()}
