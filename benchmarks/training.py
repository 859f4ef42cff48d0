"""What the benchmarks of training share: a random checkpoint, and one program's steps on it in a process of its own.

``python -m benchmarks.training JOB`` runs one job, which is a ``Job`` in JSON, and prints its result as the last line.
A program alone in its process has the memory for itself, and one that fails takes no other with it.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cuplama.backends import Backend
from cuplama.backends.numpy import NumPyBackend
from cuplama.dtypes import DTYPES
from cuplama.models.checkpoint import load_weights
from cuplama.models.config import ModelConfig, load_config
from cuplama.ops.signature import dim_value

__all__ = ["PEERS", "Job", "agree", "batches", "measure", "run_job", "write_checkpoint", "write_results"]

PEERS = ("torch eager", "torch.compile", "ours")
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.1
CHECKED = 3  # steps whose losses are kept
LOSS_APART, NORM_APART = 5e-3, 0.01  # what two programs in bf16 may differ by: absolute, and of the norm
_SAFETENSORS = {"float32": ("F32", "f32"), "bfloat16": ("BF16", "bf16")}


@dataclass(frozen=True)
class Job:
    """One program's steps.

    peer: one of ``PEERS``; folder: of the checkpoint; device: "cuda", or "cpu", where our program is NumPy; dtype:
    "float32" or "bfloat16"; rows, context: of a batch, in texts and in tokens of each; warm: steps before those that
    are timed; threads: of the CPU; recompute: as of ``TrainingSettings``, for our program.
    """

    peer: str
    folder: str
    device: str
    dtype: str
    rows: int
    context: int
    warm: int
    steps: int
    threads: int = 2
    recompute: str = "nothing"
    learning_rate: float = 1e-4


def write_checkpoint(config: ModelConfig, folder: Path, dtype: str, seed: int = 0) -> None:
    """A model folder of random weights, as GPT-2 begins: normal of deviation 0.02, norms 1, biases 0."""
    raw = {**config.raw, "model_type": config.family.model_type, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    label, name = _SAFETENSORS[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    tensors, at = dict(_tensors(config)), 0
    for tensor, (shape, _) in tensors.items():
        end = at + math.prod(shape) * DTYPES[name].itemsize
        header[tensor] = {"dtype": label, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, kind in tensors.values():
            if kind == "normal":
                values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            else:
                values = np.full(shape, kind == "norm", np.float32)
            file.write(values.astype(DTYPES[name]).tobytes())


def _tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """(tensor name, (shape, "normal", "norm" or "bias")) as the checkpoint has them; a tied head is left out."""
    dims, tied = config.dims(), config.raw.get("tie_word_embeddings", config.family.tied)
    for name, recipe in config.recipes().items():
        if name == "lm_head" and tied:
            continue
        for text, tensor in recipe.parts:
            shape = tuple(dim_value(d, dims) for d in text.split(","))
            kind = "bias" if name.endswith(".bias") else "norm" if len(shape) == 1 else "normal"
            yield tensor, (shape[::-1] if recipe.transposed else shape, kind)


def batches(vocab_size: int, job: Job, distinct: int = 4) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Random token ids [B, T+1] of a few batches, which are taken in turn."""
    shape = distinct, job.rows, job.context + 1
    return list(np.random.default_rng(1).integers(0, vocab_size, shape))


def measure(job: Job, step: Callable[[int], float], wait: Callable[[], None]) -> dict[str, Any]:
    """Take the steps of a job. step: number -> loss, or NaN where nobody asks for it; wait: until all is done."""
    losses = [step(i) for i in range(CHECKED)]
    for i in range(job.warm):
        step(CHECKED + i)
    wait()
    seconds = []
    for i in range(job.steps):
        start = time.perf_counter()
        step(CHECKED + job.warm + i)
        wait()
        seconds.append(time.perf_counter() - start)
    tokens = job.rows * job.context
    return {
        "losses": losses,
        "tokens_per_second": tokens / statistics.median(seconds),
        "fastest": tokens / min(seconds),
        "slowest": tokens / max(seconds),
        "seconds": [round(s, 6) for s in seconds],
    }


# ---- the peers -------------------------------------------------------------------------------------------------------


