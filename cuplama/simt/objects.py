"""Kernels as shared objects: compiled by g++, kept in a cache by the content of their sources, loaded with ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from ..folders import source_folder
from .cache import cache_folder, locked, write
from .fault import KernelFault
from .structures import Parameter, Variable

__all__ = ["CUDA_SRC", "HERE", "Build", "LoadedKernel", "load", "precompile"]

HERE = Path(__file__).resolve().parent
_INCLUDE = HERE / "include"
CUDA_SRC = source_folder()
_COMPILE = ("-std=c++17", "-w", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-gnu-unique",
           "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno", "-fno-ipa-reference", "-fno-stack-protector",
           "-U_FORTIFY_SOURCE", "-gdwarf-4")  # fmt: skip
_CHECKED = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "--param=tsan-distinguish-volatile=1",
           "-fsanitize=undefined", "-fno-sanitize=vptr,object-size", "-fno-sanitize-recover=all")  # fmt: skip
# Lines are all that a report needs of the debug information: with -g1 g++ is a third faster than with -g.
_FAST, _DEBUG = ("-O1", "-g1"), ("-O0", "-g")
_RUNTIME = ("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-rtti", "-fno-threadsafe-statics", "-Wall",
           "-Wextra")  # fmt: skip
# Kernels that one g++ call compiles at most: its start costs 0.2 s, a kernel 0.1 to 1 s, and calls run side by side.
_MAX_KERNELS = 4


@dataclass(frozen=True)
class Build:
    """What decides an object: source file, architecture (90 for sm_90), -D macros, and whether it is for a debugger.

    named: whether reports call the file by its folder's name, ``cuda_src/norm.cu``, rather than by its whole path.
    top: the folder of the sources that it belongs to; its own if None.
    """

    path: Path
    arch: int
    defines: tuple[str, ...] = ()
    debug: bool = False
    named: bool = True
    top: Path | None = None

    @classmethod
    def of(cls, file: str, folder: Path | None, arch: int, defines: Sequence[str], debug: bool = False) -> Build:
        """folder: where the file is, ``cuda_src/`` if None. A file that is given by its whole path keeps it."""
        top, given = (folder or CUDA_SRC).resolve(), Path(file).is_absolute()
        path = (top / file).resolve()
        return cls(path, arch, tuple(defines), debug, named=not debug and not given, top=None if given else top)

    @property
    def folder(self) -> Path:
        """The folder of the sources: the one above ``ladder/`` for a file of that."""
        return self.top or self.path.parent

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where headers are looked for: beside the file, in the folder above ``ladder/``, and then in ``cuda_src/``."""
        return tuple(dict.fromkeys((self.path.parent, self.folder, CUDA_SRC)))

    def flags(self) -> list[str]:
        """g++'s flags, without the paths."""
        macros = [f"-D{d}" for d in (f"__CUDA_ARCH__={self.arch * 10}", *self.defines)]
        return [*_COMPILE, *_CHECKED, *(_DEBUG if self.debug else _FAST), *macros]

    def places(self) -> dict[Path, str]:
        """The folders of the sources, and what their files are called in reports wherever they lie.

        A debugger needs the files themselves.
        """
        if self.debug:
            return {}
        headers = [folder for folder in (self.folder, CUDA_SRC) if self.named or folder != self.path.parent]
        return {_INCLUDE: "simt/include", **{folder: folder.name for folder in headers}}

    def key(self) -> str:
        """Hash of everything that an object of this file depends on. Where the files lie is no part of it."""
        ours = [HERE / "runtime.cpp", Path(__file__), *sorted(_INCLUDE.iterdir())]
        sources = [*ours, *(header for folder in self.folders for header in sorted(folder.glob("*.cuh"))), self.path]
        parts = [f"{p.name} {_digest(p, s.st_mtime_ns, s.st_size)}" for p in sources for s in (p.stat(),)]
        place = f"{self.folder.name}/{self.path.relative_to(self.folder)}" if self.named else str(self.path)
        return _hash(*parts, place, *self.flags())


