"""How an op is computed on a GPU at given sizes: which launches, or which product of cuBLAS, and on which arrays.

A plan depends only on shapes, dtypes and attributes, so it is made once and repeated. The CUDA backend, which runs
models, and ``eager.py``, which runs single ops on a user's CuPy arrays, both plan here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ...dtypes import Array, dtype_name
from ...ops.abstract import abstract
from ...ops.binding import Allocate, BoundLaunch, bind_plan
from ...ops.launch import Device, Launch, Plan
from ...ops.linear import MAX_STREAMED_ROWS
from ...ops.linear_packed_many import many_rows_plan
from ...ops.op import Call
from ...ops.signature import OpError
from ...ops.unpacking import UNPACKED, unpack_launches
from ...ops.weights import MAX_PACKED_ROWS, segments_of
from .cublas import Product
from .eight_bit import FAST, quantise_launch, row_scratch, scale_kind, unpack_codes_launch, weight_scratch
from .unpacking import row_slices

__all__ = ["Action", "Buffer", "Compiler", "Planned", "library_plans", "make_plan"]


class Action(Protocol):
    """One launch without its arrays. text: what it is, for messages; ahead: whether it may read some before it waits
    for earlier kernels (``Launch.ahead``)."""

    @property
    def text(self) -> str: ...
    def __call__(self, arrays: Sequence[Array | None], ahead: bool = False) -> None: ...


class Compiler(Protocol):
    """What a plan is made for: a GPU whose kernels can be compiled.

    cublas: the library, None where products are left to the kernels; workspace: bytes that a product of it takes as
    scratch, 0 where the library has a workspace of its own; activations: "fp8" where products of many rows with 8-bit
    floats round x to such, or "auto".
    """

    limits: Device
    workspace: int
    activations: str

    @property
    def cublas(self) -> Any: ...
    def function(self, file: str, expression: str, shared: int, waits: bool = False) -> Callable[..., None]: ...
    def address(self, array: Array) -> int: ...
    def stream_pointer(self) -> int: ...


@dataclass(frozen=True)
class Buffer:
    """An array that a call of a plan makes. zeroed: it holds zeros before the first launch, otherwise anything."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    zeroed: bool = False


@dataclass(frozen=True)
class Planned:
    """An op for given shapes. Arrays are numbered: inputs (``width`` of them), then new outputs, then scratch.

    outs: which numbers are the outputs; new: the new outputs, ``made`` of them, and then the scratch; weight: the
    number of an input that alone decides what the first action writes, to the arrays ``of_weight``: it can be kept.
    ahead: the inputs that the first action can read before it waits; waits_first: of the last action. See ``Launch``.
    """

    width: int
    outs: tuple[int, ...]
    new: tuple[Buffer, ...]
    made: int
    actions: tuple[Action, ...]
    weight: int = -1
    of_weight: tuple[int, ...] = ()
    ahead: tuple[int, ...] = ()
    waits_first: bool = False


class _Launch:
    """A kernel launch without its arrays. pointers: (number of an argument, number of the array that it takes); starts:
    the same for arguments that begin within it, and where; parts: the same for arguments that take a segment of a
    packed weight, or its order, with the number of that."""

    __slots__ = ("ahead", "args", "block", "function", "grid", "parts", "pointers", "shared", "starts", "text")

    def __init__(
        self, function: Callable[..., None], bound: BoundLaunch, position: Mapping[str, int], launch: Launch
    ) -> None:
        """position: name of an array -> its number. What is a constant of the launch belongs to the launch itself."""
        self.function, self.grid, self.block, self.shared = function, bound.grid, bound.block, bound.shared
        self.text = bound.describe()
        self.args: list[Any] = list(bound.args)
        self.pointers: list[tuple[int, int]] = []
        self.starts: list[tuple[int, int, int]] = []
        self.parts: list[tuple[int, int, str, int]] = []
        self.ahead = [p.name for p in bound.prototype.parameters].index("ahead") if launch.ahead else -1
        for i, (p, value) in enumerate(zip(bound.prototype.parameters, bound.args, strict=True)):
            name, _, part = launch.names.get(p.name, p.name).partition(".")
            if not p.pointer or p.name in launch.constants or name not in position or isinstance(value, np.generic):
                continue
            self.args[i] = None
            if part:
                segment, _, order = part.partition(".")
                self.parts.append((i, position[name], order or "data", int(segment)))
            elif p.name in launch.starts:
                self.starts.append((i, position[name], launch.starts[p.name]))
            else:
                self.pointers.append((i, position[name]))

    def __call__(self, arrays: Sequence[Array | None], ahead: bool = False) -> None:
        args = self.args.copy()
        if ahead:
            args[self.ahead] = np.int32(1)
        for i, j in self.pointers:
            args[i] = arrays[j]
        for i, j, start in self.starts:
            args[i] = arrays[j][start:]  # type: ignore[index]
        for i, j, part, segment in self.parts:
            args[i] = getattr(arrays[j].segments[segment], part)  # type: ignore[union-attr]
        self.function(self.grid, self.block, tuple(args), self.shared)


