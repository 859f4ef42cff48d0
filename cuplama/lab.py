"""The kernel lab: an op at a shape, checked against its reference and timed alone. A wrong kernel has no time.

Timing replays a CUDA graph of many launches, as decoding does. The inputs rotate through copies that exceed the L2
cache together, but are at most 64: so weights come from memory, and a few kilobytes of activations from L2, as in a
model. cupyx.profiler would time each launch with the host's part of it, which a replayed step does not have.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from . import ceilings, compiler, kernel
from .backends import Backend
from .bench import Trial, _Runs, show_ceilings
from .cases import Case, _normal
from .ceilings import Ceilings, Spread
from .compiler import stand_in
from .errors import CuplamaError, DeviceError, ParameterError
from .kernel import BoundLaunch, Device
from .model import Model
from .op import DTYPES, Array, OpError, dtype_name
from .report import Column

__all__ = [
    "COLUMNS",
    "Emulator",
    "Replay",
    "Step",
    "WrongResultError",
    "bench",
    "bodies",
    "check",
    "check_launches",
    "check_on",
    "planned",
    "rotation",
    "time_case",
]

TOLERANCE = {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2}  # of the error's norm, by the output's dtype
_MOST_COPIES = 64
_MOST_BYTES = 2 << 30  # of all copies
_LAUNCHES = 40  # at least, in one replay
_REPLAYS = 30
_GRID = (2**31 - 1, 65535, 65535)  # blocks at most (CUDA C++ programming guide, technical specifications)
_WIDEN = 1 << 24  # inputs of more elements stay as they are: the references widen what they take of them


class WrongResultError(CuplamaError):
    """A kernel computes something else than its reference. Names op, shape, output and the first wrong element."""


# ---- right or wrong --------------------------------------------------------------------------------------------------


def expected(case: Case, arrays: Sequence[np.ndarray[Any, Any] | None]) -> list[np.ndarray[Any, Any]]:
    """What the reference says, in float64 where the outputs are floats. The arrays are not changed."""
    signature = case.op.signature
    exact = all(case.call.dtype(s).kind in "iu" for s in signature.outs)
    ins: list[Any] = []
    for spec, x in zip(signature.ins, arrays, strict=False):
        if x is not None and not exact and x.dtype.kind not in "iu" and x.size <= _WIDEN:
            ins.append(x.astype(np.float64))
        else:
            ins.append(x.copy() if x is not None and spec.name in signature.in_place else x)
    out = case.op.reference(*ins, **case.attrs)
    return list(out) if isinstance(out, tuple) else [out]


def check(case: Case, arrays: Sequence[np.ndarray[Any, Any] | None], outs: Sequence[np.ndarray[Any, Any]]) -> None:
    """Compare every element of every output with the reference. Raises WrongResultError.

    Integers must be equal. Of floats the norm of the error is held to the output dtype's tolerance, a single element to
    six times that of its own size and the outputs' mean size together: of millions, some lie five deviations out.
    """
    for spec, out, want in zip(case.op.signature.outs, outs, expected(case, arrays), strict=True):
        if out.shape != want.shape:
            raise WrongResultError(f"{case.label}: {spec.name} has shape {out.shape}, not {want.shape}")
        if out.dtype.kind in "iu":
            wrong = out != want
        else:
            tolerance = TOLERANCE[dtype_name(out.dtype)]
            out, want = out.astype(np.float64), want.astype(np.float64)
            finite = np.isfinite(want)
            size = np.where(finite, np.abs(want), 0)
            with np.errstate(invalid="ignore"):
                error = np.abs(out - want)
            typical = float(np.sqrt(np.mean(size * size))) if size.size else 0.0
            wrong = np.where(finite, ~(error <= 6 * tolerance * (size + typical)), out != want)
            norm = float(np.linalg.norm(np.where(finite, error, 0)))
            if not wrong.any() and not norm <= tolerance * max(float(np.linalg.norm(size)), 1e-30):
                raise WrongResultError(
                    f"{case.label}: {spec.name}: the error is {norm / max(float(np.linalg.norm(size)), 1e-30):.1e}"
                    f" of the result's norm; {tolerance:g} is allowed"
                )
        if wrong.any():
            at = tuple(int(i[0]) for i in np.nonzero(wrong))
            raise WrongResultError(
                f"{case.label}: {int(wrong.sum())} of {wrong.size} elements of {spec.name} are wrong, the first at"
                f" {list(at)}: {out[at]:g}, not {want[at]:g}"
            )


def planned(
    case: Case, ins: Sequence[Array | None], device: Device, empty: Callable[[tuple[int, ...], np.dtype[Any]], Array]
) -> tuple[list[BoundLaunch], list[Array]]:
    """The op's own launches on these arrays, and the arrays that will hold the outputs, all in host memory.

    empty: makes outputs and scratch; descriptions of arrays will do where nothing is run.
    """
    op = case.op
    if op.kernels is None:
        raise DeviceError(f"{op.name} has no kernel of its own; it runs as its parts")
    call = case.bind(ins)
    plan = op.kernels(call, device)
    for spec in op.signature.outs:
        if spec.name not in op.signature.in_place:
            call.arrays[spec.name] = empty(call.shape(spec), call.dtype(spec))
    scratch = {}
    for name, (shape, dtype) in plan.scratch.items():
        scratch[name] = (np.zeros if name in plan.zeroed else empty)(shape, DTYPES[dtype])
    bound = [kernel.bind(launch, call, scratch) for launch in plan.launches]
    return bound, [call.arrays[s.name] for s in op.signature.outs]


def check_launches(case: Case, device: Device) -> None:
    """Plan the op's own launches. Raises ParameterError for a shape that they do not take or no grid can hold."""
    if case.op.kernels is None:
        return
    try:
        launches = planned(case, case.ins, device, stand_in)[0]
    except OpError as e:
        raise ParameterError(str(e)) from None
    except (MemoryError, OverflowError) as e:
        raise ParameterError(f"{case.label}: the shape is too large: {e}") from None
    for launch in launches:
        if any(not 1 <= size <= most for size, most in zip(launch.grid, _GRID, strict=True)):
            raise ParameterError(f"{case.label}: the shape is too large: {launch.expression} needs grid {launch.grid}")


