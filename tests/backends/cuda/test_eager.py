"""Ops on a user's CuPy arrays, on a stand-in for CuPy whose kernels run on the emulator."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuplama import ops
from cuplama.backends.cuda import eager, functions, planning, toolkit
from cuplama.backends.cuda.driver import cuda_available
from cuplama.dtypes import DTYPES, dtype_name
from cuplama.errors import CuplamaError, DeviceError
from cuplama.lab.check import check
from cuplama.lab.workloads import case_workload
from cuplama.ops.binding import BoundLaunch
from cuplama.ops.launch import Device as LaunchDevice
from cuplama.ops.op import Call, Op
from cuplama.ops.prototypes import prototypes
from cuplama.ops.signature import OpError
from tests.backends.cuda.fake_cupy import Card, CUDARuntimeError, Device, MemoryPool, Stream, ndarray
from tests.fakes import HostCublas
from tests.ops import harness
from tests.speeds import fast_cases

F32, F16 = DTYPES["f32"], DTYPES["f16"]


def emulate(file: str, expression: str, grid: Any, block: Any, args: tuple[Any, ...], shared: int) -> None:
    """What a launch does: the kernel runs on the emulator."""
    from cuplama.simt import emulator

    host = tuple(a.host() if isinstance(a, ndarray) else a for a in args)
    prototype = prototypes(file)[expression.split("<")[0]]
    emulator.run(BoundLaunch(file, expression, grid, block, shared, host, prototype), check=False)


class _Library(HostCublas):
    """Products on the host, at once. calls: the workspace and the stream of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []

    def product(self, *sizes: Any, **kinds: Any) -> Any:
        multiply = super().product(*sizes, **kinds)

        def run(workspace: int, stream: int, **addresses: int) -> None:
            self.calls.append((workspace, stream))
            multiply(**addresses)

        run.text = multiply.text  # type: ignore[attr-defined]
        return run


@pytest.fixture
def card() -> Card:
    return Card()


@pytest.fixture
def library() -> _Library:
    return _Library()


@pytest.fixture
def cupy(card: Card, library: _Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """CuPy, as a program that imports it has it."""
    modules = card.modules_by_name()
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, content)
    monkeypatch.setattr(functions, "cuda_available", lambda number: (True, ""))
    monkeypatch.setattr(toolkit, "toolkit_folders", lambda major: (Path("/cuda"),))
    monkeypatch.setattr(eager, "load_cublas", lambda: object())
    monkeypatch.setattr(eager, "Cublas", lambda *_: library)
    eager._executor.cache_clear()
    if shutil.which("g++") is not None:
        card.launch = emulate
    yield modules["cupy"]
    eager._executor.cache_clear()


@pytest.fixture
def put(cupy: Any, card: Card) -> Callable[..., Any]:
    """Makes an array on the GPU that is current."""

    def made(host: np.ndarray[Any, Any] | None) -> Any:
        if host is None:
            return None
        array = cupy.ndarray(host.shape, host.dtype)
        np.copyto(array.host(), host)
        return array

    return made


def _rows(put: Callable[..., Any], n: int = 2, d: int = 8, T: Any = F16) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return put(rng.standard_normal((n, d)).astype(np.float32)), put(rng.standard_normal(d).astype(T))


def _launches() -> list[tuple[Any, ...]]:
    return [launch for raw in eager._executor()._cards[0].functions._kernels.values() for launch in raw.launches]


def _watched(card: Card, allocator: Callable[[int], Any]) -> list[int]:
    """Make an allocator the current one; the list gets the bytes of everything that is asked for."""
    asked: list[int] = []

    def watched(size: int) -> Any:
        asked.append(size)
        return allocator(size)

    card.allocator = watched
    return asked


needs_emulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


