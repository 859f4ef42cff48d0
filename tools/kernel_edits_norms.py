"""Mistakes in norms behind sublayers and ahead of streamed products, as ``kernel_edits`` has them for the others."""

from __future__ import annotations

__all__ = ["EDITS", "EQUIVALENT"]

_FMA, _MMA = "linear.cu", "linear_mma.cu"

# (file, text that occurs once, replacement)
EDITS: tuple[tuple[str, str, str], ...] = (
    ("norm.cu", "squares += values.v[j] * values.v[j];", "squares += values.v[j];"),
    ("norm.cu", "to_sum(c, at, values);", ";"),
    ("norm.cu", "kept[c].v[j] *= inverse *", "kept[c].v[j] *="),
    # a norm behind a sublayer, and the residual stream
    (_FMA, "sqrtf(before[r] / k + eps)", "sqrtf(before[r] / k)"),
    (_FMA, "before[r] * (offset + to_float(scale.v[j])))", "before[r] * to_float(scale.v[j]))"),
    (_FMA, "to_float(scale.v[j]))) * factor;", "to_float(scale.v[j])));"),
    (_FMA, "out.v[j] = (out.v[j] + v.v[j] * before", "out.v[j] = (v.v[j] * before"),
    (_FMA, "store<W>(kept + (ROWS + r) * k + at, v);", "store<W>(kept + r * k + at, v);"),
    (_FMA, "if (sum != nullptr) store<W>(sum + i64(r) * k", "if (sum != nullptr) store<W>(sum"),
    (_FMA, "store<W>(kept + r * k + at, out);", ";"),
    (_FMA, "store<W>(staged + r * k + at, rounded);", "store<W>(staged + at, rounded);"),
    (_FMA, "block_sums(before, partial[1]);", "block_sums(before, partial[0]);"),
    (_FMA, "(kept + 2 * ROWS * k);", "(kept + ROWS * k);"),
    (_FMA, "(rows + ROWS * k);", "(rows);"),
    (_FMA, "k % 8 == 0 && aligned(x, post, a, g, sum);", "k % 8 == 0;"),
    (_FMA, "k % 8 == 0 && aligned(x, post, a, g, sum);", "aligned(x, post, a, g, sum);"),
    (_FMA, "cp_async_wait<DEPTH>();  // both scales", "cp_async_wait<DEPTH + 2>();  // both scales"),
    (_FMA, "x += i64(first) * k, a += i64(first) * k;", "x += i64(first) * k;"),
    (_FMA, "? sum + i64(first) * k : nullptr;", "? sum : nullptr;"),
    (_FMA, "sum = blockIdx.x == 0 ?", "sum = blockIdx.x == 1 ?"),
    (_FMA, "scalar != nullptr ? to_float(*scalar) : 1.f;", "1.f;"),
    (_MMA, "vectorized(aligned(x, rows.a, rows.sum))", "vectorized(true)"),
    (_MMA, "added.a += i64(lane_row()) * k, added.sum += i64(lane_row()) * k;", "added.sum += i64(lane_row()) * k;"),
    (_MMA, "added.a += i64(lane_row()) * k, added.sum += i64(lane_row()) * k;", "added.a += i64(lane_row()) * k;"),
    (_MMA, "load_row<8>(added.a, at, there ? k : 0, vectorized)", "load_row<8>(added.a, at, k, vectorized)"),
    (_MMA, "scale + (VECTORS<NORM> - 1) * k + min(at, k - 8)", "scale + min(at, k - 8)"),
    (_MMA, "scale + (VECTORS<NORM> - 1) * k + min(at, k - 8)", "scale + (VECTORS<NORM> - 1) * k + at"),
    (_MMA, "before * (offset + to_float(by.v[j])))", "before * to_float(by.v[j]))"),
    (_MMA, "to_float(by.v[j]))) * added.factor;", "to_float(by.v[j])));"),
    (_MMA, "v.v[j] = (residual.v[j] + v.v[j] * before", "v.v[j] = (v.v[j] * before"),
    (_MMA, "32 * i, there ? k : 0, vectorized, v);", "32 * i, k, vectorized, v);"),
    (_MMA, "return v * v; }, partial[1])", "return v * v; }, partial[0])"),
    (_MMA, "partial[1]) / k + eps);", "partial[1]) / k);"),
    (_MMA, "if (blockIdx.x == 0) leave();", "if (blockIdx.x == 1) leave();"),
    (_MMA, "scalar != nullptr ? to_float(*scalar) : 1.f;", "1.f;"),
    (_MMA, "NORM == ADDED ? post : g,", "g,"),
)

# (file, text as in EDITS or at the place of a wait, why it changes nothing)
EQUIVALENT: tuple[tuple[str, str, str], ...] = (
    (
        _MMA,
        "__syncwarp();  // keeps the compiler",
        "it orders what the compiler makes of the loads; no thread waits for another there",
    ),
    (
        _MMA,
        "__syncwarp();  // as below",
        "it orders what the compiler makes of the loads; no thread waits for another there",
    ),
)
