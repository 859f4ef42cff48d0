"""Tokens in files: what they hold, when they are made again, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuplama.errors import CheckpointError, ParameterError, PromptError
from cuplama.train.data import TokenData, check_files
from cuplama.train.documents import BEGINS, LEARNED
from tests.train.made import marks, tokenizer


def build(folder: Path, *paths: Path, vocab_size: int = 48, **options: Any) -> TokenData:
    found = tokenizer(folder / "t", bos="<sep>", eos="<sep>", adds=True)
    return TokenData.build(paths, found, folder / "data", marks(found), vocab_size, **options)


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_tokens_and_flags_are_mapped(tmp_path: Path) -> None:
    a, b = text(tmp_path / "a.txt", "ab<sep>c"), text(tmp_path / "b.jsonl", '{"text": "d"}\n')
    data = build(tmp_path, a, b)
    found = tokenizer(tmp_path / "t", bos="<sep>", eos="<sep>", adds=True)
    assert found.decode(data.tokens.tolist(), skip_special=False) == "<sep>ab<sep>c<sep>d<sep>"
    assert (data.flags & BEGINS != 0).tolist() == [True, False, False, True, False, True, False, True]
    assert (data.flags & LEARNED != 0).all()
    assert data.targets == 7  # nothing predicts the first
    assert isinstance(data.tokens, np.memmap)
    assert data.tokens.dtype == np.uint16
    facts = json.loads((tmp_path / "data" / "train.json").read_text())
    assert {k: facts[k] for k in ("tokens", "learned", "documents")} == {"tokens": 8, "learned": 8, "documents": 4}
    assert [s["file"] for s in facts["sources"]] == [str(a), str(b)]
    assert build(tmp_path, a, vocab_size=70000, name="wide").tokens.dtype == np.uint32


def test_the_same_texts_are_read_once(tmp_path: Path) -> None:
    a = text(tmp_path / "a.txt", "ab")
    seen: list[tuple[int, int]] = []
    first = build(tmp_path, a, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2, 2)
    seen.clear()
    again = build(tmp_path, a, fixed=True, progress=lambda done, total: seen.append((done, total)))
    assert not seen
    assert again.fingerprint == first.fingerprint
    moved = shutil.move(a, tmp_path / "elsewhere.txt")
    assert build(tmp_path, Path(moved), fixed=True).fingerprint == first.fingerprint
    before = first.tokens.tolist()
    (tmp_path / "data" / "train.tokens.bin").write_bytes(b"x")  # as of a copy that was cut
    assert build(tmp_path, Path(moved)).tokens.tolist() == before


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    a, b = text(tmp_path / "a.txt", "ab"), text(tmp_path / "b.txt", "cd")
    first = build(tmp_path, a, b)
    text(b, "ce")
    with pytest.raises(CheckpointError, match=r"b\.txt is not what the training began with"):
        build(tmp_path, a, b, fixed=True)
    with pytest.raises(CheckpointError, match="the training began with 2 files of data, not 1"):
        build(tmp_path, a, fixed=True)
    text(b, "cd")
    found = tokenizer(tmp_path / "t", bos="<s>", eos="<sep>", adds=True)
    with pytest.raises(CheckpointError, match="the tokenizer, or what the model calls BOS and EOS"):
        TokenData.build([a, b], found, tmp_path / "data", marks(found), 48, fixed=True)
    assert build(tmp_path, a, b, fixed=True).tokens.tolist() == first.tokens.tolist()  # nothing was lost
    text(b, "ce")
    assert build(tmp_path, a, b).tokens.tolist() != first.tokens.tolist()


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"a\.txt is empty"):
        build(tmp_path, text(tmp_path / "a.txt", ""))
    with pytest.raises(PromptError, match="does not exist"):
        build(tmp_path, tmp_path / "nothing.txt")
    with pytest.raises(PromptError, match=r"cannot read .*: Is a directory"):
        check_files([tmp_path])
    with pytest.raises(ParameterError, match="JSON is read in lines"):
        check_files([tmp_path / "a.json"])
    with pytest.raises(PromptError, match="the data has no tokens"):
        build(tmp_path, text(tmp_path / "b.jsonl", "\n\n"))
    with pytest.raises(
        PromptError, match=r"c\.txt: the tokenizer gives '<sep>' id 36, and the model's voc.* has 9 tokens"
    ):
        build(tmp_path, text(tmp_path / "c.txt", "ab"), vocab_size=9)
    assert not (tmp_path / "data" / "train.json").exists()


def test_a_full_disk_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="data: No space left on device; give --out a folder with room"):
        build(tmp_path, text(tmp_path / "a.txt", "ab"))
    monkeypatch.undo()
    assert len(build(tmp_path, tmp_path / "a.txt").tokens) == 3