class Emulator:
    """Runs kernels on the CPU, by the emulator of the checkout's tests. Raises DeviceError where there is none."""

    def __init__(self, arch: int = 90) -> None:
        missing = emulator_missing()
        if missing:
            raise DeviceError(missing)
        root = str(_checkout())
        if root not in sys.path:
            sys.path.insert(0, root)
        from tests.simt import emulator

        self._emulator = emulator
        self._devices = [Device(arch=a, shared=compiler.shared_limit(a)) for a in dict.fromkeys((arch, min(arch, 80)))]

    def outputs(self, case: Case, arrays: Sequence[np.ndarray[Any, Any] | None]) -> list[np.ndarray[Any, Any]]:
        """The case's outputs, from poisoned memory. Raises WrongResultError for a fault that is found."""
        ins = [None if x is None else x.copy() for x in arrays]
        device = self.device(case)
        launches, outs = planned(case, ins, device, _poisoned)
        try:
            for launch in launches:
                self._emulator.run(launch, arch=device.arch)
        except self._emulator.KernelFault as e:
            raise WrongResultError(f"{case.label}: {_brief(str(e))}") from None
        return outs

    def check(self, case: Case) -> None:
        """Raises WrongResultError."""
        arrays = case.arrays()
        check(case, arrays, self.outputs(case, arrays))

    def prepare(self, cases: Iterable[Case]) -> None:
        """Compile what the cases launch, many at a time. Raises WrongResultError with the first complaint."""
        wanted: dict[int, dict[tuple[str, str], None]] = {}
        for case in cases:
            device = self.device(case)
            for launch in planned(case, case.ins, device, stand_in)[0]:
                wanted.setdefault(device.arch, {})[launch.file, launch.expression] = None
        try:
            for arch, kernels in wanted.items():
                self._emulator.precompile(list(kernels), arch=arch)
        except self._emulator.KernelFault as e:
            raise WrongResultError(_brief(str(e))) from None

    def device(self, case: Case) -> Device:
        """The device that a case is planned for: one whose kernels use nothing that is not emulated.

        Raises DeviceError if there is none.
        """
        for device in self._devices:
            files = {launch.file for launch in planned(case, case.ins, device, stand_in)[0]}
            if not any(self._foreign(file) for file in files):
                return device
        raise DeviceError(f"{case.op.name}: its kernels use instructions that are not emulated")

    def _foreign(self, file: str) -> bool:
        text = (kernel.source_folder() / file).read_text(encoding="utf-8")
        return any(f"{name}(" in text or f"{name}<" in text for name in self._emulator.NOT_EMULATED)


def _brief(text: str) -> str:
    """A fault as it is; of a compiler's messages only the first error."""
    lines = text.splitlines()
    if not lines[0].startswith("compile-error"):
        return text
    return " ".join([lines[0], *[line.strip() for line in lines[1:] if "error: " in line][:1]])


def _poisoned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    return np.full(shape, 0x5A5A5A5A if dtype.kind in "iu" else np.nan, dtype)


def _checkout() -> Path:
    return Path(__file__).resolve().parent.parent


def emulator_missing() -> str:
    """Why kernels cannot be run on the CPU here; empty if they can."""
    if not (_checkout() / "tests" / "simt" / "emulator.py").is_file():
        return "without a GPU, kernels are run by the emulator in tests/, which is in a checkout only"
    return "" if shutil.which("g++") else "without a GPU, kernels are run by an emulator that needs g++"


