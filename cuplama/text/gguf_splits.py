"""How a byte-level vocabulary of a GGUF file wants text cut before its merges: by ``tokenizer.ggml.pre``, a table.

A file names the cut and does not hold it. The expressions are those of the models' own tokenizer.json; which names mean
the same is llama.cpp's (ggml-org/llama.cpp, src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["SPLITS", "Split"]


@dataclass(frozen=True)
class Split:
    """One way to cut.

    patterns: regular expressions, each of which cuts what the ones before it have left; whole: whether a piece that is
    a token is taken as it is, without its merges; bos: whether a text begins with BOS where the file does not say;
    nfc: whether the text is brought to Unicode's composed form first.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    bos: bool = False
    nfc: bool = False


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_THREE_DIGITS = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"  # Llama 3
_ONE_DIGIT = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"  # Qwen 2
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATED = r" ?[^(\s|.,!?…。，、।۔،)]+"  # Bloom

_DIGITS_ALONE = Split((r"\p{N}", _GPT2))
_ROWS: tuple[tuple[str, Split], ...] = (
    ("default", Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        Split((_THREE_DIGITS,), whole=True, bos=True),
    ),
    ("dbrx smaug-bpe glm4 chatglm-bpe", Split((_THREE_DIGITS,))),
    ("qwen2", Split((_ONE_DIGIT,), nfc=True)),
    ("deepseek-r1-qwen stablelm2 megrez kormo hunyuan solar-open grok-2", Split((_ONE_DIGIT,))),
    (
        "gpt-2 phi-2 mpt olmo jais trillion exaone4 gigachat a.x-4.0 mellum granite-docling roberta-bpe",
        Split((_GPT2,)),
    ),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", _DIGITS_ALONE),
    ("falcon", Split((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    ("bloom poro-chat gpt3-finnish", Split((_PUNCTUATED,))),
    ("viking", Split((_PUNCTUATED, r"\p{N}"))),
    ("tekken", Split((rf"{_WORDS[0]}|{_WORDS[1]}|\p{{N}}|{_CASED_REST}",), whole=True, bos=True)),
    (
        "gpt-4o llama4 kanana2",
        Split((rf"{_WORDS[0]}{_ENDINGS}?|{_WORDS[1]}{_ENDINGS}?|\p{{N}}{{1,3}}|{_CASED_REST}",)),
    ),
    ("deepseek-coder", Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"))),
    (
        "deepseek-v3 hunyuan-dense joyai-llm",
        Split(
            (
                r"\p{N}{1,3}",
                r"[一-龥぀-ゟ゠-ヿ]+",
                r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
                r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
            )
        ),
    ),
    (
        "seed-coder",
        Split(
            (rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)
        ),
    ),
)
SPLITS: Mapping[str, Split] = {name: split for names, split in _ROWS for name in names.split()}
"""By ``tokenizer.ggml.pre``."""
