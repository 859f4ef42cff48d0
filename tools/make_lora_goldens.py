"""Write the golden adapters: LoRA adapters of golden models as PEFT saves them, with logits or gradients of PEFT.

    python -m tools.make_lora_goldens [case ...]

Needs the `golden` extra. tests/golden/README.md says what each file holds. Everything follows
from the seed. What cuplama itself writes of an adapter is given to PEFT as well, which must compute the same with it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import save_file

from cuplama.models.config import load_config
from cuplama.models.new_adapter import adapter_files
from cuplama.models.peft import load_adapter
from tools.goldens.model import load, logits_of
from tools.goldens.spellings import write_json
from tools.make_training_goldens import all_in_double, loss_of

__all__ = ["main", "make", "make_gradients"]

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
PROMPTS = (1, 9, 29)  # in tokens
SEED = 11
MIN_CHANGE = 5e-2  # that an adapter makes in the logits: far beyond the tolerance of the tests

# Golden model -> the settings of its adapter. Between them: some and all parts of a stack, stacks that are one matrix,
# transposed matrices, biases, the head, ranks and scales of their own, and every way to name layers.
CASES: Mapping[str, Mapping[str, Any]] = {
    "llama3-gqa": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "qwen2": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
    "phi3": {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["qkv_proj", "gate_up_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.qkv_proj": 24},
    },
    "gpt2": {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"]},
    "mistral-window": {"r": 2, "lora_alpha": 3, "target_modules": r".*\.(k|v|o)_proj|lm_head"},
    "llama32-tied": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["k_proj", "up_proj", "o_proj", "down_proj"],
        "exclude_modules": ["down_proj"],
        "layers_to_transform": [1],
    },
}

# The same for the golden models of training: some parts of a stack, transposed matrices, stacks that are one matrix.
GRADIENTS: Mapping[str, Mapping[str, Any]] = {
    "llama-3-kv-heads": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "lm_head"]},
    "gpt2": {"r": 3, "lora_alpha": 3, "target_modules": ["c_attn", "c_fc"]},
    "phi3": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
}


def with_adapter(base: Any, settings: Mapping[str, Any], size_of_b: float = 0.4) -> Any:
    """The model with an adapter of random numbers that bfloat16 and float16 hold exactly."""
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.05, **settings))
    rng = torch.Generator().manual_seed(SEED)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.requires_grad_()
            size = p.shape[1] ** -0.5 if "lora_A" in name else size_of_b
            p.data.copy_((size * torch.randn(p.shape, generator=rng)).to(torch.bfloat16).half().float())
    return model.eval()


def make(name: str) -> None:
    """One folder. Raises AssertionError where the adapter changes little, or PEFT reads ours in another way."""
    case, folder = GOLDEN / "cases" / name, GOLDEN / "lora" / name
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    prompts = [rng.integers(0, load_config(case).vocab_size, n).astype(np.int32) for n in PROMPTS]
    plain = [logits_of(load(case), ids) for ids in prompts]
    model = with_adapter(load(case), CASES[name])
    logits = [logits_of(model, ids) for ids in prompts]
    change = max(float(np.abs(a - b).max()) for a, b in zip(plain, logits, strict=True))
    assert change > MIN_CHANGE, change
    save(model, folder)
    ours = [logits_of(peft.PeftModel.from_pretrained(load(case), rewritten(case, folder)), ids) for ids in prompts]
    assert all(np.array_equal(a, b) for a, b in zip(logits, ours, strict=True))
    merged = model.merge_and_unload()
    arrays = {f"prompt_{j}": ids for j, ids in enumerate(prompts)} | {f"logits_{j}": x for j, x in enumerate(logits)}
    arrays |= {f"merged_{j}": logits_of(merged, ids) for j, ids in enumerate(prompts)}
    np.savez_compressed(folder / "golden.npz", **arrays)
    write_json(folder / "meta.json", {"base": name, "seed": SEED, "change": change, "versions": versions()})
    print(f"{name}: the adapter changes logits by {change:.3g}")


def make_gradients(name: str) -> None:
    """One folder: an adapter, and the gradients of its numbers by torch in float64."""
    case, folder = GOLDEN / "training" / name, GOLDEN / "lora_training" / name
    folder.mkdir(parents=True, exist_ok=True)
    ids = torch.tensor(json.loads((case / "meta.json").read_text())["token_ids"])
    with torch.enable_grad():
        model = with_adapter(load(case), GRADIENTS[name], size_of_b=0.1)
        save(model, folder)
        model = model.double()
        with all_in_double():
            loss = loss_of(model, ids)
        loss.backward()
    found = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if "lora_" in n}
    save_file({n: g.numpy() for n, g in found.items()}, folder / "gradients.safetensors")
    write_json(folder / "meta.json", {"base": name, "seed": SEED, "loss": loss.item(), "versions": versions()})
    print(f"{name}: {len(found)} gradients")


def versions() -> dict[str, str]:
    """Of the libraries."""
    return {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__}


def save(model: Any, folder: Path) -> None:
    """The adapter as PEFT writes it, in the same bytes every time."""
    model.save_pretrained(folder, save_embedding_layers=False)  # a copy of the head, where the head is adapted
    (folder / "README.md").unlink(missing_ok=True)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = f"golden/{folder.name}"
    if isinstance(settings["target_modules"], list):
        settings["target_modules"].sort()  # PEFT writes a set
    write_json(folder / "adapter_config.json", settings)


def rewritten(case: Path, folder: Path) -> str:
    """A folder with the adapter as cuplama writes it."""
    config, weights = load_adapter(folder, load_config(case))
    settings, tensors = adapter_files(config, {n: w.array() for n, w in weights.items()}, f"golden/{case.name}")
    out = Path(tempfile.mkdtemp())
    write_json(out / "adapter_config.json", settings)
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, out / "adapter_model.safetensors")
    return str(out)


def main(names: list[str]) -> None:
    """Write the cases that are named, or all."""
    torch.set_grad_enabled(False)
    for name in names or CASES:
        make(name)
    for name in GRADIENTS:
        make_gradients(name)


if __name__ == "__main__":
    main(sys.argv[1:])
