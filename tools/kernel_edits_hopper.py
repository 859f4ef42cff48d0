"""Mistakes in Hopper's backward of attention, as ``kernel_edits`` has them for the others."""

from __future__ import annotations

__all__ = ["EDITS", "EQUIVALENT"]

_KERNEL, _KEYS, _WORK = "attention_backward_wgmma.cu", "attention_backward_keys.cuh", "attention_backward_wgmma.cuh"

# (file, text that occurs once, replacement)
EDITS: tuple[tuple[str, str, str], ...] = (
    # attention_backward_wgmma.cu: what the blocks need
    (_KERNEL, "if (left <= 0) return;", "if (left <= M) return;"),
    (_KERNEL, "lanes = LANES / 2; lanes", "lanes = LANES / 4; lanes"),
    (_KERNEL, "if (row < left) {\n            const Pack", "if (row <= left) {\n            const Pack"),
    (_KERNEL, "lse[at] * LOG2_E : 0.f;", "lse[at] : 0.f;"),
    # tiles of queries
    (_KERNEL, "(low & 32 ? -32 : 32)", "32"),
    (_KERNEL, "r + half * 4 < left);", "r < left);"),
    (_KERNEL, "r + half * 4 < left);", "r + half * 4 <= left);"),
    (_KERNEL, "from += 4 * width;", "from += 8 * width;"),
    (_KERNEL, "+ lane * 4 + i), stats + (at + i)", "+ lane * 4 + i), stats + at"),
    (_KERNEL, "at += 2 * M * num_heads;", "at += 2 * M;"),
    (_KERNEL, "from += D / 8 - (work.last", "from += -(work.last"),
    (_KERNEL, "at += 2 * M * (1 - (work.last - tile) * num_heads);", ""),
    (_KERNEL, "x, row * (width / 8) + first_head * (D / 8)", "x, row * (width / 8)"),
    (_KERNEL, "num_heads + first_head) * (2 * M)", "num_heads) * (2 * M)"),
    # turns
    (_KERNEL, "turns + tile, mine + 1);", "turns + tile, 1);"),
    (_KERNEL, "bar.begin[stage] = mine == 0;", "bar.begin[stage] = 1;"),
    (_KERNEL, "bar.begin[stage] = mine == 0;", "bar.begin[stage] = 0;"),
    (_KERNEL, "tile = i64(work.number + t) * num_heads", "tile = i64(t) * num_heads"),
    (_KERNEL, "i64(work.number + t) * num_heads + head;", "i64(work.number + t) * num_heads;"),
    # steps
    (_KERNEL, "lse, at + i * 64, work.window", "lse, at, work.window"),
    (_KERNEL, "work.window, scaling);", "work.window, Scaling<T, CAPPED>(1.f, 1.f));"),
    (_KERNEL, "keys.differ(ds, score[i], dp, lse, scaling);", "keys.differ(ds, score[i], dp, lse - M, scaling);"),
    (_KERNEL, "keys.add_rows(keys.dv, p,", "keys.add_rows(keys.dv, ds,"),
    (_KERNEL, "if (i + 1 < PARTS) keys.add_rows", "if (i < PARTS) keys.add_rows"),
    (_KERNEL, "multiply_queries(next);", "multiply_queries(stage);"),
    (_KERNEL, "at = at + M == far ? near : at + M;", "at += M;"),
    # keys and results
    (_KERNEL, "keys + i64(row) * width + vector * 8, row < left);", "keys + i64(row) * width + vector * 8, true);"),
    (_KERNEL, "values + i64(row) * width + vector * 8, row < left);", "keys + i64(row) * width, row < left);"),
    (_KERNEL, "keys.dv, 1.f, dx", "keys.dv, scale, dx"),
    (_KERNEL, "keys.dk, scale, dx", "keys.dk, 1.f, dx"),
    (_KERNEL, "group, Scaling<T, CAPPED>(scale, softcap));", "group, Scaling<T, CAPPED>(1.f, softcap));"),
    # convert_dq
    (_KERNEL, "if (threadIdx.x == 0) turns[tile] = 0;", ""),
    (_KERNEL, "if (threadIdx.x == 0) turns[tile] = 0;", "if (threadIdx.x == 0 && head == 0) turns[tile] = 0;"),
    (_KERNEL, "tile = i64(blockIdx.x) * num_heads + head;", "tile = i64(blockIdx.x) * num_heads;"),
    (_KERNEL, "i < M * D / 16; i += 256", "i < M * D / 16 - 256; i += 256"),
    (_KERNEL, "row = i / GROUPS % 8, warp", "row = i / GROUPS % 4, warp"),
    (_KERNEL, "((part * GROUPS + columns) * GROUP", "(columns * GROUP"),
    (_KERNEL, "warp * WARP + row * 4) * 4", "warp * WARP + row) * 4"),
    (_KERNEL, "four.v[0] * scale", "four.v[0]"),
    (_KERNEL, "four.v[1] * scale", "four.v[0] * scale"),
    (_KERNEL, "four.v[2] * scale", "four.v[0] * scale"),
    (_KERNEL, "four.v[3] * scale", "four.v[3]"),
    (_KERNEL, "(M == 128 ? part * ROWS : 0) + warp", "warp"),
    (_KERNEL, "(M == 128 ? 0 : part * COLUMNS) + columns", "columns"),
    (_KERNEL, "dx + i64(start + r) *", "dx + i64(r) *"),
    (_KERNEL, "* D + head * D + column;", "* D + column;"),
    (_KERNEL, "if (r < length) store", "if (r <= length) store"),
    (_KERNEL, "if (r < length) store", "if (r + 8 < length) store"),
    (_KERNEL, "if (r + 8 < length) store", "if (r + 8 <= length) store"),
    (_KERNEL, "if (r + 8 < length) store", "if (r < length) store"),
    (_KERNEL, "to + i64(8) *", "to + i64(4) *"),
    # attention_backward_keys.cuh
    (_KEYS, "(vector % 8 ^ row % 8) * 8", "vector % 8 * 8"),
    (_KEYS, "a + (part * (MINE * 8) + i / 4", "a + (i / 4"),
    (_KEYS, "rows = M == 128 ? part : 0,", "rows = 0,"),
    (_KEYS, "columns = M == 128 ? 0 : part;", "columns = 0;"),
    (_KEYS, "- here - 8 * half;", "- here;"),
    (_KEYS, "if (distance < 0 ||", "if (distance <= 0 ||"),
    (_KEYS, "distance >= window)) score", "distance > window)) score"),
    (_KEYS, "if (near < MINE - 1 ||", "if (near < 0 ||"),
    (_KEYS, "near + 63 >= window)", "near >= window)"),
    (_KEYS, "exp2f(high * factor - shift.v[1])", "exp2f(high * factor - shift.v[0])"),
    (_KEYS, "(dp[i + 1] - less.v[1])", "(dp[i + 1] - less.v[0])"),
    (_KEYS, "if (begin) return;", ""),
    (_KEYS, "sums + part * (M * D / 2) + thread", "sums + thread"),
    (_KEYS, "if (row >= left) break;", "if (row > left) break;"),
    # attention_backward_wgmma.cuh
    (_WORK, "1, rows) <= of)", "1, rows) < of)"),
    (_WORK, "+ KEYS - 1) / KEYS;", ") / KEYS;"),
    (_WORK, "lanes = WARP / 2; lanes > 0;", "lanes = WARP / 4; lanes > 0;"),
    (_WORK, "if (entry >= total) store", "if (false) store"),
    (_WORK, "from_low(level + 1, end, low) :", "from_low(level, end, low) :"),
    (_WORK, ": from_low(begin, level, low));", ": 0);"),
    (_WORK, "place += from_low(0, begin, low) +", "place +="),
    (_WORK, "i < mine.number && level >= low;", "i < mine.number;"),
    (_WORK, "key + KEYS - 1 + window) : length)", "key + window) : length)"),
    (_WORK, "seen > 0 ? seen / KEYS : 0);", "seen > 0 ? (seen + KEYS - 1) / KEYS : 0);"),
    (_WORK, "shift + t * M / KEYS;", "shift + (t * M + M) / KEYS;"),
    (_WORK, "min(high, begin + round - 1) - level", "high - level"),
    (_WORK, "level - max(low, begin);", "level - begin;"),
    (_WORK, "max(0, begin - low) + in_round;", "in_round;"),
)  # fmt: skip

# (file, text around the edit, why no test can notice it)
EQUIVALENT: tuple[tuple[str, str, str], ...] = (
    (
        _KERNEL,
        "bar_sync(2 + keys.part, GROUP);",
        "each warp has waited for its last product of v before the last step's barrier of both warpgroups",
    ),
)
