"""Logits of the tokens that a grammar does not allow, set to -infinity. Kernels: cuda_src/token_mask.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dtypes import Array
from .launch import Device, Launch, Plan
from .op import EXACT, Call, Op

__all__ = ["token_mask"]

_THREADS, _EACH = 256, 4  # tokens of a thread, as in token_mask.cu


def _token_mask(x: Array, mask: Array) -> Array:
    of_each_bit = mask[:, :, None] >> np.arange(32, dtype=np.int32) & 1
    allowed = of_each_bit.reshape(len(mask), -1)[:, : x.shape[1]] != 0
    return np.where(allowed, x, x.dtype.type(-np.inf))


def _inputs(rng: np.random.Generator, case: Any, T: np.dtype[Any]) -> dict[str, Any]:
    words = (case["b"], (case["V"] + 31) // 32)
    # A grammar allows a few tokens, or nearly all, and a row without one has every bit.
    few, any_ = rng.integers(0, 2**32, (2, *words), dtype=np.uint32)
    kinds = rng.integers(0, 3, (case["b"], 1))
    mask = np.where(kinds == 0, np.uint32(2**32 - 1), np.where(kinds == 1, any_, few & any_ & few >> np.uint32(5)))
    return {"mask": mask.astype(np.uint32).view(np.int32)}


def _kernels(call: Call, device: Device) -> Plan:
    return Plan((Launch("token_mask.cu:token_mask", (-(-call["V"] // (_THREADS * _EACH)), call["b"]), (_THREADS,)),))


token_mask = Op(
    "token_mask",
    "y[b,V]:f32 = (x[b,V]:f32, mask[b,(V+31)//32]:i32)",
    doc="y = x where bit t % 32 of the row's word t // 32 is set, and -infinity for every other token t",
    reference=_token_mask,
    kernels=_kernels,
    cases=[dict(b=b, V=V) for b, V in ((1, 7), (1, 32), (3, 512), (2, 4099), (5, 1025), (2, 2047))],
    sizes=lambda draw: dict(b=draw(1, 5), V=draw(1, 3000)),
    inputs=_inputs,
    tolerance=EXACT,
    shape={"b": 1, "V": 128256},
)
