"""The cases of the kernel lab: an op at a shape, from the command line, from the registry, or from a model.

A model's node lists are walked with descriptions instead of arrays, so that every op of a decode step and of a prompt
is found at the shape it has there, and how often.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Array
from ..engine.decode import AHEAD, decode_nodes
from ..engine.kv_cache import PAGE, pages_for
from ..errors import ParameterError
from ..models.config import ModelConfig
from ..models.fusion import PREFILL_RULES, fuse
from ..models.graph import decoder
from ..models.presets import find_shape
from ..ops import OPS
from ..ops.abstract import AbstractArray, abstract, attributes
from ..ops.attention import attention_case
from ..ops.node import Node, executable
from ..ops.op import Call, Op
from ..ops.signature import OpError, dim_names, dim_value

__all__ = ["Case", "decode_cases", "default_cases", "prompt_cases", "registry_cases", "shape_case"]

_DEFAULT_MODELS = ("llama-3.1-8b", "qwen3-8b", "gpt2")
_MOST = 2**31 - 1  # sizes and counters of kernels are i32
_RULES: Mapping[str, Sequence[str]] = {  # what the sizes of --shape must fulfil besides
    "attention": ("num_heads % H == 0", "new <= length"),
    "append_attention": ("num_heads % H == 0", "new == 1"),
    "rope": ("2 * h <= D",),
    "kv_append": ("2 * H * D <= w", "w % D == 0", "n <= P * S"),
    "logprobs": ("N <= V",),
}
_SHAPE_OF: Mapping[str, Mapping[str, Any]] = {  # ops that no node list of these models has
    "penalize": {"b": 1, "V": 128256, "m": 2, "bias": True},
    "count_token": {"b": 1, "V": 128256},
    "logprobs": {"b": 1, "V": 128256, "N": 5},
    "gelu_erf": {"n": 1, "f": 3072},
    "layer_norm_linear_gelu_erf": {"n": 1, "m": 3072, "k": 768, "b": True, "eps": 1e-5},
}


@dataclass(frozen=True)
class Case:
    """An op at a shape. ins: arrays, or descriptions of float arrays that random values will fill, or None.

    graph: "decode", "prefill" or "" for a shape of one's own; count: how often the graph has it; weights: which weights
    it is about, as "qkv".
    """

    op: Op
    ins: tuple[Any, ...]
    attrs: Mapping[str, Any]
    dtype: str
    graph: str = ""
    count: int = 1
    weights: tuple[str, ...] = ()

    def bind(self, ins: Sequence[Array | None] | None = None) -> Call:
        """The op's call on these arrays, by default the case's own."""
        return self.op.bind(self.ins if ins is None else ins, attributes(self.op, self.attrs, DTYPES[self.dtype]))

    @cached_property
    def call(self) -> Call:
        return self.bind()

    @property
    def shape(self) -> str:
        """ "n=1 m=4096 k=4096": the dims of the signature, and the lengths of sequences."""
        dims = {
            n for s in (*self.op.signature.ins, *self.op.signature.outs) for d in s.dims or () for n in dim_names(d)
        }
        shown = [f"{name}={value}" for name, value in self.call.env.items() if name in dims]
        lengths = self.call.arrays.get("seq_lens")
        if isinstance(lengths, np.ndarray) and self.op.name != "advance":
            shown.append(f"length={','.join(map(str, sorted(set(lengths.tolist()))))}")
        return " ".join(shown)

    @property
    def label(self) -> str:
        what = f" {'/'.join(self.weights)}" if self.weights else ""
        return f"{self.op.name}{what} {self.dtype} {self.shape}"

    def arrays(self, seed: int = 0) -> list[np.ndarray[Any, Any] | None]:
        """Host arrays: the given ones, and normal values where there is a description. Matrices keep sums near 1."""
        rng = np.random.default_rng(seed)
        found: list[np.ndarray[Any, Any] | None] = []
        for spec, x in zip(self.op.signature.ins, self.ins, strict=False):
            if isinstance(x, AbstractArray):
                scale = x.shape[1] ** -0.5 if spec.name == "w" and len(x.shape) == 2 else 1.0
                found.append(normal_values(rng, x.shape, x.dtype, scale))
            else:
                found.append(x)
        return found


def normal_values(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any], scale: float
) -> np.ndarray[Any, Any]:
    """Normal values; a large array repeats a block whose length is no multiple of a row."""
    size = math.prod(shape)
    block = rng.standard_normal(min(size, (1 << 22) + 331), np.float32) * np.float32(scale)
    return np.resize(block.astype(dtype), shape)


def shape_case(op: Op, shape: Mapping[str, Any], dtype: str) -> Case:
    """A case from dims and attributes by name; what is not given comes from the op's first case.

    Attention takes b, num_heads, H, D, length, new (tokens a sequence, 1), window and S. Raises ParameterError for a name
    that the op does not have, for a value that it cannot have, and for sizes that do not fit together.
    """
    T = DTYPES[dtype]
    given = ",".join(f"{k}={_shown(v)}" for k, v in shape.items())
    try:
        full = _complete(op, shape, dtype)
        inputs = op.random_inputs(np.random.default_rng(0), full, T)
        case = Case(op, tuple(inputs[s.name] for s in op.signature.ins), attributes(op, full, T), dtype)
        _ = case.call
    except ParameterError:
        raise
    except MemoryError as e:
        raise ParameterError(f"{op.name}: the shape {given} is too large: {e}") from None
    except (OpError, ValueError, KeyError, IndexError, TypeError, ArithmeticError, NameError) as e:
        raise ParameterError(f"{op.name} has no shape {given}: {e}; the op is {op.text}") from None
    return case


def _complete(op: Op, shape: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    first = dict(op.cases[0])
    known = set(first)
    if "seq_lens" in first:
        known = {"b", "num_heads", "H", "D", "length", "new", "window", "S"}
    if unknown := sorted(shape.keys() - known):
        raise ParameterError(f"{op.name} has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
    for name, value in shape.items():
        _check_value(op, name, value, dtype)
    s = {**first, **shape}
    if "seq_lens" in first:
        s = {"b": 1, "num_heads": 32, "H": 8, "D": 128, "length": 512, "new": 1, "window": 0, "S": PAGE, **shape}
    for rule in _RULES.get(op.name, ()):
        if not dim_value(rule, s):
            sizes = ", ".join(f"{name}={s[name]}" for name in dim_names(rule))
            raise ParameterError(f"{op.name} needs {rule}, not {sizes}")
    if "seq_lens" not in first:
        return s
    case = attention_case(
        s["num_heads"], s["H"], s["D"], [s["new"]] * s["b"], [s["length"]] * s["b"], s["window"], s["S"]
    )
    present: dict[str, Any] = {k: first[k] for k in ("rows", "cos", "sin", "q_norm", "k_norm", "eps") if k in first}
    return {**case, **present, **({"h": s["D"] // 2, "R": 64} if present else {})}


def _check_value(op: Op, name: str, value: Any, dtype: str) -> None:
    """Raises ParameterError for a value that the op's name cannot have, by the signature and the op's own cases.

    Names that the signature lacks (length, new, and what only makes the inputs) are whole numbers as sizes are.
    """
    signature = op.signature
    arrays = (*signature.ins, *signature.outs)
    own = [case[name] for case in op.cases if name in case]
    where = f"{op.name}: {name} is {_shown(value)}"
    if name in {s.name for s in signature.attrs if DTYPES[s.dtype].kind not in "iu"}:
        if isinstance(value, (bool, str)) or not math.isfinite(value):
            raise ParameterError(f"{where}, not a finite number")
    elif name in {s.dtype for s in arrays}:
        if value not in (letters := dict.fromkeys([*own, dtype])):
            raise ParameterError(f"{where}, not {' or '.join(letters)}")
    elif name in {s.name for s in signature.ins} - {n for s in arrays for d in s.dims or () for n in dim_names(d)}:
        if not isinstance(value, bool):
            raise ParameterError(f"{where}, not true or false")
    else:
        least = min([1, *(v for v in own if isinstance(v, int))])  # 0 where the op has such a case: N of logprobs
        if type(value) is not int or value < least:
            raise ParameterError(f"{where}, not a whole number of at least {least}")
        if value > _MOST:
            raise ParameterError(f"{where}: too large; {_MOST} at most")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def registry_cases(op: Op, dtype: str) -> list[Case]:
    """The op's own cases: small, odd and edge shapes."""
    T = DTYPES[dtype]
    found: list[Case] = []
    for case in op.cases:
        inputs = op.random_inputs(np.random.default_rng(len(found)), case, T)
        found.append(Case(op, tuple(inputs[s.name] for s in op.signature.ins), attributes(op, case, T), dtype))
    return found


