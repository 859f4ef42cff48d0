"""Small tokenizers and models for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from cuplama.models.config import ModelConfig, parse_config
from cuplama.text.tokenizer import Tokenizer
from cuplama.train.marks import Marks

__all__ = ["CONFIG", "LETTERS", "config", "marks", "tokenizer", "write_config", "write_tokenizer"]

LETTERS = "\n abcdefghijklmnopqrstuvwxyz.,:;!?"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 48, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip


def write_tokenizer(folder: Path, *, bos: str = "", eos: str = "", adds: bool = False, template: str = "") -> Path:
    """A tokenizer whose tokens are letters, and <s>, </s>, <sep>; its tokenizer.json.

    bos, eos: those that tokenizer_config.json names; adds: whether BOS is put in front of a text; template: of chats.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>", "<sep>")])
    if adds:
        made.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, made.token_to_id(bos))])
    made.save(str(folder / "tokenizer.json"))
    named = {k: v for k, v in {"bos_token": bos, "eos_token": eos, "chat_template": template}.items() if v}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder / "tokenizer.json"


def tokenizer(folder: Path, **options: Any) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(folder, **options))


def config(**changes: Any) -> ModelConfig:
    return parse_config({**CONFIG, **changes})


def marks(found: Tokenizer, **changes: Any) -> Marks:
    return Marks.of(found, config(**changes))


def write_config(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**CONFIG, **changes}))
    return path