def _plain(cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those with a user's arrays alone: a quantised weight is none, and CuPy has no 8-bit floats."""
    return [case for case in cases if not case.get("W") and case.get("C", "T") == "T"]


def _smallest(op: Op) -> list[Mapping[str, Any]]:
    """Those that together launch every kernel: the tests of ops compile their instances as well."""
    cases = _plain(harness.cases(op))
    return [cases[i] for i in sorted(fast_cases([(op, case, "f16") for case in cases]))]


def _ends(op: Op) -> list[Mapping[str, Any]]:
    """The first and the last of the op's own."""
    cases = _plain(op.cases)
    return [cases[0], cases[-1]]


# Products with a norm or an activation, each of which takes a second to compile for the emulator.
_FUSED = {name for name in ops.OPS if "_linear_" in name}


# ---- results ---------------------------------------------------------------------------------------------------------
@needs_emulator
@pytest.mark.parametrize("chosen", [_smallest, pytest.param(_ends, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in _FUSED)) for n in ops.OPS])
def test_every_op_called_on_cupy_arrays_is_right(
    name: str, chosen: Callable[[Op], list[Mapping[str, Any]]], put: Callable[..., Any], card: Card, library: _Library
) -> None:
    op = ops.OPS[name]
    for case in chosen(op):
        workload = case_workload(op, case, "f16")
        arrays = workload.arrays()
        ins = [put(a) for a in arrays]
        found = op(*ins, **workload.attrs)
        card.default_stream.queue.wait()
        outs = found if isinstance(found, tuple) else (found,)
        check(workload, arrays, [o.host().copy() for o in outs])
        for spec, out in zip(op.signature.outs, outs, strict=True):
            given = [a for s, a in zip(op.signature.ins, ins, strict=True) if s.name == spec.name]
            assert (given == [out]) == (spec.name in op.signature.in_place)


@needs_emulator
def test_arguments_may_be_named_and_the_dtype_of_the_result_chosen(put: Callable[..., Any], card: Card) -> None:
    x, w = put(np.ones((2, 8), F16)), put(np.ones((3, 8), F16))
    default, wide = ops.linear(x, w=w), ops.linear(w=w, x=x, U=np.float32)
    assert [dtype_name(a.dtype) for a in (default, wide)] == ["f16", "f32"]
    card.default_stream.queue.wait()
    assert (default.host() == 8).all()
    assert (wide.host() == 8).all()


@needs_emulator
def test_a_view_that_begins_anywhere_is_multiplied_by_the_kernels(
    cupy: Any, put: Callable[..., Any], card: Card, library: _Library
) -> None:
    whole, w = put(np.ones(9 * 8 + 1, np.float32)), put(np.ones((3, 8), np.float32))
    view = cupy.ndarray((9, 8), F32, whole.data + 4)
    y = ops.linear(view, w)
    assert library.calls == []
    ops.linear(put(np.ones((9, 8), np.float32)), w)
    assert len(library.calls) == 1
    card.default_stream.queue.wait()
    assert (y.host() == 8).all()


# ---- whose stream, device and memory ---------------------------------------------------------------------------------
def test_work_goes_to_the_current_stream(put: Callable[..., Any], card: Card) -> None:
    x, w = _rows(put)
    mine = Stream(card, non_blocking=True, ptr=0x77)
    card.launch = lambda *_: None
    with mine:
        ops.rms_norm(x, w, eps=1e-5)
    assert (len(mine.queue), len(card.default_stream.queue)) == (1, 0)
    ops.rms_norm(x, w, eps=1e-5)  # the same plan
    assert (len(mine.queue), len(card.default_stream.queue)) == (1, 1)


def test_an_array_of_a_class_derived_from_cupys_is_one(cupy: Any, put: Callable[..., Any], card: Card) -> None:
    x, w = _rows(put)
    mine = type("Mine", (cupy.ndarray,), {"__module__": "mine"})
    y = ops.rms_norm(mine(x.shape, x.dtype, x.data), w, eps=1e-5)
    assert type(y) is cupy.ndarray


def test_nothing_waits(put: Callable[..., Any], card: Card) -> None:
    x, w = _rows(put)
    for _ in range(2):
        ops.rms_norm(x, w, eps=1e-5)
    ops.linear(put(np.ones((9, 8), F16)), put(np.ones((3, 8), F16)))
    assert card.waits == 0


