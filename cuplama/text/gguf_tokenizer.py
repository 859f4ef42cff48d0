"""The tokenizer of a GGUF file as the `tokenizers` object, special tokens and chat templates of a model folder.

"gpt2" is a byte-level vocabulary with its merges. "llama" is a SentencePiece vocabulary with scores: of neighbours
whose text together is a token those with the highest score are joined first, which is a list of merges in the order of
the scores; characters that no token has are spelled by bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CuplamaError, TokenizerError
from ..gguf import GGUF
from .gguf_splits import SPLITS, Split
from .tokenizer_files import TokenizerFiles

if TYPE_CHECKING:
    import tokenizers

__all__ = ["has_tokenizer", "read_gguf", "special_ids", "stop_ids"]

_log = logging.getLogger("cuplama")
_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type
# What a special token is called in a model folder -> its key here. The third is spelled so in the format.
_SPECIAL_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "sep": "seperator_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    "cls": "cls_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
_NAMED = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_SPM_DEFAULTS = {"bos": 1, "eos": 2, "unk": 0}  # where a SentencePiece file does not say
# Texts of tokens that end a turn or a text, whether or not the file says so. Older files name only one of them.
_ENDS = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
        "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
    }
)  # fmt: skip
# Phi-3's own tokens that leave the blanks behind them; its other control tokens take them.
_KEEP_BLANKS = frozenset({"<unk>", "<s>", "<|endoftext|>"})


@dataclass(frozen=True, eq=False)
class _Vocabulary:
    """The tokens of a file. Every method raises CheckpointError or TokenizerError naming file and key."""

    gguf: GGUF

    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        return self.gguf.get(_PREFIX + key, kind, default)

    def refuse(self, key: str, problem: str) -> TokenizerError:
        return TokenizerError(f"{self.gguf.path}: {_PREFIX}{key} {problem}")

    @cached_property
    def model(self) -> str:
        found: str = self.get("model", str, "none")
        return found

    @cached_property
    def tokens(self) -> Sequence[str]:
        """By id; one without a text gets one that nothing spells."""
        found: list[str] = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.get("tokens", list, []))]
        if not found:
            raise self.refuse("tokens", "is missing or empty")
        if len(self.ids(found)) != len(found):
            twice = next(token for i, token in enumerate(found) if self.ids(found)[token] != i)
            raise self.refuse("tokens", f"has {twice!r:.80} twice")
        return found

    @staticmethod
    def ids(tokens: Sequence[str]) -> dict[str, int]:
        return {token: i for i, token in enumerate(tokens)}

    @cached_property
    def types(self) -> Sequence[int]:
        return self._numbers("token_type", _NORMAL)

    @cached_property
    def scores(self) -> Sequence[float]:
        return self._numbers("scores", 0)

    def _numbers(self, key: str, absent: int) -> Sequence[Any]:
        """A number for each token. Scores that are no numbers would make an order that is none."""
        values = self.get(key, np.ndarray)
        if values is None:
            return [absent] * len(self.tokens)
        if len(values) < len(self.tokens):
            raise self.refuse(key, f"has {len(values)} numbers for {len(self.tokens)} tokens")
        if not np.isfinite(values).all():
            raise self.refuse(key, "has numbers that are not finite")
        found: list[Any] = values.tolist()
        return found

    @cached_property
    def special(self) -> Mapping[str, int]:
        """Ids by what they are for. One beyond the vocabulary counts as absent."""
        found = dict(_SPM_DEFAULTS) if self.model == "llama" else {}
        for name, key in _SPECIAL_KEYS.items():
            id = self.get(key, int)
            if id is not None and not 0 <= id < len(self.tokens):
                _log.warning("%s: %s%s = %d is no token and counts as absent", self.gguf.path, _PREFIX, key, id)
            elif id is not None:
                found[name] = id
        return {name: id for name, id in found.items() if id < len(self.tokens)}


def has_tokenizer(gguf: GGUF) -> bool:
    """Whether the file has a vocabulary at all."""
    return _Vocabulary(gguf).model not in ("none", "no_vocab")


def special_ids(gguf: GGUF) -> Mapping[str, int]:
    """The ids of bos, eos, unk, pad, sep, cls, mask, eot and eom, those that there are."""
    return _Vocabulary(gguf).special if has_tokenizer(gguf) else {}


def stop_ids(gguf: GGUF) -> list[int]:
    """The ids that end a text: those of eos, eot and eom, and of tokens with a text that always means it."""
    if not has_tokenizer(gguf):
        return []
    vocabulary = _Vocabulary(gguf)
    named = [vocabulary.special[name] for name in ("eos", "eot", "eom") if name in vocabulary.special]
    ends = {i for i, token in enumerate(vocabulary.tokens) if token in _ENDS}
    by_text = {vocabulary.tokens[i]: i for i in ends}
    if "<|return|>" in by_text and "<|call|>" in by_text:  # there a message's end is not the answer's
        ends.discard(by_text.get("<|end|>", -1))
    return list(dict.fromkeys([*named, *sorted(ends)]))


def read_gguf(gguf: GGUF) -> TokenizerFiles:
    """Tokenizer, special tokens and chat templates of a file.

    Raises TokenizerError and CheckpointError naming the file and the key that is missing or not supported.
    """
    vocabulary = _Vocabulary(gguf)
    build = _MODELS.get(vocabulary.model)
    if not has_tokenizer(gguf):
        raise TokenizerError(f"{gguf.path} has no tokenizer ({_PREFIX}model)")
    if build is None:
        raise vocabulary.refuse("model", f"is {vocabulary.model!r:.80}; supported: {', '.join(_MODELS)}")
    try:
        backend, bos = build(vocabulary)
    except CuplamaError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower: a merge of what is no token
        raise vocabulary.refuse("merges", f"cannot be used: {' '.join(str(error).split())}") from error
    backend.add_tokens(_added(vocabulary))
    _put_around(backend, vocabulary, bos)
    names = {f"{name}_token": vocabulary.tokens[id] for name, id in vocabulary.special.items() if name in _NAMED}
    return TokenizerFiles(backend, names, _chat_templates(gguf))


def _byte_level(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """(the tokenizer, whether a text begins with BOS where the file does not say)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = vocabulary.get("pre", str)
    split: Split | None = SPLITS.get(name or "default")
    if split is None:
        raise vocabulary.refuse("pre", f"is {name!r:.80}; supported: {', '.join(SPLITS)}")
    if name is None:
        _log.warning(
            "%s: %spre is missing: text is cut the default way, which may not be the model's",
            vocabulary.gguf.path,
            _PREFIX,
        )
    merges, lines = [], vocabulary.get("merges", list)
    if lines is None:
        raise vocabulary.refuse("merges", "is missing")
    for i, line in enumerate(lines):
        at = line.find(" ", 1)
        if at < 0:
            raise vocabulary.refuse(f"merges[{i}]", f"is {line!r:.80}; it must be two pieces and a blank between them")
        merges.append((line[:at], line[at + 1 :]))
    backend = Tokenizer(models.BPE(_spelled(vocabulary), merges, ignore_merges=split.whole))
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, split.bos


