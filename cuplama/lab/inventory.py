"""NVRTC without a GPU: every kernel of ``cuda_src/`` to machine code for any architecture, and what the code uses.

The CUDA backend compiles through CuPy, which needs a GPU. This module makes the same programs with the same options on
a machine that has none, so that an error, a warning or a register spill on any architecture is found there. What ptxas
says of each kernel (registers, shared memory, stack, spills) is read from its report.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.cuda.nvrtc import Program, Resources, compile_program, nvrtc_library
from ..backends.cuda.toolkit import shared_limit
from ..dtypes import DTYPES, dtype_name
from ..errors import CompileError, DeviceError
from ..ops import OPS
from ..ops import launch as kernel
from ..ops.abstract import abstract, attributes
from ..ops.linear import LIBRARY
from ..ops.op import Call, Op

__all__ = [
    "ADMITTED_SPILLS",
    "TOOLS",
    "Need",
    "Result",
    "beside",
    "compile_kernels",
    "expressions",
    "judge",
    "model_cases",
    "needed",
]

# "kernel@arch" -> bytes of registers that an instance may spill at most, and why.
ADMITTED_SPILLS: Mapping[str, tuple[int, str]] = {
    "append_attention@120": (
        8,
        "one instance (bf16, heads of 128, one query head a block), whose tiles of keys and values fill 255 registers;"
        " no other architecture spills there",
    ),
    "layer_norm_linear@75": (
        12,
        "one instance (f32, 8 rows, the exact GELU), beside the 128 registers that 512 threads can have;"
        " no other architecture spills there",
    ),
}


def expressions(op: Op, call: Call, device: kernel.Device) -> Iterator[tuple[str, str]]:
    """(file, C++ name) of every kernel that computes the call. Its outputs and scratch need no memory."""
    assert op.kernels is not None
    plan = op.kernels(call, device)
    for spec in op.signature.outs:
        if spec.name not in op.signature.in_place:
            call.arrays[spec.name] = abstract(call.shape(spec), call.dtype(spec))
    scratch = {name: abstract(shape, DTYPES[dtype]) for name, (shape, dtype) in plan.scratch.items()}
    for launch in plan.launches:
        bound = kernel.bind(launch, call, scratch)
        yield bound.file, bound.expression


def beside(call: Call) -> Iterator[tuple[str, str]]:
    """The kernels that go with a library call: what a cuBLAS product with a bias may need before it."""
    if call.op.name in LIBRARY and call.arrays["b"] is not None:
        T, U = dtype_name(call.dtypes["T"]), dtype_name(call.dtype(call.op.signature.outs[0]))
        yield "bias.cu", f"fill_rows<{T}, {U}>"
        if T != U:
            yield "bias.cu", f"cast_bias<{T}, {U}>"


@dataclass(frozen=True)
class Need:
    """Who needs a kernel instance: op names and dtypes."""

    ops: frozenset[str]
    dtypes: frozenset[str]


# Kernels that belong to no op: the one that measures the read bandwidth.
TOOLS = (("peaks.cu", "read_sum"),)


def needed(device: kernel.Device, ops: Iterable[str] | None = None) -> dict[str, dict[str, Need]]:
    """file -> C++ name -> Need: every kernel that the ops' cases and the shapes of real models use on that device.

    The cases come in every dtype, the models in the one that they are run in. bf16 is left out below sm_80, where the
    backend runs fp16 instead.
    """
    widely_run = "bf16" if device.arch >= 80 else "f16"
    found: dict[str, dict[str, Need]] = {}
    for name in OPS if ops is None else ops:
        op = OPS[name]
        if op.kernels is None:
            continue
        for dtype in ("f32", "f16", "bf16")[: 3 if device.arch >= 80 else 2]:
            for call in _calls(op, DTYPES[dtype], dtype == widely_run):
                for file, expression in (*expressions(op, call, device), *beside(call)):
                    old = found.setdefault(file, {}).get(expression, Need(frozenset(), frozenset()))
                    found[file][expression] = Need(old.ops | {name}, old.dtypes | {dtype})
    for file, name in TOOLS if ops is None else ():
        found.setdefault(file, {})[name] = Need(frozenset(), frozenset())
    return {file: dict(sorted(found[file].items())) for file in sorted(found)}


def _calls(op: Op, T: np.dtype[Any], models: bool) -> Iterator[Call]:
    rng = np.random.default_rng(0)
    for case in op.cases:
        inputs = op.random_inputs(rng, case, T)
        yield op.bind([inputs[s.name] for s in op.signature.ins], attributes(op, case, T))
    for ins, attrs in model_cases(op.name, T) if models else ():
        yield op.bind(ins, attrs)


# Shapes of models that people run: hidden, heads, kv_heads, head_dim, ffn.
_MODELS = (
    (896, 14, 2, 64, 4864),  # Qwen2.5-0.5B
    (576, 9, 3, 64, 1536),  # SmolLM2-135M
    (2048, 32, 8, 64, 8192),  # Llama-3.2-1B
    (1024, 16, 8, 128, 3072),  # Qwen3-0.6B
    (4096, 32, 8, 128, 14336),  # Llama-3.1-8B, Mistral-7B
    (3072, 32, 32, 96, 8192),  # Phi-3-mini
    (768, 12, 12, 64, 3072),  # GPT-2
    (288, 6, 6, 48, 768),  # stories15M
    (64, 8, 4, 8, 172),  # stories260K
)


def model_cases(name: str, T: np.dtype[Any]) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Inputs (stand-ins) and attributes of an op in a decode step and in a prefill of real models."""
    f32, i32 = DTYPES["f32"], DTYPES["i32"]
    for n in (1, 8, 512):
        for d, heads, kv, D, f in _MODELS:
            q, w = heads * D, (heads + 2 * kv) * D
            shape = dict(num_heads=heads, num_kv_heads=kv)
            x, residual = abstract((n, w), T), abstract((n, d), f32)
            norm, head = abstract((d,), T), abstract((D,), T)
            cache = abstract((64, kv, 64, D), T)
            rows, table = abstract((n,), i32), abstract((4096, D // 2), f32)
            if name == "linear":
                for m, k, u in ((w, d, T), (d, q, f32), (2 * f, d, T), (d, f, f32), (32000, d, f32)):
                    yield [abstract((n, k), T), abstract((m, k), T)], {"U": dtype_name(np.dtype(u))}
            elif name == "linear_add":
                for k in (q, f):
                    yield [abstract((n, k), T), abstract((d, k), T), residual], {}
            elif name == "rms_norm_linear":
                for m, u in ((w, T), (32000, f32)):
                    yield [residual, norm, abstract((m, d), T)], {"eps": 1e-5, "U": dtype_name(np.dtype(u))}
            elif name == "rms_norm_linear_silu_mul":
                yield [residual, norm, abstract((2 * f, d), T)], {"eps": 1e-5}
            elif name == "append_attention" and n <= 8:
                starts, lengths, blocks = (abstract(s, i32) for s in ((n + 1,), (n,), (n, 64)))
                attrs = {"num_heads": heads, "window": 0, "scale": 0.125, "eps": 1e-6}
                new = [x, rows, cache, cache, starts, lengths, blocks, rows, table, table]
                yield [*new, head, head], attrs
            elif name == "rms_norm":
                yield [residual, norm], {"eps": 1e-5}
            elif name == "layer_norm":
                yield [residual, norm, norm], {"eps": 1e-5}
            elif name == "qk_norm":
                yield [x, head, head], {**shape, "eps": 1e-6}
            elif name == "rope":
                yield [x, rows, table, table], {**shape, "D": D}
            elif name == "kv_append":
                yield [x, rows, cache, cache], {}
            elif name == "attention":
                b = n if n <= 8 else 1
                starts, lengths, blocks = (abstract(s, i32) for s in ((b + 1,), (b,), (b, 64)))
                attrs = {"num_heads": heads, "window": 0, "scale": 0.125}
                for tokens in (n,) if n <= 8 else (n, 32 * n):  # long prompts have larger tiles
                    yield [abstract((tokens, w), T), cache, cache, starts, lengths, blocks], attrs
            elif name == "silu_mul":
                yield [abstract((n, 2 * f), T)], {}
            elif name.startswith("gelu"):
                yield [abstract((n, f), T)], {}


@dataclass(frozen=True)
class Result:
    """One kernel instance on one architecture: what it uses, and the complaint if that is not allowed."""

    file: str
    expression: str
    arch: int
    resources: Resources | None
    problem: str | None
    admitted: str | None = None

    @property
    def kernel(self) -> str:
        return self.expression.split("<")[0]


def judge(program: Program, admitted: Mapping[str, tuple[int, str]] = ADMITTED_SPILLS) -> list[Result]:
    """A Result per instance; a warning counts against the whole file."""
    results = []
    for name, used in program.resources.items():
        most, reason = admitted.get(f"{name.split('<')[0]}@{program.arch}", (0, None))
        problem = f"spills {used.spills} bytes of registers" if used.spills > most else None
        results.append(Result(program.file, name, program.arch, used, problem, reason if used.spills else None))
    for warning in program.warnings:
        results.append(Result(program.file, "", program.arch, None, warning))
    return results


def compile_kernels(
    archs: Sequence[int],
    names: Sequence[str] | None = None,
    *,
    workers: int | None = None,
    done: Callable[[str, int, float], None] | None = None,
) -> list[Result]:
    """Compile every kernel instance that any op needs, for each arch; one program a file and arch.

    names: op or kernel names, or file stems; None for all. done(file, arch, seconds) is told of each finished program.
    Errors come back as results, so that one broken file does not hide another. Raises DeviceError for an unknown name.
    """
    jobs = []
    known: set[str] = set()
    for arch in archs:
        for file, instances in needed(kernel.Device(arch=arch, shared=shared_limit(arch))).items():
            known |= {Path(file).stem, *(e.split("<")[0] for e in instances)}
            known |= {op for need in instances.values() for op in need.ops}
            chosen = [e for e, need in instances.items() if names is None or _matches(file, e, need, names)]
            if chosen:
                jobs.append((file, chosen, arch))
    if unknown := [n for n in names or () if n not in known]:
        raise DeviceError(f"no op, kernel or file is named {unknown[0]!r}; known: {', '.join(sorted(known))}")
    nvrtc_library()

    def work(job: tuple[str, list[str], int]) -> list[Result]:
        file, chosen, arch = job
        began = time.perf_counter()
        try:
            results = judge(compile_program(file, chosen, arch))
        except CompileError as e:
            results = [Result(file, "", arch, None, str(e))]
        if done is not None:
            done(file, arch, time.perf_counter() - began)
        return results

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        return [result for results in pool.map(work, jobs) for result in results]


def _matches(file: str, expression: str, need: Need, names: Sequence[str]) -> bool:
    return bool({Path(file).stem, expression.split("<")[0], *need.ops} & set(names))
