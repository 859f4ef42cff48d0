"""Tiny Shakespeare from nothing, beside torch: ``python -m benchmarks.tinyshakespeare TEXT --out DIR``.

A small Llama (6 layers of 384) in float32 on the first nine tenths of TEXT, with a byte-level tokenizer that is trained
on it: ``cuplama train``'s steps, and transformers' model with torch.optim.AdamW from the same first weights, on the
same batches, with the same learning rates and clipping. What differs is rounding, which training amplifies. Writes both
loss curves to DIR/tinyshakespeare.png, all numbers to DIR/tinyshakespeare.json, and a text that our model writes to
DIR/tinyshakespeare.txt. --without-torch leaves torch out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import cuplama
from benchmarks.training import torch_model, torch_optimizer, write_results
from cuplama.lab import report
from cuplama.models.export import checkpoint_tensors
from cuplama.text.tokenizer import Tokenizer as OurTokenizer
from cuplama.train import Batch, TrainingSettings
from cuplama.train.data import TokenData
from cuplama.train.initial import initial_weights
from cuplama.train.log import read_log
from cuplama.train.origin import Origin, new_model
from cuplama.train.run import Hooks, Job, run_training
from cuplama.train.windows import Windows, evaluation_batches

PROMPT, TOKENS = "ROMEO:", 400
SMOOTHED = 20  # steps of the curves' running mean
Rows = list[dict[str, Any]]


def config_of(args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """A Llama of the size that char-rnn and nanoGPT's examples have."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.width,
        "intermediate_size": args.width * 8 // 3,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.width // 64,
        "num_key_value_heads": args.width // 64,
        "head_dim": 64,
        "vocab_size": vocab_size,
        "max_position_embeddings": args.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }


