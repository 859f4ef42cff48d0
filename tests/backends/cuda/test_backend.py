"""The CUDA backend without a GPU: its planning, on arrays in host memory and kernels run by the emulator."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cuplama.backends.cuda import backend as cuda
from cuplama.backends.cuda import planning
from cuplama.backends.cuda.backend import CudaBackend, convert
from cuplama.backends.cuda.driver import cuda_available
from cuplama.backends.numpy import NumPyBackend
from cuplama.dtypes import DTYPES
from cuplama.errors import CheckpointError, DeviceError
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import load_config
from cuplama.ops import OPS
from cuplama.ops.attention_cases import attention_case
from cuplama.ops.launch import Device
from cuplama.ops.linear import MAX_STREAMED_ROWS
from cuplama.ops.node import Node
from cuplama.ops.signature import OpError
from cuplama.quant.weight import Weight
from tests.fakes import Driver, FakeGpu, HostCublas
from tests.paths import GOLDEN


@pytest.fixture
def backend() -> CudaBackend:
    return CudaBackend("f32", gpu=FakeGpu())


def _fake(backend: CudaBackend) -> FakeGpu:
    assert isinstance(backend.gpu, FakeGpu)
    return backend.gpu


def _ones(backend: CudaBackend, *shape: int) -> Any:
    return backend.upload(np.ones(shape, np.float32))


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama3-gqa", "qwen3", "gpt2"])
@pytest.mark.parametrize("cublas", [None, HostCublas()], ids=["kernels", "cublas"])
def test_a_model_on_the_emulator_gives_the_golden_logits(case: str, cublas: Any) -> None:
    """Prefill (more rows than a GEMV takes) through graph, plans, kernels, bias and in-place cache."""
    from cuplama.engine.engine import Engine

    folder = GOLDEN / case
    config = load_config(folder)
    backend = CudaBackend("f32", gpu=FakeGpu(emulate=True, cublas=cublas))
    weights = {name: backend.load_weight(w) for name, w in load_weights(folder, config).items()}
    golden = np.load(folder / "golden.npz")
    engine = Engine(backend, config, weights, 64, 64)
    logits = np.concatenate(list(engine.logits(golden["prompt_1"].tolist())))
    np.testing.assert_allclose(logits, golden["logits_1"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("case", [pytest.param("llama-attention-bias", marks=pytest.mark.slow), "gpt2"])
def test_a_large_batch_decodes_through_cublas(case: str) -> None:
    """Recorded steps of more rows than are streamed: cuBLAS adds the residual, attention appends."""
    from cuplama.engine.engine import Engine
    from cuplama.generation_config import Settings
    from cuplama.model import Model

    folder, count = GOLDEN / case, MAX_STREAMED_ROWS + 1
    config = load_config(folder)
    backend = CudaBackend("f32", gpu=FakeGpu(emulate=True, cublas=HostCublas()))
    weights = {name: backend.load_weight(w) for name, w in load_weights(folder, config).items()}
    golden = np.load(folder / "golden.npz")
    model = Model(folder, config, None, Engine(backend, config, weights, 64, 64 * count), Settings())
    prompt = golden["prompt_1"].tolist()[:20]
    alone = model.generate(prompt, max_tokens=4, temperature=0.0, ignore_eos=True)
    _fake(backend).launches.clear()
    batch = model.generate([prompt] * count, max_tokens=4, temperature=0.0, ignore_eos=True)
    assert [c.tokens for c in batch] == [alone.tokens] * count
    launched = {name.split("<")[0] for name in _fake(backend).launches}
    assert "append_attention" in launched
    assert not {"add", "linear", "linear_add"} & launched


# ---- running ---------------------------------------------------------------------------------------------------------


_CHAIN = [
    Node("add", ("x1",), ("x0", "x0")),
    Node("add", ("x2",), ("x1", "x0")),
    Node("add", ("x3",), ("x2", "x0")),
    Node("add", ("x4",), ("x3", "x0")),
]


def test_dead_intermediates_are_freed_and_kept_ones_returned(backend: CudaBackend) -> None:
    gpu, x = _fake(backend), _ones(backend, 4, 256)
    out = backend.run(_CHAIN, {"x0": x}, ("x4", "x2"))
    assert out.keys() == {"x4", "x2"}
    gpu.peak = 0
    del out
    backend.run(_CHAIN, {"x0": x}, ("x4",))
    assert gpu.peak == 3 * x.nbytes  # x0, and one node's input and output
    assert len(gpu.alive) == 1


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_transpose_is_contiguous_and_in_order_with_what_is_queued(dtype: str) -> None:
    host = np.arange(12).reshape(3, 4).astype(DTYPES[dtype])
    for backend in (CudaBackend(dtype, gpu=FakeGpu()), NumPyBackend(dtype)):
        found = backend.transpose(backend.upload(host))
        assert (found.shape, found.flags.c_contiguous) == ((4, 3), True)
        assert np.array_equal(backend.download(found), host.T)


def test_the_second_run_plans_nothing(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    x = _ones(backend, 4, 256)
    backend.run(_CHAIN, {"x0": x}, ("x4",))
    assert len(_fake(backend).launches) == 4
    monkeypatch.setattr(backend, "_plan", lambda *a: pytest.fail("planned again"))
    backend.run(_CHAIN, {"x0": x}, ("x4",))
    assert len(_fake(backend).launches) == 8


def test_a_plan_made_for_one_array_twice_serves_two_arrays(backend: CudaBackend) -> None:
    a, b = _ones(backend, 1, 8), _ones(backend, 1, 8)
    backend.call(OPS["add"], (a, a), {})
    backend.call(OPS["add"], (a, b), {})
    assert _fake(backend).seen[:2] == [id(a), id(b)]


def test_ops_of_the_same_shapes_have_plans_of_their_own(backend: CudaBackend) -> None:
    x, w = _ones(backend, 2, 8), _ones(backend, 8)
    for eps in (1e-5, 1e-6, 1e-5):
        backend.call(OPS["rms_norm"], (x, w), {"eps": eps})
    assert len(_fake(backend).launches) == 3
    assert len(backend._plans) == 2


def test_only_numpy_goes_on_in_a_forked_child() -> None:
    assert (CudaBackend.forks, NumPyBackend.forks) == (False, True)


def test_plans_do_not_grow_without_end(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaBackend, "_MAX_PLANS", 10)
    for d in range(1, 40):
        backend.call(OPS["add"], (_ones(backend, 1, d), _ones(backend, 1, d)), {})
        assert len(backend._plans) <= 10


def test_node_lists_do_not_grow_without_end(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaBackend, "_MAX_LISTS", 3)
    x, lists = _ones(backend, 1, 8), [_CHAIN[:1] for _ in range(8)]
    for nodes in lists:
        backend.run(nodes, {"x0": x}, ("x1",))
        assert len(backend._prepared) <= 3


def test_a_node_list_is_made_ready_once(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    x = _ones(backend, 4, 256)
    backend.run(_CHAIN, {"x0": x}, ("x4",))
    other = _CHAIN[:2]  # has the id of a list that has died
    backend._prepared[id(other), ("x2",)] = backend._prepared[id(_CHAIN), ("x4",)]
    assert backend.run(other, {"x0": x}, ("x2",)).keys() == {"x2"}
    monkeypatch.setattr(cuda, "executable", lambda nodes: pytest.fail("made ready again"))
    backend.run(_CHAIN, {"x0": x}, ("x4",))


def test_zeroed_scratch_is_shared_and_kept_until_the_end() -> None:
    backend = CudaBackend("f32", gpu=FakeGpu())
    scratch: Any = backend._zeros("arrivals", (3, 2), DTYPES["i32"])
    assert not backend.download(scratch).any()
    assert backend._zeros("others", (3, 2), DTYPES["i32"]) is scratch
    assert backend._zeros("arrivals", (2, 3), DTYPES["i32"]) is not scratch
    assert len(_fake(backend).alive) == 2
    del scratch


def test_pages_in_the_models_dtype_are_made_once_for_all_layers_and_graphs() -> None:
    """Of an fp8 cache: prompts of several sizes, each captured, and steps between them."""
    backend = CudaBackend("bf16", gpu=FakeGpu())
    scratch: Any = backend._scratch("wide_k", (3, 2), DTYPES["bf16"])
    assert backend._scratch("wide_k", (3, 2), DTYPES["bf16"]) is scratch
    assert backend._scratch("wide_v", (3, 2), DTYPES["bf16"]) is not scratch
    backend.close()
    assert not backend._kept


def test_close_drops_everything_and_closes_the_gpu(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(backend.gpu, "close", lambda: closed.append(True))
    backend._zeros("arrivals", (3,), DTYPES["i32"])
    backend.run(_CHAIN, {"x0": _ones(backend, 1, 8)}, ("x4",))
    _fake(backend).synchronize()
    backend.close()
    gc.collect()
    assert closed == [True]
    assert _fake(backend).alive == []
    assert not backend._prepared


def test_a_fused_node_without_a_kernel_runs_its_parts(backend: CudaBackend) -> None:
    fused = Node("add_twice", ("x2",), ("x0",), {}, tuple(_CHAIN[:2]))
    backend.run([fused], {"x0": _ones(backend, 1, 8)}, ("x2",))
    assert len(_fake(backend).launches) == 2


def test_a_graph_runs_once_then_is_captured_then_replayed() -> None:
    backend = CudaBackend("f32", gpu=FakeGpu(emulate=True))
    gpu, x = _fake(backend), _ones(backend, 1, 8)
    bodies: list[int] = []
    state: dict[str, Any] = {}

    def body() -> None:
        bodies.append(len(gpu.launches))
        state.update(backend.run(_CHAIN, {"x0": x}, ("x4",)))

    captured = backend.capture(body)
    gpu.pools.clear()
    for run in (1, 2, 3, 4):
        x[...] = run
        captured.replay().synchronize()
        assert len(gpu.launches) == 4 * run
        assert (state["x4"] == 5 * run).all()  # in the same array from the second run on
    assert len(bodies) == 2
    assert set(gpu.pools) == {"pool of a graph"}  # a replay overwrites that memory: nobody else may have it
    assert gpu.pool == "main pool"


def test_while_checking_nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPLAMA_CHECK", "1")
    backend = CudaBackend("f32", gpu=FakeGpu(emulate=True))
    bodies: list[int] = []
    captured = backend.capture(lambda: bodies.append(1))
    for _ in range(3):
        captured.replay()
    assert len(bodies) == 3


_NO_BIAS: Any = HostCublas(lambda bias, add: bias)
_NOTHING: Any = HostCublas(lambda bias, add: True)


_WAYS: list[tuple[Any, str, str, bool, list[str]]] = [
    (HostCublas(), "f32", "f32", False, []),
    (HostCublas(), "bf16", "f32", False, []),
    (HostCublas(), "f32", "f32", True, []),
    (HostCublas(), "f16", "f16", True, []),
    (HostCublas(), "bf16", "f32", True, ["cast_bias<bf16, f32>"]),
    (_NO_BIAS, "bf16", "f32", True, ["fill_rows<bf16, f32>"]),
    (_NO_BIAS, "f16", "f16", True, ["fill_rows<f16, f16>"]),
    (_NOTHING, "f32", "f32", True, ["linear"]),
    (None, "f32", "f32", False, ["linear"]),
]


@pytest.mark.parametrize(
    ("op", "cublas", "T", "U", "bias", "launched"),
    [(op, *way) for op in ("linear", "linear_add") for way in _WAYS if op == "linear" or way[2] == "f32"],
)
def test_many_rows_go_to_cublas_in_the_best_way_it_has(
    op: str, cublas: Any, T: str, U: str, bias: bool, launched: list[str]
) -> None:
    backend = CudaBackend(T, gpu=FakeGpu(emulate=True, cublas=cublas))
    gpu, rng = _fake(backend), np.random.default_rng(0)
    gpu.limits = Device(sms=2)
    for n in (9, 300):
        x, w, b = (rng.standard_normal(s).astype(np.float32).astype(DTYPES[T]) for s in ((n, 40), (264, 40), (264,)))
        a = rng.standard_normal((n, 264)).astype(np.float32)
        want = x.astype(np.float64) @ w.astype(np.float64).T + bias * b.astype(np.float64)
        ins, attrs = [x, w, *([b] if bias else [])], {"U": U}
        if op == "linear_add":
            want += a
            ins, attrs = [x, w, a, *([b] if bias else [])], {}
        gpu.launches.clear()
        (y,) = backend.call(OPS[op], [backend.upload(i) for i in ins], attrs)
        if launched == ["linear"]:
            assert {name.split("<")[0] for name in gpu.launches} == {op}
        else:
            assert gpu.launches == launched
        assert y.dtype == DTYPES[U]
        error = np.abs(backend.download(y).astype(np.float64) - want).max()
        assert error < (1e-4 if U == "f32" else 0.05)
        if n > 9 and launched == ["linear"]:
            break


def test_few_rows_go_to_our_kernels() -> None:
    backend = CudaBackend("f32", gpu=FakeGpu(cublas=_NOTHING))
    ins = [_ones(backend, 8, 40), _ones(backend, 24, 40), _ones(backend, 8, 24), _ones(backend, 24)]
    backend.call(OPS["linear"], [ins[0], ins[1], ins[3]], {"U": "f32"})
    backend.call(OPS["linear_add"], ins, {})
    assert [name.split("<")[0] for name in _fake(backend).launches] == ["linear", "linear_add"]


@pytest.mark.parametrize("n", [300, 70000])
@pytest.mark.parametrize("m", [256, 257, 264])
def test_the_launches_before_a_product_reach_every_row_and_column(n: int, m: int) -> None:
    """A grid has at most 65535 blocks along y; the kernel goes over the other rows in a loop."""
    x, w, b = (np.zeros(shape, DTYPES["bf16"]) for shape in ((n, 8), (m, 8), (m,)))
    plans = planning.library_plans(OPS["linear"].bind((x, w, b), {"T": "bf16", "U": "f32"}))
    (cast,), (fill,) = (plan.launches for plan in plans)
    for launch in (cast, fill):
        assert launch.grid[0] == -(-m // launch.block[0])
    assert cast.grid[1:] == ()
    assert fill.grid[1] == min(n, 65535)


def test_an_op_that_no_library_computes_has_no_launches_before_it(backend: CudaBackend) -> None:
    a = _ones(backend, 2, 8)
    assert planning.library_plans(OPS["add"].bind((a, a), {})) == []


# ---- checks before and errors after a launch -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: np.ones((2, 8), np.float32), "add: b is not on the GPU"),
        (lambda a: a[:, :4], "not contiguous|add: b"),
        (lambda a: a.astype(np.float16), "float16"),
        (lambda a: a.reshape(4, 4), "b has 4 where n is 2"),
        (lambda a: a.reshape(16), "shape"),
        (lambda a: None, "input b is missing"),
    ],
    ids=["host", "strided", "dtype", "shape", "rank", "missing"],
)
def test_unfit_arrays_never_reach_a_launch(backend: CudaBackend, spoil: Callable[[Any], Any], message: str) -> None:
    a = _ones(backend, 2, 8)
    backend.call(OPS["add"], (a, a), {})
    launched = len(_fake(backend).launches)
    with pytest.raises(OpError, match=message):
        backend.call(OPS["add"], (a, spoil(a)), {})
    assert len(_fake(backend).launches) == launched


def test_a_failed_launch_names_kernel_grid_block_and_shapes(backend: CudaBackend) -> None:
    _fake(backend).fail = True
    a = _ones(backend, 3, 8)
    with pytest.raises(DeviceError, match=r"residual.cu: add grid=.* block=.*a=\(3, 8\):float32.*INVALID_VALUE"):
        backend.call(OPS["add"], (a, a), {})
    with pytest.raises(DeviceError, match=r"node x1 = add\(x0, x0\)"):
        backend.run(_CHAIN, {"x0": a}, ("x4",))


def test_checking_poisons_outputs_and_waits_after_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPLAMA_CHECK", "1")
    backend = CudaBackend("f32", gpu=FakeGpu())  # its kernels write nothing
    filled: list[int] = []
    monkeypatch.setattr(backend.gpu, "fill", lambda array, byte: filled.append(byte))
    out = backend.run(_CHAIN[:2], {"x0": _ones(backend, 1, 8)}, ("x2",))["x2"]
    assert np.isnan(out).all()
    assert _fake(backend).synchronised == 2
    assert filled == [0xFF, 0xFF]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_poison_is_nan_in_every_dtype(backend: CudaBackend, dtype: str) -> None:
    array = backend.gpu.empty((3,), DTYPES[dtype])
    backend.gpu.fill(array, 0xFF)
    assert np.isnan(array.astype(np.float32)).all()


def test_writing_past_the_end_of_an_array_is_refused(backend: CudaBackend) -> None:
    array = _ones(backend, 2, 3)
    backend.write(array, np.full((2, 3), 7, np.float32))
    assert (backend.download(array) == 7).all()
    with pytest.raises(OpError, match=r"shape \(3, 3\) over one of shape \(2, 3\)"):
        backend.write(array, np.zeros((3, 3), np.float32))


def test_a_failure_is_told_by_the_mark_behind_it(backend: CudaBackend) -> None:
    class Event:
        def synchronize(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(DeviceError, match=r"illegal memory access.*CUPLAMA_CHECK=1 names the node"):
        cuda.Event(Event(), backend.gpu.failures).synchronize()


def test_waiting_waits_and_tells_of_a_failure(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.synchronize()
    assert _fake(backend).synchronised == 1

    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(backend.gpu, "synchronize", fail)
    with pytest.raises(DeviceError, match="illegal memory access"):
        backend.synchronize()


@pytest.mark.parametrize("broken", ["write", "empty"])
def test_what_cuda_complains_about_is_a_device_error(broken: str, backend: CudaBackend) -> None:
    x = _ones(backend, 1, 8)
    backend.call(OPS["add"], (x, x), {})

    def fail(*_: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    setattr(_fake(backend), broken, fail)
    host = np.ones((1, 8), np.float32)
    calls: dict[str, Callable[[], Any]] = {
        "upload": lambda: backend.upload(host),
        "write": lambda: backend.write(x, host),
        "zeros": lambda: backend.zeros((3,), DTYPES["f32"]),
        "call": lambda: backend.call(OPS["add"], (x, x), {}),
        "load": lambda: backend.load_weight(Weight("w", ("w",), (host,))),
    }
    for name in ("upload", "write") if broken == "write" else ("upload", "zeros", "call", "load"):
        with pytest.raises(DeviceError, match="illegal memory access"):
            calls[name]()


def test_a_copy_comes_in_its_turn(backend: CudaBackend) -> None:
    """Behind what is queued before it, and before what is queued later."""
    x = backend.upload(np.arange(6, dtype=np.float32).reshape(2, 3))
    backend.copy(x[0], x[1])
    backend.write(x[1], np.zeros(3, np.float32))
    assert backend.download(x).tolist() == [[3, 4, 5], [0, 0, 0]]


# ---- weights and dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("wanted", ["f32", "f16", "bf16"])
def test_weights_arrive_in_the_backends_dtype(stored: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "STAGE", 64)  # many pieces
    rng = np.random.default_rng(0)
    parts = tuple(rng.standard_normal((n, 7)).astype(DTYPES[stored]) for n in (5, 3))
    backend = CudaBackend(wanted, gpu=FakeGpu())
    got = backend.load_weight(Weight("w", ("a", "b"), parts))
    assert got.dtype == DTYPES[wanted]
    want = np.concatenate(parts).astype(np.float32).astype(DTYPES[wanted])
    backend.end_loading()
    assert np.array_equal(got.view(np.ndarray), want)


@pytest.mark.parametrize(
    ("stored", "wanted", "pieces"), [("f32", "f32", 8), ("bf16", "f32", 8), ("f32", "f16", 8), ("f16", "f16", 4)]
)
def test_a_piece_fills_a_pinned_buffer_before_or_after_its_conversion(
    stored: str, wanted: str, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "STAGE", 64)
    backend, sizes = CudaBackend(wanted, gpu=FakeGpu()), list[int]()
    monkeypatch.setattr(backend.gpu, "stage", lambda array, offset, host: sizes.append(host.nbytes))
    backend.load_weight(Weight("w", ("w",), (np.zeros((32, 4), DTYPES[stored]),)))
    assert len(sizes) == pieces
    assert max(sizes) <= 64


def test_a_value_that_fp16_cannot_hold_is_refused() -> None:
    piece = np.array([1, 70000], np.float32).astype(DTYPES["bf16"])
    with pytest.raises(CheckpointError, match=r"weight 3\.gate_up_proj holds 70144, which float16 cannot"):
        convert(piece, DTYPES["f16"], "3.gate_up_proj")
    assert np.isinf(convert(np.array([np.inf], np.float32), DTYPES["f16"], "x")).all()


def test_bf16_becomes_fp16_below_sm_80(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cuplama"):
        assert CudaBackend("bf16", gpu=FakeGpu(arch=75)).dtype == np.float16
    assert "a fake GPU (sm_75) has no bf16; running in fp16" in caplog.text
    assert CudaBackend("bf16", gpu=FakeGpu(arch=80)).dtype == DTYPES["bf16"]


# ---- is there a GPU? -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (None, "no NVIDIA driver"),
        (Driver(init=100), "finds no GPU"),
        (Driver(init=999), "error 999"),
        (Driver(version=11040), r"too old \(CUDA 11.4; driver 525"),
        (Driver(count=0), "no NVIDIA GPU is visible"),
        (Driver(arch=61), r"sm_61; sm_75 or newer"),
    ],
)
def test_the_reason_why_cuda_cannot_be_used(driver: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.backends.cuda.driver.load_driver", lambda: driver)
    works, said = cuda_available()
    assert not works
    assert re.search(reason, said)
    with pytest.raises(DeviceError, match=reason):
        CudaBackend("f32")


def test_a_missing_cupy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuplama.backends.cuda.driver.load_driver", Driver)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cuda_available() == (False, "cupy is not installed (pip install cupy-cuda12x)")


def test_importing_the_module_does_not_import_cupy() -> None:
    modules = "sys, cuplama.backends.cuda.backend, cuplama.backends.cuda.nvrtc, cuplama.lab.inventory, cuplama.cli.main"
    code = f"import {modules}; print('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_arrays_travel_both_ways(real: CudaBackend) -> None:
    for dtype in DTYPES.values():
        host = (np.arange(1000) % 17).reshape(10, 100).astype(dtype)  # numbers that 8-bit floats have
        assert np.array_equal(real.download(real.upload(host)), host)
        assert not real.download(real.zeros((3, 5), dtype)).any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("op", "U"), [("linear", "T"), ("linear", "f32"), ("linear_add", "f32")])
def test_cublas_products(real: CudaBackend, dtype: str, bias: bool, op: str, U: str) -> None:
    rng, T = np.random.default_rng(0), DTYPES[dtype]
    real.dtype = T
    for n, m, k in ((9, 48, 136), (100, 65, 7), (512, 1024, 896)):
        x, w, b = (rng.standard_normal(s).astype(np.float32).astype(T) for s in ((n, k), (m, k), (m,)))
        a = [rng.standard_normal((n, m)).astype(np.float32)] * (op == "linear_add")
        ins = [real.upload(i) for i in (x, w, *a, *[b] * bias)]
        attrs = {} if a else {"U": U}
        (y,) = real.call(OPS[op], ins, attrs)
        (again,) = real.call(OPS[op], ins, attrs)
        got = real.download(y)
        assert np.array_equal(got.view(np.uint8), real.download(again).view(np.uint8))
        want = x.astype(np.float64) @ w.astype(np.float64).T + (b.astype(np.float64) if bias else 0) + sum(a)
        error = np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want)
        assert error < {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2}[dtype if U == "T" else "f32"]


@pytest.mark.gpu
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other workers use the memory that it counts")
def test_close_gives_the_memory_back(real: CudaBackend) -> None:
    import cupy

    def cycle() -> int:
        backend = CudaBackend("bf16")
        w = backend.load_weight(Weight("w", ("w",), (np.ones((1 << 14, 1 << 12), np.float32),)))
        x = backend.upload(np.ones((16, 1 << 12), DTYPES["bf16"]))
        (y,) = backend.call(OPS["linear"], (x, w), {"U": "f32"})
        assert (backend.download(y) == 4096).all()
        del w, x, y
        backend.close()
        return int(cupy.cuda.Device().mem_info[0])

    first = cycle()  # libraries and compiled kernels stay
    assert [cycle() for _ in range(3)] == [first] * 3


@pytest.mark.gpu
def test_a_second_backend_compiles_nothing(real: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    a = np.ones((2, 8), np.float32)
    real.call(OPS["add"], (real.upload(a), real.upload(a)), {})
    cupy.clear_memo()  # forget the loaded modules, keep the cache on disk
    compiled: list[Any] = []
    old = cupy.cuda.compiler._NVRTCProgram.compile

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.src.strip():  # CuPy compiles an empty program to learn NVRTC's version
            compiled.append(self.name)
        return old(self, *args, **kwargs)

    monkeypatch.setattr(cupy.cuda.compiler._NVRTCProgram, "compile", count)
    other = CudaBackend("f32")
    other.call(OPS["add"], (other.upload(a), other.upload(a)), {})
    other.close()
    assert compiled == []


def test_scratch_that_lasts_is_not_memory_of_a_captured_graph() -> None:
    """A graph that shares its memory writes to what the pool takes for free: counters there would not stay zero."""
    gpu = FakeGpu(emulate=True)
    backend = CudaBackend("bf16", gpu=gpu)
    op = OPS["attention"]
    case = attention_case(4, 2, 64, [1, 1], [20, 37])
    inputs = op.random_inputs(np.random.default_rng(0), case, DTYPES["bf16"])
    ins = [None if (x := inputs[spec.name]) is None else backend.upload(x) for spec in op.signature.ins]
    attrs = {name: case[name] for name in ("num_heads", "window", "scale")}

    def body() -> None:
        backend.call(op, ins, attrs)

    graph = backend.capture(body)
    before = len(gpu.pools)
    graph.replay()
    assert [str(pool) for pool in gpu.pools[before:]].count("main pool") == 1  # the counters of arrivals
    assert "pool of a graph" in gpu.pools[before:]
