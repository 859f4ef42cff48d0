"""The part of the story model's training that needs no torch: its commands, its corpora and how they are cut."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.paths import ROOT
from tools.story_model.data import Data, batches, join, rows, story_texts, windows
from tools.story_model.runs import ALL_RUNS, SEARCH, STUDENTS, Run
from tools.story_model.tokenizer import END_OF_STORY, END_OF_STORY_ID
from tools.train_story_model import main, parser_of_commands

STORIES = [f"Once, Lily saw {n} cats. The cats ran to Lily and Lily ran home." for n in range(100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` writes for a corpus of a hundred stories."""
    out = tmp_path_factory.mktemp("data")
    (out / "corpus.txt").write_text(END_OF_STORY.join(STORIES))
    (out / "val.txt").write_text("A dog ran.")
    (out / "lower.txt").write_text("then lily sat. she ran.")
    main(["prepare", "--data", str(out), "--corpus", str(out / "corpus.txt"), "--val", str(out / "val.txt"),
          "--lowercased", str(out / "lower.txt"), "--vocab", "300"])  # fmt: skip
    return out


@pytest.mark.parametrize(
    ("command", "rest"),
    [
        ("prepare", ["--corpus", "c", "--val", "v"]),
        ("search", ["--out", "o"]),
        ("distill", ["--out", "o"]),
        ("train", ["--out", "o", "--run", "{}"]),
        ("export", ["--out", "o", "--name", "n", "--to", "t"]),
        ("report", ["--out", "o", "--runs", "r", "--picture", "p"]),
    ],
)
def test_a_command_has_its_function(command: str, rest: list[str]) -> None:
    module, function = parser_of_commands().parse_args([command, "--data", "d", *rest]).place.split(":")
    tree = ast.parse((ROOT / "tools" / "story_model" / f"{module}.py").read_text(encoding="utf-8"))
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
    assert [[a.arg for a in f.args.args] for f in found] == [["args"]]


def test_the_last_stories_are_held_out_and_capitals_restored(folder: Path) -> None:
    data = Data.load(folder, 300)
    main_ids, offsets = data.parts["main"]
    assert len(offsets) - 1 == 98
    assert data.tokenizer.decode(main_ids[: offsets[1]].tolist()) == STORIES[0]
    held = [data.tokenizer.decode(ids.tolist()) for ids in story_texts(data.parts["held"])]
    assert held == STORIES[98:]
    assert data.bytes["held"] == sum(map(len, STORIES[98:]))
    assert data.tokenizer.decode(data.parts["extra"][0].tolist()) == "Then Lily sat. She ran."
    with_extra, without = (data.train(Run("r", extra=extra)) for extra in (True, False))
    assert len(with_extra[1]) == len(without[1]) + 1
    assert len(with_extra[0]) == with_extra[1][-1]


def test_half_of_the_rows_begin_with_a_story(folder: Path) -> None:
    ids, offsets = Data.load(folder, 300).parts["main"]
    cut = rows(ids, offsets, 16, np.random.default_rng(0))
    assert cut.shape[1] == 17
    assert (len(cut) + 1) // 2 <= np.count_nonzero(cut[:, 0] == END_OF_STORY_ID) < len(cut)


def test_batches_are_those_of_the_seed(folder: Path) -> None:
    data = Data.load(folder, 300)
    run = Run("r", context=16, batch=64)
    first, again, other, dropped = (
        next(batches(data, r, data.train(r))) for r in (run, run, replace(run, seed=1), replace(run, bpe_dropout=0.5))
    )
    assert first.shape == other.shape == dropped.shape == (4, 17)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_dropout_of_merges_makes_tokens_shorter(folder: Path) -> None:
    data = Data.load(folder, 300)
    run = Run("r", context=16, batch=16, extra=False)
    text = {}
    for dropout in (0.0, 1.0):
        source = batches(data, replace(run, bpe_dropout=dropout), data.train(run))
        text[dropout] = len(data.tokenizer.decode(np.concatenate([next(source)[0] for _ in range(20)]).tolist()))
    assert text[1.0] < 0.9 * text[0.0]


@pytest.mark.parametrize("total", [1, 2, 10, 11, 37])
def test_every_token_but_the_first_is_scored_once(total: int) -> None:
    scored = [t for begin, end, first in windows(total, 10, 5) for t in range(first, end)]
    assert scored == list(range(1, total))
    assert all(0 < end - begin <= 10 and begin < first for begin, end, first in windows(total, 10, 5))


def test_joined_parts_keep_their_stories() -> None:
    a = (np.array([5, 0, 6, 0], np.uint16), np.array([0, 2, 4]))
    b = (np.array([7, 8, 0], np.uint16), np.array([0, 3]))
    ids, offsets = join([a, b])
    assert ids.tolist() == [5, 0, 6, 0, 7, 8, 0]
    assert offsets.tolist() == [0, 2, 4, 7]


def test_names_of_runs_are_distinct() -> None:
    assert len(ALL_RUNS) == len(SEARCH) + len(STUDENTS)
