"""The emulator's own tests: what it computes, and that it finds each kind of fault and spares the repaired twin."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuplama.ops.binding import BoundLaunch
from cuplama.ops.prototypes import prototypes
from cuplama.simt import objects
from cuplama.simt.cache import cache_folder, prune
from cuplama.simt.emulator import CUDA_SRC, HERE, NOT_EMULATED, KernelFault, precompile, run

KERNELS = Path(__file__).resolve().parent / "kernels"
Array = np.ndarray[Any, Any]
LANES = np.arange(32)


def launch(
    file: str, expression: str, *args: Any, grid: int = 1, block: int = 32, shared: int = 0, **options: Any
) -> None:
    proto = prototypes(file, KERNELS)[expression.split("<")[0]]
    bound = BoundLaunch(file, expression, (grid, 1, 1), (block, 1, 1), shared, args, proto)
    run(bound, folder=KERNELS, **options)


def floats(n: int) -> Array:
    return np.linspace(-2, 2, n, dtype=np.float32)


# kernel -> kind of the report, block size, arguments, dynamic shared bytes
FAULTS: dict[str, tuple[str, int, Any, int]] = {
    "read_past_end": ("global-out-of-bounds", 64, lambda: (floats(50), floats(50), np.int32(50)), 0),
    "write_past_end": ("global-out-of-bounds", 64, lambda: (floats(50), np.int32(50)), 0),
    "write_before_start": ("global-out-of-bounds", 32, lambda: (floats(32), np.int32(32)), 0),
    "write_input": ("write-to-const", 32, lambda: (floats(32), floats(32)), 0),
    "null_pointer": ("global-out-of-bounds", 32, lambda: (None, floats(32)), 0),
    "read_past_shared": ("shared-out-of-bounds", 32, lambda: (floats(32),), 0),
    "index_past_shared": ("undefined-behaviour", 32, lambda: (floats(32),), 0),
    "write_past_dynamic": ("shared-out-of-bounds", 32, lambda: (floats(32),), 128),
    "uninitialised": ("uninitialised-shared", 32, lambda: (floats(32),), 0),
    "divergent_barrier": ("barrier-divergence", 64, lambda: (floats(64),), 0),
    "exit_before_barrier": ("barrier-divergence", 64, lambda: (floats(64), np.int32(50)), 0),
    "two_barriers": ("barrier-divergence", 64, lambda: (floats(64),), 0),
    "lanes_never_meet": ("barrier-divergence", 32, lambda: (floats(32),), 0),
    "mask_without_caller": ("warp-mask", 32, lambda: (floats(32),), 0),
    "masks_differ": ("warp-mask", 32, lambda: (floats(32),), 0),
    "reads_absent_lane": ("warp-mask", 32, lambda: (floats(32),), 0),
    "misaligned_vector": ("misaligned", 32, lambda: (floats(32), floats(32)), 0),
    "signed_overflow": ("undefined-behaviour", 32, lambda: (np.full(1, 2**30, np.int32), np.zeros(32, np.int32)), 0),
    "shift_too_far": ("undefined-behaviour", 32, lambda: (np.full(1, 32, np.int32), np.zeros(32, np.uint32)), 0),
    "divide_by_zero": ("undefined-behaviour", 32, lambda: (np.zeros(1, np.int32), np.zeros(32, np.int32)), 0),
    "race_read_after_write": ("race", 64, lambda: (floats(64),), 0),
    "race_write_after_read": ("race", 64, lambda: (floats(64),), 0),
    "race_write_write": ("race", 64, lambda: (floats(64),), 0),
    "race_in_warp": ("race", 32, lambda: (floats(32),), 0),
    "race_in_half_warp": ("race", 32, lambda: (floats(32),), 0),
    "race_between_warps": ("race", 64, lambda: (floats(64),), 0),
    "race_of_halves": ("race", 64, lambda: (floats(64),), 0),
    "race_with_atomic": ("race", 64, lambda: (np.zeros(64, np.int32),), 0),
    "race_in_loop": ("race", 64, lambda: (floats(64),), 0),
    "assertion": ("trap", 32, lambda: (floats(32),), 0),
    "endless_loop": ("timeout", 32, lambda: (floats(32),), 0),
    "wait_for_blocks": ("deadlock", 32, lambda: (np.zeros(6, np.int32), np.zeros(6, np.int32)), 0),
}
PTX_FAULTS: dict[str, tuple[str, int, Any, int]] = {
    "copy_async": ("async-in-flight", 32, lambda: (floats(128), floats(128)), 0),
    "copy_async_stages": ("async-in-flight", 32, lambda: (floats(512), floats(512), np.int32(4)), 0),
    "pipeline": ("race", 96, lambda: (floats(64 * 5), floats(64 * 5), np.int32(5)), 0),
    "named": ("race", 128, lambda: (floats(128),), 0),
}


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All toy kernels at once: a few g++ calls, side by side."""
    twins = [("faults.cu", k) for k in FAULTS] + [("ptx.cu", k) for k in PTX_FAULTS]
    precompile([(f, f"{k}<{ok}>") for f, k in twins for ok in ("false", "true")], folder=KERNELS)
    expressions = re.findall(r'launch\(\s*"(\w+\.cu)", "([^"]+)"', Path(__file__).read_text())
    precompile(expressions, folder=KERNELS)


