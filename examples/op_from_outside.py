"""An op that is not part of cuplama: Gemma 2's soft cap, with its kernel in ``softcap.cu`` beside this file.

The declaration is all there is: arguments are bound by name, so no argument list is written. On a GPU the kernel is
compiled and launched; elsewhere the same file runs on the emulator, which also finds races and wrong addresses.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from cuplama.backends.cuda.driver import cuda_available
from cuplama.backends.numpy import NumPyBackend
from cuplama.dtypes import Array
from cuplama.ops.binding import bind_plan
from cuplama.ops.launch import Device, Launch, Plan
from cuplama.ops.op import Call, Op

KERNEL = Path(__file__).resolve().with_name("softcap.cu")
THREADS = 256  # of a block, as in the kernel


def reference(x: Array, *, cap: float) -> Array:
    return cap * np.tanh(x / cap)


def kernels(call: Call, device: Device) -> Plan:
    blocks = -(-call["n"] * call["d"] // THREADS)
    return Plan((Launch(f"{KERNEL}:softcap", (blocks,), (THREADS,)),))


softcap = Op(
    "softcap",
    "y[n,d]:f32 = (x[n,d]:f32, cap:f32)",
    doc="y = cap * tanh(x / cap)",
    reference=reference,
    kernels=kernels,
    cases=[dict(n=n, d=d, cap=30.0) for n, d in ((1, 8), (3, 257))],
    flops=lambda c: 3 * c["n"] * c["d"],
)


def run(x: np.ndarray[Any, Any], cap: float) -> tuple[str, Array]:
    """Where the op ran, and its result."""
    if cuda_available()[0]:
        from cuplama.backends.cuda.backend import CudaBackend

        cuda = CudaBackend("f32")
        try:
            (y,) = cuda.call(softcap, [cuda.upload(x)], {"cap": cap})
            return cuda.describe(), cuda.download(y)
        finally:
            cuda.close()
    if shutil.which("g++") is None:
        (y,) = NumPyBackend().call(softcap, [x], {"cap": cap})
        return "NumPy, because there is neither a GPU nor a C++ compiler", y
    from cuplama.simt.emulator import run as emulate

    def empty(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.empty(shape, dtype)

    call = softcap.bind([x], {"cap": cap})
    for launch in bind_plan(kernels(call, Device()), call, empty, empty):
        emulate(launch)
    result = call.arrays["y"]
    assert result is not None  # bind_plan has made it
    return "the emulator", result


def main() -> None:
    cap = 30.0
    x = np.linspace(-100, 100, 3 * 257, dtype=np.float32).reshape(3, 257)
    where, y = run(x, cap)
    print(f"softcap ran on {where}")
    difference = np.abs(y - reference(x, cap=cap)).max()
    print(f"largest result {y.max():.3f}, largest difference from the reference {difference:.1e}")


if __name__ == "__main__":
    main()
