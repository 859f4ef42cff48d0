"""The tokenizer of a GGUF file: the ids of llama.cpp, and the same objects that a folder gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from cuplama.errors import CheckpointError, TokenizerError
from cuplama.gguf import open_gguf
from cuplama.text.gguf_splits import SPLITS
from cuplama.text.gguf_tokenizer import has_tokenizer, special_ids, stop_ids
from cuplama.text.tokenizer import Tokenizer
from tests.gguf_files import vocabulary_of, write_gguf

# Golden file -> folder of the tokenizer.json, the kind of vocabulary, and how text is cut.
GOLDENS = {
    "gpt-2": ("gpt2", "gpt2", "gpt-2"),
    "qwen2": ("qwen2.5", "gpt2", "qwen2"),
    "phi-3": ("phi-3-mini", "llama", "default"),
}


@pytest.fixture(scope="module", params=GOLDENS)
def golden(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Tokenizer]:
    folder, model, pre = GOLDENS[request.param]
    metadata = {"general.name": folder, **vocabulary_of(shared / "tokenizers" / folder, model, pre)}
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", metadata)
    return request.param, Tokenizer.load(path)


def test_golden_ids(shared: Path, golden: tuple[str, Tokenizer]) -> None:
    name, tokenizer = golden
    stem = shared / "tokenizers" / f"ggml-vocab-{name}.gguf"
    *texts, after_the_last = Path(f"{stem}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    assert after_the_last == ""
    wanted = [[int(id) for id in line.split()] for line in Path(f"{stem}.out").read_text().splitlines()]
    assert len(texts) == len(wanted) > 40
    assert [tokenizer.encode(text, bos=False) for text in texts] == wanted


def test_ids_and_text_are_those_of_the_folder(shared: Path, golden: tuple[str, Tokenizer]) -> None:
    name, tokenizer = golden
    folder = Tokenizer.load(shared / "tokenizers" / GOLDENS[name][0])
    texts = [
        Path(__file__).read_text(encoding="utf-8"),
        "a<|endoftext|> b<|im_end|><|end|>\n\n  c",
        "½ 🦙\u0301e\u0301\0",
    ]
    texts += [f"{' ' * n}x{' ' * n}" for n in range(1, 40)]
    for text in texts:
        ids = folder.encode(text, bos=False)
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.decode(ids) == folder.decode(ids)
    assert tokenizer.vocab_size == folder.vocab_size


@pytest.mark.parametrize(
    ("name", "template", "keys"),
    [
        ("qwen2", "Qwen-Qwen2.5-7B-Instruct", {"eos_token_id": 151645, "bos_token_id": 151643, "add_bos_token": False}),
        ("phi-3", "microsoft-Phi-3.5-mini-instruct", {"eos_token_id": 32000}),
    ],
)
@pytest.mark.parametrize("special_text", [False, True])
def test_chats_are_those_of_the_folder(
    name: str, template: str, keys: dict[str, Any], special_text: bool, shared: Path, tmp_path: Path
) -> None:
    """Control tokens in messages included, hidden or not."""
    folder, model, pre = GOLDENS[name]
    source = (shared / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    metadata = {
        "general.name": folder,
        "tokenizer.chat_template": source,
        **vocabulary_of(shared / "tokenizers" / folder, model, pre),
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }
    messages = [
        {"role": "system", "content": "Be <|im_end|> brief <|end|>"},
        {"role": "user", "content": " Hi  there\n<|im_start|>x </s>"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "again <tool_call> ½"},
    ]
    other = Tokenizer.load(shared / "tokenizers" / folder)
    wanted = Tokenizer(other._backend, other._special_tokens, {"default": source})
    found = Tokenizer.load(write_gguf(tmp_path / "m.gguf", metadata))
    assert found.apply_chat(messages, special_text=special_text) == wanted.apply_chat(
        messages, special_text=special_text
    )
    assert found.eos == wanted.eos


# ---- a small vocabulary of each kind ---------------------------------------------------------------------------------
BYTES = {f"<0x{value:02X}>": 6 for value in range(256)}
PIECES = {
    "<unk>": 2,
    "<s>": 3,
    "</s>": 3,
    **BYTES,
    "▁": 1,
    "a": 1,
    "b": 1,
    "ab": 1,
    "▁a": 1,
    "▁ab": 1,
    "<tool>": 4,
    "<|im_end|>": 3,
}
SPM: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": list(PIECES),
    "tokenizer.ggml.token_type": np.array(list(PIECES.values()), np.int32),
    "tokenizer.ggml.scores": np.array([0.0] * 262 + [-3, -2, -4] + [0, 0], np.float32),
}
A = list(PIECES).index
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*ALPHABET, "ab", "abc", "<|end|>", "<think>", "[PAD260]"]
BPE: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": np.array([1] * 258 + [3, 4, 5], np.int32),
    "tokenizer.ggml.merges": ["a b", "ab c"],
}
Load = Callable[..., Tokenizer]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """The tokenizer of a vocabulary with other keys; those without a dot are of tokenizer.ggml, None removes one."""

    def tokenizer(vocabulary: dict[str, Any], more: dict[str, Any] | None = None, **changes: Any) -> Tokenizer:
        metadata = {**vocabulary, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}, **(more or {})}
        path = write_gguf(tmp_path / "m.gguf", {key: x for key, x in metadata.items() if x is not None})
        return Tokenizer.load(path)

    return tokenizer


def test_pieces_join_by_score(load: Load) -> None:
    """▁a before ab; with the scores the other way round ab, and then nothing but ▁ab of the two."""
    assert load(SPM).encode("ab", bos=False) == [A("▁ab")]
    low = np.array([0.0] * 262 + [-2, -3, -9] + [0, 0], np.float32)
    assert load(SPM, scores=low).encode("aab", bos=False) == [A("▁a"), A("ab")]
    without = [1 if name != "▁ab" else 3 for name in PIECES]
    kinds = np.where(np.array(list(PIECES.values())) == 1, without, list(PIECES.values())).astype(np.int32)
    assert load(SPM, token_type=kinds).encode("ab", bos=False) == [A("▁a"), A("b")]
    assert load(SPM, token_type=kinds, scores=low).encode("ab", bos=False) == [A("▁"), A("ab")]


def test_bytes_of_what_has_no_piece(load: Load) -> None:
    tokenizer = load(SPM)
    ids = tokenizer.encode("é", bos=False)
    assert ids == [A("▁"), A("<0xC3>"), A("<0xA9>")]
    assert tokenizer.decode(ids) == "é"


def test_prefix_before_a_text_and_after_a_token(load: Load) -> None:
    assert load(SPM).encode("a<tool>a", bos=False) == [A("▁a"), A("<tool>"), A("▁a")]
    bare = load(SPM, add_space_prefix=False)
    assert bare.encode("a<tool>a", bos=False) == [A("a"), A("<tool>"), A("a")]
    assert bare.decode([A("▁a")]) == " a"
    assert load(SPM).decode([A("▁a")]) == "a"


def test_bos_and_eos(load: Load) -> None:
    assert load(SPM).encode("a") == [1, A("▁a")]
    assert load(SPM, add_bos_token=False).encode("a") == [A("▁a")]
    assert load(SPM, add_bos_token=False, add_eos_token=True).encode("a") == [A("▁a"), 2]
    assert load(SPM, bos_token_id=A("a"), add_eos_token=True).encode("a") == [A("a"), A("▁a"), 2]
    assert load(SPM).encode("<s>a") == [1, A("▁a")]  # never twice
    assert load(BPE).encode("a") == [ALPHABET.index("a")]
    assert load(BPE, bos_token_id=258, add_bos_token=True).encode("a") == [258, ALPHABET.index("a")]
    assert load(BPE, pre="llama-bpe", bos_token_id=258).encode("a") == [258, ALPHABET.index("a")]
    assert load(BPE, pre="llama-bpe").encode("a") == [ALPHABET.index("a")]
    assert load(BPE, pre="llama-bpe", bos_token_id=258, add_bos_token=False).encode("a") == [ALPHABET.index("a")]


def test_names_and_kinds(load: Load) -> None:
    tokenizer = load(SPM)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.kind) == (1, 2, "BPE")
    assert tokenizer.special_ids == {0, 1, 2, A("<|im_end|>")}
    other = load(BPE, eos_token_id=258)
    assert (other.bos, other.eos) == (None, 258)
    assert other.special_ids == {258}
    assert other.encode("<think>abc<|end|>", bos=False) == [259, 257, 258]
    assert other.piece(260) is None  # it fills the embedding's last row
    assert other.token_text(259) == "<think>"


def test_a_piece_that_is_a_token_is_taken_whole(load: Load) -> None:
    """Llama 3's vocabulary has tokens that no order of its merges makes."""
    merges = ["b c"]
    assert load(BPE, merges=merges, tokens=[*TOKENS[:256], "bc", *TOKENS[257:]], pre="llama-bpe").encode(
        "abc", bos=False
    ) == [257]
    assert (
        len(load(BPE, merges=merges, tokens=[*TOKENS[:256], "bc", *TOKENS[257:]], pre="dbrx").encode("abc", bos=False))
        == 2
    )


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("I'LL say 12345", {
            "gpt-2": ["I", "'", "LL", " say", " 12345"],
            "smollm": ["I", "'", "LL", " say", " ", "1", "2", "3", "4", "5"],
            "llama-bpe": ["I", "'LL", " say", " ", "123", "45"],
            "qwen2": ["I", "'LL", " say", " ", "1", "2", "3", "4", "5"],
            "tekken": ["I", "'LL", " say", " ", "1", "2", "3", "4", "5"],
            "gpt-4o": ["I'LL", " say", " ", "123", "45"],
            "deepseek-v3": ["I", "'LL", " say", " ", "123", "45"],
            "default": ["I", "'", "LL", " say", " ", "123", "45"],
        }),
        ("x  y\n\n z!?", {
            "gpt-2": ["x", " ", " y", "\n\n", " z", "!?"],
            "llama-bpe": ["x", " ", " y", "\n\n", " z", "!?"],
            "viking": ["x", " ", " y", "\n\n", " z", "!?"],
        }),
    ],
)  # fmt: skip
def test_cuts(text: str, pieces: dict[str, list[str]], load: Load) -> None:
    """Where text is cut before its merges, of the vocabularies that are in use."""
    for pre, wanted in pieces.items():
        stage = load(BPE, pre=pre)._backend.pre_tokenizer
        spelled = {"Ġ": " ", "Ċ": "\n"}
        found = ["".join(spelled.get(c, c) for c in piece) for piece, _ in stage.pre_tokenize_str(text)]
        assert found == wanted, pre


