"""Tokenizer, streaming detokenization and stop strings."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from cuplama.errors import PromptError, TokenizerError
from cuplama.text.detokenizer import Detokenizer
from cuplama.text.stop_strings import StopStrings
from cuplama.text.tokenizer import Tokenizer

FOLDERS = {
    "stories260K": "models/stories260K",
    "gpt2": "tokenizers/gpt2",
    "phi-3-mini": "tokenizers/phi-3-mini",
    "qwen2.5": "tokenizers/qwen2.5",
}
GOLDENS = {"gpt2": "gpt-2", "phi-3-mini": "phi-3", "qwen2.5": "qwen2"}

# Text that breaks careless detokenizers: spaces, multi-byte characters, U+FFFD itself, combining marks.
TEXT = st.text() | st.text(st.sampled_from(" a▁é€🦙\ufffd\u0301\n<>0xE2")) | st.text().map(lambda text: text + " <s> x")


def byte_fallback_json() -> dict[str, Any]:
    """A tiny Llama-like tokenizer.json: BOS, all byte tokens, a few pieces, the usual normalizer and decoder."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "é", "\ufffd"]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **special} for i, token in enumerate(pieces[:3])],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": ["▁ a"],
        },
    }


def write(folder: Path, config: object = None, **files: str) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(byte_fallback_json()), encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@cache
def tiny() -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(json.dumps(byte_fallback_json()))
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


@cache
def load(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(params=["tiny", *FOLDERS])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "tiny":
        return tiny()
    shared: Path = request.getfixturevalue("shared")
    return load(shared / FOLDERS[request.param])


def byte(value: int) -> int:
    """The tiny tokenizer's id of a byte token."""
    return 3 + value


def stream(tokenizer: Tokenizer, ids: Sequence[int], **options: Any) -> str:
    detokenizer = Detokenizer(tokenizer, **options)
    return "".join([*map(detokenizer.push, ids), detokenizer.flush()])


# --- Loading --------------------------------------------------------------------------------------


def test_attributes(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>", "chat_template": "T"}
    tokenizer = Tokenizer.load(write(tmp_path, config))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (1, 2, 265)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.chat_template == "T"


def test_only_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.chat_template) == (None, None, None)
    assert tokenizer.encode("a") == [1, 262]


def test_special_tokens_map_gives_names_and_the_config_wins(tmp_path: Path) -> None:
    names = json.dumps({"bos_token": "<s>", "eos_token": "<unk>"})
    tokenizer = Tokenizer.load(write(tmp_path, {"eos_token": "</s>"}, **{"special_tokens_map.json": names}))
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)


def test_tokens_that_only_the_config_lists(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"265": {"content": "<|end|>", "special": True}}, "eos_token": "<|end|>"}
    tokenizer = Tokenizer.load(write(tmp_path, config))
    assert tokenizer.eos == 265
    assert tokenizer.vocab_size == 266
    assert tokenizer.encode("a<|end|>", bos=False) == [262, 265]
    assert 265 in tokenizer.special_ids


def test_saved_truncation_and_padding_do_not_apply() -> None:
    backend = tokenizers.Tokenizer.from_str(json.dumps(byte_fallback_json()))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    assert Tokenizer(backend).encode("aaaa") == tiny().encode("aaaa")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist$"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(TokenizerError, match=r"tokenizer\.model alone is not supported"):
        Tokenizer.load(tmp_path)


BROKEN = {
    "not json": ("tokenizer_config.json", "{"),
    "not an object": ("tokenizer_config.json", "[]"),
    "not a token": ("tokenizer_config.json", '{"bos_token": 5}'),
    "bad map": ("special_tokens_map.json", "nope"),
    "bad template": ("chat_template.json", '{"chat_template": 5}'),
    "unnamed template": ("tokenizer_config.json", '{"chat_template": [{"template": "x"}]}'),
    "bad added tokens": ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
    "hole in the ids": ("tokenizer_config.json", '{"added_tokens_decoder": {"900": {"content": "y"}}}'),
    "empty": ("tokenizer.json", ""),
    "no model": ("tokenizer.json", "{}"),
}


