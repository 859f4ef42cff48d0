"""What compiling a kernel takes beside the compiler: options, headers, sources, architectures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cuplama.backends.cuda import toolkit
from cuplama.backends.cuda.toolkit import (
    ARCHS,
    options,
    parse_archs,
    shared_limit,
    source,
    source_hash,
    toolkit_folders,
    version,
)
from cuplama.errors import CompileError, DeviceError
from cuplama.folders import source_folder

# ---- options ---------------------------------------------------------------------------------------------------------


def test_the_options_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy appends -arch=sm_90, which knows no wgmma; ours stands before it, and NVRTC takes the first."""
    monkeypatch.setattr(toolkit, "toolkit_folders", lambda major: (Path(f"/cuda{major}"), Path("/cccl")))
    shared = ("-std=c++17", f"-I{source_folder()}", "-I/cuda12", "-I/cccl", f"-DCUPLAMA_SOURCE_HASH={source_hash()}")
    assert options(12, 90) == (*shared, "-arch=sm_90a")
    for arch in {*ARCHS, 0} - {90}:
        assert options(12, arch) == shared


# ---- headers ---------------------------------------------------------------------------------------------------------


def _put(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds the packages ``nvidia`` and ``cupy``, neither with anything in it."""

    def find(name: str) -> SimpleNamespace:
        return SimpleNamespace(submodule_search_locations=[str(tmp_path / name)])

    monkeypatch.setattr("importlib.util.find_spec", find)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    toolkit_folders.cache_clear()
    yield tmp_path
    toolkit_folders.cache_clear()


def _headers(folder: Path, version: int) -> Path:
    _put(folder / "cuda_fp16.h")
    _put(folder / "cuda_runtime_api.h", f"// the API\n#define CUDART_VERSION  {version}\n")
    return folder


def _libcu(folder: Path) -> Path:
    _put(folder / "nv" / "target")
    return folder


def test_the_wheels_of_cuda_12_are_found_with_their_libcu(place: Path) -> None:
    headers = _headers(place / "nvidia/cuda_runtime/include", 12090)
    libcu = _libcu(place / "nvidia/cuda_cccl/include")
    _libcu(place / "cupy/_core/include/cupy/_cccl/libcudacxx")
    assert toolkit_folders(12) == (headers, libcu)


def test_where_the_wheels_of_two_versions_are_installed_each_has_its_own(place: Path) -> None:
    old, new = _headers(place / "nvidia/cuda_runtime/include", 12090), _headers(place / "nvidia/cu13/include", 13000)
    libcu, bundled = (
        _libcu(place / f) for f in ("nvidia/cuda_cccl/include", "cupy/_core/include/cupy/_cccl/libcudacxx")
    )
    assert toolkit_folders(12) == (old, libcu)
    assert toolkit_folders(13) == (new, bundled)  # the libcu++ beside it is of CUDA 12
    _libcu(new / "cccl")
    toolkit_folders.cache_clear()
    assert toolkit_folders(13) == (new, new / "cccl")


def test_an_installed_toolkit_takes_no_libcu_of_the_wheels(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = _headers(place / "toolkit/include", 12040)
    monkeypatch.setenv("CUDA_PATH", str(place / "toolkit"))
    _libcu(place / "nvidia/cuda_cccl/include")
    assert toolkit_folders(12) == (headers,)
    toolkit_folders.cache_clear()
    wheel = _headers(place / "nvidia/cuda_runtime/include", 12090)
    assert toolkit_folders(12)[0] == wheel  # a wheel comes first: it was installed for this


def test_headers_that_are_not_whole_or_of_another_version_are_not_taken(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _headers(place / "toolkit/include", 98000)
    monkeypatch.setenv("CUDA_PATH", str(place / "toolkit"))
    assert toolkit_folders(97) == ()
    assert toolkit_folders(98) == (folder,)
    for spoil in (
        lambda: (folder / "cuda_fp16.h").unlink(),
        lambda: _headers(folder, 98000) and (folder / "cuda_runtime_api.h").write_text("// no version\n"),
        lambda: (folder / "cuda_runtime_api.h").unlink(),
    ):
        spoil()
        toolkit_folders.cache_clear()
        assert toolkit_folders(98) == ()
    with pytest.raises(CompileError, match=r"CUDA 98 headers .* are not installed; pip install .*cccl\]==98\.\*"):
        options(98)


def test_a_machine_without_the_packages_has_no_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    toolkit_folders.cache_clear()
    assert toolkit_folders(97) == ()
    toolkit_folders.cache_clear()


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_the_compiler_reports_lines_of_our_file() -> None:
    first, rest = source("residual.cu").split("\n", 1)
    assert first == '#line 1 "residual.cu"'
    assert rest == (source_folder() / "residual.cu").read_text(encoding="utf-8")


@pytest.mark.parametrize("changed", ["a.cu", "b.cuh", "ladder/c.cuh"])
@pytest.mark.parametrize("outside", [False, True])
def test_the_hash_covers_sources_headers_and_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, outside: bool
) -> None:
    """Of a source from elsewhere only what lies beside it counts: below it may lie a whole home folder."""

    def fresh() -> str:
        source_hash.cache_clear()
        return version(str(tmp_path / "a.cu")) if outside else source_hash()

    if not outside:
        monkeypatch.setattr(toolkit, "source_folder", lambda: tmp_path)
    (tmp_path / "a.cu").write_text("a")
    (tmp_path / "b.cuh").write_text("b")
    (tmp_path / "ladder").mkdir()
    (tmp_path / "ladder" / "c.cuh").write_text("d")
    hashes = [fresh()]
    (tmp_path / "notes.txt").write_text("n")
    assert fresh() == hashes[0]
    (tmp_path / changed).write_text("c")
    hashes.append(fresh())
    (tmp_path / changed).rename((tmp_path / changed).with_stem("other"))
    hashes.append(fresh())
    source_hash.cache_clear()
    assert len(set(hashes)) == (1 if outside and "/" in changed else 3)


def test_a_source_from_outside_may_include_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "toolkit_folders", lambda major: (Path(f"/cuda{major}"),))
    (tmp_path / "mine.cu").write_text("a")
    (tmp_path / "mine.cuh").write_text("b")
    before = options(12, 80, str(tmp_path / "mine.cu"))
    assert before[1:3] == (f"-I{tmp_path}", f"-I{source_folder()}")
    (tmp_path / "mine.cuh").write_text("c")
    assert options(12, 80, str(tmp_path / "mine.cu")) != before
    assert options(12, 80, "norm.cu") == options(12, 80)
    assert version("norm.cu") == version(str(source_folder() / "norm.cu")) == ""


# ---- architectures ---------------------------------------------------------------------------------------------------

# KB of shared memory that one block can have, from the CUDA C++ programming guide's technical specifications.
_KB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def test_every_supported_architecture_has_its_shared_memory() -> None:
    assert {arch: shared_limit(arch) for arch in ARCHS} == {arch: kb * 1024 for arch, kb in _KB.items()}


def test_an_unknown_architecture_has_as_much_as_the_smallest_since_ampere() -> None:
    assert shared_limit(87) == shared_limit(999) == 1024 * min(kb for arch, kb in _KB.items() if arch >= 80)


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("sm_80,sm_90", (80, 90)),
        ("80, 120", (80, 120)),
        (" all ", (75, 80, 86, 89, 90, 100, 120)),
        ("90,sm_90", (90,)),
        ("75", (75,)),
        ("sm_80,", (80,)),
    ],
)
def test_archs_are_read(text: str, archs: tuple[int, ...]) -> None:
    assert parse_archs(text) == archs


@pytest.mark.parametrize("text", ["sm_70", "ninety", "", "sm_9000"])
def test_an_unknown_arch_is_refused_by_name(text: str) -> None:
    with pytest.raises(DeviceError, match=text or "no architecture"):
        parse_archs(text, (70, 80, 90))


def test_what_is_supported_is_said() -> None:
    with pytest.raises(DeviceError, match=r"'sm_86' is not supported; supported: sm_80, sm_90$"):
        parse_archs("sm_80,sm_86", (70, 80, 90))
    with pytest.raises(DeviceError, match=r"supported: sm_75, sm_80, .*, sm_120$"):
        parse_archs("74")