def marked(file: str, kernel: str, mark: str) -> set[int]:
    """The lines of a toy kernel (or of the function before it) that carry a mark."""
    lines = (KERNELS / file).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if f" {kernel}(" in line)
    end = next(i for i in range(start, len(lines)) if lines[i] == "}")
    begin = start - 4 if lines[max(0, start - 1)] == "}" else start
    return {i + 1 for i in range(begin, end) if f"// {mark}" in lines[i]}


@pytest.mark.parametrize(("file", "kernel"), [("faults.cu", k) for k in FAULTS] + [("ptx.cu", k) for k in PTX_FAULTS])
def test_finds_the_fault_and_spares_its_repaired_twin(file: str, kernel: str) -> None:
    kind, block, args, shared = {**FAULTS, **PTX_FAULTS}[kernel]
    grid = 6 if kernel == "wait_for_blocks" else 1
    launch(file, f"{kernel}<true>", *args(), grid=grid, block=block, shared=shared)
    with pytest.raises(KernelFault) as caught:
        launch(file, f"{kernel}<false>", *args(), grid=grid, block=block, shared=shared, timeout=1)
    first, _, detail = str(caught.value).partition("\n")
    assert caught.value.kind == kind, caught.value
    # A clock may stop a thread in the emulator's own code; every other fault has its line in the kernel.
    place = r"(?:simt|kernels)/[\w/.]+" if kind == "timeout" else f"kernels/{file}"
    where = re.fullmatch(rf"{kind}: {kernel}<false>: block \(0, 0, 0\), thread \(\d+, 0, 0\): {place}:(\d+)", first)
    assert where is not None, first
    lines, others = marked(file, kernel, "FAULT"), marked(file, kernel, "OTHER")
    if lines and file in first:
        assert int(where[1]) in lines | others, caught.value
    if kind in ("race", "async-in-flight"):  # both places are named
        both = {int(where[1]), *map(int, re.findall(rf"{file}:(\d+)", detail))}
        assert both == lines | others, caught.value


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_fault_is_found_in_any_order_of_threads(seed: int) -> None:
    for kernel in ("race_read_after_write", "race_in_loop", "divergent_barrier"):
        kind, block, args, shared = FAULTS[kernel]
        launch("faults.cu", f"{kernel}<true>", *args(), block=block, shared=shared, seed=seed)
        with pytest.raises(KernelFault) as caught:
            launch("faults.cu", f"{kernel}<false>", *args(), block=block, shared=shared, seed=seed)
        assert caught.value.kind == kind


def test_census_names_every_thread() -> None:
    with pytest.raises(KernelFault) as caught:
        launch("faults.cu", "divergent_barrier<false>", floats(64), block=64)
    text = str(caught.value)
    assert "threads 0-39 waits in __syncthreads at kernels/faults.cu:" in text
    assert "threads 40-63 has ended" in text


def test_unchecked_run_still_computes() -> None:
    y = floats(64)
    launch("faults.cu", "race_read_after_write<false>", y, block=64, check=False)
    launch("faults.cu", "race_write_after_read<false>", y, block=64, race_check=False)


