"""Write the goldens of training: tiny random models, their losses and gradients, and ten steps of AdamW.

    python -m tools.make_training_goldens [case ...]

Needs the `golden` extra (torch, transformers). tests/golden/README.md says what each file holds,
tools/goldens/training.py which cases there are. The numbers are those of torch autograd in float64 through
transformers' eager attention, with the two places where transformers goes to float32 whatever the model is in (norms,
softmax) kept in float64 as well; the angles of rope stay float32, since they are so by definition.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tools.goldens.case import Case
from tools.goldens.model import exact, load, randomize
from tools.goldens.spellings import write_configs, write_json
from tools.goldens.training import ADAMW, CASES, ROWS, STEPS, TOKENS

__all__ = ["main", "make", "make_steps"]

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "training"
SEED = 15
MAX_F32_ERROR = 3e-6  # of torch's own float32 gradients, of their norm: a third of the tolerance of the tests
DISTINCT = 4  # batches of the AdamW case, in turn: seen again, so that the loss falls

Tensors = dict[str, torch.Tensor]


@contextmanager
def all_in_double() -> Iterator[None]:
    """Within it nothing that is in float64 goes to float32: transformers does that in norms and in the softmax."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def kept(x: torch.Tensor, *args: Any, **rest: Any) -> torch.Tensor:
        double = x.dtype == torch.float64 and torch.float32 in (*args, *rest.values())
        return x if double else to(x, *args, **rest)

    def double_softmax(x: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
        return softmax(x, dim=dim)

    with (
        mock.patch.object(torch.Tensor, "to", kept),
        mock.patch.object(torch.Tensor, "float", lambda x: kept(x, torch.float32)),
        mock.patch.object(torch.nn.functional, "softmax", double_softmax),
    ):
        yield


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy of the next token: ids [B, T+1]. In at least float32, as transformers' own loss is."""
    logits = model(ids[:, :-1], use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def gradients(folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> tuple[float, Tensors]:
    """The loss, and the gradient of every parameter by its name in the checkpoint, float64."""
    model = load(folder, dtype)
    if dtype == torch.float64:
        with all_in_double():
            loss = loss_of(model, ids)
    else:
        loss = loss_of(model, ids)
    loss.backward()
    return loss.item(), {name: p.grad.double() for name, p in model.named_parameters()}


def relative_errors(found: Tensors, truth: Tensors) -> dict[str, float]:
    """By name |found - truth| / |truth|, as norms."""
    return {name: float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth}


def whole_error(found: Tensors, truth: Tensors) -> float:
    """The same of all gradients as one vector."""
    error = sum(float((found[name] - truth[name]).norm()) ** 2 for name in truth)
    return math.sqrt(error / sum(float(t.norm()) ** 2 for t in truth.values()))


def calm(model: Any) -> None:
    """Make logits less than a unit, attention not sharp and norms about one, as in training.

    Else rounding is amplified, and chance decides which of two runs in bfloat16 is closer to the truth.
    """
    offset = model.config.model_type in ("gemma", "gemma2", "gemma3_text")  # to whose norms' weights one is added
    for name, p in model.named_parameters():
        if offset and "norm" in name:
            p.copy_(exact(p - 1))
        if p is model.get_output_embeddings().weight:
            p *= 0.25
        elif name.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight", "c_attn.weight", "c_fc.weight")):
            p *= 0.5


def write_model(case: Case, folder: Path) -> Any:
    """Write the random model of a case; returns its config."""
    config = AutoConfig.for_model(case.family, **{**case.base, **json.loads(json.dumps(case.config))})
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        randomize(model, SEED, config.tie_word_embeddings)
        calm(model)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_configs(case, folder)
    return config


def make(name: str, case: Case) -> str:
    """Write the folder of a case. Returns a line about it."""
    folder = FOLDER / name
    config = write_model(case, folder)
    ids = torch.from_numpy(np.random.default_rng(SEED).integers(0, config.vocab_size, (ROWS, TOKENS + 1)))
    loss, truth = gradients(folder, ids, torch.float64)
    assert truth.keys() == load_file(folder / "model.safetensors").keys()
    single_loss, single = gradients(folder, ids, torch.float32)
    half_loss, half = gradients(folder, ids, torch.bfloat16)
    worst = max(relative_errors(single, truth).items(), key=lambda item: item[1])
    assert worst[1] < MAX_F32_ERROR, f"{name}: float32 is no good judge of {worst}"
    save_file({key: t.float().contiguous() for key, t in truth.items()}, folder / "gradients.safetensors")
    (folder / "gradients.safetensors").chmod(0o644)
    meta = {
        "case": name,
        "family": case.family,
        "seed": SEED,
        "versions": versions(),
        "token_ids": ids.tolist(),
        "loss": loss,
        "float32": {"loss_error": abs(single_loss - loss), "error": whole_error(single, truth)},
        "bfloat16": {
            "loss_error": abs(half_loss - loss),
            "error": whole_error(half, truth),
            "errors": relative_errors(half, truth),
        },
    }
    write_json(folder / "meta.json", meta)
    size = sum(f.stat().st_size for f in folder.iterdir())
    return (
        f"{name:18} loss {loss:.6f} float32 {abs(single_loss - loss):.0e}, worst {worst[0]} {worst[1]:.1e} "
        f"bfloat16 {whole_error(half, truth):.1e} {size / 1000:.0f} kB"
    )


def versions() -> dict[str, str]:
    """Of the libraries that computed the numbers."""
    return {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}


def rate_of(step: int, settings: dict[str, Any] = ADAMW, steps: int = STEPS) -> float:
    """The learning rate of a step, from 1: linear warm-up, then half a cosine that ends at ``floor`` of the highest."""
    warmup, peak, floor = settings["warmup"], settings["lr"], settings["floor"]
    if step <= warmup:
        return float(peak * step / warmup)
    falling = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    return float(peak * (floor + (1 - floor) * falling))


def optimizer_of(model: Any) -> Any:
    """AdamW, whose weight decay is for tensors of two and more dimensions alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": ADAMW["weight_decay"]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(ADAMW["beta1"], ADAMW["beta2"]), eps=ADAMW["eps"])


def train(folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> tuple[list[dict[str, float]], Tensors]:
    """Steps of AdamW, one for each batch of ids [STEPS, B, T+1]: a row a step, and the weights after the last."""
    model = load(folder, dtype)
    optimizer, rows = optimizer_of(model), []
    for step, batch in enumerate(ids, 1):
        rate = rate_of(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        with all_in_double():
            loss = loss_of(model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW["grad_clip"])
        rows.append({"step": step, "loss": loss.item(), "lr": rate, "grad_norm": float(norm)})
        optimizer.step()
    return rows, {name: p.detach() for name, p in model.named_parameters()}


def make_steps() -> str:
    """Write adamw.json, and the weights after its steps. Returns a line about them."""
    source = FOLDER / str(ADAMW["case"])
    vocab = json.loads((source / "config.json").read_text())["vocab_size"]
    ids = torch.from_numpy(np.random.default_rng(SEED + 1).integers(0, vocab, (DISTINCT, ROWS, TOKENS + 1)))
    ids = ids[torch.arange(STEPS) % DISTINCT]
    rows, weights = train(source, ids, torch.float64)
    single, _ = train(source, ids, torch.float32)
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, single, strict=True))
    assert apart < 2e-6, f"float32 is no good judge of the steps: {apart}"
    assert any(row["grad_norm"] > ADAMW["grad_clip"] for row in rows), "no step is clipped"
    found = {"settings": ADAMW, "versions": versions(), "token_ids": ids.tolist(), "steps": rows}
    write_json(FOLDER / "adamw.json", found)
    save_file({key: t.float().contiguous() for key, t in weights.items()}, FOLDER / "adamw.safetensors")
    (FOLDER / "adamw.safetensors").chmod(0o644)
    losses = " ".join(f"{row['loss']:.4f}" for row in rows)
    return f"adamw              losses {losses}, float32 {apart:.0e}, norms {[round(r['grad_norm'], 2) for r in rows]}"


def main(names: list[str]) -> None:
    """Write the cases of these names, and "adamw"; all if there are none."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if unknown := set(names) - {*CASES, "adamw"}:
        raise SystemExit(f"unknown case {sorted(unknown)}; the cases are {' '.join(CASES)} adamw")
    for name in names or [*CASES, "adamw"]:
        print(make_steps() if name == "adamw" else make(name, CASES[name]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