class _Matmul:
    """A cuBLAS product without its arrays. pointers: name of an argument -> number of the array that it takes, and how
    many bytes behind its beginning; own: arguments that take an array of the plan's own."""

    __slots__ = ("compiler", "own", "pointers", "product", "text")

    def __init__(self, product: Product, compiler: Compiler, arrays: Mapping[str, int | Array], shift: int) -> None:
        """arrays: name of an argument -> number of its array, or an array that it takes every time; shift: bytes from
        the first column of y to that of the product."""
        self.product, self.compiler, self.text = product, compiler, product.text
        shifts = {name: shift if name in ("y", "b", "c") else 0 for name in arrays}
        self.pointers = {name: (i, shifts[name]) for name, i in arrays.items() if isinstance(i, int)}
        self.own = {name: array for name, array in arrays.items() if not isinstance(array, int)}

    def __call__(self, arrays: Sequence[Array | None], ahead: bool = False) -> None:
        compiler = self.compiler
        named = {name: compiler.address(arrays[i]) + shift for name, (i, shift) in self.pointers.items()}
        for name, array in self.own.items():
            named[name] = compiler.address(array)
        if compiler.workspace:
            named["stream"] = compiler.stream_pointer()
        self.product(**named)


def make_plan(
    call: Call,
    compiler: Compiler,
    zeros: Allocate | None = None,
    aligned: bool = True,
    shared: Allocate | None = None,
    keeps_weights: bool = False,
) -> Planned:
    """Decide the launches of an op that is bound to its inputs. Nothing is launched.

    zeros: gives the scratch that launches find and leave zero, where the caller keeps such; else each call makes it.
    shared: gives the scratch for an unpacked weight, which may be larger, and what a plan says is shared, where the
    caller keeps one for all calls; else each call makes it.
    keeps_weights: whether the codes of a weight by rows, which products of 8-bit floats take, may be kept beside it.
    aligned: whether all inputs begin at multiples of 16 bytes, as cuBLAS demands. Raises OpError for an op without
    kernels or sizes that they do not take, CompileError, and DeviceError.
    """
    op, signature = call.op, call.op.signature
    width = len(signature.ins)
    position = {spec.name: i for i, spec in enumerate(signature.ins)}
    new: list[Buffer] = []

    def buffer(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], zeroed: bool = False) -> Array:
        position[name] = width + len(new)
        new.append(Buffer(tuple(map(int, shape)), np.dtype(dtype), zeroed))
        return abstract(shape, dtype)

    way = _by_library(compiler, call) if aligned else None
    kept = keeps_weights and way is not None and way.kept
    if way is not None:
        plan = way.before
    elif op.kernels is not None:
        plan = op.kernels(call, compiler.limits)
    else:
        raise OpError(f"{op.name} has no CUDA kernel")
    actions: list[Action] = []
    zeros = zeros or (lambda name, shape, dtype: buffer(name, shape, dtype, zeroed=True))
    own: dict[str, Array] = {}

    def scratch(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        if shared is None or kept or name not in (UNPACKED, *plan.shared):
            return buffer(name, shape, dtype)
        own[name] = shared(name, shape, dtype)
        return own[name]

    for launch, bound in zip(plan.launches, bind_plan(plan, call, scratch, zeros), strict=True):
        function = compiler.function(bound.file, bound.expression, bound.shared, bound.prototype.waits)
        actions.append(_Launch(function, bound, position, launch))
    if way is not None:
        if compiler.workspace:
            buffer("workspace", (compiler.workspace,), np.dtype(np.uint8))
        _insert_products(actions, way, compiler, position | own, call.dtype(signature.outs[0]).itemsize)
    outs = tuple(position[spec.name] for spec in signature.outs)
    found = Planned(width, outs, tuple(new), sum(i >= width for i in outs), tuple(actions))
    if way is None:
        ahead = tuple(position[name] for name in plan.launches[0].ahead)
        return replace(found, ahead=ahead, waits_first=plan.launches[-1].waits_first)
    of_weight = tuple(position[name] for name in way.kept) if kept else ()
    return replace(found, weight=position["w"] if kept else -1, of_weight=of_weight)


def _insert_products(
    actions: list[Action], way: _Way, compiler: Compiler, arrays: Mapping[str, int | Array], itemsize: int
) -> None:
    """Put the products of a way among its launches. arrays: by name, or their numbers; itemsize: of the result."""
    pointers = {argument: arrays[array] for argument, array in way.arrays.items()}
    if "workspace" in arrays:
        pointers["workspace"] = arrays["workspace"]
    for part, product in reversed(way.products):  # from the last, so that the numbers of launches stay right
        actions.insert(part.launches, _Matmul(product, compiler, pointers, part.start * itemsize))


# ---- products by a library -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Part:
    """The product with rows ``start`` .. ``stop - 1`` of w, which follows the first ``launches`` launches.

    If there are several, each gives those columns of y = x w^T."""

    launches: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Way:
    """A way to compute an op by cuBLAS: launches, and products among them.

    arrays: for each argument of the products the name of its array; parts: what the products compute, in order; scales:
    of which kind those of 8-bit floats are, "" for products of T; kept: arrays that the first launch makes of the
    weight alone; products: the parts with their products, once those are planned.
    """

    before: Plan
    arrays: Mapping[str, str]
    parts: tuple[_Part, ...]
    scales: str = ""
    kept: tuple[str, ...] = ()
    products: tuple[tuple[_Part, Product], ...] = ()


def _by_library(compiler: Compiler, call: Call) -> _Way | None:
    """How cuBLAS computes the op; None if our kernels do."""
    matmul = call.op.matmul
    if matmul is None or (matmul.streamed and _streamed(call, compiler.limits)) or (cublas := compiler.cublas) is None:
        return None
    for way in _ways(call, compiler.activations == "fp8"):
        found = [(part, product) for part in way.parts if (product := _product(cublas, call, way, part)) is not None]
        if len(found) == len(way.parts):
            return replace(way, products=tuple(found))
    return None


def _streamed(call: Call, device: Device) -> bool:
    """Whether the op's own kernels compute it: up to so many rows of x, where they are faster. On a deterministic
    device one way serves any number of rows: the kernels where the weight is packed and they take many rows of x."""
    packed = segments_of(call.arrays["w"]) is not None
    if device.deterministic:
        return packed and many_rows_plan(call.op.name, call, device) is not None
    return bool(call["n"] <= (MAX_PACKED_ROWS if packed else MAX_STREAMED_ROWS))


def _product(cublas: Any, call: Call, way: _Way, part: _Part) -> Product | None:
    matmul = call.op.matmul
    assert matmul is not None
    n, m, k = (call[size] for size in matmul.sizes)
    T, U = dtype_name(call.dtypes["T"]), dtype_name(call.dtype(call.op.signature.outs[0]))
    terms: dict[str, Any] = {"bias": "b" in way.arrays, "add": "c" in way.arrays}
    if len(way.parts) > 1:
        terms["width"], m = m, part.stop - part.start
    if way.scales:
        return cublas.scaled_product(n, m, k, way.scales, U, fast=way.scales in FAST, **terms)  # type: ignore[no-any-return]
    return cublas.product(n, m, k, T, U, form=matmul.form, **terms)  # type: ignore[no-any-return]


def library_plans(call: Call) -> list[Plan]:
    """What may be launched before a library's products for the call; nothing for an op that no library computes."""
    return [way.before for way in _ways(call, True)] if call.op.matmul else []


def _ways(call: Call, eight_bit: bool = False) -> Iterator[_Way]:
    """The ways to compute a product, best first. eight_bit: those of 8-bit floats too."""
    assert call.op.matmul is not None
    kind = scale_kind(call) if eight_bit and call.op.matmul.form == "nt" else None
    if kind is not None:
        for before, arrays in _with_bias(call):
            yield _of_codes(call, before, arrays, kind)
    for before, arrays in _with_bias(call):
        yield _of_numbers(call, before, arrays)


def _of_codes(call: Call, before: Plan, arrays: Mapping[str, str], kind: str) -> _Way:
    """Products of 8-bit floats."""
    slices = row_slices(call["m"], call["k"], call.dtypes["T"].itemsize)
    unpacking = [unpack_codes_launch(call, start, stop) for start, stop in slices]
    # The first slice of the weight comes before everything else: where it is the only one, it can be kept.
    launches = [unpacking[0], *before.launches, quantise_launch(call, kind)]
    parts = [_Part(len(launches), *slices[0])]
    for launch, rows in zip(unpacking[1:], slices[1:], strict=True):
        launches.append(launch)
        parts.append(_Part(len(launches), *rows))
    weights = weight_scratch(call, parts[0].stop, kind)
    scratch = {**before.scratch, **row_scratch(call, kind), **weights}
    own = {"x": "x_codes", "w": UNPACKED, "x_scale": "x_scale", "w_scale": "w_scale"}
    kept = tuple(weights) if len(parts) == 1 else ()
    return _Way(Plan(tuple(launches), scratch), {**arrays, **own}, tuple(parts), kind, kept)


def _of_numbers(call: Call, before: Plan, arrays: Mapping[str, str]) -> _Way:
    """Products of T: what comes before them in T as well, and a packed weight as a plain matrix."""
    w, T = call.arrays[arrays["w"]], call.dtypes["T"]
    assert w is not None
    (rows, k), segments = w.shape, segments_of(w)
    launches, scratch, arrays = list(before.launches), dict(before.scratch), dict(arrays)
    if call.op.inner is not None:
        launches.append(call.op.inner(call))
        scratch["inner"] = (call["n"], k), dtype_name(T)
        arrays["x"] = "inner"
    if segments is None:
        return _Way(Plan(tuple(launches), scratch), arrays, (_Part(len(launches), 0, rows),))
    parts, summed = [], call.op.matmul is not None and call.op.matmul.form == "nn"
    for start, stop in [(0, rows)] if summed else row_slices(rows, k, T.itemsize):
        launches += unpack_launches(segments, k, start, stop)
        parts.append(_Part(len(launches), start, stop))
    scratch[UNPACKED] = (parts[0].stop, k), dtype_name(T)
    return _Way(Plan(tuple(launches), scratch), {**arrays, "w": UNPACKED}, tuple(parts))


def _with_bias(call: Call) -> Iterator[tuple[Plan, Mapping[str, str]]]:
    """Launches before a product that add its bias, and argument -> name of the array that it is."""
    assert call.op.matmul is not None
    made = {spec.name for spec in call.op.signature.outs}
    given = {operand: name for operand, name in call.op.matmul.arrays.items()
             if name in made or call.arrays.get(name) is not None}  # fmt: skip
    residual = {"c": given.pop("c")} if "c" in given else {}
    if given.pop("b", None) is None:
        yield Plan(()), given | residual
        return
    n, m = call["n"], call["m"]
    T, U = dtype_name(call.dtypes["T"]), dtype_name(call.dtype(call.op.signature.outs[0]))
    columns = -(-m // 256)
    if T == U:
        yield Plan(()), given | residual | {"b": "b"}
    else:
        cast = Launch("bias.cu:cast_bias", (columns,), (256,), constants={"U": U})
        yield Plan((cast,), {"bias": ((m,), U)}), given | residual | {"b": "bias"}
    constants = {"U": U} if residual else {"U": U, "a": None}
    fill = Launch("bias.cu:fill_rows", (columns, min(n, 65535)), (256,), constants=constants)
    yield Plan((fill,)), given | {"c": "y"}