def test_memory_comes_from_the_current_allocator(put: Callable[..., Any], card: Card) -> None:
    x, w = _rows(put)
    asked = _watched(card, MemoryPool(card).malloc)
    y = ops.rms_norm(x, w, eps=1e-5)
    assert asked == [y.nbytes]
    ops.rms_norm(x, w, eps=1e-5)
    assert asked == [y.nbytes] * 2


def test_each_gpu_has_kernels_of_its_own_and_arrays_must_lie_on_the_current_one(
    put: Callable[..., Any], card: Card
) -> None:
    x, w = _rows(put)
    ops.rms_norm(x, w, eps=1e-5)
    second = Device(card, 1)
    with second:
        with pytest.raises(OpError, match=r"^rms_norm: x lies on GPU 0, and GPU 1 is current; .*Device\(0\)"):
            ops.rms_norm(x, w, eps=1e-5)
        y = ops.rms_norm(*_rows(put), eps=1e-5)
    assert y.data.device_id == 1
    assert len(card.modules) == 2


def test_products_use_scratch_of_the_call_and_the_current_stream(
    put: Callable[..., Any], card: Card, library: _Library
) -> None:
    x, w = put(np.ones((9, 8), F16)), put(np.ones((3, 8), F16))
    used, mine = _watched(card, card.allocator), Stream(card, non_blocking=True, ptr=0x77)
    for stream in (nullcontext(), mine):
        with stream:
            ops.linear(x, w)
    assert used == [9 * 3 * 2, 32 << 20] * 2
    assert [stream for _, stream in library.calls] == [0, 0x77]
    assert all(workspace for workspace, _ in library.calls)


def test_a_product_waits_for_cublas_until_one_has_many_rows(
    put: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "load_cublas", lambda: pytest.fail("loaded for nothing"))
    ops.rms_norm(*_rows(put, n=100), eps=1e-5)


# ---- in the user's own graph -----------------------------------------------------------------------------------------
@needs_emulator
def test_a_call_becomes_part_of_a_graph_that_the_user_captures(put: Callable[..., Any], card: Card) -> None:
    x, w = _rows(put)
    mine = Stream(card, non_blocking=True)
    with mine:
        mine.begin_capture()
        y = ops.rms_norm(x, w, eps=1e-5)
        graph = mine.end_capture()
    assert not mine.queue
    x.host()[...] *= 3
    graph.launch(mine)
    mine.queue.wait()
    expected = ops.rms_norm(x.host().copy(), w.host().copy(), eps=1e-5)
    np.testing.assert_allclose(y.host().astype(np.float32), expected.astype(np.float32), rtol=2e-3)


def _zeroing_op() -> tuple[Op, dict[str, Any]]:
    """An op whose plan has scratch that holds zeros at first, and what a case of it takes."""
    op = ops.OPS["attention"]
    for case in _plain(op.cases):
        workload = case_workload(op, case, "f32")
        assert op.kernels is not None
        if op.kernels(workload.call, LaunchDevice()).zeroed:
            return op, dict(case)
    raise AssertionError("no case of attention has zeroed scratch")


@needs_emulator
def test_scratch_of_a_captured_call_stays_and_other_scratch_goes(put: Callable[..., Any], card: Card) -> None:
    op, case = _zeroing_op()
    workload = case_workload(op, case, "f32")
    arrays = workload.arrays()
    ins = [put(a) for a in arrays]
    executor = eager._executor()
    op(*ins, **workload.attrs)
    assert executor._captured == {}
    card.default_stream.queue.wait()
    mine = Stream(card, non_blocking=True)
    graphs = []
    with mine:
        for _ in range(2):
            mine.begin_capture()
            y = op(*ins, **workload.attrs)
            graphs.append((mine.end_capture(), y))
    kept = list(executor._captured.values())
    assert kept
    for scratch in kept:
        scratch.host().view(np.uint8)[...] = (
            0xFF  # as if the first graph had been cut short: a replay begins with zeros
        )
    for graph, y in graphs:
        graph.launch(mine)
        mine.queue.wait()
        check(workload, arrays, [y.host().copy()])
    assert list(executor._captured.values()) == kept  # both graphs were captured on one stream


