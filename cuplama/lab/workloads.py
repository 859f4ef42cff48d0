"""The workloads of the kernel lab: an op at a shape, from the command line, from its own cases, or from a model.

A model's node lists are walked with descriptions instead of arrays, so that every op of a decode step and of a prompt
is found at the shape it has there, and how often. The inputs of a pass are those that the engine builds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Array
from ..engine.batch import Batch, abstract_values
from ..engine.decode import RING, decode_step, step_inputs
from ..engine.kv_cache import pages_for
from ..engine.sampler import Sampler
from ..engine.sequence import SequenceState
from ..engine.state_cache import PADDING_SLOT
from ..errors import ParameterError
from ..models.config import ModelConfig
from ..models.fusion import PREFILL_RULES, fuse
from ..models.graph import LOGITS, decoder
from ..models.presets import find_shape
from ..models.rope import RotationTables
from ..ops import OPS
from ..ops.abstract import AbstractArray, attributes, described_inputs, infer
from ..ops.node import Node, executable
from ..ops.op import Call, Op
from ..ops.signature import OpError, dim_names, dim_value
from ..ops.weights import segments_of
from ..quant.catalog import CATALOG
from ..quant.packed import Packed
from ..sampling_params import SamplingParams
from .quantised import described_weights, filled, random_weight

__all__ = [
    "Workload",
    "case_workload",
    "case_workloads",
    "decode_workloads",
    "default_workloads",
    "described_workload",
    "normal_values",
    "prompt_workloads",
    "shape_workload",
]

_DEFAULT_MODELS = ("llama-3.1-8b", "qwen3-8b", "gpt2", "qwen3.6-27b")
_MAX_SIZE = 2**31 - 1  # sizes and counters of kernels are i32


@dataclass(frozen=True)
class Workload:
    """An op at a shape. ins: arrays, or descriptions of float arrays that random values will fill, or None.

    graph: "decode", "prefill" or "" for a shape of one's own; count: how often the graph has it; weights: which weights
    it is about, as "qkv_proj".
    """

    op: Op
    ins: tuple[Any, ...]
    attrs: Mapping[str, Any]
    dtype: str
    graph: str = ""
    count: int = 1
    weights: tuple[str, ...] = ()

    def bind(self, ins: Sequence[Array | None] | None = None) -> Call:
        """The op's call on these arrays, by default the workload's own."""
        return self.op.bind(self.ins if ins is None else ins, attributes(self.op, self.attrs, DTYPES[self.dtype]))

    @cached_property
    def call(self) -> Call:
        """The op's call on the workload's own arrays."""
        return self.bind()

    @property
    def shape(self) -> str:
        """ "n=1 m=4096 k=4096": the dims of the signature, and the lengths of sequences."""
        dims = {
            n for s in (*self.op.signature.ins, *self.op.signature.outs) for d in s.dims or () for n in dim_names(d)
        }
        shown = [f"{name}={value}" for name, value in self.call.env.items() if name in dims]
        for array in self.call.arrays.values():
            shown += [f"W={'+'.join(s.format.name for s in segments)}" for segments in [segments_of(array)] if segments]
        lengths = self.call.arrays.get("seq_lens")
        if isinstance(lengths, np.ndarray) and "seq_lens" not in self.op.signature.in_place:
            shown.append(f"length={','.join(map(str, sorted(set(lengths.tolist()))))}")
        return " ".join(shown)

    @property
    def label(self) -> str:
        """Op, weights, dtype and shape in one line."""
        what = f" {'/'.join(self.weights)}" if self.weights else ""
        return f"{self.op.name}{what} {self.dtype} {self.shape}"

    def arrays(self, seed: int = 0) -> list[Array | None]:
        """Host arrays: the given ones, and normal values where there is a description. Matrices keep sums near 1."""
        rng = np.random.default_rng(seed)
        found: list[Array | None] = []
        whole: Mapping[str, Any] = {}  # where none of the whole numbers is given, the op makes some that fit together
        plain = (x for x in self.ins if isinstance(x, (np.ndarray, AbstractArray)))
        numbers = [x for x in plain if x.dtype.kind == "i"]
        if self.op.inputs is not None and numbers and all(isinstance(x, AbstractArray) for x in numbers):
            whole = self.op.inputs(rng, self.call.env, DTYPES[self.dtype])
        for spec, x in zip(self.op.signature.ins, self.ins, strict=False):
            if isinstance(x, Packed):
                found.append(filled(x, rng))
            elif isinstance(x, AbstractArray) and x.dtype.kind == "i" and spec.name in whole:
                found.append(whole[spec.name])
            elif isinstance(x, AbstractArray):
                scale = x.shape[-1] ** -0.5 if spec.name == "w" and len(x.shape) >= 2 else 1.0
                found.append(normal_values(rng, x.shape, x.dtype, scale))
            else:
                found.append(x)
        return found


def normal_values(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any], scale: float
) -> np.ndarray[Any, Any]:
    """Normal values of standard deviation ``scale``; a large array repeats values, out of step with its rows."""
    size = math.prod(shape)
    values = rng.standard_normal(min(size, (1 << 22) + 331), np.float32) * np.float32(scale)
    return np.resize(values.astype(dtype), shape)


def shape_workload(op: Op, shape: Mapping[str, Any], dtype: str) -> Workload:
    """A workload from dims and attributes by name; what is not given comes from the op's first case.

    Attention takes b, num_heads, H, D, length, new (tokens a sequence, 1), window and S. Raises ParameterError for a
    name that the op does not have, for a value that it cannot have, and for sizes that do not fit together.
    """
    given = ",".join(f"{k}={_shown(v)}" for k, v in shape.items())
    try:
        found = case_workload(op, _complete(op, shape, dtype), dtype)
        _ = found.call
    except ParameterError:
        raise
    except MemoryError as e:
        raise ParameterError(f"{op.name}: the shape {given} is too large: {e}") from None
    except (OpError, ValueError, KeyError, IndexError, TypeError, ArithmeticError, NameError) as e:
        raise ParameterError(f"{op.name} has no shape {given}: {e}; the op is {op.text}") from None
    return found


def _complete(op: Op, shape: Mapping[str, Any], dtype: str) -> Mapping[str, Any]:
    if not op.cases:
        raise ParameterError(f"{op.name} has no cases, so it is not known what it is tested and timed with")
    sizes = dict(op.cases[0]) if op.complete is None else dict(op.shape)
    sizes |= {"W": None} if any(s.dtype == "W" for s in op.signature.ins) else {}
    if unknown := sorted(shape.keys() - sizes.keys()):
        raise ParameterError(f"{op.name} has no {unknown[0]!r}; it has {', '.join(sorted(sizes))}")
    for name, value in shape.items():
        _check_value(op, name, value, dtype)
    sizes |= shape
    for rule in op.rules:
        if sizes.keys() >= set(dim_names(rule)) and not dim_value(rule, sizes):
            shown = ", ".join(f"{name}={sizes[name]}" for name in dim_names(rule))
            raise ParameterError(f"{op.name} needs {rule}, not {shown}")
    return sizes if op.complete is None else op.complete(sizes)


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
    elif name == "W":
        if value not in CATALOG:
            raise ParameterError(f"{where}, not one of {', '.join(CATALOG)}")
    elif name in {s.dtype for s in arrays}:
        if value not in (letters := dict.fromkeys([*own, dtype])):
            raise ParameterError(f"{where}, not {' or '.join(letters)}")
    elif name in {s.name for s in signature.ins} - {n for s in arrays for d in s.dims or () for n in dim_names(d)}:
        if not isinstance(value, bool):
            raise ParameterError(f"{where}, not true or false")
    else:
        smallest = min([1, *(v for v in own if isinstance(v, int))])  # 0 where the op has such a case: N of logprobs
        if type(value) is not int or value < smallest:
            raise ParameterError(f"{where}, not a whole number of at least {smallest}")
        if value > _MAX_SIZE:
            raise ParameterError(f"{where}: too large; {_MAX_SIZE} at most")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def case_workload(op: Op, case: Mapping[str, Any], dtype: str, seed: int = 0) -> Workload:
    """A case of the op with random inputs, those of ``seed``."""
    rng = np.random.default_rng(seed)
    inputs = op.random_inputs(rng, case, DTYPES[dtype])
    return _case_workload(op, case, dtype, [inputs[s.name] for s in op.signature.ins], rng)


def described_workload(op: Op, case: Mapping[str, Any], dtype: str) -> Workload:
    """The case with descriptions of its inputs, which is enough to plan it; a quantised weight is there."""
    return _case_workload(op, case, dtype, described_inputs(op, case, DTYPES[dtype]), np.random.default_rng(0))


def _case_workload(op: Op, case: Mapping[str, Any], dtype: str, ins: list[Any], rng: np.random.Generator) -> Workload:
    if case.get("W"):
        ((at, spec),) = ((i, s) for i, s in enumerate(op.signature.ins) if s.dtype == "W" and s.name in ("w", "table"))
        ins[at] = random_weight(case["W"], [dim_value(d, case) for d in spec.dims or ()], rng)
    return Workload(op, tuple(ins), attributes(op, case, DTYPES[dtype]), dtype)


def case_workloads(op: Op, dtype: str) -> list[Workload]:
    """The op's own cases: small, odd and edge shapes."""
    return [case_workload(op, case, dtype, seed) for seed, case in enumerate(op.cases)]


