"""Runs the project's CUDA kernels on the CPU, with CUDA's execution model, and finds their faults.

``run(launch)`` compiles the launch's ``.cu`` file, unchanged, with g++ against the headers in ``include/``, and runs
one fiber per CUDA thread (``runtime.cpp``). ``README.md`` describes the model and its limits.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..folders import source_folder

__all__ = ["NOT_EMULATED", "KernelFault", "precompile", "run"]

HERE = Path(__file__).resolve().parent
CUDA_SRC = source_folder()
GUARD = 4096  # bytes between arrays; their base is a multiple of 256, as on the device
# Functions of ptx.cuh without a twin in include/simt_ptx.h; kernels that call them cannot run here.
NOT_EMULATED: frozenset[str] = frozenset()
STACK_BYTES = 128 << 10
COMPILE = ("-std=c++17", "-w", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-gnu-unique",
           "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno", "-fno-ipa-reference", "-fno-stack-protector",
           "-U_FORTIFY_SOURCE", "-g", "-gdwarf-4")  # fmt: skip
CHECKED = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "--param=tsan-distinguish-volatile=1",
           "-fsanitize=undefined", "-fno-sanitize=vptr,object-size", "-fno-sanitize-recover=all")  # fmt: skip


class KernelFault(Exception):  # noqa: N818 - it is the kernel's fault that is reported
    """A fault of a kernel. The first line names its kind, the kernel, block, thread and source line."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class LaunchLike(Protocol):
    """What ``run`` reads of a ``cuplama.kernel.BoundLaunch``."""

    @property
    def file(self) -> str: ...
    @property
    def expression(self) -> str: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def block(self) -> tuple[int, int, int]: ...
    @property
    def shared(self) -> int: ...
    @property
    def args(self) -> tuple[Any, ...]: ...


# ---- the structures of runtime.cpp ---------------------------------------------------------------------------------
class _Region(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("argument", ctypes.c_uint32),
    )


class _Variable(ctypes.Structure):
    _fields_ = (("low", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("name", ctypes.c_char_p))


class _Parameter(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_char), ("flags", ctypes.c_uint8), ("bytes", ctypes.c_uint16))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint64),
        ("regions", ctypes.c_void_p),
        ("region_count", ctypes.c_uint64),
        ("variables", ctypes.c_void_p),
        ("variable_count", ctypes.c_uint64),
        ("argument_names", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("stack_bytes", ctypes.c_uint64),
        ("max_blocks", ctypes.c_uint64),
        ("timeout", ctypes.c_double),
        ("check", ctypes.c_uint32),
        ("race_check", ctypes.c_uint32),
        ("report", ctypes.c_char_p),
        ("report_bytes", ctypes.c_uint64),
    )


# ---- compilation ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Build:
    """What decides an object: source file, -D macros, architecture, and whether it is for a debugger (-O0)."""

    path: Path
    arch: int
    defines: tuple[str, ...]
    debug: bool

    def flags(self) -> list[str]:
        macros = [f"-D{d}" for d in (f"__CUDA_ARCH__={self.arch * 10}", *self.defines)]
        return [*COMPILE, *CHECKED, "-O0" if self.debug else "-O1", *macros]


