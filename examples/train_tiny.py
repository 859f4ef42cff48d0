"""Train a tiny model until it knows a rhyme by heart, let it recite, and check a gradient by changing a weight.

A few seconds on NumPy. ``cuplama train`` does the same with the same files.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

import cuplama
from cuplama.train import TrainingSettings, gradients
from cuplama.train.loop import Report
from cuplama.train.run import Hooks, Job, run_training

RHYME = "row, row, row your boat, gently down the stream; merrily, merrily, merrily, merrily, life is but a dream.\n"
BEGINNING, NEW = "row, row", "a boat is a dream, row merrily"
TENSOR = "model.layers.0.mlp.down_proj.weight"
CHANGE = 0.01  # of a weight: small, but the loss changes by far more than it is rounded by


def write_inputs(folder: Path) -> None:
    """The text, a tokenizer whose tokens are letters, and the shape of the model."""
    (folder / "rhyme.txt").write_text(RHYME * 20, encoding="utf-8")
    letters = sorted(set(RHYME))
    tokenizer = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(letters), "hidden_size": 48,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def show(report: Report) -> None:
    if report.step % 20 == 0:
        print(f"step {report.step}: loss {report.loss:.2f}")


def changed_loss(folder: Path, place: tuple[np.intp, ...], change: float) -> float:
    """The loss on NEW of the model in a folder, with one weight of TENSOR changed."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    value = tensors[TENSOR][place].copy()
    tensors[TENSOR][place] = value + np.float32(change)
    save_file(tensors, file)
    with cuplama.load(folder, device="numpy") as model:
        loss, _ = gradients(model, [model.encode(NEW)])
    tensors[TENSOR][place] = value
    save_file(tensors, file)
    return loss


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "trained"
        write_inputs(folder)
        settings = TrainingSettings(steps=120, batch_size=4, context=128, lr=1e-2, warmup=10, device="numpy")
        config, tokenizer = folder / "config.json", folder / "tokenizer.json"
        run_training(Job(settings, [folder / "rhyme.txt"], out, config, tokenizer), Hooks(report=show))
        with cuplama.load(out, device="numpy") as model:
            print(
                BEGINNING + model.generate(BEGINNING, max_tokens=len(RHYME) - len(BEGINNING), temperature=0).text,
                end="",
            )
            _, grads = gradients(model, [model.encode(NEW)])
        gradient = grads[TENSOR]
        place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        more, less = changed_loss(out, place, CHANGE), changed_loss(out, place, -CHANGE)
        print(f"gradient {gradient[place]:.4f}, by finite differences {(more - less) / (2 * CHANGE):.4f}")


if __name__ == "__main__":
    main()
