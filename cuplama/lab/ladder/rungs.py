"""The ladders as data: what each rung is, what it should gain over the one below, and how it takes its inputs.

Times that were foretold are of an H200, bf16, 32 query and 8 key heads of 128: written down before the first
measurement, from the arithmetic in the heads of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...dtypes import DTYPES
from ...engine.kv_cache import PAGE, pages_for
from ...ops.attention import attention
from ...ops.op import Op
from ..workloads import Workload
from . import ops

__all__ = ["LADDERS", "Inputs", "Rung"]


@dataclass(frozen=True)
class Inputs:
    """One problem for every rung. q: [n, num_heads*D]; k, v: [H, s, D]; of one dtype, on the host."""

    q: np.ndarray[Any, Any]
    k: np.ndarray[Any, Any]
    v: np.ndarray[Any, Any]
    num_heads: int

    @classmethod
    def random(cls, sizes: Mapping[str, int], dtype: str, seed: int = 0) -> Inputs:
        """Normal values. sizes: n, s, num_heads, H, D."""
        rng, T = np.random.default_rng(seed), DTYPES[dtype]
        n, s, num_heads, H, D = (sizes[name] for name in ("n", "s", "num_heads", "H", "D"))
        shapes = ((n, num_heads * D), (H, s, D), (H, s, D))
        q, k, v = (rng.standard_normal(shape, np.float32).astype(T) for shape in shapes)
        return cls(q, k, v, num_heads)

    @property
    def attrs(self) -> dict[str, Any]:
        """The attributes of the ladder's ops."""
        return {"num_heads": self.num_heads, "scale": self.k.shape[2] ** -0.5}

    def rows(self, first: int, end: int) -> Inputs:
        """The problem whose result is rows first .. end-1 of this one's: what these queries see."""
        keys = self.k.shape[1] - len(self.q) + end
        k, v = (np.ascontiguousarray(x[:, :keys]) for x in (self.k, self.v))
        return Inputs(self.q[first:end], k, v, self.num_heads)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Arrays and attributes of an op."""


def _plain(inputs: Inputs) -> Arguments:
    return (inputs.q, inputs.k, inputs.v), inputs.attrs


def _paged(inputs: Inputs) -> Arguments:
    """The same problem for the product's op: keys and values on pages of a cache, queries as a model has them.

    The op finds the new tokens' keys in the cache; where a model has them beside the queries there are zeros.
    """
    H, s, D = inputs.k.shape
    n, pages = len(inputs.q), pages_for(s)
    x = np.concatenate([inputs.q, np.zeros((n, 2 * H * D), inputs.q.dtype)], axis=1)
    cache = []
    for rows in (inputs.k, inputs.v):
        page = np.zeros((H, pages * PAGE, D), rows.dtype)
        page[:, :s] = rows
        cache.append(np.ascontiguousarray(page.reshape(H, pages, PAGE, D).swapaxes(0, 1)))
    where = (np.array([0, n]), np.array([s]), np.arange(pages)[None])
    return (x, *cache, *(a.astype(np.int32) for a in where)), {**inputs.attrs, "window": 0}


@dataclass(frozen=True)
class Rung:
    """One way to compute attention.

    name: a word; title: what it is; gain: what it should gain over the rung below, and why; arguments: makes the op's
    arrays and attributes of the inputs; foretold: tokens s -> microseconds (see above).
    """

    name: str
    title: str
    gain: str
    op: Op
    arguments: Callable[[Inputs], Arguments] = _plain
    foretold: Mapping[int, float] = field(default_factory=dict)

    def workload(self, inputs: Inputs, dtype: str) -> Workload:
        """The rung's op on the inputs."""
        ins, attrs = self.arguments(inputs)
        return Workload(self.op, ins, attrs, dtype)


LADDERS: Mapping[str, Sequence[Rung]] = {
    "attention": (
        Rung(
            "naive",
            "three kernels, a thread for each element",
            "nothing, it is the lowest: one multiply-add a clock and multiprocessor, where 128 are possible",
            ops.prefill_naive,
            foretold={512: 5e3, 1024: 21e3, 4096: 330e3, 16384: 5.3e6},
        ),
        Rung(
            "tiled",
            "the two products in tiles in shared memory",
            "each number that is loaded is used 64 times: 20 TFLOP/s, some 25 times as fast",
            ops.prefill_tiled,
            foretold={512: 280, 1024: 950, 4096: 15e3, 16384: 250e3},
        ),
        Rung(
            "online",
            "one kernel without a score matrix, by an online softmax",
            "half the operations, and 16 bytes a score less through memory: some 3 times as fast",
            ops.prefill_online,
            foretold={512: 110, 1024: 310, 4096: 4.6e3, 16384: 73e3},
        ),
        Rung(
            "tensor",
            "the same on tensor cores, mma.sync",
            "2,048 multiply-adds an instruction of a warp instead of 32: some 7 times as fast, 200 TFLOP/s",
            ops.prefill_tensor,
            foretold={512: 25, 1024: 60, 4096: 720, 16384: 11e3},
        ),
        Rung(
            "product",
            "the product's own kernel (on Hopper wgmma, loads while it computes)",
            "tensor cores that do not wait for loads: 2.5 times as fast at 16,384 tokens",
            attention,
            _paged,
            foretold={512: 16, 1024: 40, 4096: 265, 16384: 3.9e3},
        ),
    ),
    "decode": (
        Rung(
            "block",
            "a block for each query head",
            "nothing, it is the lowest: 32 blocks on 132 multiprocessors, some 0.6 TB/s of what it asks for",
            ops.decode_block,
            foretold={512: 15, 1024: 28, 4096: 110, 16384: 440},
        ),
        Rung(
            "split",
            "keys divided over blocks, added up by a second kernel (Flash-Decoding)",
            "every multiprocessor has keys to ask for: 8 times as fast at 16,384 tokens",
            ops.decode_split,
            foretold={512: 6, 1024: 8, 4096: 18, 16384: 55},
        ),
        Rung(
            "product",
            "the product's own kernel: a group shares its keys, tensor cores, one launch",
            "keys are read once for a group's 4 heads: twice as fast at 16,384 tokens",
            attention,
            _paged,
            foretold={512: 5, 1024: 6, 4096: 10, 16384: 24},
        ),
    ),
}
"""The ladders by name, the lowest rung first."""