def test_arguments_are_verified() -> None:
    x = floats(8)
    with pytest.raises(TypeError, match="argument 'n'"):
        launch("faults.cu", "write_past_end<true>", x, 8.0)
    with pytest.raises(TypeError, match="contiguous"):
        launch("faults.cu", "write_past_end<true>", floats(16)[::2], np.int32(8))
    with pytest.raises(TypeError, match="2 parameters, but got 1"):
        launch("faults.cu", "write_past_end<true>", x)
    with pytest.raises(TypeError, match="elements of 4 bytes"):
        launch("faults.cu", "write_past_end<true>", x.astype(np.float16), np.int32(8))
    with pytest.raises(TypeError, match="cannot launch"):
        launch("faults.cu", "write_past_end<true>", x, np.int32(8), block=2048)


def test_views_and_shared_arrays_keep_their_places() -> None:
    base = np.zeros(64, np.float32)
    view = base[16:32]
    with pytest.raises(KernelFault) as caught:  # the 16 floats after the view belong to its base, not to it
        launch("faults.cu", "write_past_end<false>", view, np.int32(16), block=32)
    assert caught.value.kind == "global-out-of-bounds"
    launch("faults.cu", "write_past_end<true>", view, np.int32(16), block=32)
    np.testing.assert_array_equal(base, np.repeat([0, 1, 0, 0], 16))


# ---- objects and their cache ---------------------------------------------------------------------------------------
def test_objects_are_shared_by_checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text elsewhere is not compiled again, and its faults read as they would at the first place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = []
    for checkout in ("one", "another"):
        folder = shutil.copytree(KERNELS, tmp_path / checkout / "cuda_src")
        build = objects.Build(folder / "faults.cu", 90)
        proto = prototypes("faults.cu", folder)["signed_overflow"]
        args = (np.full(1, 2**30, np.int32), np.zeros(32, np.int32))
        objects._load.cache_clear()
        with pytest.raises(KernelFault) as caught:
            run(
                BoundLaunch("faults.cu", "signed_overflow<false>", (1, 1, 1), (32, 1, 1), 0, args, proto), folder=folder
            )
        told.append(
            (str(caught.value), build.key(), sorted(p.name for p in (tmp_path / "cache/cuplama/simt").iterdir()))
        )
    assert told[0] == told[1]
    assert re.search(r": cuda_src/faults\.cu:\d+\n", told[0][0]), told[0][0]


def test_a_file_that_is_given_by_its_path_keeps_it_in_reports() -> None:
    proto = prototypes("faults.cu", KERNELS)["signed_overflow"]
    args = (np.full(1, 2**30, np.int32), np.zeros(32, np.int32))
    path = str(KERNELS / "faults.cu")
    with pytest.raises(KernelFault, match=re.escape(f": {path}:")):
        run(BoundLaunch(path, "signed_overflow<false>", (1, 1, 1), (32, 1, 1), 0, args, proto))


def test_an_object_depends_on_every_text_it_includes(tmp_path: Path) -> None:
    folder = shutil.copytree(KERNELS, tmp_path / "kernels")
    keys = {objects.Build(folder / "basic.cu", 90).key()}
    (folder / "new.cuh").write_text("// nothing yet")
    keys.add(objects.Build(folder / "basic.cu", 90).key())
    (folder / "basic.cu").write_text("// nothing left")
    keys.add(objects.Build(folder / "basic.cu", 90).key())
    keys |= {objects.Build(folder / "basic.cu", *rest).key() for rest in ((80,), (90, ("A=1",)))}
    assert len(keys) == 5


