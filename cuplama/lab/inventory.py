"""The kernel inventory: every kernel instance that is launched somewhere, and what the compiler makes of each.

An instance is a kernel with its template arguments, such as ``rms_norm<bf16, 8>``. The inventory walks the ops' own
cases in every dtype, and the decode steps and prompts of the known models and of the bundled one, as descriptions of
arrays. The CUDA backend compiles through CuPy, which needs a GPU; this module compiles the same programs with the same
options on a machine that has none, so that an error, a warning or a register spill on any architecture is found there.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.cuda.loading import pack_kernels
from ..backends.cuda.nvrtc import Program, Resources, compile_program, nvrtc_library
from ..backends.cuda.planning import library_plans
from ..backends.cuda.rounding import rounding_kernels
from ..backends.cuda.toolkit import shared_limit
from ..dtypes import DTYPES, Array
from ..engine.batch import abstract_values, input_shapes
from ..engine.decode import decode_nodes
from ..engine.kv_cache import pages_for
from ..errors import CompileError, DeviceError
from ..folders import data_folder
from ..models.config import ModelConfig
from ..models.fusion import PREFILL_RULES, fuse
from ..models.graph import decoder
from ..models.presets import SHAPES, find_shape
from ..ops import OPS
from ..ops.abstract import abstract, infer
from ..ops.binding import bind_plan
from ..ops.launch import Device, Plan
from ..ops.node import Node, executable
from ..ops.op import Call, Op
from ..ops.prototypes import prototype_of
from ..quant.packed import Packed
from .check import model_dtypes
from .peaks import READ_KERNEL
from .quantised import described_weights
from .workloads import described_workload

__all__ = ["Need", "Result", "compile_kernels", "expressions", "judge", "needed"]

# "kernel@arch" -> bytes of registers that an instance may spill at most, and why, as the ops say.
_ADMITTED: Mapping[str, tuple[int, str]] = {k: v for op in OPS.values() for k, v in op.admitted_spills.items()}

# Of a known model a decode step and a short prompt are walked for each of these numbers of sequences; each has a row of
# logits. Up to 8 rows every number of rows has instances of its own. More rows a library computes, or where there is
# none our kernels, 8 at a time: of the engine's larger steps 12 alone leaves a rest, and 64 stands for the others.
# Attention of a step has other blocks from certain numbers of sequences times key heads on: 24 and 48 are between.
_EIGHT_BIT = ("fp8", "fp8 g128")  # formats whose products of many rows may round the other side to 8 bits too
_SEQUENCES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 24, 48, 64)
# Packed formats that a known model is walked with, one of each kind of code and scale; the ops' own cases have more. Of
# the instances for 1, 2, 4 and 8 rows the first and the last stand for the others, so that all kernels compile in
# minutes.
_QUANTISED = ("int4 g128", "int4 g128 zero", "int8", "fp8", "fp8 g128", "Q4_K", "Q6_K")
_QUANTISED_SEQUENCES = (1, 8, 64)
_QUANTISED_MODEL = "llama-3.1-8b"
_SHORT = 512  # tokens of the prompts together
_LONG = 4096  # tokens of one prompt, for which attention has larger tiles: those of the CUDA backend's largest pass
_CONTEXT = 4096  # tokens that a page table has room for


# ---- which instances there are ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Need:
    """Who needs a kernel instance: op names and model dtypes. Both are empty for a kernel that no op launches."""

    ops: frozenset[str] = frozenset()
    dtypes: frozenset[str] = frozenset()


def needed(device: Device, ops: Iterable[str] | None = None, outside: Sequence[Op] = ()) -> dict[str, dict[str, Need]]:
    """file -> C++ name -> Need: every kernel instance that the ops' cases and the known models use on that device.

    The cases come in every dtype, a model in its own and in the 16-bit one of the device. bf16 is left out below sm_80,
    where the backend runs fp16 instead. ops: names, all by default; what belongs to no op is there only by default.
    outside: ops from a user's own folder, which then are all that is looked at.
    """
    wanted = {op.name for op in outside} or set(OPS if ops is None else ops)
    found: dict[str, dict[str, Need]] = {}
    for dtype, calls in _outside_calls(device, outside) if outside else _calls(device):
        for call in calls:
            if call.op.name in wanted and call.op.kernels is not None:
                for file, expression in expressions(call, device):
                    old = found.setdefault(file, {}).get(expression, Need())
                    found[file][expression] = Need(old.ops | {call.op.name}, old.dtypes | {dtype})
    if ops is None and not outside:
        for file, expression in (READ_KERNEL, *pack_kernels(), *rounding_kernels()):
            found.setdefault(file, {})[expression] = Need()
    return {file: dict(sorted(found[file].items())) for file in sorted(found)}


def expressions(call: Call, device: Device) -> Iterator[tuple[str, str]]:
    """(file, C++ name) of every kernel that may compute the call, or may go with a library that computes it.

    Nothing is allocated: outputs and scratch are descriptions.
    """
    assert call.op.kernels is not None

    def empty(_: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return abstract(shape, dtype)

    for plan in (call.op.kernels(call, device), *library_plans(call)):
        for bound in bind_plan(_distinct(plan), call, empty, empty):
            yield bound.file, bound.expression


def _distinct(plan: Plan) -> Plan:
    """The plan with one launch of each instance: many rows are many launches of few."""
    found = {}
    for launch in plan.launches:
        template = [(p.name, launch.constants.get(p.name)) for p in prototype_of(launch.kernel).template]
        found[launch.kernel, *template] = launch
    return replace(plan, launches=tuple(found.values()))


def _calls(device: Device) -> Iterator[tuple[str, Sequence[Call]]]:
    """(dtype, calls) of the ops' own cases and of the known models."""
    dtypes = _dtypes(device)
    for dtype in dtypes:
        yield dtype, _case_calls(dtype)
    for model in (*SHAPES, str(data_folder("weights"))):
        stored = find_shape(model)[1].stored
        for dtype in dict.fromkeys((dtypes[-1], stored if stored in dtypes else dtypes[-1])):
            yield dtype, _model_calls(model, dtype)
    yield dtypes[-1], _eight_bit_calls(dtypes[-1])
    for form in _QUANTISED:
        yield dtypes[-1], _model_calls(_QUANTISED_MODEL, dtypes[-1], form)


