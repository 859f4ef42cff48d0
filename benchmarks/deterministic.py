"""What ``deterministic=True`` costs, and whether it holds: ``python -m benchmarks.deterministic [SHAPE ...]``.

For each shape (by default those of Llama 3.2 1B and 3.1 8B) with random weights in bf16:

- products: each matrix of a layer and the head for 1, 8, 64 and 2,048 rows of x, microseconds of a replayed graph of
  many, in the plain way and in the deterministic one; of the algorithms that cuBLAS names for that many rows, how many
  add in the order of the reference, and which is taken; and whether each row has the same bits as among 2,048;
- attention: of one new token of each sequence, by the kernels of both ways;
- same: whether a text's tokens and log-probabilities are the same bit for bit alone, in batches of 2 to 64, with its
  prompt cut into chunks, and where a part of what was generated is read as a prompt;
- speed: prompt and generated tokens per second, of 1, 8 and 64 sequences, with prompts of 512 and 2,048 tokens.

--only takes some of these, with commas between; --out writes the rows to a file as well.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.fixed_cublas import CANDIDATES, FixedCublas
from cuplama.completion import Completion
from cuplama.dtypes import DTYPES, Array
from cuplama.lab.dummy import dummy_model
from cuplama.lab.timing import REPLAYS, Replay, cache_bytes, copies, rotation, time_workload
from cuplama.lab.workloads import normal_values, shape_workload
from cuplama.model import Model
from cuplama.models.config import ModelConfig
from cuplama.models.presets import find_shape
from cuplama.ops import OPS

PARTS = ("products", "attention", "same", "speed")
ROWS = (1, 8, 64, 2048)
ATTENDED = ((1, 512), (1, 2048), (1, 8192), (8, 2048), (64, 512), (64, 2048))  # sequences, keys of each
BATCHES, CHUNKS, CUTS = (2, 3, 5, 8, 9, 16, 24, 33, 64), (1, 50, 64, 100, 257, 1000), (1, 2, 33, 63)
SPEEDS = tuple((sequences, prompt) for prompt in (512, 2048) for sequences in (1, 8, 64))
NEW = 64  # generated tokens
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
Row = dict[str, Any]


def matrices(config: ModelConfig) -> Iterator[tuple[str, str, str, int, int]]:
    """(name, op, U, m, k) of a layer's matrices and of the head."""
    shapes = config.weight_shapes()
    for name, op, U in (
        ("0.qkv_proj", "linear", "T"),
        ("0.o_proj", "linear_add", "f32"),
        ("0.gate_up_proj", "linear", "T"),
        ("0.down_proj", "linear_add", "f32"),
        ("lm_head", "linear", "f32"),
    ):
        m, k = shapes[name]
        yield name, op, U, m, k


def product(backend: CudaBackend, op: str, U: str, n: int, ins: Sequence[Array]) -> Array:
    """The op for the first n rows. ins: x, w, and for linear_add what is added."""
    x, w, *a = ins
    (y,) = backend.call(OPS[op], (x[:n], w, *(one[:n] for one in a)), {} if a else {"U": U})
    return y


def products(config: ModelConfig, plain: CudaBackend, fixed: CudaBackend) -> Iterator[Row]:
    """A row for each matrix and number of rows of x."""
    T, rng, most = DTYPES["bf16"], np.random.default_rng(0), max(ROWS)
    for name, op, U, m, k in matrices(config):
        host = normal_values(rng, (m, k), T, k**-0.5)
        weights = [plain.upload(host) for _ in range(copies(host.nbytes, host.nbytes, cache_bytes(plain)))]
        x = plain.upload(normal_values(rng, (most, k), T, 1.0))
        a = [plain.upload(normal_values(rng, (most, m), DTYPES["f32"], 1.0))] * (op == "linear_add")
        plain.synchronize()
        wanted = fixed.download(product(fixed, op, U, most, (x, weights[0], *a)))
        for n in ROWS:
            times = {}
            for way, backend in (("plain", plain), ("deterministic", fixed)):
                replay = Replay(backend, [partial(product, backend, op, U, n, (x, w, *a)) for w in weights])
                times[way] = 1e6 * replay.seconds(REPLAYS).median
            found = fixed.download(product(fixed, op, U, n, (x, weights[0], *a)))
            same = np.array_equal(found.view(np.uint8), wanted[:n].view(np.uint8))
            yield {"matrix": name, "m": m, "k": k, "rows": n, "microseconds": times, "same": same,
                   **algorithms(fixed, n, m, k, "bf16" if U == "T" else U, bool(a))}  # fmt: skip


def algorithms(fixed: CudaBackend, n: int, m: int, k: int, U: str, add: bool) -> Row:
    """Of the algorithms that cuBLAS names: how many add as the reference, and the number of the one that is taken."""
    cublas = fixed.gpu.cublas
    assert isinstance(cublas, FixedCublas)
    product = cublas.product(n, m, k, "bf16", U, add=add)
    if product is None or (reference := cublas.reference(product)) is None or product.algorithm is None:
        return {"named": 0}
    named = cublas.candidates(product, CANDIDATES)
    alike = [cublas.alike(product, one, reference) for one in named]
    taken = next((i for i, one in enumerate(alike) if one), None)
    return {"named": len(named), "alike": sum(alike), "taken": taken, "config": config_of(cublas, product.algorithm),
            "reference": config_of(cublas, reference)}  # fmt: skip


