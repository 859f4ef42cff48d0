"""The story model's texts and runs: what is there before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cuplama.models.config import parse_config
from tools.story_model.prepare import TOKENIZER, prepare
from tools.story_model.runs import CONTEXT, STUDENT, TEACHERS, VOCAB_SIZE
from tools.story_model.tokenizer import END_OF_STORY, END_OF_STORY_ID

STORIES = [f"Once, Lily saw {n} cats. The cats ran to Lily and Lily ran home." for n in range(100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` writes for a corpus of a hundred stories."""
    out = tmp_path_factory.mktemp("data")
    (out / "corpus.in").write_text(END_OF_STORY.join(STORIES))
    (out / "lower.in").write_text("then lily sat. she ran.")
    prepare(out / "texts", out / "corpus.in", [out / "lower.in"], [], 300, 64)
    return out / "texts"


def stories_of(path: Path) -> list[str]:
    return [story for story in path.read_text(encoding="utf-8").split(END_OF_STORY) if story]


def test_the_last_stories_are_held_out_and_capitals_restored(folder: Path) -> None:
    assert stories_of(folder / "corpus.txt") == STORIES[:98]
    assert stories_of(folder / "held.txt") == STORIES[98:]
    assert stories_of(folder / "extra.txt") == ["Then Lily sat. She ran."]


def test_a_file_of_stories_is_stories_between_separators(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER / "tokenizer.json"))
    ids = tokenizer.encode((folder / "held.txt").read_text(encoding="utf-8"), add_special_tokens=False).ids
    assert ids[0] == ids[-1] == END_OF_STORY_ID
    assert ids.count(END_OF_STORY_ID) == 3
    first = ids[1 : ids.index(END_OF_STORY_ID, 1)]
    assert tokenizer.decode(first) == STORIES[98]


def test_student_and_teachers_share_a_vocabulary() -> None:
    configs = [parse_config(json.loads(json.dumps(run.config()))) for run in (STUDENT, *TEACHERS)]
    assert {config.vocab_size for config in configs} == {VOCAB_SIZE}
    assert {config.context for config in configs} == {CONTEXT}


def test_names_of_runs_are_distinct() -> None:
    assert len({run.name for run in (STUDENT, *TEACHERS)}) == 1 + len(TEACHERS)
