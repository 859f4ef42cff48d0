"""What the story model reads: the encoded corpora, cut into rows, batches and windows. Needs no torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from tools.story_model.runs import Run
from tools.story_model.tokenizer import END_OF_STORY_ID, encode

__all__ = ["Data", "Ids", "Offsets", "batches", "join", "rows", "story_texts", "windows"]

Ids = npt.NDArray[np.uint16]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Data:
    """What `prepare` wrote for one vocabulary: parts `main`, `extra`, `tales`, `held`, `val` as (ids, offsets)."""

    parts: Mapping[str, tuple[Ids, Offsets]]
    bytes: Mapping[str, int]
    tokenizer: Tokenizer
    main_text: Sequence[str]

    @classmethod
    def load(cls, folder: Path, vocab: int) -> Data:
        """Read what `prepare` wrote in a folder."""
        at = folder / f"vocab{vocab}"
        arrays = np.load(at / "data.npz")
        names = sorted({n.split("_")[0] for n in arrays.files})
        parts = {n: (arrays[f"{n}_ids"], arrays[f"{n}_offsets"]) for n in names}
        text = json.loads((folder / "main.json").read_text())
        tokenizer = Tokenizer.from_file(str(at / "tokenizer.json"))
        return cls(parts, json.loads((folder / "bytes.json").read_text()), tokenizer, text)

    def train(self, run: Run) -> tuple[Ids, Offsets]:
        """The parts that a run trains on, as one (ids, offsets)."""
        names = ["main", *(["extra"] if run.extra else []), *(["tales"] if run.tales else [])]
        return join([self.parts[n] for n in names])


def join(parts: Sequence[tuple[Ids, Offsets]]) -> tuple[Ids, Offsets]:
    """Several parts as one (ids, offsets)."""
    lengths = np.concatenate([np.diff(o) for _, o in parts])
    return np.concatenate([i for i, _ in parts]), np.concatenate([[0], np.cumsum(lengths)])


def rows(ids: Ids, offsets: Offsets, length: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """One epoch [n, length + 1]: the stories in a new order, cut into rows that begin anywhere.

    Every second row is moved to the next beginning of a story, so that its first token is the separator: the
    model sees both what generation gives it and what a window inside a long text gives it.
    """
    order = rng.permutation(len(offsets) - 1)
    stream = np.concatenate([[END_OF_STORY_ID], *(ids[offsets[i] : offsets[i + 1]] for i in order)]).astype(np.int32)
    starts = np.arange(rng.integers(length), len(stream) - 2 * length - 1, length)
    separators = np.flatnonzero(stream == END_OF_STORY_ID)
    moved = separators[np.searchsorted(separators, starts[::2])]
    starts[::2] = np.minimum(moved, len(stream) - length - 1)
    return stream[rng.permutation(starts)[:, None] + np.arange(length + 1)]


def batches(data: Data, run: Run, parts: tuple[Ids, Offsets]) -> Iterator[npt.NDArray[np.int32]]:
    """Endless batches [batch / context, context + 1]; under BPE dropout, half of the main stories are re-encoded."""
    rng = np.random.default_rng(run.seed)
    tokenizer = Tokenizer.from_str(data.tokenizer.to_str())
    if run.bpe_dropout:
        tokenizer.model.dropout = run.bpe_dropout
    n = run.batch // run.context

    def epoch() -> npt.NDArray[np.int32]:
        ids, offsets = parts
        if run.bpe_dropout:
            noisy = rng.permutation(len(data.main_text))[: len(data.main_text) // 2]
            keep = np.setdiff1d(np.arange(len(offsets) - 1), noisy)
            lengths = np.diff(offsets)[keep]
            kept = np.concatenate([ids[offsets[i] : offsets[i + 1]] for i in keep])
            again = encode(tokenizer, [data.main_text[i] for i in noisy])
            ids, offsets = join([(kept, np.concatenate([[0], np.cumsum(lengths)])), again])
        return rows(ids, offsets, run.context, rng)

    with ThreadPoolExecutor(1) as pool:  # the next epoch is made while this one trains
        coming: Future[npt.NDArray[np.int32]] = pool.submit(epoch)
        while True:
            now, coming = coming.result(), pool.submit(epoch)
            for i in range(0, len(now) - n + 1, n):
                yield now[i : i + n]


def windows(total: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first scored) over `total` tokens: each but the first is scored once, after up to `context`."""
    scored, begin = 1, 0
    while scored < total:
        end = min(begin + context, total)
        yield begin, end, scored
        scored, begin = end, max(begin, end - context + stride)


def story_texts(part: tuple[Ids, Offsets]) -> list[Ids]:
    """The stories of a part, each with the separator in front, as a prompt has it."""
    ids, offsets = part
    start = np.array([END_OF_STORY_ID], np.uint16)
    return [np.concatenate([start, ids[a:b]]) for a, b in itertools.pairwise(offsets)]
