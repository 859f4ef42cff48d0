"""Any op, any case, any executor, against the NumPy reference in float64.

The reference gets the inputs rounded to the model's dtype and then widened, so it judges the arithmetic and not the
rounding of the inputs. Outputs are poisoned before a run (NaN, or a sentinel for integers) and lie between guard zones:
an element that is not written, or written past the end, is found. Elements of in-place outputs that the op leaves alone
must keep their bits.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from cuplama.dtypes import DTYPES, Array, dtype_name
from cuplama.ops import OPS
from cuplama.ops.attention import attention_case
from cuplama.ops.launch import BoundLaunch, Device, Plan, bind
from cuplama.ops.op import Call, Op
from cuplama.ops.signature import Spec

Case = Mapping[str, Any]
Arrays = dict[str, np.ndarray[Any, Any] | None]

TOLERANCE = {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2}
SENTINEL = 0x5A5A5A5A  # in integer outputs before a run
GUARD = 256  # bytes before and after each output; keeps the alignment that allocators give
RANDOM_CASES = 4


class Executor(Protocol):
    """Runs launches on arrays of its own."""

    device: Device

    def upload(self, array: np.ndarray[Any, Any]) -> Array: ...
    def download(self, array: Array) -> np.ndarray[Any, Any]: ...
    def launch(self, bound: BoundLaunch) -> None: ...


class Emulator:
    """Runs launches on NumPy arrays, on the CPU. device: that launches are planned for; check: every memory access."""

    def __init__(self, device: Device | None = None, check: bool = True) -> None:
        self.device, self._check = device or Device(), check

    def upload(self, array: np.ndarray[Any, Any]) -> Array:
        return array

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        return np.asarray(array)

    def launch(self, bound: BoundLaunch) -> None:
        # Imported here: without a compiler, everything but this still works.
        importlib.import_module("cuplama.simt.emulator").run(bound, check=self._check)


# ---- cases -----------------------------------------------------------------------------------------------------------


def _attention(i: Callable[..., int]) -> Case:
    H, D = i(1, 4), 8 * i(1, 32)
    new = [i(1, 2) if i(0, 1) else i(1, 70) for _ in range(i(1, 3))]
    seq_lens = [n + i(0, 90) for n in new]
    return attention_case(H * i(1, 5), H, D, new, seq_lens, window=i(0, 1) * i(1, 60), S=8 * i(1, 8))


def _kv_append(i: Callable[..., int]) -> Case:
    n, H, D, S = i(1, 30), i(1, 5), i(1, 140), i(1, 40)
    return dict(n=n, w=(i(1, 6) + 2 * H) * D, H=H, D=D, P=-(-n // S) + i(0, 2), S=S)


def _rope(i: Callable[..., int]) -> Case:
    h = i(1, 70)
    return dict(n=i(1, 9), num_heads=i(1, 9), num_kv_heads=i(1, 4), D=2 * h + i(0, 1) * i(1, 40), h=h, R=i(1, 50))


def _sampled(i: Callable[..., int]) -> Case:
    return dict(b=i(1, 4), V=i(21, 3000), m=i(1, 3), bias=bool(i(0, 1)), N=i(0, 20))


def _streamed(i: Callable[..., int]) -> Case:
    return dict(n=i(1, 8), m=i(1, 70), k=i(1, 40) * i(1, 40), b=bool(i(0, 1)), eps=1e-6, U=("T", "f32")[i(0, 1)])


def _append_attention(i: Callable[..., int]) -> Case:
    case = _attention(i)
    one = [1] * len(case["new"])
    seq_lens = [n - m + 1 for n, m in zip(case["seq_lens"], case["new"], strict=True)]
    case = attention_case(case["num_heads"], case["H"], case["D"], one, seq_lens, case["window"], case["S"])
    turned, normed = dict.fromkeys(("rows", "cos", "sin"), bool(i(0, 1))), bool(i(0, 1))
    return {**case, **turned, "q_norm": normed, "k_norm": normed, "h": i(1, case["D"] // 2), "R": i(1, 99), "eps": 1e-6}


_RANDOM: Mapping[str, Callable[[Callable[..., int]], Case]] = {
    "embedding": lambda i: dict(n=i(1, 9), d=i(1, 2000), V=i(1, 40), P=i(1, 40)),
    "embedding_pos": lambda i: dict(n=i(1, 9), d=i(1, 2000), V=i(1, 40), P=i(1, 40)),
    "rms_norm": lambda i: dict(n=i(1, 5), d=i(1, 9000), eps=1e-6),
    "layer_norm": lambda i: dict(n=i(1, 5), d=i(2, 9000), eps=1e-5),
    "qk_norm": lambda i: dict(n=i(1, 9), num_heads=i(1, 9), num_kv_heads=i(1, 4), D=i(1, 300), eps=1e-6),
    "linear": lambda i: dict(n=i(1, 12), m=i(1, 70), k=i(1, 40) * i(1, 40), b=bool(i(0, 1)), U=("T", "f32")[i(0, 1)]),
    "rope": _rope,
    "kv_append": _kv_append,
    "attention": _attention,
    "silu_mul": lambda i: dict(n=i(1, 5), f=i(1, 3000)),
    "gelu_tanh": lambda i: dict(n=i(1, 5), f=i(1, 3000)),
    "gelu_erf": lambda i: dict(n=i(1, 5), f=i(1, 3000)),
    "add": lambda i: dict(n=i(1, 5), d=i(1, 3000)),
    "select_rows": lambda i: dict(n=i(1, 9), r=i(1, 9), d=i(1, 3000)),
    "penalize": _sampled,
    "sample": _sampled,
    "count_token": _sampled,
    "logprobs": _sampled,
    "rms_norm_linear": _streamed,
    "rms_norm_linear_silu_mul": _streamed,
    "layer_norm_linear": _streamed,
    "layer_norm_linear_gelu_tanh": _streamed,
    "layer_norm_linear_gelu_erf": _streamed,
    "linear_add": _streamed,
    "append_attention": _append_attention,
    "advance": lambda i: dict(b=i(1, 70), M=i(1, 5), S=8 * i(1, 8), R=i(1, 4), at=i(0, 9)),
}


def cases(op: Op) -> list[Case]:
    """The registry's cases and a few random ones, the same in every run."""
    rng = np.random.default_rng(sum(op.name.encode()))
    draw = _RANDOM[op.name]
    return [*op.cases, *(draw(lambda low, high: int(rng.integers(low, high + 1))) for _ in range(RANDOM_CASES))]


