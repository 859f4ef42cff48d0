"""Mistakes in the kernels of gated delta layers, as ``kernel_edits`` has them for the others."""

from __future__ import annotations

__all__ = ["EDITS", "EQUIVALENT"]

_CONV, _STEPS, _CHUNKS = "causal_conv.cu", "gated_delta.cu", "gated_delta_chunks.cu"

# (file, text that occurs once, replacement)
EDITS: tuple[tuple[str, str, str], ...] = (
    (_CONV, "position >= 0 && position < tokens", "position >= 0"),
    (_CONV, "position < 0 && old", "position < 0"),
    (_CONV, "(position + taps - 1) * i64(d)", "(position + taps - 2) * i64(d)"),
    (_CONV, "if (run.first + j >= run.tokens) break;", "if (run.first + j > run.tokens) break;"),
    (_CONV, "run.any ? silu_of<T>(sum) : 0.f", "silu_of<T>(sum)"),
    (_CONV, "run.first > 0 || !run.any", "!run.any"),
    (_CONV, "if (run.first > 0 || !run.any) return;", "if (run.first > 0) return;"),
    (_CONV, "d % 8 == 0 && m % 8 == 0 &&", "d % 8 == 0 &&"),
    (_CONV, "length > tile.end,", "length >= tile.end,"),
    ("norm.cu", "if (index >= i64(n) * H) return;", "if (index > i64(n) * H) return;"),
    ("norm.cu", "index / H * m + start +", "index / H * m +"),
    (_STEPS, "ba + i64(at) * m + start + head", "ba + i64(at) * m + head"),
    (_CHUNKS, "ba + i64(first) * m + start + head", "ba + i64(first) * m + head"),
    (_CHUNKS, "(there ? token : 0) * task.m;", "(there ? token : 0) * 2 * task.H;"),
    ("norm.cu", "V % 8 == 0 && m % 8 == 0 && start % 8 == 0 && aligned(x, w, z, y)", "aligned(x, w, z, y)"),
    ("activation.cu", "vectorized = aligned(x, gate, y)", "vectorized = true"),
    ("gated_delta.cuh", "squares + 1e-6f", "squares + 1e-2f"),
    ("gated_delta.cuh", "x > 20.f ? x :", "x > 2.f ? x :"),
    (_STEPS, "sums[j] += k * state[i].v[j];", "sums[j] += q * state[i].v[j];"),
    (_STEPS, "lanes = WARP / GROUPS; lanes < WARP;", "lanes = WARP / GROUPS * 2; lanes < WARP;"),
    (_STEPS, "decay * unit_k * sums[j]", "unit_k * sums[j]"),
    (_STEPS, "decay * sums[4 + j] + sums[10]", "sums[4 + j] + sums[10]"),
    (_STEPS, "there && length > end - first", "length > end - first"),
    (_STEPS, "there && length > end - first", "there"),
    (_STEPS, "if (at + 1 < end) fetch(at + 1);", "fetch(at + 1);"),
    (_STEPS, "length > 0 ? out.v[j] :", "true ? out.v[j] :"),
    (_STEPS, "if (!there || length == 0) return;", "if (!there) return;"),
    (_STEPS, "key_head = head / (H / G)", "key_head = head % G"),
    (_STEPS, "there && lane < LANES;", "there;"),
    (_CHUNKS, "x - to_float(rounded.v[0])", "0.f"),
    (_CHUNKS, "multiply(right, low, second, T());", ";"),
    (_CHUNKS, "times(left, right, both);\n        multiply(left, high, first, T());", "times(left, right, both);"),
    (_CHUNKS, "chunk % 3 * ROWS", "chunk % 2 * ROWS"),
    (_CHUNKS, "chunk % 2 * 4 * SQUARE", "0"),
    (_CHUNKS, "row * stride + vector * 8, row < count", "row * stride + vector * 8, row <= count"),
    (_CHUNKS, "if (lane >= lanes) sum += before;", "if (lane > lanes) sum += before;"),
    (_CHUNKS, "__expf(last - sum);", "__expf(last);"),
    (_CHUNKS, "factors.decay = __expf(last);", "factors.decay = __expf(sum);"),
    (_CHUNKS, "column <= row ? x * factor", "column < row ? x * factor"),
    (_CHUNKS, "column >= first ? work.beta[row] : 1.f", "work.beta[row]"),
    (_CHUNKS, "if (j + e < i) sums[e]", "if (j + e < i - 1) sums[e]"),
    (_CHUNKS, "column[i] * beta);", "column[i]);"),
    (_CHUNKS, "lane / 4, -result[j][e]);", "lane / 4, result[j][e]);"),
    (_CHUNKS, "there ? gates.log_decay(a) : 0.f", "gates.log_decay(a)"),
    (_CHUNKS, "if (seq_lens[blockIdx.z] > tokens)", "if (seq_lens[blockIdx.z] > 0)"),
    (_CHUNKS, "if (lane >= count) return;", "if (lane > count) return;"),
    (_CHUNKS, "scale_tokens(out, factor.answered);", "scale_tokens(out, factor.recalled);"),
)

# (file, text as in EDITS or at the place of a wait, why it changes nothing)
EQUIVALENT: tuple[tuple[str, str, str], ...] = (
    (
        _CONV,
        "run.first > 0 || !run.any",
        "other tiles than the first are of longer sequences, and write the same: the last inputs, which all are in x",
    ),
    (_STEPS, "there && lane < LANES;", "all lanes of a column have its sums, and write the same"),
    (
        _CHUNKS,
        "__syncwarp();  // the warp's last reads of them are done",
        "the emulator's ldmatrix orders the warp's lanes",
    ),
)
