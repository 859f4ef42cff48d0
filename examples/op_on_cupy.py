"""Call ops of the package on arrays of one's own: CuPy arrays where there is a GPU, NumPy arrays elsewhere.

The calls are the same. On CuPy arrays they launch the kernels of ``cuda_src/`` on the current stream; on NumPy arrays
they are the references that the kernels are judged by.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuplama import ops
from cuplama.backends.cuda.driver import cuda_available

ROWS, SIZE, WIDTH = 4, 256, 1024  # tokens, size of the residual stream, size of the feed-forward layer


def feed_forward(x: Any, norm: Any, gate_up: Any, down: Any) -> Any:
    """x + down(silu(gate(n)) * up(n)) with n = rms_norm(x): the second half of a Llama block, x in float32."""
    hidden = ops.silu_mul(ops.linear(ops.rms_norm(x, norm, eps=1e-5), gate_up))
    return ops.linear_add(hidden, down, x)


def main() -> None:
    works, reason = cuda_available()
    xp: Any = np
    if works:
        import cupy

        xp = cupy
    else:
        print(f"NumPy computes: {reason}")
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> Any:
        return xp.asarray((rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float16))

    x = xp.asarray(rng.standard_normal((ROWS, SIZE)).astype(np.float32))
    y = feed_forward(x, xp.ones(SIZE, np.float16), weight(2 * WIDTH, SIZE), weight(SIZE, WIDTH))
    print(f"y is a {type(y).__module__}.{type(y).__name__} {y.dtype}{list(y.shape)}, {float(xp.abs(y - x).mean()):.3f}")
    print(f"the call: {ops.linear_add!r}")
    try:
        ops.rms_norm(x.astype(np.float16), x[0], eps=1e-5)
    except ops.OpError as e:
        print(f"refused: {e}")


if __name__ == "__main__":
    main()