def default_workloads(op: Op, dtype: str) -> list[Workload]:
    """The op in a decode step and in a prompt of the first well-known model that has it; else at its own shape."""
    for model in _DEFAULT_MODELS if op is OPS.get(op.name) else ():
        if found := [w for w in _both_passes(model, dtype) if w.op is op]:
            return found
    return [shape_workload(op, op.shape, dtype)]


@cache
def _both_passes(model: str, dtype: str) -> Sequence[Workload]:
    """A decode step and a prompt of a well-known model: walked once, for all ops that are asked for."""
    config = find_shape(model)[1]
    return *decode_workloads(config, dtype), *prompt_workloads(config, dtype)


def decode_workloads(
    config: ModelConfig,
    dtype: str,
    batch: int = 1,
    depth: int = 512,
    context: int | None = None,
    weight_format: str = "",
) -> list[Workload]:
    """Every op of one captured decode step, sampling (greedy) included, when ``depth`` tokens are in the cache.

    context: what the cache has room for, which decides the width of the page table; weight_format: one of
    ``quant/catalog.py`` for the matrices of the layers.
    """
    context = max(context or 0, depth)
    pages = pages_for(context)
    sequences = _sequences(config, batch, depth, pages)
    for s in sequences:
        s.cached = depth - 1
    sampler = Sampler(config.vocab_size, sequences)
    built = Batch.build([(s, 1) for s in sequences], RotationTables(config.ropes, context), batch * pages)
    inputs = step_inputs(batch, pages, batch * pages)
    built.pad_into(inputs)
    inputs |= sampler.inputs | {"ring": np.zeros((RING, batch), np.int32)}
    walk = _Walk(config, dtype, batch * pages, context, "decode", weight_format, batch)
    walk.run(decode_step(decoder(config), batch, sampler.nodes), inputs)
    return walk.workloads()


