"""A long text is cut only where that changes no token."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from cuplama.text.tokenizer import Tokenizer
from cuplama.train import pieces
from tests.train.made import tokenizer

WORDS = "the cat sat on a mat, and then it ran away. \n\nit's 12,345 days; \t  don't you see?\n"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_SIZE", 100), ("_LOOK", 60), ("_AROUND", 12)):
        monkeypatch.setattr(pieces, name, value)


def cut(path: Path, text: str, found: Tokenizer, separator: str | None = None) -> list[str]:
    path.write_bytes(text.encode())
    parts = list(pieces.read_pieces(path, found, separator))
    assert "".join(piece for piece, _ in parts) == text
    assert [size for _, size in parts] == [len(piece.encode()) for piece, _ in parts]
    return [piece for piece, _ in parts]


def byte_level() -> Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([WORDS] * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return Tokenizer(made)


def with_spaces_in_front() -> Tokenizer:
    """As Llama 2's: a space in front of every text, and no cut between words."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.train_from_iterator([WORDS] * 3, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<sep>"]))
    return Tokenizer(made)


@pytest.mark.usefixtures("small")
def test_the_tokens_are_those_of_the_whole(tmp_path: Path) -> None:
    text, found = (WORDS * 9 + "ü✓ and 漢字 ") * 2, byte_level()
    parts = cut(tmp_path / "a.txt", text, found)
    assert len(parts) > 6
    assert max(map(len, parts)) <= 260
    ids = [id for piece in found.encode_many(parts) for id in piece]
    assert ids == found.encode(text, bos=False)


@pytest.mark.usefixtures("small")
def test_where_a_cut_would_change_tokens_there_is_none_but_at_separators(tmp_path: Path) -> None:
    found = with_spaces_in_front()
    assert len(cut(tmp_path / "a.txt", WORDS * 9, found)) == 1
    text = (WORDS * 2 + "<sep>") * 9
    parts = cut(tmp_path / "b.txt", text, found, "<sep>")
    assert len(parts) > 2
    assert all(piece.endswith("<sep>") for piece in parts)
    assert [id for piece in found.encode_many(parts) for id in piece] == found.encode(text, bos=False)


def test_a_short_text_is_one_piece(tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "t")
    assert cut(tmp_path / "a.txt", "abc", found) == ["abc"]
    assert cut(tmp_path / "b.txt", "", found) == []