@pytest.mark.parametrize(("name", "text"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named_in_one_line(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message
    assert name in message


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("decoder", [decoders.CTC(), decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()])])
def test_decoder_that_cannot_be_streamed_is_refused(tmp_path: Path, decoder: decoders.Decoder) -> None:
    backend = tokenizers.Tokenizer.from_str(json.dumps(byte_fallback_json()))
    backend.decoder = decoder
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"decoder \{.* is not supported; supported are ByteLevel"):
        Tokenizer.load(tmp_path)


# --- Encoding and decoding ------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_ids(shared: Path, name: str) -> None:
    tokenizer = load(shared / FOLDERS[name])
    stem = shared / "tokenizers" / f"ggml-vocab-{GOLDENS[name]}.gguf"
    *texts, after_the_last = Path(f"{stem}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    assert after_the_last == ""
    lines = Path(f"{stem}.out").read_text().splitlines()
    assert len(texts) == len(lines) > 40
    wrong = [text for text, line in zip(texts, lines, strict=True) if tokenizer.encode(text, bos=False) != ids(line)]
    assert wrong == []


def ids(line: str) -> list[int]:
    return [int(id) for id in line.split()]


# What AutoTokenizer(text).input_ids of transformers 5.23 gives.
AUTO = {
    "stories260K": {"": [1], "Hi": [1, 320, 417]},
    "gpt2": {"": [], "Hi": [17250]},
    "phi-3-mini": {"": [], "Hi": [6324]},
    "qwen2.5": {"": [], "Hi": [13048], "Hello <|im_end|> x": [9707, 220, 151645, 856]},
}
NAMED = {
    "stories260K": (512, 1, 2),
    "gpt2": (50257, None, None),
    "phi-3-mini": (32011, 1, 32000),
    "qwen2.5": (151665, None, 151645),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_as_transformers(shared: Path, name: str) -> None:
    tokenizer = load(shared / FOLDERS[name])
    assert {text: tokenizer.encode(text) for text in AUTO[name]} == AUTO[name]
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == NAMED[name]


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_post_processor_decides_about_bos(tmp_path: Path, add_bos: bool) -> None:
    config = {"add_bos_token": add_bos, "bos_token": "<s>", "tokenizer_class": "LlamaTokenizer"}
    assert Tokenizer.load(write(tmp_path, config)).encode("a") == [1, 262]
    spec = byte_fallback_json() | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert Tokenizer.load(tmp_path).encode("a") == [262]


def test_never_a_second_bos() -> None:
    assert tiny().encode("") == [1]
    assert tiny().encode("", bos=False) == []
    assert tiny().encode("a") == [1, 262]
    assert tiny().encode("<s>a") == [1, 262]
    assert tiny().encode("<s>a", bos=False) == [1, 262]
    # Two that the caller wrote are the caller's.
    assert tiny().encode("<s><s>a", bos=False) == [1, 1, 262]
    assert tiny().encode("aa") == [1, 262, 260]


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(PromptError, match=r"not valid Unicode: '\\udcff' at character 2"):
        tiny().encode("ab\udcff")


def test_text_that_the_vocabulary_cannot_spell() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    with pytest.raises(PromptError, match=r"has no ids for the text: WordLevel error: Missing \[UNK\] token"):
        Tokenizer(backend).encode("b")


def test_ids_without_a_token_decode_to_nothing() -> None:
    assert tiny().decode([262, 5000, -1, 2**40, 260]) == "aa"
    assert stream(tiny(), [262, 5000, -1, 2**40, 260]) == "aa"


def test_token_text() -> None:
    texts = [tiny().token_text(id) for id in (1, 262, 260, byte(0x0A), byte(0xE2), 264, 5000)]
    assert texts == ["<s>", " a", "a", "\n", "\\xe2", "\ufffd", "<unused 5000>"]


def test_token_text_byte_level(shared: Path) -> None:
    tokenizer = load(shared / FOLDERS["gpt2"])
    texts = [tokenizer.token_text(id) for id in tokenizer.encode("Hi wörld 🦙<|endoftext|>")]
    assert texts == ["Hi", " w", "ör", "ld", " \\xf0\\x9f", "\\xa6", "\\x99", "<|endoftext|>"]
    shown = [tokenizer.token_shown(id) for id in tokenizer.encode(" w🦙\n\u00a0")]
    assert shown == ["' w'", r"b'\xf0\x9f'", r"b'\xa6'", r"b'\x99'", r"'\n\xa0'"]
    assert tokenizer.token_shown(99999) == "'<unused 99999>'"


# --- Streaming ------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def check_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = tokenizer.encode(data.draw(TEXT))
    assert stream(tokenizer, ids) == tokenizer.decode(ids)
    assert stream(tokenizer, ids, skip_special=False) == tokenizer.decode(ids, skip_special=False)


@given(data=st.data())
@settings(max_examples=250, deadline=None)
def check_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    # Half of the draws from the start of the vocabulary: special tokens, single bytes and single characters.
    any_id = st.integers(0, tokenizer.vocab_size + 2) | st.integers(0, 270)
    ids = data.draw(st.lists(any_id, max_size=12))
    assert stream(tokenizer, ids) == tokenizer.decode(ids)
    assert stream(tokenizer, ids, skip_special=False) == tokenizer.decode(ids, skip_special=False)
    at = data.draw(st.integers(0, len(ids)))
    prompt, whole = tokenizer.decode(ids[:at]), tokenizer.decode(ids)
    if whole.startswith(prompt):
        assert prompt + stream(tokenizer, ids[at:], context=ids[:at]) == whole


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def check_long_contexts(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """What follows reads as if every token had been looked at; runs of bytes may be longer than an end."""
    any_id = st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.integers(3, 258))
    ids = data.draw(st.lists(any_id, min_size=20, max_size=90))
    ids += data.draw(st.lists(st.integers(3, 258), max_size=40))  # bytes, in a vocabulary that has them
    more = data.draw(st.lists(any_id, max_size=6))
    whole, alone = Detokenizer(tokenizer), Detokenizer(tokenizer)
    for id in ids:
        whole.push(id)
        alone.push(id)
    wanted = "".join([*map(whole.push, more), whole.flush()]).removeprefix(alone.flush())
    assert stream(tokenizer, more, context=ids) == wanted


def test_streaming_text_equals_full_decoding(tokenizer: Tokenizer) -> None:
    check_text(tokenizer)


def test_streaming_any_ids_equals_full_decoding(tokenizer: Tokenizer) -> None:
    check_ids(tokenizer)


def test_only_the_ends_of_a_long_context_are_looked_at(tokenizer: Tokenizer) -> None:
    check_long_contexts(tokenizer)


PIECES = [
    "▁",
    "▁a",
    "▁▁b",
    "a",
    " ",
    "é",
    "<0x41>",
    "<0xE2>",
    "<0x82>",
    "<0xAC>",
    "\ufffd",
    "Ġ",
    "Ã",
    "©",
    "x y",
    "<s>",
]
SPACES = decoders.Replace("▁", " ")
DECODERS = {
    "none": None,
    "byte level": decoders.ByteLevel(),
    "fuse": decoders.Fuse(),
    "metaspace": decoders.Metaspace(),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "byte fallback, metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "llama": decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "strip 2": decoders.Sequence([SPACES, decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "strip pieces": decoders.Sequence([decoders.Strip("a", 1, 0), SPACES]),
    "replace after": decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "bb")]),
    "regex": decoders.Replace(tokenizers.Regex(r"▁+"), "_"),
}


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_streaming_with_any_decoder(decoder: decoders.Decoder | None) -> None:
    vocabulary = {piece: id for id, piece in enumerate(PIECES)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    backend.add_special_tokens(["<s>"])
    if decoder is not None:
        backend.decoder = decoder
    check_ids(Tokenizer(backend))


def test_half_a_character_is_never_shown() -> None:
    detokenizer = Detokenizer(tiny())
    shown = [detokenizer.push(id) for id in (262, byte(0xE2), 1, byte(0x82), byte(0xAC), 260)]
    assert shown == ["a", "", "", "", "", "€a"]
    assert detokenizer.flush() == ""


def test_incomplete_bytes_at_the_end() -> None:
    detokenizer = Detokenizer(tiny())
    assert [detokenizer.push(id) for id in (262, byte(0xE2), byte(0x82))] == ["a", "", ""]
    assert detokenizer.flush() == "\ufffd\ufffd"


def test_a_continuation_keeps_its_leading_space() -> None:
    assert stream(tiny(), [262, 260]) == "aa"
    assert stream(tiny(), [262, 260], context=[1, 262]) == " aa"
    assert stream(tiny(), [262, 260], context=[1]) == "aa"


def test_a_continuation_after_bytes() -> None:
    euro = [byte(value) for value in "€".encode()]
    assert stream(tiny(), [260], context=euro) == "a"  # complete, so already shown by the prompt
    assert stream(tiny(), [*euro[2:], 260], context=euro[:2]) == "€a"  # completed by the continuation
    assert stream(tiny(), [], context=euro[:2]) == ""


# --- Stop strings ---------------------------------------------------------------------------------


def show(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, bool]:
    filter = StopStrings(stops)
    results = [filter.push(piece) for piece in pieces]
    return "".join(text for text, _ in results) + filter.flush(), any(hit for _, hit in results)


def test_stop_strings() -> None:
    assert show([], ["a", "b"]) == ("ab", False)
    assert show(["</s>"], ["a<", "/", "s", ">b", "c"]) == ("a", True)
    assert show(["</s>"], ["a<", "/", "s"]) == ("a</s", False)
    assert show(["abcd", "bc"], ["abcd"]) == ("a", True)  # "bc" is complete first
    assert show(["bc", "abc"], ["xabc"]) == ("x", True)
    filter = StopStrings(["END"])
    assert [filter.push(text) for text in ("aE", "x", "EEN", "D.")] == [
        ("a", False),
        ("Ex", False),
        ("E", False),
        ("", True),
    ]
    assert filter.push("more") == ("", True)


def test_stop_strings_refuses_what_would_always_or_never_match() -> None:
    for stops in (["a", ""], "ab"):
        with pytest.raises(ValueError, match="stop strings must be"):
            StopStrings(stops)


def test_hidden_text_counts_and_is_never_shown() -> None:
    filter = StopStrings(["b<x>c", "<y>"])
    pieces = [("ab", False), ("<x>", True), ("d", False), ("b", False), ("<x>", True)]
    assert [filter.push(text, hidden=hidden) for text, hidden in pieces] == [
        ("a", False),
        ("", False),
        ("bd", False),
        ("", False),
        ("", False),
    ]
    assert (copy.deepcopy(filter).push("c"), copy.deepcopy(filter).flush()) == (("", True), "b")
    assert filter.push("<y>", hidden=True) == ("b", True)
    assert filter.flush() == ""


@given(
    text=st.text("abc", max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20)),
)
@settings(max_examples=400, deadline=None)
def test_any_split_shows_the_same_text(text: str, stops: list[str], cuts: list[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    pieces = [text[i:j] for i, j in pairwise(places)]
    # The definition: the shortest beginning of the text that ends with a stop string, without the longest such.
    ends = [(n, stop) for n in range(len(text) + 1) for stop in stops if text[:n].endswith(stop)]
    expected = text, False
    if ends:
        first = min(n for n, _ in ends)
        expected = text[: first - max(len(stop) for n, stop in ends if n == first)], True
    assert show(stops, pieces) == expected
    assert show(stops, [text]) == expected


# --- Import ---------------------------------------------------------------------------------------


def test_import_is_light() -> None:
    code = (
        "import sys, cuplama.text.tokenizer; "
        "print([m for m in ('jinja2', 'tokenizers', 'transformers', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
