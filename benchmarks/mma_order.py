"""An experiment, not to be kept: does a chain of mma.sync m16n8k16 along k give the bits of cuBLAS's products?

``python -m benchmarks.mma_order``: for f16 and bf16, the share of float32 sums that differ from FixedCublas's for 16
rows of x, with w as A and as B of the instruction, and in chains of m16n8k8.
"""

from __future__ import annotations

import json

import cupy
import numpy as np

from cuplama.backends.cuda.backend import CudaBackend
from cuplama.dtypes import DTYPES
from cuplama.ops import OPS

SOURCE = r"""
typedef unsigned u32; typedef unsigned short u16;
#define P(p) (*(const u32*)(p))
__device__ void mma16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ void mma8(float (&d)[4], u32 a0, u32 a1, u32 b0) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE ".f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
}
// way 0: A = 16 rows of w, B = 8 rows of x; 1: A = 16 rows of x, B = 8 rows of w; 2: as 0, k8
extern "C" __global__ void chain(const u16* x, const u16* w, float* y, int m, int k, int way) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4 * 2;
    const u16* a = way == 1 ? x + blockIdx.y * 16 * k : w + blockIdx.x * 16 * k;
    const u16* b = way == 1 ? w + blockIdx.x * 8 * k : x + blockIdx.y * 8 * k;
    float d[4] = {};
    for (int at = 0; at < k; at += 16) {
        const u16 *p = a + g * k + at + t, *q = p + 8 * k, *r = b + g * k + at + t;
        if (way == 2) {
            mma8(d, P(p), P(q), P(r));
            mma8(d, P(p + 8), P(q + 8), P(r + 8));
        } else {
            mma16(d, P(p), P(q), P(p + 8), P(q + 8), P(r), P(r + 8));
        }
    }
    for (int i = 0; i < 4; i++) {
        const int row = g + i / 2 * 8, column = t + i % 2;
        if (way == 1) y[(blockIdx.y * 16 + row) * m + blockIdx.x * 8 + column] = d[i];
        else y[(blockIdx.y * 8 + column) * m + blockIdx.x * 16 + row] = d[i];
    }
}
"""


def main() -> None:
    rng, n = np.random.default_rng(0), 16
    for T in ("bf16", "f16"):
        fixed = CudaBackend(T, deterministic=True)
        module = cupy.RawModule(code=f'#define TYPE "{T}"\n' + SOURCE)
        chain = module.get_function("chain")
        for m, k in ((4096, 4096), (4096, 14336), (2048, 2048), (1024, 64), (1024, 16)):
            x, w = (rng.standard_normal(s, np.float32).astype(DTYPES[T]) for s in ((n, k), (m, k)))
            xd, wd = fixed.upload(x), fixed.upload(w)
            (y,) = fixed.call(OPS["linear"], (xd, wd), {"U": "f32"})
            wanted = fixed.download(y)
            row: dict[str, object] = {"T": T, "m": m, "k": k}
            for way, name in enumerate(("w is A", "w is B", "k8")):
                out = cupy.zeros((n, m), cupy.float32)
                grid = (m // 8, 1) if way == 1 else (m // 16, n // 8)
                args = (xd.data.ptr, wd.data.ptr, out.data.ptr, np.int32(m), np.int32(k), np.int32(way))
                cupy.cuda.Device().synchronize()
                chain(grid, (32,), tuple(np.uint64(a) if isinstance(a, int) else a for a in args))
                cupy.cuda.Device().synchronize()
                row[name] = float((out.get() != wanted).mean())
            print(json.dumps(row), flush=True)
        fixed.close()


if __name__ == "__main__":
    main()
