"""Single ops on a user's own CuPy arrays: what ``cuplama.ops.rms_norm(x, w, eps=1e-5)`` does there.

Nothing here owns a stream or memory. Kernels are launched on CuPy's current stream and device, outputs and scratch come
from CuPy's current allocator, and nothing waits, so a call may be part of a graph that the user captures. Launches are
ordinary ones: that a kernel starts before the one ahead has ended (PDL) is for streams on which all kernels are ours.

A plan is made once for an op, the shapes and dtypes of its arrays and its attributes. After that a call costs the host
a look into a dictionary, an allocation for each output, and the launch itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from ...dtypes import DTYPES, Array
from ...errors import DeviceError
from ...ops.calling import kind_of
from ...ops.launch import Device
from ...ops.op import Op
from ...ops.signature import OpError
from .cublas import Cublas, load_cublas
from .functions import Functions
from .planning import Buffer, Planned, make_plan
from .ranges import nvtx_ranges

__all__ = ["Eager", "run"]

_ALIGNMENT = 16  # bytes: what cuBLAS demands of an address, and kernels that load vectors
_OLDEST_BF16 = 80  # sm_80
_LEGACY_STREAM = 0  # CuPy's default, which cannot be captured
_MAX_PLANS = 8192  # that are kept, since shapes vary without end; then all are forgotten at once


def run(op: Op, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> Any:
    """Compute an op on CuPy arrays: the output, or a tuple of them. ``Op.__call__`` says what is raised."""
    return _executor()(op, ins, attrs)


@cache
def _executor() -> Eager:
    return Eager()


class _Card:
    """One GPU as plans need it: the ``Compiler`` of ``planning.py``."""

    workspace = 32 << 20  # bytes of scratch for a product of cuBLAS: what NVIDIA recommends for Hopper
    activations = "auto"

    def __init__(self, device: int) -> None:
        self.functions = Functions(device)
        self.limits: Device = self.functions.limits
        self._current_stream: Callable[[], int] = self.functions.cupy.cuda.get_current_stream
        self._loaded = False
        self._cublas: Cublas | None = None

    @property
    def cublas(self) -> Cublas | None:
        """The library, loaded when a product first asks for it. Its stream and workspace are those of each call."""
        if not self._loaded:
            self._loaded = True
            library = load_cublas()
            self._cublas = None if library is None else Cublas(library, 0, 0, self.workspace)
        return self._cublas

    def function(self, file: str, expression: str, shared: int, waits: bool = False) -> Callable[..., None]:
        """``f(grid, block, args, shared)``, launched on the stream that is current then."""
        return self.functions.kernel(file, expression, shared).kernel  # type: ignore[no-any-return]

    def address(self, array: Array) -> int:
        """Where the array begins in GPU memory."""
        return array.data.ptr  # type: ignore[no-any-return]

    def stream_pointer(self) -> int:
        """The address of CuPy's current stream."""
        return self._current_stream().ptr  # type: ignore[attr-defined,no-any-return]


