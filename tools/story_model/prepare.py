"""Train the tokenizers and encode the corpora. Needs no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from tools.story_model.runs import Run
from tools.story_model.tokenizer import encode, read_stories, restore_case, save_tokenizer, train_tokenizer, usual_case

__all__ = ["prepare"]


def prepare(args: argparse.Namespace) -> None:
    """The command `prepare`: a tokenizer and data.npz per vocabulary, and main.json and bytes.json for all of them.

    The last 2 % of the corpus's stories are held out.
    """
    out = Path(args.data)
    main = read_stories(Path(args.corpus), repair=True)
    held_count = max(1, len(main) // 50)
    main, held = main[:-held_count], main[-held_count:]
    usual = usual_case(main)
    texts = {
        "main": main,
        "held": held,
        "val": read_stories(Path(args.val)),
        "extra": [restore_case(s, usual) for p in args.lowercased for s in read_stories(Path(p), repair=True)],
        "tales": [s for p in args.tales for s in read_stories(Path(p), repair=True)],
    }
    for vocab in args.vocab:
        tokenizer = train_tokenizer(main, vocab)
        save_tokenizer(tokenizer, out / f"vocab{vocab}", Run("").context)
        parts = {name: encode(tokenizer, stories) for name, stories in texts.items() if stories}
        arrays: dict[str, Any] = {
            f"{n}_{k}": v for n, part in parts.items() for k, v in zip(("ids", "offsets"), part, strict=True)
        }
        np.savez(out / f"vocab{vocab}" / "data.npz", **arrays)
        print(vocab, {name: len(ids) for name, (ids, _) in parts.items()})
    (out / "main.json").write_text(json.dumps(main, ensure_ascii=False))
    (out / "bytes.json").write_text(json.dumps({n: sum(len(s.encode()) for s in t) for n, t in texts.items()}))
