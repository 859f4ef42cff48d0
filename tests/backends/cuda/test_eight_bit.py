"""Products of 8-bit floats over many rows: their kernels on the emulator, bit for bit, and what cuBLAS is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuplama.backends.cuda import eight_bit, planning, unpacking
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.driver import cuda_available
from cuplama.backends.cuda.eight_bit import row_scratch, scale_kind, weight_scratch
from cuplama.dtypes import DTYPES
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload, case_workload
from cuplama.ops import OPS
from cuplama.ops.binding import bind
from cuplama.ops.launch import Launch
from cuplama.ops.weights import MAX_PACKED_ROWS
from tests.fakes import FakeGpu, HostCublas

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_N = MAX_PACKED_ROWS + 4


def workload(op: str, k: int, *, m: int = 24, n: int = _N, T: str = "bf16", W: str = "fp8", **more: Any) -> Workload:
    case = {"n": n, "m": m, "k": k, "b": False, "U": "T", "eps": 1e-5, "W": W, **more}
    return case_workload(OPS[op], case, T)


def quantised(x: np.ndarray[Any, Any], groups: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Codes [n,k] and scales of x: [n], or [ceil(k / 128), n]. All in float32, as the kernels compute."""
    n, k = x.shape
    K = -(-k // 128)
    padded = np.zeros((n, K * 128), np.float32)
    padded[:, :k] = x.astype(np.float32)
    each = padded.reshape(n, K, 128) if groups else padded[:, None]
    scale = np.maximum(np.abs(each).max(2), np.float32(1e-30)) / np.float32(448)
    codes = (each * (np.float32(1) / scale)[:, :, None]).astype(_E4M3).reshape(n, -1)[:, :k]
    return codes, scale.T if groups else scale[:, 0]


def launched(work: Workload, launch: Launch, scratch: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The scratch after a launch. As much memory follows on each, which nothing may write."""
    emulated = EmulatedDevice()
    arrays = {}
    for name, (shape, dtype) in scratch.items():
        arrays[name] = np.full((2 * shape[0], *shape[1:]), 0, DTYPES[dtype])
        arrays[name].view(np.uint8)[...] = 0xFF
    call = work.bind()
    call.arrays["w"] = emulated.upload(call.arrays["w"])
    emulated.launch(bind(launch, call, arrays))
    for name, (shape, _) in scratch.items():
        assert (arrays[name][shape[0] :].view(np.uint8) == 0xFF).all()
    return {name: arrays[name][: shape[0]] for name, (shape, _) in scratch.items()}


@pytest.mark.parametrize(("T", "k", "W"), [("bf16", 144, "fp8"), ("f16", 4224, "fp8"), ("bf16", 400, "fp8 g128")])
def test_rows_are_quantised(T: str, k: int, W: str) -> None:
    work = workload("linear", k, T=T, W=W, n=3)
    x: Any = work.ins[0]
    x[0, :130], x[1] = 0, x[1] * 1e3
    kind: Any = scale_kind(work.bind())
    found = launched(work, eight_bit.quantise_launch(work.bind(), kind), row_scratch(work.bind(), kind))
    codes, scale = quantised(x, kind == "group")
    np.testing.assert_array_equal(found["x_codes"].view(np.uint8), codes.view(np.uint8))
    np.testing.assert_array_equal(found["x_scale"], scale)


@pytest.mark.parametrize(("k", "W"), [(144, "fp8"), (4224, "fp8"), (400, "fp8 g128")])
@pytest.mark.parametrize("op", ["rms_norm_linear", "silu_mul_linear_add", "gelu_tanh_mul_linear_add"])
def test_what_comes_before_is_quantised_as_if_it_were_written(op: str, k: int, W: str) -> None:
    """The codes are those of the op's own output in 16 bits."""
    work = workload(op, k, W=W, n=2, offset=1)
    kind: Any = scale_kind(work.bind())
    found = launched(work, eight_bit.quantise_launch(work.bind(), kind), row_scratch(work.bind(), kind))
    inner: Any = work.op.inner
    plain = launched(work, inner(work.bind()), {"inner": ((2, k), "bf16")})["inner"]
    codes, scale = quantised(plain, kind == "group")
    np.testing.assert_array_equal(found["x_scale"], scale)
    np.testing.assert_array_equal(found["x_codes"].view(np.uint8), codes.view(np.uint8))


@pytest.mark.parametrize("W", ["fp8", "fp8 g128"])
@pytest.mark.parametrize(("m", "k", "start", "stop"), [(40, 144, 0, 40), (40, 656, 16, 40), (90, 128, 32, 64)])
def test_codes_are_laid_out_row_by_row(W: str, m: int, k: int, start: int, stop: int) -> None:
    work = workload("linear", k, m=m, W=W)
    kind: Any = scale_kind(work.bind())
    launch = eight_bit.unpack_codes_launch(work.bind(), start, stop)
    found = launched(work, launch, weight_scratch(work.bind(), stop - start, kind))
    fields = work.ins[1].fields
    np.testing.assert_array_equal(found["dense"].view(np.uint8), fields["code"].read()[start:stop])
    scale = fields["scale"].read().astype(np.uint32).view(np.float32)[start:stop]
    np.testing.assert_array_equal(found["w_scale"], scale.T if kind == "group" else scale[:, 0])


def test_which_weights_have_such_products() -> None:
    kinds = {
        W: scale_kind(workload("linear", 128, W=W).bind())
        for W in ("fp8", "fp8 g128", "int8", "fp8 ordered", "fp8 + fp8 g128", "")
    }
    assert kinds == {"fp8": "row", "fp8 g128": "group"} | dict.fromkeys(list(kinds)[2:])
    assert scale_kind(workload("linear", 136).bind()) is None  # not a multiple of 16
    assert scale_kind(workload("linear", 128, T="f32").bind()) is None
    assert scale_kind(workload("linear", 28672, m=8, n=1).bind()) == "row"
    assert scale_kind(workload("linear", 28672 + 16, m=8, n=1).bind()) is None


@pytest.mark.parametrize("op", ["linear", "linear_add", "rms_norm_linear", "silu_mul_linear_add"])
@pytest.mark.parametrize("W", ["fp8", "fp8 g128"])
@pytest.mark.parametrize(("bias", "sliced"), [(False, False), (True, True)])
def test_many_rows_are_multiplied_as_codes(
    op: str, W: str, bias: bool, sliced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sliced:
        monkeypatch.setattr(unpacking, "_SLICE_ROWS", 16)
        monkeypatch.setattr(unpacking, "SLICE_BYTES", 16 * 144 * 2)
    work = workload(op, 144, m=40, W=W, b=bias)
    y, gpu = computed(work, "fp8")
    want = work.op.reference(*work.ins, **work.attrs)
    names = [name.split("<")[0] for name in gpu.launches]
    inner = {"rms_norm_linear": "rms_norm_", "silu_mul_linear_add": "silu_mul_"}.get(op, "")
    assert names.count(f"{inner}quantise") == 1
    assert names.count("unpack_codes") == (3 if sliced else 1)
    assert "unpack" not in names
    assert 0.005 < relative(y, want) < 0.05  # x has 4 bits


@pytest.mark.parametrize("op", ["linear", "rms_norm_linear", "silu_mul_linear_add"])
@pytest.mark.parametrize(
    "more",
    [
        {"activations": "auto"},
        {"W": "int8"},
        {"k": 136},
        {"m": 36},
        {"n": MAX_PACKED_ROWS + 1, "W": "fp8 g128"},
        {"W": ""},
    ],
)
def test_everything_else_is_multiplied_in_16_bits(op: str, more: dict[str, Any]) -> None:
    """Also odd numbers of rows where scales belong to groups, which cuBLAS wants a multiple of 4 of."""
    more = {"activations": "fp8", "k": 144, **more}
    activations = more.pop("activations")
    work = workload(op, **more)
    y, gpu = computed(work, activations)
    assert not [name for name in gpu.launches if "codes" in name or "quantise" in name]
    assert relative(y, work.op.reference(*work.ins, **work.attrs)) < 0.008


def test_codes_lie_where_numbers_would() -> None:
    """In the scratch that all products with packed weights share, half of it."""
    backend = CudaBackend("bf16", gpu=FakeGpu(cublas=HostCublas()), activations="fp8")
    for op in ("linear", "linear_add"):
        work = workload(op, 144)
        backend.call(work.op, [None if x is None else backend.upload(x) for x in work.ins], work.attrs)
    (scratch,) = backend._shared
    assert scratch.nbytes == 24 * 144


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[Callable[[Workload], np.ndarray[Any, Any]]]:
    """Computes a workload on a GPU."""
    works, reason = cuda_available()
    if not works:
        pytest.skip(f"needs a GPU: {reason}")
    backends = {T: CudaBackend(T, activations="fp8") for T in ("bf16", "f16")}
    if backends["bf16"].activations != "fp8":
        pytest.skip("needs sm_90 and cuBLAS 12.9")

    def compute(work: Workload) -> np.ndarray[Any, Any]:
        backend = backends[work.dtype]
        ins = [None if x is None else backend.upload(x) for x in work.ins]
        return backend.download(backend.call(work.op, ins, work.attrs)[0])

    yield compute
    for backend in backends.values():
        backend.close()


@pytest.mark.gpu
@pytest.mark.parametrize("T", ["bf16", "f16"])
@pytest.mark.parametrize("W", ["fp8", "fp8 g128"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("op", ["linear", "linear_add"])
def test_products_of_codes_on_a_gpu(op: str, W: str, bias: bool, T: str, on_gpu: Any) -> None:
    """Against the exact product of what was rounded. Fast sums lose 3e-3, and a result in bf16 1.7e-3."""
    for U in ("T", "f32"):
        work = workload(op, 1040, m=328, n=132, T=T, W=W, b=bias, U=U)
        codes, scale = quantised(work.ins[0], W != "fp8")
        spread = np.repeat(scale.T, 128, 1)[:, :1040] if W != "fp8" else scale[:, None]
        want = work.op.reference(codes.astype(np.float32) * spread, *work.ins[1:], **work.attrs)
        assert relative(on_gpu(work), want) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("W", ["fp8", "fp8 g128"])
@pytest.mark.parametrize("op", ["rms_norm_linear", "silu_mul_linear_add"])
def test_what_comes_before_a_product_on_a_gpu(op: str, W: str, on_gpu: Any) -> None:
    work = workload(op, 1040, m=328, n=132, W=W)
    assert 0.005 < relative(on_gpu(work), work.op.reference(*work.ins, **work.attrs)) < 0.04


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["linear", "rms_norm_linear", "silu_mul_linear_add"])
@pytest.mark.parametrize("more", [{"W": "int8"}, {"k": 1048}, {"m": 324}, {"n": 131, "W": "fp8 g128"}])
def test_the_16_bit_way_on_a_gpu(op: str, more: dict[str, Any], on_gpu: Any) -> None:
    work = workload(op, **{"k": 1040, "m": 328, "n": 132, **more})
    assert relative(on_gpu(work), work.op.reference(*work.ins, **work.attrs)) < 0.008


@pytest.mark.gpu
def test_odd_rows_are_multiplied_as_codes_on_a_gpu(on_gpu: Any) -> None:
    """Where scales belong to rows, any number of them is fine."""
    work = workload("linear", 1040, m=328, n=133)
    assert 0.01 < relative(on_gpu(work), work.op.reference(*work.ins, **work.attrs)) < 0.04


def computed(work: Workload, activations: str) -> tuple[np.ndarray[Any, Any], Any]:
    gpu: Any = FakeGpu(emulate=True, cublas=HostCublas())
    backend = CudaBackend(work.dtype, gpu=gpu, activations=activations)
    ins = [None if x is None else backend.upload(x) for x in work.ins]
    (y,) = backend.call(work.op, ins, work.attrs)
    return backend.download(y), gpu


def relative(y: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(y.astype(np.float64) - want) / np.linalg.norm(want))


def test_a_library_that_knows_no_such_product_is_not_asked_twice() -> None:
    """Where it has none the way is that of 16 bits, whatever is before the product."""

    class Old(HostCublas):
        def scaled_product(self, *_: Any, **__: Any) -> Any:
            return None

    gpu = FakeGpu(cublas=Old())
    gpu.activations = "fp8"
    way: Any = planning._by_library(gpu, workload("rms_norm_linear", 144).bind())
    assert (way.scales, way.arrays["x"], way.arrays["w"]) == ("", "inner", "dense")