def test_a_file_in_a_folder_includes_what_lies_above_it(tmp_path: Path) -> None:
    """And depends on it; reports name the folder too."""
    top = tmp_path / "cuda_src"
    (top / "ladder").mkdir(parents=True)
    (top / "above.cuh").write_text("constexpr int AT = 1 << 20;\n")
    (top / "ladder" / "beside.cuh").write_text('#include "above.cuh"\n')
    file = "ladder/far.cu"
    (top / file).write_text(
        '#include "ladder/beside.cuh"\n__global__ void far(int* x) {\n    x[threadIdx.x + AT] = 1;\n}\n'
    )
    keys = [objects.Build.of(file, top, 90, ()).key()]
    for header in ("above.cuh", "ladder/beside.cuh"):
        (top / header).write_text((top / header).read_text() + "// changed\n")
        keys.append(objects.Build.of(file, top, 90, ()).key())
    assert len(set(keys)) == 3
    launch = BoundLaunch(file, "far", (1, 1, 1), (32, 1, 1), 0, (np.zeros(4, np.int32),), prototypes(file, top)["far"])
    with pytest.raises(KernelFault, match=r": cuda_src/ladder/far\.cu:3\n"):
        run(launch, folder=top)


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    """What was not used for long goes, and beyond a size what was used least recently."""
    now = time.time()
    for name, days, size in (("old", 31, 1), ("a", 3, 600), ("b", 2, 300), ("c", 1, 300)):
        (tmp_path / name).write_bytes(bytes(size))
        os.utime(tmp_path / name, times=(now - days * 86400,) * 2)
    (tmp_path / "being made").mkdir()
    prune(tmp_path, max_bytes=1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "being made", "c"]


def test_what_the_cache_has_lost_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for suffix in ("so", "json", "o"):
        objects._load.cache_clear()
        x, y = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
        launch("numbers.cu", "half_masks", x, y)
        assert y.any()
        (lost,) = cache_folder().glob(f"*.{suffix}")
        lost.unlink()


# ---- numbers -------------------------------------------------------------------------------------------------------
def same(a: Array, b: Array) -> None:
    """Bit for bit, NaNs aside."""
    kind = {2: np.uint16, 4: np.uint32}[a.dtype.itemsize]
    nan = np.isnan(b.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(a.astype(np.float32)), nan)
    np.testing.assert_array_equal(a.view(kind)[~nan], b.view(kind)[~nan])


def test_widening_of_all_patterns() -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    h, b = patterns.view(np.float16), patterns.view(ml_dtypes.bfloat16)
    fh, fb = np.zeros(65536, np.float32), np.zeros(65536, np.float32)
    launch("numbers.cu", "widen", h, b, fh, fb, np.int32(65536), grid=256, block=256)
    same(fh, h.astype(np.float32))
    same(fb, b.astype(np.float32))