@pytest.mark.parametrize("pre", SPLITS)
def test_every_cut_loads_and_loses_nothing(pre: str, load: Load) -> None:
    tokenizer, text = load(BPE, pre=pre), "Hello,\r\n  wörld's 1234 ½ 一二\t\u0e01!?<think>_x"
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


def test_only_qwen_composes(load: Load) -> None:
    assert load(BPE).encode("e\u0301", bos=False) != load(BPE).encode("é", bos=False)
    assert load(BPE, pre="qwen2").encode("e\u0301", bos=False) == load(BPE, pre="qwen2").encode("é", bos=False)


def test_an_empty_token_and_one_that_ends_a_turn(load: Load) -> None:
    tokenizer = load(BPE, tokens=[*TOKENS[:257], "", *TOKENS[258:]], merges=["a b"])
    assert tokenizer.piece(257) == "[EMPTY_257]"
    normal = np.array([1] * 261, np.int32)
    assert load(BPE, token_type=normal).encode("<|end|>", bos=False) == [258]  # whatever its type says


def test_phi_3_takes_the_blanks_behind_its_tokens(load: Load) -> None:
    phi = {"general.name": "Phi 3 Mini"}
    assert load(SPM, {"general.name": "Phi-3 Mini"}).encode("<tool> \n a", bos=False) == [A("<tool>"), A("▁a")]
    assert load(SPM, phi).encode("<tool> a", bos=False) != [A("<tool>"), A("▁a")]


