"""The CUDA backend: every op as kernels of ``cuda_src/``, compiled at run time for the GPU at hand.

It decides when an array is dead, and keeps the plans of ``planning.py``: a decode step then costs a few microseconds of
Python per node.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...dtypes import DTYPES, Array
from ...ops import OPS
from ...ops.abstract import attributes
from ...ops.node import Node, dying, executable
from ...ops.op import Op
from ...ops.signature import OpError
from ...ops.unpacking import UNPACKED
from ...ops.weights import segments_of
from ...quant.packed import packed
from ...quant.stored import Segment
from ...quant.weight import Weight
from .gpu import STAGE, Gpu
from .loading import Loading, convert
from .planning import Planned, make_plan
from .queued import CapturedGraph, Event, Fetch, failure
from .ranges import nvtx_ranges
from .unpacking import largest_slice

__all__ = ["CapturedGraph", "CudaBackend", "Event", "Fetch", "convert"]

_log = logging.getLogger("cuplama")


@dataclass(frozen=True)
class _Prepared:
    """A node made ready to run. key: of op and attributes, see ``_key``; dead: names of values not used after it."""

    node: Node
    op: Op
    key: int
    dead: tuple[str, ...]


class CudaBackend:
    """The ``Backend`` of an NVIDIA GPU. dtype: "f32", "f16" or "bf16"; activations, deterministic: as of ``load``.

    bf16 needs sm_80; on older GPUs the model runs in fp16, with a warning on the ``cuplama`` logger. Environment:
    CUPLAMA_CHECK=1 fills outputs and scratch with NaN before every node and waits after it, so that an error names its
    node; CUPLAMA_NVTX=1 marks each node and each replay with a range for Nsight Systems. Raises DeviceError if there is
    no usable GPU, CompileError if a kernel does not compile.

    keeps_codes: whether the codes of weights of 8-bit floats are kept by rows beside the packed ones, where products of
    many rows take them so: a byte more for each number, and 0.7 of 6.9 seconds less for 512 requests of an 8B model.
    checking: whether it does so, at first by the environment; replay_hook: makes a context manager that is entered
    around the queueing of every replay of a captured graph, for those who time replays.
    """

    name = "cuda"
    forks = False  # CUDA does not work in a child that was forked
    prefill_chunks = (8192, 4096, 2048, 1024, 512)  # tokens of a pass at most; the first that the memory has room for
    prefill_chunk = prefill_chunks[0]
    captures = True
    _MAX_LISTS = 64  # node lists whose liveness is kept; when there are more, all are forgotten at once
    _MAX_PLANS = 8192  # plans that are kept, since shapes of prompts vary without end; then all are forgotten at once

    def __init__(
        self,
        dtype: str = "bf16",
        device: int = 0,
        gpu: Gpu | None = None,
        activations: str = "auto",
        deterministic: bool = False,
    ) -> None:
        self.gpu = gpu or Gpu(device)
        self.deterministic = deterministic
        if deterministic:
            self.gpu.fix_sums()
        if dtype == "bf16" and self.gpu.limits.arch < 80:
            _log.warning("%s (sm_%d) has no bf16; running in fp16", self.gpu.name, self.gpu.limits.arch)
            dtype = "f16"
        self.dtype = DTYPES[dtype]
        self.activations = self.gpu.activations = self._possible(activations)
        self.checking = os.environ.get("CUPLAMA_CHECK", "") not in ("", "0")
        self._keys: dict[tuple[Any, ...], int] = {}
        self._plans: dict[tuple[Any, ...], Planned] = {}
        self._before: tuple[Planned, Node] | None = None  # what was queued directly before, if a node list is run
        self._zeroed: dict[tuple[tuple[int, ...], np.dtype[Any]], Array] = {}
        self._kept: dict[tuple[str, tuple[int, ...], np.dtype[Any]], Array] = {}
        self._prepared: dict[tuple[int, tuple[str, ...]], tuple[Sequence[Node], list[_Prepared]]] = {}
        self._codes: dict[int, tuple[Array, list[Array]]] = {}  # by the id of a weight: itself, and what is kept
        self.keeps_codes = False
        self._loading: Loading | None = None
        self._packed: dict[str, tuple[int, ...]] = {}
        self._shared: list[Array] = []
        self._ranges = ranges = nvtx_ranges()
        self.replay_hook: Callable[[], AbstractContextManager[Any]] = nullcontext
        if ranges is not None:
            self.replay_hook = lambda: ranges("replay of a captured graph")

    def _possible(self, activations: str) -> str:
        """The activations that were asked for; "auto", with a warning, where products of 8-bit floats cannot be had."""
        reason, cublas = "", self.gpu.cublas
        if activations == "auto":
            return activations
        if self.dtype.itemsize != 2:
            reason = f"the model runs in {self.dtype.name}, and products of 8-bit floats stand in for 16-bit ones"
        elif cublas is None or cublas.scaled_product(128, 128, 128, "row", "f32", fast=True) is None:
            card = f"{self.gpu.name} (sm_{self.gpu.limits.arch})"
            reason = f"products of 8-bit floats need sm_90 and cuBLAS 12.9, and this is {card}"
        if reason:
            _log.warning("activations fp8 changes nothing: %s", reason)
        return "auto" if reason else activations

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
                raise failure("a kernel before this point", e) from e

    def upload(self, array: Array) -> Array:
        if segments_of(array) is not None:  # a quantised weight in host memory; loading has a faster way
            host = packed(array)
            return replace(host, segments=tuple(self._upload_segment(s) for s in host.segments))
        array = np.ascontiguousarray(array)
        with self._on_gpu() as gpu:
            out = gpu.empty(array.shape, array.dtype)
            gpu.write(out, array)
        return out

    def _upload_segment(self, segment: Segment) -> Segment:
        order = None if segment.order is None else self.upload(segment.order)
        return replace(segment, data=self.upload(segment.data), order=order)

    def download(self, array: Array) -> np.ndarray[Any, Any]:
        with self._on_gpu() as gpu:
            gpu.check("the array to download", array)
            return gpu.read(array)

    def fetch(self, arrays: Sequence[Array]) -> Fetch:
        with self._on_gpu() as gpu:
            copies = [gpu.fetch(array) for array in arrays]
            return Fetch(copies, Event(gpu.event(), gpu.failures))

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        with self._on_gpu() as gpu:
            out = gpu.empty(tuple(shape), np.dtype(dtype))
            gpu.fill(out, 0)
        return out

    def transpose(self, array: Array) -> Array:
        """The transpose of a matrix, contiguous."""
        with self._on_gpu() as gpu:
            out = gpu.empty(array.shape[::-1], array.dtype)
            gpu.transpose(out, array)
        return out

    def load_weight(self, weight: Weight) -> Array:
        """A checkpoint weight in the backend's dtype, through the pinned buffers; copies are queued, not awaited.

        Some have a dtype of their own; one with quantised parts is packed on the way. Raises CheckpointError naming a
        tensor whose values float16 cannot hold.
        """
        with self._on_gpu() as gpu:
            if weight.packed:
                self._loading = self._loading or Loading(gpu, self.dtype)
                self._packed[weight.name] = weight.shape
                return self._loading.pack(weight)
            dtype = weight.device_dtype(self.dtype)
            out = gpu.empty(weight.shape, dtype)
            widest = max(1, dtype.itemsize // weight.dtype.itemsize)
            for offset, chunk in weight.chunks(STAGE // widest):
                gpu.stage(out, offset, convert(chunk, dtype, weight.name))
        return out

    def end_loading(self) -> None:
        """Wait for the copies of weights and give the pinned buffers back."""
        self._loading = None
        with self._on_gpu() as gpu:
            gpu.end_staging()

    def write(self, array: Array, host: np.ndarray[Any, Any]) -> None:
        """Overwrite a device array with a host array of its shape and dtype, in order with what is queued."""
        if array.shape != host.shape:
            raise OpError(f"cannot write an array of shape {host.shape} over one of shape {array.shape}")
        with self._on_gpu() as gpu:
            gpu.write(array, np.ascontiguousarray(host, array.dtype))

    def copy(self, array: Array, source: Array) -> None:
        """Overwrite a contiguous device array with another of its shape and dtype, in order with what is queued."""
        with self._on_gpu() as gpu:
            gpu.copy(array, source)

    def host_ring(self, shape: tuple[int, int]) -> tuple[np.ndarray[Any, Any], Array]:
        """Pinned int32 host memory that kernels write directly: the host's view, and the array that ops take."""
        with self._on_gpu() as gpu:
            return gpu.pinned(shape, DTYPES["i32"])

    def capture(self, body: Callable[[], None], sharing: CapturedGraph | None = None) -> CapturedGraph:
        """A body of calls that runs once as it is and from then on as one CUDA graph."""
        return CapturedGraph(self, body, sharing)

    def synchronize(self) -> None:
        """Wait for everything queued. Raises DeviceError if some of it failed."""
        with self._on_gpu() as gpu:
            gpu.synchronize()

    # -- running

    def call(self, op: Op, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> tuple[Array, ...]:
        """Run one op. Raises OpError for arrays that do not fit its signature, DeviceError for a failed launch."""
        with self._on_gpu():
            self._before = None
            execute = self._execute if self._ranges is None else self._marked
            return execute(op, self._key(op, attrs), ins, attrs)

    def run(self, nodes: Sequence[Node], values: dict[str, Array], keep: Sequence[str]) -> dict[str, Array]:
        """Run a node list. The list must not change after its first run: liveness and ids are worked out once."""
        live = {"": None, **values}
        execute = self._execute if self._ranges is None else self._marked
        with self._on_gpu():
            self._before = None
            for ready in self._prepare(nodes, tuple(keep)):
                node = ready.node
                outs = execute(ready.op, ready.key, [live[n] for n in node.ins], node.attrs, node)
                for name, array in zip(node.outs, outs, strict=True):
                    live[name] = array
                del outs
                for name in ready.dead:
                    del live[name]
        return {name: live[name] for name in keep}

    def _marked(
        self, op: Op, op_key: int, ins: Sequence[Array | None], attrs: Mapping[str, Any], node: Node | None = None
    ) -> tuple[Array, ...]:
        """``_execute`` in a range with the name of the node, or of the op where it is called alone."""
        assert self._ranges is not None
        with self._ranges(op.name if node is None else str(node)):
            return self._execute(op, op_key, ins, attrs, node)

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
        kept = self._codes_of(planned, ins[planned.weight]) if planned.of_weight and self.keeps_codes else {}
        new = (kept[i] if i in kept else gpu.empty(b.shape, b.dtype) for i, b in enumerate(planned.new, planned.width))
        arrays = [*ins, *[None] * (planned.width - len(ins)), *new]
        if self.checking:
            for i in range(planned.width, len(arrays)):
                if i not in kept:
                    gpu.fill(arrays[i], 0xFF)  # NaN in every float dtype
        ahead = node is not None and self._reads_ahead(planned, node)
        self._before = None if node is None else (planned, node)
        for action in planned.actions[bool(kept) :]:
            try:
                action(arrays, ahead)
            except gpu.failures as e:
                raise failure(action.text, e, node) from e
            ahead = False
        if self.checking:
            try:
                gpu.synchronize()
            except gpu.failures as e:
                raise failure("; ".join(a.text for a in planned.actions), e, node) from e
        return tuple(arrays[i] for i in planned.outs)

    def _reads_ahead(self, planned: Planned, node: Node) -> bool:
        """Whether the first launch of a node may read what it can before it waits: all launches but the one directly
        before have ended when it starts, and that one writes none of it."""
        if not planned.ahead or self._before is None:
            return False
        before, writer = self._before
        return before.waits_first and not {node.ins[i] for i in planned.ahead} & {*writer.outs}

    def _codes_of(self, planned: Planned, weight: Array) -> dict[int, Array]:
        """What the first action of a plan makes of a weight alone, by the numbers of the arrays: made once, and kept.

        Nothing while a graph is captured, which would make it at every replay: what it runs has run before.
        """
        if id(weight) not in self._codes:
            if self.gpu.is_capturing:
                return {}
            buffers = [planned.new[i - planned.width] for i in planned.of_weight]
            found = [self._lasting(b.shape, b.dtype) for b in buffers]
            arrays: list[Array | None] = [None] * (planned.width + len(planned.new))
            arrays[planned.weight] = weight
            for i, array in zip(planned.of_weight, found, strict=True):
                arrays[i] = array
            planned.actions[0](arrays)
            self._codes[id(weight)] = weight, found
        return dict(zip(planned.of_weight, self._codes[id(weight)][1], strict=True))

    def _plan(self, op: Op, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> Planned:
        """Check the arrays against the op's signature and decide the launches."""
        for spec, array in zip(op.signature.ins, ins, strict=False):
            if array is not None:
                self.gpu.check(f"{op.name}: {spec.name}", array)
        call = op.bind(ins, attributes(op, attrs, self.dtype))
        return make_plan(call, self.gpu, self._zeros, shared=self._scratch, keeps_weights=self.keeps_codes)

    def _zeros(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Scratch that kernels find and leave zero, so all share it. Never freed: captured graphs use it."""
        if (shape, dtype) not in self._zeroed:
            array = self._zeroed[shape, dtype] = self._lasting(shape, dtype)
            self.gpu.fill(array, 0)
        return self._zeroed[shape, dtype]

    def _lasting(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Memory that outlives the pass that asks for it: not from the pool of a captured graph, where what another
        graph writes to may be taken for free."""
        with self.gpu.drawing_from(self.gpu.main_pool):
            return self.gpu.empty(shape, dtype)

    def _scratch(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Scratch that all calls share, one after the other in the stream: for the numbers of a packed weight, one for
        all products, and what plans name so. Never freed: captured graphs use it."""
        if name != UNPACKED:
            if (name, shape, dtype) not in self._kept:
                self._kept[name, shape, dtype] = self._lasting(shape, dtype)
            return self._kept[name, shape, dtype]
        count = math.prod(shape)
        found = next((a for a in self._shared if a.dtype == dtype and a.size >= count), None)
        if found is None:
            largest = largest_slice(self._packed, dtype.itemsize) // dtype.itemsize
            found = self._lasting((max(count, largest),), dtype)
            self._shared.append(found)
        return found

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
        self._kept.clear()
        self._codes.clear()
        self._shared.clear()
        self._loading = None
        self.gpu.close()