def default_cases(name: str, dtype: str) -> list[Case]:
    """The decode and prefill cases of an op in the first well-known model that has it."""
    for model in _DEFAULT_MODELS:
        config = find_shape(model)[1]
        both = [*decode_cases(config, dtype), *prompt_cases(config, dtype)]
        if found := [c for c in both if c.op.name == name]:
            return found
    return [shape_case(OPS[name], _SHAPE_OF.get(name, {}), dtype)]


def decode_cases(
    config: ModelConfig,
    dtype: str,
    batch: int = 1,
    depth: int = 512,
    context: int | None = None,
    nodes: Sequence[Node] | None = None,
) -> list[Case]:
    """Every op of one recorded decode step, sampling (greedy) included, when ``depth`` tokens are in the cache.

    context: what the cache has room for, which decides the width of the page table; nodes: of an engine, if there is
    one.
    """
    nodes = decode_nodes(decoder(config), batch) if nodes is None else nodes
    context = max(context or 0, depth)
    pages = pages_for(context)
    blocks = np.random.default_rng(0).permutation(batch * pages).astype(np.int32).reshape(batch, pages)
    pos = np.full(batch, depth - 1, np.int32)
    slots = blocks[:, (depth - 1) // PAGE] * PAGE + (depth - 1) % PAGE
    given = {
        "input_ids": _ids(config, batch),
        "positions": pos,
        "slot_mapping": slots.astype(np.int32),
        "cu_seqlens": np.arange(batch + 1, dtype=np.int32),
        "seq_lens": pos + 1,
        "page_table": blocks,
        "rope.rows": pos,
    }
    walk = _Walk(config, dtype, batch * pages, context, "decode")
    walk.run(nodes, given)
    walk.sample(batch)
    counters = [given[k] for k in ("input_ids", "positions", "slot_mapping", "seq_lens", "rope.rows")]
    ring, step = np.zeros((AHEAD + 1, batch), np.int32), np.zeros(1, np.int32)
    walk.add("advance", [*counters, ring, step, given["input_ids"], blocks], {"S": PAGE}, ())
    return walk.cases()


def prompt_cases(config: ModelConfig, dtype: str, tokens: int = 512, chunk: int = 4096) -> list[Case]:
    """Every op of reading a prompt of one sequence and drawing a token. chunk: tokens of a pass at most."""
    pages = pages_for(tokens)
    blocks = np.random.default_rng(0).permutation(pages).astype(np.int32)[None]
    walk = _Walk(config, dtype, pages, tokens, "prefill")
    nodes = fuse(decoder(config), PREFILL_RULES)
    body = nodes[: [node.op for node in nodes].index("select_rows")]
    for start in range(0, tokens, chunk):
        end = min(start + chunk, tokens)
        pos = np.arange(start, end, dtype=np.int32)
        given = {
            "input_ids": _ids(config, end - start),
            "positions": pos,
            "slot_mapping": blocks[0, pos // PAGE] * PAGE + pos % PAGE,
            "cu_seqlens": np.array([0, end - start], np.int32),
            "seq_lens": np.array([end], np.int32),
            "page_table": np.ascontiguousarray(blocks[:, : pages_for(end)]),
            "logit_rows": np.array([end - start - 1], np.int32),
            "rope.rows": pos,
        }
        walk.run(nodes if end == tokens else body, given)
    walk.sample(1)
    return walk.cases()


def _ids(config: ModelConfig, count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(0, config.vocab_size, count).astype(np.int32)


class _Walk:
    """Collects the cases of node lists; what has the same op, shapes and attributes is one case, counted."""

    def __init__(self, config: ModelConfig, dtype: str, pages: int, positions: int, graph: str) -> None:
        self._config, self._dtype, self._graph, self._T = config, dtype, graph, DTYPES[dtype]
        pool = abstract((pages + 1, config.num_kv_heads, PAGE, config.head_dim), self._T)
        self._values: dict[str, Any] = {n: abstract(s, self._T) for n, s in config.weight_shapes().items()}
        self._weights = set(self._values)
        self._values |= {f"{i}.cache.{part}": pool for i in range(config.num_layers) for part in "kv"}
        if config.ropes.get("rope") is not None:
            table = abstract((positions, config.ropes.get("rope").dim // 2), DTYPES["f32"])
            self._values |= {"rope.cos": table, "rope.sin": table}
        self._found: dict[Any, Case] = {}

    def run(self, nodes: Sequence[Node], given: Mapping[str, Any]) -> None:
        values = {"": None, **self._values, **given}
        for node in executable(nodes):
            names = tuple(n.split(".", 1)[-1] for n in node.ins if n in self._weights and len(values[n].shape) == 2)
            call = self.add(node.op, [values[n] for n in node.ins], node.attrs, names)
            for name, spec in zip(node.outs, call.op.signature.outs, strict=True):
                if spec.name not in call.op.signature.in_place:
                    values[name] = abstract(call.shape(spec), call.dtype(spec))

    def sample(self, batch: int) -> None:
        columns = {"temperature": np.float32(0), "top_k": np.int32(0), "top_p": np.float32(1), "min_p": np.float32(0)}
        settings = [np.full(batch, value, value.dtype) for value in columns.values()]
        seeds, pos = np.arange(batch, dtype=np.uint64), np.full(batch, 512, np.int32)
        logits = abstract((batch, self._config.vocab_size), DTYPES["f32"])
        self.add("sample", [logits, *settings, seeds, pos], {}, ())

    def add(self, name: str, ins: Sequence[Any], attrs: Mapping[str, Any], weights: tuple[str, ...]) -> Call:
        op = OPS[name]
        full = (*ins, *[None] * (len(op.signature.ins) - len(ins)))
        case = Case(op, full, attributes(op, attrs, self._T), self._dtype, self._graph, 1, weights)
        lengths = case.call.arrays.get("seq_lens")
        key = (
            name,
            tuple(None if x is None else (x.shape, x.dtype) for x in full),
            tuple(sorted(case.attrs.items())),
            None if lengths is None else lengths.tobytes(),
        )
        old = self._found.get(key)
        if old is not None:
            names = tuple(dict.fromkeys((*old.weights, *weights)))
            self._found[key] = replace(old, count=old.count + 1, weights=names)
        else:
            self._found[key] = case
        return case.call

    def cases(self) -> list[Case]:
        return list(self._found.values())
