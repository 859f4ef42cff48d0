"""Train one run, or several at once on one GPU, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from tools.story_model.data import Data, batches, story_texts
from tools.story_model.model import Story, ensemble, load_model
from tools.story_model.optimizer import Optimizer, schedule
from tools.story_model.report import summary
from tools.story_model.runs import SEARCH, Run
from tools.story_model.score import autocast, device_of, nats

__all__ = ["Trainer", "search", "train", "train_one", "train_together"]


class Trainer:
    """A run in training: its model, its teachers and what it reads.

    compile_layers: torch.compile each layer.
    """

    def __init__(self, run: Run, data_folder: Path, out: Path, compile_layers: bool) -> None:
        self.run, self.device = run, device_of()
        torch.manual_seed(run.seed)
        torch.set_float32_matmul_precision("high")
        self.data = Data.load(data_folder, run.vocab)
        self.texts = {name: story_texts(self.data.parts[name]) for name in ("held", "val")}
        corpus = self.data.train(run)
        self.corpus_tokens = len(corpus[0])
        self.model = Story(run).to(self.device)
        self.scorer = Story(replace(run, dropout=0.0)).to(self.device).eval()
        # The same weights; never compiled, for its many shapes.
        self.scorer.load_state_dict(self.model.state_dict(), assign=True)
        teachers = [load_model(out / f"{name}.pt", self.device) for name in run.teachers]
        if compile_layers:
            # One layer at a time: quick to compile, and it fuses all that is between the matrix products.
            torch._dynamo.config.suppress_errors = True
            for layer in [layer for m in (self.model, *teachers) for layer in m.layers]:
                layer.compile(dynamic=False)
        self.teach = ensemble(teachers) if teachers else None
        self.optimizer = Optimizer(self.model, run)
        self._sources = [batches(self.data, run, corpus)]
        if run.written:
            arrays = np.load(out / "written.npz")
            written = (arrays["ids"], arrays["offsets"])
            self._sources.append(batches(self.data, replace(run, bpe_dropout=0.0), written))
        self._choose = np.random.default_rng(run.seed + 1)

    def bits(self, name: str) -> float:
        """Bits per byte of the texts `held` or `val`."""
        with autocast(self.device):
            total: float = nats(self.scorer, self.texts[name], self.run.context, self.device)
        return total / math.log(2) / self.data.bytes[name]

    def step(self, scale: float) -> Tensor:
        """One batch, at `scale` times the run's learning rates. Returns the loss on its text, in nats per token."""
        corpus_batch = not self.run.written or self._choose.random() >= self.run.written
        rows = torch.from_numpy(next(self._sources[0 if corpus_batch else 1])).to(self.device, torch.int64)
        ids, goal = rows[:, :-1], rows[:, 1:].flatten()
        with autocast(self.device):
            logp = self.model(ids).flatten(0, 1).float().log_softmax(-1)
            loss = F.nll_loss(logp, goal)
            objective = loss
            if self.teach is not None:
                with torch.no_grad():
                    taught = self.teach(ids).flatten(0, 1).exp_()
                soft = -(taught * logp).sum(-1).mean()
                share = self.run.text_loss if corpus_batch else 0.0
                objective = share * loss + (1 - share) * soft
        objective.backward()
        self.optimizer.step(scale)
        return loss.detach()


def train(run: Run, data_folder: Path, out: Path, seconds: float, compile_layers: bool, max_steps: int) -> None:
    """Train `run`; write out/NAME.pt (the state with the least held-out loss) and out/NAME.json (the log)."""
    began = time.monotonic()
    trainer = Trainer(run, data_folder, out, compile_layers)
    steps = min(max_steps, int(run.epochs * trainer.corpus_tokens / run.batch))
    history: list[dict[str, float]] = []
    best, state, losses, origin = math.inf, {}, [], 0.0
    step, progress, next_eval = 0, 0.0, 0.06
    while progress < 1:
        losses.append(trainer.step(schedule(progress)))
        step += 1
        if step == 3 or step % 10 == 0:  # also bounds how far the host runs ahead
            losses[-1].item()
            origin = origin or time.monotonic()
        limit = began + seconds
        spent = (time.monotonic() - origin) / max(limit - origin, 1e-3) if origin else 0.0
        progress = max(step / steps, spent)
        if progress >= min(next_eval, 1):
            held = trainer.bits("held")
            history.append({
                "step": step,
                "tokens": step * run.batch,
                "seconds": round(time.monotonic() - began, 1),
                "train_nats": round(float(torch.stack(losses).mean()), 4),
                "held_bits": round(held, 5),
            })  # fmt: skip
            losses, next_eval = [], next_eval + 0.06
            if held < best:
                best, state = held, {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(state)
    result = {
        "run": asdict(run),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "held_bits_per_byte": round(best, 5),
        "val_bits_per_byte": round(trainer.bits("val"), 5),
        "epochs": round(step * run.batch / trainer.corpus_tokens, 2),
        "history": history,
    }
    torch.save({"run": asdict(run), "state": state}, out / f"{run.name}.pt")
    (out / f"{run.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(summary(result), flush=True)


def train_together(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Each run in its own process on the one GPU; a run that fails prints its last lines and is left out."""
    children = []
    for run in runs:
        command = [sys.executable, "-m", "tools.train_story_model", "train", "--data", args.data, "--out", args.out]
        command += ["--run", json.dumps(asdict(run)), "--seconds", str(args.seconds)]
        command += ["--max-steps", str(args.max_steps), *(["--compile"] if args.compile else [])]
        log = (Path(args.out) / f"{run.name}.log").open("w")
        children.append((run, subprocess.Popen(command, stdout=log, stderr=log)))
    for run, child in children:
        code = child.wait()
        lines = (Path(args.out) / f"{run.name}.log").read_text().splitlines()
        print("\n".join(lines[-1:] if code == 0 else [f"{run.name} FAILED ({code})", *lines[-8:]]), flush=True)


def train_one(args: argparse.Namespace) -> None:
    """The command `train`: one run, given as JSON."""
    run = Run(**json.loads(args.run))
    train(run, Path(args.data), Path(args.out), args.seconds, args.compile, args.max_steps)


def search(args: argparse.Namespace) -> None:
    """The command `search`: the teachers and the small models, all at once."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    train_together([run for run in SEARCH if not args.only or run.name in args.only], args)
