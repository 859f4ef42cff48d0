"""Quantised weights on their way to the GPU and to cuBLAS: ``python -m benchmarks.packed_loading [--out FILE]``.

pack: microseconds of the kernels that pack a matrix of the 8B out of the words of AWQ, GPTQ and compressed-tensors, by
themselves. load: seconds for all weights of an int4 8B, from a mapped file whose pages are in memory. unpack:
microseconds of writing the numbers of a packed weight, and of a product with many rows in all, for some sizes of
slices, beside cuBLAS on the plain weight. Results of the kernels are checked first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from cuplama.backends.cuda import planning, unpacking
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.loading import Job
from cuplama.dtypes import DTYPES
from cuplama.lab.timing import Replay
from cuplama.lab.workloads import normal_values
from cuplama.ops import OPS
from cuplama.ops.weights import MAX_PACKED_ROWS
from cuplama.quant.catalog import CATALOG, random_stored
from cuplama.quant.fields import Field, element_plane, word_plane
from cuplama.quant.format import grouped, whole
from cuplama.quant.packed import Packed, pack
from cuplama.quant.stored import Stored
from cuplama.quant.weight import Weight

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
STACKS = {"qkv": (4096, 1024, 1024), "o": (4096,), "gate_up": (14336, 14336), "down": (4096,)}
LAYERS, VOCABULARY, WIDTH, GROUP = 32, 128256, 4096, 128
FORMATS = ("int4 g128", "fp8", "Q4_K", "Q6_K")
REPEATS = 20
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class File:
    """The bytes of a checkpoint, taken one tensor after the other; from the beginning again behind the last."""

    def __init__(self, data: Bytes) -> None:
        self._data, self._at = data, 0

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if self._at + size > self._data.size:
            self._at = 0
        found: np.ndarray[Any, Any] = self._data[self._at : self._at + size].view(dtype).reshape(shape)
        self._at += -(-size // 8) * 8
        return found


def awq(file: File, m: int, k: int) -> Stored:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    code, zero = (
        Field((word_plane(file.take((n, m // 8), np.int32), 4, m, along=1, transposed=True, order=order),))
        for n in (k, k // GROUP)
    )
    scale = Field((element_plane(file.take((k // GROUP, m), np.float16), True),))
    form = grouped("awq", whole(4), GROUP, "f16", zero=True)
    return Stored((m, k), form, {"code": code, "zero": zero, "scale": scale}, m * k // 2)


def gptq(file: File, m: int, k: int) -> Stored:
    code = Field((word_plane(file.take((k // 8, m), np.int32), 4, k, along=0, transposed=True),))
    zero = Field((word_plane(file.take((k // GROUP, m // 8), np.int32), 4, m, along=1, transposed=True),), add=1)
    scale = Field((element_plane(file.take((k // GROUP, m), np.float16), True),))
    form = grouped("gptq", whole(4), GROUP, "f16", zero=True)
    return Stored((m, k), form, {"code": code, "zero": zero, "scale": scale}, m * k // 2)


def compressed(file: File, m: int, k: int) -> Stored:
    code = Field((word_plane(file.take((m, k // 8), np.int32), 4, k, along=1),))
    scale = Field((element_plane(file.take((m, k // GROUP), np.float16)),))
    return Stored((m, k), CATALOG["int4 g128"], {"code": code, "scale": scale}, m * k // 2)


LAYOUTS = {"awq": awq, "gptq": gptq, "compressed-tensors": compressed}


def packing(backend: CudaBackend, file: File) -> Iterator[dict[str, Any]]:
    """The kernels of pack.cu by themselves."""
    gpu = backend.gpu
    for layout, make in LAYOUTS.items():
        for name, parts in STACKS.items():
            job = Job([make(file, m, SHAPES[name][1]) for m in parts])
            raw, blocks = (backend.zeros((size,), np.dtype(np.uint8)) for size in (job.layout.size, job.nbytes))
            with gpu:
                gpu.stage_pieces(raw, job.layout.pieces)
            calls = [partial(job.queue, gpu, raw, blocks)]
            taken = Replay(backend, calls).seconds(REPEATS).median
            moved = job.layout.size + job.nbytes
            yield {
                "pack": layout,
                "weight": name,
                "microseconds": taken * 1e6,
                "gigabytes_per_second": moved / taken / 1e9,
            }
    backend.end_loading()


def check_packing(backend: CudaBackend, file: File) -> None:
    """Raises SystemExit if what a layout is packed to is not what NumPy packs."""
    for layout, make in LAYOUTS.items():
        stored = make(file, 4096, 4096)
        found = backend.load_weight(Weight("w", ("w",), (stored,)))
        assert isinstance(found, Packed)
        backend.end_loading()
        if not np.array_equal(backend.download(found.segments[0].data), pack(stored)):
            raise SystemExit(f"{layout}: packed wrong")


def loading(backend: CudaBackend, file: File) -> Iterator[dict[str, Any]]:
    """All weights of the 8B, with embedding and head in bf16, twice for each layout."""
    for layout in (*LAYOUTS, *LAYOUTS):
        make = LAYOUTS[layout]
        began, weights, total = time.perf_counter(), [], 0
        for name in ("embed_tokens", "lm_head"):
            weight = Weight(name, (name,), (file.take((VOCABULARY, WIDTH), DTYPES["bf16"]),))
            total += weight.nbytes
            weights.append(backend.load_weight(weight))
        plain = time.perf_counter() - began
        for _ in range(LAYERS):
            for name, parts in STACKS.items():
                stack = tuple(make(file, m, SHAPES[name][1]) for m in parts)
                weight = Weight(name, tuple(map(str, range(len(parts)))), stack)
                total += weight.nbytes
                weights.append(backend.load_weight(weight))
        backend.end_loading()
        taken = time.perf_counter() - began
        del weights
        yield {
            "load": layout, "gigabytes": total / 1e9, "seconds": taken, "gigabytes_per_second": total / taken / 1e9,
            "seconds_plain": plain,
        }  # fmt: skip


def unpacked(backend: CudaBackend, form: str, name: str, rows: int) -> Iterator[dict[str, Any]]:
    """Writing the numbers of a weight, and products with it."""
    m, k = SHAPES[name]
    some = random_stored(CATALOG[form], 256, k, np.random.default_rng(0), deviation=0.02)
    again = np.arange(m) % 256
    stored, x = some[again], normal_values(np.random.default_rng(1), (rows, k), DTYPES["bf16"], 1.0)
    weight, given = backend.load_weight(Weight(name, (name,), (stored,))), backend.upload(x)
    backend.end_loading()
    plain = backend.upload(some.numbers().astype(DTYPES["bf16"])[again])
    want = backend.call(OPS["linear"], (given, plain, None), {"U": "bf16"})[0]
    times = {"plain": Replay(backend, [partial(backend.call, OPS["linear"], (given, plain, None), {"U": "bf16"})])}
    for megabytes in (16, 24, 48, 96, 256):
        unpacking.SLICE_BYTES = megabytes << 20
        backend._plans.clear()
        call = partial(backend.call, OPS["linear"], (given, weight, None), {"U": "bf16"})
        (y,) = call()
        if not np.array_equal(backend.download(y), backend.download(want)):
            error = np.abs(backend.download(y).astype(np.float32) - backend.download(want).astype(np.float32)).max()
            print(f"{form} {name}: differs from the plain product by {error:g} at most", file=sys.stderr)
        times[f"slices of {megabytes} MB"] = Replay(backend, [call])
    backend._plans.clear()
    for label, replay in times.items():
        yield {"product": name, "format": form, "rows": rows, "way": label, "microseconds": _micro(replay)}
    yield {"unpack": name, "format": form, **_unpack_alone(backend, weight, m, k)}


def _unpack_alone(backend: CudaBackend, weight: Any, m: int, k: int) -> dict[str, Any]:
    """Of all of it at once: the launches of a plan without the product."""
    unpacking.SLICE_BYTES = 256 << 20
    x = backend.zeros((MAX_PACKED_ROWS + 1, k), DTYPES["bf16"])
    call = OPS["linear"].bind((x, weight, None), {"U": "bf16"})
    made = planning.make_plan(call, backend.gpu)
    arrays = [x, weight, None, *[backend.zeros(b.shape, b.dtype) for b in made.new]]
    seconds = Replay(backend, [partial(made.actions[0], arrays)]).seconds(REPEATS).median
    moved = 2 * m * k + sum(s.data.nbytes for s in weight.segments)
    return {"microseconds": seconds * 1e6, "gigabytes_per_second": moved / seconds / 1e9}


def _micro(replay: Replay) -> float:
    return replay.seconds(REPEATS).median * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file as well")
    parser.add_argument("--only", default="pack,load,unpack", help="which of them, with commas")
    parser.add_argument("--rows", type=int, default=2048, help="rows of the products")
    parser.add_argument("--folder", type=Path, help="where the file of weights is made for the time being")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    only, backend = args.only.split(","), CudaBackend("bf16")

    def note(found: Iterator[dict[str, Any]]) -> None:
        for row in found:
            rows.append({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()})
            print(json.dumps(rows[-1]), flush=True)

    if {"pack", "load"} & set(only):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path, piece = Path(folder) / "weights", np.random.default_rng(0).integers(0, 256, 1 << 26, np.uint8)
            with path.open("wb") as out:
                for _ in range((6 << 30) // piece.size if "load" in only else 8):
                    out.write(piece.tobytes())
            file = File(np.asarray(np.memmap(path, np.uint8, "r")))
            check_packing(backend, file)
            note(packing(backend, file) if "pack" in only else iter(()))
            note(loading(backend, file) if "load" in only else iter(()))
            del file
    for form in FORMATS if "unpack" in only else ():
        for name in SHAPES:
            note(unpacked(backend, form, name, args.rows))
    backend.close()
    record(rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
