"""Train the story model of `weights/`: a small Llama on TinyStories, with `cuplama train` and nothing else.

    python -m tools.train_story_model --corpus split_tinystories_train.txt --lowercased tinystories_lower_extra.txt \
        --tales fairytaleqa_stories.txt --out runs

The corpus is small (4 million tokens), so the limit is overfitting, not compute. The recipe therefore is:

1. A tokenizer is trained on the corpus, of whose stories the last 2 % are held out.
2. Three teachers, larger than what fits in `weights/`, are trained with dropout and weight decay.
3. The teachers write new stories.
4. The model learns what the teachers predict together, on the corpus and on the new stories (Hinton et al.,
   arXiv:1503.02531; Kim & Rush, arXiv:1606.07947).

OUT/student is the model. What is there already is not made again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cuplama
from tools.story_model.prepare import TOKENIZER, prepare, write_stories
from tools.story_model.runs import CONTEXT, STUDENT, TEACHERS, VOCAB_SIZE, Run

__all__ = ["main"]

_STORIES = 6000  # that each teacher writes
_LONGEST = 512  # tokens of such a story; one that does not end in them is left out


def main(argv: Sequence[str] | None = None) -> None:
    """Make whatever is missing in the folder OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, metavar="FILE", help="stories separated by <|endoftext|>")
    parser.add_argument("--lowercased", type=Path, action="append", default=[], metavar="FILE", help="without capitals")
    parser.add_argument("--tales", type=Path, action="append", default=[], metavar="FILE", help="other texts")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--stories", type=int, default=_STORIES, metavar="N", help="that each teacher writes")
    args = parser.parse_args(argv)
    texts = args.out / "texts"
    if not (texts / TOKENIZER).exists():
        print("texts:", prepare(texts, args.corpus, args.lowercased, args.tales, VOCAB_SIZE, CONTEXT), flush=True)
    for run in TEACHERS:
        train(run, args.out)
    if not (texts / "written.txt").exists():
        stories = [s for i, run in enumerate(TEACHERS) for s in written(args.out / run.name, args.stories, i)]
        write_stories(texts / "written.txt", stories)
        print(f"written: {len(stories)} stories", flush=True)
    train(STUDENT, args.out, [args.out / run.name for run in TEACHERS])


def train(run: Run, out: Path, teachers: Sequence[Path] = ()) -> None:
    """One run of `cuplama train`, which goes on where it was stopped. Raises CalledProcessError."""
    folder, texts = out / run.name, out / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    config = out / f"{run.name}.json"
    config.write_text(json.dumps(run.config(), indent=2))
    command = [sys.executable, "-m", "cuplama", "train", "--out", folder, "--config", config]
    command += ["--tokenizer", texts / TOKENIZER / "tokenizer.json", "--eval-data", texts / "held.txt"]
    command += [word for name in run.texts for word in ("--data", texts / f"{name}.txt")]
    command += [word for teacher in teachers for word in ("--teacher", teacher)]
    if (folder / "training").exists():
        command.append("--resume")
    start = time.perf_counter()
    subprocess.run([*map(str, command), *run.arguments()], check=True)
    print(f"{run.name}: {time.perf_counter() - start:.0f} s", flush=True)


def written(teacher: Path, count: int, seed: int) -> list[str]:
    """Stories that a teacher tells, those that come to an end."""
    with cuplama.load(teacher, context=_LONGEST, cache_tokens=512 * _LONGEST) as model:
        found = model.generate([""] * count, max_tokens=_LONGEST - 1, temperature=1.0, top_p=0.98, seed=seed)
    return [completion.text.strip() for completion in found if completion.finish_reason == "stop"]


if __name__ == "__main__":
    main()
