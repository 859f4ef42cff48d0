"""The CUDA backend: every op as kernels of ``cuda_src/``, compiled at run time for the GPU at hand.

It plans: which launches compute an op, on which arrays, and when an array is dead. The plan of an op depends only on
shapes, dtypes and attributes, so it is made once and repeated; a decode step then costs a few microseconds of Python
per node.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...dtypes import DTYPES, Array, dtype_name
from ...errors import CheckpointError, DeviceError
from ...ops import OPS
from ...ops.abstract import attributes
from ...ops.binding import BoundLaunch, bind_plan
from ...ops.launch import Launch, Plan
from ...ops.linear import MAX_STREAMED_ROWS
from ...ops.node import Node, dying, executable
from ...ops.op import Call, Op
from ...ops.signature import OpError
from ...quant.format import plain_format
from ...quant.weight import Weight
from .cublas import Cublas, Product
from .gpu import STAGE, Gpu

__all__ = ["CapturedGraph", "CudaBackend", "Event", "convert", "library_plans"]

_log = logging.getLogger("cuplama")


class _Launch:
    """A kernel launch without its arrays. pointers: (number of an argument, number of the array that it takes)."""

    __slots__ = ("args", "block", "function", "grid", "pointers", "shared", "text")

    def __init__(
        self, function: Callable[..., None], bound: BoundLaunch, position: Mapping[str, int], fixed: set[str]
    ) -> None:
        """position: parameter name -> number of its array; fixed: names whose value belongs to the launch itself."""
        self.function, self.grid, self.block, self.shared = function, bound.grid, bound.block, bound.shared
        self.text = bound.describe()
        names = [p.name if p.pointer and p.name not in fixed else "" for p in bound.prototype.parameters]
        given = [name in position and not isinstance(a, np.generic) for name, a in zip(names, bound.args, strict=True)]
        self.pointers = [(i, position[name]) for i, name in enumerate(names) if given[i]]
        self.args = [None if given[i] else a for i, a in enumerate(bound.args)]

    def __call__(self, arrays: Sequence[Array | None]) -> None:
        args = self.args.copy()
        for i, j in self.pointers:
            args[i] = arrays[j]
        self.function(self.grid, self.block, tuple(args), self.shared)


class _Matmul:
    """A cuBLAS product without its arrays. pointers: name of an argument -> number of the array that it takes."""

    __slots__ = ("address", "pointers", "product", "text")

    def __init__(self, product: Product, address: Callable[[Array], int], pointers: Mapping[str, int]) -> None:
        self.product, self.address, self.pointers, self.text = product, address, pointers, product.text

    def __call__(self, arrays: Sequence[Array | None]) -> None:
        self.product(**{name: self.address(arrays[i]) for name, i in self.pointers.items()})


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
class _Prepared:
    """A node made ready to run. key: of op and attributes, see ``_key``; dead: names of values not used after it."""

    node: Node
    op: Op
    key: int
    dead: tuple[str, ...]


class Event:
    """A point in the stream."""

    def __init__(self, event: Any, failures: tuple[type[Exception], ...]) -> None:
        self._event, self._failures = event, failures

    def synchronize(self) -> None:
        """Wait until the GPU has passed it. Raises DeviceError if something before it failed."""
        try:
            self._event.synchronize()
        except self._failures as e:
            raise _failure("a kernel before this point", e) from e


class CapturedGraph:
    """Repeats a body of calls as one CUDA graph.

    The first replay runs the body call by call, which compiles kernels and makes plans. The second captures it. Both
    take memory from a pool of the graph's own, so that nobody else gets what the graph writes to while it is there.
    """

    def __init__(self, backend: CudaBackend, body: Callable[[], None]) -> None:
        self._backend, self._gpu, self._body = backend, backend.gpu, body
        self._pool = backend.gpu.new_pool()
        self._graph: Any = None
        self._warm = False

    def replay(self) -> Event:
        """Queue the body once; the event is behind it. Raises DeviceError if the GPU refuses."""
        with self._gpu as gpu:
            try:
                if self._graph is None:
                    with gpu.drawing_from(self._pool):
                        if self._warm and not self._backend.checking:
                            self._graph = gpu.capture(self._body)
                        else:
                            self._body()
                            self._warm = True
                if self._graph is not None:
                    with self._backend.replay_hook():
                        self._graph.launch(gpu.stream)
                return Event(gpu.event(), gpu.failures)
            except gpu.failures as e:
                raise _failure("a captured graph", e) from e

    def close(self) -> None:
        """Give back the graph and its memory. It cannot be replayed afterwards."""
        with self._gpu as gpu, suppress(*gpu.failures):
            gpu.synchronize()
            del self._graph, self._body
            self._pool.free_all_blocks()


class CudaBackend:
    """The ``Backend`` of an NVIDIA GPU. dtype: "f32", "f16" or "bf16".

    bf16 needs sm_80; on older GPUs the model runs in fp16, with a warning on the ``cuplama`` logger. Environment:
    CUPLAMA_CHECK=1 fills outputs and scratch with NaN before every node and waits after it, so that an error names its
    node. Raises DeviceError if there is no usable GPU, CompileError if a kernel does not compile.

    checking: whether it does so, at first by the environment; replay_hook: makes a context manager that is entered
    around the queueing of every replay of a captured graph, for those who time replays.
    """

    name = "cuda"
    forks = False  # CUDA does not work in a child that was forked
    prefill_chunks = (4096, 2048, 1024, 512)  # tokens of a prefill pass at most; the first that the memory has room for
    prefill_chunk = prefill_chunks[0]
    captures = True
    _MAX_LISTS = 64  # node lists whose liveness is kept; when there are more, all are forgotten at once
    _MAX_PLANS = 8192  # plans that are kept, since shapes of prompts vary without end; then all are forgotten at once

    def __init__(self, dtype: str = "bf16", device: int = 0, gpu: Gpu | None = None) -> None:
        self.gpu = gpu or Gpu(device)
        if dtype == "bf16" and self.gpu.limits.arch < 80:
            _log.warning("%s (sm_%d) has no bf16; running in fp16", self.gpu.name, self.gpu.limits.arch)
            dtype = "f16"
        self.dtype = DTYPES[dtype]
        self.checking = os.environ.get("CUPLAMA_CHECK", "") not in ("", "0")
        self._keys: dict[tuple[Any, ...], int] = {}
        self._plans: dict[tuple[Any, ...], _Planned] = {}
        self._zeroed: dict[tuple[tuple[int, ...], np.dtype[Any]], Array] = {}
        self._prepared: dict[tuple[int, tuple[str, ...]], tuple[Sequence[Node], list[_Prepared]]] = {}
        self.replay_hook: Callable[[], AbstractContextManager[Any]] = nullcontext

    # -- arrays

    def describe(self) -> str:
        return self.gpu.describe()

    @property
    def compile_seconds(self) -> float:
        """Seconds spent on compiling kernels, or on finding them in the cache and loading them."""
        return self.gpu.compile_seconds

    def free_memory(self) -> int:
        """Bytes of GPU memory that can still be allocated."""
        return self.gpu.free_memory()

    def when_short_of_memory(self, give_back: Callable[[], None]) -> None:
        """Call ``give_back``, which drops what is kept only for speed, before an allocation fails."""
        self.gpu.give_back = give_back

    @contextmanager
    def _on_gpu(self) -> Iterator[Gpu]:
        """Inside, the GPU is current, and what CUDA complains about is a DeviceError: as a rule an earlier kernel."""
        with self.gpu as gpu:
            try:
                yield gpu
            except gpu.failures as e:
                raise _failure("a kernel before this point", e) from e

    def upload(self, array: np.ndarray[Any, Any]) -> Array:
        array = np.ascontiguousarray(array)
        with self._on_gpu() as gpu:
            out = gpu.empty(array.shape, array.dtype)
            gpu.write(out, array)
        return out

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        with self._on_gpu() as gpu:
            gpu.check("the array to download", array)
            return gpu.read(array)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        with self._on_gpu() as gpu:
            out = gpu.empty(tuple(shape), np.dtype(dtype))
            gpu.fill(out, 0)
        return out

    def load_weight(self, weight: Weight) -> Array:
        """A checkpoint weight in the backend's dtype, through the pinned buffers; copies are queued, not awaited.

        Raises CheckpointError naming a tensor whose values float16 cannot hold.
        """
        with self._on_gpu() as gpu:
            out = gpu.empty(weight.shape, self.dtype)
            widest = max(1, self.dtype.itemsize // weight.dtype.itemsize)
            for offset, chunk in weight.chunks(STAGE // widest):
                gpu.stage(out, offset, convert(chunk, self.dtype, weight.name))
        return out

    def end_loading(self) -> None:
        """Wait for the copies of weights and give the pinned buffers back."""
        with self._on_gpu() as gpu:
            gpu.end_staging()

    def write(self, array: Array, host: np.ndarray[Any, Any]) -> None:
        """Overwrite a device array with a host array of its shape and dtype, in order with what is queued."""
        if array.shape != host.shape:
            raise OpError(f"cannot write an array of shape {host.shape} over one of shape {array.shape}")
        with self._on_gpu() as gpu:
            gpu.write(array, np.ascontiguousarray(host, array.dtype))

    def host_ring(self, shape: tuple[int, int]) -> tuple[np.ndarray[Any, Any], Array]:
        """Pinned int32 host memory that kernels write directly: the host's view, and the array that ops take."""
        with self._on_gpu() as gpu:
            return gpu.pinned(shape, DTYPES["i32"])

    def capture(self, body: Callable[[], None]) -> CapturedGraph:
        """A body of calls that runs once as it is and from then on as one CUDA graph."""
        return CapturedGraph(self, body)

    def synchronize(self) -> None:
        """Wait for everything queued. Raises DeviceError if some of it failed."""
        with self._on_gpu() as gpu:
            gpu.synchronize()

    # -- running

    def call(self, op: Op, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> tuple[Array, ...]:
        """Run one op. Raises OpError for arrays that do not fit its signature, DeviceError for a failed launch."""
        with self._on_gpu():
            return self._execute(op, self._key(op, attrs), ins, attrs)

    def run(self, nodes: Sequence[Node], values: dict[str, Array], keep: Sequence[str]) -> dict[str, Array]:
        """Run a node list. The list must not change after its first run: liveness and ids are worked out once."""
        live = {"": None, **values}
        with self._on_gpu():
            for ready in self._prepare(nodes, tuple(keep)):
                node = ready.node
                outs = self._execute(ready.op, ready.key, [live[n] for n in node.ins], node.attrs, node)
                for name, array in zip(node.outs, outs, strict=True):
                    live[name] = array
                del outs
                for name in ready.dead:
                    del live[name]
        return {name: live[name] for name in keep}

    def _execute(
        self, op: Op, op_key: int, ins: Sequence[Array | None], attrs: Mapping[str, Any], node: Node | None = None
    ) -> tuple[Array, ...]:
        gpu = self.gpu
        try:
            key = (op_key, *[None if a is None else gpu.key(a) for a in ins])
        except AttributeError:
            key = ()  # something that is no GPU array; planning says what
        planned = self._plans.get(key)
        if planned is None:
            planned = self._plan(op, ins, attrs)
            if len(self._plans) >= self._MAX_PLANS:
                self._plans.clear()
            self._plans[key] = planned
        arrays = [*ins, *[None] * (planned.width - len(ins)), *[gpu.empty(*new) for new in planned.new]]
        if self.checking:
            for array in arrays[planned.width :]:
                gpu.fill(array, 0xFF)  # NaN in every float dtype
        for action in planned.actions:
            try:
                action(arrays)
            except gpu.failures as e:
                raise _failure(action.text, e, node) from e  # type: ignore[attr-defined]
        if self.checking:
            try:
                gpu.synchronize()
            except gpu.failures as e:
                raise _failure("; ".join(a.text for a in planned.actions), e, node) from e  # type: ignore[attr-defined]
        return tuple(arrays[i] for i in planned.outs)

    def _plan(self, op: Op, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> _Planned:
        """Check the arrays against the op's signature and decide the launches."""
        gpu, signature = self.gpu, op.signature
        for spec, array in zip(signature.ins, ins, strict=False):
            if array is not None:
                gpu.check(f"{op.name}: {spec.name}", array)
        call = op.bind(ins, attributes(op, attrs, self.dtype))
        width = len(signature.ins)
        arrays: list[Array | None] = [*ins, *[None] * (width - len(ins))]
        position = {spec.name: i for i, spec in enumerate(signature.ins)}
        new: list[tuple[tuple[int, ...], np.dtype[Any]]] = []

        def empty(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
            position[name] = len(arrays)
            new.append((shape, dtype))
            arrays.append(gpu.empty(shape, dtype))
            return arrays[-1]

        actions: list[Callable[[Sequence[Array | None]], None]] = []
        way = _by_library(gpu.cublas, call)
        if way is not None:
            plan = way.before
        elif op.kernels is not None:
            plan = op.kernels(call, gpu.limits)
        else:
            raise OpError(f"{op.name} has no CUDA kernel")
        for launch, bound in zip(plan.launches, bind_plan(plan, call, empty, self._zeros), strict=True):
            function = gpu.function(bound.file, bound.expression, bound.shared, bound.prototype.waits)
            actions.append(_Launch(function, bound, position, set(launch.constants)))
        if way is not None:
            pointers = {argument: position[array] for argument, array in way.arrays.items()}
            actions.append(_Matmul(way.product, gpu.address, pointers))
        outs = tuple(position[spec.name] for spec in signature.outs)
        return _Planned(width, outs, tuple(new), tuple(actions))

    def _zeros(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Scratch that kernels find and leave zero, so all share it. Never freed: captured graphs use it."""
        if (shape, dtype) not in self._zeroed:
            array = self._zeroed[shape, dtype] = self.gpu.empty(shape, dtype)
            self.gpu.fill(array, 0)
        return self._zeroed[shape, dtype]

    def _key(self, op: Op, attrs: Mapping[str, Any]) -> int:
        """A small number for an op with its attributes; layers that differ in nothing else share their plans."""
        return self._keys.setdefault((op, *sorted(attributes(op, attrs, self.dtype).items())), len(self._keys))

    def _prepare(self, nodes: Sequence[Node], keep: tuple[str, ...]) -> list[_Prepared]:
        """The nodes of a list made ready, with the names that die after each; worked out once per list."""
        known = self._prepared.get((id(nodes), keep))
        if known is not None and known[0] is nodes:
            return known[1]
        flat = executable(nodes)
        ready = [
            _Prepared(node, OPS[node.op], self._key(OPS[node.op], node.attrs), dead)
            for node, dead in zip(flat, dying(flat, keep), strict=True)
        ]
        if len(self._prepared) >= self._MAX_LISTS:
            self._prepared.clear()
        self._prepared[id(nodes), keep] = (nodes, ready)
        return ready

    def close(self) -> None:
        """Give back everything: plans, modules, pool, pinned buffers, cuBLAS. The backend cannot be used afterwards."""
        self._plans.clear()
        self._prepared.clear()
        self._zeroed.clear()
        self.gpu.close()


@dataclass(frozen=True)
class _Way:
    """A product of cuBLAS, the launches before it, and the name of its array for each argument of the product."""

    before: Plan
    arrays: Mapping[str, str]
    product: Product


def _by_library(cublas: Cublas | None, call: Call) -> _Way | None:
    """How cuBLAS computes the op; None if our kernels do."""
    if cublas is None or not call.op.matmul or call["n"] <= MAX_STREAMED_ROWS:
        return None
    n, m, k = call["n"], call["m"], call["k"]
    T, U = dtype_name(call.dtypes["T"]), dtype_name(call.dtype(call.op.signature.outs[0]))
    for before, arrays in _ways(call):
        product = cublas.product(n, m, k, T, U, bias="b" in arrays, add="c" in arrays)
        if product is not None:
            return _Way(before, arrays, product)
    return None


def library_plans(call: Call) -> list[Plan]:
    """What may be launched before a library's product for the call; nothing for an op that no library computes."""
    return [before for before, _ in _ways(call)] if call.op.matmul else []


def _ways(call: Call) -> Iterator[tuple[Plan, Mapping[str, str]]]:
    """The ways to compute a product, best first: launches before it, and argument -> name of the array that it is."""
    n, m = call["n"], call["m"]
    T, U = dtype_name(call.dtypes["T"]), dtype_name(call.dtype(call.op.signature.outs[0]))
    given, columns = {"x": "x", "w": "w", "y": "y"}, -(-m // 256)
    residual = {"c": "a"} if "a" in call.arrays else {}
    if call.arrays["b"] is None:
        yield Plan(()), given | residual
        return
    if T == U:
        yield Plan(()), given | residual | {"b": "b"}
    else:
        cast = Launch("bias.cu:cast_bias", (columns,), (256,), constants={"U": U})
        yield Plan((cast,), {"bias": ((m,), U)}), given | residual | {"b": "bias"}
    constants = {"U": U} if residual else {"U": U, "a": None}
    fill = Launch("bias.cu:fill_rows", (columns, min(n, 65535)), (256,), constants=constants)
    yield Plan((fill,)), given | {"c": "y"}


def convert(chunk: np.ndarray[Any, Any], dtype: np.dtype[Any], name: str) -> np.ndarray[Any, Any]:
    """A chunk of a weight in another dtype. Raises CheckpointError if float16 cannot hold a finite value of it."""
    if chunk.dtype == dtype:
        return chunk
    chunk = plain_format(chunk.dtype).decode(chunk)
    with np.errstate(over="ignore"):
        out = chunk.astype(dtype, copy=False)
    if dtype == np.float16 and not np.isfinite(out).all() and np.isfinite(chunk).all():
        largest = float(np.abs(chunk).max())
        raise CheckpointError(f"weight {name} holds {largest:g}, which float16 cannot; --dtype float32 can")
    return out


def _failure(what: str, error: Exception, node: Node | None = None) -> DeviceError:
    hint = "" if node is not None else " (CUPLAMA_CHECK=1 names the node)"
    return DeviceError(f"{f'node {node}: ' if node is not None else ''}{what}: {error}{hint}")
