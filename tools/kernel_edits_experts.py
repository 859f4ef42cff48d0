"""Mistakes in the kernels of experts, as ``kernel_edits`` has them for the others."""

from __future__ import annotations

__all__ = ["EDITS", "EQUIVALENT"]

_SHARED, _FEW = "experts.cuh", "experts_mma.cu"
_MANY, _WEIGHTS = "experts_many.cuh", "experts_many_weights.cuh"
_COMBINE = "experts_combine_mma.cu"
_STREAMED, _TILES = "experts_packed.cu", "linear_packed_mma.cuh"

# (file, text that occurs once, replacement)
EDITS: tuple[tuple[str, str, str], ...] = (
    # route.cu
    ("route.cu", "__float_as_uint(key + 0.f)", "__float_as_uint(key)"),
    ("route.cu", "bits >> 31 ? ~bits", "bits >> 31 ? bits"),
    ("route.cu", "key == key ? ordered : 0u", "ordered"),
    ("route.cu", "| (0xffffffffu - expert)", "| u32(expert)"),
    ("route.cu", "expert != top && rank[j]", "rank[j]"),
    ("route.cu", "if (lane == g) mine = rank_of(sum, g);", "if (lane == g) mine = rank_of(-sum, g);"),
    ("route.cu", "if (mine == most) mine = 0;", ";"),
    ("route.cu", "by[i] += bias[expert];", ";"),
    ("route.cu", "of.remove(expert, 1);\n        if (of.lane == slot)", "if (of.lane == slot)"),
    ("route.cu", "renormalise ? mine / total : mine", "mine"),
    ("route.cu", "weight *= scale[chosen];", "weight *= scale[of.lane];"),
    ("route.cu", "fmaxf(fabsf(of.logit[i]), largest)", "fabsf(of.logit[i])"),
    ("route.cu", "of.rank[i] != 0 && !(below", "!(below"),
    ("route.cu", "begin = warp * each,", "begin = warp * each + warp,"),
    ("route.cu", "sum += count;", ";"),
    ("route.cu", "(1u << lane) - 1", "(2u << lane) - 1"),
    ("route.cu", "if (ahead == 0) own[expert]", "if (ahead == 1) own[expert]"),
    ("route.cu", "x + (row * s + slot) * d", "x + row * s * d"),
    ("route.cu", "&& j < i);", "&& j > i);"),
    ("route.cu", "ahead += chosen[j] < expert;", "ahead += chosen[j] <= expert;"),
    ("route.cu", "chosen + row * k,", "chosen + row,"),
    # which pairs a tile has
    (_SHARED, "sum += carried;", ";"),
    (_SHARED, "if (w < warp) sum += partial[w];", "if (w <= warp) sum += partial[w];"),
    (_SHARED, "+ ROWS - 1) / ROWS; });", ") / ROWS; });"),
    (_SHARED, "if (before[middle] <= tile)", "if (before[middle] < tile)"),
    (_SHARED, "(tile - before[expert]) * each;", "tile * each;"),
    (_SHARED, "+ tiles - 1) / tiles);", ") / tiles);"),
    ("activation.cuh", "gate > limit ? limit : gate,", "gate,"),
    ("activation.cuh", "up < -limit ? -limit : up;", "up;"),
    # experts.cu
    ("experts.cu", "pairs[tile.first + min(r, tile.count - 1)] / s)", "pairs[tile.first + min(r, tile.count - 1)])"),
    ("experts.cu", "(i64(tile.expert) * PARTS) * m", "i64(tile.expert) * m"),
    ("experts.cu", "if (r >= tile.count) break;", ";"),
    # experts_mma.cu
    (_FEW, "stop = at + each + (blockIdx.x < more);", "stop = at + each;"),
    (_FEW, "i64(tile.expert) * HALVES<ACT> * m * k;", "i64(tile.expert) * m * k;"),
    (_FEW, "own[min(lane_row(), tile.count - 1)] / s;", "own[min(lane_row(), tile.count - 1)];"),
    (_FEW, "b + i64(tile.expert) * HALVES<ACT> * m;", "b;"),
    # the experts' sum in the product
    (_COMBINE, "starts[expert + 1] > starts[expert];", "starts[expert + 1] >= starts[expert];"),
    (_COMBINE, "place * N + pair / s;", "place * N + pair % s;"),
    (_COMBINE, "weights[at] = weight[pair];", "weights[at] = weight[i];"),
    (_COMBINE, "b[i64(chosen.experts[e]) * m + column]", "b[column]"),
    ("mma.cuh", "store<2>(to + (r + 8) * ROWS", "store<2>(to + r * ROWS"),
    (_COMBINE, "i < WARPS * WARP ? early : start(row, column);", "early;"),
    (_COMBINE, "if (row >= n) continue;", ";"),
    (_COMBINE, "chunk == chunks) chunk = 0, expert++;", "chunk == chunks) chunk = 0;"),
    (_COMBINE, "row + i / 2 * ROWS < end &&", ""),
    (_COMBINE, "i64(max(pair, 0)) * k + at;", "i64(max(pair, 0) / 2) * k + at;"),
    (_COMBINE, "fmaf(weight.v[i % 2]", "fmaf(weight.v[0]"),
    (_COMBINE, "partial += 2 * ROWS * N;", ";"),
    # many pairs
    (_MANY, "u32(share.own[row + i * APART] / product.s) * k", "u32(share.own[row + i * APART]) * k"),
    (_MANY, "inside && i * APART < count", "i * APART < count"),
    (_MANY, "int(blockIdx.x % across) * S::OUTS", "0"),
    (_MANY, "(i64(share.tile.expert) * PARTS + p) * m", "p * m"),
    (_MANY, "row < share.tile.count;", "row < N;"),
    (_MANY, "sum[p].v[c] * scale[p][c]", "sum[p].v[c]"),
    (_WEIGHTS, "* S::TILES + i) / (BAND / S::PARTS)", "* S::TILES + i) / BAND"),
    (_WEIGHTS, "inside && j * APART < left", "inside"),
    (_WEIGHTS, "if (S::EARLY && group == 0) fetch();", ";"),
    (_WEIGHTS, "t % 2 == 0 ? 0x6240u : 0x7351u", "0x6240u"),
    (_WEIGHTS, "high = low + 2;", "high = low + 1;"),
    (_WEIGHTS, "- t + t / 2,", ","),
    (_WEIGHTS, "TILE_ROWS, units - 1);", "TILE_ROWS, units);"),
    (_WEIGHTS, "(i64(expert + part_of<S>(i)) * units", "(i64(expert) * units"),
    (_WEIGHTS, "+ i64(expert) * rows : nullptr", ": nullptr"),
    (_WEIGHTS, "half == 1 : half == 0 && !first", "half == 1 : half == 0"),
    ("experts_many_wgmma.cu", "half + 1 < left", "half == 0"),
    ("experts_many_wgmma.cu", "take<S>(weights, 1 - half,", "take<S>(weights, half,"),
    ("experts_many_mma.cu", "if (j * 16 >= count) break;", "if (j * 16 + 16 >= count) break;"),
    ("experts_many_mma.cu", "weights.go_on(half, left == product.steps());", "weights.go_on(half, false);"),
    # few pairs, packed weights
    (_STREAMED, "stop = at + each + (blockIdx.x < more);", "stop = at + each;"),
    (_STREAMED, "tile.expert * S::PARTS * units + begin;", "tile.expert * units + begin;"),
    (_STREAMED, "rows{x, pair / s, k", "rows{x, pair, k"),
    (_STREAMED, "base + r < count ? min(k, S::SPAN) : 0", "r < count ? min(k, S::SPAN) : 0"),
    (_STREAMED, "first * (stream.units * BLOCK_ROWS);", "0;"),
    (_STREAMED, "filled || full, staged};", "filled, staged};"),
    (_STREAMED, "        stream.fill_rest();\n        wait();", "        wait();"),
    ("linear_packed.cuh", "remaining <= run ? 0 :", "remaining < run ? 0 :"),
    ("linear_packed.cuh", "if constexpr (UNITS == 1) return half;", ""),
    (_TILES, "if (slices < SLICES) return", "if (slices <= SLICES) return"),
    (_TILES, "return ROWS > 8 && count > 8 ? 2 : 1;", "return 1;"),
    (_TILES, "f32* to = sums + g * S::ROWS + 8 * slice", "f32* to = sums + g * S::ROWS"),
    (_TILES, "sums + g * S::ROWS + own % SLICES * 8", "sums + g * S::ROWS"),
    ("formats.cuh", "(32u << 7) * 0x10001u", "(31u << 7) * 0x10001u"),
    ("formats.cuh", "__byte_perm(both, 0, 0x3232)", "__byte_perm(both, 0, 0x1010)"),
)

# (file, text around the place of a mutation, why it cannot change a result)
EQUIVALENT: tuple[tuple[str, str, str], ...] = ()