def torch_steps(job: Job) -> dict[str, Any]:
    """The steps of transformers' model: parameters, gradients and moments all in the job's dtype, nothing clipped."""
    import torch
    import transformers

    torch.set_num_threads(job.threads)
    cuda = job.device == "cuda"
    context = torch.zeros(1, device=job.device)
    before = torch.cuda.mem_get_info()[0] if cuda else 0
    model = torch_model(job.folder, job.dtype, job.device)
    run = torch.compile(model) if job.peer == "torch.compile" else model
    optimizer = torch_optimizer(model, job.learning_rate, fused=cuda)
    ids = [torch.from_numpy(x).to(job.device) for x in batches(model.config.vocab_size, job)]
    norms: list[float] = []

    def step(number: int) -> float:
        batch = ids[number % len(ids)]
        inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        loss = run(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        if number == 0:
            norms.append(math.sqrt(sum(float(p.grad.float().norm()) ** 2 for p in model.parameters())))
        if number == CHECKED and cuda:
            torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()) if number < CHECKED else math.nan

    found = measure(job, step, torch.cuda.synchronize if cuda else lambda: None)
    del context
    found |= {"grad_norm": norms[0], "torch": torch.__version__, "transformers": transformers.__version__}
    if cuda:
        found |= {
            "device": torch.cuda.get_device_name(),
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "device_bytes": before - torch.cuda.mem_get_info()[0],
        }
    return found


def torch_model(folder: str, dtype: str, device: str) -> Any:
    """transformers' model with its fastest attention that torch.compile takes, to be trained without dropout."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=kind, attn_implementation="sdpa")
    return model.to(device).train()


def torch_optimizer(model: Any, learning_rate: float, fused: bool, betas: tuple[float, float] = BETAS) -> Any:
    """The AdamW of torch, which decays what has two and more dimensions."""
    import torch

    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=EPS, fused=fused)


def our_steps(job: Job) -> dict[str, Any]:
    """The steps of cuplama: weights and activations in the job's dtype, masters and moments in float32."""
    from cuplama.train import Batch, Trainer, TrainingSettings

    folder, memory = Path(job.folder), Memory(job.device)
    facts: dict[str, Any] = {}
    backend = open_backend(job)
    config = load_config(folder)
    settings = TrainingSettings(
        steps=1 << 20, schedule="constant", lr=job.learning_rate, batch_size=job.rows, weight_decay=WEIGHT_DECAY,
        beta1=BETAS[0], beta2=BETAS[1], eps=EPS, grad_clip=0, recompute=job.recompute,
    )  # fmt: skip
    trainer = Trainer(config, load_weights(folder, config), settings, backend, job.context)
    ready = [Batch.of_rows(ids) for ids in batches(config.vocab_size, job)]

    def step(number: int) -> float:
        loss, norm = trainer.step([ready[number % len(ready)]], job.learning_rate).wait()
        facts.setdefault("grad_norm", norm)
        memory.look()
        return loss

    found = measure(job, step, lambda: None)  # a step waits for its loss
    facts |= {"device": backend.describe(), "recompute": job.recompute}
    if job.device == "cuda":
        facts |= {"allocated_bytes": memory.most, "device_bytes": memory.most}
    return found | facts


def open_backend(job: Job) -> Backend:
    """Ours for a job."""
    if job.device == "cpu":
        return NumPyBackend()
    from cuplama.backends.cuda.backend import CudaBackend

    return CudaBackend(_SAFETENSORS[job.dtype][1])


class Memory:
    """Bytes that this process takes of the card, its context aside. most: the largest number that ``look`` saw."""

    def __init__(self, device: str) -> None:
        self.most, self._runtime = 0, None
        if device == "cuda":
            import cupy

            self._runtime = cupy.cuda.runtime
            cupy.zeros(1)  # makes the context
            self._before = self._runtime.memGetInfo()[0]

    def look(self) -> None:
        if self._runtime is not None:
            self.most = max(self.most, self._before - self._runtime.memGetInfo()[0])


def run_job(job: Job, timeout: float) -> dict[str, Any]:
    """The result of a job in a process of its own; of one that fails the reason, as "error"."""
    command = [sys.executable, "-m", "benchmarks.training", json.dumps(asdict(job))]
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {name: str(job.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"peer": job.peer, "error": f"took more than {timeout:g} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"peer": job.peer, "error": (done.stderr.strip().splitlines() or ["no output"])[-1][:500]}
    return {"peer": job.peer, **json.loads(lines[-1]), "process_seconds": round(time.perf_counter() - start, 1)}


def agree(result: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two programs begin with the same losses, and the same norm of the first gradients."""
    near = (abs(a - b) <= LOSS_APART for a, b in zip(result["losses"], other["losses"], strict=True))
    return all(near) and math.isclose(result["grad_norm"], other["grad_norm"], rel_tol=NORM_APART)


def write_results(found: Mapping[str, Any], file: Path | None) -> None:
    """Write what was found so far, if there is a file for it."""
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    print(json.dumps((our_steps if job.peer == "ours" else torch_steps)(job)), flush=True)


if __name__ == "__main__":
    main()
