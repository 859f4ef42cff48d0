"""One GPU: memory, streams, copies, capture and compiled functions, on a stand-in for CuPy."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda import functions, toolkit
from cuplama.backends.cuda import gpu as module
from cuplama.backends.cuda.driver import PdlLaunch
from cuplama.backends.cuda.gpu import Gpu, parallel_copy, windows
from cuplama.backends.cuda.toolkit import source
from cuplama.dtypes import DTYPES
from cuplama.errors import CompileError, DeviceError
from cuplama.ops.launch import Device
from cuplama.ops.signature import OpError
from tests.backends.cuda.fake_cupy import GARBAGE, Card, CompileException, CUDARuntimeError, OutOfMemoryError
from tests.fakes import Driver

F32 = DTYPES["f32"]


class _Cublas:
    """Remembers what it was made with, and whether it is closed."""

    def __init__(self, *given: Any) -> None:
        self.given, self.closed = given, False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Gpu]:
    """Makes a Gpu of a card, with a driver and a cuBLAS library, or without."""

    def made(card: Card, driver: Any = None, library: Any = None, device: int = 0) -> Gpu:
        for name, content in card.modules_by_name().items():
            monkeypatch.setitem(sys.modules, name, content)
        monkeypatch.setattr(functions, "cuda_available", lambda number: (True, ""))
        monkeypatch.setattr(module, "load_driver", lambda: driver)
        monkeypatch.setattr(module, "load_cublas", lambda: library)
        monkeypatch.setattr(module, "Cublas", _Cublas)
        monkeypatch.setattr(toolkit, "toolkit_folders", lambda major: (Path(f"/cuda{major}"),))
        return Gpu(device)

    return made


@pytest.fixture
def card() -> Card:
    return Card()


@pytest.fixture
def gpu(make: Callable[..., Gpu], card: Card) -> Gpu:
    return make(card)


def _upload(gpu: Gpu, host: np.ndarray[Any, Any]) -> Any:
    array = gpu.empty(host.shape, host.dtype)
    gpu.write(array, host)
    return array


# ---- what it is ------------------------------------------------------------------------------------------------------


def test_a_gpu_knows_its_card(make: Callable[..., Gpu]) -> None:
    gpu = make(Card(arch=86, memory=80_000_000_000), device=3)
    assert gpu.limits == Device(arch=86, sms=132, shared=232448)
    assert gpu.describe() == "GPU number 3 (sm_86, 80 GB), CUDA 12.9"
    with gpu:
        assert gpu.empty((1,), F32).data.device_id == 3


def test_a_gpu_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "cuda_available", lambda number: (False, f"there is no GPU {number}"))
    with pytest.raises(DeviceError, match="CUDA cannot be used: there is no GPU 5"):
        Gpu(5)


def test_a_cupy_that_does_not_start_is_said(make: Callable[..., Gpu], card: Card) -> None:
    class Broken(Card):
        def modules_by_name(self) -> dict[str, Any]:
            def fail() -> None:
                raise RuntimeError("libnvrtc.so.12 not found")

            return super().modules_by_name() | {
                "cupy_backends.cuda.libs": SimpleNamespace(nvrtc=SimpleNamespace(getVersion=fail))
            }

    with pytest.raises(DeviceError, match=r"cupy does not start: libnvrtc.so.12 not found; run `cuplama doctor`"):
        make(Broken())


def test_inside_a_block_its_device_and_stream_are_current(gpu: Gpu, card: Card) -> None:
    assert card.entered == []
    with gpu as entered:
        assert entered is gpu
        device, stream = card.entered
        assert (device.id, stream) == (0, gpu.stream)
    assert card.entered == []


def test_cublas_gets_the_stream_and_a_workspace_of_the_gpu(make: Callable[..., Gpu], card: Card) -> None:
    library = object()
    gpu = make(card, library=library)
    assert isinstance(gpu.cublas, _Cublas)
    given, stream, workspace, size = gpu.cublas.given
    assert (given, stream, size) == (library, gpu.stream.ptr, 32 << 20)
    assert card.used == size
    assert workspace == gpu._workspace.ptr
    assert make(Card(), library=None).cublas is None


def test_with_fixed_sums_products_have_memory_for_trials(
    make: Callable[..., Gpu], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FixedCublas", _Cublas)
    gpu = make(card, library=(library := object()))
    before: Any = gpu.cublas
    before.library = library
    gpu.fix_sums()
    assert gpu.limits == Device(arch=gpu.limits.arch, deterministic=True)
    assert before.closed
    assert isinstance(gpu.cublas, _Cublas)
    given, stream, memory, room, read, write = gpu.cublas.given
    assert (given, stream, memory, room) == (library, gpu.stream.ptr, gpu._workspace.ptr, 32 << 20)
    numbers = np.arange(8, dtype=np.float32)
    with gpu:
        write(512, numbers)
        assert np.array_equal(read(512 + 8, 16).view(np.float32), numbers[2:6])
    other = make(Card(), library=None)
    other.fix_sums()
    assert (other.cublas, other.limits.deterministic) == (None, True)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_free_memory_is_that_of_the_card_and_of_the_pool(gpu: Gpu, card: Card) -> None:
    held, dropped = gpu.empty((1000,), F32), gpu.empty((500,), F32)
    assert gpu.free_memory() == card.memory - 6000
    del dropped
    assert card.used == 6000  # the pool keeps it
    assert gpu.free_memory() == card.memory - held.nbytes


def test_what_a_plan_depends_on(gpu: Gpu) -> None:
    array: Any = gpu.empty((2, 3), DTYPES["f16"])
    assert gpu.key(array) == ((2, 3), DTYPES["f16"], True, 0)
    strided = gpu.array_type((2, 3), DTYPES["f16"], array.data, contiguous=False)
    elsewhere = gpu.array_type((2, 3), DTYPES["f16"], _on_another_gpu(array))
    assert len({gpu.key(a) for a in (array, strided, elsewhere, gpu.empty((3, 2), F32))}) == 4
    with pytest.raises(AttributeError):
        gpu.key(np.zeros((2, 3), np.float16))


def _on_another_gpu(array: Any) -> Any:
    return SimpleNamespace(ptr=array.data.ptr, device_id=1, mem=array.data.mem)


def test_only_arrays_of_this_gpu_are_taken(gpu: Gpu) -> None:
    array: Any = gpu.empty((2, 3), F32)
    gpu.check("add: a", array)
    with pytest.raises(OpError, match=r"^add: a is a numpy.ndarray, not an array on the GPU$"):
        gpu.check("add: a", np.zeros((2, 3), np.float32))
    with pytest.raises(OpError, match=r"^add: a lies on GPU 1, not 0$"):
        gpu.check("add: a", gpu.array_type((2, 3), F32, _on_another_gpu(array)))


def test_what_others_keep_and_the_main_pool_are_given_back_before_memory_is_short(
    make: Callable[..., Gpu],
) -> None:
    gpu = make(Card(memory=1000))
    kept = {"cache": gpu.empty((100,), F32)}  # 400 bytes that are kept for speed only
    gpu.give_back = kept.clear
    with gpu.drawing_from(gpu.new_pool()):  # another pool cannot use what lies free in the main one
        array = gpu.empty((200,), F32)
    assert (array.shape, array.dtype, array.nbytes) == ((200,), F32, 800)
    assert not kept


def test_a_failure_for_lack_of_memory_has_the_numbers(make: Callable[..., Gpu]) -> None:
    gpu = make(Card(memory=4_000_000_000))
    gpu.main_pool._card.used = 1_000_000_000
    asked = []
    gpu.give_back = lambda: asked.append(1)
    with pytest.raises(DeviceError, match=r"5\.00 GB asked for, 3\.00 of 4\.00 GB free; a shorter --context"):
        gpu.empty((1250, 1000, 1000), F32)
    assert asked == [1]


def test_nothing_is_given_back_during_a_capture(make: Callable[..., Gpu]) -> None:
    gpu = make(Card(memory=1000))
    gpu.give_back = lambda: pytest.fail("freed during a capture")
    with pytest.raises(DeviceError, match="out of GPU memory"):
        gpu.capture(lambda: gpu.empty((300,), F32))
    freed = []
    gpu.give_back = lambda: freed.append(1)
    with pytest.raises(DeviceError):
        gpu.empty((300,), F32)  # the capture is over
    assert freed == [1]


def test_another_pool_is_drawn_from_for_a_while(gpu: Gpu) -> None:
    main, other = gpu.pool, gpu.new_pool()
    assert other is not main
    with gpu.drawing_from(other):
        assert gpu.pool is other
    assert gpu.pool is main
    with pytest.raises(KeyError), gpu.drawing_from(other):
        raise KeyError
    assert gpu.pool is main


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_arrays_travel_both_ways(gpu: Gpu, dtype: np.dtype[Any]) -> None:
    host = np.arange(12).reshape(3, 4).astype(dtype)
    array, sent = _upload(gpu, host), host.copy()
    host[...] = 0  # the caller may reuse its memory
    got = gpu.read(array)
    assert (got.dtype, got.shape) == (dtype, (3, 4))
    assert np.array_equal(got, sent)


def test_filling_is_queued_like_everything_else(gpu: Gpu, card: Card) -> None:
    array = gpu.empty((2, 5), DTYPES["i32"])
    gpu.fill(array, 0x01)
    assert (array.data.mem.content == GARBAGE).all()
    gpu.synchronize()
    assert card.waits == 1
    assert (array.data.mem.content == 1).all()


def test_an_event_is_behind_everything_queued(gpu: Gpu, card: Card) -> None:
    array = gpu.empty((4,), DTYPES["i32"])
    gpu.fill(array, 1)
    event = gpu.event()
    gpu.fill(array, 2)
    event.synchronize()
    assert (array.data.mem.content == 1).all()


def test_pinned_memory_is_zeroed_and_both_sides_see_it(gpu: Gpu, card: Card) -> None:
    host, array = gpu.pinned((3, 4), DTYPES["i32"])
    seen: Any = array
    assert (host.shape, host.dtype, seen.shape, seen.dtype) == ((3, 4), np.int32, (3, 4), np.int32)
    assert not host.any()
    assert gpu.address(array) == host.ctypes.data
    assert (seen.data.mem.size, seen.data.device_id) == (48, 0)
    address, owner = gpu.address(array), weakref.ref(seen.data.mem.owner)
    del host
    assert owner() is not None  # the array keeps the memory
    ctypes.memset(address, 7, 48)
    assert (gpu.read(array).view(np.uint8) == 7).all()


@pytest.fixture
def small_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STAGE", 100)


@pytest.mark.usefixtures("small_stage")
def test_weights_arrive_through_the_pinned_buffers(gpu: Gpu) -> None:
    """In pieces, at their place, and no buffer is overwritten before it has been sent."""
    array = gpu.empty((400,), DTYPES["f16"])
    parts = [np.arange(n).astype(np.float16) for n in (130, 270)]
    gpu.stage(array, 130, parts[1])
    gpu.stage(array, 0, parts[0])
    gpu.end_staging()
    got: Any = array.data.mem.content.view(np.float16)
    assert np.array_equal(got, np.concatenate(parts))


@pytest.mark.usefixtures("small_stage")
def test_small_pieces_share_a_pinned_buffer_and_large_ones_are_cut(gpu: Gpu, card: Card) -> None:
    array = gpu.empty((600,), np.dtype(np.uint8))
    pieces = [
        (at, np.arange(at, at + n).astype(np.uint8)) for at, n in ((16, 30), (48, 2), (64, 0), (80, 300), (400, 9))
    ]
    gpu.stage_pieces(array, pieces)
    gpu.end_staging()
    content: Any = array.data.mem.content
    for at, data in pieces:
        assert np.array_equal(content[at : at + data.size], data)
    assert (content[:16] == GARBAGE).all()
    assert (content[409:] == GARBAGE).all()


@pytest.mark.parametrize("limit", [7, 64, 1000])
def test_windows_hold_every_piece_in_runs_of_a_limited_size(limit: int) -> None:
    pieces = [(at, np.full(n, at, np.uint8)) for at, n in ((3, 5), (8, 1), (60, 0), (70, 130), (201, 2))]
    found = np.zeros(256, np.uint8)
    ends = [0]
    for start, size, inside in windows(pieces, limit):
        assert size <= limit
        assert start >= ends[-1]
        assert max(at + data.size for at, data in inside) == size
        for at, data in inside:
            found[start + at : start + at + data.size] += data
        ends.append(start + size)
    want = np.zeros(256, np.uint8)
    for at, data in pieces:
        want[at : at + data.size] = data
    assert np.array_equal(found, want)
    assert len(ends) == 1 + {7: 20, 64: 4, 1000: 1}[limit]


@pytest.mark.usefixtures("small_stage")
def test_the_pinned_buffers_are_given_back_when_loading_ends(gpu: Gpu, card: Card) -> None:
    gpu.end_staging()  # there is nothing yet
    assert card.waits == 0
    gpu.stage(gpu.empty((40,), F32), 0, np.zeros(40, np.float32))
    stage = gpu._stage
    assert stage is not None
    buffers = [weakref.ref(pointer.memory) for pointer, _, _ in (next(stage._ring) for _ in range(2))]
    assert sorted(b().content.size for b in buffers) == [100, 100]  # type: ignore[union-attr]
    threads = stage._threads
    gpu.end_staging()
    assert card.waits == 1
    del stage
    gc.collect()
    assert [b() for b in buffers] == [None, None]
    with pytest.raises(RuntimeError, match="shutdown"):
        threads.submit(int)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, (5 << 20) + 3])
def test_parallel_copy_copies_everything(size: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    target = np.zeros_like(data)
    with ThreadPoolExecutor(3) as pool:
        parallel_copy(pool, 3, [(target, data)])
    assert np.array_equal(target, data)


@pytest.mark.parametrize(("megabytes", "threads", "pieces"), [(1, 4, 1), (8, 4, 4), (8, 3, 3), (3, 8, 3)])
def test_a_copy_is_divided_among_the_threads(megabytes: int, threads: int, pieces: int) -> None:
    """No piece is smaller than 1 MB: it would take less time than handing it to a thread."""
    data, given = np.ones(megabytes << 20, np.uint8), []

    class Pool:
        def map(self, work: Callable[[int], Any], cuts: Any) -> list[Any]:
            given.extend(cuts)
            return [work(at) for at in cuts]

    target = np.zeros_like(data)
    parallel_copy(Pool(), threads, [(target, data)])  # type: ignore[arg-type]
    assert len(given) == pieces
    assert target.all()


# ---- capture ---------------------------------------------------------------------------------------------------------


def test_a_captured_body_runs_when_its_graph_is_launched(gpu: Gpu) -> None:
    array = gpu.empty((4,), DTYPES["i32"])
    gpu.fill(array, 1)
    graph = gpu.capture(lambda: gpu.fill(array, 2))
    assert (gpu.read(array).view(np.uint8) == 1).all()
    graph.launch(gpu.stream)
    assert (gpu.read(array).view(np.uint8) == 2).all()


def test_no_object_is_collected_during_a_capture(gpu: Gpu) -> None:
    collecting: list[bool] = []

    def fail() -> None:
        collecting.append(gc.isenabled())
        raise KeyError

    assert gc.isenabled()
    gpu.capture(lambda: collecting.append(gc.isenabled()))
    with pytest.raises(KeyError):
        gpu.capture(fail)
    assert collecting == [False, False]
    assert gc.isenabled()
    assert gpu.stream.captured is None
    gc.disable()
    try:
        gpu.capture(lambda: None)
        assert not gc.isenabled()  # as it was before
    finally:
        gc.enable()


# ---- compiled functions ----------------------------------------------------------------------------------------------


def _raw(gpu: Gpu, name: str = "add") -> Any:
    return gpu.functions._kernels["residual.cu", name, ""]


def test_a_function_is_compiled_once_for_the_card(gpu: Gpu, card: Card) -> None:
    assert gpu.compile_seconds == 0
    function = gpu.function("residual.cu", "add", 0)
    took = gpu.compile_seconds
    assert 0 < took < 60
    assert gpu.function("residual.cu", "add", 0) is function
    assert gpu.compile_seconds == took
    (given,) = card.modules
    assert given == {
        "code": source("residual.cu"), "options": toolkit.options(12, 90), "name_expressions": ("add",)
    }  # fmt: skip
    assert "-arch=sm_90a" in given["options"]
    gpu.function("residual.cu", "add<f16>", 0)
    assert [m["name_expressions"] for m in card.modules] == [("add",), ("add<f16>",)]
    function((7,), (32,), (), 0)
    assert _raw(gpu).launches == [((7,), (32,), (), 0)]


def test_every_function_divides_cache_and_shared_memory_alike(gpu: Gpu) -> None:
    gpu.function("residual.cu", "add", 0)
    assert _raw(gpu).preferred_shared_memory_carveout == 100


def test_the_limit_of_shared_memory_is_raised_once_where_48_kb_are_not_enough(gpu: Gpu) -> None:
    gpu.function("residual.cu", "add", 47 * 1024)  # the kernel's own array takes another KB
    assert _raw(gpu).raised == []
    gpu.function("residual.cu", "add", 47 * 1024 + 512)
    gpu.function("residual.cu", "add", 60 * 1024)
    gpu.function("residual.cu", "add", 60 * 1024)
    gpu.function("residual.cu", "add", 50 * 1024)  # never lowered: another plan may need it
    assert _raw(gpu).raised == [47 * 1024 + 512, 60 * 1024]


@pytest.mark.parametrize(
    ("arch", "version", "waits", "early"),
    [
        (90, 12030, True, True),
        (100, 13000, True, True),
        (90, 12030, None, False),
        (89, 12030, True, False),
        (90, 12020, True, False),
        (90, None, True, False),
    ],
)
def test_a_kernel_that_waits_is_launched_early_where_card_and_driver_can(
    make: Callable[..., Gpu], arch: int, version: int | None, waits: bool | None, early: bool
) -> None:
    gpu = make(Card(arch), driver=None if version is None else Driver(version=version))
    function = gpu.function("residual.cu", "add", 0, *([] if waits is None else [waits]))
    assert isinstance(function, PdlLaunch) == early
    if not early:
        assert function is _raw(gpu).kernel


def test_an_early_launch_goes_to_the_stream_of_the_gpu(make: Callable[..., Gpu], card: Card) -> None:
    launched: list[tuple[int, int]] = []

    class Launches(Driver):
        def cuLaunchKernelEx(self, config: Any, function: Any, arguments: Any, extra: Any) -> int:  # noqa: N802
            launched.append((config._obj.stream, function.value))
            return 0

    gpu = make(card, driver=Launches())
    function = gpu.function("residual.cu", "add", 0, True)
    _raw(gpu).kernel.ptr = 0x777
    function((1, 1, 1), (32, 1, 1), (), 0)
    assert launched == [(gpu.stream.ptr, 0x777)]
    assert _raw(gpu).launches == []


def test_a_compile_error_names_file_line_and_architecture(gpu: Gpu, card: Card) -> None:
    card.complaint = 'residual.cu(12): error: identifier "blockidx" is undefined\n\n1 error detected'
    with pytest.raises(
        CompileError, match=r'cuda_src/residual.cu:12: identifier "blockidx" is undefined .* for sm_90'
    ) as caught:
        gpu.function("residual.cu", "add", 0)
    assert not isinstance(caught.value, CompileException)
    card.complaint = ""
    gpu.function("residual.cu", "add", 0)  # what failed is not kept


# ---- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_stage")
def test_close_gives_everything_back_and_may_be_repeated(make: Callable[..., Gpu], card: Card) -> None:
    gpu = make(card, library=object())
    cublas: Any = gpu.cublas
    gpu.function("residual.cu", "add", 0)
    cache = gpu.empty((8,), F32)
    gpu.give_back = lambda kept=cache: None  # type: ignore[misc]
    raw = weakref.ref(_raw(gpu))
    gpu.stage(cache, 0, np.zeros(8, np.float32))
    del cache
    gpu.fill(gpu.empty((8,), F32), 0)
    gpu.close()
    gc.collect()
    assert (cublas.closed, gpu.cublas, gpu._stage, raw()) == (True, None, None, None)
    assert card.used == 0
    assert card.waits >= 1
    assert card.entered == []
    gpu.close()
    assert card.entered == []


def test_close_waits_for_what_is_queued(gpu: Gpu, card: Card) -> None:
    array = gpu.empty((4,), DTYPES["i32"])
    gpu.fill(array, 1)
    gpu.close()
    assert not gpu.stream.queue
    assert (array.data.mem.content == 1).all()


def test_close_bears_a_gpu_that_refuses_everything(gpu: Gpu, card: Card) -> None:
    card.broken = True
    with pytest.raises(CUDARuntimeError):
        gpu.synchronize()
    gpu.close()
    assert card.entered == []


def test_a_failure_of_cuda_is_one_of_the_failures(gpu: Gpu) -> None:
    assert CUDARuntimeError in gpu.failures
    assert OutOfMemoryError not in gpu.failures


def test_a_stage_has_no_more_threads_than_the_machine_has_cores() -> None:
    assert 1 <= module._Stage._THREADS <= (os.cpu_count() or 1)