class Eager:
    """Runs ops on CuPy arrays; one for the process."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._array: type = cupy.ndarray
        self._current_device: Callable[[], int] = cupy.cuda.runtime.getDevice
        self._current_stream: Callable[[], Any] = cupy.cuda.get_current_stream
        self._failures: tuple[type[Exception], ...] = (
            cupy.cuda.driver.CUDADriverError,
            cupy.cuda.runtime.CUDARuntimeError,
        )
        self._cards: dict[int, _Card] = {}
        self._plans: dict[Any, Planned] = {}
        self._captured: dict[Any, Array] = {}
        self._ranges = nvtx_ranges()

    def __call__(self, op: Op, ins: Sequence[Array | None], attrs: Mapping[str, Any]) -> Any:
        device = self._current_device()
        try:
            key = (op, device, *attrs.items(), *[None if a is None else _key(a) for a in ins])
            planned = self._plans.get(key)
        except (AttributeError, TypeError):  # no GPU array, or an attribute that is no number; planning says what
            key, planned = None, None
        if planned is None:
            planned = self._plan(op, ins, attrs, device)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            if key is not None:
                self._plans[key] = planned
        if self._ranges is None:
            return self._execute(planned, ins, device)
        with self._ranges(op.name):
            return self._execute(planned, ins, device)

    def _execute(self, planned: Planned, ins: Sequence[Array | None], device: int) -> Any:
        array, outs, made = self._array, planned.outs, planned.made
        arrays = [*ins, *[array(b.shape, b.dtype) for b in planned.new[:made]]]
        if len(planned.new) > made:
            arrays += self._scratch(planned.new[made:], device)
        for action in planned.actions:
            try:
                action(arrays)
            except self._failures as e:
                raise DeviceError(f"{action.text}: {e}") from e
        return arrays[outs[0]] if len(outs) == 1 else tuple([arrays[i] for i in outs])

    def _scratch(self, buffers: Sequence[Buffer], device: int) -> list[Array]:
        """The scratch of a call. It goes back to the user's pool when the call ends, in order with the stream."""
        array, stream = self._array, self._current_stream()
        if stream.ptr != _LEGACY_STREAM and stream.is_capturing():
            found = self._captured_scratch(buffers, device, stream.ptr)
        else:
            found = [array(b.shape, b.dtype) for b in buffers]
        for buffer, made in zip(buffers, found, strict=True):
            if buffer.zeroed:
                made.data.memset_async(0, made.nbytes, stream)
        return found

    def _captured_scratch(self, buffers: Sequence[Buffer], device: int, stream: int) -> list[Array]:
        """Under capture it is kept, for the graph uses it at every replay: one for all graphs that are captured on a
        stream."""
        found = []
        for number, b in enumerate(buffers):
            key = (device, stream, number, b.shape, b.dtype)
            if key not in self._captured:
                self._captured[key] = self._array(b.shape, b.dtype)
            found.append(self._captured[key])
        return found

    def _plan(self, op: Op, ins: Sequence[Array | None], attrs: Mapping[str, Any], device: int) -> Planned:
        """Check everything that a user can get wrong, and decide the launches."""
        aligned = True
        for spec, array in zip(op.signature.ins, ins, strict=True):
            if array is None:
                continue
            where = f"{op.name}: {spec.name}"
            if not isinstance(array, self._array):
                mixed = "; arrays of both kinds do not mix" if isinstance(array, np.ndarray) else ""
                shown = "a numpy.ndarray, not a CuPy array" if mixed else kind_of(array)
                raise OpError(f"{where} is {shown}{mixed}")
            if array.data.device_id != device:  # type: ignore[attr-defined]
                raise OpError(
                    f"{where} lies on GPU {array.data.device_id}, and GPU {device} is current;"  # type: ignore[attr-defined]
                    f" use it inside `with cupy.cuda.Device({array.data.device_id}):`"  # type: ignore[attr-defined]
                )
            if array.data.ptr % _ALIGNMENT:  # type: ignore[attr-defined]
                aligned = False
                if not op.unaligned:
                    raise OpError(
                        f"{where} does not begin at a multiple of {_ALIGNMENT} bytes; {spec.name}.copy() does"
                    )
        call = op.called(ins, attrs)
        card = self._cards.get(device)
        if card is None:
            card = self._cards[device] = _Card(device)
        if call.dtypes.get("T") == DTYPES["bf16"] and card.limits.arch < _OLDEST_BF16:
            raise OpError(f"{op.name}: {card.functions.name} (sm_{card.limits.arch}) has no bf16; f16 or f32 will do")
        return make_plan(call, card, aligned=aligned)


def _key(array: Array) -> tuple[Any, ...]:
    """What a plan depends on, of an array."""
    data = array.data
    # Strides tell whether it is contiguous: CuPy makes an object for every look at ``flags``, so they take longer.
    return array.shape, array.strides, array.dtype, data.device_id, data.ptr % _ALIGNMENT == 0
