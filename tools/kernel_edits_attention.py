"""Mistakes in what self-attention's kernels have beside those of attention, and in a decode step's rings of tiles, as
``kernel_edits`` has the others."""

from __future__ import annotations

__all__ = ["EDITS", "EQUIVALENT"]

_FMA, _MMA = "attention_backward_fma.cu", "attention_backward_mma.cu"
_RING = "attention_decode_ring.cuh"

# (file, text that occurs once, replacement)
EDITS: tuple[tuple[str, str, str], ...] = (
    # keys and values as rows of x, and lse
    ("attention.cuh", "return i64(position) * H * D;", "return i64(position + 1) * H * D;"),
    ("attention.cuh", "(largest + log2f(sum)) * LN_2", "largest * LN_2 + log2f(sum)"),
    ("attention_prefill_mma.cu", "(i64(tile.start) * heads + num_heads + kv_head) * D",
     "(i64(tile.start) * heads + kv_head) * D"),
    ("attention_prefill_mma.cu", "v = k + H * D;", "v = k;"),
    ("attention_prefill_mma.cu", "lane % 4 == 0 && row < end)", "lane % 4 == 0 && row <= end)"),
    ("attention_prefill_mma.cu", "log_sum(largest[m][half] * factor, total)", "log_sum(largest[m][half], total)"),
    ("attention_prefill_wgmma.cu", "from += i64(token + row) * next;", "from += i64(token) * next;"),
    ("attention_prefill_wgmma.cu", "v = k + H * D;", "v = k;"),
    ("attention_prefill_wgmma.cu", "row < tile.end)\n                lse", "row <= tile.end)\n                lse"),
    ("attention_prefill_wgmma.cu", "log_sum(largest[half] * factor, total)", "log_sum(largest[half], total)"),
    ("attention_prefill_fma.cu", "v = k + H * D;", "v = k;"),
    ("attention_prefill_fma.cu", "log_sum(largest[i], sum[i])", "log_sum(largest[i], 1.f)"),
    # attention_decode_ring.cuh, and the sums that lie where a ring was
    (_RING, "token < high;\n                const C* start", "token <= high;\n                const C* start"),
    (_RING, "(VALUES ? STAGES : 0) + stage)", "stage)"),
    ("attention_decode.cuh", "keys <= alone ? alone", "keys <= alone ? alone / 2"),
    (_RING, "stage + 1 == STAGES ? 0 : stage + 1", "0"),
    (_RING, "cp_async_wait<2 * STAGES - 1>();", "cp_async_wait<2 * STAGES>();"),
    (_RING, "if (from <= high) {", "if (from < high) {"),
    (_RING, "(stage, number, i * 16)", "(stage, number + 1, i * 16)"),
    (_RING, "past.fresh - at, past.value)", "past.fresh - at, past.key)"),
    ("attention_decode.cuh", "larger(Q * STRIDE, RING_BYTES<C, D, STAGES> / 4)", "RING_BYTES<C, D, STAGES> / 4"),
    # attention.cuh: soft limits and sinks
    ("attention.cuh", "scale / softcap * (unit * IN_POWERS)", "scale * (unit * IN_POWERS)"),
    ("attention.cuh", "(CAPPED ? bend(product * inner) : product)", "(CAPPED ? bend(product) : product)"),
    ("attention.cuh", "CAPPED ? bend(x) * factor : x", "CAPPED ? bend(x) : x"),
    ("attention.cuh", "products[i] = bend(products[i] * inner);", "products[i] = products[i] * inner;"),
    ("attention.cuh", "fmaxf(0.f, 1.f - bent * bent)", "1.f - bent * bent"),
    ("attention.cuh", "fmaxf(0.f, 1.f - bent * bent)", "fmaxf(0.f, 1.f - bent)"),
    ("attention.cuh", "log2f(weight) + shift", "log2f(weight)"),
    ("attention.cuh", "to_float(sinks[head]) * LOG2_E", "to_float(sinks[head])"),
    ("attention_decode.cuh", "a.sinks, heads.first + row)", "a.sinks, row)"),
    ("attention_decode.cuh", "a.sinks, heads.first + i / D)", "a.sinks, i / D)"),
    # attention_delta.cu
    ("attention_delta.cu", "row < rows && lane * E < D", "row <= rows && lane * E < D"),
    ("attention_delta.cu", "row < rows && lane * E < D", "row < rows && lane * E <= D"),
    ("attention_delta.cu", "lanes = LANES / 2; lanes", "lanes = LANES / 4; lanes"),
    ("attention_delta.cu", "row < rows && lane == 0", "row <= rows && lane == 0"),
    # attention_backward.cuh
    ("attention_backward.cuh", "kv_head * group + row % group;\n    }\n    // Of a row's",
     "kv_head * group;\n    }\n    // Of a row's"),
    ("attention_backward.cuh", "+ kv_head * group + row % group) * D", "+ kv_head + row % group) * D"),
    ("attention_backward.cuh", "+ num_heads + kv_head) * D", "+ num_heads) * D"),
    ("attention_backward.cuh", "return key(token) + H * D;", "return key(token) + D;"),
    ("attention_backward.cuh", "kv_head * group + (row - token * group)", "kv_head * group"),
    ("attention_backward.cuh", "i64(start + token) * 2 * H) * D", "i64(start + token) * H) * D"),
    ("attention_backward.cuh", "? last + window : tile.end)", "? last + window - 1 : tile.end)"),
    ("attention_backward.cuh", "window < tile.end - last ?", "window <= tile.end - last + 1 ?"),
    ("attention_backward.cuh", "low = tile.first * group;", "low = (tile.first + 1) * group;"),
    ("attention_backward.cuh", "return distance >= 0 &&", "return distance > 0 &&"),
    ("attention_backward.cuh", "distance < window)", "distance <= window)"),
    # attention_fma.cuh
    ("attention_fma.cuh", "end - 1)) + vector % (D / 8) * 8", "end)) + vector % (D / 8) * 8"),
    ("attention_fma.cuh", "(tx + 16 * j) * STRIDE<D> + d", "(tx + 16 * j) * STRIDE<D>"),
    ("attention_fma.cuh", "acc[i][j][1] += p[i].v[e] * value.v[1];", "acc[i][j][1] += p[i].v[e] * value.v[0];"),
    # attention_backward_fma.cu
    (_FMA, "const bool seen = row < sight.high && sees", "const bool seen = sees"),
    (_FMA, "row / group - (tile.first + R * ty + i)", "row / group - (tile.first + R * ty)"),
    (_FMA, "head.row(min(row, sight.high - 1));", "head.row(row);"),
    (_FMA, "scaling.score(p[i][j]) - shift[j]", "p[i][j] * LOG2_E - shift[j]"),
    (_FMA, "p[i][j] * (ds[i][j] - deltas[j])", "p[i][j] * ds[i][j]"),
    (_FMA, "fetch_queries(at);\n        add_rows<D, C>(dv", "add_rows<D, C>(dv"),
    (_FMA, "next.stash(rows);\n        put_weights(weights, ds);", "next.stash(rows);"),
    (_FMA, "if (token >= tile.end) break;", "if (token > tile.end) break;"),
    (_FMA, "dk[i], [&](float sum) { return sum * scale; }", "dk[i], [&](float sum) { return sum; }"),
    (_FMA, "x + head.value(token); });\n    fetch_queries", "x + head.key(token); });\n    fetch_queries"),
    (_FMA, "- 1));\n        shift[i]", "- 1) / 2);\n        shift[i]"),
    (_FMA, "position - (at + tx + 16 * j)", "position - (at + tx)"),
    (_FMA, "p * (ds[i][j] - deltas[i])", "p * (ds[i][j] + deltas[i])"),
    (_FMA, "if (row >= tile.end) break;", "if (row > tile.end) break;"),
    (_FMA, "dq[i], [&](float sum) { return sum * scale; }", "dq[i], [&](float sum) { return sum; }"),
    (_FMA, "blockIdx.x);  // the first keys", "blockIdx.x + 1);  // the first keys"),
    # attention_mma.cuh
    ("attention_mma.cuh", "first + r < end && vector * 8 < D)", "vector * 8 < D)"),
    ("attention_mma.cuh", "first + r < end && vector * 8 < D)", "first + r < end)"),
    ("attention_mma.cuh", "valid = first + r < end && vector * 8 < D;", "valid = vector * 8 < D;"),
    ("attention_mma.cuh", "valid = first + r < end && vector * 8 < D;", "valid = first + r < end;"),
    ("attention_mma.cuh", "r < COUNT && first + r < end;", "r < COUNT && first + r <= end;"),
    ("attention_mma.cuh", "if (vector * 8 < D) store", "if (vector * 8 <= D) store"),
    ("mma_tiles.cuh", "score[m][2 * j], a[m], left", "score[m][2 * j], a[m], right"),
    ("attention_mma.cuh", "acc[m][2 * j], a[m], left", "acc[m][2 * j], a[m], right"),
    ("attention_mma.cuh", "weights[m][2 * i + e / 2];", "weights[m][2 * i + e % 2];"),
    ("attention_mma.cuh", "pack<T>(from[e % 2 * 2], from[e % 2 * 2 + 1])",
     "pack<T>(from[e % 2 * 2 + 1], from[e % 2 * 2])"),
    ("attention_mma.cuh", "ldmatrix_x4_trans(both,", "ldmatrix_x4(both,"),
    ("mma_tiles.cuh", "b_rows + across.at(", "b_rows + down.at("),
    ("attention_mma.cuh", "if (j >= chunks) break;", ";"),
    ("mma_tiles.cuh", "if (j / 2 >= chunks) break;", ";"),
    ("mma_tiles.cuh", "acc[m][j][2 * half] * factor[m][half]", "acc[m][j][2 * half]"),
    # attention_backward_mma.cu: dk and dv
    (_MMA, "if (row < end && threadIdx.x < 2 * ROWS)", "if (threadIdx.x < 2 * ROWS)"),
    (_MMA, "lse[where(row)] * LOG2_E : delta", "lse[where(row)] : delta"),
    (_MMA, "e) / group - key - lane / 4;", "e) / group - key;"),
    (_MMA, "!sees(ahead - m * 16 - half * 8, window)", "!sees(ahead - m * 16 + half * 8, window)"),
    (_MMA, "factor - shift.v[e % 2]", "factor - shift.v[e / 2]"),
    (_MMA, "load<2>(stats + (N + j) * 8", "load<2>(stats + j * 8"),
    (_MMA, "(ds[m][j][e] - delta.v[e % 2])", "(ds[m][j][e] - delta.v[e / 2])"),
    (_MMA, "(SPLIT * STEP) * STEP;", "(SPLIT * STEP) * STEP - 1;"),
    (_MMA, "column = warp % SPLIT * CHUNKS * 16;", "column = 0;"),
    (_MMA, "if (at + ROWS < sight.high) fetch", "if (at + 2 * ROWS < sight.high) fetch"),
    (_MMA, "if (far < key ||", "if (far < key + 16 ||"),
    (_MMA, "near - (key + SIZE - 1) >= window))", "near - (key + SIZE - 1) >= window - 1))"),
    (_MMA, "if (near < key + SIZE - 1 ||", "if (near < key ||"),
    (_MMA, "far - key >= window)) Pairs", "near - key >= window)) Pairs"),
    (_MMA, "add_rows<T, D>(dv, p,", "add_rows<T, D>(dv, ds,"),
    (_MMA, "add_rows<T, D>(dk, ds, q", "add_rows<T, D>(dk, ds, out"),
    (_MMA, "column, dk, scale,", "column, dk, 1.f,"),
    # attention_backward_mma.cu: dq
    (_MMA, "/ group - at - lane % 4 * 2;", "/ group - at;"),
    (_MMA, "factor - shift[m][e / 2]", "factor - shift[m][e % 2]"),
    (_MMA, "(ds[m][j][e] - deltas[m][e / 2])", "(ds[m][j][e] - deltas[m][e % 2])"),
    (_MMA, "min(mine + i * 8 + lane / 4, tile.end - 1)", "min(mine + i * 8, tile.end - 1)"),
    (_MMA, "if (at + KEYS < band.high) fetch", "if (at + 2 * KEYS < band.high) fetch"),
    (_MMA, "if (at > far ||", "if (at + KEYS > far ||"),
    (_MMA, "at + KEYS <= near - window + 1)", "at + KEYS <= near - window + 2)"),
    (_MMA, "if (at + KEYS - 1 > near ||", "if (at + KEYS - 1 > far ||"),
    (_MMA, "at <= far - window)) Pairs", "at <= near - window)) Pairs"),
    (_MMA, "outs + warp * SIZE * WIDTH, values", "outs + warp * SIZE * WIDTH, keys"),
    (_MMA, "factors[m][1] = scale;", "factors[m][1] = 1.f;"),
)  # fmt: skip

# (file, text around the edit, why no test can notice it)
EQUIVALENT: tuple[tuple[str, str, str], ...] = (
    (
        _MMA,
        "__syncwarp();  // its last reads of them are done",
        "the emulator takes ldmatrix, which a warp does together, as ordering; on a GPU a lane may be ahead of others",
    ),
)