@lru_cache(maxsize=4096)
def _digest(path: Path, mtime_ns: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:24]


# ---- compilation ---------------------------------------------------------------------------------------------------
def _command(command: Sequence[str], what: str, folder: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode != 0:
        raise KernelFault("compile-error", f"compile-error: {what}\n{done.stderr.strip()}")
    return done.stdout


def _mapped(places: Mapping[Path, str]) -> list[str]:
    """Flags that have debug information and ``__FILE__`` say other names of folders."""
    return [f"-ffile-prefix-map={path}={name}" for path, name in places.items()]


def _runtime() -> Path:
    """The object of runtime.cpp, which every kernel is linked with."""
    source = HERE / "runtime.cpp"
    content = (source.read_text(), (_INCLUDE / "simt_abi.h").read_text())
    name = f"runtime-{_hash(*content, *_RUNTIME)}"
    path = cache_folder() / f"{name}.o"
    if not path.exists():
        with locked(name), tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            out = Path(folder) / path.name
            if not path.exists():
                mapped = _mapped({Path(folder): ".", HERE: "simt"})
                _command(["g++", *_RUNTIME, *mapped, "-c", str(source), "-o", str(out)], "runtime.cpp", Path(folder))
                out.replace(path)
    _touch(path)
    return path


# How g++ writes a function-local static into assembly text: without a value, and (next) as zeros in a section.
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


def _assemble(build: Build, expressions: Sequence[str], folder: Path, what: str) -> dict[str, int]:
    """Compiles the expressions to ``kernel.s`` in the folder; returns the sizes of the shared variables by symbol."""
    source, assembly = folder / "kernel.cpp", folder / "kernel.s"
    kernels = "".join(f"SIMT_KERNEL({i}, {e})\n" for i, e in enumerate(expressions))
    source.write_text(f'#include "{build.path}"\n{kernels}')
    folders = [word for folder in (_INCLUDE, *build.folders) for word in ("-I", str(folder))]
    include = [*folders, "-include", str(_INCLUDE / "simt.h")]
    mapped = _mapped({folder: ".", **build.places()})
    _command(["g++", *build.flags(), *mapped, *include, "-S", str(source), "-o", str(assembly)], what, folder)
    text, sizes = _separate_shared(assembly.read_text())
    for path, name in build.places().items():  # g++ does not map the names that UBSan's reports have
        text = text.replace(f'.string\t"{path}/', f'.string\t"{name}/')
    assembly.write_text(text)
    return sizes


def _compile(build: Build, expressions: Sequence[str]) -> None:
    """Builds one object for the expressions and enters each in the cache, with what ``load`` needs to know."""
    key = build.key()
    name = _hash(key, *expressions)
    with locked(name):
        if all(_found(_entry(key, e)) for e in expressions):  # by another process, while this one waited
            return
        what = f"{build.path.name}: {expressions[0]}" + (f" and {len(expressions) - 1} more" if expressions[1:] else "")
        with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
            folder = Path(temporary)
            sizes = _assemble(build, expressions, folder, what)
            out = folder / "kernel.so"
            link = ["g++", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", "kernel.s", str(_runtime()), "-lm"]
            _command([*link, "-o", "kernel.so"], what, folder)
            facts = _facts(out, sizes, what)
            out.replace(cache_folder() / f"{name}.so")
        for i, expression in enumerate(expressions):
            write(_entry(key, expression), json.dumps({"object": name, "number": i, **facts}))


def _facts(path: Path, sizes: dict[str, int], what: str) -> dict[str, Any]:
    """Where an object has its shared variables (address, bytes, name), and the address of ``simt_launch``."""
    symbols = [line.split() for line in _command(["nm", "--defined-only", str(path)], what).splitlines()]
    addresses = {name: int(address, 16) for address, _, name in symbols}
    for _, kind, symbol in symbols:
        if re.match("_ZZ(?!NK?St)", symbol) and kind in "bBvVuw" and symbol not in sizes:
            raise KernelFault("compile-error", f"compile-error: {what}: shared variable {symbol} was not recognised")
    names = _command(["c++filt", *sizes], what).splitlines() if sizes else []
    variables = sorted((addresses[s], n, d) for (s, n), d in zip(sizes.items(), names, strict=True) if s in addresses)
    return {"anchor": addresses["simt_launch"], "variables": variables}


def _entry(key: str, expression: str) -> Path:
    return cache_folder() / f"{_hash(key, expression)}.json"


def _found(entry: Path) -> dict[str, Any] | None:
    """What the cache knows of a kernel; None if it, or its object, is not there."""
    with suppress(FileNotFoundError):
        facts: dict[str, Any] = json.loads(entry.read_text())
        return facts if (cache_folder() / f"{facts['object']}.so").exists() else None
    return None


def precompile(
    kernels: Iterable[tuple[str, str]],
    *,
    folder: Path | None = None,
    arch: int = 90,
    defines: Sequence[str] = (),
    jobs: int | None = None,
) -> None:
    """Compiles (file, expression) pairs that are not cached, several of a file in one g++ call, ``jobs`` at a time.

    Worth it before a suite. jobs: one per CPU core if None. Raises KernelFault of kind ``compile-error`` with g++'s
    messages.
    """
    missing: dict[str, list[str]] = {}
    builds: dict[str, Build] = {}
    keys: dict[str, str] = {}
    for file, expression in dict.fromkeys(kernels):
        if file not in builds:
            builds[file] = Build.of(file, folder, arch, defines)
            keys[file] = builds[file].key()
        if _found(_entry(keys[file], expression)) is None:
            missing.setdefault(file, []).append(expression)
    if missing:
        _runtime()
    calls = [(builds[f], e[i : i + _MAX_KERNELS]) for f, e in missing.items() for i in range(0, len(e), _MAX_KERNELS)]
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        list(pool.map(lambda call: _compile(*call), calls))


# ---- loading -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LoadedKernel:
    """A loaded kernel: its entry point, parameters (kind, flags, bytes) and the shared variables of its object.

    kind is p(ointer), f(loat), i(nt) or u(nsigned); of a pointer, flag 1 says const, 2 that it points to a plain
    number, and bytes is the size of what it points to. base: where the object lies in memory.
    """

    path: Path
    launch: Any
    kernel: int
    parameters: tuple[tuple[str, int, int], ...]
    variables: Any
    base: int


def load(build: Build, expression: str) -> LoadedKernel:
    """A kernel, compiled if the cache does not have it. Raises KernelFault of kind ``compile-error``."""
    return _load(build.key(), build, expression)


@cache
def _load(key: str, build: Build, expression: str) -> LoadedKernel:
    entry = _entry(key, expression)
    facts = _found(entry)
    if facts is None:
        _compile(build, [expression])
        facts = json.loads(entry.read_text())
    path = cache_folder() / f"{facts['object']}.so"
    _touch(entry, path)
    library = ctypes.CDLL(str(path))
    anchor = ctypes.cast(library.simt_launch, ctypes.c_void_p).value or 0
    base = anchor - int(facts["anchor"])
    variables = (Variable * len(facts["variables"]))(
        *[Variable(base + a, n, d.encode()) for a, n, d in facts["variables"]]
    )
    describe = library[f"simt_describe_{facts['number']}"]
    found = (Parameter * int(describe(None)))()
    describe(found)
    kernel = ctypes.cast(library[f"simt_kernel_{facts['number']}"], ctypes.c_void_p).value or 0
    parameters = tuple((p.kind.decode(), int(p.flags), int(p.bytes)) for p in found)
    return LoadedKernel(path, library.simt_launch, kernel, parameters, variables, base)


def _touch(*paths: Path) -> None:
    """Remember that files of the cache are in use."""
    for path in paths:
        with suppress(FileNotFoundError):
            os.utime(path)
