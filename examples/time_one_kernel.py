"""Check one kernel of the package, RMSNorm of a row of 4,096 values, and time it where there is a GPU.

The time is that of a replayed CUDA graph, because that is how a model decodes. ``cuplama kernels bench rms_norm``
measures with more care: on inputs that together are larger than the cache, and beside the peaks of the card.
"""

from __future__ import annotations

import shutil
import time
from typing import Any

import numpy as np

from cuplama.backends.cuda.driver import cuda_available
from cuplama.dtypes import Array
from cuplama.ops import OPS
from cuplama.ops.binding import bind_plan
from cuplama.ops.launch import Device

OP = OPS["rms_norm"]
SIZES = {"n": 1, "d": 4096}
ATTRIBUTES = {"eps": 1e-5}
LAUNCHES = 200  # in one graph, so that the host's time vanishes beside the GPU's
REPLAYS = 20


def on_gpu(ins: list[np.ndarray[Any, Any]]) -> Array:
    """The result; prints the time per launch."""
    from cuplama.backends.cuda.backend import CudaBackend

    backend = CudaBackend("f32")
    try:
        device_ins: list[Array | None] = [backend.upload(x) for x in ins]

        def body() -> None:
            for _ in range(LAUNCHES):
                backend.call(OP, device_ins, ATTRIBUTES)

        graph = backend.capture(body)
        for _ in range(3):  # the first run compiles, the second captures, the third warms up
            graph.replay().synchronize()
        seconds = []
        for _ in range(REPLAYS):
            begin = time.perf_counter()
            graph.replay().synchronize()
            seconds.append((time.perf_counter() - begin) / LAUNCHES)
        print(f"{backend.describe()}: {np.median(seconds) * 1e6:.2f} µs per launch, median of {REPLAYS} replays")
        graph.close()
        (y,) = backend.call(OP, device_ins, ATTRIBUTES)
        return backend.download(y)
    finally:
        backend.close()


def on_emulator(ins: list[np.ndarray[Any, Any]]) -> Array:
    """The result of the same kernel on the CPU, with every memory access checked."""
    from cuplama.simt.emulator import run

    def empty(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.full(shape, np.nan, dtype)

    call = OP.bind(ins, ATTRIBUTES)
    assert OP.kernels is not None
    for launch in bind_plan(OP.kernels(call, Device()), call, empty, empty):
        run(launch)
    y = call.arrays["y"]
    assert y is not None  # bind_plan has made it
    return y


def main() -> None:
    arrays = OP.random_inputs(np.random.default_rng(0), {**SIZES, **ATTRIBUTES}, np.dtype(np.float32))
    ins = [x for x in arrays.values() if x is not None]
    works, reason = cuda_available()
    if works:
        y = on_gpu(ins)
    elif shutil.which("g++") is not None:
        y = on_emulator(ins)
        print(f"checked on the emulator and not timed: {reason}")
    else:
        print(f"neither timed nor checked: {reason}, and the emulator needs g++")
        return
    want = OP.reference(*[x.astype(np.float64) for x in ins], **ATTRIBUTES)
    print(f"largest difference from the reference in float64: {np.abs(y - want).max():.1e}")


if __name__ == "__main__":
    main()
