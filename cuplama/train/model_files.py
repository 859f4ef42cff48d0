"""The files of a trained model: a folder that transformers, vLLM and cuplama read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..dtypes import dtype_name
from ..hub import HUB_FILES
from ..models.checkpoint import INDEX
from ..models.config import ModelConfig
from ..models.new_adapter import adapter_files
from ..models.peft import ADAPTER_CONFIG, ADAPTER_MODEL
from ..quant.readers import FILES
from ..text.tokenizer import Tokenizer
from .marks import Marks
from .saving import Staging
from .trainer import Trainer

__all__ = ["AdapterFiles", "ModelFiles", "files_of_folder", "files_of_new_model"]

_NOT_COPIED = ("config.json", INDEX, "adapter_config.json", *FILES)
# What a model folder has beside config and weights, and what older libraries read of a tokenizer.
_COPIED = (*(name for name in HUB_FILES if name not in _NOT_COPIED), "vocab.json", "merges.txt", "tokenizer.model")
_DTYPE_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True)
class ModelFiles:
    """config: the content of config.json but for the dtype; copies: (file, its name in the folder); texts: the content
    of JSON files by name."""

    config: Mapping[str, Any]
    copies: tuple[tuple[Path, str], ...]
    texts: Mapping[str, Mapping[str, Any]]

    def write(self, staging: Staging, trainer: Trainer) -> None:
        """All of the folder."""
        tensors = dict(trainer.export())
        staging.tensors("model.safetensors", tensors)
        dtype = _DTYPE_NAMES[dtype_name(next(iter(tensors.values())).dtype)]
        key = "dtype" if "dtype" in self.config else "torch_dtype"
        for name, content in {"config.json": {**self.config, key: dtype}, **self.texts}.items():
            staging.text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        for source, name in self.copies:
            staging.copy(source, name)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as PEFT saves one. config: of the model with it; base: what the model is called."""

    config: ModelConfig
    base: str

    def write(self, staging: Staging, trainer: Trainer) -> None:
        """All of the folder."""
        settings, tensors = adapter_files(self.config, trainer.weights(), self.base)
        staging.tensors(ADAPTER_MODEL, tensors)
        staging.text(ADAPTER_CONFIG, json.dumps(settings, indent=2) + "\n")


def files_of_folder(folder: Path, config: ModelConfig, tied: bool) -> ModelFiles:
    """Those of a model that was trained before. tied: whether its head and embedding are one matrix."""
    found = sorted(p for p in (*folder.iterdir(), *folder.glob("*/*.jinja")) if p.is_file())
    names = ((p, p.relative_to(folder).as_posix()) for p in found)
    copies = tuple((p, n) for p, n in names if any(fnmatchcase(n, pattern) for pattern in _COPIED))
    return ModelFiles(_full(config, tied), copies, {})


def files_of_new_model(
    config: ModelConfig, tied: bool, tokenizer_file: Path, tokenizer: Tokenizer, marks: Marks
) -> ModelFiles:
    """Those of a new model. tokenizer_file: is copied, with the files beside it where its name is tokenizer.json.

    What a config or a tokenizer leaves open is written down: other libraries would fill in BOS and EOS of another
    model.
    """
    ids = {"bos_token_id": marks.bos, "eos_token_id": _eos(config, marks)}
    raw = {**_full(config, tied), **ids}
    copies = [(tokenizer_file, "tokenizer.json")]
    if tokenizer_file.name == "tokenizer.json":
        beside = files_of_folder(tokenizer_file.parent, config, tied).copies
        copies += [(p, n) for p, n in beside if n not in ("tokenizer.json", "generation_config.json")]
    texts: dict[str, dict[str, Any]] = {"generation_config.json": ids}
    if not any(name == "tokenizer_config.json" for _, name in copies):
        tokens = {"bos_token": marks.bos, "eos_token": marks.eos}
        named = {name: None if id is None else tokenizer.piece(id) for name, id in tokens.items()}
        texts["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.context,
        }
    return ModelFiles(raw, tuple(copies), texts)


def _full(config: ModelConfig, tied: bool) -> dict[str, Any]:
    """config.json with what it may leave out, so that every library reads it in the same way."""
    family = config.family
    said = {"architectures": [family.architecture], "model_type": family.model_type, "tie_word_embeddings": tied}
    return {**config.raw, **said}


def _eos(config: ModelConfig, marks: Marks) -> int | list[int] | None:
    """All ids of the config that are special tokens, or else the tokenizer's."""
    ids = [id for id in config.eos if id in marks.stops] or ([] if marks.eos is None else [marks.eos])
    return ids[0] if len(ids) == 1 else ids or None