def cache_folder() -> Path:
    """Where objects are kept: ``cuplama/simt`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "cuplama" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sources(path: Path) -> list[Path]:
    ours = [HERE / "runtime.cpp", Path(__file__), *sorted((HERE / "include").iterdir())]
    return [*ours, *sorted(path.parent.glob("*.cuh")), path]


@lru_cache(maxsize=4096)
def _digest(path: Path, mtime_ns: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _key(build: _Build) -> str:
    """Hash of everything that an object of this file depends on."""
    parts = [_digest(p, s.st_mtime_ns, s.st_size) for p in _sources(build.path) for s in (p.stat(),)]
    text = "\n".join([*parts, str(build.path), *build.flags()])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _command(command: Sequence[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KernelFault("compile-error", f"compile-error: {what}\n{done.stderr.strip()}")
    return done.stdout


def _atomic(path: Path, make: Any) -> Path:
    """Calls make(temporary path) and renames, so that two processes can build the same object."""
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            make(temporary)
            temporary.replace(path)
    return path


def _runtime() -> Path:
    source = HERE / "runtime.cpp"
    key = hashlib.sha256(source.read_bytes() + (HERE / "include" / "simt_abi.h").read_bytes()).hexdigest()[:24]
    flags = [
        "-std=c++17",
        "-O2",
        "-g1",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-rtti",
        "-fno-threadsafe-statics",
        "-Wall",
        "-Wextra",
    ]

    def make(out: Path) -> None:
        _command(["g++", *flags, "-c", str(source), "-o", str(out)], "runtime.cpp")

    return _atomic(cache_folder() / f"runtime-{key}.o", make)


_COMMON = re.compile(r"^\t\.comm\t(_ZZ[\w.$]+),(\d+),(\d+)", re.M)
_ZEROS = re.compile(
    r"^(\t\.align \d+\n(?:\t\.type\t(_ZZ[\w.$]+), @object\n\t\.size\t\2, (\d+)\n)\2:\n\t\.zero\t\3\n)", re.M
)


def _separate_shared(assembly: str) -> tuple[str, dict[str, int]]:
    """Aligns each function-local static (that is what ``__shared__`` becomes) to 64 bytes and pads it by 64.

    Returns the new assembly text and the true sizes by symbol.
    """
    sizes: dict[str, int] = {}

    def common(m: re.Match[str]) -> str:
        sizes[m[1]] = int(m[2])
        return f"\t.comm\t{m[1]},{int(m[2]) + 64},{max(64, int(m[3]))}"

    def zeros(m: re.Match[str]) -> str:
        sizes[m[2]] = int(m[3])
        return "\t.balign 64\n" + m[1] + "\t.zero\t64\n"

    return _ZEROS.sub(zeros, _COMMON.sub(common, assembly)), sizes


def _compile(build: _Build, expressions: Sequence[str]) -> None:
    """Builds one object for the expressions and enters each in the cache's index."""
    key = _key(build)
    name = hashlib.sha256("\n".join([key, *expressions]).encode()).hexdigest()[:24]
    include = ["-I", str(HERE / "include"), "-I", str(build.path.parent), "-include", str(HERE / "include" / "simt.h")]
    wrapper = f'#include "{build.path}"\n' + "".join(f"SIMT_KERNEL({i}, {e})\n" for i, e in enumerate(expressions))
    facts: dict[str, Any] = {}

    def make(out: Path) -> None:
        source, assembly = out.with_suffix(".cpp"), out.with_suffix(".s")
        source.write_text(wrapper)
        what = f"{build.path.name}: {expressions[0]}" + (f" and {len(expressions) - 1} more" if expressions[1:] else "")
        _command(["g++", *build.flags(), *include, "-S", str(source), "-o", str(assembly)], what)
        text, sizes = _separate_shared(assembly.read_text())
        assembly.write_text(text)
        _command(
            ["g++", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", str(assembly), str(_runtime()), "-lm", "-o", str(out)],
            what,
        )
        listing = _command(["nm", "--defined-only", str(out)], what)
        symbols = [line.split() for line in listing.splitlines()]
        addresses = {name: int(address, 16) for address, _, name in symbols}
        for _, kind, symbol in symbols:
            if re.match("_ZZ(?!NK?St)", symbol) and kind in "bBvVuw" and symbol not in sizes:
                raise KernelFault(
                    "compile-error", f"compile-error: {what}: shared variable {symbol} was not recognised"
                )
        names = _command(["c++filt", *sizes], what).splitlines() if sizes else []
        facts["anchor"] = addresses["simt_launch"]
        facts["variables"] = sorted(
            (addresses[s], n, d) for (s, n), d in zip(sizes.items(), names, strict=True) if s in addresses
        )
        out.with_suffix(".json").write_text(json.dumps(facts))
        out.with_suffix(".json").replace(cache_folder() / f"{name}.json")

    _atomic(cache_folder() / f"{name}.so", make)
    for i, expression in enumerate(expressions):
        entry = cache_folder() / f"{_entry(key, expression)}.entry"
        temporary = entry.with_suffix(f".{os.getpid()}")
        temporary.write_text(f"{name} {i}")
        temporary.replace(entry)


def _entry(key: str, expression: str) -> str:
    return hashlib.sha256(f"{key}\n{expression}".encode()).hexdigest()[:24]


def _build(file: str, folder: Path | None, arch: int, defines: Sequence[str], debug: bool) -> _Build:
    return _Build(((folder or CUDA_SRC) / file).resolve(), arch, tuple(defines), debug)


def precompile(
    kernels: Iterable[tuple[str, str]],
    *,
    folder: Path | None = None,
    arch: int = 90,
    defines: Sequence[str] = (),
    jobs: int = 2,
) -> None:
    """Compiles (file, expression) pairs that are not cached, all expressions of a file in one g++ call.

    Worth it before a suite: g++'s start and the headers cost more than a kernel. Raises KernelFault of kind
    ``compile-error`` with g++'s messages.
    """
    missing: dict[str, list[str]] = {}
    for file, expression in dict.fromkeys(kernels):
        key = _key(_build(file, folder, arch, defines, False))
        if not (cache_folder() / f"{_entry(key, expression)}.entry").exists():
            missing.setdefault(file, []).append(expression)
    if missing:
        _runtime()
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda item: _compile(_build(item[0], folder, arch, defines, False), item[1]), missing.items()))


