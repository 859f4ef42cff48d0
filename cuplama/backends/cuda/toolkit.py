"""What compiling a kernel takes beside the compiler: sources, headers of the CUDA toolkit, options, architectures.

The CUDA backend, which compiles through CuPy on a GPU, and ``nvrtc.py``, which needs none, both take them from here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ...errors import CompileError, DeviceError
from ...folders import source_folder

__all__ = [
    "ARCHS",
    "options",
    "parse_archs",
    "shared_limit",
    "source",
    "source_hash",
    "target",
    "toolkit_folders",
    "version",
]

ARCHS = (75, 80, 86, 89, 90, 100, 120)  # what CI compiles every kernel for, as 90 for sm_90: Turing to Blackwell


@cache
def source_hash() -> str:
    """A hash over every source below ``cuda_src/``: CuPy's cache key does not see what a source includes."""
    return _hash(source_folder(), "**/*.cu*")


def _hash(folder: Path, pattern: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def version(file: str) -> str:
    """Tells versions of a source and of the headers beside it apart; empty for ours, which are taken as they are when
    the process first compiles one. file: a name in ``cuda_src/``, or the whole path of a source from elsewhere."""
    folder = Path(file).parent
    return _hash(folder, "*.cu*") if Path(file).is_absolute() and folder != source_folder() else ""


@cache
def toolkit_folders(major: int) -> tuple[Path, ...]:
    """The include folders of the CUDA toolkit of that major version: fp16/bf16 headers, then libcu++ (``nv/target``).

    Looks into the nvidia wheels, then CUDA_PATH, then /usr/local/cuda; CuPy brings a libcu++ of its own. Headers of
    another major version are skipped: a machine may have the wheels of two. Empty if there are none.
    """
    wheels = [f for root in _package("nvidia") for f in sorted(root.glob("*/include"))]
    systems = [Path(p) / "include" for p in (os.environ.get("CUDA_PATH"), "/usr/local/cuda") if p]
    bundled = [root / "_core/include/cupy/_cccl/libcudacxx" for root in _package("cupy")]
    for folder in (*wheels, *systems):
        header = folder / "cuda_runtime_api.h"
        if (folder / "cuda_fp16.h").is_file() and header.is_file():
            version = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
            if version and int(version[1]) // 1000 == major:
                nearby = wheels if folder in wheels and folder.parent.name != f"cu{major}" else []
                cccl = [f for f in (folder / "cccl", *nearby, *bundled) if (f / "nv" / "target").is_file()]
                return (folder, *cccl[:1])
    return ()


def _package(name: str) -> list[Path]:
    """The folders of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return [Path(p) for p in spec.submodule_search_locations or ()] if spec else []


def target(arch: int) -> str:
    """What follows ``sm_`` or ``compute_`` in the compiler's -arch.

    Hopper's warpgroup instructions (wgmma) are no part of sm_90, which later GPUs understand as well, but of sm_90a.
    """
    return "90a" if arch == 90 else str(arch)


def options(major: int, arch: int = 0, file: str = "") -> tuple[str, ...]:
    """The compiler options that the CUDA backend and compiling without a GPU share.

    major: of the NVRTC version. arch: 90 for sm_90, where CuPy's RawModule compiles: it appends an -arch of its own,
    without the "a" of sm_90a, and of two NVRTC takes the first. 0 where the caller gives -arch itself. file: what is
    compiled; a source from outside may include what lies beside it.

    Raises CompileError if the toolkit's headers are not installed.
    """
    folders = toolkit_folders(major)
    if not folders:
        raise CompileError(
            f"the CUDA {major} headers (cuda_fp16.h) are not installed; "
            f"pip install 'cuda-toolkit[cudart,cccl]=={major}.*'"
        )
    outside = version(file)
    return (
        "-std=c++17",
        *((f"-I{Path(file).parent}",) if outside else ()),
        f"-I{source_folder()}",
        *(f"-I{f}" for f in folders),
        f"-DCUPLAMA_SOURCE_HASH={source_hash()}{outside}",
        *((f"-arch=sm_{target(arch)}",) if target(arch) != str(arch) else ()),
    )


def source(file: str) -> str:
    """The text of ``cuda_src/<file>``, with its name in place, so that the compiler reports lines of our file."""
    return f'#line 1 "{file}"\n' + (source_folder() / file).read_text(encoding="utf-8")


def parse_archs(text: str, supported: Sequence[int] = ()) -> tuple[int, ...]:
    """``"sm_80,sm_90"`` or ``"80,90"`` or ``"all"`` -> (80, 90). Raises DeviceError naming the one it cannot read."""
    if text.strip() == "all":
        return ARCHS
    archs = []
    for name in filter(None, (n.strip() for n in text.split(","))):
        m = re.fullmatch(r"(?:sm_)?(\d{2,3})", name)
        if m is None or (supported and int(m[1]) not in supported) or int(m[1]) < ARCHS[0]:
            known = ", ".join(f"sm_{a}" for a in supported or ARCHS if a >= ARCHS[0])
            raise DeviceError(f"architecture {name!r} is not supported; supported: {known}")
        archs.append(int(m[1]))
    if not archs:
        raise DeviceError("no architecture given; for example: sm_80,sm_90")
    return tuple(dict.fromkeys(archs))


# Largest shared memory of a block that opts in, in bytes (CUDA C++ programming guide, technical specifications).
_SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


def shared_limit(arch: int) -> int:
    """Bytes of shared memory a block can have on an architecture; of unknown ones, the smallest since sm_80."""
    return _SHARED.get(arch, 101376)
