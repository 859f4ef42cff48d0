"""Write a trained run as a Hugging Face model folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from tools.story_model.model import NORM_EPS, ROPE_THETA
from tools.story_model.runs import Run
from tools.story_model.tokenizer import END_OF_STORY_ID, save_tokenizer

__all__ = ["export"]


def llama_config(run: Run) -> dict[str, Any]:
    """config.json of a run, in the Hugging Face names."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": run.vocab,
        "hidden_size": run.hidden,
        "intermediate_size": run.mlp,
        "num_hidden_layers": run.layers,
        "num_attention_heads": run.heads,
        "num_key_value_heads": run.kv_heads,
        "head_dim": run.hidden // run.heads,
        "hidden_act": "silu",
        "max_position_embeddings": run.context,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_STORY_ID,
        "eos_token_id": END_OF_STORY_ID,
        "torch_dtype": "bfloat16",
    }


def export(args: argparse.Namespace) -> None:
    """Write the model folder: config, generation config, bf16 safetensors and the tokenizer."""
    from safetensors.torch import save_file

    out, to = Path(args.out), Path(args.to)
    saved = torch.load(out / f"{args.name}.pt", map_location="cpu", weights_only=True)
    run = Run(**saved["run"])
    to.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": t.to(torch.bfloat16).contiguous() for name, t in saved["state"].items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    generation = {
        "bos_token_id": END_OF_STORY_ID,
        "eos_token_id": END_OF_STORY_ID,
        "pad_token_id": END_OF_STORY_ID,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 0,
        "top_p": 0.95,
    }
    (to / "config.json").write_text(json.dumps(llama_config(run), indent=2) + "\n")
    (to / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer = Tokenizer.from_file(str(Path(args.data) / f"vocab{run.vocab}" / "tokenizer.json"))
    save_tokenizer(tokenizer, to, run.context)
