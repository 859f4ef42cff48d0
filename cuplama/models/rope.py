"""Rotary frequencies and their cos/sin tables: every RoPE variant is a different table, and nothing else.

Angles are float32 products of position and inverse frequency, as transformers computes them.

default: Su et al., arXiv:2104.09864. linear: Chen et al., arXiv:2306.15595. dynamic: "NTK-aware" scaling as
transformers has it. llama3: the Llama 3.1 release. yarn: Peng et al., arXiv:2309.00071. longrope: Ding et al.,
arXiv:2402.13753. proportional: Gemma 4, as transformers has it. ntk_alpha: Hunyuan's, which stretches the base by a
fixed factor; its files call it dynamic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "ROPE_BY_LENGTH",
    "ROPE_HARMLESS",
    "ROPE_KEYS",
    "ROPE_LEFT_OUT",
    "Rope",
    "RopeTables",
    "RotationTables",
    "Span",
    "table_rows",
]

_FloatArray = np.ndarray[Any, np.dtype[np.float32]]
# The keys that each type takes beside rope_type and rope_theta: (required, optional). Any type may be of a part of the
# head, by partial_rotary_factor, which is a key of a type that makes something else of it.
ROPE_KEYS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    name: (frozenset(required.split()), frozenset(optional.split()))
    for name, required, optional in (
        ("default", "", ""),
        ("linear", "factor", ""),
        ("dynamic", "factor", ""),
        ("ntk_alpha", "alpha", "factor beta_fast beta_slow mscale mscale_all_dim"),  # which do nothing beside alpha
        ("llama3", "factor low_freq_factor high_freq_factor", "original_max_position_embeddings"),
        (
            "yarn",
            "factor",
            "original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate",
        ),
        ("proportional", "", "factor partial_rotary_factor"),
        ("longrope", "short_factor long_factor", "factor attention_factor original_max_position_embeddings"),
    )
}
# Keys that transformers does not read (5.24 logs "Unrecognized keys" for them, or its config class excuses them).
# "finetuned" (YaRN's own Llamas) says that the weights were trained with the scaling: nothing to compute. Ministral 3
# repeats max_position_embeddings.
ROPE_HARMLESS = ("finetuned", "max_position_embeddings")
# Types whose tables depend on how long a sequence is, and not on the position alone.
ROPE_BY_LENGTH = ("dynamic", "longrope")
# Those of other programs, which transformers names and leaves out as well. DeepSeek-R1-0528-Qwen3-8B has attn_factor
# 0.878 = 1 / (0.1 ln 4 + 1). YaRN's first code, and vLLM until it read attention_factor, multiply yarn's factor on cos
# and sin by it, which makes it 1. transformers computes with 0.1 ln 4 + 1 = 1.139, and so do vLLM since then and
# cuplama. Whoever wants a factor of 1 sets attention_factor = 1.0.
ROPE_LEFT_OUT = ("attn_factor", "extrapolation_factor")


@dataclass(frozen=True)
class Rope:
    """The rotation of a layer's queries and keys, as config.json sets it.

    dim: rotated elements per head (head_dim, less when partial); context: max_position_embeddings; original: the
    context before scaling; settings: the keys of the type, as in ``ROPE_KEYS``.
    """

    type: str
    theta: float
    dim: int
    context: int
    original: int
    settings: Mapping[str, Any]

    def frequencies(self, length: Any) -> tuple[_FloatArray, float]:
        """Inverse frequencies [dim/2] and the factor on cos and sin, for a sequence of ``length`` tokens.

        dynamic takes an array of n lengths too, for frequencies [n, dim/2].
        """
        return _TYPES[self.type](self, length)

    def regime(self, length: int) -> int:
        """Which frequencies a sequence of ``length`` tokens uses: 0, or 1 for longrope beyond its original context.

        Keys cached under one cannot be used under the other: the sequence has to be computed again. The
        frequencies of dynamic change with every token, but there, as in transformers, cached keys stay as they are.
        """
        return int(self.type == "longrope" and length > self.original)

    def keys_depend_on(self, prompt: int, length: int) -> str:
        """What cached keys of a sequence depend on, beside its tokens: equal words, equal keys.

        prompt, length: tokens of its prompt, and in all.
        """
        stretched = f" {prompt}" if self.type == "dynamic" and prompt > self.context else ""
        return f"{self.regime(length)}{stretched}"

    def stable_steps(self, length: int) -> int:
        """Decode steps that keep one regime, for a sequence of ``length`` tokens whose last is not cached yet."""
        if self.type == "longrope" and not self.regime(length - 1):
            return max(0, self.original - length + 1)
        return 2**31


def _base(rope: Rope, theta: Any = None) -> _FloatArray:
    exponent = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    thetas = np.asarray(rope.theta if theta is None else theta, np.float32)[..., None]
    frequencies: _FloatArray = (1.0 / np.power(thetas, exponent)).astype(np.float32)
    return frequencies


def _default(rope: Rope, length: int) -> tuple[_FloatArray, float]:
    return _base(rope), 1.0


def _linear(rope: Rope, length: int) -> tuple[_FloatArray, float]:
    return _base(rope) / np.float32(rope.settings["factor"]), 1.0


def _dynamic(rope: Rope, length: Any) -> tuple[_FloatArray, float]:
    factor = rope.settings["factor"]
    stretch = factor * np.maximum(length, rope.context) / rope.context - (factor - 1)
    return _base(rope, rope.theta * stretch ** (rope.dim / (rope.dim - 2))), 1.0


def _ntk_alpha(rope: Rope, length: int) -> tuple[_FloatArray, float]:
    return _base(rope, rope.theta * rope.settings["alpha"] ** (rope.dim / (rope.dim - 2))), 1.0


def _llama3(rope: Rope, length: int) -> tuple[_FloatArray, float]:
    s = rope.settings
    low, high, factor = s["low_freq_factor"], s["high_freq_factor"], s["factor"]
    f = _base(rope)
    wavelength = 2 * math.pi / f
    t = (rope.original / wavelength - low) / (high - low)
    blend = (1 - t) * f / factor + t * f
    scaled = np.where(wavelength > rope.original / low, f / factor, blend)
    return np.where(wavelength < rope.original / high, f, scaled).astype(np.float32), 1.0


def _yarn(rope: Rope, length: int) -> tuple[_FloatArray, float]:
    s = rope.settings
    factor = s["factor"] or rope.context / rope.original

    def turning_point(rotations: float) -> float:
        """The dim that makes this many rotations within the original context."""
        return rope.dim * math.log(rope.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = turning_point(s.get("beta_fast") or 32), turning_point(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001), 0, 1)
    f = _base(rope)

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = s.get("attention_factor")
    if attention is None:
        mscale, all_dim = s.get("mscale"), s.get("mscale_all_dim")
        attention = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
    return (ramp * f / factor + (1 - ramp) * f).astype(np.float32), attention


def _longrope(rope: Rope, length: int) -> tuple[_FloatArray, float]:
    s = rope.settings
    divisors = np.asarray(s["long_factor" if length > rope.original else "short_factor"], np.float32)
    attention = s.get("attention_factor")
    if attention is None:
        factor = s.get("factor") or rope.context / rope.original
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original))
    return (_base(rope) / divisors).astype(np.float32), attention


def _proportional(rope: Rope, length: int) -> tuple[_FloatArray, float]:
    """Frequencies as if all of the head rotated, of which only the fastest do; the others are 0, which rotates not."""
    s = rope.settings
    rotated = np.arange(rope.dim // 2) < int(s.get("partial_rotary_factor", 1.0) * rope.dim // 2)
    return _base(rope) * rotated / np.float32(s.get("factor") or 1.0), 1.0


_TYPES: Mapping[str, Callable[[Rope, int], tuple[_FloatArray, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "ntk_alpha": _ntk_alpha,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence in one pass: positions start .. start + count - 1.

    total: the length that the sequence reaches once its prompt is through, which in a chunked prefill is more than
    start + count; it decides the frequencies, so that chunks of a prompt agree with the prompt as a whole. prompt: the
    tokens that came together; those behind them came one by one. By default all of them did.
    """

    start: int
    count: int
    total: int
    prompt: int | None = None

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int_]]:
        """For each new token how long the sequence was when it came."""
        prompt = self.total if self.prompt is None else self.prompt
        return np.maximum(np.arange(self.start, self.start + self.count) + 1, prompt)


