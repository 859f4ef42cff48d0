"""GGUF files: header, metadata and tensor table, memory-mapped. What the fields mean is decided elsewhere.

The layout is that of the format's description, versions 2 and 3 (ggml-org/ggml, docs/gguf.md). Nothing in a file is
believed: every count, length and offset is held against the bytes that are there before anything is made of it.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import numpy as np

from .errors import CheckpointError
from .files import not_opened, not_understood

__all__ = [
    "GGUF",
    "TENSOR_TYPES",
    "GGUFTensor",
    "Strings",
    "TensorType",
    "gguf_parts",
    "held_open",
    "is_gguf",
    "open_gguf",
]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4  # as in ggml
_MAX_KEY = 65535  # bytes, as the format says
_ALIGNMENT = 32  # bytes, where the file does not say
# What follows a value's type: 0 .. 12, little endian.
_SCALARS: Mapping[int, str] = {
    0: "u1",
    1: "i1",
    2: "u2",
    3: "i2",
    4: "u4",
    5: "i4",
    6: "f4",
    10: "u8",
    11: "i8",
    12: "f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class TensorType:
    """How a tensor's elements lie: ``block`` of them, neighbours in a row, in ``nbytes`` bytes."""

    name: str
    block: int
    nbytes: int


TENSOR_TYPES: Mapping[int, TensorType] = {
    number: TensorType(name, block, nbytes)
    for number, name, block, nbytes in (
        (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8), (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
    )
}  # fmt: skip
"""By the number that a file has for them."""


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor of a file.

    shape: rows first, so that the last axis is the one that lies together; data: uint8 [bytes], a view of the mapped
    file.
    """

    name: str
    file: Path
    type: TensorType
    shape: tuple[int, ...]
    data: np.ndarray[Any, Any]


class Strings:
    """An array of strings of a file, made into ``str`` when they are asked for. where: file and key, for errors."""

    def __init__(self, data: np.ndarray[Any, Any], start: int, end: int, where: str) -> None:
        self._data, self._start, self._end, self._where = data, start, end, where

    @cached_property
    def values(self) -> list[str]:
        """The strings. Raises CheckpointError for bytes that are not UTF-8."""
        data, at, found = self._data[self._start : self._end].tobytes(), 0, []
        unpack = struct.Struct("<Q").unpack_from
        try:
            while at < len(data):
                (size,) = unpack(data, at)
                found.append(data[at + 8 : at + 8 + size].decode())
                at += 8 + size
        except UnicodeDecodeError:
            raise CheckpointError(f"{self._where}[{len(found)}] is not UTF-8") from None
        return found


@dataclass(frozen=True, eq=False)
class GGUF:
    """A model's file or files. metadata: key -> bool, int, float, str, an array of numbers, or ``Strings``; tensors by
    name, in the order of the files."""

    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    @property
    def path(self) -> Path:
        """The file, or the first of several."""
        return self.files[0]

    def get(self, key: str, kind: type[Any] | tuple[type[Any], ...], default: Any = None) -> Any:
        """A value of the metadata, or the default of one that is not there.

        kind: bool, int, float (which takes whole numbers too), str, list (of strings) or np.ndarray (of numbers), or
        several of them. Raises CheckpointError for another one.
        """
        value = self.metadata.get(key)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        for wanted in kinds:
            if wanted is list and isinstance(value, Strings):
                return value.values
            if wanted is float and type(value) is int:
                return float(value)
            if type(value) is wanted:
                return value
        names = " or ".join(_KINDS[wanted] for wanted in kinds)
        has = _KINDS[list if isinstance(value, Strings) else type(value)]
        raise CheckpointError(f"{self.path}: {key} is {has}; it must be {names}")


_KINDS: Mapping[type[Any], str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "an array of strings",
    np.ndarray: "an array of numbers",
}


class _Header:
    """The bytes of one file up to its tensors' data, read in order. Every method raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        try:
            with path.open("rb") as file:
                head = file.read(len(_MAGIC))
            if head != _MAGIC:
                raise CheckpointError(
                    not_understood(path, "is no GGUF file", "it does not begin with the letters GGUF")
                )
            self.data: np.ndarray[Any, Any] = np.memmap(path, np.uint8, "r")
        except OSError as e:
            raise CheckpointError(not_opened(path, e)) from None
        self.bytes = memoryview(self.data)  # type: ignore[arg-type]
        self.size = len(self.data)

    def refuse(self, field: str, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {field} {problem}")

    def take(self, count: int, field: str) -> int:
        """Where ``count`` bytes begin, which are then behind."""
        if count > self.size - self.at:
            self.refuse(
                field, f"has {count:,} bytes, but {self.size - self.at:,} are left; the file is cut off or corrupt"
            )
        self.at += count
        return self.at - count

    def scalar(self, dtype: str, field: str) -> Any:
        at = self.take(int(dtype[1]), field)
        return np.frombuffer(self.bytes, f"<{dtype}", 1, at)[0].item()

    def count(self, field: str, least: int) -> int:
        """A number of things that take at least ``least`` bytes each."""
        found: int = self.scalar("u8", field)
        if found > (self.size - self.at) // least:
            left = f"{self.size - self.at:,} bytes that are left; the file is cut off or corrupt"
            self.refuse(field, f"is {found:,}, which does not fit into the {left}")
        return found

    def text(self, field: str, most: int | None = None) -> str:
        size = self.count(f"{field}: length", 1)
        if most is not None and size > most:
            self.refuse(field, f"has {size:,} bytes; at most {most:,} are allowed")
        at = self.take(size, field)
        try:
            return self.bytes[at : at + size].tobytes().decode()
        except UnicodeDecodeError:
            self.refuse(field, "is not UTF-8")

    def value(self, key: str) -> Any:
        kind = self.scalar("u4", f"{key}: type")
        if kind != _ARRAY:
            return self._single(kind, key)
        kind = self.scalar("u4", f"{key}: type of the elements")
        if kind == _STRING:
            return self._strings(key)
        dtype = _SCALARS.get(kind, "u1" if kind == _BOOL else None)
        if dtype is None:
            self.refuse(
                key, f"is an array of type {kind}; supported are arrays of numbers (0-7, 10-12) and strings (8)"
            )
        count = self.count(f"{key}: length", int(dtype[1]))
        at = self.take(count * int(dtype[1]), key)
        return np.frombuffer(self.bytes, f"<{dtype}", count, at)

    def _single(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], key)
        if kind == _BOOL:
            return self.scalar("u1", key) != 0
        if kind == _STRING:
            return self.text(key)
        self.refuse(key, f"has a value of type {kind}; known are 0 to 12")

    def _strings(self, key: str) -> Strings:
        count = self.count(f"{key}: length", 8)
        start, at, size, data = self.at, self.at, self.size, self.bytes
        unpack = struct.Struct("<Q").unpack_from
        for i in range(count):
            at += 8
            if at > size or (at := at + unpack(data, at - 8)[0]) > size:
                self.refuse(f"{key}[{i}]", "goes beyond the end of the file; the file is cut off or corrupt")
        self.at = at
        return Strings(self.data, start, at, f"{self.path}: {key}")


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name or by its first bytes."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """The files of the model that ``path`` is a file of: itself, or all that its name says it was split into."""
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        return (path,)
    count = int(split["count"])
    return tuple(path.with_name(f"{split['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1))


_held: WeakValueDictionary[tuple[Any, ...], GGUF] = WeakValueDictionary()


@contextmanager
def held_open(path: Path) -> Iterator[None]:
    """Inside, a GGUF file is read once, however often it is opened: a large vocabulary takes 60 ms each time. Any other
    path is left alone. Raises CheckpointError as ``open_gguf``."""
    gguf = open_gguf(path) if is_gguf(path) else None
    yield
    del gguf


def open_gguf(path: Path) -> GGUF:
    """Map a model's file, or all files of one that was split, whichever of them is named.

    Raises CheckpointError naming the file and the field that is missing, cut off, unknown, or lies.
    """
    parts = gguf_parts(path)
    try:
        key = tuple((part, s.st_ino, s.st_size, s.st_mtime_ns) for part in parts for s in (part.stat(),))
    except OSError:
        return _open(path, parts)  # which says what it is
    found = _held.get(key)
    if found is None:
        found = _held[key] = _open(path, parts)
    return found


def _open(path: Path, parts: Sequence[Path]) -> GGUF:
    if missing := [part.name for part in parts if not part.exists() and part != path]:
        names = f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        raise CheckpointError(f"{path} is one of {len(parts)} files of a model; missing beside it: {names}")
    metadata: dict[str, Any] = {}
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(parts):
        own, listed = _read(part)
        if number == 0:
            metadata = own
        for key, wanted in (("split.no", number), ("split.count", len(parts))):
            found = _whole(part, own, key, wanted)
            merged = found == 0 and len(parts) == 1  # gguf-split leaves a count of 0 when it puts files together
            if found != wanted and not merged:
                raise CheckpointError(f"{part}: {key} is {found}, but by the file's name it must be {wanted}")
        for name, tensor in listed.items():
            if name in tensors:
                raise CheckpointError(f"{part}: tensor {name} is in {tensors[name].file.name}, too")
            tensors[name] = tensor
    total = _whole(parts[0], metadata, "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(f"{parts[0]}: split.tensors.count is {total}, but the files have {len(tensors)} tensors")
    return GGUF(tuple(parts), metadata, tensors)


def _whole(path: Path, metadata: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number of the metadata."""
    return int(GGUF((path,), metadata, {}).get(key, int, default))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensors of one file."""
    header = _Header(path)
    header.at = len(_MAGIC)
    version = header.scalar("u4", "version")
    if version and version % 65536 == 0:
        header.refuse("version", f"is {version >> 24 or version >> 16} in big endian; supported: little endian")
    if version not in _VERSIONS:
        header.refuse("version", f"is {version}; supported: {', '.join(map(str, _VERSIONS))}")
    num_tensors = header.count("tensor count", 24)  # name's length, number of dimensions, type, offset
    num_keys = header.count("key count", 13)  # key's length, type, a value of one byte
    metadata: dict[str, Any] = {}
    for i in range(num_keys):
        key = header.text(f"key {i}", _MAX_KEY)
        if key in metadata:
            header.refuse(f"{key!r:.200}", "is there twice")
        metadata[key] = header.value(f"{key!r:.200}".strip("'"))
    alignment = _whole(path, metadata, "general.alignment", _ALIGNMENT)
    if alignment < 1 or alignment & (alignment - 1):
        header.refuse("general.alignment", f"is {alignment}; it must be a power of two")
    entries = [_entry(header, i) for i in range(num_tensors)]
    start = -(-header.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            header.refuse(f"tensor {name!r:.200}", "is there twice")
        tensors[name] = _tensor(header, name, shape, kind, start, offset, alignment)
    return metadata, tensors


def _entry(header: _Header, number: int) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type, offset) of a tensor. A file has the axis that lies together first."""
    name = header.text(f"name of tensor {number}", _MAX_KEY)
    field = f"tensor {name!r:.200}"
    dims = header.scalar("u4", f"{field}: number of dimensions")
    if not 1 <= dims <= _MAX_DIMS:
        header.refuse(field, f"has {dims} dimensions; supported: 1 to {_MAX_DIMS}")
    shape = tuple(header.scalar("u8", f"{field}: shape") for _ in range(dims))
    return name, shape[::-1], header.scalar("u4", f"{field}: type"), header.scalar("u8", f"{field}: offset")


def _tensor(
    header: _Header, name: str, shape: tuple[int, ...], kind: int, start: int, offset: int, alignment: int
) -> GGUFTensor:
    refuse: Callable[[str], NoReturn] = lambda problem: header.refuse(f"tensor {name!r:.200}", problem)  # noqa: E731
    known = TENSOR_TYPES.get(kind)
    if known is None:
        refuse(f"has a type that is not known, number {kind}")
    if 0 in shape:
        refuse(f"has shape {list(shape)}, which is empty")
    if shape[-1] % known.block:
        refuse(f"has rows of {shape[-1]} elements, not a multiple of the {known.block} of a block of {known.name}")
    if offset % alignment:
        refuse(f"begins at offset {offset}, not a multiple of the alignment {alignment}")
    nbytes = math.prod(shape) // known.block * known.nbytes
    if nbytes > header.size - start - offset:
        left = max(0, header.size - start - offset)
        refuse(f"has {nbytes:,} bytes, but the file has {left:,} from its place on; it is cut off or corrupt")
    begin = start + offset
    return GGUFTensor(name, header.path, known, shape, np.asarray(header.data[begin : begin + nbytes]))
