"""The kernels of one GPU, compiled when they are first launched: through CuPy, whose disk cache keeps them.

CuPy is imported when a ``Functions`` is made, not before.
"""

from __future__ import annotations

import time
from typing import Any

from ...errors import DeviceError
from ...ops.launch import Device
from .driver import cuda_available
from .nvrtc import compile_error
from .toolkit import options, source, version

__all__ = ["Functions"]


class Functions:
    """One GPU, what it is, and its compiled kernels. Raises DeviceError if it cannot be used.

    cupy: the module; device: CuPy's; limits: what launches may depend on; failures: the exceptions of CUDA.
    """

    compile_seconds = 0.0  # spent on compiling kernels, or on finding them in the cache and loading them

    def __init__(self, device: int = 0) -> None:
        ok, reason = cuda_available(device)
        if not ok:
            raise DeviceError(f"CUDA cannot be used: {reason}")
        try:
            import cupy
            from cupy_backends.cuda.libs import nvrtc

            self.cuda_version: tuple[int, ...] = nvrtc.getVersion()
        except Exception as e:  # CuPy raises several kinds, by what is missing
            raise DeviceError(f"cupy does not start: {e}; run `cuplama doctor`") from None
        self.cupy: Any = cupy
        self.device: Any = cupy.cuda.Device(device)
        attributes = self.device.attributes
        self.limits = Device(
            arch=int(self.device.compute_capability),
            sms=attributes["MultiProcessorCount"],
            shared=attributes["MaxSharedMemoryPerBlockOptin"],
        )
        self.name: str = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
        self.failures: tuple[type[Exception], ...] = (
            cupy.cuda.driver.CUDADriverError,
            cupy.cuda.runtime.CUDARuntimeError,
        )
        self._kernels: dict[tuple[str, str, str], Any] = {}

    def kernel(self, file: str, expression: str, shared: int) -> Any:
        """CuPy's RawKernel of a kernel instance, compiled or taken from CuPy's disk cache. Raises CompileError, and
        DeviceError for more shared memory than this GPU has.

        shared: bytes of dynamic shared memory that it is about to be launched with. One module per instance: whichever
        instances a run needs, each is found in the cache on its own. A file from outside that has changed, or whose
        headers have, is compiled again.
        """
        key = (file, expression, version(file))
        if shared > self.limits.shared:
            arch, room = self.limits.arch, self.limits.shared
            raise DeviceError(f"{expression} takes {shared} bytes of shared memory; a block has {room} on sm_{arch}")
        raw = self._kernels.get(key)
        if raw is None:
            began = time.perf_counter()
            module = self.cupy.RawModule(
                code=source(file),
                options=options(self.cuda_version[0], self.limits.arch, file),
                name_expressions=(expression,),
            )
            try:
                raw = module.get_function(expression)
            except self.cupy.cuda.compiler.CompileException as e:
                raise compile_error(file, str(e), self.limits.arch) from None
            # Every kernel asks for the same division of L1 cache and shared memory: a multiprocessor changes it only
            # while it is empty, so a kernel that asked for another could not start before the one ahead has ended.
            raw.preferred_shared_memory_carveout = 100
            self.compile_seconds += time.perf_counter() - began
            self._kernels[key] = raw
        if shared + raw.shared_size_bytes > 48 * 1024 and shared > raw.max_dynamic_shared_size_bytes:
            raw.max_dynamic_shared_size_bytes = shared
        return raw

    def clear(self) -> None:
        """Forget the modules."""
        self._kernels.clear()