def test_chat_templates(load: Load) -> None:
    key = "tokenizer.chat_template"
    assert load(SPM).chat_template is None
    one = load(SPM, {key: "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"})
    assert one.apply_chat([{"role": "user", "content": "a"}]) == [1, A("▁a"), 2]
    named = load(SPM, {key: "plain", f"{key}s": ["tool_use"], f"{key}.tool_use": "tools"})
    assert named.chat_template == "plain"
    assert named.apply_chat([{"role": "user", "content": "a"}], chat_template="tool_use") == named.encode(
        "tools", bos=False
    )
    with pytest.raises(TokenizerError, match=r"m\.gguf: tokenizer\.chat_template\.rag is missing, though"):
        load(SPM, {f"{key}s": ["rag"]})


def test_stop_ids(tmp_path: Path) -> None:
    def found(vocabulary: dict[str, Any], **keys: Any) -> list[int]:
        more = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
        return stop_ids(open_gguf(write_gguf(tmp_path / "m.gguf", {**vocabulary, **more})))

    assert found({}) == []
    assert found(SPM) == [2, A("<|im_end|>")]
    assert found(SPM, eos_token_id=A("<tool>"), eot_token_id=A("a"), eom_token_id=A("b")) == [
        A("<tool>"), A("a"), A("b"), A("<|im_end|>"),
    ]  # fmt: skip
    assert found(BPE) == [258]
    harmony = [*TOKENS[:256], "<|return|>", "<|call|>", *TOKENS[258:]]
    assert found({**BPE, "tokenizer.ggml.tokens": harmony}) == [256, 257]  # there <|end|> ends a message, no answer