def _dtypes(device: Device) -> tuple[str, ...]:
    return ("f32", "f16", "bf16") if device.arch >= 80 else ("f32", "f16")


def _outside_calls(device: Device, ops: Sequence[Op]) -> Iterator[tuple[str, Sequence[Call]]]:
    """(dtype, calls) of the cases of ops from outside, in the dtypes that each can have."""
    for dtype in _dtypes(device):
        yield dtype, _calls_of([op for op in ops if dtype in model_dtypes(op)], dtype)


@cache
def _case_calls(dtype: str) -> Sequence[Call]:
    """The calls of all ops' own cases, without those of sizes that no well-known model has."""
    return _calls_of(list(OPS.values()), dtype)


def _calls_of(ops: Sequence[Op], dtype: str) -> Sequence[Call]:
    found = []
    for op in ops:
        for case in filter(op.compiled, op.cases):
            found.append(described_workload(op, case, dtype).bind())
    return found


@cache
def _eight_bit_calls(dtype: str) -> Sequence[Call]:
    """Products with rows as long as those of a known model, whose activations may be 8-bit floats."""
    config = find_shape(_QUANTISED_MODEL)[1]
    widths = sorted({shape[1] for name, shape in config.weight_shapes().items() if "." in name and len(shape) == 2})
    found = []
    for op, (k, form) in itertools.product(OPS.values(), [*zip(widths, _EIGHT_BIT, strict=False), (widths[-1], "fp8")]):
        if op.matmul and op.matmul.form == "nt":
            case = {**op.cases[0], "n": 8, "m": 16, "k": k, "W": form}
            found.append(described_workload(op, case, dtype).bind())
    return found


@cache
def _model_calls(model: str, dtype: str, weight_format: str = "") -> Sequence[Call]:
    """The calls of a known model's passes, each once. Layers that differ in nothing are one."""
    config, T = find_shape(model)[1].every_kind(), DTYPES[dtype]
    found: dict[Any, Call] = {}
    for nodes, values, stored in _passes(config, T, weight_format):
        for node, call in infer(executable(nodes), values, T):
            if stored != T and call.dtypes.get("C") != stored:
                continue  # nothing of it depends on the cache
            arrays = tuple(
                None if a is None else a.key if isinstance(a, Packed) else (a.shape, a.dtype)
                for a in call.arrays.values()
            )
            found.setdefault((node.op, arrays, *call.env.items(), *call.dtypes.items()), call)
    return list(found.values())


