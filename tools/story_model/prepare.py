"""The texts that the story model is trained on, each a file of stories, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.story_model.tokenizer import (
    END_OF_STORY,
    read_stories,
    restore_case,
    save_tokenizer,
    train_tokenizer,
    usual_case,
)

__all__ = ["TOKENIZER", "prepare", "write_stories"]

TOKENIZER = "tokenizer"
"""The folder of the tokenizer, beside the texts."""
_HELD = 50  # The last of this many stories is held out, to choose among runs.


def prepare(
    folder: Path, corpus: Path, lowercased: Sequence[Path], tales: Sequence[Path], vocab_size: int, context: int
) -> Mapping[str, int]:
    """Write corpus.txt, held.txt, extra.txt and tales.txt, and the tokenizer, to ``folder``; stories of each.

    corpus: stories separated by `<|endoftext|>`, the last 2 % of which are held out; lowercased: more of them without
    capitals, which are put back; tales: other texts; context: what the tokenizer's settings say.
    """
    main = read_stories(corpus, repair=True)
    cut = len(main) - max(1, len(main) // _HELD)
    main, held = main[:cut], main[cut:]
    usual = usual_case(main)
    texts = {
        "corpus": main,
        "held": held,
        "extra": [restore_case(story, usual) for path in lowercased for story in read_stories(path, repair=True)],
        "tales": [story for path in tales for story in read_stories(path, repair=True)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, stories in texts.items():
        write_stories(folder / f"{name}.txt", stories)
    save_tokenizer(train_tokenizer(main, vocab_size), folder / TOKENIZER, context)
    return {name: len(stories) for name, stories in texts.items()}


def write_stories(path: Path, stories: Sequence[str]) -> None:
    """A file of stories: each begins with the separator, and the file ends with it."""
    path.write_text("".join(END_OF_STORY + story for story in stories) + END_OF_STORY, encoding="utf-8")