def test_narrowing_of_random_and_edge_values() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 40000, dtype=np.uint64).astype(np.uint32)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        ties = halves[:-1] / 2 + halves[1:] / 2  # halfway between neighbours
        near = np.concatenate([np.nextafter(ties, np.float32(s)) for s in (-np.inf, np.inf)])
    small = rng.standard_normal(40000).astype(np.float32) * np.exp2(rng.integers(-30, 18, 40000)).astype(np.float32)
    bf_ties = (np.arange(65536, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    x = np.ascontiguousarray(np.concatenate([bits.view(np.float32), halves, ties, near, small, bf_ties]))
    n = len(x)
    h, b = np.zeros(n, np.float16), np.zeros(n, ml_dtypes.bfloat16)
    launch("numbers.cu", "narrow", x, h, b, np.int32(n), grid=-(-n // 256), block=256)
    with np.errstate(all="ignore"):
        same(h, x.astype(np.float16))
        same(b, x.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("T", ["__half", "__nv_bfloat16"])
def test_arithmetic_is_correctly_rounded(T: str) -> None:
    dtype = np.dtype(np.float16 if T == "__half" else ml_dtypes.bfloat16)
    rng = np.random.default_rng(1)
    a, b, c = (
        (rng.standard_normal(4096) * np.exp2(rng.integers(-4, 4, 4096))).astype(np.float32).astype(dtype)
        for _ in range(3)
    )
    out = [np.zeros(4096, dtype) for _ in range(4)]
    launch("numbers.cu", "arithmetic<__half>" if T == "__half" else "arithmetic<__nv_bfloat16>", a, b, c, *out,
           np.int32(4096), grid=16, block=256)  # fmt: skip
    x, y, z = (v.astype(np.longdouble) for v in (a, b, c))
    wanted = [x + y, x * y, x / y, x * y + z]
    for got, exact in zip(out, wanted, strict=True):
        # nearest: no other value of the type is closer
        error = np.abs(got.astype(np.longdouble) - exact)
        bits = got.view(np.uint16)
        for neighbour in (bits + 1, bits - 1):
            distance = np.abs(neighbour.astype(np.uint16).view(dtype).astype(np.longdouble) - exact)
            assert np.all((error <= distance) | np.isnan(distance))  # the neighbour of zero is a NaN


def test_pairs() -> None:
    x = np.random.default_rng(2).standard_normal((32, 2)).astype(np.float32)
    h, b, y = np.zeros((32, 2), np.float16), np.zeros((32, 2), ml_dtypes.bfloat16), np.zeros_like(x)
    launch("numbers.cu", "pairs", x, h, b, y)
    same(h, x.astype(np.float16))
    same(b, x.astype(ml_dtypes.bfloat16))
    wide_h, wide_b = h.astype(np.float32), b.astype(np.float32)
    np.testing.assert_array_equal(y, np.stack([wide_h[:, 0] + wide_b[:, 1], wide_h[:, 0] + wide_b[:, 1]], 1))


def test_warp_functions() -> None:
    x = np.random.default_rng(3).integers(1, 99, 64).astype(np.int32)
    out = np.zeros((21, 64), np.int32)
    launch("numbers.cu", "warp", x, out, block=64)
    lanes, w = LANES, x.reshape(2, 32)
    up = np.where(lanes >= 3, lanes - 3, lanes)
    up8 = np.where(lanes % 8 >= 3, lanes - 3, lanes)
    down = np.where(lanes + 5 < 32, lanes + 5, lanes)
    down16 = np.where(lanes % 16 + 5 < 16, lanes + 5, lanes)
    ballot = ((w & 1).astype(np.uint64) << lanes.astype(np.uint64)).sum(1).astype(np.uint32).view(np.int32)
    match = [[sum(1 << int(i) for i in lanes if row[i] % 4 == row[j] % 4) for j in lanes] for row in w]

    def each(values: Any) -> Array:
        return np.repeat(np.asarray(values)[:, None], 32, 1)

    ones = np.ones((2, 32))
    wanted = [
        each(w[:, 5]), w[:, lanes // 8 * 8 + (lanes + 3) % 8], w[:, up], w[:, up8], w[:, down], w[:, down16],
        w[:, lanes ^ 9], w[:, lanes ^ 4], each(ballot), ones, each((w > 90).any(1)), each(w.sum(1)), each(w.min(1)),
        each(w.max(1)), np.array(match, np.uint32).view(np.int32), each(np.bitwise_xor.reduce(w, 1)),
        w[:, lanes ^ 1], ones, np.full((2, 32), (x & 1).sum()), ones, np.zeros((2, 32)),
    ]  # fmt: skip
    for i, row in enumerate(wanted):
        np.testing.assert_array_equal(out[i].reshape(2, 32), row, err_msg=f"result {i}")


def test_half_warps_go_their_own_ways() -> None:
    x = np.arange(32, dtype=np.int32)
    out = np.zeros(32, np.int32)
    launch("numbers.cu", "half_masks", x, out)
    np.testing.assert_array_equal(out, np.repeat([x[:16].sum(), x[16:].sum()], 16))


def test_atomics() -> None:
    i = np.zeros(9, np.int32)
    u = np.array([0, 0xFFFFFFFF, 0, 0], np.uint32)
    l, f = np.zeros(1, np.uint64), np.zeros(1, np.float32)
    launch("numbers.cu", "atomics", i, u, l, f, grid=4, block=64)
    t = np.arange(256)
    np.testing.assert_array_equal(i, [t.sum(), -255, 255, -256, 512, 64, 64, 64, 64])
    np.testing.assert_array_equal(u, [0xFFFFFFFF, 0xFFFFFF80, np.bitwise_xor.reduce(t), 256 % 100])
    assert (l[0], f[0]) == (256 << 33, 128)


def test_bit_functions() -> None:
    x = np.random.default_rng(4).integers(1, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    x[:3] = 1, 0x80000000, 0xFFFFFFFF
    out = np.zeros((9, 64), np.uint32)
    launch("numbers.cu", "bits", x, out, block=64)
    for t in range(64):
        v, w = int(x[t]), int(x[63 - t])
        byte = [v & 255, v >> 8 & 255, w & 255, w >> 8 & 255]
        wanted = [
            32 - v.bit_length(), (v & -v).bit_length(), v.bit_count(), int(f"{v:032b}"[::-1], 2), v * w >> 32,
            byte[0] | byte[2] << 8 | byte[1] << 16 | byte[3] << 24, (v << 31) * (w << 30) >> 64 & 0xFFFFFFFF,
            ((w << 32 | v) << 5 >> 32) & 0xFFFFFFFF, v,
        ]  # fmt: skip
        assert out[:, t].tolist() == wanted, t


# ---- PTX -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bfloat", [False, True])
def test_mma_and_ldmatrix(bfloat: bool) -> None:
    dtype = np.dtype(ml_dtypes.bfloat16 if bfloat else np.float16)
    rng = np.random.default_rng(5)
    A, B = (rng.standard_normal(s).astype(np.float32).astype(dtype) for s in ((16, 16), (16, 8)))
    C = rng.standard_normal((16, 8)).astype(np.float32)
    wanted = A.astype(np.float64) @ B.astype(np.float64) + C
    launch("ptx.cu", f"multiply<{str(bfloat).lower()}>", A.view(np.uint16), B.view(np.uint16), C)
    np.testing.assert_allclose(C, wanted, rtol=1e-6, atol=1e-6)


def test_mma_tf32_drops_the_low_bits() -> None:
    rng = np.random.default_rng(6)
    A, B = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal((8, 8)).astype(np.float32)
    C = np.zeros((16, 8), np.float32)
    launch("ptx.cu", "multiply_tf32", A, B, C)
    short = [(m.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for m in (A, B)]
    np.testing.assert_allclose(C, short[0] @ short[1], rtol=1e-6, atol=1e-6)


def test_asynchronous_copies_arrive() -> None:
    x = floats(512)
    y = np.zeros_like(x)
    launch("ptx.cu", "copy_async_stages<true>", x, y, np.int32(4))
    np.testing.assert_array_equal(x, y)


def test_bulk_copies_through_mbarriers() -> None:
    x = floats(64 * 5)
    y = np.zeros_like(x)
    launch("ptx.cu", "pipeline<true>", x, y, np.int32(5), block=96)
    np.testing.assert_array_equal(y, x.reshape(-1, 2)[:, ::-1].ravel())


def test_grid_barrier_between_spinning_blocks() -> None:
    blocks, rounds = 20, 3
    arrived = np.zeros(2, np.uint32)
    x, y = np.zeros(blocks, np.int32), np.zeros(blocks * 64, np.int32)
    launch("ptx.cu", "grid_barrier", arrived, x, y, np.int32(rounds), grid=blocks, block=64)
    np.testing.assert_array_equal(y, np.full(blocks * 64, 1 + 2 + 3))
    with pytest.raises(KernelFault) as caught:  # a device that holds fewer blocks would hang
        launch(
            "ptx.cu", "grid_barrier", np.zeros(2, np.uint32), x, y, np.int32(1), grid=blocks, block=64, max_blocks=19
        )
    assert caught.value.kind == "deadlock"


FUNCTION = re.compile(
    r"^(?:template\s*<([^>]*)>\s*)?(?:__device__ __forceinline__|SIMT_FN|SIMT_TEMPLATE)\s+"
    r"[\w\s*&]+?\b(\w+)\(([^;{]*)\)\s*\{",
    re.M,
)


def functions(text: str) -> dict[str, set[tuple[str, ...]]]:
    """name -> parameter types of each overload, names and default arguments dropped."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for _, name, parameters in FUNCTION.findall(re.sub(r"//[^\n]*", "", text)):
        pieces = [p.split("=")[0].strip() for p in parameters.replace("SIMT_HERE", "").split(",") if p.strip()]
        types = tuple(
            re.sub(r"\s*\b\w+(?=\)|$|\[)", "", p, count=1).replace("unsigned int", "unsigned") for p in pieces
        )
        found.setdefault(name, set()).add(types)
    return found


def test_every_ptx_function_has_its_twin() -> None:
    real = functions("".join((CUDA_SRC / name).read_text() for name in ("ptx.cuh", "ptx_wgmma.cuh")))
    twins = functions((HERE / "include" / "simt_ptx.h").read_text())
    assert real, "no function found in ptx.cuh"
    for name, overloads in real.items():
        if name in NOT_EMULATED:
            assert name not in twins
            continue
        assert overloads <= twins.get(name, set()), f"ptx.cuh: {name}{sorted(overloads)} has no twin in simt_ptx.h"
    assert set(real) >= NOT_EMULATED