@dataclass(frozen=True)
class _Object:
    """A loaded kernel: its entry point, parameters (kind, flags, bytes) and the shared variables of its object.

    kind is p(ointer), f(loat), i(nt) or u(nsigned); of a pointer, flag 1 says const, 2 that it points to a plain
    number, and bytes is the size of what it points to.
    """

    path: Path
    launch: Any
    kernel: int
    parameters: tuple[tuple[str, int, int], ...]
    variables: Any
    base: int


@cache
def _load(name: str, number: int) -> _Object:
    path = cache_folder() / f"{name}.so"
    library = ctypes.CDLL(str(path))
    facts = json.loads(path.with_suffix(".json").read_text())
    anchor = ctypes.cast(library.simt_launch, ctypes.c_void_p).value or 0
    base = anchor - int(facts["anchor"])
    variables = (_Variable * len(facts["variables"]))(
        *[_Variable(base + a, n, d.encode()) for a, n, d in facts["variables"]]
    )
    describe = library[f"simt_describe_{number}"]
    found = (_Parameter * int(describe(None)))()
    describe(found)
    kernel = ctypes.cast(library[f"simt_kernel_{number}"], ctypes.c_void_p).value or 0
    parameters = tuple((p.kind.decode(), int(p.flags), int(p.bytes)) for p in found)
    return _Object(path, library.simt_launch, kernel, parameters, variables, base)


def _object(build: _Build, expression: str) -> _Object:
    entry = cache_folder() / f"{_entry(_key(build), expression)}.entry"
    if not entry.exists():
        _compile(build, [expression])
    name, number = entry.read_text().split()
    return _load(name, int(number))


# ---- arguments -----------------------------------------------------------------------------------------------------
@dataclass
class _Placed:
    """Arrays that share memory, copied together into device-like memory: 256-byte base, guard zones on both sides."""

    low: int
    high: int
    copy: np.ndarray[Any, np.dtype[np.uint8]]
    shift: int