def table_rows(rope: Rope, positions: int) -> int:
    """Rows of the tables for that many positions."""
    return positions * (1 + rope.regime(positions))


class RopeTables:
    """cos and sin for every position below ``positions``, float32 [rows, dim/2].

    Row p belongs to position p. longrope has a second table with the long factors, from row ``positions`` on. dynamic's
    frequencies depend on the length of the sequence: row p is that of a sequence whose last token is at p, as a decode
    step has it, and a prompt that goes beyond the context gets tables of its own.
    """

    def __init__(self, rope: Rope, positions: int) -> None:
        self.rope, self.positions = rope, positions
        everywhere = np.arange(positions)
        if rope.type == "dynamic":
            # The frequencies beyond depend on the position itself: as many rows of them.
            parts = [self._rows(everywhere[: rope.context], rope.context)]
            parts += [self._rows(beyond, beyond + 1) for beyond in np.array_split(everywhere[rope.context :], 64)]
        elif rope.regime(positions):
            parts = [self._rows(everywhere, 1), self._rows(everywhere, positions)]
        else:
            parts = [self._rows(everywhere, positions)]
        self.cos = np.concatenate([cos for cos, _ in parts])
        self.sin = np.concatenate([sin for _, sin in parts])

    def _rows(self, positions: np.ndarray[Any, Any], length: Any) -> tuple[_FloatArray, _FloatArray]:
        frequencies, factor = self.rope.frequencies(length)
        angles = positions.astype(np.float32)[:, None] * frequencies
        return np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)

    def lookup(self, spans: Sequence[Span]) -> tuple[_FloatArray, _FloatArray, np.ndarray[Any, np.dtype[np.int32]]]:
        """(cos, sin, rows): the tables, and for each new token its row in them.

        The tables are ``self.cos`` and ``self.sin`` unless the pass needs its own.
        """
        positions = [np.arange(s.start, s.start + s.count) for s in spans]
        lengths = [s.lengths() for s in spans] if self.rope.type == "dynamic" else []
        if any(n[0] > max(self.rope.context, s.start + 1) for n, s in zip(lengths, spans, strict=False)):
            own = [self._rows(p, n) for p, n in zip(positions, lengths, strict=True)]
            cos, sin = (np.concatenate(tables) for tables in zip(*own, strict=True))
            return cos, sin, np.arange(len(cos), dtype=np.int32)
        rows = [p + self.positions * self.rope.regime(s.total) for p, s in zip(positions, spans, strict=True)]
        return self.cos, self.sin, np.concatenate(rows).astype(np.int32)


class RotationTables:
    """The tables of a model's rotations for every position below ``positions``, which may be none.

    arrays: by name, "rope.cos", "rope.sin", "rope1.cos", ... One row number serves all of them: it is the position
    itself, except where there is one rotation that depends on the length.
    """

    def __init__(self, ropes: Mapping[str, Rope], positions: int) -> None:
        """ropes: by the name of their tables, as a model's ``ropes``."""
        self._tables = {name: RopeTables(rope, positions) for name, rope in ropes.items()}
        self.arrays: dict[str, _FloatArray] = {}
        for name, tables in self._tables.items():
            self.arrays |= {f"{name}.cos": tables.cos, f"{name}.sin": tables.sin}

    def lookup(self, spans: Sequence[Span]) -> tuple[dict[str, _FloatArray], np.ndarray[Any, np.dtype[np.int32]]]:
        """(tables, rows): those of ``arrays`` that the pass has its own of, and for each new token its row in all."""
        for name, tables in self._tables.items():
            cos, sin, rows = tables.lookup(spans)
            return {} if cos is tables.cos else {f"{name}.cos": cos, f"{name}.sin": sin}, rows
        return {}, np.concatenate([np.arange(s.start, s.start + s.count, dtype=np.int32) for s in spans])
