"""Breaks the kernels on purpose and counts how many of the breaks the op tests find on the emulator.

    .venv/bin/python -m tools.mutate_kernels [-k TEXT] [--report tools/mutations.md]

Each mutation is one edit of one file in ``cuda_src/``: every ``__syncthreads();`` is deleted in turn, as is every other
barrier and wait (``WAITS``), and the edits in ``EDITS`` are made. The ops whose launches use that file then run their
test cases on a copy with the edit, until one fails. A mutation that no case notices has survived, unless ``EQUIVALENT``
explains why none can. Exit status 1 if fewer than 95% are killed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cuplama.lab.check import WrongResultError, check, planned, run_guarded
from cuplama.lab.emulation import EmulatedDevice
from cuplama.lab.workloads import Workload
from cuplama.ops import OPS
from cuplama.ops.abstract import abstract
from cuplama.ops.launch import BoundLaunch, Device
from cuplama.simt.emulator import CUDA_SRC, KernelFault, precompile, run
from tests.ops import harness, test_bias, test_ops, test_small_gpu

WANTED = 0.95
PROCESSES = 2
WAITS = re.compile(
    r"(__syncthreads|__syncwarp|cp_async_wait<\d+>|bar_sync|mbarrier_wait|mbarrier_arrive)\((?:[^;{()]|\([^()]*\))*\);"
)

# (file, text that occurs once, replacement). The text may span lines; `...` in a report is cut.
EDITS: tuple[tuple[str, str, str], ...] = (
    # `<` to `<=` in bounds checks, and limits that are one too large or too small
    ("common.cuh", "if (at + i < size) row[at + i] = x.v[i];", "if (at + i <= size) row[at + i] = x.v[i];"),
    ("common.cuh", "x.v[i] = at + i < size ? row", "x.v[i] = at + i <= size ? row"),
    ("common.cuh", "vectorized && at + W <= size) return load", "vectorized && at <= size) return load"),
    ("common.cuh", "vectorized && at + W <= size) return store", "vectorized && at <= size) return store"),
    ("common.cuh", "lanes = WARP / 2; lanes > 0; lanes /= 2) x +=", "lanes = WARP / 4; lanes > 0; lanes /= 2) x +="),
    ("common.cuh", "x = warp_sum(lane < warps ?", "x = warp_sum(lane <= warps ?"),
    ("activation.cu", "* 8; i < f;", "* 8; i <= f;"),
    ("activation.cu", "* 8; i < size;", "* 8; i <= size;"),
    ("activation.cu", "const bool vectorized = f % 8 == 0 && aligned(x, y);", "const bool vectorized = aligned(x, y);"),
    ("embedding.cu", "const bool vectorized = d % 8 == 0 && aligned(table, x);",
     "const bool vectorized = aligned(table, x);"),
    ("embedding.cu", "position_table + i64(positions[blockIdx.x]) * d",
     "position_table + i64(positions[blockIdx.x] + 1) * d"),
    ("residual.cu", "x + i64(rows[blockIdx.x]) * d", "x + i64(rows[blockIdx.x] + 1) * d"),
    ("kv_cache.cu", "at < 2 * H * D; at", "at <= 2 * H * D; at"),
    ("rope.cu", "at < columns; at", "at <= columns; at"),
    ("rope.cu", "at < turned && i < 2 * h", "at < turned && i <= 2 * h"),
    ("norm.cu", "if (index >= i64(n)", "if (index > i64(n)"),
    ("norm.cu", "squares += at + j < d ?", "squares += at + j <= d ?"),
    ("advance.cu", "i < b; i += blockDim.x", "i <= b; i += blockDim.x"),
    ("advance.cu", "max(token[i], 0);", "token[i];"),
    ("sampling.cu", "row < b && token[row] >= 0", "row < b && token[row] >= -1"),
    ("sampling.cu", "if (z.v[i] != z.v[i]) mine = BROKEN;", ";"),
    ("sampling.cu", "!(x < infinity()) ? BROKEN", "x > infinity() ? BROKEN"),
    ("sampling.cu", "x > -infinity() ? rank_of(x, id) : 0;", "rank_of(x, id);"),
    ("sampling.cu", "max(token[row], 0)] - most", "token[row]] - most"),
    ("attention_prefill_fma.cu", "const bool there = token < fresh;", "const bool there = token <= fresh;"),
    ("attention_prefill_fma.cu", "high - 1);\n                held[u]", "high);\n                held[u]"),
    ("attention_prefill_fma.cu", "if (distance < 0 ||", "if (distance <= 0 ||"),
    ("attention_prefill_fma.cu", "distance >= window)", "distance > window)"),
    # the page table
    ("kv_cache.cu", "slot_mapping[blockIdx.x] / S, place", "slot_mapping[blockIdx.x] / S + 1, place"),
    ("kv_cache.cu", "page * H + head % H", "page * H + head % H + 1"),
    ("advance.cu", "min(at / S, M - 1)] * S", "min(at / S + 1, M - 1)] * S"),
    # factors, operands, lanes
    ("kv_cache.cu", "head < H ? k : v", "head < H ? v : k"),
    ("rope.cu", "low ? -to_float(partner.v[j])", "low ? to_float(partner.v[j])"),
    ("rope.cu", "low ? at + h : at - h", "low ? at + h : at + h"),
    ("norm.cu", "inverse * to_float(scale[c].v[j])", "to_float(scale[c].v[j])"),
    ("activation.cu", "const T* up = gate + f;", "const T* up = gate + f + 1;"),
    ("activation.cuh", "over_one_plus_exp<T>(x, x);", "over_one_plus_exp<T>(x, -x);"),
    ("activation.cuh", "0.044715f * x * x * x", "0.044715f * x * x"),
    ("activation.cuh", "x * -0.7071067812f", "x * 0.7071067812f"),
    # linear.cu: the stream of weights
    ("linear.cu", "at + i * WARP * W < k &&", "at + i * WARP * W <= k &&"),
    ("linear.cu", "&& row + o % NEW < m);", "&& row + o % NEW <= m);"),
    ("linear.cu", "if (at - lane * W >= k) {", "if (at - lane * W > k) {"),
    ("linear.cu", "row += NEW;", ";"),
    ("linear.cu", "from += i64(NEW) * k - (at - lane * W);", "from += i64(NEW) * k;"),
    ("linear.cu", "(i64(o / NEW) * m + o % NEW) * k", "(i64(o / NEW) * (m - 1) + o % NEW) * k"),
    ("linear.cu", "left = (end - begin) * steps;", "left = (end - begin) * steps - 1;"),
    ("linear.cu", "slot + 1 == DEPTH ? 0", "slot == DEPTH ? 0"),
    ("linear.cu", "cp_async_wait<DEPTH - 1>();", "cp_async_wait<DEPTH>();"),
    ("linear.cu", "if (at < k) multiply(vector[i]", "if (at <= k) multiply(vector[i]"),
    ("linear.cu", "for (int at = lane; at < k; at += WARP)", "for (int at = lane; at <= k; at += WARP)"),
    ("linear.cu", "p % COLUMNS, m - 1)", "p % COLUMNS, m)"),
    ("linear.cu", "(m + NEW - 1) / NEW", "m / NEW"),
    # linear.cu: sums, norms and what is stored
    ("linear.cu", "if (stores && column < m) y", "if (stores && column <= m) y"),
    ("linear.cu", "if (column < m && r < ROWS) {", "if (column <= m && r < ROWS) {"),
    ("linear.cu", "if (column < m && r < ROWS) {", "if (column < m && r <= ROWS) {"),
    ("linear.cu", "&& r < ROWS && o < COLUMNS;", "&& r <= ROWS && o < COLUMNS;"),
    ("linear.cu", "&& r < ROWS && o < COLUMNS;", "&& r < ROWS && o <= COLUMNS;"),
    ("linear.cu", "total, COLUMNS * (WARP / VALUES))", "total, WARP / VALUES)"),
    ("linear.cu", "(upper ? v[N / 2 + i] : v[i]) +", "(upper ? v[i] : v[N / 2 + i]) +"),
    ("linear.cu", "to_float(b[o / COLUMNS * m + column])", "to_float(b[column])"),
    ("linear.cu", "from_float<U>(residual + total)", "from_float<U>(total)"),
    ("linear.cu", "warp_sum(lane < warps ?", "warp_sum(lane <= warps ?"),
    ("linear.cu", "const float d = v.v[j] - mean[r];", "const float d = v.v[j];"),
    ("linear.cu", "sqrtf(inverse[r] / k + eps)", "sqrtf(inverse[r] + eps)"),
    ("linear.cu", "(v.v[j] - mean[r]) * inverse[r]", "v.v[j] * inverse[r]"),
    ("linear.cu", "shift = load<W>(h + at);", "shift = load<W>(h);"),
    # linear.cu: where the scale of a norm waits, and the rows of x
    ("linear.cu", "(staged + at / W * W) + at % W", "(staged) + at"),
    ("linear.cu", "(staged + at / W * W) + at % W", "(staged + at / W * W + W) + at % W"),
    ("linear.cu", "scale_at<8, T>(staged, at + i), g", "scale_at<8, T>(staged, at), g"),
    ("linear.cu", "g + at + i, true);", "g + at + 8, true);"),
    ("linear.cu", "*scale_at<1, T>(staged, at) = g[at];", "*scale_at<1, T>(staged, at + 1) = g[at];"),
    ("linear.cu", "<DEPTH>();  // the scale came before the ring\n    if (vectorized)\n        normalise<RMS",
     "<DEPTH + 1>();  // the scale came before the ring\n    if (vectorized)\n        normalise<RMS"),
    ("linear.cu", "at += MANY * stride) {", "at += (MANY + 1) * stride) {"),
    ("linear.cu", "at + i * stride < size) v[i] =", "at + i * stride <= size) v[i] ="),
    ("linear.cu", "at + i * stride < size) store<W>", "at + i * stride <= size) store<W>"),
    ("linear.cu", "size % W == 0 && aligned(x)", "aligned(x)"),
    # linear_mma.cu: the stream of weights, slices of k
    ("linear_mma.cu", "* CHUNKS + chunk) * CHUNK +", "* CHUNKS + chunk + 1) * CHUNK +"),
    ("linear_mma.cu", "(phase * WARPS + int(threadIdx.x / WARP))", "(phase + int(threadIdx.x / WARP))"),
    ("linear_mma.cu", "(COLUMNS - ROWS) < end &&", "(COLUMNS - ROWS) <= end &&"),
    ("linear_mma.cu", "at + i % 2 * 32 < k;", "at + i % 2 * 32 <= k;"),
    ("linear_mma.cu", "i64(COLUMNS > ROWS ? ROWS : m) * k;", "i64(ROWS) * k;"),
    ("linear_mma.cu", "if (++chunk == CHUNKS) {", "if (++chunk > CHUNKS) {"),
    ("linear_mma.cu", "column = begin, phase++;", "phase++;"),
    ("linear_mma.cu", "slot + 1 == DEPTH ? 0", "slot == DEPTH ? 0"),
    ("linear_mma.cu", "cp_async_wait<DEPTH - 1>();", "cp_async_wait<DEPTH>();"),
    ("linear_mma.cu", "(blockIdx.x + side) / gridDim.x;", "(blockIdx.x + side) / gridDim.x - side;"),
    # linear_mma.cu: products, sums and what is stored
    ("mma.cuh", "mma_m16n8k16_bf16(d, a, b)", "mma_m16n8k16_bf16(d, {b[0], b[0], b[1], b[1]}, {a[0], a[2]})"),
    ("linear_mma.cu", "{p[0], q[0], p[1], q[1]}", "{q[0], p[0], q[1], p[1]}"),
    ("linear_mma.cu", "{p[2], q[2], p[3], q[3]}, {v[2], v[3]}", "{p[2], q[2], p[3], q[3]}, {v[3], v[2]}"),
    ("linear_mma.cu", "l < LEVELS; l++", "l < 1; l++"),
    ("linear_mma.cu", "sum[0][i] += sum[CHAINS - 1][i];", ";"),
    ("linear_mma.cu", "store<2>(partial + HALF,", "store<2>(partial,"),
    ("linear_mma.cu", "mine += TILE;", ";"),
    ("linear_mma.cu", "turn ^= 1;", ";"),
    ("linear_mma.cu", "r < count && column < end && phase", "r <= count && column < end && phase"),
    ("linear_mma.cu", "r < count && column < end && phase", "r < count && column <= end && phase"),
    ("linear_mma.cu", "&& phase == PHASES - 1) {", "&& phase == 0) {"),
    ("linear_mma.cu", "r >= count || column >= end) continue;", "r > count || column >= end) continue;"),
    ("linear_mma.cu", "r >= count || column >= end) continue;", "r >= count || column > end) continue;"),
    ("linear_mma.cu", "for (int warp = 0; warp < WARPS; warp++)", "for (int warp = 1; warp < WARPS; warp++)"),
    ("linear_mma.cu", "if (phase > 0) total[p] += earlier;", ";"),
    ("linear_mma.cu", "silu_of<T>(total[0]) * total[1]", "silu_of<T>(total[1]) * total[0]"),
    ("linear_mma.cu", "to_float(b[p * m + column])", "to_float(b[column])"),
    ("linear_mma.cu", "from_float<U>(residual[e] + activated<ACT, T>(total))",
     "from_float<U>(activated<ACT, T>(total))"),
    # linear_mma.cu: the rows of x
    ("linear_mma.cu", "there && at < k, vectorized)", "there && at <= k, vectorized)"),
    ("linear_mma.cu", "there(lane_row() < count), vectorized(aligned(x)) {", "there(true), vectorized(aligned(x)) {"),
    ("linear_mma.cu", "total, 2);\n        if", "total, 4);\n        if"),
    ("linear_mma.cu", "for (int p = 0; p < WARPS; p++) total", "for (int p = 1; p < WARPS; p++) total"),
    ("linear_mma.cu", "inside ? f(v.v[j])", "true ? f(v.v[j])"),
    ("linear_mma.cu", "* inverse * to_float(by.v[j])", "* to_float(by.v[j])"),
    ("linear_mma.cu", "value - to_float(high.v[j])", "value"),
    ("linear_mma.cu", "+ 32 * i, k - 8);", "+ 32 * i, k);"),
    ("linear_mma.cu", "cp_async_16(to + i * k + at, from", "cp_async_16(to + i * k + at + 8, from"),
    ("linear_mma.cu", "u32*>(to + i * k + at)", "u32*>(to + at)"),
    ("linear_mma.cu", "cp_async_wait<DEPTH>();", "cp_async_wait<DEPTH + 1>();"),
    ("linear_mma.cu", "partials() + 2 * PARTIAL;", "partials() + PARTIAL;"),
    # bias.cu
    ("bias.cu", "if (j < m) bias[j]", "if (j <= m) bias[j]"),
    ("bias.cu", "= from_float<U>(to_float(b[j]));", "= from_float<U>(to_float(b[threadIdx.x]));"),
    ("bias.cu", "if (j >= m) return;", "if (j > m) return;"),
    ("bias.cu", "i < n; i += gridDim.y", "i <= n; i += gridDim.y"),
    ("bias.cu", "i += gridDim.y)", "i += gridDim.y + 1)"),
    ("bias.cu", "a ? to_float(a[i * m + j]) + value", "a ? to_float(a[j]) + value"),
    ("bias.cu", "+ value : value", ": value"),
    # attention_decode.cu and its headers: bounds
    ("attention_decode_mma.cuh", "token < high;\n            const T* row = tile + (g",
     "token <= high;\n            const T* row = tile + (g"),
    ("attention_decode_mma.cuh", "token < high;\n            const T* row = tile + value",
     "token <= high;\n            const T* row = tile + value"),
    ("attention_decode_mma.cuh", "32 * c + 8 * t < D))\n                    keys",
     "32 * c + 8 * t <= D))\n                    keys"),
    ("attention_decode_mma.cuh", "64 * c + 8 * g < D))\n                    values",
     "64 * c + 8 * g <= D))\n                    values"),
    ("attention_decode_mma.cuh", "token < end ? p[u][i] * scale", "token <= end ? p[u][i] * scale"),
    ("attention_decode_mma.cuh", "token >= low && token < end ? p[u][i]", "token > low && token < end ? p[u][i]"),
    ("attention_decode_mma.cuh", "past.fresh - at < TILE && past.fresh >= at;",
     "past.fresh - at < TILE && past.fresh > at;"),
    ("attention_decode_mma.cuh", "g + 8 * u == number && 32", "g + 8 * u == number + 1 && 32"),
    ("attention_decode_mma.cuh", "value_row(i) == number && 64", "value_row(i) == number - 1 && 64"),
    ("attention_decode_mma.cuh", "if (t == 0 && g < Q) largest", "if (t == 0 && g <= Q) largest"),
    ("attention_decode_mma.cuh", "if (2 * t + j < Q && column < D)", "if (2 * t + j <= Q && column < D)"),
    ("attention_decode_mma.cuh", "if (2 * t + j < Q && column < D)", "if (2 * t + j < Q && column <= D)"),
    ("attention_decode.cuh", "length > window ? length - window : 0", "length > window ? length - window + 1 : 0"),
    ("attention_decode.cuh", "first = low / TILE * TILE;", "first = low;"),
    ("attention_decode.cuh", "max(min_keys, (each + 63) / 64 * 64)", "max(min_keys, each)"),
    ("attention_decode_fma.cuh", "min(tile + u * ROWS + row, end - 1)", "min(tile + u * ROWS + row, end)"),
    ("attention_decode_fma.cuh", "tile + j < end ? exp2f", "tile + j <= end ? exp2f"),
    ("attention_decode_fma.cuh", "for (int j = lane; j < KEYS; j += WARP) {",
     "for (int j = lane; j <= KEYS; j += WARP) {"),
    ("attention_decode.cu", "room[i] = row < here && column < D", "room[i] = row <= here && column < D"),
    ("attention_decode.cu", "if (lane * 8 < D) store<8>(to", "if (lane * 8 <= D) store<8>(to"),
    ("attention_decode.cu", "if (lane + j * WARP < turned)", "if (lane + j * WARP <= turned)"),
    ("attention_decode.cu", "if (i / QUERY >= here ||", "if (i / QUERY > here ||"),
    ("attention_decode.cuh", "i < heads.count * D; i += Numbers::THREADS)",
     "i <= heads.count * D; i += Numbers::THREADS)"),
    ("attention_decode.cuh", "s + j * STEP < count;", "s + j * STEP <= count;"),
    ("attention_decode.cuh", "== u32(blocks - 1);", "== u32(blocks);"),
    ("attention_decode.cuh", "if (last) *counter = 0;", ";"),
    ("attention_decode.cu", "(span.count - 1) % taking == int", "(span.count - 1) == int"),
    ("attention_decode.cu", "if (split != int(blockIdx.x)) fetch_tiles<WARPS>(tiles, past, begin, min(end, fresh));",
     ";"),
    # attention_decode.cu and its headers: pages, operands, factors, lanes
    ("attention_decode_mma.cuh", "? past.k + token_offset<S, D>(past.table, at,",
     "? past.k + token_offset<S, D>(past.table + 1, at,"),
    ("attention_decode_mma.cuh", "? past.v + token_offset<S, D>(past.table, at,",
     "? past.v + token_offset<S, D>(past.table + 1, at,"),
    ("attention_decode_mma.cuh", "row = past.k + token_offset<S, D>(past.table, token,",
     "row = past.k + token_offset<S, D>(past.table, token + 1,"),
    ("attention_decode_fma.cuh", "i64 at = token_offset<S, D>(past.table, token,",
     "i64 at = token_offset<S, D>(past.table, token + 1,"),
    ("attention_decode.cu", "i64(slot / S) * a.H", "i64(slot / S + 1) * a.H"),
    ("attention_decode_mma.cuh", "{a.v[0], 0, a.v[1], 0}, {keys[u][c].v[0], keys[u][c].v[1]}",
     "{keys[u][c].v[0], 0, keys[u][c].v[1], 0}, {a.v[0], a.v[1]}"),
    ("attention_decode_mma.cuh", "{a.v[2], 0, a.v[3], 0}", "{a.v[3], 0, a.v[2], 0}"),
    ("attention_decode_mma.cuh", "a, high, T()", "{high[0], high[1], high[0], high[1]}, {a[0], a[2]}, T()"),
    ("mma.cuh", "mma_m16n8k16_bf16(d, a, b)", "mma_m16n8k16_bf16(d, {a[1], a[0], a[3], a[2]}, b)"),
    ("attention_decode_mma.cuh", "(x & 0xffffu) | y << 16", "(y & 0xffffu) | x << 16"),
    ("attention_decode_mma.cuh", "tile.fetch_keys(past, at + TILES * STEP, high);",
     "tile.fetch_keys(past, at + STEP, high);"),
    ("attention_decode_mma.cuh", "shrink, 8 * t + 4)};", "shrink, 8 * t)};"),
    ("attention_decode_mma.cuh", "acc[c][w][j] *= shrinks[j % 2];", ";"),
    ("attention_decode_mma.cuh", "most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));", ";"),
    ("attention_decode_fma.cuh", "acc[h][i] *= shrink[h];", ";"),
    ("attention_decode_fma.cuh", "sum[h] * shrink[h] + total", "sum[h] + total"),
    ("attention_decode_fma.cuh", "distance >= LANES; distance", "distance > LANES; distance"),
    ("attention_decode_fma.cuh", "if (lane % SAME == 0 && first + i < Q)", "if (lane % SAME == 1 && first + i < Q)"),
    ("attention_decode_fma.cuh", "(w > 0 ? place : 0.f)", "(w > 1 ? place : 0.f)"),
    ("attention_decode.cu", "(a.scale * LOG2_E) : 0.f", "LOG2_E : 0.f"),
    ("attention_decode.cuh", "exp2f(largest[w][row] - top)", "exp2f(top - largest[w][row])"),
    ("attention_decode.cuh", "const float shrink = exp2f(before - top);", "const float shrink = 1.f;"),
    ("attention_decode.cu", "side = low ? -partner : partner", "side = low ? partner : -partner"),
    ("attention_decode.cu", "warp_sum(squares) / D + eps", "warp_sum(squares) + eps"),
    ("attention_decode.cu", "normed && j <= here,", "normed && j < here,"),
    ("attention_decode.cu", "scales[i], j <= here, to", "scales[i], j < here, to"),
    ("attention_decode.cu", "(j == here ? token.k : token.v) + at", "(j == here ? token.v : token.k) + at"),
    # attention_prefill_mma.cu
    ("attention_prefill_mma.cu", "row + r < high - first;", "row + r <= high - first;"),
    ("attention_prefill_mma.cu", "tile.first + r < tile.end && vector", "tile.first + r <= tile.end && vector"),
    ("attention_prefill_mma.cu", "if (distance < 0 ||", "if (distance <= 0 ||"),
    ("attention_prefill_mma.cu", "distance >= window)", "distance > window)"),
    ("attention_prefill_mma.cu", "if (at + KEYS - 1 > near ||", "if (at + KEYS - 1 > far ||"),
    ("attention_prefill_mma.cu", "if (at > far ||", "if (at >= far ||"),
    ("attention_prefill_mma.cu", "at < band.high; at += KEYS, stage", "at <= band.high; at += KEYS, stage"),
    ("attention_prefill_mma.cu", "mine + r < rows; r += WARP", "mine + r <= rows; r += WARP"),
    ("attention_prefill_mma.cu", "if (vector * 8 < D) store", "if (vector * 8 <= D) store"),
    ("attention_prefill_mma.cu", "(At::WIDTH == D || (vector + u) * 8 < D)", "true"),
    ("attention_prefill_mma.cu", "page_table[table + first / S] * H", "page_table[table + first / S + 1] * H"),
    ("attention_prefill_mma.cu", "page_table[table + token / S] * H", "page_table[table + token / S + 1] * H"),
    ("mma.cuh", "mma_m16n8k16_bf16(d, a, b)",
     "mma_m16n8k16_bf16(d, {b[0], b[1], b[0], b[1]}, {a[0], a[2]})"),
    ("mma.cuh", "mma_m16n8k16_f16(d, a, b)", "mma_m16n8k16_f16(d, a, {b[1], b[0]})"),
    ("attention_prefill_mma.cu", "score[m][2 * j], a[m], left", "score[m][2 * j], a[m], right"),
    ("attention_prefill_mma.cu", "acc[m][2 * j], a[m], left", "acc[m][2 * j], a[m], right"),
    ("attention_prefill_mma.cu", "score[m][2 * i + e / 2];", "score[m][2 * i + e % 2];"),
    ("attention_prefill_mma.cu", "pack<T>(from[e % 2 * 2], from[e % 2 * 2 + 1])",
     "pack<T>(from[e % 2 * 2 + 1], from[e % 2 * 2])"),
    ("attention_prefill_mma.cu", "ldmatrix_x4_trans(both,", "ldmatrix_x4(both,"),
    ("attention_prefill_mma.cu", "keys + across.at(", "keys + down.at("),
    ("attention_prefill_mma.cu", "factor = scale * LOG2_E;", "factor = LOG2_E;"),
    ("attention_prefill_mma.cu", "sum[m][half] * shrink;", "sum[m][half];"),
    ("attention_prefill_mma.cu", "acc[m][j][2 * half] *= shrink, ", ""),
    ("attention_prefill_mma.cu", "__shfl_xor_sync(ALL_LANES, most, 2)", "__shfl_xor_sync(ALL_LANES, most, 4)"),
    ("attention_prefill_mma.cu", "total += __shfl_xor_sync(ALL_LANES, total, 2);", ";"),
    ("attention_prefill_mma.cu", "fetch<T, D, S, KEYS>(keys + other,", "fetch<T, D, S, KEYS>(keys + stage * STAGE,"),
    ("attention.cuh", "group, rows) <= number)", "group, rows) < number)"),
    ("attention.cuh", "old = seq_lens[sequence] - fresh;", "old = seq_lens[sequence] - fresh + 1;"),
    # attention_prefill_wgmma.cu
    ("attention_prefill_wgmma.cu", "u * 8), i < left);", "u * 8), i <= left);"),
    ("attention_prefill_wgmma.cu", "vector * 8, mine + r < tile.end);", "vector * 8, mine + r <= tile.end);"),
    ("attention_prefill_wgmma.cu", "if (mine + r >= tile.end) break;", "if (mine + r > tile.end) break;"),
    ("attention_prefill_wgmma.cu", "vector < D / 8; vector += 8)\n                store",
     "vector <= D / 8; vector += 8)\n                store"),
    ("attention_prefill_wgmma.cu", "if (distance < 0 ||", "if (distance <= 0 ||"),
    ("attention_prefill_wgmma.cu", "distance >= window)", "distance > window)"),
    ("attention_prefill_wgmma.cu", "if (at + KEYS - 1 > near ||", "if (at + KEYS - 1 > far ||"),
    ("attention_prefill_wgmma.cu", "page_table[table + token / S] * H", "page_table[table + token / S + 1] * H"),
    ("attention_prefill_wgmma.cu", "(token % S + row) * D", "(token % S + row + 1) * D"),
    ("attention_prefill_wgmma.cu", "wgmma_n128_bf16(d, a, b, add)", "wgmma_n128_bf16(d, b, a, add)"),
    ("attention_prefill_wgmma.cu", "pack<T>(score[8 * i + 2 * e], score[8 * i + 2 * e + 1])",
     "pack<T>(score[8 * i + 2 * e + 1], score[8 * i + 2 * e])"),
    ("attention_prefill_wgmma.cu", "i > 0);", "true);"),
    ("attention_prefill_wgmma.cu", "(vector % 8 ^ row % 8) * 8", "vector % 8 * 8"),
    ("attention_prefill_wgmma.cu", "acc[i] *= shrink[i / 2 % 2];", "acc[i] *= shrink[0];"),
    ("attention_prefill_wgmma.cu", "mbarrier_wait(bar.k_full + j % 2, j / 2 % 2)",
     "mbarrier_wait(bar.k_full + j % 2, (j / 2 + 1) % 2)"),
    ("attention_prefill_wgmma.cu", "mbarrier_wait(empty + j % 2, (j / 2 + 1) % 2)",
     "mbarrier_wait(empty + j % 2, j / 2 % 2)"),
    ("attention_prefill_wgmma.cu", "release(bar.v_empty + (j - 1) % 2);", "release(bar.v_empty + j % 2);"),
    ("attention_prefill_wgmma.cu", "mbarrier_init(bar.k_empty + i, GROUPS * GROUP / WARP)",
     "mbarrier_init(bar.k_empty + i, GROUPS * GROUP / WARP + 1)"),
    ("attention_prefill_wgmma.cu", "float total = sum[half] * shrink[half];", "float total = sum[half];"),
    ("attention_prefill_wgmma.cu", "scale * LOG2_E, 1 + consumer", "LOG2_E, 1 + consumer"),
    # attention_prefill_fma.cu and where all look tokens up
    ("attention_prefill_fma.cu", "token_offset<S, D>(table, token, head, H) + vector",
     "token_offset<S, D>(table, token + 1, head, H) + vector"),
    ("attention_prefill_fma.cu", "token >= fresh) continue;", "token > fresh) continue;"),
    ("attention_prefill_fma.cu", "to_float(x[at]) * (scale * LOG2_E)", "to_float(x[at]) * LOG2_E"),
    ("attention_prefill_fma.cu", "acc[i][j][0] *= shrink, ", ""),
    ("attention_prefill_fma.cu", "lanes = 8; lanes > 0; lanes /= 2) most", "lanes = 4; lanes > 0; lanes /= 2) most"),
    ("attention.cuh", "table[position / S])", "table[position / S + 1])"),
    ("attention.cuh", "* S + position % S)", "* S + position % S + 1)"),
    # peaks.cu
    ("peaks.cu", "v[i] = at < n ?", "v[i] = at <= n ?"),
)  # fmt: skip


_SHUFFLES = (
    "the emulator takes the shuffle between the two accesses as ordering, which CUDA does not promise; on a GPU"
    " racecheck of compute-sanitizer warns without it"
)

# (file, text around the edit, why no test can notice it). These do not count.
EQUIVALENT: tuple[tuple[str, str, str], ...] = (
    ("activation.cu", "* 8; i < f;", "load_row and store_row do nothing at i == f"),
    ("activation.cu", "* 8; i < size;", "load_row and store_row do nothing at i == size"),
    (
        "attention_prefill_wgmma.cu",
        "release(bar.v_empty + (j - 1) % 2);",
        "every stage is given back one tile late: slower, but still before it is needed and after it was read",
    ),
    (
        "attention_prefill_wgmma.cu",
        "still read them.\n    bar_sync(id, GROUP);",
        "a product of the emulator is done when it is issued; on a GPU those of other warps may still read the queries",
    ),
    (
        "attention_prefill_mma.cu",
        "at < band.high; at += KEYS, stage",
        "one more tile, which a warp skips, or masks for all rows that are stored",
    ),
    (
        "attention_decode_mma.cuh",
        "if (2 * t + j < Q && column < D)",
        "column D is where the padding of a row of sums begins (STRIDE)",
    ),
    (
        "attention_decode_fma.cuh",
        "__syncthreads();  // score and shrink may be written again",
        "a row of score is read and written again by one warp alone, ordered, to the emulator, by reduce_scatter's"
        " shuffles; shrink is written behind the next barrier",
    ),
    (
        "attention_decode_fma.cuh",
        "__syncwarp();  // every lane has read largest[h]",
        _SHUFFLES,
    ),
    (
        "attention_prefill_mma.cu",
        "__syncwarp();  // its last reads of them are done",
        _SHUFFLES,
    ),
    (
        "common.cuh",
        "x = warp_max(partial[lane < warps ? lane : 0]);\n    __syncthreads();",
        "no kernel calls block_max twice; the barrier is for one that does",
    ),
    (
        "linear_mma.cu",
        "__syncwarp();  // keeps the compiler",
        "it orders what the compiler makes of the loads; no thread waits for another there",
    ),
    (
        "sampling.cuh",
        "x += partial[i];\n    __syncthreads();",
        "block_sum of integers is called once; the barrier is for a kernel that calls it twice",
    ),
    (
        "sampling.cu",
        "above = found_above;\n    __syncthreads();",
        "every path from here to the next write of found passes another barrier, in descend or gather",
    ),
    (
        "sampling.cu",
        "__shared__ int count;\n    __syncthreads();",
        "between the read of count and the next gather lie the barriers of find_bin",
    ),
)


@dataclass(frozen=True)
class Mutation:
    file: str
    line: int
    old: str
    new: str
    text: str  # of the whole file
    equivalent: str | None = None  # why it cannot be noticed

    @property
    def name(self) -> str:
        old, new = (" ".join(s.split()) or "(nothing)" for s in (self.old, self.new))
        return f"{self.file}:{self.line}: {old} -> {new}"


def mutations() -> Iterator[Mutation]:
    for path in sorted(CUDA_SRC.glob("*.cu*")):
        if path.name == "ptx.cuh":
            continue  # the emulator has its own; here these are definitions
        text = path.read_text()
        for match in WAITS.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            mutated = text[: match.start()] + ";" + text[match.end() :]
            yield Mutation(path.name, line, match[0], "", mutated, _reason(path.name, text, match.start()))
    for file, old, new in EDITS:
        text = (CUDA_SRC / file).read_text()
        if text.count(old) == 0:
            print(f"STALE  {file} no longer has the text {old!r}: bring EDITS up to date", flush=True)
            continue
        at = text.index(old)
        mutated = text[:at] + new + text[at + len(old) :]
        yield Mutation(file, text.count("\n", 0, at) + 1, old, new, mutated, _reason(file, text, at))


def _reason(file: str, text: str, at: int) -> str | None:
    """The reason in EQUIVALENT whose text covers position `at` of the file."""
    for name, around, reason in EQUIVALENT:
        if name == file:
            if around not in text:
                continue  # its mutation, if there still is one, counts again
            if text.index(around) <= at < text.index(around) + len(around):
                return reason
    return None


class _Mutated(EmulatedDevice):
    """The emulator, with some files from a copy of the sources. seed: of the order of threads."""

    def __init__(self, folder: Path, files: set[str], device: Device | None = None, seed: int = 0) -> None:
        super().__init__(device)
        self.folder, self.files, self.seed = folder, files, seed

    def launch(self, bound: BoundLaunch) -> None:
        folder = self.folder if bound.file in self.files else None
        run(bound, folder=folder, timeout=20, seed=self.seed, arch=self.device.arch)


class _MutatedAndShifted(_Mutated):
    """The same with arrays that begin where 16-byte accesses are not allowed."""

    def upload(self, array: np.ndarray[Any, Any]) -> Any:
        return test_ops.shifted(array)


@dataclass(frozen=True)
class Job:
    """A workload for a device. kernels: (file, expression) of its launches; unaligned: arrays at odd addresses."""

    workload: Workload
    device: Device
    kernels: tuple[tuple[str, str], ...]
    unaligned: bool = False

    def run(self, folder: Path, files: set[str], seed: int) -> None:
        """Run it with the mutated files of ``folder`` and judge the result."""
        executor = (_MutatedAndShifted if self.unaligned else _Mutated)(folder, files, self.device, seed)
        arrays = self.workload.arrays()
        check(self.workload, arrays, run_guarded(self.workload, arrays, executor))


def _read_sum(folder: Path) -> None:
    """The kernel that measures the bandwidth: no op of the registry has it."""
    x = np.random.default_rng(1).integers(0, 1000, (2500, 4)).astype(np.uint32)
    y = np.zeros(1, np.uint32)
    args = (x, y, len(x))
    launch: Any = SimpleNamespace(
        file="peaks.cu", expression="read_sum", grid=(1, 1, 1), block=(256, 1, 1), shared=0, args=args
    )
    run(launch, folder=folder, timeout=20)
    assert y[0] == x.sum(dtype=np.uint32), f"read_sum: {y[0]}, not {x.sum(dtype=np.uint32)}"


def _bias(folder: Path) -> None:
    """The kernels that prepare a bias for cuBLAS: no op of the registry has them."""
    for case in test_bias.CASES:
        test_bias.check_biases(_Mutated(folder, {"bias.cu"}), *case)


BESIDE_THE_OPS: dict[str, Callable[[Path], None]] = {"bias.cu": _bias, "peaks.cu": _read_sum}


def _job(workload: Workload, device: Device, unaligned: bool = False) -> Job:
    bound = planned(workload, workload.ins, device, abstract)[0]
    return Job(workload, device, tuple((b.file, b.expression) for b in bound), unaligned)


def jobs() -> list[Job]:
    """Every case of every op with kernels, bf16 first: it is what most models use. Then those of small GPUs, which are
    quick, before the other cases, and the unaligned arrays last."""
    found = [
        _job(harness.workload(*case), Device()) for case in harness.all_cases(lambda op: op.kernels is not None)
    ]
    small = [
        _job(harness.workload(OPS[name], case, T), device)
        for name, case, device in test_small_gpu.CASES
        for T in ("bf16", "f32")
    ]
    unaligned = [_job(workload, Device(), unaligned=True) for workload in test_ops.unaligned_workloads()]
    return small + sorted(found, key=lambda j: ("bf16", "f32", "f16").index(j.workload.dtype)) + unaligned


def files_of(mutation: Mutation) -> set[str]:
    """The kernel files that an edit can change: of a header, those that include it and, by themselves or through
    another header of theirs, name the edited function; all that include it if none does."""
    if mutation.file.endswith(".cu"):
        return {mutation.file}
    before = "\n".join(mutation.text.splitlines()[: mutation.line])
    function = re.findall(r"__device__[^;{=]*?\b(\w+)\(", before)[-1]
    texts = {p.name: p.read_text() for p in CUDA_SRC.glob("*.cu*")}

    def included(file: str) -> set[str]:
        near = set(re.findall(r'#include "(\w+\.cuh)"', texts[file]))
        return near.union(*(included(f) for f in near))

    users = {f: included(f) for f in texts if f.endswith(".cu") and mutation.file in included(f)}
    naming = {
        file
        for file, headers in users.items()
        if any(re.search(rf"\b{function}\b", texts[f]) for f in {file, *headers} - {mutation.file})
    }
    return naming or set(users)


def _run(now: list[Job], files: set[str], folder: Path) -> None:
    precompile([k for j in now for k in j.kernels if k[0] in files], folder=folder)
    for job in now:
        # Other orders of threads, as in tests/ops/test_attention.py: thread 0 need not come first.
        for seed in (0, 1, 2) if len(now) < 4 else (0,):
            job.run(folder, files, seed)


def _caught(test: Callable[[], None]) -> str | None:
    """What a test says when it fails."""
    try:
        test()
    except KernelFault as fault:
        return str(fault).splitlines()[0]
    except (AssertionError, WrongResultError) as error:
        return f"wrong result: {str(error).splitlines()[0]}"
    return None


def verdict(mutation: Mutation, all_jobs: list[Job]) -> str | None:
    """What found the mutation, one line, or None."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in CUDA_SRC.glob("*.cu*"):
            shutil.copy(path, folder)
        (folder / mutation.file).write_text(mutation.text)
        files = files_of(mutation)
        mine = [j for j in all_jobs if any(f in files for f, _ in j.kernels)]
        # The first cases find most, and many at once are cheaper to compile.
        cu_seqlens = [0, 1, 4, *range(12, len(mine), 24), len(mine)]
        batches = [mine[i:j] for i, j in itertools.pairwise(cu_seqlens) if i < j]
        tests: list[Callable[[], None]] = [partial(_run, now, files, folder) for now in batches]
        if mutation.file in BESIDE_THE_OPS:
            tests.append(partial(BESIDE_THE_OPS[mutation.file], folder))
        for test in tests:
            if found := _caught(test):
                return found.replace(str(folder), "cuda_src")
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="only mutations whose description contains this text")
    parser.add_argument("--report", type=Path, help="also write a Markdown table")
    options = parser.parse_args()
    chosen = [m for m in mutations() if options.k in m.name]
    with tempfile.TemporaryDirectory() as cache:  # mutated objects are of no use later
        os.environ["XDG_CACHE_HOME"] = cache
        return _report(chosen, options.report)