def prepare(args: argparse.Namespace) -> None:
    """Write the text in two parts, the tokenizer and the config to the folder."""
    text = args.text.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    (args.out / "train.txt").write_text(text[:cut], encoding="utf-8")
    (args.out / "val.txt").write_text(text[cut:], encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text[:cut]], trainer)
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = config_of(args, tokenizer.get_vocab_size())
    (args.out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def settings_of(args: argparse.Namespace) -> TrainingSettings:
    """Those of nanoGPT's example, and what the command line says."""
    return TrainingSettings(
        steps=args.steps, batch_size=args.rows, context=args.context, lr=args.lr, warmup=min(100, args.steps // 10),
        beta2=0.99, dtype="float32", device=args.device, eval_every=args.eval_every, save_every=0,
    )  # fmt: skip


# ---- our program -----------------------------------------------------------------------------------------------------


def train_ours(args: argparse.Namespace, settings: TrainingSettings) -> dict[str, Any]:
    """Train as ``cuplama train`` does; its log."""
    out = args.out / "model"
    if out.exists():
        raise SystemExit(f"{out} is there already: give another folder")
    job = Job(
        settings, [args.out / "train.txt"], out, args.out / "config.json", args.out / "tokenizer.json",
        evaluation=[args.out / "val.txt"],
    )  # fmt: skip
    device: list[str] = []
    start = time.perf_counter()
    run_training(job, Hooks(began=lambda where, what, step: device.append(f"{where}; {what}")))
    rows = list(read_log(out / "log.jsonl"))
    return {"device": device[0], "seconds": round(time.perf_counter() - start, 1), "speed": speed(rows), "steps": rows}


def speed(rows: Rows) -> float:
    """Tokens per second: the median over the steps."""
    return float(np.median([row["tokens_per_second"] for row in rows]))


def write_text(args: argparse.Namespace) -> str:
    """What the trained model writes after a name."""
    with cuplama.load(args.out / "model", device=args.device) as model:
        done = model.generate(PROMPT, max_tokens=TOKENS, temperature=0.8, seed=1, ignore_eos=True)
    text = PROMPT + done.text
    (args.out / "tinyshakespeare.txt").write_text(text + "\n", encoding="utf-8")
    return text


# ---- torch -----------------------------------------------------------------------------------------------------------


def write_first_weights(origin: Origin, seed: int, folder: Path) -> None:
    """The model folder that torch begins with."""
    folder.mkdir(exist_ok=True)
    arrays = {name: weight.array() for name, weight in initial_weights(origin.config, seed).items()}
    tensors = {name: np.ascontiguousarray(array) for name, array in checkpoint_tensors(origin.config, arrays)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(origin.config.raw), encoding="utf-8")


def tokens_of(args: argparse.Namespace, origin: Origin, name: str) -> TokenData:
    """The tokens that our program made of a text, or new ones of the same text."""
    tokenizer = OurTokenizer.load(args.out / "tokenizer.json")
    path, vocab_size = args.out / f"{name}.txt", origin.config.vocab_size
    return TokenData.build([path], tokenizer, args.out / "tokens", origin.marks, vocab_size, name=name)


class Torch:
    """transformers' model and torch's optimizer, on our batches."""

    def __init__(self, folder: Path, settings: TrainingSettings, device: str) -> None:
        import torch

        self.torch, self.settings, self.device = torch, settings, device
        torch.set_float32_matmul_precision("highest")
        self.model = torch_model(str(folder), "float32", device)
        self.optimizer = torch_optimizer(
            self.model, settings.lr, fused=device == "cuda", betas=(settings.beta1, settings.beta2)
        )

    def loss(self, batch: Batch) -> Any:
        """The weighted losses of a batch, whose rows are each one piece of text."""
        torch, length = self.torch, self.settings.row_length(1 << 30)
        rows = batch.rows // length
        assert batch.bounds[: rows + 1].tolist() == list(range(0, batch.rows + 1, length)), "a row of several documents"
        ids, targets, weights = (
            torch.from_numpy(np.array(x)).to(self.device) for x in (batch.input_ids, batch.targets, batch.weights)
        )
        logits = self.model(ids.long().view(rows, length), use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.long(), reduction="none")
        return (losses * weights).sum()

    def step(self, batches: Sequence[Batch], lr: float) -> tuple[float, float]:
        """(loss, norm of the gradients) of an update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = 0.0
        for batch in batches:
            loss = self.loss(batch)
            loss.backward()
            total += loss.item()
        norm = self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, float(norm)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """The mean loss of a data set."""
        with self.torch.no_grad():
            return float(sum(self.loss(batch).item() for batch in batches))


def train_torch(args: argparse.Namespace, settings: TrainingSettings) -> dict[str, Any]:
    """The same training in torch; its rows are those of our log."""
    origin = new_model(args.out / "config.json", args.out / "tokenizer.json", settings.seed)
    write_first_weights(origin, settings.seed, args.out / "first")
    data, held_out = (tokens_of(args, origin, name) for name in ("train", "val"))
    windows = Windows(data, args.context, settings.batch_size, settings.accumulate, settings.seed)
    device = "cpu" if args.device == "numpy" else "cuda"
    other = Torch(args.out / "first", settings, device)
    rows, begin = Rows(), time.perf_counter()
    for number in range(1, settings.steps + 1):
        batches, lr = windows.step(number), settings.learning_rate(number)
        start = time.perf_counter()
        loss, norm = other.step(batches, lr)
        row = {"step": number, "loss": loss, "lr": lr, "grad_norm": norm}
        row["tokens_per_second"] = sum(b.rows for b in batches) / (time.perf_counter() - start)
        if number % settings.eval_every == 0 or number == settings.steps:
            row["eval_loss"] = other.evaluate(evaluation_batches(held_out, args.context, settings.batch_size))
        rows.append(row)
    seconds = round(time.perf_counter() - begin, 1)
    return {"torch": other.torch.__version__, "seconds": seconds, "speed": speed(rows), "steps": rows}


# ---- both ------------------------------------------------------------------------------------------------------------


def compare(ours: Rows, torch: Rows) -> dict[str, float]:
    """How far the two are apart: the largest differences of losses, at first and in all."""
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(ours, torch, strict=True)]
    ends = [[row["eval_loss"] for row in rows if "eval_loss" in row][-1] for rows in (ours, torch)]
    return {"first_10": max(apart[:10]), "first_100": max(apart[:100]), "all": max(apart), "eval": ends[0] - ends[1]}


def draw(curves: Mapping[str, Rows], path: Path, title: str) -> None:
    """The losses of both programs, means of a few steps, and those of the held-out text."""
    figure = report.new_figure(9, 5.5)
    axes = figure.subplots()
    looks = {"torch": dict(color="#bbbbbb", linewidth=5), "cuplama": dict(color="#1f6f8b", linewidth=1.3)}
    kernel = np.ones(SMOOTHED) / SMOOTHED
    for name, rows in curves.items():
        losses = np.array([row["loss"] for row in rows])
        if len(losses) > SMOOTHED:
            steps = np.arange(SMOOTHED, len(losses) + 1)
            axes.plot(steps, np.convolve(losses, kernel, "valid"), label=f"{name}: training", **looks[name])
        judged = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
        look = looks[name] | {"linestyle": ":", "marker": "o", "markersize": 7 if name == "torch" else 3}
        axes.plot(*zip(*judged, strict=True), label=f"{name}: held-out text", **look)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=11, loc="left")
    report.save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=512, help="tokens, at least 257: every byte is one")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--device", default="cuda", choices=["cuda", "numpy"])
    parser.add_argument("--without-torch", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(args)
    settings = settings_of(args)
    command = shlex.join(["python", "-m", "benchmarks.tinyshakespeare", *sys.argv[1:]])
    found: dict[str, Any] = {"command": command, "ours": train_ours(args, settings)}
    file = args.out / "tinyshakespeare.json"
    write_results(found, file)
    found["text"] = write_text(args)
    curves = {"cuplama": found["ours"]["steps"]}
    if not args.without_torch:
        found["torch"] = train_torch(args, settings)
        curves = {"torch": found["torch"]["steps"], **curves}
        found["apart"] = compare(curves["cuplama"], curves["torch"])
    write_results(found, file)
    draw(curves, args.out / "tinyshakespeare.png", f"Tiny Shakespeare, float32: {found['ours']['device']}")
    for name in ("ours", "torch"):
        if name in found:
            last = found[name]["steps"][-1]
            print(f"{name:<6} {found[name]['speed']:8.0f} tokens/s, {found[name]['seconds']} s, "
                  f"loss {last['loss']:.4f}, held-out {last['eval_loss']:.4f}")  # fmt: skip
    print(f"apart: {found.get('apart')}\n\n{found['text']}")


if __name__ == "__main__":
    main()