def check_on(backend: Backend, case: Case, arrays: Sequence[np.ndarray[Any, Any] | None]) -> None:
    """Run the op as a model does, its outputs poisoned before, and compare. Raises WrongResultError."""
    checking, backend._check = backend._check, True  # type: ignore[attr-defined]
    try:
        outs = backend.call(case.op.name, _uploaded(backend, arrays), case.attrs)
        check(case, arrays, [backend.download(a) for a in outs])
    finally:
        backend._check = checking  # type: ignore[attr-defined]


def _uploaded(backend: Backend, arrays: Sequence[np.ndarray[Any, Any] | None]) -> list[Array | None]:
    return [None if x is None else backend.upload(x) for x in arrays]


# ---- time ------------------------------------------------------------------------------------------------------------

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

        self._recording = backend.recording(body)
        for _ in range(3):  # plain, captured, replayed
            self._recording.run().synchronize()

    def seconds(self, repeats: int) -> Spread:
        """Seconds per launch."""
        spread = ceilings.seconds(self._backend, self._recording.run, repeats)
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
    return [_uploaded(backend, arrays) for _ in range(count)]


def bodies(backend: Backend, case: Case, ins: Sequence[Sequence[Array | None]]) -> list[Body]:
    """The op on each copy of its inputs."""
    return [partial(backend.call, case.op.name, given, case.attrs) for given in ins]


def alternative(backend: Backend, case: Case, ins: Sequence[Sequence[Array | None]]) -> tuple[str, Spread] | None:
    """What else could be used there, and its time; None where nothing is obvious, or where it does not work.

    A matrix product alone by cuBLAS, without the norm, activation or sum that a fused op has; CuPy for elementwise ops.
    """
    gpu: Any = getattr(backend, "gpu", None)
    by_name = {spec.name: x for spec, x in zip(case.op.signature.ins, ins[0], strict=False) if x is not None}
    at = {spec.name: i for i, spec in enumerate(case.op.signature.ins)}
    if "w" in by_name and by_name["w"].ndim == 2:
        if gpu is None or gpu.cublas is None:
            return None
        n, (m, k), T = case.call["n"], by_name["w"].shape, dtype_name(by_name["w"].dtype)
        x = backend.upload(_normal(np.random.default_rng(2), (n, k), DTYPES[T], 1.0))
        U = dtype_name(case.call.dtype(case.op.signature.outs[0]))
        y = backend.zeros((n, m), DTYPES[U])

        product = gpu.cublas.product(n, m, k, T, U)
        if product is None:
            return None

        def multiply(given: Sequence[Array | None]) -> Body:
            addresses = (gpu.address(x), gpu.address(given[at["w"]]), gpu.address(y))
            return lambda: product(*addresses)

        return "cuBLAS", Replay(backend, [multiply(given) for given in ins]).seconds(_REPLAYS)
    if backend.name != "cuda" or case.op.name not in _CUPY:
        return None
    spec = case.op.signature.outs[0]
    y = backend.zeros(case.call.shape(spec), case.call.dtype(spec))
    work = _CUPY[case.op.name]

    def elementwise(given: Sequence[Array | None]) -> Body:
        return lambda: work(y, *given)

    try:
        with gpu:
            return "CuPy", Replay(backend, [elementwise(given) for given in ins]).seconds(_REPLAYS)
    except Exception as e:  # CuPy refuses a dtype in more than one way; the kernel's own time does not depend on it
        print(f"{case.label}: CuPy cannot do it ({type(e).__name__}: {e})", file=sys.stderr)
        return None


def _cupy_add(y: Array, a: Array, b: Array) -> None:
    import cupy

    cupy.add(a, b, out=y)


def _cupy_select_rows(y: Array, x: Array, rows: Array) -> None:
    import cupy

    cupy.take(x, rows, axis=0, out=y)


@cache
def _elementwise(parameters: str, text: str, name: str) -> Any:
    import cupy

    return cupy.ElementwiseKernel(parameters, "T y", text, name)


def _cupy_silu_mul(y: Array, x: Array) -> None:
    f = y.shape[1]
    text = "float a = (float)g; y = (T)(a / (1.0f + expf(-a)) * (float)u)"
    _elementwise("T g, T u", text, "lab_silu_mul")(x[:, :f], x[:, f:], y)


def _cupy_gelu_tanh(y: Array, x: Array) -> None:
    text = "float a = (float)x; y = (T)(0.5f * a * (1.0f + tanhf(0.79788456f * (a + 0.044715f * a * a * a))))"
    _elementwise("T x", text, "lab_gelu_tanh")(x, y)


