"""Train the story model of `weights/`: a small Llama on TinyStories, with PyTorch (needed here and nowhere else).

    python -m tools.train_story_model COMMAND --help

The corpus is small (4 million tokens), so the limit is overfitting, not compute. The recipe therefore is:

1. `prepare`  trains the tokenizer and encodes the corpora; the last 2 % of the stories are held out.
2. `search`   trains several models at once on one GPU: teachers, larger than what fits in `weights/`, and, for
              the record, models of the final size on the text alone.
3. `distill`  lets the best teachers write new stories and trains the final size to predict what the ensemble
              of teachers predicts, on the corpus and on the new stories (Hinton et al. 2015; Kim & Rush 2016).
4. `export`   writes the model with the least held-out loss in the Hugging Face layout.

Runs end at a wall-clock limit: the schedule follows the larger of the fraction of steps and that of the time.
Hidden matrices are trained with Muon (Jordan et al. 2024), the embedding and the norms with AdamW.
Only the module of the chosen command is imported: `prepare` and `report` run without PyTorch.
"""

from __future__ import annotations

import argparse
import pkgutil
from collections.abc import Sequence

__all__ = ["main"]


def parser_of_commands() -> argparse.ArgumentParser:
    """Each command says in `place` which function of `tools/story_model` runs it, as MODULE:FUNCTION."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, place: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(place=place)
        sub.add_argument("--data", required=True, metavar="FOLDER", help="the folder that prepare fills")
        return sub

    sub = command("prepare", "prepare:prepare", "train the tokenizers and encode the corpora")
    sub.add_argument("--corpus", required=True, metavar="FILE", help="stories separated by <|endoftext|>")
    sub.add_argument("--val", required=True, metavar="FILE", help="stories that are only ever scored")
    sub.add_argument("--lowercased", action="append", default=[], metavar="FILE", help="lower-cased stories")
    sub.add_argument("--tales", action="append", default=[], metavar="FILE", help="other texts")
    sub.add_argument("--vocab", action="append", type=int, default=[], metavar="N", help="tokenizer sizes to make")
    timed = [
        command("search", "training:search", "train the teachers and the small models at once"),
        command("distill", "distill:distill", "train the final size on what the best teachers predict and write"),
        command("train", "training:train_one", "train one run"),
    ]
    for sub in timed:
        sub.add_argument("--out", required=True, metavar="FOLDER", help="checkpoints and logs")
        sub.add_argument("--seconds", type=float, default=1e6, help="wall-clock limit; the schedule adapts to it")
        sub.add_argument("--max-steps", type=int, default=10**9, metavar="N")
        sub.add_argument("--compile", action="store_true", help="torch.compile each layer")
    timed[0].add_argument("--only", action="append", default=[], metavar="NAME", help="only these runs")
    timed[1].add_argument("--rounds", type=int, default=2, help="batches of stories per teacher")
    timed[1].add_argument("--stories", type=int, default=3072, help="stories in a batch")
    timed[1].add_argument("--story-length", type=int, default=512, metavar="N", help="tokens; longer ones are dropped")
    timed[2].add_argument("--run", required=True, metavar="JSON", help="the fields of the run; name is required")
    sub = command("export", "export:export", "write a trained run in the Hugging Face layout")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="where its checkpoint is")
    sub.add_argument("--name", required=True, help="the run")
    sub.add_argument("--to", required=True, metavar="FOLDER")
    sub = command("report", "report:report", "gather the logs of all runs and draw the loss curves")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="where the logs are")
    sub.add_argument("--runs", required=True, metavar="FILE", help="JSON of all logs, to write")
    sub.add_argument("--picture", required=True, metavar="FILE", help="PNG, to write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the root of the checkout."""
    args = parser_of_commands().parse_args(argv)
    pkgutil.resolve_name(f"tools.story_model.{args.place}")(args)


if __name__ == "__main__":
    main()
