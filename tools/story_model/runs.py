"""The runs that make the story model, as data: shapes, texts and options of `cuplama train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BATCH_SIZE", "CONTEXT", "STUDENT", "TEACHERS", "VOCAB_SIZE", "Run"]

VOCAB_SIZE = 4096
CONTEXT = 1024  # tokens that the models are made for
BATCH_SIZE = 32  # rows of so many tokens: four or five stories, which see those before them as in a file of stories


@dataclass(frozen=True)
class Run:
    """One model. hidden, layers, heads, kv_heads, mlp: its shape; texts: names of files that `prepare` wrote, or
    "written"; options: of `cuplama train`, besides those that all runs have."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    texts: tuple[str, ...]
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "torch_dtype": "bfloat16",
        }

    def arguments(self) -> list[str]:
        """The options of `cuplama train`."""
        common = {
            "steps": self.steps, "batch-size": BATCH_SIZE, "context": CONTEXT, "optimizer": "muon", "lr": 5e-3,
            "warmup": 100, "schedule": "cosine", "documents": "together", "dtype": "bfloat16", "eval-every": 200,
            "save-every": 0,
        }  # fmt: skip
        return [word for name, value in {**common, **self.options}.items() for word in (f"--{name}", str(value))]


def _teacher(number: int, texts: tuple[str, ...], dropout: float, weight_decay: float) -> Run:
    options = {"seed": number, "dropout": dropout, "weight-decay": weight_decay}
    return Run(f"teacher-{number}", 512, 6, 8, 4, 1408, texts, 1500, options)


TEACHERS: tuple[Run, ...] = (
    _teacher(0, ("corpus", "extra"), 0.2, 1.0),
    _teacher(1, ("corpus", "extra"), 0.25, 0.7),
    _teacher(2, ("corpus", "extra", "tales"), 0.2, 0.7),
)

STUDENT = Run(
    "student", 384, 4, 6, 2, 960, ("corpus", "extra", "written"), 4000, {"teacher-share": 0.9, "weight-decay": 0.2}
)