_CUPY: Mapping[str, Callable[..., None]] = {
    "add": _cupy_add,
    "select_rows": _cupy_select_rows,
    "silu_mul": _cupy_silu_mul,
    "gelu_tanh": _cupy_gelu_tanh,
}


# ---- the table -------------------------------------------------------------------------------------------------------

COLUMNS = (
    Column("graph", "graph"),
    Column("op", "op"),
    Column("weights", "weights"),
    Column("shape", "shape"),
    Column("count", "count", 1),
    Column("microseconds", "µs", 3, "microseconds_spread"),
    Column("gigabytes_per_second", "GB/s", 3),
    Column("percent_of_read_bandwidth", "% of read", 3),
    Column("teraflops", "TFLOP/s", 3),
    Column("percent_of_matrix_rate", "% of GEMM", 3),
    Column("alternative", "or"),
    Column("alternative_microseconds", "µs", 3),
    Column("total_microseconds", "count x µs", 3),
)


def row(case: Case, taken: Spread, other: tuple[str, Spread] | None, limits: Ceilings) -> dict[str, Any]:
    """One line of the table: medians, half the distance of the quartiles, and bytes and operations from the op."""
    call, median = case.call, taken.median
    moved, operations = call.nbytes(), call.flops()
    return {
        "graph": case.graph,
        "op": case.op.name,
        "weights": "/".join(case.weights),
        "shape": case.shape,
        "dtype": case.dtype,
        "count": case.count,
        "microseconds": 1e6 * median,
        "microseconds_spread": 1e6 * taken.half_range,
        "bytes": moved,
        "operations": operations,
        "gigabytes_per_second": moved / median / 1e9,
        "percent_of_read_bandwidth": limits.percent_read(moved / median),
        "teraflops": operations / median / 1e12 if operations else None,
        "percent_of_matrix_rate": limits.percent_arithmetic(operations / median) if operations else None,
        "alternative": other[0] if other else None,
        "alternative_microseconds": 1e6 * other[1].median if other else None,
        "total_microseconds": 1e6 * median * case.count,
    }


@dataclass(frozen=True)
class Step:
    """A whole pass: the sum of its ops, each timed alone, and what the engine took for it, in seconds."""

    graph: str
    what: str
    summed: float
    measured: float

    def __str__(self) -> str:
        return (
            f"{self.graph}: {self.what}: the ops add up to {1e3 * self.summed:.4g} ms; measured "
            f"{1e3 * self.measured:.4g} ms ({100 * self.summed / self.measured:.0f}%)"
        )


def bench(
    backend: Backend,
    cases: Sequence[Case],
    limits: Ceilings,
    say: Callable[[str], object] = lambda text: None,
) -> list[dict[str, Any]]:
    """Check and time the cases, in order. Raises WrongResultError at the first wrong one."""
    cache = cache_bytes(backend)
    rows = []
    for i, case in enumerate(cases):
        say(f"{i + 1}/{len(cases)}: {case.label}")
        arrays = case.arrays()
        check_on(backend, case, arrays)
        ins = rotation(backend, case, arrays, cache)
        rows.append(row(case, time_case(backend, case, ins), alternative(backend, case, ins), limits))
    return rows


def steps(
    model: Model, rows: Sequence[Mapping[str, Any]], batch: int, depth: int, tokens: int, repeats: int = 5
) -> list[Step]:
    """What the engine takes for the passes whose ops the rows are: decode steps around ``depth``, and a prompt."""
    runs = _Runs(model)
    total = {g: sum(r["total_microseconds"] for r in rows if r["graph"] == g) / 1e6 for g in ("decode", "prefill")}
    half = min(32, depth - 1)
    trial = Trial(0, 2 * half or 1, depth - half, batch)  # its steps see ``depth`` tokens on average
    runs.generation(trial)
    decode = Spread(tuple(runs.generation(trial)[1] / trial.generated for _ in range(repeats))).median
    runs.prompt(Trial(tokens, 0))
    prompt = Spread(tuple(runs.prompt(Trial(tokens, 0)) for _ in range(repeats))).median
    return [
        Step("decode", f"a step of {batch} at {depth} tokens", total["decode"], decode),
        Step("prefill", f"a prompt of {tokens} tokens", total["prefill"], prompt),
    ]


def result(
    backend: Backend, rows: Sequence[Mapping[str, Any]], limits: Ceilings, whole: Sequence[Step]
) -> dict[str, Any]:
    """Everything by stable names."""
    return {
        "environment": ceilings.environment(backend),
        "ceilings": show_ceilings(limits),
        "steps": [
            {
                "graph": s.graph,
                "what": s.what,
                "summed_ms": 1e3 * s.summed,
                "measured_ms": 1e3 * s.measured,
            }
            for s in whole
        ],
        "rows": list(rows),
    }
