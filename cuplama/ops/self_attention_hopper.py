"""The launches of self_attention_backward on Hopper. Kernels: cuda_src/attention_backward_wgmma.cu.

cuplama/ops/self_attention.py asks here first.
"""

from __future__ import annotations

from .launch import Device, Launch, Plan
from .op import Call

__all__ = ["hopper_plan"]

_FILE = "attention_backward_wgmma.cu"
_KEYS = 128  # of a block
_THREADS = 256  # of the kernel before the products
_QUERIES = {64: 128, 128: 64}  # head size -> queries of a tile: as many as registers hold


def hopper_plan(call: Call, device: Device) -> Plan | None:
    """The launches of self_attention_backward on sm_90, or None where these kernels do not serve: other GPUs, f32, head
    sizes other than 64 and 128.

    Scratch: lse and delta (``stats``) and sums of dq in f32 (``sums``) by tiles of queries and heads, the counters by
    which blocks take turns to add to them (``turns``), and the order of the blocks.
    """
    n, b, num_heads, H, D = (call[name] for name in ("n", "b", "num_heads", "H", "D"))
    if device.arch != 90 or call.dtypes["T"].itemsize != 2 or D not in _QUERIES:
        return None
    M = _QUERIES[D]
    entries, tiles = n // _KEYS + b, n // M + b
    ordering = -(-entries // _THREADS)
    shared = 1024 + 2 * (2 * _KEYS * D + 4 * M * D + 2 * _KEYS * M)
    launches = (
        Launch(
            f"{_FILE}:prepare_backward",
            (ordering + tiles * num_heads,),
            (_THREADS,),
            constants={"M": M, "sms": device.sms},
        ),
        Launch(
            f"{_FILE}:attention_backward_wgmma",
            (entries * H,),
            (384,),
            shared,
            constants={"M": M, "CAPPED": call["softcap"] != 0},
        ),
        Launch(f"{_FILE}:convert_dq", (tiles, num_heads), (_THREADS,), constants={"M": M}),
    )
    scratch = {
        "stats": ((tiles, num_heads, 2, M), "f32"),
        "order": ((entries, 4), "i32"),
        "sums": ((tiles, num_heads, M * D), "f32"),
        "turns": ((tiles, num_heads), "u32"),
    }
    return Plan(launches, scratch, frozenset({"turns"}), frozenset({"sums"}))