def _passes(
    config: ModelConfig, T: np.dtype[Any], weight_format: str
) -> Iterator[tuple[Sequence[Node], dict[str, Array | None], np.dtype[Any]]]:
    """The nodes of every pass that is walked, with descriptions of the values that they begin with and what the cache
    holds: the model's dtype, and e4m3.

    What a decode step does beside its logits, sampling for example, depends on no model: the ops' own cases have it.
    """
    graph, pages = decoder(config), pages_for(_CONTEXT)

    def values(rows: int, sequences: int, stored: np.dtype[Any]) -> dict[str, Array | None]:
        shapes = input_shapes(rows, sequences, pages, logit_rows=sequences)
        standing = abstract_values(config, T, shapes, sequences * pages + 1, _CONTEXT, stored, sequences + 1)
        return {**standing, **described_weights(config, weight_format)}

    # A prompt whose last logits are asked for, and what one does beside where all are.
    cut = graph.cut()
    parts = cut.body, cut.last, cut.rest, graph.selected_rows()
    prompt = [node for part in parts for node in fuse(part, PREFILL_RULES)]
    walked = (_QUANTISED_SEQUENCES, ()) if weight_format else (_SEQUENCES, _SEQUENCES[:1])
    for stored, counts in zip((T, DTYPES["e4m3"]), walked, strict=True):
        for sequences in counts:
            yield decode_nodes(graph, sequences), values(sequences, sequences, stored), stored
            yield prompt, values(_SHORT, sequences, stored), stored
        yield prompt, values(_LONG, 1, stored), stored


# ---- what the compiler makes of them ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Result:
    """One kernel instance on one architecture, or a whole file where ``expression`` is empty.

    resources: what it uses, None if it did not compile; problem: the error, warning or spill that is not allowed;
    admitted: why its spill is allowed, if it has one.
    """

    file: str
    expression: str
    arch: int
    resources: Resources | None
    problem: str | None
    admitted: str | None = None

    @property
    def kernel(self) -> str:
        """The kernel's name, without template arguments."""
        return self.expression.split("<")[0]


def judge(program: Program, admitted: Mapping[str, tuple[int, str]] = _ADMITTED) -> list[Result]:
    """A Result per instance; a warning counts against the whole file."""
    results = []
    for name, used in program.resources.items():
        allowed, reason = admitted.get(f"{name.split('<')[0]}@{program.arch}", (0, None))
        problem = f"spills {used.spills} bytes of registers" if used.spills > allowed else None
        results.append(Result(program.file, name, program.arch, used, problem, reason if used.spills else None))
    for warning in program.warnings:
        results.append(Result(program.file, "", program.arch, None, warning))
    return results


def compile_kernels(
    archs: Sequence[int],
    names: Sequence[str] | None = None,
    *,
    outside: Sequence[Op] = (),
    workers: int | None = None,
    done: Callable[[str, float, int, int], None] | None = None,
) -> list[Result]:
    """Compile every kernel instance that any op needs, for each arch; one program a file and arch.

    names: op or kernel names, or file stems; None for all. outside: ops from a user's own folder, beside those of the
    names, or alone where names is None. done(name, seconds, number, total) is told of each finished program: its name
    and time, that it is the number-th to finish, and how many there are.
    Errors come back as results, so that one broken file does not hide another. Raises DeviceError for an unknown name.
    """
    jobs = []
    known: set[str] = set()
    for arch in archs:
        device = Device(arch=arch, shared=shared_limit(arch))
        if outside:
            jobs += [(file, list(found), arch) for file, found in needed(device, outside=outside).items()]
        for file, instances in needed(device).items() if names or not outside else ():
            known |= {Path(file).stem, *(e.split("<")[0] for e in instances)}
            known |= {op for need in instances.values() for op in need.ops}
            chosen = [e for e, need in instances.items() if names is None or _matches(file, e, need, names)]
            if chosen:
                jobs.append((file, chosen, arch))
    if unknown := [n for n in names or () if n not in known]:
        raise DeviceError(f"no op, kernel or file is named {unknown[0]!r}; known: {', '.join(sorted(known))}")
    nvrtc_library()
    numbers = itertools.count(1)
    admitted = {**_ADMITTED, **{k: v for op in outside for k, v in op.admitted_spills.items()}}

    def work(job: tuple[str, list[str], int]) -> list[Result]:
        file, chosen, arch = job
        began = time.perf_counter()
        try:
            results = judge(compile_program(file, chosen, arch), admitted)
        except CompileError as e:
            results = [Result(file, "", arch, None, str(e))]
        if done is not None:
            done(f"{file} for sm_{arch}", time.perf_counter() - began, next(numbers), len(jobs))
        return results

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        return [result for results in pool.map(work, jobs) for result in results]


def _matches(file: str, expression: str, need: Need, names: Sequence[str]) -> bool:
    return bool({Path(file).stem, expression.split("<")[0], *need.ops} & set(names))
