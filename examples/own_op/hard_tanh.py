"""A hard tanh as an op of one's own: this file declares it, and ``hard_tanh.cu`` beside it has the kernel.

The declaration is all there is. Arguments reach the kernel by name, so no argument list is written.
"""

from __future__ import annotations

import numpy as np

from cuplama.dtypes import Array
from cuplama.ops import Op
from cuplama.ops.launch import Device, Launch, Plan
from cuplama.ops.op import Call

THREADS = 256  # of a block, as in the kernel


def reference(x: Array, *, cap: float) -> Array:
    return np.minimum(np.maximum(x, -cap), cap)


def kernels(call: Call, device: Device) -> Plan:
    blocks = -(-call["n"] * call["d"] // THREADS)
    return Plan((Launch("hard_tanh.cu:hard_tanh", (blocks,), (THREADS,)),))


hard_tanh = Op(
    "hard_tanh",
    "y[n,d]:f32 = (x[n,d]:f32, cap:f32)",
    doc="y = min(max(x, -cap), cap)",
    reference=reference,
    kernels=kernels,
    cases=[dict(n=n, d=d, cap=1.0) for n, d in ((1, 8), (3, 257))],
    flops=lambda c: 2 * c["n"] * c["d"],
)