def config_of(cublas: FixedCublas, algorithm: Any) -> list[int]:
    """What cuBLAS tells of an algorithm: id, tile, split of k, reduction, swizzle, option, stages, inner shape, cluster
    (cublasLtMatmulAlgoConfigAttributes_t)."""
    get = cublas.library.cublasLtMatmulAlgoConfigGetAttribute
    get.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    found = []
    for attribute, size in ((0, 4), (1, 4), (2, 4), (3, 4), (4, 4), (5, 4), (6, 4), (7, 2), (8, 2)):
        value, written = ctypes.c_uint32(), ctypes.c_size_t()
        status = get(ctypes.byref(algorithm), attribute, ctypes.byref(value), size, ctypes.byref(written))
        found.append(-1 if status else int(value.value))
    return found


def attention(config: ModelConfig, plain: CudaBackend, fixed: CudaBackend) -> Iterator[Row]:
    """A row for each size of a decode step's attention, the append of the new keys left out."""
    heads = {"num_heads": config.num_heads, "H": config.num_kv_heads, "D": config.head_dim}
    for sequences, keys in ATTENDED:
        one = shape_workload(OPS["attention"], {**heads, "b": sequences, "length": keys}, "bf16")
        ins = rotation(plain, one, one.arrays(), cache_bytes(plain))
        plain.synchronize()
        times = {w: 1e6 * time_workload(b, one, ins).median for w, b in (("plain", plain), ("deterministic", fixed))}
        yield {"sequences": sequences, "keys": keys, "microseconds": times}


def bits(completion: Completion) -> list[Any]:
    """Tokens with their log-probabilities, and those of the most probable ones."""
    assert completion.logprobs is not None
    return [(t.id, t.logprob, t.top) for t in completion.logprobs]


def differing(found: list[Any], wanted: list[Any]) -> int:
    """Tokens whose own bits differ."""
    return sum(a != b for a, b in zip(found, wanted, strict=True))


def same(model: Model) -> Iterator[Row]:
    """A row for each way to compute a text of ``NEW`` tokens: how many of its tokens have other bits."""
    rng, params = np.random.default_rng(1), {**GREEDY, "logprobs": 5}

    def prompt(length: int) -> list[int]:
        return rng.integers(0, model.config.vocab_size, length).tolist()  # type: ignore[no-any-return]

    asked = prompt(300)
    alone = bits(model.generate(asked, max_tokens=NEW, **params))
    for batch in BATCHES:
        others = [prompt(int(length)) for length in rng.integers(1, 400, batch - 1)]
        found = bits(model.generate([*others, asked], max_tokens=NEW, **params)[-1])
        yield {"batch": batch, "tokens": NEW, "different": differing(found, alone)}
    for cut in CUTS:
        longer = [*asked, *(token for token, *_ in alone[:cut])]
        found = bits(model.generate(longer, max_tokens=NEW - cut, **params))
        yield {"read again": cut, "tokens": NEW - cut, "different": differing(found, alone[cut:])}
    whole, chunk = model.logits(asked), model.backend.prefill_chunk
    for size in CHUNKS:
        model.backend.prefill_chunk = size
        yield {"chunk": size, "tokens": len(asked), "different": int((model.logits(asked) != whole).any(-1).sum())}
    model.backend.prefill_chunk = chunk


def speed(model: Model) -> Iterator[Row]:
    """A row for each number of sequences and length of the prompts: the best of three runs behind two that plan and
    capture, each with prompts of its own, which no prefix cache holds."""
    rng = np.random.default_rng(2)
    for sequences, length in SPEEDS:
        prompts = rng.integers(0, model.config.vocab_size, (5, sequences, length)).tolist()
        runs = [model.generate(own, max_tokens=NEW, **GREEDY)[0].timings for own in prompts][2:]
        yield {"sequences": sequences, "prompt": length, "prompt_tokens_per_second": max(t.prompt_rate for t in runs),
               "tokens_per_second": max(t.decode_rate for t in runs)}  # fmt: skip


def measure(shape: str, parts: list[str]) -> Iterator[Row]:
    """Everything of one shape."""
    config = find_shape(shape)[1]
    if {"products", "attention"} & set(parts):
        plain, fixed = CudaBackend("bf16"), CudaBackend("bf16", deterministic=True)
        for part, rows in (("products", products), ("attention", attention)):
            if part in parts:
                yield from ({"part": part, **row} for row in rows(config, plain, fixed))
        fixed.close()
        plain.close()
    for deterministic in (True, False):
        wanted = [(p, f) for p, f in (("same", same), ("speed", speed)) if p in parts]
        if wanted:
            with dummy_model(shape, "cuda", "bfloat16", 4096, 64 * 2304, deterministic=deterministic) as model:
                for part, rows_of in wanted:
                    yield from ({"part": part, "deterministic": deterministic, **row} for row in rows_of(model))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,...")
    parser.add_argument("--out", type=Path, help="write the results to this file as well")
    args = parser.parse_args()
    found = []
    for shape in args.shapes:
        for row in measure(shape, args.only.split(",")):
            found.append({"shape": shape, **row})
            print(json.dumps(found[-1]), flush=True)
    record(found, args.out)
    wrong = [row for row in found if row.get("same") is False or (row.get("deterministic") and row.get("different"))]
    print("every row is the same everywhere" if not wrong else f"NOT the same: {json.dumps(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
