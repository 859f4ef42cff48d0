"""PyTorch's attention beside the ladder, where PyTorch happens to be installed.

The package neither needs nor imports torch: nothing here runs without it, and it is loaded by name, because a reader
who has it wants to see where the rungs stand.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from ..timing import Spread
from .rungs import Inputs

__all__ = ["torch_attention", "torch_missing"]

_TORCH = "torch"  # not an import statement: the package does not depend on it
_REPEATS = 10
_RUNS = 5  # calls in a row that are timed together
_SIXTEEN_BITS = {"f16": "float16", "bf16": "bfloat16"}


def torch_missing() -> str:
    """Why there is no comparison with PyTorch here; empty if there is one."""
    if importlib.util.find_spec(_TORCH) is None:
        return "PyTorch is not installed"
    torch: Any = importlib.import_module(_TORCH)
    return "" if torch.cuda.is_available() else "PyTorch finds no GPU"


def torch_attention(inputs: Inputs, dtype: str) -> tuple[np.ndarray[Any, Any], Callable[[], Spread]]:
    """(y [n, num_heads*D], what times it) of torch.nn.functional.scaled_dot_product_attention, with the kernel that
    torch chooses.

    Times are of the GPU, several calls in a row: the host's part of a call is hidden where the kernel takes longer.
    """
    torch: Any = importlib.import_module(_TORCH)
    n, s, D = len(inputs.q), inputs.k.shape[1], inputs.k.shape[2]

    def upload(x: np.ndarray[Any, Any]) -> Any:
        if dtype == "f32":
            return torch.from_numpy(x).cuda()
        return torch.from_numpy(x.view(np.int16)).cuda().view(getattr(torch, _SIXTEEN_BITS[dtype]))

    q = upload(inputs.q).view(n, inputs.num_heads, D).transpose(0, 1)[None].contiguous()
    k, v = (upload(x)[None] for x in (inputs.k, inputs.v))
    if n == 1:
        mask: dict[str, Any] = {}
    elif n == s:
        mask = {"is_causal": True}
    else:  # torch's is_causal lets query i see the keys 0 .. i, wherever the queries stand
        mask = {"attn_mask": torch.ones(n, s, dtype=torch.bool, device="cuda").tril(s - n)}

    def run() -> Any:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, scale=inputs.attrs["scale"], enable_gqa=True, **mask)

    y = run()[0].transpose(0, 1).reshape(n, -1).contiguous()
    host = y.cpu().numpy() if dtype == "f32" else y.view(torch.int16).cpu().numpy().view(inputs.q.dtype)
    return host, lambda: _seconds(torch, run)


def _seconds(torch: Any, run: Callable[[], Any]) -> Spread:
    values = []
    for _ in range(_REPEATS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_RUNS):
            run()
        end.record()
        end.synchronize()
        values.append(begin.elapsed_time(end) / 1e3 / _RUNS)
    return Spread(tuple(values[2:]))