def _extent(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    low = array.__array_interface__["data"][0]
    return low, low + array.nbytes


def _root(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _place(arrays: Sequence[np.ndarray[Any, Any]]) -> list[_Placed]:
    """Copies every group of overlapping arrays; a view keeps its offset from its base array modulo 256."""
    groups: list[tuple[int, int, int]] = []
    for array in sorted((a for a in arrays if a.nbytes), key=lambda a: _extent(a)):
        low, high = _extent(array)
        if groups and low < groups[-1][1]:
            groups[-1] = (groups[-1][0], max(high, groups[-1][1]), groups[-1][2])
        else:
            groups.append((low, high, (low - _extent(_root(array))[0]) % 256))
    placed = []
    for low, high, offset in groups:
        memory = np.full(high - low + 2 * GUARD + 512, 0xFF, np.uint8)
        start = memory.__array_interface__["data"][0]
        inner = (start + GUARD + 255) // 256 * 256 + offset - start
        copy = memory[inner : inner + high - low]
        ctypes.memmove(start + inner, low, high - low)
        placed.append(_Placed(low, high, copy, start + inner - low))
    return placed


def _no_null(value: Any) -> Any:
    """A null pointer is None, or a NumPy uintp of 0 as ``cuplama.kernel.bind`` makes it."""
    return None if isinstance(value, np.uintp) and np.ndim(value) == 0 and value == 0 else value


_KINDS = {"f": "f", "i": "i", "u": "ub"}


def _scalar(value: Any, parameter: tuple[str, int, int], name: str) -> bytes:
    kind, _, size = parameter
    scalar = np.asarray(value)
    if scalar.shape != () or scalar.dtype.kind not in _KINDS[kind] or scalar.dtype.itemsize != size:
        raise TypeError(f"argument '{name}': a scalar of kind '{kind}' and {size} bytes is needed, not {scalar.dtype}")
    return scalar.tobytes()


def run(
    launch: LaunchLike,
    *,
    check: bool = True,
    race_check: bool = True,
    folder: Path | None = None,
    arch: int = 90,
    defines: Sequence[str] = (),
    seed: int = 0,
    timeout: float = 60.0,
    max_blocks: int = 1024,
    debug: bool | None = None,
) -> None:
    """Executes a launch on the CPU; arrays are changed in place.

    launch: ``cuplama.kernel.BoundLaunch``, or anything with its fields. Arrays are C-contiguous; ``None`` is a null
    pointer. check: verify every memory access (False: about 3 times faster, finds only deadlocks, divergence, undefined
    behaviour and crashes). race_check: report shared-memory races. folder: where ``launch.file`` is, ``cuda_src/`` if
    None. arch: ``__CUDA_ARCH__`` / 10. defines: ``NAME=VALUE`` macros. seed: 0 starts threads in order, another number
    in a random order. timeout: seconds (0: none). max_blocks: blocks that may be alive at once. debug: compile
    with -O0 for gdb; None: if the environment has SIMT_DEBUG=1.

    Raises KernelFault; its first line is ``kind: expression: block, thread: file:line``. Raises TypeError for arguments
    that do not fit the kernel's parameters.
    """
    if debug is None:
        debug = os.environ.get("SIMT_DEBUG", "0") == "1"
    build = _build(launch.file, folder, arch, defines, debug)
    kernel = _object(build, launch.expression)
    prototype = getattr(launch, "prototype", None)
    names = (
        [p.name for p in prototype.parameters] if prototype is not None else [f"#{i}" for i in range(len(launch.args))]
    )
    if len(launch.args) != len(kernel.parameters):
        raise TypeError(
            f"{launch.expression} has {len(kernel.parameters)} parameters, but got {len(launch.args)} arguments"
        )
    threads = int(np.prod(launch.block))
    if not 1 <= threads <= 1024 or min(launch.grid) < 1 or launch.shared < 0 or launch.shared > 232448:
        raise TypeError(
            f"{launch.expression}: cannot launch grid {launch.grid}, block {launch.block}, shared {launch.shared}"
        )

    args = [_no_null(a) for a in launch.args]
    arrays = [(i, a) for i, a in enumerate(args) if kernel.parameters[i][0] == "p" and a is not None]
    for i, array in arrays:
        if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
            raise TypeError(f"argument '{names[i]}': a C-contiguous NumPy array is needed, not {type(array).__name__}")
        size, exact = kernel.parameters[i][2], kernel.parameters[i][1] & 2
        if size != 1 and (
            size != array.dtype.itemsize if exact else size % array.dtype.itemsize
        ):  # float4* over floats
            raise TypeError(f"argument '{names[i]}': elements of {size} bytes are needed, not {array.dtype}")
    placed = _place([a for _, a in arrays])

    def location(array: np.ndarray[Any, Any]) -> int:
        low, _ = _extent(array)
        group = next((g for g in placed if g.low <= low < g.high), None)
        return low + group.shift if group else 0x1000  # an empty array: any access faults

    values: list[bytes] = []
    regions: list[_Region] = []
    for i, (value, parameter) in enumerate(zip(args, kernel.parameters, strict=True)):
        if parameter[0] != "p":
            values.append(_scalar(value, parameter, names[i]))
            continue
        address = 0 if value is None else location(value)
        values.append(int(address).to_bytes(8, "little"))
        if value is not None and value.nbytes:
            regions.append(_Region(address, address + value.nbytes, int(not parameter[1] & 1), i))
    written = [i for i, a in arrays if not kernel.parameters[i][1] & 1]

    buffers = [ctypes.create_string_buffer(v, max(8, len(v))) for v in values]
    pointers = (ctypes.c_void_p * max(1, len(buffers)))(*[ctypes.addressof(b) for b in buffers])
    # A writable region comes first, so that an array that is passed as const as well can be written.
    table = (_Region * max(1, len(regions)))(*sorted(regions, key=lambda r: -r.writable))
    labels = (ctypes.c_char_p * max(1, len(names)))(*[n.encode() for n in names])
    report = ctypes.create_string_buffer(1 << 16)
    shared_count = len(kernel.variables)
    request = _Launch(
        kernel=kernel.kernel,
        args=ctypes.cast(pointers, ctypes.c_void_p),
        grid=launch.grid,
        block=launch.block,
        dynamic_shared=launch.shared,
        regions=ctypes.cast(table, ctypes.c_void_p),
        region_count=len(regions),
        variables=ctypes.cast(kernel.variables, ctypes.c_void_p) if shared_count else None,
        variable_count=shared_count,
        argument_names=ctypes.cast(labels, ctypes.c_void_p),
        seed=seed,
        stack_bytes=STACK_BYTES,
        max_blocks=max_blocks,
        timeout=0.0 if debug else timeout,
        check=int(check),
        race_check=int(race_check),
        report=ctypes.cast(report, ctypes.c_char_p),
        report_bytes=len(report),
    )
    failed = kernel.launch(ctypes.byref(request))
    for i in written:
        array = args[i]
        if array.nbytes:
            ctypes.memmove(_extent(array)[0], location(array), array.nbytes)
    if failed:
        raise _fault(kernel, launch, report.value.decode(errors="replace"))


# ---- reports -------------------------------------------------------------------------------------------------------
def _line(kernel: _Object, pc: int) -> str:
    """file:line of a code address: the innermost inlined frame that is not in the emulator's own headers."""
    output = subprocess.run(
        ["addr2line", "-i", "-e", str(kernel.path), hex(pc - kernel.base)], capture_output=True, text=True, check=False
    ).stdout
    frames = [re.sub(r" \(discriminator \d+\)", "", f) for f in output.split("\n") if f]
    mine = [f for f in frames if not f.startswith(f"{HERE}/include/")] or frames or ["?:0"]
    return _short(mine[0])


def _short(where: str) -> str:
    """Paths relative to the checkout."""
    path, _, line = where.rpartition(":")
    resolved = Path(os.path.normpath(path))
    root = HERE.parents[1]
    return f"{resolved.relative_to(root)}:{line}" if resolved.is_relative_to(root) else f"{resolved}:{line}"


def _fault(kernel: _Object, launch: LaunchLike, report: str) -> KernelFault:
    resolved = re.sub(r"\{pc:([0-9a-f]+)\}", lambda m: _line(kernel, int(m[1], 16)), report)
    resolved = re.sub(r"(/[^\s:]+:\d+)", lambda m: _short(m[1]), resolved)
    kind, block, thread, where, detail = resolved.split("\x1f", 4)
    return KernelFault(kind, f"{kind}: {launch.expression}: block {block}, thread {thread}: {where}\n{detail}")
