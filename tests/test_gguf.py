"""The container of GGUF files: what is in one, and that nothing in a damaged or hostile one is believed."""

from __future__ import annotations

import mmap
import random
import struct
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuplama.errors import CheckpointError
from cuplama.gguf import GGUF, gguf_parts, held_open, is_gguf, open_gguf
from tests.gguf_files import Raw, Tensor, gguf_bytes, write_gguf

WEIGHT = np.arange(64, dtype=np.float32).reshape(2, 32)
TENSORS: dict[str, Tensor] = {
    "w": ("F32", (2, 32), WEIGHT),
    "q": ("Q8_0", (3, 64), np.arange(3 * 2 * 34, dtype=np.uint8)),
    "b": ("F16", (5,), np.arange(5, dtype=np.float16)),
}
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "n": 7,
    "x": 0.5,
    "yes": True,
    "words": ["a", "", "½"],
    "numbers": np.array([-1, 2], np.int32),
    "big": Raw(struct.pack("<Iq", 11, -5)),
}


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GGUF]:
    def write_and_open(content: bytes) -> GGUF:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return open_gguf(path)

    return write_and_open


@pytest.fixture
def refused(opened: Callable[[bytes], GGUF]) -> Callable[[bytes], str]:
    """The one line that opening such a file raises, without the file's path."""

    def failure(content: bytes) -> str:
        with pytest.raises(CheckpointError) as caught:
            opened(content)
        text = str(caught.value)
        assert "\n" not in text
        assert len(text) < 500
        assert "model.gguf" in text
        return text.partition("model.gguf")[2].lstrip(": ")

    return failure


@pytest.mark.parametrize("version", [2, 3])
def test_what_is_in_a_file(version: int, opened: Callable[[bytes], GGUF]) -> None:
    gguf = opened(gguf_bytes(METADATA, TENSORS, version))
    assert list(gguf.metadata) == list(METADATA)
    assert gguf.get("general.architecture", str) == "llama"
    assert (gguf.get("n", int), gguf.get("n", float), gguf.get("x", float)) == (7, 7.0, 0.5)
    assert gguf.get("yes", bool) is True
    assert gguf.get("words", list) == ["a", "", "½"]
    assert gguf.get("numbers", np.ndarray).tolist() == [-1, 2]
    assert gguf.get("big", int) == -5
    assert gguf.get("absent", int, 3) == 3
    assert {name: (t.type.name, t.shape) for name, t in gguf.tensors.items()} == {
        name: (kind, tuple(shape)) for name, (kind, shape, _) in TENSORS.items()
    }
    for name, (_, _, content) in TENSORS.items():
        assert gguf.tensors[name].data.tobytes() == content.tobytes()


def test_tensors_are_views_of_the_mapped_file(opened: Callable[[bytes], GGUF]) -> None:
    base: Any = opened(gguf_bytes(METADATA, TENSORS)).tensors["w"].data
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap)


def test_a_value_of_another_type(opened: Callable[[bytes], GGUF]) -> None:
    gguf = opened(gguf_bytes(METADATA, {}))
    for key, kind, words in (
        ("n", str, "n is a whole number; it must be text"),
        ("x", int, "x is a number; it must be a whole number"),
        ("yes", int, "yes is true or false; it must be a whole number"),
        ("words", np.ndarray, "words is an array of strings; it must be an array of numbers"),
        ("numbers", (int, list), "numbers is an array of numbers; it must be a whole number or an array of strings"),
    ):
        with pytest.raises(CheckpointError, match=f"model.gguf: {words}"):
            gguf.get(key, kind)


def test_an_alignment_of_its_own(opened: Callable[[bytes], GGUF], refused: Callable[[bytes], str]) -> None:
    """The writer of these tests aligns to 32 bytes, which 8 divides."""
    gguf = opened(gguf_bytes({"general.alignment": 32, "pad": "x" * 9}, TENSORS))
    assert np.array_equal(gguf.tensors["w"].data.view(np.float32).reshape(2, 32), WEIGHT)
    for wrong in (0, 24, 0.5, "32", np.ones(65)):
        assert refused(gguf_bytes({"general.alignment": wrong}, {})).startswith("general.alignment is ")