# ---- refusals --------------------------------------------------------------------------------------------------------
class _Torch:
    """What is no CuPy array and could become one."""

    __module__ = "torch"

    def __dlpack__(self) -> None: ...


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cp, x, w: (x.host(), w), r"w is a cupy.ndarray, not a CuPy or NumPy array; arrays of both kinds"),
        (lambda cp, x, w: (x, w.host()), r"w is a numpy.ndarray, not a CuPy array; arrays of both kinds do not mix$"),
        (lambda cp, x, w: (_Torch(), w), r"x is a torch._Torch, .*; cupy.from_dlpack makes one of it without a copy$"),
        (lambda cp, x, w: (x, _Torch()), r"w is a torch._Torch, not a CuPy .*cupy.from_dlpack"),
        (lambda cp, x, w: (x, [1.0]), r"w is a list, not a CuPy or NumPy array$"),
        (lambda cp, x, w: (x, None), r"input w is missing"),
        (lambda cp, x, w: (None, None), r"input x is missing$"),
        (lambda cp, x, w: (cp.ndarray((2, 8), F16), w), r"x\[n,d\] is float16, not float32; the op is y\[n,d\]:T = "),
        (lambda cp, x, w: (x, cp.ndarray((8,), np.dtype(int))), r"T is int64; it may be f32, f16, bf16"),
        (lambda cp, x, w: (x, cp.ndarray((7,), F16)), r"w has 7 where d is 8"),
        (lambda cp, x, w: (cp.ndarray((8,), F32), w), r"x\[n,d\] has shape \(8,\)"),
        (lambda cp, x, w: (cp.ndarray((2, 8), F32, contiguous=False), w), r"x\[n,d\] is not contiguous"),
        (lambda cp, x, w: (cp.ndarray((0, 8), F32), w), r"x has no elements: its shape is \(0, 8\)"),
        (lambda cp, x, w: (x, w, w), r"^rms_norm takes 2 arrays, not 3: rms_norm\(x, w, \*, eps, offset=0\.0\)$"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    change: Callable[..., Any], message: str, cupy: Any, put: Callable[..., Any]
) -> None:
    x, w = _rows(put)
    for _ in range(2):  # a refusal is not a plan
        with pytest.raises(OpError, match=message) as caught:
            ops.rms_norm(*change(cupy, x, w), eps=1e-5)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, CuplamaError)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, r"^rms_norm: attribute eps is missing: rms_norm\(x, w, \*, eps, offset=0\.0\)$"),
        ({"eps": "small"}, r"^rms_norm: eps is 'small', not a number; "),
        ({"eps": [1]}, r"^rms_norm: eps is \[1\], not a number; "),
        ({"eps": 1, "epsilon": 1}, r"^rms_norm has no argument 'epsilon': rms_norm\(x, w, \*, eps, offset=0\.0\)$"),
        ({"eps": 1, "x": 1}, r"^rms_norm: x is given twice"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(
    attributes: dict[str, Any], message: str, put: Callable[..., Any]
) -> None:
    with pytest.raises(OpError, match=message):
        ops.rms_norm(*_rows(put), **attributes)


def test_sizes_that_a_kernel_cannot_take_are_refused(cupy: Any, put: Callable[..., Any]) -> None:
    x, tables = put(np.ones((1, 24), F16)), [put(np.ones((1, 5), np.float32)) for _ in range(2)]
    rows = put(np.zeros(1, np.int32))
    with pytest.raises(OpError, match=r"^rope needs 2 \* h <= D, not D=8, h=5"):
        ops.rope(x, rows, *tables, num_heads=1, num_kv_heads=1, D=8)
    with pytest.raises(OpError, match=r"^rope: D is 8.5, not a whole number"):
        ops.rope(x, rows, *tables, num_heads=1, num_kv_heads=1, D=8.5)


def test_a_rotation_that_a_head_has_no_room_for_is_refused(cupy: Any, put: Callable[..., Any]) -> None:
    op = ops.append_attention
    workload = case_workload(op, next(c for c in op.cases if c["cos"]), "f16")
    arrays = {s.name: put(a) for s, a in zip(op.signature.ins, workload.arrays(), strict=True)}
    wide = put(np.ones((11, workload.call["D"]), np.float32))
    with pytest.raises(OpError, match=r"^append_attention: \d+ pairs are rotated, and a head of \d+ has \d+$"):
        op(**arrays | {"cos": wide, "sin": wide}, **workload.attrs)


def test_a_view_is_refused_where_the_kernels_need_aligned_rows(cupy: Any, put: Callable[..., Any]) -> None:
    logits = cupy.ndarray((1, 16), F32, put(np.ones(20, np.float32)).data + 4)
    with pytest.raises(
        OpError, match=r"^logprobs: logits does not begin at a multiple of 16 bytes; logits\.copy\(\) does"
    ):
        ops.logprobs(logits, put(np.zeros(1, np.int32)), N=2)


def test_bf16_is_refused_where_the_gpu_has_none(card: Card, put: Callable[..., Any]) -> None:
    card.arch = 75
    x, w = _rows(put, T=DTYPES["bf16"])
    with pytest.raises(OpError, match=r"^rms_norm: GPU number 0 \(sm_75\) has no bf16"):
        ops.rms_norm(x, w, eps=1e-5)


def test_a_launch_that_fails_names_the_kernel(put: Callable[..., Any]) -> None:
    x, w = _rows(put)
    ops.rms_norm(x, w, eps=1e-5)

    def fail(*_: Any) -> None:
        raise CUDARuntimeError("cudaErrorInvalidValue")

    (planned,) = eager._executor()._plans.values()
    planned.actions[0].function = fail  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match=r"^norm\.cu: rms_norm<f16, 1> grid=\(2, 1, 1\).*cudaErrorInvalidValue$"):
        ops.rms_norm(x, w, eps=1e-5)


