"""Single words of a buffer, overwritten in order with what is queued. Kernels: cuda_src/set_words.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dtypes import Array
from .launch import Device, Launch, Plan
from .op import Call, Op

__all__ = ["set_words"]

_THREADS = 128


def _set_words(words: Array, places: Array, values: Array) -> Array:
    there = places >= 0
    words[places[there]] = values[there]
    return words


def _inputs(rng: np.random.Generator, case: Any, T: np.dtype[Any]) -> dict[str, Any]:
    places = rng.permutation(case["n"])[: case["k"]].astype(np.int32)  # distinct, so that no order matters
    places[rng.random(case["k"]) < 0.3] = -1
    return {"places": places}


def _kernels(call: Call, device: Device) -> Plan:
    return Plan((Launch("set_words.cu:set_words", (-(-call["k"] // _THREADS),), (_THREADS,)),))


set_words = Op(
    "set_words",
    "words[n]:i32 = (words[n]:i32, places[k]:i32, values[k]:i32)",
    doc="words[places[i]] = values[i] where places[i] is not negative; the others are distinct. A sequence that joins a"
    " captured decode step, leaves it or gets a page changes a few words of the step's inputs, behind the steps that"
    " are queued already.",
    reference=_set_words,
    kernels=_kernels,
    cases=[dict(n=n, k=k) for n, k in ((1, 1), (64, 7), (1000, 200))],
    ranges={"words": "1000+0*n", "values": "1000+0*k"},
    sizes=lambda draw: dict(n=draw(40, 500), k=draw(1, 40)),
    inputs=_inputs,
)