def head(tensors: int = 0, keys: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def name(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def entry(title: bytes = b"w", dims: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    return name(title) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE = 2**63
DAMAGED = [
    (b"", "is no GGUF file: it is empty"),
    (b"GGML" + bytes(100), "is no GGUF file: it does not begin with the letters GGUF"),
    (b"<!DOCTYPE html>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
    (head(version=1), "version is 1; supported: 2, 3"),
    (head(version=4), "version is 4; supported: 2, 3"),
    (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "version is 3 in big endian; supported: little endian"),
    (head(tensors=HUGE), f"tensor count is {HUGE:,}, which does not fit into the"),
    (head(keys=HUGE), f"key count is {HUGE:,}, which does not fit"),
    (head(keys=1, rest=struct.pack("<Q", HUGE) + bytes(50)), f"key 0: length is {HUGE:,}"),
    (head(keys=1, rest=name(b"k" * 70000) + bytes(50)), "key 0 has 70,000 bytes; at most 65,535"),
    (head(keys=1, rest=name(b"\xff\xfe") + bytes(50)), "key 0 is not UTF-8"),
    (head(keys=1, rest=name(b"k") + struct.pack("<IQ", 13, 0)), "k has a value of type 13; known are 0 to 12"),
    (head(keys=1, rest=name(b"k") + struct.pack("<IQ", 8, HUGE)), f"k: length is {HUGE:,}"),
    (head(keys=1, rest=name(b"k") + struct.pack("<IIQ", 9, 8, HUGE)), f"k: length is {HUGE:,}"),
    (head(keys=1, rest=name(b"k") + struct.pack("<IIQ", 9, 6, HUGE)), f"k: length is {HUGE:,}"),
    (head(keys=1, rest=name(b"k") + struct.pack("<IIQ", 9, 9, 0)), "k is an array of type 9; supported are"),
    (head(keys=1, rest=name(b"k") + struct.pack("<IIQQ", 9, 8, 1, HUGE)), r"k[0] goes beyond the end of the file"),
    (head(keys=2, rest=2 * (name(b"k") + struct.pack("<IB", 0, 1))), "'k' is there twice"),
    (head(1, rest=entry(dims=())), "tensor 'w' has 0 dimensions; supported: 1 to 4"),
    (head(1, rest=entry(dims=(1,) * 5)), "tensor 'w' has 5 dimensions; supported: 1 to 4"),
    (head(1, rest=entry(kind=99)), "tensor 'w' has a type that is not known, number 99"),
    (head(1, rest=entry(dims=(32, 0))), "tensor 'w' has shape [0, 32], which is empty"),
    (
        head(1, rest=entry(dims=(33, 2), kind=8)),
        "tensor 'w' has rows of 33 elements, not a multiple of the 32 of a block",
    ),
    (head(1, rest=entry(dims=(128, 2), kind=12)), "not a multiple of the 256 of a block of Q4_K"),
    (head(1, rest=entry(offset=7)), "tensor 'w' begins at offset 7, not a multiple of the alignment 32"),
    (head(1, rest=entry(offset=HUGE)), "tensor 'w' has 256 bytes, but the file has 0 from its place on"),
    (head(1, rest=entry(dims=(HUGE, HUGE, HUGE, 2))), "from its place on; it is cut off or corrupt"),
    (head(1, rest=entry()), "tensor 'w' has 256 bytes, but the file has 0 from its place on"),
    (head(2, rest=2 * entry() + bytes(400)), "tensor 'w' is there twice"),
    (head(1, rest=struct.pack("<Q", HUGE) + bytes(64)), f"name of tensor 0: length is {HUGE:,}"),
]


@pytest.mark.parametrize(("content", "words"), DAMAGED, ids=[words[:40] for _, words in DAMAGED])
def test_a_damaged_file(content: bytes, words: str, refused: Callable[[bytes], str]) -> None:
    assert words in refused(content)


def test_strings_that_are_not_utf8(opened: Callable[[bytes], GGUF]) -> None:
    gguf = opened(gguf_bytes({"words": [b"good", b"\xff"]}, {}))
    with pytest.raises(CheckpointError, match=r"model\.gguf: words\[1\] is not UTF-8"):
        gguf.get("words", list)


def readable(opened: Callable[[bytes], GGUF], content: bytes) -> bool:
    """Whether a file opens. A damaged one may: where a weight or a text was changed. Nothing but CheckpointError."""
    try:
        gguf = opened(content)
        for value in gguf.metadata.values():
            if hasattr(value, "values"):
                assert isinstance(value.values, list)
    except CheckpointError:
        return False
    return True


def test_truncated_anywhere(opened: Callable[[bytes], GGUF]) -> None:
    whole = gguf_bytes(METADATA, TENSORS)
    assert readable(opened, whole)
    assert [n for n in range(len(whole)) if readable(opened, whole[:n])] == []


def test_flipped_bytes_never_crash_or_allocate(opened: Callable[[bytes], GGUF]) -> None:
    whole, rng = gguf_bytes(METADATA, TENSORS), random.Random(0)
    tracemalloc.start()
    failed = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(len(content) - 500)] = rng.randrange(256)
        failed += not readable(opened, bytes(content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 50 < failed < 400
    assert peak < 4e6


# ---- split files -----------------------------------------------------------------------------------------------------
def split(folder: Path, count: int = 3, **wrong: Any) -> list[Path]:
    """A model of that many files, a tensor each. wrong: keys of the last one."""
    found = []
    for i, path in enumerate(gguf_parts(folder / f"m-00001-of-{count:05}.gguf")):
        keys = {"split.no": i, "split.count": count, "split.tensors.count": count}
        keys |= {key.replace("__", "."): value for key, value in (wrong if i == count - 1 else {}).items()}
        tensors: dict[str, Tensor] = {f"t{i}": ("F32", (2,), np.full(2, i, np.float32))}
        found.append(write_gguf(path, {**keys, **({"n": 5} if i == 0 else {})}, tensors))
    return found


def test_any_file_of_a_split_model_finds_all(tmp_path: Path) -> None:
    for path in split(tmp_path):
        gguf = open_gguf(path)
        assert gguf.path.name == "m-00001-of-00003.gguf"
        assert gguf.get("n", int) == 5
        assert [t.data.view(np.float32)[0] for t in gguf.tensors.values()] == [0, 1, 2]


def test_a_file_of_a_split_model_is_missing(tmp_path: Path) -> None:
    first, second, third = split(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match="is one of 3 files of a model; missing beside it: m-00002-of-00003"):
        open_gguf(third)
    third.unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf, m-00003-of-00003\.gguf"):
        open_gguf(first)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"split__no": 0}, r"m-00003-of-00003\.gguf: split\.no is 0, but by the file's name it must be 2"),
        ({"split__count": 4}, r"m-00003-of-00003\.gguf: split\.count is 4, but by the file's name it must be 3"),
        ({"split__count": 0}, r"m-00003-of-00003\.gguf: split\.count is 0, but by the file's name it must be 3"),
        ({"split__no": 2.0}, r"m-00003-of-00003\.gguf: split\.no is a number; it must be a whole number"),
        ({"split__no": np.ones(65)}, r"m-00003-of-00003\.gguf: split\.no is an array of numbers; it must be a whole n"),
    ],
)
def test_split_files_that_do_not_belong_together(wrong: dict[str, Any], words: str, tmp_path: Path) -> None:
    split(tmp_path, **wrong)
    with pytest.raises(CheckpointError, match=words):
        open_gguf(tmp_path / "m-00001-of-00003.gguf")


def test_a_tensor_of_a_split_model_is_lost_or_twice(tmp_path: Path) -> None:
    paths = split(tmp_path)
    write_gguf(paths[2], {"split.no": 2, "split.count": 3}, {})
    with pytest.raises(CheckpointError, match=r"split\.tensors\.count is 3, but the files have 2 tensors"):
        open_gguf(paths[0])
    write_gguf(paths[2], {"split.no": 2, "split.count": 3}, {"t0": ("F32", (2,), np.zeros(2, np.float32))})
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf: tensor t0 is in m-00001-of-00003\.gguf, too"):
        open_gguf(paths[0])


def test_a_model_that_was_merged_again(tmp_path: Path) -> None:
    """As gguf-split --merge writes it: one file, whose count is 0."""
    keys = {"split.no": 0, "split.count": 0, "split.tensors.count": 1}
    path = write_gguf(tmp_path / "merged.gguf", keys, {"t": ("F32", (2,), np.zeros(2, np.float32))})
    assert list(open_gguf(path).tensors) == ["t"]
    for wrong in (2, np.ones(3, np.int32)):
        write_gguf(path, {**keys, "split.tensors.count": wrong}, {"t": ("F32", (2,), np.zeros(2, np.float32))})
        with pytest.raises(CheckpointError, match=r"merged\.gguf: split\.tensors\.count is (2, but|an array of num)"):
            open_gguf(path)


def test_one_file_of_several_under_another_name(tmp_path: Path) -> None:
    part = split(tmp_path)[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"renamed\.gguf: split\.count is 3, but by the file's name it must be 1"):
        open_gguf(part)


def test_a_file_that_is_held_open_is_read_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"n": 5}, {"w": TENSORS["w"]})
    with held_open(path):
        first = open_gguf(path)
        assert open_gguf(path) is first
        other = write_gguf(tmp_path / "other.gguf", {"n": 6, "more": 1}, {"w": TENSORS["w"]})
        other.replace(path)
        assert open_gguf(path).get("n", int) == 6  # another file by now
    gone = weakref.ref(first)
    del first
    assert gone() is None
    with held_open(tmp_path):  # a folder is no such file
        pass
    path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="cut off"), held_open(path):
        pass


def test_what_is_a_gguf_file(tmp_path: Path) -> None:
    blob, other = write_gguf(tmp_path / "sha256-0123", {}), tmp_path / "x.bin"
    other.write_bytes(b"x")
    (tmp_path / "folder.gguf").mkdir()
    assert is_gguf(blob)
    assert not any(map(is_gguf, (other, tmp_path / "folder.gguf", tmp_path / "absent.gguf")))
    with pytest.raises(CheckpointError, match=r"absent\.gguf does not exist"):
        open_gguf(tmp_path / "absent.gguf")
