"""The folder that a model is written to: nothing in it looks complete before it is.

While it is unfinished its weights have other names and there is no config.json; a record, ``quantize.json`` or
``merge.json``, says what is made of what, and how many parts are done, so that the same command goes on where another
was stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from ..files import read_json, writing
from ..models.checkpoint import INDEX
from .shards import Shard, index_of

__all__ = ["RECORD", "OutputFolder"]

RECORD = "quantize.json"
_UNFINISHED = ".unfinished"
_DTYPES = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32), "I64": np.dtype(np.int64), "F8_E4M3": np.dtype(np.uint8),
}  # fmt: skip


class OutputFolder:
    """Writes the tensors of a model, part by part.

    path: the folder; recipe: what is made of what, as JSON; record: the file that says so; done: parts that are
    written; finished: whether all of it is there.
    """

    def __init__(self, path: Path, recipe: Mapping[str, Any], shards: Sequence[Shard], record: str = RECORD) -> None:
        """Opens or makes the folder; nothing of the weights is written yet.

        Raises CheckpointError for a folder that holds anything else, or what another recipe made, and where the disk
        has no room. Every method raises CheckpointError naming a file that cannot be written.
        """
        self.path, self.recipe, self._shards = path, json.loads(json.dumps(recipe)), shards
        self.record = record
        self.done, self.finished = 0, False
        self._places = {name: place for shard in shards for name, place in shard.tensors.items()}
        with _writing(path):
            if not self._continues():
                self._check_room()
                path.mkdir(parents=True, exist_ok=True)
                self._record()
            self._open()

    def _continues(self) -> bool:
        """Whether the folder is there, and holds what this recipe has made so far."""
        try:
            names = set(os.listdir(self.path))
        except FileNotFoundError:
            return False
        except OSError as e:
            raise CheckpointError(f"{self.path}: {e.strerror}") from None
        if not names:
            return False
        if self.record not in names:
            raise CheckpointError(f"{self.path} is not empty")
        found = read_json(self.path / self.record)
        done, recipe = found.get("done"), found.get("recipe")
        if not isinstance(done, int) or not isinstance(recipe, dict):
            raise CheckpointError(f"{self.path / self.record} says neither a recipe nor what is done")
        other = [name for name in {**self.recipe, **recipe} if recipe.get(name) != self.recipe.get(name)]
        ours = {name for name in names if name == self.record or name.endswith(_UNFINISHED)}
        if other and not done and names == ours:  # nothing is lost
            for name in ours:
                (self.path / name).unlink()
            return False
        if other:
            words = ", ".join(f"{n} = {_shown(recipe.get(n))}, not {_shown(self.recipe.get(n))}" for n in other)
            raise CheckpointError(f"{self.path} holds a model, or a part of one, that was made with {words}")
        self.done, self.finished = done, found.get("finished") is True
        return True

    def _check_room(self) -> None:
        place = self.path
        while not place.exists():
            place = place.parent
        need, free = sum(s.size for s in self._shards), shutil.disk_usage(place).free
        if need > free:
            raise CheckpointError(f"{self.path}: the model takes {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")

    def _open(self) -> None:
        for shard in self._shards:
            file = self._file(shard.file)
            if file.exists() and file.stat().st_size == shard.size:
                continue
            if self.done:
                raise CheckpointError(
                    f"{file if not self.finished else self.path / shard.file} is missing or of another size, though"
                    f" {self.record} counts parts of it as done; delete the folder and start again"
                )
            with file.open("wb") as out:
                out.write(shard.head)
                out.truncate(shard.size)

    def _file(self, name: str) -> Path:
        """The file of a shard, by whichever of its names it has."""
        final = self.path / name
        return final if final.exists() else self.path / (name + _UNFINISHED)

    def _record(self) -> None:
        text = {"recipe": self.recipe, "done": self.done, "finished": self.finished}
        self._write_text(self.record, json.dumps(text, indent=2) + "\n")

    def _write_text(self, name: str, text: str) -> None:
        """A small file, all of it or nothing."""
        other = self.path / (name + _UNFINISHED)
        with other.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        other.replace(self.path / name)

    def write(self, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """One more part, which counts once all of it is on the disk."""
        with _writing(self.path):
            self._write(tensors)
            self.done += 1
            self._record()

    def _write(self, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
        files: dict[str, BinaryIO] = {}
        try:
            for name, array in tensors.items():
                place = self._places[name]
                if place.file not in files:
                    files[place.file] = self._file(place.file).open("r+b")
                assert array.nbytes == np.prod(place.spec.shape, dtype=np.int64) * _DTYPES[place.spec.dtype].itemsize
                files[place.file].seek(place.offset)
                files[place.file].write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        finally:
            for file in files.values():
                file.close()

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor that was written; 8-bit floats as their bytes."""
        place = self._places[name]
        dtype = _DTYPES[place.spec.dtype]
        count = int(np.prod(place.spec.shape, dtype=np.int64))
        found = np.fromfile(self._file(place.file), dtype, count, offset=place.offset)
        return found.reshape(place.spec.shape)

    def finish(self, config: Mapping[str, Any], copies: Sequence[tuple[Path, str]]) -> None:
        """Give the weights their names, and the folder the rest of a model. copies: (file, its name in the folder)."""
        with _writing(self.path):
            self._finish(config, copies)

    def _finish(self, config: Mapping[str, Any], copies: Sequence[tuple[Path, str]]) -> None:
        for source, name in copies:
            target = self.path / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
        for shard in self._shards:
            self._file(shard.file).replace(self.path / shard.file)
        index = index_of(self._shards)
        if index is not None:
            self._write_text(INDEX, json.dumps(index, indent=2) + "\n")
        self._write_text("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        self.finished = True
        self._record()


def _writing(path: Path) -> AbstractContextManager[None]:
    return writing(path, CheckpointError, "the same command goes on when there is room")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
