"""Mistakes in the kernels that only training launches, as ``kernel_edits`` has them for the others."""

from __future__ import annotations

__all__ = ["EDITS", "EQUIVALENT"]

# (file, text that occurs once, replacement)
EDITS: tuple[tuple[str, str, str], ...] = (
    # norm_backward.cu: rows
    ("norm_backward.cu", "x = lane < warps ? partial", "x = lane <= warps ? partial"),
    ("norm_backward.cu", "means.y / to.d};\n            turn ^= 1;", "means.y / to.d};"),
    ("norm_backward.cu", "block_sums(products, turn);\n        turn ^= 1;", "block_sums(products, turn);"),
    ("norm_backward.cu", "at + j < d ? x.v[j] - mean", "at + j <= d ? x.v[j] - mean"),
    ("norm_backward.cu", "sums.x += x.v[j], sums.y += g(j);", "sums.x += x.v[j], sums.y += to_float(dy.v[j]);"),
    ("norm_backward.cu", "sums.y += g(j) * x.v[j];", "sums.y += to_float(dy.v[j]) * x.v[j];"),
    ("norm_backward.cu", ": load(a + start, chunk);", ": load(a, chunk);"),
    ("norm_backward.cu", "begin ? Pack<f32, 8>{} : load<f32>(sums, chunk)", "load<f32>(sums, chunk)"),
    ("norm_backward.cu", "row == blockIdx.x, to_dw", "true, to_dw"),
    ("norm_backward.cu", "row == blockIdx.x, to_db", "false, to_db"),
    ("norm_backward.cu", "row < n; row += gridDim.x", "row <= n; row += gridDim.x"),
    ("norm_backward.cu", "(to.d + 8 * blockDim.x - 1) / (8 * blockDim.x)", "to.d / (8 * blockDim.x)"),
    ("norm_backward.cu", "sqrtf(products.x / to.d + eps)", "sqrtf(products.x + eps)"),
    ("norm_backward.cu", "products.y / to.d * inverse * inverse", "products.y / to.d * inverse"),
    ("norm_backward.cu", "to_db.v[j] * (piece.x.v[j] * inverse)", "to_db.v[j] * piece.x.v[j]"),
    ("norm_backward.cu", "piece.a.v[j] + inverse * (", "inverse * ("),
    ("norm_backward.cu", "piece.g(j) - means.y - ", "piece.g(j) - "),
    ("norm_backward.cu", "if (CENTRED && HELD == 0) piece.centre", "if (false) piece.centre"),
    ("norm_backward.cu", "if (CENTRED) piece.centre", "if (false) piece.centre"),
    ("norm_backward.cu", "dx, partial + i64(blockIdx.x) * d, nullptr", "dx, partial, nullptr"),
    ("norm_backward.cu", "*db = dw + i64(gridDim.x) * d;", "*db = dw + d;"),
    # norm_backward.cu: heads
    ("norm_backward.cu", "lanes = LANES / 2; lanes > 0;", "lanes = LANES / 4; lanes > 0;"),
    ("norm_backward.cu", "lanes = LANES; lanes < WARP;", "lanes = 2 * LANES; lanes < WARP;"),
    ("norm_backward.cu", "c * WIDTH + i < D;", "c * WIDTH + i <= D;"),
    ("norm_backward.cu", "index < all ? D : 0", "D"),
    ("norm_backward.cu", "is_v ? 0 : there", "there"),
    ("norm_backward.cu", "head >= num_heads + num_kv_heads", "head > num_heads + num_kv_heads"),
    ("norm_backward.cu", "is_q = head < num_heads", "is_q = head <= num_heads"),
    ("norm_backward.cu", "dq[c].v[j] += is_q ? to_sum : 0.f;", "dq[c].v[j] += to_sum;"),
    ("norm_backward.cu", "dk[c].v[j] += is_q ? 0.f : to_sum;", "dk[c].v[j] += to_sum;"),
    ("norm_backward.cu", "head_sum<LANES>(squares) / D + eps", "head_sum<LANES>(squares) + eps"),
    ("norm_backward.cu", "head_sum<LANES>(along) / D * inverse * inverse", "head_sum<LANES>(along) / D * inverse"),
    ("norm_backward.cu", "first < all; first += step", "first < all; first += 2 * step"),
    ("norm_backward.cu", "i64(gridDim.x + blockIdx.x) * D", "i64(blockIdx.x) * D"),
    # norm_backward.cu: sums of the blocks
    ("norm_backward.cu", "row < rows; row += WARP", "row <= rows; row += WARP"),
    ("norm_backward.cu", "other = 1; other < WARP;", "other = 0; other < WARP;"),
    ("norm_backward.cu", "sum[column] += total;", "sum[column] = total;"),
    ("norm_backward.cu", "blockIdx.y == 0 ? dw : db", "blockIdx.y == 0 ? db : dw"),
    ("norm_backward.cu", "partial + i64(blockIdx.y) * blocks * D, ", "partial, "),
    # activation_backward.cu
    ("activation_backward.cu", "f % 8 == 0 && aligned(x, dy, dx)", "aligned(x, dy, dx)"),
    ("activation_backward.cu", "* gates = x + i64(blockIdx.x) * 2 * f;", "* gates = x + i64(blockIdx.x) * f;"),
    ("activation_backward.cu", "load_row<8>(gates + f, i,", "load_row<8>(gates + f + 1, i,"),
    ("activation_backward.cu", "(1.f + gate * (1.f - share))", "(1.f + gate)"),
    ("activation_backward.cu", "gradient * gate * share", "gradient * share"),
    ("activation_backward.cu", "store_row<8>(out + f, i, f, vectorized, u)",
     "store_row<8>(out + f, i, f, vectorized, g)"),
    ("activation_backward.cu", "0.134145f", "0.044715f"),
    ("activation_backward.cu", "share + x * share", "x * share"),
    ("activation_backward.cu", "half = -0.5f", "half = 0.5f"),
    ("activation_backward.cu", "0.3989422804f * x *", "0.3989422804f *"),
    ("activation_backward.cu", "x * -0.7071067812f", "x * 0.7071067812f"),
    # softcap.cu, dropout.cu, philox.cuh
    ("softcap.cu", "cap * tanhf(to_float(v.v[j]) / cap)", "cap * tanhf(to_float(v.v[j]))"),
    ("softcap.cu", "-2.f * fabsf", "-1.f * fabsf"),
    ("softcap.cu", "4.f * e", "2.f * e"),
    ("dropout.cu", "0.f : scale * v.v[j]", "0.f : v.v[j]"),
    ("dropout.cu", "word[j] < threshold", "word[j] > threshold"),
    ("dropout.cu", "u32(i / 4), u32(stream)", "u32(i), u32(stream)"),
    ("dropout.cu", "u32(i / 4), u32(stream)", "u32(i / 4), 0"),
    ("dropout.cu", "u64(seed[1]) << 32 | seed[0]", "u64(seed[0]) << 32 | seed[1]"),
    ("philox.cuh", "round < 10", "round < 9"),
    # rope.cu, residual.cu
    ("rope.cu", "low != BACK ? -to_float(partner.v[j])", "low ? -to_float(partner.v[j])"),
    ("rope.cu", "rotate_token<false>(x,", "rotate_token<true>(x,"),
    ("residual.cu", "from_float<U>(from.v[j])", "from_float<U>(from.v[j ^ 1])"),
    ("residual.cu", "copy(x + i64(first) * d, y,", "copy(x, y,"),
    ("residual.cu", "copy(x, y + i64(first) * d,", "copy(x, y,"),
)  # fmt: skip

# (file, text around the edit, why no test can notice it). These do not count.
EQUIVALENT: tuple[tuple[str, str, str], ...] = ()
