"""Let the best teachers write stories, and train the final sizes on what their ensemble predicts."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tools.story_model.data import Data, Ids, story_texts
from tools.story_model.model import ensemble, load_model
from tools.story_model.runs import STUDENTS, TEACHERS
from tools.story_model.score import autocast, device_of, nats
from tools.story_model.training import train_together

__all__ = ["distill"]


def best_teachers(out: Path) -> list[str]:
    """Names of the teachers with the least held-out loss, the best first."""
    results = [json.loads(p.read_text()) for p in out.glob("teacher-*.json")]
    results.sort(key=lambda r: float(r["held_bits_per_byte"]))
    return [r["run"]["name"] for r in results[:TEACHERS]]


def distill(args: argparse.Namespace) -> None:
    """The command `distill`; what the teachers write is kept as out/written.npz."""
    began, out, device = time.monotonic(), Path(args.out), device_of()
    names = best_teachers(out)
    if not names:
        raise SystemExit(f"{out}: no teacher-*.json there; run search first")
    models = [load_model(out / f"{name}.pt", device) for name in names]
    data = Data.load(Path(args.data), models[0].run.vocab)
    generator = torch.Generator(device).manual_seed(1)
    written: list[Ids] = []
    with autocast(device):
        for part in ("held", "val"):
            score = nats(ensemble(models), story_texts(data.parts[part]), models[0].run.context, device)
            print(f"ensemble of {', '.join(names)}: {part} {score / math.log(2) / data.bytes[part]:.4f}", flush=True)
        for _ in range(args.rounds):
            for model in models:
                written += model.write(args.stories, args.story_length, generator)
    lengths = np.array([len(w) for w in written])
    print(f"{len(written)} stories written, {lengths.sum()} tokens, {time.monotonic() - began:.0f} s", flush=True)
    np.savez(out / "written.npz", ids=np.concatenate(written), offsets=np.concatenate([[0], np.cumsum(lengths)]))
    for story in written[:2]:
        print("|", data.tokenizer.decode(story.tolist())[:600].replace("\n", " / "))
    del models
    torch.cuda.empty_cache()
    args.seconds -= time.monotonic() - began
    train_together([replace(run, teachers=tuple(names)) for run in STUDENTS], args)