def _sentence_piece(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = vocabulary.special.get("unk")
    backend = Tokenizer(
        models.BPE(
            _spelled(vocabulary),
            _merges_by_score(vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blanks, prefixed = normalizers.Replace(" ", "▁"), vocabulary.get("add_space_prefix", bool, True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks] if prefixed else [blanks])
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*stages, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    return backend, True


_MODELS: Mapping[str, Callable[[_Vocabulary], tuple[tokenizers.Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentence_piece,
}


def _spelled(vocabulary: _Vocabulary) -> dict[str, int]:
    """The tokens that there are: what fills a vocabulary up to the rows of the embedding is none."""
    types = vocabulary.types
    return {
        token: i for i, token in enumerate(vocabulary.tokens) if types[i] != _UNUSED or not token.startswith("[PAD")
    }


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a token of two, those of the highest score first."""
    kinds = vocabulary.types
    ids = {token: i for i, token in enumerate(vocabulary.tokens) if kinds[i] not in (_UNKNOWN, _CONTROL, _BYTE)}
    found: list[tuple[float, str, str]] = []
    for token, i in ids.items():
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        ways = sorted((ids[a], ids[b], a, b) for a, b in halves if a in ids and b in ids)
        found += [(-vocabulary.scores[i], a, b) for _, _, a, b in ways]
    found.sort(key=lambda way: way[0])  # stable: of equal scores the lower id comes first
    return [(a, b) for _, a, b in found]


def _added(vocabulary: _Vocabulary) -> list[tokenizers.AddedToken]:
    """Tokens that are found in a text before anything else: control tokens, and what the model's makers added."""
    import tokenizers

    name = vocabulary.gguf.get("general.name", str, "").lower()
    strips = vocabulary.model == "llama" and ("phi-3" in name or "phi3" in name)
    found = []
    for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=False):
        special = kind in (_CONTROL, _UNKNOWN) or text in _ENDS
        if special or kind == _USER:
            rstrip = strips and text not in _KEEP_BLANKS
            found.append(tokenizers.AddedToken(text, special=special, normalized=False, rstrip=rstrip))
    return found


def _put_around(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary, bos: bool) -> None:
    """The post-processor: BOS in front of a text and EOS behind it, where the file says so."""
    from tokenizers import processors

    wanted = {"bos": vocabulary.get("add_bos_token", bool, bos), "eos": vocabulary.get("add_eos_token", bool, False)}
    around = []
    for name in (name for name, adds in wanted.items() if adds):
        if name not in vocabulary.special:
            if vocabulary.get(f"add_{name}_token", bool) is None:
                continue
            raise vocabulary.refuse(f"add_{name}_token", f"is true, but there is no {_PREFIX}{name}_token_id")
        id = vocabulary.special[name]
        around.append({"id": name, "ids": [id], "tokens": [vocabulary.tokens[id]]})
    names = [entry["id"] for entry in around]
    if names:
        single = [*(["bos"] if "bos" in names else []), "$A", *(["eos"] if "eos" in names else [])]
        pair = [*single, *(["bos:1"] if "bos" in names else []), "$B:1", *(["eos:1"] if "eos" in names else [])]
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=around)


def _chat_templates(gguf: GGUF) -> dict[str, str]:
    """Name -> source of the default one and of those that have names."""
    found = {}
    key = "tokenizer.chat_template"
    for name in gguf.get(f"{key}s", list, []):
        text = gguf.get(f"{key}.{name}", str)
        if text is None:
            raise TokenizerError(f"{gguf.path}: {key}.{name} is missing, though {key}s names it")
        found[name] = text
    default = gguf.get(key, str)
    return found if default is None else {"default": default, **found}
