"""Time one kernel of the package, RMSNorm of a row of 4,096 values, in the two ways that a GPU's time can be told.

cupyx.profiler times single calls: the time until the call returns (CPU), and the time that passes on the GPU around it.
A model does not call: it replays a captured graph of many launches, so the third time is that of a launch in a graph.
``docs/kernels.md`` says what each is good for; ``cuplama kernels bench rms_norm --timer cupyx`` prints all three.
"""

from __future__ import annotations

import numpy as np

from cuplama import ops
from cuplama.backends.cuda.driver import cuda_available
from cuplama.errors import DeviceError
from cuplama.lab.cases import check_op

SIZE = 4096
LAUNCHES = 200  # in one graph, so that starting it costs little beside them
REPLAYS = 20


def time_on_gpu() -> None:
    import cupy
    from cupyx.profiler import benchmark

    x, w = cupy.ones((1, SIZE), np.float32), cupy.ones(SIZE, np.float16)
    print(benchmark(ops.rms_norm, (x, w), {"eps": 1e-5}, n_repeat=1000))
    pool = cupy.cuda.MemoryPool()  # the graph's own: nobody else may get the memory that its launches write to
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        for _ in range(LAUNCHES):
            ops.rms_norm(x, w, eps=1e-5)
        graph = stream.end_capture()
        replays = benchmark(graph.launch, (stream,), n_repeat=REPLAYS, name="graph")
    print(f"in a replayed graph: {np.median(replays.gpu_times) / LAUNCHES * 1e6:.2f} µs per launch")


def main() -> None:
    works, reason = cuda_available()
    try:
        print(f"{ops.rms_norm.name} is {check_op(ops.rms_norm)}")
    except DeviceError as e:
        print(f"not checked: {e}")
    if works:
        time_on_gpu()
    else:
        print(f"not timed: {reason}")


if __name__ == "__main__":
    main()
