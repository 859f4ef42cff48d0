"""Tokens as bytes, and text in the middle of a text as tokens, for vocabularies of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuplama.folders import data_folder
from cuplama.text.token_bytes import TokenBytes
from cuplama.text.tokenizer import Tokenizer
from tests.gguf_files import write_gguf
from tests.tiny import CHARS

from .test_gguf_tokenizer import SPM
from .test_tokenizer import tiny

TEXT = st.text() | st.text(st.sampled_from(" a▁é€🦙\n<>ab"))
_STORIES = Tokenizer.load(data_folder("weights"))


def _of(tokenizer: Tokenizer) -> TokenBytes:
    return TokenBytes(tokenizer, tokenizer.vocab_size)


def _spelled(tokens: TokenBytes, ids: list[int]) -> bytes:
    assert not tokens.hidden & set(ids)
    return b"".join(tokens.tokens[i] for i in ids)


@pytest.mark.parametrize("tokenizer", [_STORIES, tiny()], ids=["byte level", "byte fallback"])
def test_any_text_is_spelled(tokenizer: Tokenizer) -> None:
    tokens = _of(tokenizer)

    @given(TEXT)
    def check(text: str) -> None:
        assert _spelled(tokens, tokens.encode(text)) == text.encode()

    check()


def test_bytes_are_those_of_the_text_after_another() -> None:
    """A prefix space, which the decoder takes away at the start of a text, belongs to the token."""
    for tokenizer in (_STORIES, tiny()):
        tokens = _of(tokenizer)
        ids = tokenizer.encode("a b, a é\n a")
        assert b"".join(tokens.tokens[i] for i in ids if i not in tokens.hidden).strip() == "a b, a é\n a".encode()
    assert _of(tiny()).tokens[tiny().encode("a", bos=False)[0]] == b" a"


def test_text_in_the_middle_has_the_tokens_that_the_tokenizer_gives_it_there() -> None:
    assert _of(_STORIES).encode(" girl named Lily") == _STORIES.encode(" girl named Lily", bos=False)
    tokens = _of(tiny())
    assert [tokens.tokens[i] for i in tokens.encode("ab a")] == [b"a", b"b", b" a"]  # and not " a", "b", " a"


def test_the_text_of_a_special_token_is_spelled_out() -> None:
    tokens = _of(_STORIES)
    assert tokens.hidden == {0}
    assert _spelled(tokens, tokens.encode("a<|endoftext|>b")) == b"a<|endoftext|>b"
    assert tokens.tokens[0] == b"<|endoftext|>"


def test_ids_without_a_token_are_empty() -> None:
    size = _STORIES.vocab_size
    assert TokenBytes(_STORIES, size + 3, [size + 1]).tokens[-4:] == [_of(_STORIES).tokens[-1], b"", b"", b""]
    assert TokenBytes(_STORIES, 5, [7]).hidden == {0}


def test_what_a_vocabulary_cannot_spell_is_left_out() -> None:
    tokens = _of(Tokenizer.load(CHARS))
    assert _spelled(tokens, tokens.encode("ab")) == b"ab"
    assert _spelled(tokens, tokens.encode("a🦙b")) == b"a"


def test_a_gguf_vocabulary(tmp_path: Path) -> None:
    tokens = _of(Tokenizer.load(write_gguf(tmp_path / "m.gguf", SPM)))
    assert _spelled(tokens, tokens.encode("ab b<|im_end|>é")) == "ab b<|im_end|>é".encode()
    assert tokens.tokens[tokens.encode("ab")[0]] == b"ab"
