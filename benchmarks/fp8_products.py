"""cuBLASLt's products of 8-bit floats, beside bf16: ``python -m benchmarks.fp8_products [--out FILE] [--rows N,N]``.

The four products of a layer of Llama-3.1-8B, over 64 to 4,096 rows of x. For bf16 and for each kind of scales
(``cuplama/backends/cuda/cublas.py``), with and without fast sums: the error against float64 over a sample of the
result, once in the dtype that the model takes and once in float32, and then TFLOP/s. Beside them what comes before such
a product: x to 8-bit floats (cuda_src/activations_fp8.cu), a packed weight to rows (unpack.cu), and both in one graph
with the product. First the sizes that the library takes at all, and at the end other kernels of a layer. Nothing that
computes something wrong is timed. Weights come from memory, activations from L2 where they fit it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.record import record
from cuplama.backends.cuda.backend import CudaBackend
from cuplama.backends.cuda.cublas import SCALES, Product, load_cublas
from cuplama.dtypes import DTYPES, Array
from cuplama.errors import DeviceError
from cuplama.lab.timing import Replay, cache_bytes
from cuplama.ops import OPS
from cuplama.quant.format import E4M3, Packing
from cuplama.quant.packed import lane_codes

E4M3_DTYPE = np.dtype(ml_dtypes.float8_e4m3fn)
ROWS = (64, 256, 512, 2048, 4096)
LAYERS = 32
SAMPLE = 48  # rows of x and rows of w whose products are held against float64
REPEATS = 7
TYPE = Packing(E4M3, 0, (("scale", "f32"),)).type
# What a right result may be off by, as a share of its norm: rounding to bf16 is 1.2e-3 of it, and fast sums lose more.
WORST = {False: 4e-3, True: 5e-2}


@dataclass(frozen=True)
class Shape:
    """A product y[n,m] = x[n,k] w[m,k]^T of the model; add: its result is added to the residual stream, in float32."""

    name: str
    m: int
    k: int
    add: bool

    @property
    def out(self) -> str:
        """The dtype of y."""
        return "f32" if self.add else "bf16"


SHAPES = (
    Shape("qkv", 6144, 4096, False),
    Shape("o", 4096, 4096, True),
    Shape("gate_up", 28672, 4096, False),
    Shape("down", 4096, 14336, True),
)


def row_shape(k: int) -> tuple[int, int]:
    """Chunks of a thread and threads of a block that has a row of k columns."""
    chunks = -(-k // 4096)
    return chunks, -(-k // (8 * chunks * 32)) * 32


def up4(x: int) -> int:
    return -(-x // 4) * 4


class Bench:
    """The backend, and how its kernels are launched and timed."""

    def __init__(self) -> None:
        self.backend = CudaBackend("bf16")
        self.gpu = self.backend.gpu
        self.cache = cache_bytes(self.backend)
        self.rng = np.random.default_rng(1)
        normal = self.rng.standard_normal(1 << 16).astype(np.float32) * 100
        self.codes = normal.clip(-448, 448).astype(E4M3_DTYPE).view(np.uint8)

    def random_codes(self, rows: int, columns: int) -> np.ndarray[Any, Any]:
        """Normal numbers as 8-bit floats: a product's speed depends on its data."""
        found: np.ndarray[Any, Any] = self.codes[self.rng.integers(0, 1 << 16, (rows, columns), dtype=np.uint16)]
        return found

    def positive(self, *shape: int) -> np.ndarray[Any, Any]:
        return (self.rng.random(shape, dtype=np.float32) + 0.5) * 1e-3

    def up(self, array: np.ndarray[Any, Any]) -> Array:
        return self.backend.upload(array)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self.backend.zeros(shape, np.dtype(dtype))

    def launch(
        self, file: str, expression: str, grid: int | tuple[int, int], block: int, *args: Any
    ) -> Callable[[], None]:
        blocks = grid if isinstance(grid, tuple) else (grid, 1)
        with self.gpu as gpu:
            function = gpu.function(file, expression, 0)

        def run() -> None:
            with self.gpu:
                function((*blocks, 1), (block, 1, 1), args, 0)

        return run

    def call(self, product: Product, **arrays: Array) -> Callable[[], None]:
        addresses = {name: self.gpu.address(array) for name, array in arrays.items()}

        def run() -> None:
            with self.gpu:
                product(**addresses)

        return run

    def seconds(self, bodies: Sequence[Callable[[], object]]) -> float:
        return Replay(self.backend, bodies).seconds(REPEATS).median

    # -- kernels

    def quantise(self, x: Array, codes: Array, scale: Array, groups: bool) -> Callable[[], None]:
        n, k = x.shape
        chunks, threads = row_shape(k)
        expression = f"quantise<bf16, {chunks}, {str(groups).lower()}>"
        last = np.int32(n), np.int32(k)
        return self.launch("activations_fp8.cu", expression, n, threads, x, codes, scale, *last)

    def fused(self, x: Array, g: Array | None, codes: Array, scale: Array, groups: bool) -> Callable[[], None]:
        """silu_mul, or rms_norm if there is its weight, and what it gives as codes."""
        n, k = x.shape[0], x.shape[1] // (2 if g is None else 1)
        chunks, threads = row_shape(k)
        name = "silu_mul" if g is None else "rms_norm"
        expression = f"{name}_quantise<bf16, {chunks}, {str(groups).lower()}>"
        first, last = ((x,), ()) if g is None else ((x, g), (np.float32(1e-5),))
        sizes = np.int32(n), np.int32(k)
        return self.launch("activations_fp8.cu", expression, n, threads, *first, codes, scale, *sizes, *last)

    def unpack(self, packed: Array, codes: Array, scale: Array, m: int, k: int) -> Callable[[], None]:
        grid = (-(-k // 512), -(-m // 16))
        sizes = map(np.int32, (m, 0, m, k))
        return self.launch("unpack.cu", f"unpack_codes<bf16, {TYPE}>", grid, 128, packed, codes, scale, *sizes)


# ---- right? ----------------------------------------------------------------------------------------------------------
def numbers(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = codes.view(E4M3_DTYPE).astype(np.float64)
    return found


def spread(scale: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
    """Scales of groups [rows, K], or of rows [rows, 1] -> of each element."""
    return np.repeat(scale.astype(np.float64), 128 if scale.shape[1] > 1 or k <= 128 else k, 1)[:, :k]


def scaled(kind: str, codes: np.ndarray[Any, Any], scale: np.ndarray[Any, Any], rows: Any, side: str) -> Any:
    """Some rows of x or w in float64. side: whose, "x" or "w"."""
    k = codes.shape[1]
    if kind == "tensor":
        each = np.full((len(rows), 1), scale.reshape(-1)[0])
    elif kind == "row":
        each = scale[rows][:, None]
    elif kind == "block" and side == "w":
        each = scale[rows // 128][:, : -(-k // 128)]
    else:
        each = scale[:, rows].T
    return numbers(codes[rows]) * spread(each, k)


def some(rng: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
    """Rows to look at: the first, the last, and others."""
    return np.unique(np.concatenate([[0, count - 1], rng.integers(0, count, min(SAMPLE, count))]))


def w_scale(bench: Bench, kind: str, m: int, k: int) -> np.ndarray[Any, Any]:
    K = -(-k // 128)
    shapes = {"tensor": (4,), "row": (m,), "group": (K, m), "block": (-(-m // 128), up4(K))}
    return bench.positive(*shapes[kind])


class Weights:
    """A weight of 8-bit codes, and as many copies on the device as keep a product from finding it in L2."""

    def __init__(self, bench: Bench, m: int, k: int, copies: int = 1) -> None:
        self.host = bench.random_codes(m, k)
        # As rows and as blocks alike, for the kernels that read blocks with the scales of the rows behind them.
        scales = np.ones(m + -m % 16, np.float32).view(np.uint8)
        self.copies = [
            bench.up(np.concatenate([np.roll(self.host, 17 * i).reshape(-1), scales])) for i in range(copies)
        ]
        self.scales = {kind: w_scale(bench, kind, m, k) for kind in SCALES}
        self.on_device = {kind: bench.up(scale) for kind, scale in self.scales.items()}

    def bf16(self, bench: Bench, copies: int) -> list[Array]:
        """Copies of a weight of that size in bf16."""
        rows = numbers(self.host[:1024]).astype(np.float32).astype(DTYPES["bf16"])
        host = np.resize(rows, self.host.shape)
        return [bench.up(np.roll(host, 17 * i)) for i in range(copies)]


class Inputs:
    """x of a product on host and device, quantised by our kernels, which are checked here."""

    def __init__(self, bench: Bench, weights: Weights, n: int) -> None:
        self.bench, self.n, self.weights = bench, n, weights
        self.m, self.k = weights.host.shape
        k = self.k
        self.x_host = bench.rng.standard_normal((n, k), dtype=np.float32).astype(DTYPES["bf16"])
        self.x = bench.up(self.x_host)
        K = -(-k // 128)
        self.codes = {groups: bench.empty((n, k), np.uint8) for groups in (False, True)}
        self.scale = {False: bench.empty((max(n, 4),), np.float32), True: bench.empty((K, n), np.float32)}
        self.quantise = {g: bench.quantise(self.x, self.codes[g], self.scale[g], g) for g in (False, True)}
        for groups in (False, True):
            self.quantise[groups]()
        self.host = {
            g: (bench.backend.download(self.codes[g]), bench.backend.download(self.scale[g])) for g in (False, True)
        }
        self.check_codes()

    def check_codes(self) -> None:
        """Raises RuntimeError unless our kernels' codes are those of NumPy."""
        rows, K = some(self.bench.rng, self.n), -(-self.k // 128)
        x = np.zeros((len(rows), K * 128), np.float32)
        x[:, : self.k] = self.x_host[rows].astype(np.float32)
        for groups, width in ((False, K * 128), (True, 128)):
            largest = np.abs(x.reshape(len(rows), -1, width)).max(2)
            scale = np.maximum(largest, np.float32(1e-30)) / np.float32(448)
            want = (x * np.repeat(np.float32(1) / scale, width, 1)).astype(E4M3_DTYPE).view(np.uint8)[:, : self.k]
            codes, found = self.host[groups]
            found = found[:, rows].T if groups else found[rows][:, None]
            if not (np.array_equal(codes[rows], want) and np.array_equal(found, scale)):
                raise RuntimeError(f"x[{self.n},{self.k}]: codes or scales are wrong (groups: {groups})")

    def x_of(self, kind: str) -> tuple[Array, Array, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Codes and scales of x for a kind of scales, on the device and on the host."""
        groups = kind in ("group", "block")
        return self.codes[groups], self.scale[groups], *self.host[groups]

    def result(self, product: Product, kind: str, U: str, add: bool) -> float:
        """The error of the product of that kind."""
        bench, n, m, weights = self.bench, self.n, self.m, self.weights
        codes, x_scale, x_host, x_scale_host = self.x_of(kind)
        rows, columns = some(bench.rng, n), some(bench.rng, m)
        exact = scaled(kind, x_host, x_scale_host, rows, "x")
        exact = exact @ scaled(kind, weights.host, weights.scales[kind], columns, "w").T
        if add:
            start = np.resize(bench.rng.standard_normal(1 << 20).astype(DTYPES[U]), (n, m))
            exact += start[np.ix_(rows, columns)].astype(np.float64)
            y = bench.up(start)
        else:
            y = bench.empty((n, m), DTYPES[U])
        arrays = {"x": codes, "w": weights.copies[0], "y": y, "x_scale": x_scale, "w_scale": weights.on_device[kind]}
        bench.call(product, **arrays, **({"c": y} if add else {}))()
        with bench.gpu:
            found = np.stack([bench.gpu.read(y[int(i)])[columns] for i in rows])
        return float(np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact))


def check_unpack(bench: Bench) -> None:
    """Raises RuntimeError unless the kernel finds the codes that ``lane_codes`` has packed."""
    codes = bench.random_codes(48, 256)
    scales = bench.positive(codes.shape[0])
    blocks = lane_codes(codes.astype(np.uint32), Packing(E4M3, 0, ()))
    packed = bench.up(np.concatenate([blocks.reshape(-1), scales.view(np.uint8)]))
    found, scale = bench.empty(codes.shape, np.uint8), bench.empty(scales.shape, np.float32)
    bench.unpack(packed, found, scale, *codes.shape)()
    if not np.array_equal(bench.backend.download(found), codes):
        raise RuntimeError("unpack_codes finds other codes than were packed")
    if not np.array_equal(bench.backend.download(scale), scales):
        raise RuntimeError("unpack_codes finds other scales than were packed")


# ---- how fast? -------------------------------------------------------------------------------------------------------
Body = Callable[[], None]


def measure(bench: Bench, shape: Shape, weights: Weights, n: int) -> Iterator[dict[str, Any]]:
    """A row for each way to compute the product."""
    about = {"product": shape.name, "n": n, "m": shape.m, "k": shape.k, "out": shape.out}
    operations = 2 * n * shape.m * shape.k
    inputs = Inputs(bench, weights, n)
    y = bench.empty((n, shape.m), DTYPES[shape.out])

    def row(way: str, bodies: Sequence[Body], **more: Any) -> dict[str, Any]:
        seconds = bench.seconds(bodies)
        speed = {"microseconds": round(seconds * 1e6, 2), "teraflops": round(operations / seconds / 1e12, 1)}
        return {**about, "way": way, **more, **speed}

    for groups, name in ((False, "quantise rows"), (True, "quantise groups")):
        yield row(name, [inputs.quantise[groups]])
    rows, scale = bench.empty((shape.m, shape.k), np.uint8), bench.empty((shape.m,), np.float32)
    unpacks = [bench.unpack(w, rows, scale, shape.m, shape.k) for w in weights.copies]
    yield row("unpack codes", unpacks)
    for kind in SCALES:
        for fast in (False, True):
            product, found = _checked(bench, inputs, shape, kind, fast)
            if product is None:
                yield {**about, "way": kind, "fast": fast, **found}
                continue
            body = partial(_body, bench, inputs, kind, product, y, shape.add)
            yield row(kind, [body(w) for w in weights.copies], fast=fast, **found)
            quantise = inputs.quantise[kind in ("group", "block")]
            if kind in ("row", "block"):
                yield row(f"quantise, {kind}", [_all(quantise, body(w)) for w in weights.copies], fast=fast)
                chains = [_all(quantise, unpack, body(rows)) for unpack in unpacks]
                yield row(f"quantise, unpack, {kind}", chains, fast=fast)


def _checked(
    bench: Bench, inputs: Inputs, shape: Shape, kind: str, fast: bool
) -> tuple[Product | None, dict[str, Any]]:
    """The product and its errors; without it, what is the matter."""
    assert bench.gpu.cublas is not None
    found: dict[str, Any] = {}
    for U, name in (("f32", "error_f32"), (shape.out, "error")):
        product = bench.gpu.cublas.scaled_product(inputs.n, shape.m, shape.k, kind, U, add=shape.add, fast=fast)
        if product is None:
            return None, {"refused": U}
        try:
            error = inputs.result(product, kind, U, shape.add)
        except DeviceError as e:  # a status that only the product itself gives
            return None, {"failed": str(e)}
        found[name] = float(f"{error:.2e}")
        if not error < WORST[fast]:
            return None, {"wrong": True, **found}
    return product, found


def _body(bench: Bench, inputs: Inputs, kind: str, product: Product, y: Array, add: bool, w: Array) -> Body:
    codes, x_scale = inputs.x_of(kind)[:2]
    arrays = {"x": codes, "w": w, "y": y, "x_scale": x_scale, "w_scale": inputs.weights.on_device[kind]}
    return bench.call(product, **arrays, **({"c": y} if add else {}))


def _all(*parts: Body) -> Body:
    def body() -> None:
        for part in parts:
            part()

    return body


def measure_bf16(bench: Bench, shape: Shape, copies: Sequence[Array], n: int) -> Iterator[dict[str, Any]]:
    """The product in bf16, as it is today."""
    assert bench.gpu.cublas is not None
    product = bench.gpu.cublas.product(n, shape.m, shape.k, "bf16", shape.out, add=shape.add)
    assert product is not None
    x = bench.up(bench.rng.standard_normal((n, shape.k), dtype=np.float32).astype(DTYPES["bf16"]))
    y = bench.empty((n, shape.m), DTYPES[shape.out])
    added = {"c": y} if shape.add else {}
    seconds = bench.seconds([bench.call(product, x=x, w=w, y=y, **added) for w in copies])
    yield {"product": shape.name, "n": n, "m": shape.m, "k": shape.k, "out": shape.out, "way": "bf16",
           "microseconds": round(seconds * 1e6, 2),
           "teraflops": round(2 * n * shape.m * shape.k / seconds / 1e12, 1)}  # fmt: skip


def totals(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Milliseconds of all layers, for each number of rows and each way that all four products have."""
    for n in sorted({r["n"] for r in rows if "n" in r}):
        found: dict[str, dict[str, float]] = {}
        for r in rows:
            if r.get("n") == n and "microseconds" in r:
                way = r["way"] + (", fast" if r.get("fast") else "")
                found.setdefault(way, {})[r["product"]] = r["microseconds"]
        for way, each in found.items():
            if len(each) == len(SHAPES):
                yield {"n": n, "way": way, "milliseconds_of_all_layers": round(LAYERS * sum(each.values()) / 1e3, 2)}


# ---- what else a design depends on -----------------------------------------------------------------------------------
def probe(bench: Bench) -> Iterator[dict[str, Any]]:
    """Sizes that 128 or 16 do not divide: taken, refused, or wrong."""
    cublas = bench.gpu.cublas
    assert cublas is not None
    for n, m, k in ((65, 256, 512), (66, 256, 512), (68, 256, 512), (2047, 256, 512), (72, 1096, 528), (128, 200, 2064),
                    (1, 256, 512), (16, 256, 512), (96, 4864, 896), (128, 896, 4864), (96, 1152, 896)):  # fmt: skip
        inputs = Inputs(bench, Weights(bench, m, k), n)
        for kind in SCALES:
            for U, add in (("bf16", False), ("f16", False), ("f32", False), ("f32", True), ("bf16", True)):
                about = {"probe": [n, m, k], "way": kind, "out": U, "add": add}
                product = cublas.scaled_product(n, m, k, kind, U, add=add)
                if product is None:
                    yield {**about, "refused": True}
                    continue
                try:
                    yield {**about, "error": float(f"{inputs.result(product, kind, U, add):.2e}")}
                except DeviceError as e:  # a status that only the product itself gives
                    yield {**about, "failed": str(e)}


def others(bench: Bench, n: int) -> Iterator[dict[str, Any]]:
    """Other kernels of a layer, whose time a budget needs."""
    hidden = bench.up(bench.rng.standard_normal((n, 4096), dtype=np.float32))
    gate_up = bench.up(bench.rng.standard_normal((n, 28672), dtype=np.float32).astype(DTYPES["bf16"]))
    norm = bench.up(np.ones(4096, DTYPES["bf16"]))
    for name, ins, attrs in (("rms_norm", (hidden, norm), {"eps": 1e-5}), ("silu_mul", (gate_up,), {})):
        seconds = bench.seconds([partial(bench.backend.call, OPS[name], ins, attrs)])
        yield {"op": name, "n": n, "microseconds": round(seconds * 1e6, 2)}
    codes, scale = bench.empty((n, 14336), np.uint8), bench.empty((112, n), np.float32)
    for groups in (False, True):
        for name, x, g in (("rms_norm", hidden, norm), ("silu_mul", gate_up, None)):
            seconds = bench.seconds([bench.fused(x, g, codes, scale, groups)])
            yield {"op": f"{name}_quantise", "groups": groups, "n": n, "microseconds": round(seconds * 1e6, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file as well")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x (default: %(default)s)")
    args = parser.parse_args()
    bench = Bench()
    check_unpack(bench)
    rows: list[dict[str, Any]] = []

    def take(found: Iterator[dict[str, Any]]) -> None:
        for row in found:
            rows.append(row)
            print(json.dumps(row), flush=True)

    library = load_cublas()
    assert library is not None
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    take(iter([{"cublasLt": library.cublasLtGetVersion(), "gpu": bench.backend.describe()}]))
    take(probe(bench))
    timed = len(rows)
    for shape in SHAPES:
        weights = Weights(bench, shape.m, shape.k, 2 * bench.cache // (shape.m * shape.k) + 2)
        wide = weights.bf16(bench, bench.cache // (shape.m * shape.k) + 2)
        for n in map(int, args.rows.split(",")):
            take(measure(bench, shape, weights, n))
            take(measure_bf16(bench, shape, wide, n))
    take(totals(rows[timed:]))
    take(others(bench, 2048))
    bench.backend.close()
    record(rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