def prompt_workloads(
    config: ModelConfig, dtype: str, tokens: int = 512, chunk: int = 4096, weight_format: str = ""
) -> list[Workload]:
    """Every op of reading a prompt of one sequence and drawing a token. chunk: tokens of a pass at most."""
    pages = pages_for(tokens)
    cut, rotations = decoder(config).cut(), RotationTables(config.ropes, tokens)
    body, head = fuse(cut.body, PREFILL_RULES), fuse(cut.last, PREFILL_RULES)
    (sequence,) = _sequences(config, 1, tokens, pages)
    sampler = Sampler(config.vocab_size, [sequence])
    walk = _Walk(config, dtype, pages, tokens, "prefill", weight_format)
    owned = sequence.pages
    for start in range(0, tokens, chunk):
        count = min(chunk, tokens - start)
        sequence.cached, sequence.pages = start, owned[: pages_for(start + count)]
        inputs = Batch.build([(sequence, count)], rotations, pages).arrays
        walk.run([*body, *head] if start + count == tokens else body, inputs)
    walk.run(sampler.nodes, {**sampler.inputs, "seq_lens": np.array([tokens], np.int32), LOGITS: walk.values[LOGITS]})
    return walk.workloads()


def _sequences(config: ModelConfig, count: int, tokens: int, pages: int) -> list[SequenceState]:
    """Sequences of random tokens, greedy, each on ``pages`` pages drawn at random from a pool of just so many, and with
    a slot of its own."""
    rng = np.random.default_rng(0)
    owned = rng.permutation(count * pages).reshape(count, pages).tolist()
    ids = rng.integers(0, config.vocab_size, (count, tokens)).tolist()
    params = SamplingParams(temperature=0.0, seed=0)
    slots = range(PADDING_SLOT + 1, count + 1)
    return [SequenceState(i, params, frozenset(), pages=p, slot=z) for i, p, z in zip(ids, owned, slots, strict=True)]


class _Walk:
    """Collects the workloads of node lists; what has the same op, shapes and attributes is one workload, counted.

    pages: of the cache; positions: that the rotation tables cover; sequences: at most; values: of the last list, by
    name.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        pages: int,
        positions: int,
        graph: str,
        weight_format: str,
        sequences: int = 1,
    ) -> None:
        self._config, self._dtype, self._graph = config, dtype, graph
        self._standing = {
            **abstract_values(config, DTYPES[dtype], {}, pages + 1, positions, slots=sequences + 1),
            **described_weights(config, weight_format),
        }
        self._found: dict[Any, Workload] = {}
        self.values: dict[str, Array | None] = {}

    def run(self, nodes: Sequence[Node], inputs: Mapping[str, Any]) -> None:
        """Collect the nodes, on these inputs of the pass."""
        self.values = {**self._standing, **inputs}
        matrices = {name for name, shape in self._config.weight_shapes().items() if len(shape) >= 2}
        for node, call in infer(executable(nodes), self.values, DTYPES[self._dtype]):
            weights = tuple(name.split(".", 1)[-1] for name in node.ins if name in matrices)
            self._add(node, call, weights)

    def _add(self, node: Node, call: Call, weights: tuple[str, ...]) -> None:
        ins = tuple(call.arrays[spec.name] for spec in call.op.signature.ins)
        attrs = attributes(call.op, node.attrs, DTYPES[self._dtype])
        lengths = call.arrays.get("seq_lens")
        key = (
            node.op,
            tuple(None if x is None else x.key if isinstance(x, Packed) else (x.shape, x.dtype) for x in ins),
            tuple(sorted(attrs.items())),
            lengths.tobytes() if isinstance(lengths, np.ndarray) else None,
        )
        old = self._found.get(key)
        if old is None:
            self._found[key] = Workload(call.op, ins, attrs, self._dtype, self._graph, 1, weights)
        else:
            names = tuple(dict.fromkeys((*old.weights, *weights)))
            self._found[key] = replace(old, count=old.count + 1, weights=names)

    def workloads(self) -> list[Workload]:
        """What was found, in order."""
        return list(self._found.values())