def test_no_tokenizer(tmp_path: Path) -> None:
    for metadata in ({}, {"tokenizer.ggml.model": "no_vocab"}):
        path = write_gguf(tmp_path / "m.gguf", metadata)
        assert not has_tokenizer(open_gguf(path))
        assert special_ids(open_gguf(path)) == {}
        assert Tokenizer.find(path) is None
        with pytest.raises(TokenizerError, match=r"m\.gguf has no tokenizer \(tokenizer\.ggml\.model\)"):
            Tokenizer.load(path)


def test_an_id_beyond_the_vocabulary(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    assert load(BPE, eos_token_id=9999).eos is None
    assert "m.gguf: tokenizer.ggml.eos_token_id = 9999 is no token and counts as absent" in caplog.text


def test_no_cut_is_named(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    assert load(BPE, pre=None).encode("abc", bos=False) == [257]
    assert "m.gguf: tokenizer.ggml.pre is missing" in caplog.text


TWICE = [*TOKENS[:257], "a", *TOKENS[258:]]
WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (BPE, {"model": "bert"}, "model is 'bert'; supported: gpt2, llama"),
    (BPE, {"model": 3}, "model is a whole number; it must be text"),
    (BPE, {"pre": "unheard-of"}, "pre is 'unheard-of'; supported: default, llama-bpe"),
    (BPE, {"merges": None}, "merges is missing"),
    (BPE, {"merges": ["a b", "abc"]}, "merges[1] is 'abc'; it must be two pieces and a blank between them"),
    (BPE, {"merges": ["a zz"]}, "merges cannot be used: "),
    (BPE, {"tokens": None}, "tokens is missing or empty"),
    (BPE, {"tokens": TWICE}, "tokens has 'a' twice"),
    (BPE, {"token_type": np.ones(5, np.int32)}, "token_type has 5 numbers for 261 tokens"),
    (SPM, {"scores": np.ones(5, np.float32)}, f"scores has 5 numbers for {len(PIECES)} tokens"),
    (SPM, {"scores": np.full(len(PIECES), np.nan, np.float32)}, "scores has numbers that are not finite"),
    (BPE, {"add_bos_token": True}, "add_bos_token is true, but there is no tokenizer.ggml.bos_token_id"),
]


@pytest.mark.parametrize(("vocabulary", "changes", "words"), WRONG, ids=[words for _, _, words in WRONG])
def test_what_cannot_be_used(vocabulary: dict[str, Any], changes: dict[str, Any], words: str, load: Load) -> None:
    with pytest.raises((TokenizerError, CheckpointError)) as caught:
        load(vocabulary, **changes)
    assert f"m.gguf: tokenizer.ggml.{words}" in str(caught.value)
    assert "\n" not in str(caught.value)
