"""Corpora and tokenizer of the bundled story model: read stories, restore case, train the BPE."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

__all__ = [
    "END_OF_STORY",
    "END_OF_STORY_ID",
    "read_stories",
    "restore_case",
    "save_tokenizer",
    "train_tokenizer",
    "usual_case",
]

# One token ends a story and begins the next, as in GPT-2: a file of stories then tokenizes as it stands.
END_OF_STORY = "<|endoftext|>"
END_OF_STORY_ID = 0

# Curly quotes that were decoded with the wrong code page somewhere before they reached the corpus.
_MOJIBAKE = {"â€œ": "“", "â€™": "’", "â€˜": "‘", "â€\x9d": "”", "â€“": "–", "â€”": "—", "â€¦": "…", "â€": "”"}
_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")
_SENTENCE_START = re.compile(r"(?:^|[.!?]\s+|\n\s*|(?:^|\s)[\"“])$")


def read_stories(path: Path, repair: bool = False) -> list[str]:
    """The stories of a UTF-8 file that separates them by `<|endoftext|>`, without surrounding white space.

    `repair` undoes mis-decoded quotes; leave it off for text that is to be scored.
    """
    text = path.read_text(encoding="utf-8")
    if repair:
        for broken, whole in _MOJIBAKE.items():
            text = text.replace(broken, whole)
    return [story for part in text.split(END_OF_STORY) if (story := part.strip())]


def _starts_sentence(text: str, at: int) -> bool:
    return bool(_SENTENCE_START.search(text[max(0, at - 8) : at])) or at == 0


def usual_case(stories: Iterable[str]) -> dict[str, str]:
    """Lower-case word -> the spelling it has most often inside a sentence ("lily" -> "Lily", "i" -> "I")."""
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    for text in stories:
        for m in _WORD.finditer(text):
            if not _starts_sentence(text, m.start()):
                forms[m.group().lower()][m.group()] += 1
    return {word: counts.most_common(1)[0][0] for word, counts in forms.items()}


def restore_case(text: str, usual: dict[str, str]) -> str:
    """Capitals for a lower-cased story: each word as usual, and the first letter of each sentence.

    Blank lines between paragraphs become single newlines, as most stories of the main corpus have them.
    """
    text = re.sub(r"\s*\n\s*", "\n", text)

    def cased(m: re.Match[str]) -> str:
        word = usual.get(m.group(), m.group())
        return word[0].upper() + word[1:] if _starts_sentence(text, m.start()) else word

    return _WORD.sub(cased, text)


def train_tokenizer(stories: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of `vocab_size` tokens, id 0 being `<|endoftext|>`; any string encodes.

    The separator swallows the white space beside it, so that a raw file of stories gives exactly the tokens
    the model was trained on. Encoding a prompt puts the separator in front: a story begins.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_STORY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_STORY, lstrip=True, rstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_STORY} $A",
        pair=f"{END_OF_STORY} $A {END_OF_STORY} $B",
        special_tokens=[(END_OF_STORY, END_OF_STORY_ID)],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_STORY,
        "eos_token": END_OF_STORY,
        "unk_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
