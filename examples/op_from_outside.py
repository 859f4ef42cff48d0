"""An op that is not part of cuplama: a hard tanh, declared in ``own_op/hard_tanh.py`` beside its CUDA file.

It is loaded, held to its own reference by the judge that all kernels have, and called. The commands take it, too:
``cuplama kernels bench examples/own_op/hard_tanh.py``, and so do show, compare, watch, compile and list.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cuplama import ops
from cuplama.backends.cuda.driver import cuda_available
from cuplama.errors import DeviceError
from cuplama.lab.cases import check_op


def main() -> None:
    hard_tanh = ops.load(Path(__file__).resolve().parent / "own_op" / "hard_tanh.py")
    try:
        print(f"{hard_tanh.name} is {check_op(hard_tanh)}")
    except DeviceError as e:
        print(f"not checked: {e}")
    x = np.linspace(-100, 100, 3 * 257, dtype=np.float32).reshape(3, 257)
    if cuda_available()[0]:
        import cupy

        y = cupy.asnumpy(hard_tanh(cupy.asarray(x), cap=30.0))
    else:
        y = hard_tanh(x, cap=30.0)
    print(f"largest result {y.max():.3f}")


if __name__ == "__main__":
    main()