@cache
def _all_jobs() -> list[Job]:
    return jobs()


def _timed(mutation: Mutation) -> tuple[str | None, float]:
    start = time.monotonic()
    return verdict(mutation, _all_jobs()), time.monotonic() - start


def _report(chosen: list[Mutation], path: Path | None) -> int:
    rows, killed, counted = [], 0, 0
    with ProcessPoolExecutor(PROCESSES) as pool:  # the emulator runs one launch at a time in a process
        for mutation, (found, seconds) in zip(chosen, pool.map(_timed, chosen), strict=True):
            outcome = "killed" if found else "equivalent" if mutation.equivalent else "SURVIVED"
            if found and found.startswith("compile-error"):
                outcome = "NO KERNEL"  # not to be counted as found by a test
            killed += outcome == "killed"
            counted += outcome != "equivalent"
            explained = found or mutation.equivalent or ""
            print(f"{outcome}  {mutation.name}  [{seconds:.0f} s]\n    {explained[:200]}", flush=True)
            cells = (mutation.name, outcome, explained[:160])
            rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    rate = killed / max(1, counted)
    summary = f"{killed} of {counted} mutations killed ({rate:.0%})"
    if counted < len(chosen):
        summary += f"; {len(chosen) - counted} more change nothing that a test could notice"
    print(summary)
    if path is not None:
        head = [
            "# Mutations of the kernels and what finds them",
            "",
            summary + ".",
            "",
            "| edit | outcome | by |",
            "|---|---|---|",
        ]
        path.write_text("\n".join([*head, *rows]) + "\n")
    return 0 if rate >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
