"""An op that is not part of cuplama: Gemma 2's soft cap, declared in ``own_op/softcap.py`` beside its CUDA file.

It is loaded, held to its own reference by the judge that all kernels have, and called. The commands take it, too:
``cuplama kernels bench examples/own_op/softcap.py``, and so do show, compare, watch, compile and list.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cuplama import ops
from cuplama.backends.cuda.driver import cuda_available
from cuplama.errors import DeviceError
from cuplama.lab.cases import check_op


def main() -> None:
    softcap = ops.load(Path(__file__).resolve().parent / "own_op" / "softcap.py")
    try:
        print(f"{softcap.name} is {check_op(softcap)}")
    except DeviceError as e:
        print(f"not checked: {e}")
    x = np.linspace(-100, 100, 3 * 257, dtype=np.float32).reshape(3, 257)
    if cuda_available()[0]:
        import cupy

        y = cupy.asnumpy(softcap(cupy.asarray(x), cap=30.0))
    else:
        y = softcap(x, cap=30.0)
    print(f"largest result {y.max():.3f}")


if __name__ == "__main__":
    main()