def dtypes(op: Op) -> tuple[str, ...]:
    """The dtypes that T ranges over; one if the signature has no T."""
    has_letter = any(s.dtype not in DTYPES for s in (*op.signature.ins, *op.signature.outs))
    return tuple(TOLERANCE) if has_letter else ("f32",)


def all_cases(only: Callable[[Op], bool] = lambda op: True) -> Iterator[tuple[Op, Case, str]]:
    for op in OPS.values():
        if only(op):
            for case in cases(op):
                for T in dtypes(op):
                    yield op, case, T


def name_of(op: Op, case: Case, T: str) -> str:
    return f"{op.name}-{T}-" + ",".join(f"{k}={v}" for k, v in case.items()).replace(" ", "")


# ---- one run ---------------------------------------------------------------------------------------------------------


def attributes(op: Op, case: Case) -> dict[str, Any]:
    letters = {s.dtype for s in (*op.signature.ins, *op.signature.outs) if s.dtype not in DTYPES}
    return {k: v for k, v in case.items() if k in letters or k in {s.name for s in op.signature.attrs}}


def random_inputs(op: Op, case: Case, T: str) -> Arrays:
    """The op's random inputs; of a paged cache, what no sequence has is NaN: to find kernels that use it."""
    ins = op.random_inputs(np.random.default_rng(len(case) + sum(name_of(op, case, T).encode())), case, DTYPES[T])
    blocks, seq_lens = ins.get("page_table"), ins.get("seq_lens")
    if blocks is not None and seq_lens is not None and "S" in case and "k" in ins:
        unused = np.ones((case["P"], case["S"]), bool)
        for table, length in zip(blocks, seq_lens, strict=True):
            token = np.arange(length)
            unused[table[token // case["S"]], token % case["S"]] = False
        for cache in (ins["k"], ins["v"]):
            assert cache is not None
            cache.swapaxes(1, 2)[unused] = np.nan
    return ins


def expected(op: Op, case: Case, ins: Arrays, widen: bool = True) -> list[np.ndarray[Any, Any]]:
    """The reference's outputs: from float64 inputs, or from the inputs as they are."""

    def prepare(x: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any] | None:
        if x is None:
            return None
        return x.astype(np.float64) if widen and x.dtype.kind not in "iu" else x.copy()

    out = op.reference(*[prepare(ins[s.name]) for s in op.signature.ins], **attributes(op, case))
    return list(out) if isinstance(out, tuple) else [out]


def run_reference(op: Op, case: Case, T: str, ins: Arrays) -> list[np.ndarray[Any, Any]]:
    """The reference on inputs in T, its outputs in the dtypes of the signature."""
    call = bind_inputs(op, case, ins)
    outs = expected(op, case, ins, widen=False)
    return [o.astype(call.dtype(s), copy=False) for s, o in zip(op.signature.outs, outs, strict=True)]


def bind_inputs(op: Op, case: Case, ins: Mapping[str, Array | None]) -> Call:
    return op.bind([ins[s.name] for s in op.signature.ins], attributes(op, case))


def poison(dtype: np.dtype[Any]) -> Any:
    return SENTINEL if dtype.kind in "iu" else np.nan


def run_kernels(op: Op, case: Case, ins: Arrays, executor: Executor) -> list[np.ndarray[Any, Any]]:
    """Launch the op's kernels. Raises AssertionError if a guard zone was written."""
    assert op.kernels is not None
    call = bind_inputs(op, case, {k: None if x is None else executor.upload(x.copy()) for k, x in ins.items()})
    plan = op.kernels(call, executor.device)
    zones = {}
    for spec in op.signature.outs:
        initial = ins[spec.name] if spec.name in op.signature.in_place else None
        zones[spec.name], call.arrays[spec.name] = _guarded(call.shape(spec), call.dtype(spec), executor, initial)
    scratch = {}
    for name, (shape, dtype) in plan.scratch.items():
        initial = np.zeros(shape, DTYPES[dtype]) if name in plan.zeroed else None
        zones[name], scratch[name] = _guarded(shape, DTYPES[dtype], executor, initial)
    for launch in plan.launches:
        executor.launch(bind(launch, call, scratch))
    for name in plan.zeroed:
        assert not executor.download(scratch[name]).any(), f"{op.name}: {name} was not left zero"
    for name, zone in zones.items():
        content = executor.download(zone)
        edges = np.concatenate([content[:GUARD], content[-GUARD:]])
        assert (edges == 0x5A).all(), f"{op.name}: {name} was written outside its bounds"
    return [executor.download(call.arrays[s.name]) for s in op.signature.outs]


def _guarded(
    shape: tuple[int, ...], dtype: np.dtype[Any], executor: Executor, initial: np.ndarray[Any, Any] | None = None
) -> tuple[Array, Array]:
    """A poisoned (or initialised) array of the executor between two guard zones, and the bytes around it."""
    size = math.prod(shape) * dtype.itemsize
    content = np.full(-(-size // 16) * 16 + 2 * GUARD, 0x5A, np.uint8)
    filled = np.full(shape, poison(dtype), dtype) if initial is None else initial
    content[GUARD : GUARD + size] = np.ascontiguousarray(filled).view(np.uint8).reshape(-1)
    zone = executor.upload(content)
    return zone, zone[GUARD : GUARD + size].view(dtype).reshape(shape)


# ---- judging ---------------------------------------------------------------------------------------------------------


def check(op: Op, case: Case, T: str, ins: Arrays, outs: list[np.ndarray[Any, Any]]) -> None:
    """Every element of every output: integers exact, floats within the dtype's tolerance as a whole and one by one."""
    exact = all(s.dtype in ("i32", "u32", "i64", "u64") for s in op.signature.outs)
    wanted = expected(op, case, ins, widen=not exact)
    untouched = expected(op, case, ins, widen=False) if op.signature.in_place else wanted
    for spec, out, want, kept in zip(op.signature.outs, outs, wanted, untouched, strict=True):
        where = f"{op.name}: {spec.name} of {name_of(op, case, T)}"
        assert out.shape == want.shape, f"{where}: shape {out.shape}, not {want.shape}"
        if out.dtype.kind in "iu":
            assert np.array_equal(out, want), f"{where}: {_first(out != want, out, want)}"
            continue
        if spec.name in op.signature.in_place:
            before = ins[spec.name]
            assert before is not None
            same = _bits(kept.astype(out.dtype)) == _bits(before)
            moved = same & (_bits(out) != _bits(before))
            assert not moved.any(), f"{where}: changed outside what the op writes: {_first(moved, out, before)}"
        _check_floats(where, out.astype(np.float64), want.astype(np.float64), TOLERANCE[dtype_name(out.dtype)])


def _check_floats(where: str, out: Any, want: Any, tolerance: float) -> None:
    finite = np.isfinite(want)
    wrong = ~finite & (out != want) & ~(np.isnan(out) & np.isnan(want))
    assert not wrong.any(), f"{where}: {_first(wrong, out, want)}"
    out, want = np.where(finite, out, 0), np.where(finite, want, 0)
    norm = float(np.linalg.norm(want.ravel()))
    error = np.abs(out - want)
    # The norm of the error is held to the tolerance, a single element to a few times of it: fused ops round on the way.
    wrong = ~(error <= 3 * tolerance * (np.abs(want) + norm / math.sqrt(max(1, want.size))))
    assert not wrong.any(), f"{where}: {_first(wrong, out, want)}"
    relative = float(np.linalg.norm(error.ravel())) / max(norm, 1e-30)
    assert relative <= tolerance, f"{where}: relative error {relative:.2e} > {tolerance}"


def _first(wrong: Any, out: Any, want: Any) -> str:
    at = tuple(int(i[0]) for i in np.nonzero(wrong))
    return f"{int(wrong.sum())} of {wrong.size} elements wrong, the first at {at}: {out[at]!r}, not {want[at]!r}"


def _bits(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


# ---- what a launch must satisfy on any device ------------------------------------------------------------------------

_FLOATS, _INTS = ("f32", "float"), ("i32", "int", "u32", "unsigned", "i64", "long long", "u64", "unsigned long long")


def check_plan(op: Op, call: Call, plan: Plan, device: Device) -> list[BoundLaunch]:
    """Bind every launch to NumPy arrays and compare it with the signature and the limits of CUDA."""
    for spec in op.signature.outs:
        if spec.name not in op.signature.in_place:
            call.arrays[spec.name] = np.empty(call.shape(spec), call.dtype(spec))
    scratch = {name: np.empty(shape, DTYPES[dtype]) for name, (shape, dtype) in plan.scratch.items()}
    bound = [bind(launch, call, scratch) for launch in plan.launches]
    written = {p.name for b in bound for p in b.prototype.parameters if p.pointer and not p.const}
    outs, ins = ({s.name: s for s in specs} for specs in (op.signature.outs, op.signature.ins))
    assert written == set(outs) | (written & set(scratch)), f"{op.name} writes {sorted(written)}"
    for b in bound:
        for p, value in zip(b.prototype.parameters, b.args, strict=True):
            _check_parameter(op, b, p.name, p.type, p.pointer, p.const, value, {**ins, **outs})
        what = b.describe()
        assert min(b.grid) >= 1, what
        assert b.grid[0] < 2**31, what
        assert max(b.grid[1:]) < 2**16, what
        assert math.prod(b.block) <= 1024, what
        assert math.prod(b.block) % 32 == 0, what
        assert b.shared <= device.shared, what
    return bound


def _check_parameter(
    op: Op, b: BoundLaunch, name: str, type_: str, pointer: bool, const: bool, value: Any, arrays: Mapping[str, Spec]
) -> None:
    what = f"{b.file}: {b.expression}: parameter {name}"
    if name in arrays:
        assert pointer, f"{what} is an array in the signature"
        assert const == (name not in {s.name for s in op.signature.outs}), f"{what}: const is for inputs alone"
    attrs = {s.name: s.dtype for s in op.signature.attrs}
    if name in attrs:
        assert not pointer, f"{what} is a scalar in the signature"
        wanted = _FLOATS if attrs[name] == "f32" else _INTS
        assert type_ in wanted, f"{what} is {type_}, the signature says {attrs[name]}"
