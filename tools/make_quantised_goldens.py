"""Write the quantised golden models: tiny checkpoints of each layout, and what transformers computes with the numbers.

    python -m tools.make_quantised_goldens [case ...]

Needs the `golden` extra. tests/golden/README.md says what each file holds, tools/goldens/quantised.py which cases there
are, tools/goldens/packers.py which library wrote a layout.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes
import compressed_tensors
import numpy as np
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tools.divergence import divergence, kl, summary
from tools.goldens.model import load, logits_of, randomize, run
from tools.goldens.quantised import CASES, Case
from tools.goldens.spellings import write_json

__all__ = ["main", "make"]

CASES_DIR = Path(__file__).resolve().parents[1] / "tests" / "golden" / "quantised"
PROMPTS = (1, 9, 29)  # in tokens
SEED = 7
EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")  # ends of names of what all experts share
MIN_CHANGE = 2e-2  # that quantising makes in the logits: ten times the tolerance of the tests
MIN_ALIKE = 0.25  # of the tokens come before one that has other experts in bfloat16; `kl` is a mean of those alone


def write_model(case: Case, folder: Path, truth: Path) -> int:
    """Write the quantised model, and a float32 model of its numbers. Returns how many matrices are quantised."""
    config = AutoConfig.for_model(case.family, **json.loads(json.dumps(case.base)), pad_token_id=None)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, SEED, config.tie_word_embeddings)
    model.save_pretrained(truth)
    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    names = [name for name, m in model.named_modules() if isinstance(m, kinds)]
    transposed = [name for name, m in model.named_modules() if isinstance(m, Conv1D)]
    ends = () if case.head else ("lm_head", "embed_tokens", "wte", "wpe")
    matrices = [n for n in names if not n.endswith(ends) and n not in case.plain and not case.experts_only]
    if case.settings["quant_method"] != "compressed-tensors":  # others have no quantised embedding
        matrices = [n for n in matrices if not n.endswith("embed_tokens")]
    tensors: dict[str, torch.Tensor] = {}
    state = {
        name: t for name, t in model.state_dict().items() if not (config.tie_word_embeddings and "lm_head" in name)
    }
    count = len(matrices)
    for name, value in state.items():
        module = name.removesuffix(".weight")
        if name.endswith(EXPERTS):
            state[name] = value.clone()
            for written, own in experts_of(config, name, state[name]):
                stored, numbers = case.pack(written, own.clone(), case.settings)
                tensors |= {written + end: t.clone().contiguous() for end, t in stored.items()}
                own.copy_(numbers)
                count += 1
        elif name.endswith(".weight") and module in matrices:
            turned = value.T if module in transposed else value
            stored, numbers = case.pack(module, turned.clone(), case.settings)
            tensors |= {module + end: t.clone().contiguous() for end, t in stored.items()}
            state[name] = numbers.T if module in transposed else numbers
        else:
            tensors[name] = value.to(case.dtype).contiguous()
            state[name] = tensors[name].float()
    model.load_state_dict(state, strict=False)
    model.save_pretrained(truth)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    saved = json.loads((truth / "config.json").read_text())
    settings = case.settings
    if settings["quant_method"] == "compressed-tensors":  # as ModelCompressor.update_config of the library writes them
        whole = QuantizationConfig.model_validate(json.loads(json.dumps(settings))).model_dump(mode="json")
        settings = {**whole, "sparsity_config": {}, "transform_config": {}, "version": compressed_tensors.__version__}
    saved |= {"dtype": str(case.dtype).removeprefix("torch."), "quantization_config": settings}
    write_json(folder / "config.json", saved)
    return count


def experts_of(config: Any, name: str, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The modules that a tensor of all experts is written as, each with its part of it, [out, in] or [E, out, in]."""
    if config.model_type == "gpt_oss":
        return [(name, value.transpose(1, 2))]
    place, _, kind = name.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj")}.get(kind, (kind,))
    return [
        (f"{place}.{e}.{part}", half)
        for e, expert in enumerate(value)
        for part, half in zip(parts, expert.chunk(len(parts)), strict=True)
    ]


def plain_logits(case: Case, folder: Path, ids: np.ndarray) -> np.ndarray:
    """The logits of the model before it was quantised."""
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomize(model, SEED, config.tie_word_embeddings)
    return logits_of(model, ids)


def loaded_kl(folder: Path, prompts: list[np.ndarray], truth: list[np.ndarray]) -> float | None:
    """Mean KL of what transformers computes with the quantised folder itself; None where it does not load it here.

    Layouts of weights alone give the model's own rounding; those that also quantise activations give more.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval()
        found = [logits_of(model, ids) for ids in prompts]
    except (ImportError, ValueError, RuntimeError, AttributeError):
        return None
    return float(np.concatenate([kl(a, b) for a, b in zip(truth, found, strict=True)]).mean())


def make(name: str, case: Case) -> str:
    """Write the folder of a case. Returns a line about it."""
    folder = CASES_DIR / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        truth = Path(temporary)
        count = write_model(case, folder, truth)
        rng = np.random.default_rng(SEED)
        prompts = [rng.integers(3, case.base["vocab_size"], n).astype(np.int32) for n in PROMPTS]
        rows = [run(load(truth), ids) for ids in prompts]
        low = [run(load(truth, torch.bfloat16), ids) for ids in prompts]
        change = float(np.abs(plain_logits(case, truth, prompts[-1]) - rows[-1].logits).max())
    assert change > MIN_CHANGE, f"{name}: the logits do not show that it is quantised ({change})"
    parts = list(map(divergence, rows, low))
    apart = np.concatenate(parts)
    assert len(apart) >= MIN_ALIKE * sum(PROMPTS), f"{name}: {len(apart)} tokens come before others have other experts"
    arrays: dict[str, Any] = {f"prompt_{j}": ids for j, ids in enumerate(prompts)}
    for j, row in enumerate(rows):
        arrays |= row.arrays(j)
    np.savez_compressed(folder / "golden.npz", **arrays)
    meta = {
        "case": name,
        "versions": {
            "transformers": transformers.__version__,
            "torch": torch.__version__.split("+")[0],
            "compressed-tensors": compressed_tensors.__version__,
            "bitsandbytes": bitsandbytes.__version__,
        },
        "matrices": count,
        **summary({"bfloat16": parts}, PROMPTS),
        "loaded": loaded_kl(folder, prompts, [row.logits for row in rows]),
        "change": round(change, 3),
    }
    write_json(folder / "meta.json", meta)
    loaded = "not loaded" if meta["loaded"] is None else f"{meta['loaded']:.1e}"
    size = sum(f.stat().st_size for f in folder.iterdir())
    mean = f"{apart.mean():.1e} of {len(apart)} tokens"
    return f"{name:28} {count:2} matrices, kl {mean}, loaded {loaded}, change {change:.2f}, {size / 1000:.0f} kB"


def main(names: list[str]) -> None:
    """Write the cases of these names; all if there are none."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if unknown := set(names) - set(CASES):
        raise SystemExit(f"unknown case {sorted(unknown)}; the cases are {' '.join(CASES)}")
    for name in names or CASES:
        print(make(name, CASES[name]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
