"""Appending keys and values to the paged cache. Kernels: cuda_src/kv_cache.cu.

The cache of a layer is k[P,H,S,D] and v[P,H,S,D]: P pages of S tokens, head-major inside a page, so that the keys of
one head in one page are contiguous. Paging follows Kwon et al., "PagedAttention", arXiv:2309.06180.

The cache holds the model's dtype, or e4m3 in half the bytes of 16 bits: numbers as they are, without a scale. The
scales of a checkpoint (k_scale and v_scale of a layer) would be two more attributes: ``kv_append`` would divide by
them, and attention multiply its ``scale`` by the one and its result by the other. It would read no more for that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dtypes import Array, narrow
from .launch import Device, Launch, Plan
from .op import EXACT, Call, Draw, Op, case_dtype

__all__ = ["kv_append"]


def _kv_append(x: Array, slot_mapping: Array, k: Array, v: Array) -> tuple[Array, Array]:
    _, H, size, d = k.shape
    new = x.reshape(len(x), -1, d)[:, -2 * H :]
    page, offset = slot_mapping // size, slot_mapping % size
    k[page, :, offset] = narrow(new[:, :H], k.dtype)
    v[page, :, offset] = narrow(new[:, H:], v.dtype)
    return k, v


def _inputs(rng: np.random.Generator, case: Any, T: np.dtype[Any]) -> dict[str, Any]:
    slot_mapping = rng.permutation(case["P"] * case["S"])[: case["n"]]  # distinct: two tokens never share a slot
    given = {"slot_mapping": slot_mapping.astype(np.int32)}
    if case_dtype("C", case, T) != T:  # what rounds to nothing, to denormals, to ties, and what is too large
        x = rng.standard_normal((case["n"], case["w"])) * 2.0 ** rng.integers(-12, 12, (case["n"], case["w"]))
        x[rng.random(x.shape) < 0.2] = 2.0**-10 * rng.integers(1, 8)
        x.flat[-3:] = np.inf, -np.inf, np.nan
        given["x"] = x.astype(np.float32).astype(T)
    return given


def _sizes(draw: Draw) -> dict[str, Any]:
    n, H, D, S = draw(1, 30), draw(1, 5), draw(1, 140), draw(1, 40)
    C = "e4m3" if draw(0, 1) else "T"
    return dict(n=n, w=(draw(1, 6) + 2 * H) * D, H=H, D=D, P=-(-n // S) + draw(0, 2), S=S, C=C)


_THREADS = 128


def _kernels(call: Call, device: Device) -> Plan:
    grid = (call["n"], -(-2 * call["H"] * call["D"] // (8 * _THREADS)))
    return Plan((Launch("kv_cache.cu:kv_append", grid, (_THREADS,)),))


kv_append = Op(
    "kv_append",
    "k[P,H,S,D]:C, v[P,H,S,D]:C = (x[n,w]:T, slot_mapping[n]:i32, k[P,H,S,D]:C, v[P,H,S,D]:C)",
    doc="Writes the key and value heads of x (its last 2*H*D columns) to page slot_mapping[n] // S, place"
    " slot_mapping[n] % S, rounded to what the cache holds.",
    reference=_kv_append,
    kernels=_kernels,
    cases=[
        dict(n=n, w=(q + 2 * h) * d, H=h, D=d, P=p, S=s, C=C)
        for C in ("T", "e4m3")
        for n, q, h, d, p, s in ((1, 4, 2, 64, 3, 16), (7, 1, 1, 8, 2, 8), (20, 3, 1, 80, 4, 64), (5, 8, 8, 128, 2, 64))
    ],
    sizes=_sizes,
    inputs=_inputs,
    rules=("2 * H * D <= w", "w % D == 0", "n <= P * S"),
    tolerance=EXACT,
    bytes=lambda c: c["n"] * (4 + 2 * c["H"] * c["D"] * (c.dtypes["T"].itemsize + c.dtypes["C"].itemsize)),
)