# ---- plans -----------------------------------------------------------------------------------------------------------
def test_a_plan_is_made_once_for_shapes_dtypes_and_attributes(
    put: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(call: Call, *given: Any, **named: Any) -> Any:
        made.append(call.op.name)
        return planning.make_plan(call, *given, **named)

    monkeypatch.setattr(eager, "make_plan", counted)
    for _ in range(3):
        ops.rms_norm(*_rows(put), eps=1e-5)
    assert len(made) == 1
    ops.rms_norm(*_rows(put, n=3), eps=1e-5)
    ops.rms_norm(*_rows(put, T=F32), eps=1e-5)
    ops.rms_norm(*_rows(put), eps=1e-6)
    assert len(made) == 4


def test_plans_do_not_grow_without_end(put: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_MAX_PLANS", 3)
    for n in range(1, 9):
        ops.rms_norm(*_rows(put, n=n), eps=1e-5)
        assert len(eager._executor()._plans) <= 3


def test_kernels_are_launched_one_behind_the_other(put: Callable[..., Any]) -> None:
    """Never early (PDL): what is ahead on a user's stream need not be ours."""
    ops.rms_norm(*_rows(put), eps=1e-5)
    ((grid, block, _, shared),) = _launches()
    assert (grid, block, shared) == ((2, 1, 1), (32, 1, 1), 0)


# ---- on a GPU --------------------------------------------------------------------------------------------------------
@pytest.fixture
def real() -> Iterator[Any]:
    """The true CuPy, where there is a GPU."""
    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")
    import cupy

    yield cupy
    cupy.cuda.get_current_stream().synchronize()


def _on_gpu(real: Any, host: np.ndarray[Any, Any] | None) -> Any:
    """A CuPy array of any dtype, bf16 included."""
    if host is None:
        return None
    array = real.ndarray(host.shape, host.dtype)
    array.set(np.ascontiguousarray(host))
    return array


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", list(ops.OPS))
def test_every_op_on_a_gpu(real: Any, name: str, dtype: str) -> None:
    """First case and last, each checked by the judge; what is updated in place is the array that was given."""
    op = ops.OPS[name]
    for case in _ends(op):
        workload = case_workload(op, case, dtype)
        arrays = workload.arrays()
        for _ in range(2):  # once to plan, once as planned; a second update in place would not be the reference's
            given = [_on_gpu(real, a) for a in arrays]
            found = op(*given, **workload.attrs)
            outs = found if isinstance(found, tuple) else (found,)
            assert all(type(o) is real.ndarray for o in outs)
            check(workload, arrays, [o.get() for o in outs])
            for spec, out in zip(op.signature.outs, outs, strict=True):
                same = [a is out for s, a in zip(op.signature.ins, given, strict=True) if s.name == spec.name]
                assert any(same) == (spec.name in op.signature.in_place)


@pytest.mark.gpu
def test_products_of_many_rows_on_a_gpu(real: Any) -> None:
    """By cuBLAS, with scratch of the call; on two streams, which must not share it."""
    rng = np.random.default_rng(0)
    host = [rng.standard_normal(s).astype(np.float16) for s in ((512, 1024), (768, 1024), (768,))]
    x, w, b = map(real.asarray, host)
    wanted = host[0].astype(np.float64) @ host[1].astype(np.float64).T + host[2].astype(np.float64)
    real.cuda.Device().synchronize()
    streams = [real.cuda.Stream(non_blocking=True) for _ in range(2)]
    found = []
    for _ in range(4):
        for stream in streams:
            with stream:
                found.append(ops.linear(x, w, b, U="f32"))
    real.cuda.Device().synchronize()
    for y in found:
        assert np.linalg.norm(real.asnumpy(y) - wanted) <= 2e-3 * np.linalg.norm(wanted)


@pytest.mark.gpu
def test_the_current_stream_is_used_on_a_gpu(real: Any) -> None:
    """The result of a call is seen by what the same stream does next, and the call returns before the GPU is done."""
    x, w = real.ones((1 << 12, 1 << 12), np.float32), real.ones(1 << 12, np.float16)
    real.cuda.Device().synchronize()
    stream = real.cuda.Stream(non_blocking=True)
    with stream:
        ops.rms_norm(x, w, eps=0.0)
        stream.synchronize()
        for _ in range(300):
            y = ops.rms_norm(x, w, eps=0.0)
        assert not stream.done  # the queue is here, and nothing has waited for it
        total = y.astype(np.float32).sum()
    stream.synchronize()
    assert float(total) == float(1 << 24)


@pytest.mark.gpu
def test_the_current_allocator_is_used_on_a_gpu(real: Any) -> None:
    x, w = real.ones((64, 4096), np.float32), real.ones(4096, np.float16)
    ops.rms_norm(x, w, eps=1e-5)
    pool = real.cuda.MemoryPool()
    with real.cuda.using_allocator(pool.malloc):
        y = ops.rms_norm(x, w, eps=1e-5)
        assert pool.used_bytes() >= y.nbytes
        del y
        assert pool.used_bytes() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("fresh", [True, False])
def test_a_users_graph_on_a_gpu(real: Any, fresh: bool) -> None:
    """Kernels, a product of cuBLAS and an op with scratch, captured and replayed on other input.

    fresh: nothing has been planned before the capture.
    """
    if fresh:
        eager._executor.cache_clear()
    rng = np.random.default_rng(1)

    def put(*shape: int) -> Any:
        return real.asarray(rng.standard_normal(shape).astype(np.float16))

    residual, w, norm = real.asarray(rng.standard_normal((16, 256), np.float32)), put(512, 256), put(256)
    logits = real.asarray(rng.standard_normal((2, 50000), np.float32))
    drawn = [real.asarray(a) for a in (np.ones(2, np.float32), np.zeros(2, np.int32), np.ones(2, np.float32))]
    rest = [real.zeros(2, np.float32), real.arange(2, dtype=np.uint64), real.zeros(2, np.int32)]

    def body() -> tuple[Any, Any]:
        hidden = ops.silu_mul(ops.linear(ops.rms_norm(residual, norm, eps=1e-5), w))
        return hidden, ops.sample(logits, *drawn, *rest)

    if not fresh:
        body()
    real.cuda.Device().synchronize()
    pool = real.cuda.MemoryPool()
    stream = real.cuda.Stream(non_blocking=True)
    with stream, real.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        captured = body()
        graph = stream.end_capture()
        for _ in range(3):
            residual *= real.float32(1.5)
            logits[:] = logits[:, ::-1].copy()
            graph.launch(stream)
            seen = [real.asnumpy(a) for a in captured]
            plain = [real.asnumpy(a) for a in body()]
            assert np.array_equal(seen[0].view(np.uint16), plain[0].view(np.uint16))
            assert np.array_equal(seen[1], plain[1])


@pytest.mark.gpu
def test_a_second_gpu(real: Any) -> None:
    if real.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    x, w = real.ones((2, 64), np.float32), real.ones(64, np.float16)
    with real.cuda.Device(1):
        with pytest.raises(OpError, match="x lies on GPU 0, and GPU 1 is current"):
            ops.rms_norm(x, w, eps=1e-5)
        y = ops.rms_norm(real.ones((2, 64), np.float32), real.ones(64, np.float16), eps=0.0)
        assert y.device.id == 1
        assert (real.asnumpy(y) == 1).all()


@pytest.mark.gpu
def test_views_that_begin_anywhere_on_a_gpu(real: Any) -> None:
    whole, w = real.ones(9 * 64 + 1, np.float32), real.ones((32, 64), np.float32)
    y = ops.linear(whole[1:].reshape(9, 64), w)
    assert (real.asnumpy(y) == 64).all()


@pytest.mark.gpu
def test_a_planned_call_costs_the_host_little(real: Any) -> None:
    """Bounds with room: a launch of CuPy's own costs 4 to 5 us, and a call should cost less than 20. Of many calls the
    fastest tenth: the others may have waited for tests beside this one."""
    from cupyx.profiler import benchmark

    x, w = real.ones((1, 2048), np.float32), real.ones(2048, np.float16)
    found = benchmark(ops.rms_norm, (x, w), {"eps": 1e-5}, n_repeat=2000)
    assert found.name == "rms_norm"
    assert np.percentile(found.cpu_times, 10) < 40e-6


@pytest.mark.gpu
def test_an_op_from_outside_on_a_gpu(real: Any, tmp_path: Path) -> None:
    """Loaded, called, changed, and called again: header and source are compiled anew."""
    (tmp_path / "twice.cuh").write_text("#define FACTOR 2.0f\n")
    (tmp_path / "twice.cu").write_text(
        '#include "twice.cuh"\n__global__ void twice(const float* x, float* y, int n) {\n'
        "  const int i = blockIdx.x * blockDim.x + threadIdx.x;\n  if (i < n) y[i] = FACTOR * x[i];\n}\n"
    )
    (tmp_path / "twice.py").write_text(
        "from cuplama.ops import Op\nfrom cuplama.ops.launch import Launch, Plan\n"
        'twice = Op("twice", "y[n]:f32 = (x[n]:f32)", doc="y = 2 x", reference=lambda x: 2 * x, cases=[dict(n=300)],\n'
        '    kernels=lambda c, device: Plan((Launch("twice.cu:twice", (-(-c["n"] // 128),), (128,)),)))\n'
    )
    x = real.arange(300, dtype=np.float32)
    assert np.array_equal(real.asnumpy(ops.load(tmp_path / "twice.py")(x)), 2 * np.arange(300))
    (tmp_path / "twice.cuh").write_text("#define FACTOR 3.0f\n")
    assert np.array_equal(real.asnumpy(ops.load(tmp_path / "twice.py")(x)), 3 * np.arange(300))


@pytest.mark.gpu
def test_ranges_are_marked_on_a_gpu(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the true library: nothing but that it can be called is seen from here."""
    monkeypatch.setenv("CUPLAMA_NVTX", "1")
    eager._executor.cache_clear()
    try:
        y = ops.add(real.ones((1, 8), np.float32), real.ones((1, 8), np.float32))
        assert (real.asnumpy(y) == 2).all()
    finally:
        eager._executor.cache_clear()
