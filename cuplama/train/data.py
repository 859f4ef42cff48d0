"""The tokens of a data set, in files that are mapped into memory, and made only once for the same texts.

``NAME.tokens.bin`` holds the ids, uint16 or uint32 by the vocabulary, ``NAME.flags.bin`` a byte for each, whose bits
``documents`` names, and ``NAME.json`` what they were made of.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, PromptError
from ..files import is_missing, not_opened, read_json, writing
from ..text.tokenizer import Tokenizer
from .documents import BEGINS, LEARNED, Part, Stream, is_lines, read_documents
from .marks import Marks
from .saving import UNFINISHED

__all__ = ["TokenData", "check_files"]

_VERSION = 1  # of these files and of how documents are marked
_BLOCK = 1 << 22  # bytes that are hashed at a time
Progress = Callable[[int, int], None]  # (bytes that are read, bytes in all)


@dataclass(frozen=True, eq=False)
class TokenData:
    """A data set. tokens: ids [n]; flags: uint8 [n], bits of ``documents``; facts: what is in the JSON beside them;
    apart: whether the documents of a row do not see each other."""

    tokens: np.ndarray[Any, Any]
    flags: np.ndarray[Any, np.dtype[np.uint8]]
    facts: Mapping[str, Any]
    apart: bool = True

    @property
    def fingerprint(self) -> str:
        """Of texts, tokenizer and how documents are marked: the same for the same tokens."""
        return str(self.facts["fingerprint"])

    @property
    def targets(self) -> int:
        """Tokens whose prediction is learned. Nothing predicts the first."""
        return int(self.facts["learned"]) - bool(self.flags[0] & LEARNED)

    @classmethod
    def build(
        cls,
        paths: Sequence[Path],
        tokenizer: Tokenizer,
        folder: Path,
        marks: Marks,
        vocab_size: int,
        *,
        name: str = "train",
        fixed: bool = False,
        progress: Progress | None = None,
    ) -> TokenData:
        """The tokens of text files and JSON lines, made in ``folder`` unless they are there for the same texts.

        marks: of tokenizer and model; vocab_size: of the model; fixed: refuse texts that differ from those that the
        folder has tokens of; progress: called with (bytes read, bytes in all) where tokens are made.

        Raises PromptError naming file and line for what cannot be read, has no tokens, or tokens beyond the
        vocabulary, and CheckpointError for a disk that is full.
        """
        check_files(paths)
        sources = [_source(path) for path in paths]
        said = [[(s["bytes"], s["sha256"], s["lines"]) for s in sources], tokenizer.fingerprint()]
        settings = (marks.prefix, marks.bos, marks.eos, sorted(marks.stops), vocab_size)
        fingerprint = hashlib.sha256(repr((_VERSION, said, settings)).encode()).hexdigest()
        place = _Place(folder, name, vocab_size)
        before = {} if is_missing(place.facts) else read_json(place.facts, CheckpointError)
        if before and fixed and before.get("fingerprint") != fingerprint:
            raise CheckpointError(_changed(before, sources, place))
        if before.get("fingerprint") != fingerprint or not place.whole(before.get("tokens")):
            with writing(folder, CheckpointError, "give --out a folder with room for the tokens"):
                folder.mkdir(parents=True, exist_ok=True)
                counts = _write(place, paths, sources, tokenizer, Stream(marks), progress)
                facts = {"fingerprint": fingerprint, "dtype": place.dtype.name, **counts, "sources": sources}
                place.finish(facts)
        return place.open()


@dataclass(frozen=True)
class _Place:
    """The files of a data set."""

    folder: Path
    name: str
    vocab_size: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def facts(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def files(self) -> tuple[Path, Path]:
        return self.folder / f"{self.name}.tokens.bin", self.folder / f"{self.name}.flags.bin"

    def whole(self, tokens: Any) -> bool:
        """Whether the files have so many tokens."""
        sizes = (self.dtype.itemsize, 1)
        return isinstance(tokens, int) and all(
            not is_missing(file) and file.stat().st_size == tokens * size
            for file, size in zip(self.files, sizes, strict=True)
        )

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write what the tokens are, after them: without it they do not count."""
        other = self.facts.with_suffix(".json" + UNFINISHED)
        with other.open("w", encoding="utf-8") as file:
            file.write(json.dumps(facts, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        other.replace(self.facts)

    def open(self) -> TokenData:
        facts = read_json(self.facts, CheckpointError)
        return TokenData(np.memmap(self.files[0], self.dtype, "r"), np.memmap(self.files[1], np.uint8, "r"), facts)


def check_files(paths: Sequence[Path]) -> None:
    """Raises what ``TokenData.build`` would raise at once: for a file that is not there, or whose name is no data's."""
    for path in paths:
        is_lines(path)
        try:
            with path.open("rb") as file:
                empty = not file.read(1)
        except OSError as e:
            raise PromptError(not_opened(path, e)) from None
        if empty:
            raise PromptError(f"{path} is empty")


def _source(path: Path) -> dict[str, Any]:
    lines = is_lines(path)
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                size += len(block)
    except OSError as e:
        raise PromptError(not_opened(path, e)) from None
    return {"file": str(path), "bytes": size, "sha256": digest.hexdigest(), "lines": lines}


def _changed(before: Mapping[str, Any], sources: Sequence[Mapping[str, Any]], place: _Place) -> str:
    """The line for texts that are not those of the tokens that are there."""
    was = [(s.get("sha256"), s.get("file")) for s in before.get("sources", [])]
    if len(was) != len(sources):
        return f"{place.facts}: the training began with {len(was)} files of data, not {len(sources)}"
    for (digest, file), source in zip(was, sources, strict=True):
        if digest != source["sha256"]:
            return f"{source['file']} is not what the training began with ({file} as it was then)"
    return f"{place.facts}: the tokenizer, or what the model calls BOS and EOS, is not that of the training so far"


def _write(
    place: _Place,
    paths: Sequence[Path],
    sources: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    stream: Stream,
    progress: Progress | None,
) -> dict[str, int]:
    """Write the tokens of all files; how many there are, how many are learned, and of how many documents."""
    total, done = sum(s["bytes"] for s in sources), 0
    counts = dict(tokens=0, learned=0, documents=0)
    place.facts.unlink(missing_ok=True)
    others = [file.with_suffix(".bin" + UNFINISHED) for file in place.files]
    with others[0].open("wb") as tokens, others[1].open("wb") as flags:
        for path in paths:
            for part in read_documents(path, tokenizer, stream):
                _check(part, path, place.vocab_size, tokenizer)
                tokens.write(part.ids.astype(place.dtype).tobytes())
                flags.write(part.flags.tobytes())
                found = (len(part.ids), *(int(np.count_nonzero(part.flags & bit)) for bit in (LEARNED, BEGINS)))
                counts = {name: counts[name] + more for name, more in zip(counts, found, strict=True)}
                done += part.size
                if progress is not None:
                    progress(min(done, total - 1), total)
        for written in (tokens, flags):
            written.flush()
            os.fsync(written.fileno())
    if progress is not None:
        progress(total, total)
    if not counts["tokens"]:
        raise PromptError(f"{', '.join(map(str, paths))}: the data has no tokens")
    for other, file in zip(others, place.files, strict=True):
        other.replace(file)  # whoever has the old tokens mapped keeps them
    return counts


def _check(part: Part, path: Path, vocab_size: int, tokenizer: Tokenizer) -> None:
    if len(part.ids) and part.ids.max() >= vocab_size:
        worst = int(part.ids.max())
        raise PromptError(
            f"{path}: the tokenizer gives {tokenizer.token_shown(worst)} id {worst}, and the model's vocabulary has"
            f" {vocab_size} tokens"
        )
